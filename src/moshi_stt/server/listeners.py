"""The ports of protocols over plain TCP: one listener for each address of a `SocketDoor`."""

import asyncio
import ipaddress
import logging
import socket
from collections.abc import Callable, Sequence
from typing import cast

from moshi_stt.events import Error
from moshi_stt.server import framing
from moshi_stt.server.connection import Connection
from moshi_stt.server.doors.door import AnyDoor, NewClient, SocketDoor
from moshi_stt.server.service import Service

log = logging.getLogger(__name__)

BACKLOG = 128

MOST_EARLY_BYTES = 1 << 16
"""What is read from a client while the model loads."""


class SocketListeners:
    """Used on the event loop alone. ports: what is listened on, by door, known once started."""

    def __init__(self, service: Service, doors: Sequence[AnyDoor], bind: Callable[[str, int], socket.socket]) -> None:
        """bind: makes a bound socket; raises ConfigError."""
        self._service = service
        self._doors = [door for door in doors if isinstance(door, SocketDoor)]
        self._bind = bind
        self._servers: list[asyncio.Server] = []
        self._waiting: set[asyncio.Task[None]] = set()
        self.ports: dict[str, int] = {}

    async def start(self) -> None:
        """Listen. Raises ConfigError where an address cannot be had."""
        loop = asyncio.get_running_loop()
        for door in self._doors:
            for host, port in door.addresses(self._service.config):
                listener = self._bind(host, port)
                self.ports[door.name] = listener.getsockname()[1]
                if not ipaddress.ip_address(host).is_loopback:
                    log.warning(
                        "%s listens on %s, which other machines can reach, and the protocol knows no keys: anybody who reaches "
                        "port %d can use it. To keep it to this machine: tcp://127.0.0.1:%d",
                        door.name, host, self.ports[door.name], self.ports[door.name],
                    )  # fmt: skip
                self._servers.append(
                    await loop.create_server(lambda door=door: _Arrival(self, door), sock=listener, backlog=BACKLOG)  # type: ignore[misc]
                )

    def stop(self) -> None:
        """Listen no more. Connections that are open are the service's."""
        for server in self._servers:
            server.close()
        for task in self._waiting:
            task.cancel()

    def arrived(self, arrival: "_Arrival") -> None:
        """A client has connected."""
        loop = asyncio.get_running_loop()
        self._service.metrics.connects.inc()
        if self._service.is_started:
            loop.call_soon(self._take, arrival)  # uvloop reads from a socket that was paused before it has begun
            return
        task = loop.create_task(self._take_when_started(arrival))
        self._waiting.add(task)
        task.add_done_callback(self._waiting.discard)

    def _take(self, arrival: "_Arrival") -> Connection | None:
        """A connection for the client, which is not open yet; None where the client is gone."""
        if arrival.transport is None or arrival.transport.is_closing():
            return None
        service, door = self._service, arrival.door
        address = str((arrival.transport.get_extra_info("peername") or ("?",))[0])
        peer = f"{address} {door.name}"
        modules = {each.module.name: each.engine.info for each in service if each.engine.ready}
        opening = door.accept(peer, service.config, modules)
        served = service.find(opening.module)
        transport, client = arrival.transport, NewClient(door, opening, peer, bytes(arrival.early))
        entry = service.refusal() or service.gate.enter_port(address)
        if isinstance(entry, str):
            connection = service.connections.take(transport, client, served.engine)
            connection.end(Error(entry, framing.TRY_AGAIN))
            return None
        if service.hand_over(served, client, transport, entry.close):
            return None
        connection = service.connections.take(transport, client, served.engine)
        connection.lost.add_done_callback(lambda _: entry.close())
        if service.is_started:
            connection.open()
        return connection

    async def _take_when_started(self, arrival: "_Arrival") -> None:
        """The connection is made when the models are there: what it says of them is true then."""
        try:
            async with asyncio.timeout(self._service.config.limits.slot_wait_seconds):
                await self._service.started.wait()
        except TimeoutError:
            pass
        connection = self._take(arrival)
        if connection is not None and not self._service.is_started:
            connection.end(Error("the model is still loading: connect again later", framing.TRY_AGAIN))


class _Arrival(asyncio.Protocol):
    """A socket's protocol until it has its connection: it keeps what comes before."""

    def __init__(self, listeners: SocketListeners, door: SocketDoor) -> None:
        self._listeners = listeners
        self.door = door
        self.early = bytearray()
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is of no such class
        self._listeners.arrived(self)

    def data_received(self, data: bytes) -> None:
        self.early += data
        if len(self.early) >= MOST_EARLY_BYTES and self.transport is not None:
            self.transport.pause_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        self.transport = None
