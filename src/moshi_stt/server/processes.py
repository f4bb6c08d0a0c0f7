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
from collections.abc import Coroutine, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
from prometheus_client.metrics_core import Metric

from moshi_stt.config import ServerConfig
from moshi_stt.engine.batch import BatchEngine
from moshi_stt.engine.share import Line
from moshi_stt.engine.slots import Slot
from moshi_stt.errors import EngineError
from moshi_stt.server import framing, handover
from moshi_stt.server.channel import Channel
from moshi_stt.server.doors.door import Door, Opening
from moshi_stt.server.metrics import add_samples

log = logging.getLogger(__name__)

START_SECONDS = 60.0
"""How long they have to get ready; then the server goes on without those that are not."""

COUNT_SECONDS = 1.0
"""How long one has to say what it has counted; then its last answer stands."""

STOP_SECONDS = 5.0
"""How long one has to end before it is killed."""

HANG_SECONDS = 30.0
"""One that does not answer for so long is killed."""

RETIRE_SECONDS = 3.0
"""How long the connections of one whose engine failed have."""

FIRST_PAUSE_SECONDS = 1.0
LONGEST_PAUSE_SECONDS = 30.0
"""Between two starts of one that keeps dying."""

MOST_BACKLOG = 32
"""Messages that one has not read yet, beyond which it gets no further socket."""


class _Child:
    """One process."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.process: asyncio.subprocess.Process | None = None
        self.channel: Channel | None = None
        self.started_at = 0.0
        self.ready = asyncio.Event()
        self.failed = False
        """Whether an engine of it is of no use any more."""
        self.ended = asyncio.Event()
        """Whether the last `End` has been answered."""
        self.deaf = False
        """Whether it was not, in the time that it had."""
        self.lent: dict[tuple[str, int], Slot] = {}
        self.gone: dict[str, asyncio.Event] = {}
        """By module: whether no row of it is under way any more, after its end."""
        self.counts: handover.Counted | None = None
        self.counted = asyncio.Event()
        """Whether the last `Count` has been answered."""
        self.asked_at = 0.0
        """When that was sent."""
        self.pause = FIRST_PAUSE_SECONDS

    @property
    def takes(self) -> bool:
        """Whether it can be given a socket."""
        return self.ready.is_set() and not self.failed and self.channel is not None and self.channel.backlog <= MOST_BACKLOG


class SocketProcesses:
    """All of them. Used on the event loop alone."""

    def __init__(self, config: ServerConfig, engines: Mapping[str, BatchEngine], count: int) -> None:
        """engines: started, by module name, loaded for so many processes."""
        self._config = config
        self._engines = dict(engines)
        self._children = [_Child(number) for number in range(count)]
        self._tasks: set[asyncio.Task[None]] = set()
        self._stopping = False
        self._past: dict[str, Metric] = {}
        """What processes that died had counted, by name."""

    def __len__(self) -> int:
        return len(self._children)

    # ---- starting and ending -----------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Start all, and wait until they are ready. Raises EngineError where one cannot be started at all."""
        try:
            await asyncio.gather(*(self._spawn(child) for child in self._children))
        except OSError as error:
            raise EngineError(
                f"the processes for WebSockets cannot be started: {error}. To do without: socket_processes = 0"
            ) from error
        self._begin(self._watch())
        waits = [asyncio.create_task(child.ready.wait()) for child in self._children]
        try:
            _, late = await asyncio.wait(waits, timeout=START_SECONDS)
        finally:
            for wait in waits:
                wait.cancel()
        if late:
            log.error("%d of %d socket processes are not ready after %g s", len(late), len(waits), START_SECONDS)

    async def _spawn(self, child: _Child) -> None:
        here, there = socket.socketpair()
        with there:
            try:
                child.process = await asyncio.create_subprocess_exec(
                    sys.executable,
                    "-P",  # no module of the folder that we happen to be in
                    "-m",
                    "moshi_stt.server.socket_process",
                    str(there.fileno()),
                    stdin=asyncio.subprocess.DEVNULL,
                    pass_fds=[there.fileno()],
                    env={**os.environ, "PYTHONPATH": os.pathsep.join(path or str(Path.cwd()) for path in sys.path)},
                    start_new_session=True,  # Ctrl-C is ours: we end them in order
                )
            except BaseException:
                here.close()
                raise
        channel = Channel(here, lambda message, _: self._on_message(child, message), lambda: self._on_closed(child))
        child.channel = channel
        child.started_at = asyncio.get_running_loop().time()
        child.failed = child.deaf = False
        child.counted.set()
        child.gone = {}
        lines: dict[str, Line] = {}
        try:
            for name, engine in self._engines.items():
                gone = asyncio.Event()
                lines[name] = engine.connect(gone.set)
                child.gone[name] = gone
            shares = {name: engine.share(child.number) for name, engine in self._engines.items()}
            descriptors = [d for line in lines.values() for d in (line.memory, line.signal.fileno())]
            config = msgspec.structs.replace(self._config, authorized_ids=frozenset())  # keys are asked for here
            channel.send(handover.SetUp(config, shares, logging.getLogger().level), descriptors)
        except OSError:
            channel.close()  # which ends it
            raise
        finally:
            for line in lines.values():
                line.close()

    def _on_closed(self, child: _Child) -> None:
        """A process has died, or ended as it was told."""
        child.ready.clear()
        child.ended.set()
        child.counted.set()
        if child.counts is not None:
            for family in child.counts.families:
                if family.type != "gauge":
                    add_samples(self._past.setdefault(family.name, Metric(family.name, "", family.type)), family)
            child.counts = None
        lent, child.lent = child.lent, {}
        if not self._stopping:
            self._begin(self._replace(child, lent))

    async def _replace(self, child: _Child, lent: Mapping[tuple[str, int], Slot]) -> None:
        """Take the slots of a process back that is about to be gone, and start another."""
        await self._reap(child)
        assert child.process is not None
        log.error("socket process %d ended with status %s and %d streams", child.number, child.process.returncode, len(lent))
        for gone in child.gone.values():
            await gone.wait()
        for (name, _), slot in lent.items():
            self._engines[name].take_back(slot)
        if asyncio.get_running_loop().time() - child.started_at > 2 * LONGEST_PAUSE_SECONDS:
            child.pause = FIRST_PAUSE_SECONDS
        while not self._stopping:
            await asyncio.sleep(child.pause)
            child.pause = min(2 * child.pause, LONGEST_PAUSE_SECONDS)
            if not all(engine.ready for engine in self._engines.values()):
                return  # the server is about to end
            try:
                await self._spawn(child)
                return
            except OSError as error:
                log.error("socket process %d cannot be started, trying again: %s", child.number, error)

    async def _retire(self, child: _Child) -> None:
        """End a process that can carry no more streams, while its clients are told."""
        await self._end(child, "the server failed on this connection; its log says why", framing.INTERNAL, RETIRE_SECONDS)
        self._send(child, handover.Stop())
        await self._reap(child)

    async def _watch(self) -> None:
        """Kill a process that does not answer: its clients had better connect again."""
        now = asyncio.get_running_loop().time
        while True:
            await asyncio.sleep(HANG_SECONDS / 4)
            for child in self._children:
                if child.ready.is_set() and child.process is not None:
                    if not child.counted.is_set() and now() - child.asked_at > HANG_SECONDS:
                        log.error("socket process %d has not answered for %g s; killing it", child.number, HANG_SECONDS)
                        with suppress(ProcessLookupError):
                            child.process.kill()
                    self._ask(child)

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def end(self, sentence: str, code: int, within_seconds: float) -> None:
        """End every connection of theirs with this Error and status; return when they are gone."""
        asked = [child for child in self._children if child.ready.is_set() and not child.deaf]
        await asyncio.gather(*(self._end(child, sentence, code, within_seconds) for child in asked))

    async def _end(self, child: _Child, sentence: str, code: int, within_seconds: float) -> None:
        child.ended.clear()
        self._send(child, handover.End(sentence, code, within_seconds))
        try:
            await asyncio.wait_for(child.ended.wait(), within_seconds + 2.0)
        except TimeoutError:
            child.deaf = True

    async def stop(self) -> None:
        """End the processes. Idempotent."""
        self._stopping = True
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for child in self._children:
            self._send(child, handover.Stop())
        await asyncio.gather(*(self._reap(child) for child in self._children))
        for child in self._children:
            if child.channel is not None:
                child.channel.close()

    async def _reap(self, child: _Child) -> None:
        process = child.process
        if process is None:
            return
        try:
            await asyncio.wait_for(process.wait(), STOP_SECONDS)
        except TimeoutError:
            log.error("socket process %d did not end within %g s; killing it", child.number, STOP_SECONDS)
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()

    # ---- sockets -----------------------------------------------------------------------------------------------------

    def hand_over(
        self, module: str, door: Door, opening: Opening, transport: asyncio.Transport, early: bytes, peer: str
    ) -> bool:
        """Give an upgraded socket to a process, if one can take it and there are slots; whether it has gone.

        early: what the client sent after its request.
        """
        engine = self._engines.get(module)
        able = [child for child in self._children if child.takes]
        if engine is None or not able or not engine.ready or opening.on_demand:
            return False
        if engine.used_slots + opening.channels > engine.total_slots:
            return False
        sock = transport.get_extra_info("socket")
        if sock is None or transport.is_closing() or transport.get_write_buffer_size():
            return False
        child = min(able, key=lambda child: len(child.lent))
        slots = [engine.lend() for _ in range(opening.channels)]
        child.lent.update({(module, slot.index): slot for slot in slots})
        try:
            indices = tuple(slot.index for slot in slots)
            self._send(child, handover.Take(module, door, opening, indices, peer, early), [sock.fileno()])
        except OSError as error:
            log.warning("%s: carried by the first process: %s", peer, error)
            for slot in slots:
                engine.take_back(child.lent.pop((module, slot.index)))
            return False
        if not child.ready.is_set():
            return False  # the sending found it dead
        transport.abort()  # closes our descriptor of it, not the connection
        return True

    def _send(self, child: _Child, message: Any, descriptors: list[int] | None = None) -> None:
        if child.channel is not None:
            child.channel.send(message, descriptors or [])

    def _on_message(self, child: _Child, message: Any) -> None:
        match message:
            case handover.Freed():
                slot = child.lent.pop((message.module, message.slot), None)
                if slot is not None:
                    self._engines[message.module].take_back(slot)
            case handover.Counted():
                child.counts = message
                child.counted.set()
            case handover.Ready():
                child.ready.set()
            case handover.Ended():
                child.ended.set()
            case handover.Failed():
                child.failed = True
                if all(engine.ready for engine in self._engines.values()):  # else the whole server is about to end
                    self._begin(self._retire(child))
            case handover.Logged():
                record = logging.makeLogRecord(message.record)
                logging.getLogger(record.name).handle(record)

    # ---- counting ----------------------------------------------------------------------------------------------------

    def _ask(self, child: _Child) -> None:
        """Ask for its counts, unless it still has to answer that."""
        if child.counted.is_set():
            child.counted.clear()
            child.asked_at = asyncio.get_running_loop().time()
            self._send(child, handover.Count())

    async def count(self) -> tuple[list[Metric], dict[str, int]]:
        """What they have counted, families of the same name beside each other, and the samples that wait, by module."""
        asked = [child for child in self._children if child.ready.is_set()]
        for child in asked:
            self._ask(child)
        with suppress(TimeoutError):
            async with asyncio.timeout(COUNT_SECONDS):
                for child in asked:
                    await child.counted.wait()
        families = list(self._past.values())
        queued = dict.fromkeys(self._engines, 0)
        for child in self._children:
            if child.counts is not None:
                families += child.counts.families
                for name, samples in child.counts.queued_samples.items():
                    queued[name] += samples
        return families, queued
