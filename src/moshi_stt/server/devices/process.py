"""A model process: the engines of one device, the connections that are handed to it, and HTTP for the first process alone.

It is the ordinary server without a port: the same engines, connections and doors. Sockets come over its socket pair, after the
handshake, with key and limits checked; files and questions come by HTTP over a Unix socket that only this user may open.
"""

import asyncio
import gc
import logging
import socket
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

from moshi_stt.cores import limit_cores, usable_cores
from moshi_stt.engine.engine import Engine
from moshi_stt.errors import MoshiSttError
from moshi_stt.server import framing
from moshi_stt.server.app import Server
from moshi_stt.server.connections import Connections
from moshi_stt.server.devices import messages
from moshi_stt.server.devices.boundaries import Boundaries, NotedTransport
from moshi_stt.server.metrics import Metrics
from moshi_stt.server.service import Member, Service
from moshi_stt.server.workers.child import ChildProcess, log_to, socket_of
from moshi_stt.server.workers.messages import Drain, End, Failed

log = logging.getLogger(__name__)

DESERTED_SECONDS = 3.0
"""How long clients have for the close handshake once the first process has died."""


class DeviceProcess(ChildProcess):
    """The state of this process."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__(sock)
        self._loop = asyncio.get_running_loop()
        self._server: Server | None = None
        self._boundaries: Boundaries | None = None
        self._http: Path | None = None
        self._transports: dict[int, NotedTransport] = {}
        """By id, of the sockets that this process carries itself."""
        self._coming: dict[str, dict[int, int]] = defaultdict(dict)
        """Streams, by module and id, of sockets that are no connections yet."""
        self._reported: dict[str, int] = {}

    @property
    def _service(self) -> Service:
        assert self._server is not None
        return self._server.service

    # ---- starting and ending -----------------------------------------------------------------------------------------

    async def _set_up(self, order: messages.SetUp, descriptors: list[int]) -> None:
        log_to(self.channel, order.log_level, order.prefix)
        self._boundaries = Boundaries(descriptors[0])
        self._http = Path(order.http)
        if order.sharers > 1:
            limit_cores(max(1, usable_cores() // order.sharers))
        try:
            member = Member(Path(order.http), order.place, order.devices)
            metrics = _ReportingMetrics(lambda: self._loop.call_soon_threadsafe(self._report))
            self._server = Server(order.config, order.build(order.config), "", 0, metrics, member=member)
            await self._server.start()
        except MoshiSttError as error:
            self.channel.send(messages.StartFailed(type(error).__name__, str(error)))
            self.finish(1)
            return
        gc.collect()
        gc.freeze()  # models and modules stay: full collections, which stop everything, need not walk them again
        for served in self._service:
            self.begin(self._watch(served.engine))
        self.begin(self._serve())
        self._report()
        self.channel.send(messages.Started({served.module.name: served.engine.info for served in self._service}))

    async def _watch(self, engine: Engine) -> None:
        """The server tells the clients; the first process must send no more of them."""
        await engine.wait_failed()
        self.channel.send(Failed())

    async def _serve(self) -> None:
        assert self._server is not None
        self.finish(await self._server.wait(asyncio.Event()))

    async def _self_test(self, order: messages.SelfTest) -> None:
        try:
            for served in self._service:
                await order.check(served.module, served.engine)
        except MoshiSttError as error:
            self.channel.send(messages.SelfTested(str(error)))
        else:
            self.channel.send(messages.SelfTested(None))

    async def end(self, order: End | Drain) -> None:
        if self._server is None:
            return
        if isinstance(order, Drain):
            await self._server.drain(order.drain_seconds)
        else:
            await self._service.close_connections(order.sentence, order.code, order.within_seconds)

    async def deserted(self) -> None:
        if self._server is not None:
            sentence = "the server's first process has ended: start a new stream"
            await self._service.close_connections(sentence, framing.INTERNAL, DESERTED_SECONDS)
        if self._http is not None:  # nobody else tidies up
            with suppress(OSError):
                self._http.unlink()
            with suppress(OSError):
                self._http.parent.rmdir()

    async def close(self) -> None:
        if self._server is not None:
            await self._server.stop()

    # ---- the first process's orders ----------------------------------------------------------------------------------

    def on_message(self, message: Any, descriptors: list[int]) -> None:
        match message:
            case messages.Take():
                self.begin(self._take(message, descriptors), arriving=True)
            case messages.TakeBack():
                self.begin(self._take_back(message, descriptors), arriving=True)
            case messages.SetUp():
                self.begin(self._set_up(message, descriptors))
            case messages.SelfTest():
                self.begin(self._self_test(message))

    def pinged(self) -> None:
        for transport in self._transports.values():
            transport.settle()
        self._report()

    def _report(self) -> None:
        """Say how many slots are used, where that has changed."""
        if self._server is None or self.channel.closed:
            return
        used = {served.module.name: served.engine.used_slots for served in self._service}
        if used != self._reported:
            self._reported = used
            queued = {served.module.name: served.engine.queued_samples for served in self._service}
            self.channel.send(messages.Slots(used, queued))

    async def _take(self, order: messages.Take, descriptors: list[int]) -> None:
        """Carry this socket from here on."""
        engine = self._service.find(order.module).engine
        opening = order.client.opening
        channels = 0 if opening.on_demand else opening.channels
        try:
            sock = socket_of(descriptors)
        except OSError as error:
            self._lost_on_its_way(order, error)
            return
        if channels and engine.used_slots + sum(self._coming[order.module].values()) + channels > engine.total_slots:
            sock.close()
            self._reported = {}  # the first process thought otherwise
            self._report()
            self._tell(order.id, "declined")
            return
        if self._passed_on(order, sock):
            return

        coming = self._coming[order.module]
        coming[order.id] = channels

        def arrived(connections: Connections, transport: asyncio.Transport, lost: Callable[[Exception | None], None]) -> None:
            del coming[order.id]  # from here on it has its slots
            connections.take(transport, order.client, engine, lost).open()

        await self._connect(order, sock, arrived)
        coming.pop(order.id, None)

    def _passed_on(self, order: messages.Take, sock: socket.socket) -> bool:
        """Whether a worker of this process has taken it."""
        workers = self._service.workers
        if workers is None:
            return False

        def gone() -> None:
            self._tell(order.id, "gone")
            self._loop.call_soon(self._report)

        if not workers.give(order.module, order.client, sock, gone):
            return False
        sock.close()
        self._report()
        self._tell(order.id, "passed")
        return True

    async def _take_back(self, order: messages.TakeBack, descriptors: list[int]) -> None:
        """A client comes back to its stream."""
        try:
            sock = socket_of(descriptors)
        except OSError as error:
            self._lost_on_its_way(order, error)
            return
        workers = self._service.workers
        if workers is not None and workers.give_back(order.process, order.client, sock):
            sock.close()
            self._tell(order.id, "gone")  # what happens on it is between the worker and the client
            return

        def arrived(connections: Connections, transport: asyncio.Transport, lost: Callable[[Exception | None], None]) -> None:
            connections.resume(transport, order.client, lost)

        await self._connect(order, sock, arrived)

    async def _connect(self, order: "messages.Take | messages.TakeBack", sock: socket.socket, arrived: "_Arrived") -> None:
        assert self._boundaries is not None
        arrival = _Arrival(self, order, sock, arrived)
        try:
            await self._loop.connect_accepted_socket(lambda: arrival, sock)
        except OSError as error:
            sock.close()
            self._lost_on_its_way(order, error)

    def _lost_on_its_way(self, order: "messages.Take | messages.TakeBack", error: OSError) -> None:
        log.info("%s: lost on its way: %s", order.client.peer, error)
        self._tell(order.id, "gone")

    def _tell(self, id: int, fate: messages.Fate) -> None:
        """Say what became of a client."""
        self.channel.send(messages.Became(id, fate))

    # ---- the sockets that are carried here ---------------------------------------------------------------------------

    def carry(
        self,
        order: "messages.Take | messages.TakeBack",
        inner: asyncio.Transport,
        sock: socket.socket,
        arrived: "_Arrived",
        lost: Callable[[Exception | None], None],
    ) -> None:
        """A socket has its transport: make the connection."""
        boundaries, place = self._boundaries, order.boundary
        assert boundaries is not None
        transport = NotedTransport(inner, sock, lambda state: boundaries.note(place, state))
        self._transports[order.id] = transport
        arrived(self._service.connections, transport, lost)
        self._report()
        self._tell(order.id, "carried")

    def gone(self, id: int) -> None:
        """The socket is closed here."""
        if self._transports.pop(id, None) is not None:
            self._tell(id, "gone")


_Arrived = Callable[[Connections, asyncio.Transport, Callable[[Exception | None], None]], None]


class _Arrival(asyncio.Protocol):
    """A socket's protocol until it has its connection; it keeps it where it gets none."""

    def __init__(
        self, process: DeviceProcess, order: "messages.Take | messages.TakeBack", sock: socket.socket, arrived: _Arrived
    ) -> None:
        self._process = process
        self._order = order
        self._sock = sock
        self._arrived = arrived

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        inner = cast(asyncio.Transport, transport)  # uvloop's is of no such class
        self._process.carry(self._order, inner, self._sock, self._arrived, self.connection_lost)

    def connection_lost(self, exc: Exception | None) -> None:
        self._process.gone(self._order.id)


class _ReportingMetrics(Metrics):
    """Also tells when a slot is taken or freed."""

    def __init__(self, tell: Callable[[], object]) -> None:
        super().__init__()
        self._tell = tell

    def opened(self) -> None:
        super().opened()
        self._tell()

    def closed(self, steps: int) -> None:
        super().closed(steps)
        self._tell()
