"""A process that carries WebSockets for the server: `python -m moshi_stt.server.workers.worker DESCRIPTOR`.

The server's first process has the model, answers HTTP and hands sockets over with a slot each (`pool.py`). Here they are
what they would be there, `Connection`s over an `Engine`; only the rows of its streams go over to the model. Log lines go to
the first process, counts when it asks. When it is gone, this ends, too.
"""

import asyncio
import logging
import socket
import sys
from contextlib import suppress
from typing import Any, cast

from moshi_stt.engine.remote import RemoteEngine
from moshi_stt.engine.sharing import BackendLink
from moshi_stt.server import framing
from moshi_stt.server.connections import Connections
from moshi_stt.server.metrics import Metrics
from moshi_stt.server.workers import messages
from moshi_stt.server.workers.child import ChildProcess, log_to, main, socket_of

log = logging.getLogger(__name__)

DESERTED_SECONDS = 3.0
"""How long clients have for the close handshake once the process with the model has died."""


class Worker(ChildProcess):
    """The state of this process."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__(sock)
        self._metrics = Metrics()
        self._connections: Connections | None = None
        self._engines: dict[str, RemoteEngine] = {}

    async def close(self) -> None:
        for engine in self._engines.values():
            with suppress(Exception):
                await engine.stop()

    async def deserted(self) -> None:
        if self._connections is not None:
            sentence = "the process that runs the model has ended: start a new stream"
            await self._connections.close(sentence, framing.INTERNAL, DESERTED_SECONDS)

    def on_message(self, message: Any, descriptors: list[int]) -> None:
        match message:
            case messages.Take():
                self.begin(self._take(message, descriptors), arriving=True)
            case messages.TakeBack():
                self.begin(self._take_back(message, descriptors))
            case messages.Count():
                queued = {name: engine.queued_samples for name, engine in self._engines.items()}
                self.channel.send(messages.Counted(self._metrics.families(), queued))
            case messages.SetUp():
                self.begin(self._set_up(message, descriptors))

    # ---- the server's orders -----------------------------------------------------------------------------------------

    async def _set_up(self, message: messages.SetUp, descriptors: list[int]) -> None:
        log_to(self.channel, message.log_level)
        for i, (name, share) in enumerate(message.shares.items()):
            line = BackendLink(descriptors[2 * i], socket.socket(fileno=descriptors[2 * i + 1]))
            engine = RemoteEngine(share, line, on_freed=self._freed(name), observer=self._metrics)
            self._engines[name] = engine
            await engine.start()
            self.begin(self._watch(engine))
        limits = message.config.limits
        self._connections = Connections(limits, self._metrics, place=message.place, processes=message.processes)
        self.begin(self._connections.tick())
        self.channel.send(messages.Ready())

    def _freed(self, name: str) -> Any:
        return lambda slot: self.channel.send(messages.Freed(name, slot))

    async def _watch(self, engine: RemoteEngine) -> None:
        await engine.wait_failed()
        self.channel.send(messages.Failed())

    async def _take(self, message: messages.Take, descriptors: list[int]) -> None:
        """Carry this socket from here on."""
        assert self._connections is not None
        engine = self._engines[message.module]
        arrival = _Arrival(self._connections, engine, message)
        sock: socket.socket | None = None
        try:
            sock = socket_of(descriptors)
            await asyncio.get_running_loop().connect_accepted_socket(lambda: arrival, sock)
        except OSError as error:  # the client is gone already
            log.info("%s: lost on its way: %s", message.client.peer, error)
            if sock is not None:
                sock.close()
        if not arrival.arrived:
            for slot in message.slots:
                self.channel.send(messages.Freed(message.module, slot))
        while (unused := engine.withdraw()) is not None:
            self.channel.send(messages.Freed(message.module, unused))

    async def _take_back(self, message: messages.TakeBack, descriptors: list[int]) -> None:
        assert self._connections is not None
        arrival = _Return(self._connections, message)
        try:
            sock = socket_of(descriptors)
            await asyncio.get_running_loop().connect_accepted_socket(lambda: arrival, sock)
        except OSError as error:
            log.info("%s: lost on its way: %s", message.client.peer, error)

    async def end(self, order: messages.End | messages.Drain) -> None:
        if self._connections is None:
            return
        if isinstance(order, messages.Drain):
            await self._connections.drain(order.sentence, order.code, order.drain_seconds, order.within_seconds)
        else:
            await self._connections.close(order.sentence, order.code, order.within_seconds)


class _Arrival(asyncio.Protocol):
    """A socket's protocol until it has its transport."""

    def __init__(self, connections: Connections, engine: RemoteEngine, message: messages.Take) -> None:
        self._connections = connections
        self._engine = engine
        self._message = message
        self.arrived = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        inner = cast(asyncio.Transport, transport)  # uvloop's is of no such class
        connection = self._connections.take(inner, self._message.client, self._engine)
        for slot in self._message.slots:
            self._engine.grant(slot)
        self.arrived = True
        connection.open()


class _Return(asyncio.Protocol):
    """The same, of a client that comes back."""

    def __init__(self, connections: Connections, message: messages.TakeBack) -> None:
        self._connections = connections
        self._message = message

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._connections.resume(cast(asyncio.Transport, transport), self._message.client)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), Worker))
