"""The other side of a `Supervisor`: what each of the server's further processes does, whatever it is for.

It answers pings, sends its log lines to the first process, ends when it is told to or when the first process is gone, and
leaves signals to that one: they come to the whole group, and the first process ends the others in its own order.
"""

import asyncio
import logging
import os
import signal
import socket
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine
from typing import Any

from moshi_stt.server.runtime import raise_file_limit, run, tune_interpreter
from moshi_stt.server.workers import messages
from moshi_stt.server.workers.ipc import MessageSocket

log = logging.getLogger(__name__)

MOST_LINES = 1_024
"""Of the log, that wait for the first process; further ones are dropped, and counted."""

ARRIVING_SECONDS = 0.5
"""How long sockets that are no connections yet have to become some before all are ended."""


class ChildProcess(ABC):
    """The state of this process. `run` returns when it is to end."""

    def __init__(self, sock: socket.socket) -> None:
        self.channel = MessageSocket(sock, self._on_message, self._on_closed)
        self.status = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._arriving: set[asyncio.Task[None]] = set()
        """Of the tasks, those of sockets that are no connections yet."""
        self._over = asyncio.Event()

    # ---- what a subclass adds ----------------------------------------------------------------------------------------

    @abstractmethod
    def on_message(self, message: Any, descriptors: list[int]) -> None:
        """A message that is not one of every process. Each descriptor is used up or closed."""

    @abstractmethod
    async def end(self, order: messages.End | messages.Drain) -> None:
        """Close every connection as the order says, and return when none is left."""

    @abstractmethod
    async def close(self) -> None:
        """Free what there is, just before the process ends."""

    @abstractmethod
    async def deserted(self) -> None:
        """The first process is gone. This one ends afterwards."""

    def pinged(self) -> None:
        """Called some times a second."""
        return

    # ---- the first process's orders ----------------------------------------------------------------------------------

    async def run(self) -> int:
        """The exit status."""
        await self._over.wait()
        for task in list(self._tasks):
            task.cancel()
        await self.close()
        await asyncio.sleep(0)  # what was posted last
        self.channel.close()
        return self.status

    def finish(self, status: int = 0) -> None:
        """Let `run` return."""
        self.status = self.status or status
        self._over.set()

    def _on_closed(self) -> None:
        if not self._over.is_set():
            self.begin(self._desert())

    async def _desert(self) -> None:
        await self.deserted()
        self.finish()

    def _on_message(self, message: Any, descriptors: list[int]) -> None:
        match message:
            case messages.Ping():
                self.pinged()
                self.channel.send(messages.Pong())
            case messages.Stop():
                self.finish()
            case messages.End() | messages.Drain():
                self.begin(self._end(message))
            case _:
                self.on_message(message, descriptors)

    async def _end(self, order: messages.End | messages.Drain) -> None:
        if self._arriving:
            await asyncio.wait(self._arriving, timeout=ARRIVING_SECONDS)
        await self.end(order)
        self.channel.send(messages.Ended())

    def begin(self, work: Coroutine[Any, Any, None], *, arriving: bool = False) -> None:
        """Run a task; the process ends when it fails. arriving: it makes a connection of a socket."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        if arriving:
            self._arriving.add(task)
            task.add_done_callback(self._arriving.discard)

    def _done(self, task: "asyncio.Task[None]") -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a process of the server failed", exc_info=error)
            self.finish(1)


def socket_of(descriptors: list[int]) -> socket.socket:
    """The socket that came with a message.

    Raises OSError where none came along, or it is the socket of a client that is gone (macOS).
    """
    if not descriptors:
        raise OSError("no descriptor came along; too many files are open")
    try:
        sock = socket.socket(fileno=descriptors[0])
    except OSError:
        os.close(descriptors[0])
        raise
    sock.setblocking(False)
    return sock


class _ChannelHandler(logging.Handler):
    """Sends lines to the process that writes them. Any thread."""

    def __init__(self, channel: MessageSocket, prefix: str) -> None:
        super().__init__()
        self._channel = channel
        self._prefix = prefix
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
        text = self._prefix + record.getMessage()
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


def log_to(channel: MessageSocket, level: int, prefix: str = "") -> None:
    """Send every logger's lines of this process to the other end. prefix: what each begins with."""
    root = logging.getLogger()
    root.handlers[:] = [_ChannelHandler(channel, prefix)]
    root.setLevel(level)
    logging.captureWarnings(True)


def main(descriptor: int, make: Callable[[socket.socket], ChildProcess]) -> int:
    """Run until the server says so, or is gone. descriptor: of the socket to it."""
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(each, signal.SIG_IGN)
    raise_file_limit()
    tune_interpreter()
    os.set_inheritable(descriptor, False)

    async def serve() -> int:
        return await make(socket.socket(fileno=descriptor)).run()

    return run(serve())
