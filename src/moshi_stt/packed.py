"""MessagePack values as bytes: the parts where a general packer is too slow or too greedy.

Writing: whole runs of float32. Reading: arrays of numbers, where a run of floats of one width is read through one strided
view, and anything else in pieces, so that memory stays a small multiple of the message's size whatever is in it.
"""

from collections.abc import Callable
from typing import Any, Final

import msgpack  # type: ignore[import-untyped]
import numpy as np
from numpy.typing import NDArray

CHUNK: Final = 4_096
"""Elements of an array that are Python objects at one time."""

# ---- writing -------------------------------------------------------------------------------------------------------------

_FLOAT32_RECORD: Final = np.dtype([("tag", "u1"), ("value", ">f4")])


def array_header(count: int) -> bytes:
    if count < 16:
        return bytes((0x90 | count,))
    return b"\xdc" + count.to_bytes(2, "big") if count < 1 << 16 else b"\xdd" + count.to_bytes(4, "big")


def float32_array(values: NDArray[np.float32]) -> bytes:
    """float32 (S,) as an array of S floats of 5 bytes."""
    records = np.empty(len(values), _FLOAT32_RECORD)
    records["tag"] = 0xCA
    records["value"] = values
    return array_header(len(values)) + records.tobytes()


# ---- reading: what lies where --------------------------------------------------------------------------------------------


def _kinds() -> tuple[str, ...]:
    ranges = (
        (0x00, "integer"), (0x80, "map"), (0x90, "array"), (0xA0, "str"), (0xC0, "nil"), (0xC1, "invalid byte"), (0xC2, "bool"),
        (0xC4, "bin"), (0xC7, "ext"), (0xCA, "float"), (0xCC, "integer"), (0xD4, "ext"), (0xD9, "str"), (0xDC, "array"),
        (0xDE, "map"), (0xE0, "integer"),
    )  # fmt: skip
    ends = [start for start, _ in ranges[1:]] + [256]
    return tuple(kind for (start, kind), end in zip(ranges, ends, strict=True) for _ in range(start, end))


KIND: Final = _kinds()
"""What a value that begins with this byte is, for every byte."""

_BIN_HEADER: Final = {0xC4: 1, 0xC5: 2, 0xC6: 4}
_ARRAY_HEADER: Final = {0xDC: 2, 0xDD: 4}


def _sized(message: bytes, start: int, length_bytes: int) -> tuple[int, int]:
    """Count, and first byte after the header, of a value whose length has these many bytes."""
    body = start + 1 + length_bytes
    return int.from_bytes(message[start + 1 : body], "big"), body


def array_at(message: bytes, start: int) -> tuple[int, int] | None:
    """How many elements, and where the first lies; None where no array lies. The message may end within it."""
    head = message[start]
    if 0x90 <= head <= 0x9F:
        return head & 0x0F, start + 1
    return _sized(message, start, _ARRAY_HEADER[head]) if head in _ARRAY_HEADER else None


def bin_at(message: bytes, start: int) -> tuple[int, int] | None:
    """How many bytes, and where the first lies; None where no bin lies. The message may end within it."""
    head = message[start]
    return _sized(message, start, _BIN_HEADER[head]) if head in _BIN_HEADER else None


def scalar_at(message: bytes, start: int, end: int) -> bytes | int | None:
    """The str or bin (as bytes) or the integer at [start, end), a whole value; None where something else lies."""
    if KIND[message[start]] not in ("str", "bin", "integer"):
        return None
    value: bytes | int = msgpack.unpackb(message[start:end], raw=True)
    return value


def show(message: bytes, start: int, end: int) -> str:
    """A whole value for an error message: its kind and, where it is plain, its beginning (at most 60 characters)."""
    kind = KIND[message[start]]
    if kind in ("integer", "float", "bool"):
        return f"{kind} {msgpack.unpackb(message[start:end])}"
    if kind in ("str", "bin"):
        return f"{kind} {quote(msgpack.unpackb(message[start:end], raw=True))}"
    return kind


def quote(data: bytes) -> str:
    """The beginning of a string that may be no UTF-8, in printable ASCII: at most 50 characters."""
    shown = ascii(data[:32].decode("utf-8", "backslashreplace"))
    return shown[:47] + "..." if len(shown) > 50 or len(data) > 32 else shown


# ---- reading: arrays of numbers ------------------------------------------------------------------------------------------


def float_run(message: bytes, start: int, count: int) -> tuple[NDArray[np.float32], int] | None:
    """`count` ≥ 1 floats of one width from `start` on, and where they end; None where anything else is among them.

    All tag bytes are compared at once, and the values read through one strided view.
    """
    tag = message[start] if start < len(message) else 0
    size, kind = (5, ">f4") if tag == 0xCA else (9, ">f8")
    end = start + size * count
    if tag not in (0xCA, 0xCB) or end > len(message) or message[start:end:size] != message[start : start + 1] * count:
        return None
    values: NDArray[Any] = np.ndarray(count, kind, message, start + 1, size)
    if size == 5:
        return values.astype(np.float32), end
    with np.errstate(over="ignore", invalid="ignore"):  # 1e300 becomes inf
        return values.astype(np.float32), end


def float32s_at(message: bytes, start: int) -> NDArray[np.float32] | None:
    """(S,) where a whole array of nothing but float32 or nothing but float64 lies, or a whole bin of little-endian float32.

    None where anything else lies; the message may end anywhere.
    """
    if start >= len(message):
        return None
    array = array_at(message, start)
    if array is not None:
        count, body = array
        if count == 0:
            return np.empty(0, np.float32) if body <= len(message) else None
        run = float_run(message, body, count)
        return None if run is None else run[0]
    data = bin_at(message, start)
    if data is not None:
        size, body = data
        if size % 4 == 0 and body + size <= len(message):
            return np.frombuffer(message, "<f4", size // 4, body).astype(np.float32)
    return None


def numbers_at(message: bytes, start: int, end: int) -> NDArray[np.float32]:
    """(S,) from the array at [start, end), a whole one, of floats and integers in any mixture.

    Raises WrongElement at the first that is neither.
    """
    array = array_at(message, start)
    assert array is not None
    count, at = array
    values = np.empty(count, np.float32)
    for first in range(0, count, CHUNK):
        size = min(CHUNK, count - first)
        run = float_run(message, at, size)
        if run is not None:
            values[first : first + size], at = run
            continue
        elements, after = _elements(message, at, end, size)
        if not {*map(type, elements)} <= {int, float}:
            raise WrongElement(message, at, first, size, _is_number)
        at = after
        with np.errstate(over="ignore"):
            values[first : first + size] = elements
    return values


def bytes_at(message: bytes, start: int, end: int) -> bytes:
    """The bytes from the array at [start, end), a whole one, of integers 0..255.

    Raises WrongElement at the first that is none.
    """
    array = array_at(message, start)
    assert array is not None
    count, at = array
    data = bytearray()
    for first in range(0, count, CHUNK):
        size = min(CHUNK, count - first)
        elements, after = _elements(message, at, end, size)
        if {*map(type, elements)} != {int} or min(elements) < 0 or max(elements) > 255:
            raise WrongElement(message, at, first, size, _is_byte)
        at = after
        data += bytes(elements)
    return bytes(data)


class WrongElement(ValueError):
    """An array holds what it must not. `index`: of the first such element. `found`: that element, as `show` says it."""

    def __init__(self, message: bytes, start: int, first: int, count: int, fits: Callable[[str, bytes], bool]) -> None:
        """It is among the `count` elements that begin at `start`, the first of which has the index `first`."""
        unpacker = msgpack.Unpacker(max_buffer_size=len(message) - start)
        unpacker.feed(memoryview(message)[start:])
        self.index, self.found = first, "what cannot be read"
        for index in range(first, first + count):
            at = start + unpacker.tell()
            unpacker.skip()
            end = start + unpacker.tell()
            if not fits(KIND[message[at]], message[at:end]):
                self.index, self.found = index, show(message, at, end)
                break
        super().__init__(f"element {self.index} is {self.found}")


def _is_number(kind: str, element: bytes) -> bool:
    return kind in ("integer", "float")


def _is_byte(kind: str, element: bytes) -> bool:
    return kind == "integer" and 0 <= msgpack.unpackb(element) < 256


def _elements(message: bytes, start: int, end: int, count: int) -> tuple[list[Any], int]:
    """`count` elements from `start` on, and where they end; [None] where one of them can be no number."""
    piece = message[start : min(end, start + 9 * count)]  # a number has at most 9 bytes
    unpacker = msgpack.Unpacker(raw=True, max_buffer_size=len(piece) + 5, object_pairs_hook=_nothing, ext_hook=_nothing)
    unpacker.feed(b"\xdd" + count.to_bytes(4, "big") + piece)
    try:
        return unpacker.unpack(), start + unpacker.tell() - 5
    except (msgpack.UnpackException, ValueError):  # cut within an element of more than 9 bytes, or a bad timestamp
        return [None], start


def _nothing(*_: object) -> None:
    """Stands for a map, whose keys a dict might not take, or an ext."""
