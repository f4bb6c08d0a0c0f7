"""Wyoming's framing on plain TCP: a JSON line, then JSON data and a payload of the lengths that the line announces.

To the session a message is `bytes`: one JSON object `{"type": …, "data": …}` on a line, then the payload. From the session it
is `str`: such an object.
"""

from collections.abc import Sequence
from typing import Any, Final

import msgspec

from moshi_stt import __version__
from moshi_stt.server.framing import POLICY, TOO_BIG, Frame, Framing, Violation
from moshi_stt.session import Message

MOST_LINE_BYTES: Final = 1 << 20
MOST_DATA_BYTES: Final = 1 << 20
MOST_PAYLOAD_BYTES: Final = 4 << 20


class WyomingFraming(Framing):
    """See the module's docstring."""

    def __init__(self) -> None:
        self._held = bytearray()
        self._header: dict[str, Any] | None = None
        self._data_bytes = 0
        self._payload_bytes = 0
        self._searched = 0
        """Bytes of `_held` that have no newline."""
        self._over = False

    @property
    def pending_bytes(self) -> int:
        return len(self._held)

    def feed(self, data: bytes) -> Sequence[Frame]:
        if self._over:
            return ()
        self._held += data
        frames: list[Frame] = []
        while not self._over:
            try:
                message = self._next()
            except _Malformed as error:
                self._over = True
                self._held.clear()
                frames.append(Violation(error.code, str(error)))
                break
            if message is None:
                break
            frames.append(message)
        return frames

    def encode(self, message: Message) -> bytes:
        event = msgspec.json.decode(message)
        header: dict[str, Any] = {"type": event["type"], "version": __version__}
        data = msgspec.json.encode(event["data"]) if event.get("data") else b""
        if data:
            header["data_length"] = len(data)
        return msgspec.json.encode(header) + b"\n" + data

    def close(self, code: int, reason: str = "") -> bytes:
        self._over = True
        return b""

    def _next(self) -> bytes | None:
        """The next whole message, None where it is not there yet."""
        if self._header is None and not self._take_line():
            return None
        header, size = self._header, self._data_bytes + self._payload_bytes
        if header is None or len(self._held) < size:
            return None
        data = header.get("data") or {}
        if self._data_bytes:
            try:
                separate = msgspec.json.decode(bytes(self._held[: self._data_bytes]))
            except (msgspec.MsgspecError, RecursionError):
                raise _Malformed("the data of an event must be JSON") from None
            if not isinstance(separate, dict):
                raise _Malformed("the data of an event must be an object")
            data = {**data, **separate}
        payload = bytes(self._held[self._data_bytes : size])
        del self._held[:size]
        self._header = None
        return msgspec.json.encode({"type": header["type"], "data": data}) + b"\n" + payload

    def _take_line(self) -> bool:
        """Read the line of the next message; False where it is not whole."""
        end = self._held.find(b"\n", self._searched)
        if (len(self._held) if end < 0 else end) > MOST_LINE_BYTES:
            raise _Malformed(f"a line of more than {MOST_LINE_BYTES} bytes", TOO_BIG)
        if end < 0:
            self._searched = len(self._held)
            return False
        line = bytes(self._held[:end])
        del self._held[: end + 1]
        self._searched = 0
        try:
            header = msgspec.json.decode(line)
        except (msgspec.MsgspecError, RecursionError):
            raise _Malformed(f"an event begins with a line of JSON, got {line[:40].decode('latin-1')!a}") from None
        if not isinstance(header, dict) or not isinstance(header.get("type"), str):
            raise _Malformed("the line of an event must be an object with a `type`")
        if not isinstance(header.get("data") or {}, dict):
            raise _Malformed("the data of an event must be an object")
        self._data_bytes = _length(header, "data_length", MOST_DATA_BYTES)
        self._payload_bytes = _length(header, "payload_length", MOST_PAYLOAD_BYTES)
        self._header = header
        return True


class _Malformed(Exception):
    def __init__(self, sentence: str, code: int = POLICY) -> None:
        super().__init__(sentence)
        self.code = code


def _length(header: dict[str, Any], name: str, most: int) -> int:
    value = header.get(name) or 0
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise _Malformed(f"{name} must be a number of bytes, got {str(value)[:20]}")
    if value > most:
        raise _Malformed(f"{name} is {value}: at most {most} bytes are taken", TOO_BIG)
    return value
