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
from moshi_stt.server.doors.door import AnyDoor, SocketDoor
from moshi_stt.server.service import Service

log = logging.getLogger(__name__)

BACKLOG = 128


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

    def take(self, transport: asyncio.Transport, door: SocketDoor) -> None:
        """A client has connected."""
        service = self._service
        peer = f"{(transport.get_extra_info('peername') or ('?',))[0]} {door.name}"
        served = service.find(None)
        modules = {each.module.name: each.engine.info for each in service}
        opening = door.accept(peer, service.config, modules)
        if opening.module is not None:
            served = service.find(opening.module)
        service.metrics.connects.inc()
        connection = service.connections.take(transport, b"", served.engine, door, opening, peer)
        if service.is_started:
            connection.open()
            return
        task = asyncio.get_running_loop().create_task(self._open_when_started(connection))
        self._waiting.add(task)
        task.add_done_callback(self._waiting.discard)

    async def _open_when_started(self, connection: Connection) -> None:
        started = asyncio.ensure_future(self._service.started.wait())
        try:
            await asyncio.wait(
                (started, connection.lost),
                timeout=self._service.config.limits.slot_wait_seconds,
                return_when=asyncio.FIRST_COMPLETED,
            )
            if started.done():
                connection.open()
            else:
                connection.end(Error("the model is still loading: connect again later", framing.TRY_AGAIN))
        finally:
            started.cancel()


class _Arrival(asyncio.Protocol):
    """A socket's protocol until it has its connection."""

    def __init__(self, listeners: SocketListeners, door: SocketDoor) -> None:
        self._listeners = listeners
        self._door = door

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._listeners.take(cast(asyncio.Transport, transport), self._door)  # uvloop's is of no such class
