"""Passes the listening socket from a running server to the one that replaces it, so that no connection is refused meanwhile.

The running server offers its socket at a Unix socket that only its user may open. The new one loads its models, checks them,
asks, listens, and confirms; from then on the old one accepts nothing more, and it ends when its streams have ended.
"""

import asyncio
import hashlib
import logging
import os
import socket
import tempfile
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from moshi_stt.errors import ConfigError

log = logging.getLogger(__name__)

ANSWER_SECONDS = 10.0
"""How long either side waits for the other."""

LONGEST_PATH = 100
"""Bytes of a Unix socket's path: macOS takes 103, Linux 107."""

OFFER, TAKEN = b"listener", b"taken"


class Takeover(NamedTuple):
    """How a server comes after another one.

    path: the Unix socket at which it offers its place, and at which it finds a predecessor. take: whether it replaces one.
    check: run once the engines have started and before the socket is taken; raises where this server must not serve.
    """

    path: Path
    take: bool = False
    check: Callable[[], Awaitable[None]] | None = None


class Taken(NamedTuple):
    """A listening socket, and the connection on which its taking is to be confirmed."""

    listener: socket.socket
    predecessor: socket.socket

    def confirm(self) -> None:
        """Tell the predecessor that this process accepts connections now, and wait until it accepts none on any port."""
        with self.predecessor, suppress(OSError):
            self.predecessor.sendall(TAKEN)
            self.predecessor.recv(1)  # it closes


def short_path(path: Path) -> Path:
    """The path, or where it is too long for a Unix socket, one in the folder for temporary files."""
    path = path.absolute()
    if len(os.fsencode(path)) <= LONGEST_PATH:
        return path
    digest = hashlib.sha256(os.fsencode(path)).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"moshi-stt-{digest}.sock"


async def take(path: Path) -> Taken:
    """Ask the server that offers its socket at `path` for it. Raises ConfigError where there is none or it does not answer."""
    return await asyncio.to_thread(_take, short_path(path))


def _take(path: Path) -> Taken:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(ANSWER_SECONDS)
    try:
        if path.stat().st_uid != os.getuid():
            raise PermissionError("another user made it")
        connection.connect(str(path))
        message, descriptors, _, _ = socket.recv_fds(connection, len(OFFER), 1)
        if message != OFFER or len(descriptors) != 1:
            raise ConnectionError("it sent no socket")
    except OSError as error:
        connection.close()
        raise ConfigError(
            f"no server hands over its place at {path} ({error.strerror or error}): start this one without --take-over"
        ) from None
    listener = socket.socket(fileno=descriptors[0])
    listener.setblocking(False)
    return Taken(listener, connection)


async def offer(path: Path, listener: socket.socket, release: Callable[[], Awaitable[None]]) -> None:
    """Offer the listening socket at `path`, and return once another process has taken it.

    release: stops listening here; awaited once the other process listens.
    Raises OSError where there can be no socket at that path.
    """
    path = short_path(path)
    loop = asyncio.get_running_loop()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as door:
        with suppress(FileNotFoundError):
            path.unlink()
        mask = os.umask(0o177)
        try:
            door.bind(str(path))
        finally:
            os.umask(mask)
        door.listen(1)
        door.setblocking(False)
        try:
            while True:
                connection, _ = await loop.sock_accept(door)
                with connection:
                    if await _handed(connection, listener):
                        await release()
                        return
        except asyncio.CancelledError:
            with suppress(FileNotFoundError):
                path.unlink()
            raise


async def _handed(connection: socket.socket, listener: socket.socket) -> bool:
    """Whether the other side has taken the socket and said so."""
    loop = asyncio.get_running_loop()
    try:
        socket.send_fds(connection, [OFFER], [listener.fileno()])
        async with asyncio.timeout(ANSWER_SECONDS):
            return await loop.sock_recv(connection, len(TAKEN)) == TAKEN
    except (OSError, TimeoutError) as error:
        log.warning("the listening socket was asked for and not taken: %s", error or "no answer")
        return False
