"""The server's further processes, which carry its WebSockets: starting them, handing sockets over, counting, ending.

One interpreter carries a few hundred streams: reading, decoding and writing messages takes it some 100 us a frame. With
more streams than that, the first process keeps the model and HTTP, and hands each WebSocket, right after its upgrade, to the
process that has fewest. It lends the slot along and gets it back when no row will name it again. A process that dies takes its
own connections along; another is started. Where none can take a socket, the first process carries it itself.
"""

import asyncio
import logging
import os
import socket
import sys
from collections.abc import Callable, Coroutine, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
from prometheus_client.metrics_core import Metric

from moshi_stt.config import ServerConfig
from moshi_stt.engine.sharing import BackendLink, ShareableEngine
from moshi_stt.engine.slots import Slot
from moshi_stt.errors import EngineError
from moshi_stt.server import framing
from moshi_stt.server.doors.door import Door, Opening
from moshi_stt.server.metrics import add_samples
from moshi_stt.server.resume import Place
from moshi_stt.server.workers import messages
from moshi_stt.server.workers.ipc import MessageSocket

log = logging.getLogger(__name__)

START_SECONDS = 60.0
"""How long they have to get ready; then the server goes on without those that are not."""

COUNT_SECONDS = 1.0
"""How long one has to say what it has counted; then its last answer stands."""

STOP_SECONDS = 5.0
"""How long one has to end before it is killed."""

PING_SECONDS = 0.25
"""How often each is asked whether it is at work."""

OWED_SECONDS = 1.0
"""One that has owed an answer for so long gets no further socket until it answers."""

HANG_SECONDS = 30.0
"""One that does not answer for so long is killed."""

RETIRE_SECONDS = 3.0
"""How long the connections of one whose engine failed have."""

FIRST_PAUSE_SECONDS = 1.0
LONGEST_PAUSE_SECONDS = 30.0
"""Between two starts of one that keeps dying."""

MOST_BACKLOG = 32
"""Messages that one has not read yet, beyond which it gets no further socket."""


class _Worker:
    """One process."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.process: asyncio.subprocess.Process | None = None
        self.channel: MessageSocket | None = None
        self.started_at = 0.0
        self.ready = asyncio.Event()
        self.failed = False
        """Whether an engine of it is of no use any more."""
        self.ended = asyncio.Event()
        """Whether the last `End` has been answered."""
        self.deaf = False
        """Whether it was not, in the time that it had."""
        self.lent: dict[tuple[str, int], Slot] = {}
        self.told: dict[tuple[str, int], Callable[[], None]] = {}
        """Whom to tell when a slot's connection is gone."""
        self.gone: dict[str, asyncio.Event] = {}
        """By module: whether no row of it is under way any more, after its end."""
        self.counts: messages.Counted | None = None
        self.counted = asyncio.Event()
        """Whether the last `Count` has been answered."""
        self.asked_at = 0.0
        """When that was sent."""
        self.pinged_at: float | None = None
        """Since when it has owed an answer to a ping."""
        self.pause = FIRST_PAUSE_SECONDS

    @property
    def takes(self) -> bool:
        """Whether it can be given a socket."""
        if self.pinged_at is not None and asyncio.get_running_loop().time() - self.pinged_at > OWED_SECONDS:
            return False
        return self.ready.is_set() and not self.failed and self.channel is not None and self.channel.backlog <= MOST_BACKLOG


class WorkerPool:
    """All of them. Used on the event loop alone."""

    def __init__(self, config: ServerConfig, engines: Mapping[str, ShareableEngine], count: int, place: Place) -> None:
        """engines: started, by module name, loaded for so many processes. place: of this process."""
        self._place = place
        self._config = config
        self._engines = dict(engines)
        self._workers = [_Worker(number) for number in range(count)]
        self._tasks: set[asyncio.Task[None]] = set()
        self._stopping = False
        self._past: dict[str, Metric] = {}
        """What processes that died had counted, by name."""

    def __len__(self) -> int:
        return len(self._workers)

    # ---- starting and ending -----------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Start all, and wait until they are ready. Raises EngineError where one cannot be started at all."""
        try:
            await asyncio.gather(*(self._spawn(worker) for worker in self._workers))
        except OSError as error:
            raise EngineError(
                f"the processes for WebSockets cannot be started: {error}. To do without: socket_processes = 0"
            ) from error
        self._begin(self._watch())
        waits = [asyncio.create_task(worker.ready.wait()) for worker in self._workers]
        try:
            _, late = await asyncio.wait(waits, timeout=START_SECONDS)
        finally:
            for wait in waits:
                wait.cancel()
        if late:
            log.error("%d of %d socket processes are not ready after %g s", len(late), len(waits), START_SECONDS)

    async def _spawn(self, worker: _Worker) -> None:
        here, there = socket.socketpair()
        with there:
            try:
                worker.process = await asyncio.create_subprocess_exec(
                    sys.executable,
                    "-P",  # no module of the folder that we happen to be in
                    "-m",
                    "moshi_stt.server.workers.worker",
                    str(there.fileno()),
                    stdin=asyncio.subprocess.DEVNULL,
                    pass_fds=[there.fileno()],
                    env={**os.environ, "PYTHONPATH": os.pathsep.join(path or str(Path.cwd()) for path in sys.path)},
                    start_new_session=True,  # Ctrl-C is ours: we end them in order
                )
            except BaseException:
                here.close()
                raise
        channel = MessageSocket(here, lambda message, _: self._on_message(worker, message), lambda: self._on_closed(worker))
        worker.channel = channel
        worker.started_at = asyncio.get_running_loop().time()
        worker.failed = worker.deaf = False
        worker.counted.set()
        worker.pinged_at = None
        worker.gone = {}
        lines: dict[str, BackendLink] = {}
        try:
            for name, engine in self._engines.items():
                gone = asyncio.Event()
                lines[name] = engine.connect(gone.set)
                worker.gone[name] = gone
            shares = {name: engine.share(worker.number) for name, engine in self._engines.items()}
            descriptors = [d for line in lines.values() for d in (line.memory, line.signal.fileno())]
            config = msgspec.structs.replace(self._config, authorized_ids=frozenset())  # keys are asked for here
            place = self._place._replace(process=worker.number + 1)
            set_up = messages.SetUp(config, shares, logging.getLogger().level, place, len(self._workers) + 1)
            channel.send(set_up, descriptors)
        except OSError:
            channel.close()  # which ends it
            raise
        finally:
            for line in lines.values():
                line.close()

    def _on_closed(self, worker: _Worker) -> None:
        """A process has died, or ended as it was told."""
        worker.ready.clear()
        worker.ended.set()
        worker.counted.set()
        if worker.counts is not None:
            for family in worker.counts.families:
                if family.type != "gauge":
                    add_samples(self._past.setdefault(family.name, Metric(family.name, "", family.type)), family)
            worker.counts = None
        lent, worker.lent = worker.lent, {}
        told, worker.told = worker.told, {}
        for tell in told.values():
            tell()
        if not self._stopping:
            self._begin(self._replace(worker, lent))

    async def _replace(self, worker: _Worker, lent: Mapping[tuple[str, int], Slot]) -> None:
        """Take the slots of a process back that is about to be gone, and start another."""
        await self._reap(worker)
        assert worker.process is not None
        log.error("socket process %d ended with status %s and %d streams", worker.number, worker.process.returncode, len(lent))
        for gone in worker.gone.values():
            await gone.wait()
        for (name, _), slot in lent.items():
            self._engines[name].take_back(slot)
        if asyncio.get_running_loop().time() - worker.started_at > 2 * LONGEST_PAUSE_SECONDS:
            worker.pause = FIRST_PAUSE_SECONDS
        while not self._stopping:
            await asyncio.sleep(worker.pause)
            worker.pause = min(2 * worker.pause, LONGEST_PAUSE_SECONDS)
            if not all(engine.ready for engine in self._engines.values()):
                return  # the server is about to end
            try:
                await self._spawn(worker)
                return
            except OSError as error:
                log.error("socket process %d cannot be started, trying again: %s", worker.number, error)

    async def _retire(self, worker: _Worker) -> None:
        """End a process that can carry no more streams, while its clients are told."""
        await self._end(worker, "the server failed on this connection; its log says why", framing.INTERNAL, RETIRE_SECONDS)
        self._send(worker, messages.Stop())
        await self._reap(worker)

    async def _watch(self) -> None:
        """Kill a process that does not answer: its clients had better connect again."""
        now = asyncio.get_running_loop().time
        counted_at = now()
        while True:
            await asyncio.sleep(min(PING_SECONDS, HANG_SECONDS / 4))
            for worker in self._workers:
                if worker.ready.is_set() and worker.pinged_at is None:
                    worker.pinged_at = now()
                    self._send(worker, messages.Ping())
            if now() - counted_at < HANG_SECONDS / 4:
                continue
            counted_at = now()
            for worker in self._workers:
                if worker.ready.is_set() and worker.process is not None:
                    if not worker.counted.is_set() and now() - worker.asked_at > HANG_SECONDS:
                        log.error("socket process %d has not answered for %g s; killing it", worker.number, HANG_SECONDS)
                        with suppress(ProcessLookupError):
                            worker.process.kill()
                    self._ask(worker)

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def end(self, sentence: str, code: int, within_seconds: float) -> None:
        """End every connection of theirs with this Error and status; return when they are gone."""
        asked = [worker for worker in self._workers if worker.ready.is_set() and not worker.deaf]
        await asyncio.gather(*(self._end(worker, sentence, code, within_seconds) for worker in asked))

    async def _end(self, worker: _Worker, sentence: str, code: int, within_seconds: float) -> None:
        await self._tell(worker, messages.End(sentence, code, within_seconds), within_seconds)

    async def _tell(self, worker: _Worker, order: messages.End | messages.Drain, within_seconds: float) -> None:
        """Send the order, and wait until no connection is left."""
        worker.ended.clear()
        self._send(worker, order)
        try:
            await asyncio.wait_for(worker.ended.wait(), within_seconds + 4.0)
        except TimeoutError:
            worker.deaf = True

    async def drain(self, sentence: str, code: int, drain_seconds: float, within_seconds: float) -> None:
        """Let their live streams go on for a while, then let what they sent be transcribed; return when all are gone."""
        order = messages.Drain(sentence, code, drain_seconds, within_seconds)
        asked = [worker for worker in self._workers if worker.ready.is_set() and not worker.deaf]
        await asyncio.gather(*(self._tell(worker, order, drain_seconds + within_seconds) for worker in asked))

    async def stop(self) -> None:
        """End the processes. Idempotent."""
        self._stopping = True
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for worker in self._workers:
            self._send(worker, messages.Stop())
        await asyncio.gather(*(self._reap(worker) for worker in self._workers))
        for worker in self._workers:
            if worker.channel is not None:
                worker.channel.close()

    async def _reap(self, worker: _Worker) -> None:
        process = worker.process
        if process is None:
            return
        try:
            await asyncio.wait_for(process.wait(), STOP_SECONDS)
        except TimeoutError:
            log.error("socket process %d did not end within %g s; killing it", worker.number, STOP_SECONDS)
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()

    # ---- sockets -----------------------------------------------------------------------------------------------------

    def hand_over(
        self,
        module: str,
        door: Door,
        opening: Opening,
        transport: asyncio.Transport,
        early: bytes,
        peer: str,
        on_gone: Callable[[], None],
    ) -> bool:
        """Give an upgraded socket to a process, if one can take it and there are slots; whether it has gone.

        early: what the client sent after its request. on_gone: told when its connection is gone.
        """
        engine = self._engines.get(module)
        able = [worker for worker in self._workers if worker.takes]
        if engine is None or not able or not engine.ready or opening.on_demand:
            return False
        if engine.used_slots + opening.channels > engine.total_slots:
            return False
        sock = transport.get_extra_info("socket")
        if sock is None or transport.is_closing() or transport.get_write_buffer_size():
            return False
        worker = min(able, key=lambda worker: len(worker.lent))
        slots = [engine.lend() for _ in range(opening.channels)]
        worker.lent.update({(module, slot.index): slot for slot in slots})
        try:
            indices = tuple(slot.index for slot in slots)
            self._send(worker, messages.Take(module, door, opening, indices, peer, early), [sock.fileno()])
        except OSError as error:
            log.warning("%s: carried by the first process: %s", peer, error)
            for slot in slots:
                engine.take_back(worker.lent.pop((module, slot.index)))
            return False
        if not worker.ready.is_set():
            return False  # the sending found it dead
        worker.told[module, slots[0].index] = on_gone
        transport.abort()  # closes our descriptor of it, not the connection
        return True

    def take_back_client(
        self, process: int, door: Door, opening: Opening, transport: asyncio.Transport, early: bytes, peer: str
    ) -> bool:
        """Give an upgraded socket to the worker of this number, from 1 on, which has its stream; whether it has gone."""
        worker = self._workers[process - 1] if process <= len(self._workers) else None
        sock = transport.get_extra_info("socket")
        if worker is None or not worker.ready.is_set() or sock is None or transport.is_closing():
            return False
        if transport.get_write_buffer_size():
            return False
        self._send(worker, messages.TakeBack(door, opening, peer, early), [sock.fileno()])
        transport.abort()  # closes our descriptor of it, not the connection
        return True

    def _send(self, worker: _Worker, message: Any, descriptors: list[int] | None = None) -> None:
        if worker.channel is not None:
            worker.channel.send(message, descriptors or [])

    def _on_message(self, worker: _Worker, message: Any) -> None:
        match message:
            case messages.Freed():
                slot = worker.lent.pop((message.module, message.slot), None)
                tell = worker.told.pop((message.module, message.slot), None)
                if tell is not None:
                    tell()
                if slot is not None:
                    self._engines[message.module].take_back(slot)
            case messages.Counted():
                worker.counts = message
                worker.counted.set()
            case messages.Pong():
                worker.pinged_at = None
            case messages.Ready():
                worker.ready.set()
            case messages.Ended():
                worker.ended.set()
            case messages.Failed():
                worker.failed = True
                if all(engine.ready for engine in self._engines.values()):  # else the whole server is about to end
                    self._begin(self._retire(worker))
            case messages.Logged():
                record = logging.makeLogRecord(message.record)
                logging.getLogger(record.name).handle(record)

    # ---- counting ----------------------------------------------------------------------------------------------------

    def _ask(self, worker: _Worker) -> None:
        """Ask for its counts, unless it still has to answer that."""
        if worker.counted.is_set():
            worker.counted.clear()
            worker.asked_at = asyncio.get_running_loop().time()
            self._send(worker, messages.Count())

    async def count(self) -> tuple[list[Metric], dict[str, int]]:
        """What they have counted, families of the same name next to each other, and the samples that wait, by module."""
        asked = [worker for worker in self._workers if worker.ready.is_set()]
        for worker in asked:
            self._ask(worker)
        with suppress(TimeoutError):
            async with asyncio.timeout(COUNT_SECONDS):
                for worker in asked:
                    await worker.counted.wait()
        families = list(self._past.values())
        queued = dict.fromkeys(self._engines, 0)
        for worker in self._workers:
            if worker.counts is not None:
                families += worker.counts.families
                for name, samples in worker.counts.queued_samples.items():
                    queued[name] += samples
        return families, queued
