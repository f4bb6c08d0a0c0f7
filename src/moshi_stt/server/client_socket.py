"""A client's socket: its transport and its framing, and which of its two ways is open at the moment."""

import asyncio
from collections.abc import Callable, Iterable

from moshi_stt.server.framing import Framing
from moshi_stt.server.tally import Tally
from moshi_stt.session import Message


class ClientSocket:
    """One socket of a connection, which may go on over another one."""

    def __init__(
        self, transport: asyncio.Transport, framing: Framing, tally: Tally, told: Callable[[Exception | None], None] | None
    ) -> None:
        """tally: counts the bytes that are sent. told: hears when the socket is gone."""
        self.lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done when the socket is gone."""
        self.framing = framing
        self.is_read = True
        """Whether what the client sends is read; else TCP holds it back."""
        self.half_closed = False
        """Whether the client has shut its sending half."""
        self.is_full = False
        """Whether the send buffer should get no more messages."""
        self._transport = transport
        self._tally = tally
        self._told = told
        self._owed_pong: bytes | None = None

    # ---- sending -----------------------------------------------------------------------------------------------------

    def send(self, messages: Iterable[Message]) -> int:
        """Send messages in one write; returns how many those were."""
        encode = self.framing.encode
        parts = [encode(message) for message in messages]
        self._write(parts[0] if len(parts) == 1 else b"".join(parts))
        return len(parts)

    def ping(self) -> None:
        self._write(self.framing.ping())

    def pong(self, payload: bytes) -> None:
        """Answer a ping, now or when there is room: the latest one is enough then (RFC 6455 section 5.5.3)."""
        if self.is_full:
            self._owed_pong = payload
        else:
            self._write(self.framing.pong(payload))

    def drained(self, *, may_answer: bool) -> None:
        """The send buffer takes messages again. may_answer: whether a ping that waits for its answer gets it."""
        self.is_full = False
        owed, self._owed_pong = self._owed_pong, None
        if owed is not None and may_answer:
            self.pong(owed)

    def send_close(self, code: int, reason: str = "") -> None:
        self._write(self.framing.close(code, reason))

    def _write(self, data: bytes) -> None:
        if data and not self._transport.is_closing():
            self._tally.sent_bytes += len(data)
            self._transport.write(data)

    @property
    def unsent_bytes(self) -> int:
        """Bytes in the send buffer."""
        return self._transport.get_write_buffer_size()

    # ---- reading -----------------------------------------------------------------------------------------------------

    def pause_reading(self) -> bool:
        """Whether it was read until now, and the client has more to say."""
        if not self.is_read or self.half_closed:
            return False
        self.is_read = False
        self._transport.pause_reading()
        return True

    def resume_reading(self) -> None:
        if not self.is_read:
            self.is_read = True
            if not self._transport.is_closing():
                self._transport.resume_reading()

    # ---- the end -----------------------------------------------------------------------------------------------------

    def finish_closing(self) -> bool:
        """Our Close is sent: close the socket where no answer can come. False where the client's is to be waited for."""
        framing, transport = self.framing, self._transport
        if self.half_closed or not framing.handshakes:
            transport.close()
            return True
        if framing.broken and transport.can_write_eof():  # its Close cannot be read any more: it sees the end of ours
            transport.write_eof()
        self.resume_reading()
        return False

    def close(self) -> None:
        """Close it when all is sent."""
        self._transport.close()

    def abort(self) -> None:
        """Cut it now."""
        self._transport.abort()

    def abandon(self) -> None:
        """Cut it; its connection, which goes on over another one, does not hear of it."""
        self._transport.set_protocol(_Abandoned(self))
        self._transport.abort()

    def gone(self, error: Exception | None) -> None:
        """The transport says that the socket is gone."""
        if not self.lost.done():
            self.lost.set_result(None)
        told, self._told = self._told, None
        if told is not None:
            told(error)

    def fileno(self) -> int:
        """The descriptor, -1 when there is none."""
        sock = self._transport.get_extra_info("socket")
        return sock.fileno() if sock is not None else -1


class _Abandoned(asyncio.Protocol):
    """The protocol of a socket that its connection has left for another."""

    def __init__(self, socket: ClientSocket) -> None:
        self._socket = socket

    def connection_lost(self, exc: Exception | None) -> None:
        self._socket.gone(exc)
