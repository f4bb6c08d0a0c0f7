"""WebSocket framing (RFC 6455), the server's side: bytes in, messages out. Knows no socket and nothing of what messages mean.

The parser stays in step after a violation wherever the frame's length is known, so that the client's Close is still seen
behind it. No extension is negotiated, so all reserved bits must be zero.
"""

import struct
from typing import Final, NamedTuple

import numpy as np

CONTINUATION: Final = 0x0
TEXT: Final = 0x1
BINARY: Final = 0x2
CLOSE: Final = 0x8
PING: Final = 0x9
PONG: Final = 0xA
VIOLATION: Final = -1
"""Not of the RFC: stands in `Message.opcode` for a frame that broke it."""

NORMAL: Final = 1000
GOING_AWAY: Final = 1001
PROTOCOL_ERROR: Final = 1002
NO_STATUS: Final = 1005
POLICY: Final = 1008
TOO_BIG: Final = 1009
INTERNAL: Final = 1011
TRY_AGAIN: Final = 1013

MAX_CONTROL_BYTES: Final = 125
_FIN: Final = 0x80
_MASKED: Final = 0x80
_RESERVED: Final = 0x70
_OPCODES: Final = frozenset((CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG))

_USUAL: Final = b"\x82\xfe"
"""How a client's whole binary message of 126 to 65,535 bytes begins."""

_U16 = struct.Struct("!H")
_U64 = struct.Struct("!Q")


class Message(NamedTuple):
    """A whole message, fragments joined, or a control frame.

    For CLOSE, `code` is the status (NO_STATUS when there was none) and `payload` the reason. For VIOLATION, `code` is the
    status to close with and `payload` a sentence.
    """

    opcode: int
    payload: bytes
    code: int = 0


_MESSAGE = tuple.__new__  # a third of the cost of Message(...)


def _violation(code: int, sentence: str) -> Message:
    return Message(VIOLATION, sentence.encode(), code)


def unmask(data: bytes | bytearray, start: int, length: int) -> bytes:
    """The payload data[start : start + length], whose masking key is the four bytes before it."""
    words = (length + 3) >> 2
    if start + 4 * words > len(data):  # whole words, past the payload's end
        data, start = data[start - 4 :] + b"\0\0\0", 4
    key_and_body = np.frombuffer(data, np.uint32, words + 1, start - 4)
    payload: bytes = (key_and_body[1:] ^ key_and_body[0]).tobytes()
    return payload[:length]


class FrameParser:
    """Frames of one client, cut anywhere, to messages."""

    def __init__(self, max_message_bytes: int) -> None:
        """max_message_bytes: a message beyond it is a violation with status 1009. Its bytes are not kept."""
        self._limit = max_message_bytes
        self._buffer = bytearray()
        self._needed = 2
        """Bytes the buffer must hold before there is anything new to see."""
        self._skip = 0
        self._fragments: bytearray | None = None
        self._opcode = 0
        self._lost = False

    @property
    def pending_bytes(self) -> int:
        """Bytes held of messages that are not whole yet."""
        return len(self._buffer) + len(self._fragments or b"")

    def feed(self, data: bytes) -> list[Message]:
        """The messages that these bytes complete, in order. Never raises."""
        if self._lost:
            return []
        source: bytes | bytearray = data
        if not self._buffer:
            if data[:2] == _USUAL and not self._skip and self._fragments is None:  # one whole message, as nearly always
                length = data[2] << 8 | data[3] if len(data) >= 4 else 0
                if len(data) == 8 + length and length <= self._limit:
                    return [_MESSAGE(Message, (BINARY, unmask(data, 8, length), 0))]
        else:
            self._buffer += data
            if len(self._buffer) < self._needed:
                return []
            source = self._buffer
        messages: list[Message] = []
        position = self._parse(source, messages)
        if source is self._buffer:
            del self._buffer[:position]
        elif position < len(data):
            self._buffer += memoryview(data)[position:]
        return messages

    def _parse(self, data: bytes | bytearray, messages: list[Message]) -> int:
        """Append whole messages to `messages`; return how many bytes were used up."""
        position, size = 0, len(data)
        while True:
            if self._skip:
                skipped = min(self._skip, size - position)
                self._skip -= skipped
                position += skipped
            if self._skip or size - position < 2:
                self._needed = 2
                return position
            first, second = data[position], data[position + 1]
            length = second & 0x7F
            header = 2
            if length == 126:
                header = 4
                if size - position < header:
                    self._needed = header
                    return position
                length = _U16.unpack_from(data, position + 2)[0]
            elif length == 127:
                header = 10
                if size - position < header:
                    self._needed = header
                    return position
                length = _U64.unpack_from(data, position + 2)[0]
            problem = self._check(first, second, length)
            if problem is not None:
                messages.append(problem)
                if length >> 63:
                    self._lost = True
                    return size
                self._fragments = None
                position += header
                self._skip = length + (4 if second & _MASKED else 0)
                continue
            end = position + header + 4 + length
            if size < end:
                self._needed = end - position
                return position
            payload = unmask(data, position + header + 4, length)
            position = end
            opcode = first & 0x0F
            if first == _FIN | BINARY:
                messages.append(Message(BINARY, payload))
            elif opcode == CLOSE:
                messages.append(_close(payload))
            elif opcode >= CLOSE:
                messages.append(Message(opcode, payload))
            else:
                self._join(first, payload, messages)

    def _join(self, first: int, payload: bytes, messages: list[Message]) -> None:
        """Take a fragment, or a text message."""
        opcode = first & 0x0F
        if first & _FIN and self._fragments is None:
            messages.append(Message(opcode, payload))
            return
        if self._fragments is None:
            self._fragments = bytearray()
            self._opcode = opcode
        self._fragments += payload
        if first & _FIN:
            messages.append(Message(self._opcode, bytes(self._fragments)))
            self._fragments = None

    def _check(self, first: int, second: int, length: int) -> Message | None:
        """What the RFC, or our limit, has against a frame with this header."""
        if first == _FIN | BINARY and second & _MASKED and length <= self._limit and self._fragments is None:
            return None
        opcode = first & 0x0F
        if first & _RESERVED:
            return _violation(PROTOCOL_ERROR, "a frame has reserved bits set: no extension was negotiated")
        if opcode not in _OPCODES:
            return _violation(PROTOCOL_ERROR, f"a frame has the unknown opcode {opcode}")
        if not second & _MASKED:
            return _violation(PROTOCOL_ERROR, "a frame is not masked: clients must mask theirs")
        if length >> 63:
            return _violation(PROTOCOL_ERROR, "a frame claims a length of more than 63 bits")
        if opcode >= CLOSE:
            if not first & _FIN:
                return _violation(PROTOCOL_ERROR, "a control frame is fragmented")
            if length > MAX_CONTROL_BYTES:
                return _violation(
                    PROTOCOL_ERROR, f"a control frame has {length} bytes: at most {MAX_CONTROL_BYTES} are allowed"
                )
            return None
        if opcode == CONTINUATION and self._fragments is None:
            return _violation(PROTOCOL_ERROR, "a continuation frame has no message to continue")
        if opcode != CONTINUATION and self._fragments is not None:
            return _violation(PROTOCOL_ERROR, "a new message starts before the fragmented one has ended")
        total = length + len(self._fragments or b"")
        if total > self._limit:
            return _violation(TOO_BIG, f"a message has {total} bytes or more: this server takes at most {self._limit} in one")
        return None


def _close(payload: bytes) -> Message:
    if not payload:
        return Message(CLOSE, b"", NO_STATUS)
    if len(payload) == 1:
        return Message(CLOSE, b"", PROTOCOL_ERROR)
    code = _U16.unpack_from(payload)[0]
    valid = 3000 <= code <= 4999 or (1000 <= code <= 1014 and code not in (1004, 1005, 1006))
    return Message(CLOSE, payload[2:], code if valid else PROTOCOL_ERROR)


_SHORT_BINARY = tuple(bytes((_FIN | BINARY, size)) for size in range(126))


def header(opcode: int, size: int) -> bytes:
    """The header of one whole unmasked frame of `size` payload bytes."""
    if size < 126:
        return _SHORT_BINARY[size] if opcode == BINARY else bytes((_FIN | opcode, size))
    if size < 1 << 16:
        return bytes((_FIN | opcode, 126)) + _U16.pack(size)
    return bytes((_FIN | opcode, 127)) + _U64.pack(size)


def frame(opcode: int, payload: bytes) -> bytes:
    """One whole unmasked frame."""
    return header(opcode, len(payload)) + payload


def close_frame(code: int, reason: str = "") -> bytes:
    """A Close frame. The reason is cut to what fits, between characters."""
    text = reason.encode("utf-8", "replace")[: MAX_CONTROL_BYTES - 2].decode("utf-8", "ignore").encode()
    return frame(CLOSE, _U16.pack(code) + text)
