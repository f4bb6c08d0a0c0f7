"""WebSocket framing (RFC 6455), the server's side, by the sans-I/O protocol of `websockets`.

What the library would answer by itself is thrown away, because it is the connection that decides when a Close may go out
(what was good before a violation is transcribed first) and how many pings a client that does not read is still owed. No
extension is negotiated.
"""

import logging
from collections.abc import Sequence
from typing import Final

from websockets.frames import Close, CloseCode, Frame, Opcode
from websockets.protocol import Protocol, Side

from moshi_stt.server import framing
from moshi_stt.server.framing import Closed, Framing, Ping, Pong, Violation
from moshi_stt.session import Message

try:
    from websockets.speedups import apply_mask
except ImportError:  # a build without its C part
    from websockets.utils import apply_mask

MAX_REASON_BYTES: Final = 123
"""What fits into a Close frame after its status."""

_USUAL: Final = b"\x82\xfe"
"""How a whole binary message of 126 to 65,535 bytes begins. A read is one such message nearly always, and the general parser
takes ten times as long for it as unmasking."""

_log = logging.getLogger("moshi_stt.server.websocket.library")
_log.setLevel(logging.WARNING)  # it formats each frame where it may log at DEBUG


class WebSocketFraming(Framing):
    """One connection after its upgrade."""

    def __init__(self, max_message_bytes: int) -> None:
        """max_message_bytes: a message beyond it is a violation with status 1009, known from its header."""
        self._protocol = Protocol(Side.SERVER, max_size=max_message_bytes, logger=_log)
        self._limit = max_message_bytes
        self._fragments: bytearray | None = None
        self._is_text = False
        self._over = False
        self._broken = False

    @property
    def pending_bytes(self) -> int:
        return len(self._protocol.reader.buffer) + len(self._fragments or b"")

    @property
    def broken(self) -> bool:
        return self._broken

    @property
    def handshakes(self) -> bool:
        return True

    def feed(self, data: bytes) -> Sequence[framing.Frame]:
        if self._over:
            return ()
        protocol = self._protocol
        if data[:2] == _USUAL and not protocol.reader.buffer and protocol.current_size is None and len(data) >= 8:
            size = data[2] << 8 | data[3]
            if len(data) == 8 + size and size <= self._limit:  # one whole message: the parser's state stays what it is
                return [bytes(apply_mask(data[8:], data[4:8]))]
        protocol.receive_data(data)
        frames: list[framing.Frame] = []
        for event in protocol.events_received():
            assert type(event) is Frame
            self._take(event, frames)
            if self._over:
                return frames
        if protocol.parser_exc is not None:
            self._over = True
            end = _violation(protocol)
            self._broken = type(end) is Violation
            frames.append(end)
        if protocol.writes:
            protocol.data_to_send()
        return frames

    def _take(self, frame: Frame, frames: list[framing.Frame]) -> None:
        opcode = frame.opcode
        if opcode is Opcode.BINARY or opcode is Opcode.TEXT:
            if frame.fin:
                self._complete(frame.data, opcode is Opcode.TEXT, frames)
            else:
                self._fragments, self._is_text = bytearray(frame.data), opcode is Opcode.TEXT
        elif opcode is Opcode.CONT:
            assert self._fragments is not None
            self._fragments += frame.data
            if frame.fin:
                data, self._fragments = self._fragments, None
                self._complete(data, self._is_text, frames)
        elif opcode is Opcode.PING:
            frames.append(Ping(bytes(frame.data)))
        elif opcode is Opcode.PONG:
            frames.append(Pong(bytes(frame.data)))
        else:
            received = self._protocol.close_rcvd
            assert received is not None
            frames.append(Closed(received.code))
            self._over = True

    def _complete(self, data: bytes | bytearray | memoryview, is_text: bool, frames: list[framing.Frame]) -> None:
        if not is_text:
            frames.append(bytes(data))
            return
        try:
            frames.append(str(data, "utf-8"))
        except UnicodeDecodeError as error:  # RFC 6455 section 8.1
            frames.append(Violation(framing.NOT_UTF8, f"a text message is not UTF-8: {error.reason} at byte {error.start}"))
            self._over = self._broken = True

    def encode(self, message: Message) -> bytes:
        if type(message) is str:
            payload, first = message.encode("utf-8", "replace"), 0x81
        else:
            assert isinstance(message, bytes)
            payload, first = message, 0x82
        size = len(payload)
        if size < 126:  # nearly always
            return bytes((first, size)) + payload
        return Frame(Opcode(first & 0x0F), payload).serialize(mask=False)

    def ping(self, payload: bytes = b"") -> bytes:
        return Frame(Opcode.PING, payload).serialize(mask=False)

    def pong(self, payload: bytes) -> bytes:
        return Frame(Opcode.PONG, payload).serialize(mask=False)

    def close(self, code: int, reason: str = "") -> bytes:
        if code == framing.NO_STATUS:
            return Frame(Opcode.CLOSE, b"").serialize(mask=False)
        text = reason.encode("utf-8", "replace")[:MAX_REASON_BYTES].decode("utf-8", "ignore")
        return Frame(Opcode.CLOSE, Close(code, text).serialize()).serialize(mask=False)


def _violation(protocol: Protocol) -> Violation | Closed:
    """What the parser stopped for."""
    if protocol.close_rcvd is not None:  # a Close amid a fragmented message
        return Closed(protocol.close_rcvd.code)
    error = protocol.parser_exc
    code = protocol.close_sent.code if protocol.close_sent is not None else framing.PROTOCOL_ERROR
    if code == CloseCode.MESSAGE_TOO_BIG:
        return Violation(code, f"a message is too big: {error}; this server takes at most {protocol.max_message_size} bytes")
    return Violation(int(code), f"the WebSocket framing is broken: {error}")
