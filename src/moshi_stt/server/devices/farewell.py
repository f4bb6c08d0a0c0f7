"""The last words to a client whose model process has died, in its door's own shape."""

import asyncio
import logging
import select
import socket
from typing import cast

from moshi_stt.events import Error
from moshi_stt.server.doors.door import NewClient, SocketDoor
from moshi_stt.server.framing import Framing
from moshi_stt.server.timers import CLOSE_SECONDS
from moshi_stt.server.websocket import WebSocketFraming

log = logging.getLogger(__name__)

ANSWER_SECONDS = 2.0
"""How long the client has to answer our Close before it sees an end-of-file, which some take for a broken connection."""

LONGEST_CLOSE = 131
"""Bytes of a client's longest Close: 2 of head, 4 of mask, 125 of payload."""


def last_words(client: NewClient, error: Error) -> bytes:
    """`Error` and the end of the connection, as this client reads them."""
    door = client.door
    frames: Framing = door.framing(1) if isinstance(door, SocketDoor) else WebSocketFraming(1)
    session = door.session(client.opening)
    parts = [frames.encode(message) for message in session.send(error)]
    close = session.close(error)
    return b"".join([*parts, frames.close(close.code, close.reason)])


def ends_with_close(data: bytes) -> bool:
    """Whether the client's last frame is a Close. Where its frames begin is not known: the process that died read some of them.

    Nothing follows a Close, and a masked frame (RFC 6455 section 5.2) says how long it is.
    """
    starts = (len(data) - 6 - size for size in range(min(126, len(data) - 5)))
    return any(data[start] == 0x88 and data[start + 1] == 0x80 | (len(data) - 6 - start) for start in starts)


def takes_data(sock: socket.socket) -> bool:
    """Whether the system would take some bytes now. A client that reads nothing has filled its buffer: nothing reaches it."""
    poll = select.poll()
    poll.register(sock, select.POLLOUT)
    return any(events & select.POLLOUT and not events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0))


async def say(sock: socket.socket, words: bytes, peer: str) -> None:
    """Write the words, and return when the client has answered or closed, or CLOSE_SECONDS have gone. Closes the socket.

    words: empty where nothing may be said; then the client sees an end-of-file at once, else only if it does not answer.
    What the client still sends is read and thrown away: a socket that is closed with bytes unread is reset, and a reset makes
    the client's system drop what it has not read yet.
    """
    farewell = _Farewell(words)
    try:
        await asyncio.get_running_loop().connect_accepted_socket(lambda: farewell, sock)
        async with asyncio.timeout(CLOSE_SECONDS):
            if words:
                await asyncio.wait([farewell.over], timeout=ANSWER_SECONDS)
            farewell.write_eof()
            await farewell.over
    except (OSError, TimeoutError) as error:
        log.debug("%s: its client did not close: %s", peer, error or "no answer")
    finally:
        farewell.abort()
        sock.close()


class _Farewell(asyncio.Protocol):
    def __init__(self, words: bytes) -> None:
        self._words = words
        self._tail = b""
        self._transport: asyncio.Transport | None = None
        self.over: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is of no such class
        if self._words:
            self._transport.write(self._words)

    def data_received(self, data: bytes) -> None:
        self._tail = (self._tail + data)[-LONGEST_CLOSE:]
        if self._transport is not None and ends_with_close(self._tail):
            self._transport.close()

    def write_eof(self) -> None:
        if self._transport is not None and self._transport.can_write_eof() and not self._transport.is_closing():
            self._transport.write_eof()

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        if not self.over.done():
            self.over.set_result(None)

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()
