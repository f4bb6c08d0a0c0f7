"""A WebSocket client that does what it is told, right or wrong, on a bare socket. Written apart from the server's framing."""

import asyncio
import contextlib
import os
import socket
import struct
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike
from tests.support.serving import DEADLINE, KEY, event_of

from moshi_stt import protocol
from moshi_stt.constants import DEFAULT_PATH

CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG = 0, 1, 2, 8, 9, 10

HANDSHAKE = (
    "GET {path} HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
    "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nkyutai-api-key: {key}\r\n{extra}\r\n"
)


def frame(opcode: int, payload: bytes = b"", *, fin: bool = True, masked: bool = True, reserved: int = 0) -> bytes:
    """A client's frame."""
    first = (0x80 if fin else 0) | reserved << 4 | opcode
    bit = 0x80 if masked else 0
    size = len(payload)
    if size < 126:
        head = bytes((first, bit | size))
    elif size < 1 << 16:
        head = bytes((first, bit | 126)) + struct.pack("!H", size)
    else:
        head = bytes((first, bit | 127)) + struct.pack("!Q", size)
    if not masked:
        return head + payload
    key = os.urandom(4)
    mask = np.frombuffer((key * (size // 4 + 1))[:size], np.uint8)
    return head + key + (np.frombuffer(payload, np.uint8) ^ mask).tobytes()


class NotUpgraded(AssertionError):
    """The server answered with something else. The text is the answer's head."""

    @property
    def is_full(self) -> bool:
        """Whether that says that no slot is free."""
        return b" 429 " in self.args[0] or b" 503 " in self.args[0]


class RawClient:
    """One connection, upgraded. Every wait has a deadline."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    @classmethod
    async def connect(
        cls,
        port: int,
        path: str = DEFAULT_PATH,
        *,
        key: str = KEY,
        receive_buffer: int | None = None,
        early: bytes = b"",
        extra: str = "",
    ) -> Self:
        """receive_buffer: size of the socket's, for a reader that is soon full. early: sent together with the request."""
        sock = socket.socket()
        if receive_buffer is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", port))
        reader, writer = await asyncio.open_connection(sock=sock, limit=1 << 16)
        writer.write(HANDSHAKE.format(path=path, key=key, extra=extra).encode() + early)
        head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), DEADLINE)
        if not head.startswith(b"HTTP/1.1 101 "):
            writer.close()
            raise NotUpgraded(head)
        return cls(reader, writer)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.writer.close()
        with contextlib.suppress(ConnectionError):
            await self.writer.wait_closed()

    # ---- sending -----------------------------------------------------------------------------------------------------

    def write(self, data: bytes) -> None:
        self.writer.write(data)

    def send(self, payload: bytes, opcode: int = BINARY) -> None:
        self.writer.write(frame(opcode, payload))

    def audio(self, pcm: ArrayLike) -> None:
        self.send(protocol.encode_audio(pcm))

    def silence(self, samples: int) -> None:
        self.audio(np.zeros(samples, np.float32))

    def marker(self, id: int) -> None:
        self.send(protocol.encode_marker(id))

    def close(self, code: int | None = 1000, reason: bytes = b"") -> None:
        """Send a Close frame."""
        self.send(b"" if code is None else struct.pack("!H", code) + reason, CLOSE)

    async def drain(self) -> None:
        async with asyncio.timeout(DEADLINE):
            await self.writer.drain()

    def half_close(self) -> None:
        self.writer.write_eof()

    def reset(self) -> None:
        """Go away without a word: the server's kernel gets a reset."""
        sock = self.writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()

    # ---- receiving ---------------------------------------------------------------------------------------------------

    async def receive(self) -> tuple[int, bytes]:
        """The next frame: opcode and payload."""
        async with asyncio.timeout(DEADLINE):
            first, second = await self.reader.readexactly(2)
            assert first & 0xF0 == 0x80, "the server sends whole frames without reserved bits"
            assert not second & 0x80, "the server does not mask"
            size = second
            if size == 126:
                (size,) = struct.unpack("!H", await self.reader.readexactly(2))
            elif size == 127:
                (size,) = struct.unpack("!Q", await self.reader.readexactly(8))
            return first & 0x0F, await self.reader.readexactly(size)

    async def receive_message(self) -> bytes:
        """The next binary message; pings are passed over without an answer."""
        while True:
            opcode, payload = await self.receive()
            if opcode == BINARY:
                return payload
            assert opcode == PING, f"expected a message, got opcode {opcode} with {payload!r}"

    async def receive_event(self) -> dict[str, Any]:
        return event_of(await self.receive_message())

    async def events_until(self, kind: str) -> list[dict[str, Any]]:
        """Events up to the first of this kind, inclusive."""
        events = [await self.receive_event()]
        while events[-1]["type"] != kind:
            events.append(await self.receive_event())
        return events

    async def rest(self) -> tuple[list[dict[str, Any]], int | None]:
        """Every event up to the server's Close, and its status (None without one); or up to end-of-file, and -1."""
        events: list[dict[str, Any]] = []
        while True:
            try:
                opcode, payload = await self.receive()
            except (asyncio.IncompleteReadError, ConnectionError):
                return events, -1
            if opcode == CLOSE:
                return events, struct.unpack("!H", payload[:2])[0] if payload else None
            if opcode == BINARY:
                events.append(event_of(payload))

    async def end_of_file(self) -> None:
        """Wait until the server has closed the socket."""
        async with asyncio.timeout(DEADLINE):
            with contextlib.suppress(ConnectionError):
                while await self.reader.read(1 << 16):
                    pass
