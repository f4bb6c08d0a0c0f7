"""A process that carries WebSockets for the server: `python -m moshi_stt.server.workers.worker DESCRIPTOR`.

The server's first process has the model, answers HTTP and hands sockets over with a slot each (`processes.py`). Here they are
what they would be there, `Connection`s over an `Engine`; only the rows of its streams go over to the model. Log lines go to
the first process, counts when it asks. When it is gone, this ends, too.
"""

import asyncio
import logging
import os
import signal
import socket
import sys
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any, cast

from moshi_stt.engine.remote import RemoteEngine
from moshi_stt.engine.sharing import BackendLink
from moshi_stt.server.connections import Connections
from moshi_stt.server.metrics import Metrics
from moshi_stt.server.runtime import raise_file_limit, run, tune_interpreter
from moshi_stt.server.workers import messages
from moshi_stt.server.workers.ipc import MessageSocket

log = logging.getLogger(__name__)

MOST_LINES = 1_024
"""Of the log, that wait for the first process; further ones are dropped, and counted."""


class Worker:
    """The state of this process. `run` returns when it is to end."""

    def __init__(self, sock: socket.socket) -> None:
        self._channel = MessageSocket(sock, self._on_message, self._on_closed)
        self._metrics = Metrics()
        self._connections: Connections | None = None
        self._engines: dict[str, RemoteEngine] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._arriving: set[asyncio.Task[None]] = set()
        """Of the tasks, those of sockets that are no connections yet."""
        self._over = asyncio.Event()
        self._status = 0

    async def run(self) -> int:
        await self._over.wait()
        for task in list(self._tasks):
            task.cancel()
        for engine in self._engines.values():
            with suppress(Exception):
                await engine.stop()
        await asyncio.sleep(0)  # what they posted last
        self._channel.close()
        return self._status

    def _on_closed(self) -> None:
        """The server is gone."""
        self._over.set()

    def _on_message(self, message: Any, descriptors: list[int]) -> None:
        match message:
            case messages.Take():
                task = self._begin(self._take(message, descriptors))
                self._arriving.add(task)
                task.add_done_callback(self._arriving.discard)
            case messages.TakeBack():
                self._begin(self._take_back(message, descriptors))
            case messages.Ping():
                self._channel.send(messages.Pong())
            case messages.Count():
                queued = {name: engine.queued_samples for name, engine in self._engines.items()}
                self._channel.send(messages.Counted(self._metrics.families(), queued))
            case messages.SetUp():
                self._begin(self._set_up(message, descriptors))
            case messages.End():
                self._begin(self._end(message))
            case messages.Drain():
                self._begin(self._drain(message))
            case messages.Stop():
                self._over.set()

    def _begin(self, work: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: "asyncio.Task[None]") -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a process of sockets failed", exc_info=error)
            self._status = 1
            self._over.set()

    # ---- the server's orders -----------------------------------------------------------------------------------------

    async def _set_up(self, message: messages.SetUp, descriptors: list[int]) -> None:
        log_to(self._channel, message.log_level)
        for i, (name, share) in enumerate(message.shares.items()):
            line = BackendLink(descriptors[2 * i], socket.socket(fileno=descriptors[2 * i + 1]))
            engine = RemoteEngine(share, line, on_freed=self._freed(name), observer=self._metrics)
            self._engines[name] = engine
            await engine.start()
            self._begin(self._watch(engine))
        limits = message.config.limits
        self._connections = Connections(limits, self._metrics, place=message.place, processes=message.processes)
        self._begin(self._connections.tick())
        self._channel.send(messages.Ready())

    def _freed(self, name: str) -> Any:
        return lambda slot: self._channel.send(messages.Freed(name, slot))

    async def _watch(self, engine: RemoteEngine) -> None:
        await engine.wait_failed()
        self._channel.send(messages.Failed())

    async def _take(self, message: messages.Take, descriptors: list[int]) -> None:
        """Carry this socket from here on."""
        assert self._connections is not None
        engine = self._engines[message.module]
        arrival = _Arrival(self._connections, engine, message)
        sock: socket.socket | None = None
        try:
            sock = _socket_of(descriptors)
            await asyncio.get_running_loop().connect_accepted_socket(lambda: arrival, sock)
        except OSError as error:  # the client is gone already
            log.info("%s: lost on its way: %s", message.peer, error)
            if sock is not None:
                sock.close()
        if not arrival.arrived:
            for slot in message.slots:
                self._channel.send(messages.Freed(message.module, slot))
        while (unused := engine.withdraw()) is not None:
            self._channel.send(messages.Freed(message.module, unused))

    async def _take_back(self, message: messages.TakeBack, descriptors: list[int]) -> None:
        assert self._connections is not None
        arrival = _Return(self._connections, message)
        try:
            sock = _socket_of(descriptors)
            await asyncio.get_running_loop().connect_accepted_socket(lambda: arrival, sock)
        except OSError as error:
            log.info("%s: lost on its way: %s", message.peer, error)

    async def _end(self, message: messages.End) -> None:
        await _arrived(self._arriving)
        if self._connections is not None:
            await self._connections.close(message.sentence, message.code, message.within_seconds)
        self._channel.send(messages.Ended())

    async def _drain(self, message: messages.Drain) -> None:
        await _arrived(self._arriving)
        if self._connections is not None:
            seconds = message.drain_seconds, message.within_seconds
            await self._connections.drain(message.sentence, message.code, *seconds)
        self._channel.send(messages.Ended())


async def _arrived(arriving: "set[asyncio.Task[None]]") -> None:
    """Sockets that are no connections yet get a moment to become some."""
    if arriving:
        await asyncio.wait(arriving, timeout=0.5)


def _socket_of(descriptors: list[int]) -> socket.socket:
    """Raises OSError where none came along, or it is the socket of a client that is gone (macOS)."""
    if not descriptors:
        raise OSError("no descriptor came along; too many files are open")
    try:
        sock = socket.socket(fileno=descriptors[0])
    except OSError:
        os.close(descriptors[0])
        raise
    sock.setblocking(False)
    return sock


class _Arrival(asyncio.Protocol):
    """A socket's protocol until it has its transport."""

    def __init__(self, connections: Connections, engine: RemoteEngine, message: messages.Take) -> None:
        self._connections = connections
        self._engine = engine
        self._message = message
        self.arrived = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        message = self._message
        connection = self._connections.take(
            cast(asyncio.Transport, transport),  # uvloop's is of no such class
            message.early,
            self._engine,
            message.door,
            message.opening,
            message.peer,
        )
        for slot in message.slots:
            self._engine.grant(slot)
        self.arrived = True
        connection.open()


class _Return(asyncio.Protocol):
    """The same, of a client that comes back."""

    def __init__(self, connections: Connections, message: messages.TakeBack) -> None:
        self._connections = connections
        self._message = message

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        message = self._message
        self._connections.resume(cast(asyncio.Transport, transport), message.early, message.door, message.opening, message.peer)


class _ChannelHandler(logging.Handler):
    """Sends lines to the process that writes them. Any thread."""

    def __init__(self, channel: MessageSocket) -> None:
        super().__init__()
        self._channel = channel
        self._loop = asyncio.get_running_loop()
        self._dropped = 0

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._loop.call_soon_threadsafe(self._send, self._plain(record))
        except RuntimeError:  # the loop is closed
            pass
        except Exception:  # as every handler of Python does
            self.handleError(record)

    def _plain(self, record: logging.LogRecord) -> dict[str, Any]:
        text = record.getMessage()
        if record.exc_info:
            text += "\n" + logging.Formatter().formatException(record.exc_info)
        return {
            "name": record.name,
            "levelno": record.levelno,
            "levelname": record.levelname,
            "pathname": record.pathname,
            "lineno": record.lineno,
            "created": record.created,
            "msg": text,
        }

    def _send(self, plain: dict[str, Any]) -> None:
        if self._channel.backlog >= MOST_LINES:
            self._dropped += 1
            return
        if self._dropped:
            plain["msg"] += f" ({self._dropped} lines before this one were dropped: the server did not read them in time)"
            self._dropped = 0
        self._channel.send(messages.Logged(plain))


def log_to(channel: MessageSocket, level: int) -> None:
    """Send every logger's lines of this process to the other end."""
    root = logging.getLogger()
    root.handlers[:] = [_ChannelHandler(channel)]
    root.setLevel(level)
    logging.captureWarnings(True)


async def _main(descriptor: int) -> int:
    return await Worker(socket.socket(fileno=descriptor)).run()


def main(descriptor: int) -> int:
    """Run until the server says so, or is gone."""
    for each in (
        signal.SIGINT,
        signal.SIGTERM,
        signal.SIGHUP,
    ):  # sent to the whole group or service: the server then ends us in its order
        signal.signal(each, signal.SIG_IGN)
    raise_file_limit()
    tune_interpreter()
    os.set_inheritable(descriptor, False)
    return run(_main(descriptor))


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
