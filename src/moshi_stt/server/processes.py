"""The server's further processes, which carry its WebSockets: starting them, handing sockets over, counting, ending.

One interpreter carries a few hundred streams: reading, decoding and writing messages takes it some 100 us a frame. With
more streams than that, the first process keeps the model and HTTP, and hands each WebSocket, right after its upgrade, to the
process that has fewest. It lends the slot along and gets it back when no row will name it again. A process that dies takes its
own connections along; another is started. Where none can take a socket, the first process carries it itself.
"""

import asyncio
import logging
import socket
import sys
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from prometheus_client.metrics_core import Metric

from moshi_stt.config import ServerConfig
from moshi_stt.engine.batch import BatchEngine
from moshi_stt.engine.slots import Slot
from moshi_stt.server import handover
from moshi_stt.server.channel import Channel

log = logging.getLogger(__name__)

START_SECONDS = 60.0
"""How long they have to get ready; then the server goes on without those that are not."""

COUNT_SECONDS = 1.0
"""How long one has to say what it has counted; then its last answer stands."""

STOP_SECONDS = 5.0
"""How long one has to end before it is killed."""

DRAIN_SECONDS = 1.0
"""After a process's death its slots rest for so long: a row of theirs may still be under way."""

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
        self.ready = asyncio.Event()
        self.ended = asyncio.Event()
        """Whether the last `End` has been answered."""
        self.lent: dict[tuple[str, int], Slot] = {}
        self.counts: handover.Counted | None = None
        self.counted = asyncio.Event()
        self.pause = 1.0


class SocketProcesses:
    """All of them. Used on the event loop alone."""

    def __init__(self, config: ServerConfig, engines: Mapping[str, BatchEngine], count: int) -> None:
        """engines: started, by module name, loaded for so many processes."""
        self._config = config
        self._engines = dict(engines)
        self._children = [_Child(number) for number in range(count)]
        self._tasks: set[asyncio.Task[None]] = set()
        self._stopping = False
        self._number = 0
        self._past: list[Metric] = []
        """Counters of processes that died."""

    def __len__(self) -> int:
        return len(self._children)

    # ---- starting and ending -----------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Start all, and wait until they are ready."""
        await asyncio.gather(*(self._spawn(child) for child in self._children))
        waits = [asyncio.create_task(child.ready.wait()) for child in self._children]
        _, late = await asyncio.wait(waits, timeout=START_SECONDS)
        for wait in late:
            wait.cancel()
        if late:
            log.error("%d of %d socket processes are not ready after %g s", len(late), len(waits), START_SECONDS)

    async def _spawn(self, child: _Child) -> None:
        here, there = socket.socketpair()
        with there:
            child.process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "moshi_stt.server.socket_process",
                str(there.fileno()),
                stdin=asyncio.subprocess.DEVNULL,
                pass_fds=[there.fileno()],
                start_new_session=True,  # Ctrl-C is ours: we end them in order
            )
        channel = Channel(
            here,
            lambda message, _: self._on_message(child, message),
            lambda: self._on_closed(child),
        )
        child.channel = channel
        lines = {name: engine.connect() for name, engine in self._engines.items()}
        shares = {name: engine.share(child.number) for name, engine in self._engines.items()}
        descriptors = [d for line in lines.values() for d in (line.memory, line.signal.fileno())]
        channel.send(handover.SetUp(self._config, shares, logging.getLogger().level), descriptors)
        for line in lines.values():
            line.close()

    def _on_closed(self, child: _Child) -> None:
        """A process has died, or ended as it was told."""
        child.ready.clear()
        child.ended.set()
        child.counted.set()
        lent, child.lent = child.lent, {}
        loop = asyncio.get_running_loop()
        for (name, _), slot in lent.items():
            loop.call_later(DRAIN_SECONDS, self._engines[name].take_back, slot)
        if child.counts is not None:
            self._past += [family for family in child.counts.families if family.type != "gauge"]
            child.counts = None
        if not self._stopping:
            self._begin(self._respawn(child, len(lent)))

    async def _respawn(self, child: _Child, streams: int) -> None:
        assert child.process is not None
        status = await child.process.wait()
        log.error("socket process %d ended with status %d and took %d streams along", child.number, status, streams)
        await asyncio.sleep(child.pause)
        child.pause = min(2 * child.pause, LONGEST_PAUSE_SECONDS)
        if not self._stopping and all(engine.ready for engine in self._engines.values()):
            await self._spawn(child)

    def _begin(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def end(self, sentence: str, code: int, within_seconds: float) -> None:
        """End every connection of theirs with this Error and status; return when they are gone."""
        asked = [child for child in self._children if child.channel is not None and child.ready.is_set()]
        for child in asked:
            child.ended.clear()
            self._send(child, handover.End(sentence, code, within_seconds))
        with suppress(TimeoutError):
            async with asyncio.timeout(within_seconds + 2.0):
                for child in asked:
                    await child.ended.wait()

    async def stop(self) -> None:
        """End the processes. Idempotent."""
        self._stopping = True
        for task in list(self._tasks):
            task.cancel()
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

    def hand_over(self, module: str, transport: asyncio.Transport, early: bytes, peer: str) -> bool:
        """Give an upgraded socket to a process, if one can take it and there is a slot; whether it has gone.

        early: what the client sent behind its request.
        """
        engine = self._engines.get(module)
        ready = [child for child in self._children if child.ready.is_set()]
        if engine is None or not ready or not engine.ready or engine.used_slots >= engine.total_slots:
            return False
        child = min(ready, key=lambda child: len(child.lent))
        sock = transport.get_extra_info("socket")
        if child.channel is None or child.channel.backlog > MOST_BACKLOG or transport.get_write_buffer_size() or sock is None:
            return False
        slot = engine.lend()
        child.lent[module, slot.index] = slot
        self._send(child, handover.Take(module, slot.index, peer, early), [sock.fileno()])
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
                if message.number == self._number:
                    child.counted.set()
            case handover.Ready():
                child.ready.set()
            case handover.Ended():
                child.ended.set()
            case handover.Logged():
                record = logging.makeLogRecord(message.record)
                logging.getLogger(record.name).handle(record)

    # ---- counting ----------------------------------------------------------------------------------------------------

    async def count(self) -> tuple[list[Metric], dict[str, int]]:
        """What they have counted, families of the same name beside each other, and the samples that wait, by module."""
        self._number += 1
        asked = [child for child in self._children if child.ready.is_set()]
        for child in asked:
            child.counted.clear()
            self._send(child, handover.Count(self._number))
        with suppress(TimeoutError):
            async with asyncio.timeout(COUNT_SECONDS):
                for child in asked:
                    await child.counted.wait()
        families = list(self._past)
        queued = dict.fromkeys(self._engines, 0)
        for child in self._children:
            if child.counts is not None:
                families += child.counts.families
                for name, samples in child.counts.queued_samples.items():
                    queued[name] += samples
        return families, queued
