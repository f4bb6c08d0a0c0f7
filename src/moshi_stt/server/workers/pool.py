"""The server's further processes, which carry its WebSockets: handing sockets over, lending slots, counting.

One interpreter carries a few hundred streams: reading, decoding and writing messages takes it some 100 us a frame. With
more streams than that, the first process keeps the model and HTTP, and hands each WebSocket, right after its upgrade, to the
process that has fewest. It lends the slot along and gets it back when no row will name it again. A process that dies takes its
own connections along; another is started. Where none can take a socket, the first process carries it itself.
"""

import asyncio
import logging
import socket
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import msgspec
from prometheus_client.metrics_core import Metric

from moshi_stt.config import ServerConfig
from moshi_stt.engine.sharing import BackendLink, ShareableEngine
from moshi_stt.engine.slots import Slot
from moshi_stt.errors import EngineError
from moshi_stt.server import framing
from moshi_stt.server.doors.door import Door, NewClient
from moshi_stt.server.metrics import add_samples
from moshi_stt.server.resume import Place
from moshi_stt.server.workers import messages
from moshi_stt.server.workers.supervisor import Child, Supervisor, sendable

log = logging.getLogger(__name__)

START_SECONDS = 60.0
"""How long they have to get ready; then the server goes on without those that are not."""

COUNT_SECONDS = 1.0
"""How long one has to say what it has counted; then its last answer stands."""

RETIRE_SECONDS = 3.0
"""How long the connections of one whose engine failed have."""


class _Worker(Child):
    """One process."""

    def __init__(self, number: int) -> None:
        super().__init__(str(number))
        self.number = number
        self.lent: dict[tuple[str, int], Slot] = {}
        self.told: dict[tuple[str, int], Callable[[], None]] = {}
        """Whom to tell when a slot's connection is gone."""
        self.gone: dict[str, asyncio.Event] = {}
        """By module: whether no row of it is under way any more, after its end."""
        self.counts: messages.Counted | None = None
        self.counted = asyncio.Event()
        """Whether the last `Count` has been answered."""

    @property
    def streams(self) -> int:
        return len(self.lent)


class WorkerPool(Supervisor[_Worker]):
    """All of them. Used on the event loop alone."""

    program = "moshi_stt.server.workers.worker"
    kind = "socket process"

    def __init__(
        self, config: ServerConfig, engines: Mapping[str, ShareableEngine], count: int, place: Place, servers: int = 1
    ) -> None:
        """engines: started, by module name, loaded for so many processes. place: of this process.

        servers: how many processes like this one share what the configuration's limits say of all streams together.
        """
        self._workers = [_Worker(number) for number in range(count)]
        super().__init__(self._workers)
        self._config = config
        self._engines = dict(engines)
        self._place = place
        self._servers = servers
        self._past: dict[str, Metric] = {}
        """What processes that died had counted, by name."""

    # ---- starting and ending -----------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Start all, and wait until they are ready. Raises EngineError where one cannot be started at all."""
        try:
            await self.spawn_all()
        except OSError as error:
            raise EngineError(
                f"the processes for WebSockets cannot be started: {error}. To do without: socket_processes = 0"
            ) from error
        waits = [asyncio.create_task(worker.ready.wait()) for worker in self._workers]
        try:
            _, late = await asyncio.wait(waits, timeout=START_SECONDS)
        finally:
            for wait in waits:
                wait.cancel()
        if late:
            log.error("%d of %d socket processes are not ready after %g s", len(late), len(waits), START_SECONDS)

    def set_up(self, child: _Worker) -> None:
        child.counted.set()
        child.gone = {}
        lines: dict[str, BackendLink] = {}
        try:
            for name, engine in self._engines.items():
                gone = asyncio.Event()
                lines[name] = engine.connect(gone.set)
                child.gone[name] = gone
            shares = {name: engine.share(child.number) for name, engine in self._engines.items()}
            descriptors = [d for line in lines.values() for d in (line.memory, line.signal.fileno())]
            config = msgspec.structs.replace(self._config, authorized_ids=frozenset())  # keys are asked for here
            place = self._place._replace(process=child.number + 1)
            processes = (len(self._workers) + 1) * self._servers
            child.send(messages.SetUp(config, shares, logging.getLogger().level, place, processes), descriptors)
        finally:
            for line in lines.values():
                line.close()

    @property
    def is_wanted(self) -> bool:
        return all(engine.ready for engine in self._engines.values())  # else the server is about to end

    def died(self, child: _Worker) -> None:
        child.counted.set()
        if child.counts is not None:
            for family in child.counts.families:
                if family.type != "gauge":
                    add_samples(self._past.setdefault(family.name, Metric(family.name, "", family.type)), family)
            child.counts = None
        told, child.told = child.told, {}
        for tell in told.values():
            tell()

    async def buried(self, child: _Worker) -> None:
        for gone in child.gone.values():
            await gone.wait()
        lent, child.lent = child.lent, {}
        for (name, _), slot in lent.items():
            self._engines[name].take_back(slot)

    async def _retire(self, worker: _Worker) -> None:
        """End a process that can carry no more streams, while its clients are told."""
        order = messages.End("the server failed on this connection; its log says why", framing.INTERNAL, RETIRE_SECONDS)
        await self.tell(worker, order, RETIRE_SECONDS)
        worker.send(messages.Stop())
        await self.reap(worker)

    # ---- sockets -----------------------------------------------------------------------------------------------------

    def hand_over(self, module: str, client: NewClient, transport: asyncio.Transport, on_gone: Callable[[], None]) -> bool:
        """To the process that has fewest, if it is a WebSocket's and there are slots for it."""
        sock = sendable(transport)
        if sock is None or not self.give(module, client, sock, on_gone):
            return False
        transport.abort()  # closes our descriptor of it, not the connection
        return True

    def give(self, module: str, client: NewClient, sock: socket.socket, on_gone: Callable[[], None]) -> bool:
        """The same with a socket that is read by nobody yet. It stays the caller's, who closes it."""
        engine = self._engines.get(module)
        able = [worker for worker in self._workers if worker.takes]
        opening = client.opening
        if engine is None or not able or not engine.ready or opening.on_demand or not isinstance(client.door, Door):
            return False
        if engine.used_slots + opening.channels > engine.total_slots:
            return False
        worker = min(able, key=lambda worker: len(worker.lent))
        slots = [engine.lend() for _ in range(opening.channels)]
        worker.lent.update({(module, slot.index): slot for slot in slots})
        try:
            indices = tuple(slot.index for slot in slots)
            worker.send(messages.Take(module, client, indices), [sock.fileno()])
        except OSError as error:
            log.warning("%s: carried by the first process: %s", client.peer, error)
            for slot in slots:
                engine.take_back(worker.lent.pop((module, slot.index)))
            return False
        if not worker.ready.is_set():
            return False  # the sending found it dead
        worker.told[module, slots[0].index] = on_gone
        return True

    def hand_back(self, place: Place, client: NewClient, transport: asyncio.Transport) -> bool:
        if place._replace(process=0) != self._place:
            return False
        sock = sendable(transport)
        if sock is None or not self.give_back(place.process, client, sock):
            return False
        transport.abort()  # closes our descriptor of it, not the connection
        return True

    def give_back(self, process: int, client: NewClient, sock: socket.socket) -> bool:
        """The same to the process of this number, from 1 on, with a socket that nobody reads yet. It stays the caller's."""
        worker = self._workers[process - 1] if 0 < process <= len(self._workers) else None
        if worker is None or not worker.ready.is_set():
            return False
        worker.send(messages.TakeBack(client), [sock.fileno()])
        return True

    def on_message(self, child: _Worker, message: Any) -> None:
        match message:
            case messages.Freed():
                slot = child.lent.pop((message.module, message.slot), None)
                tell = child.told.pop((message.module, message.slot), None)
                if tell is not None:
                    tell()
                if slot is not None:
                    self._engines[message.module].take_back(slot)
            case messages.Counted():
                child.counts = message
                child.counted.set()
            case messages.Failed():
                child.failed = True
                if self.is_wanted:
                    self.begin(self._retire(child))

    # ---- counting ----------------------------------------------------------------------------------------------------

    def look(self) -> None:
        """What they have counted is known, at most so old, when one dies."""
        for worker in self._workers:
            if worker.ready.is_set():
                self._ask(worker)

    def _ask(self, worker: _Worker) -> None:
        """Ask for its counts, unless it still has to answer that."""
        if worker.counted.is_set():
            worker.counted.clear()
            worker.send(messages.Count(), [])

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
