"""How much sound a file's own header promises, to tell a file that was cut from a whole one.

Only what says it exactly counts: a number that is an estimate, or "unknown" in one of its many forms, promises nothing. Outer
sizes count for less than the size of the sound itself: writers get them wrong by a few bytes.
"""

import io
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Final

UNKNOWN_BYTES: Final = 0x7FFF0000
"""Recorders that write to a pipe put a size beyond this into a WAV header, or 0."""

_HEAD: Final = 1 << 16
_MOST_CHUNKS: Final = 1_000
_W64_DATA: Final = b"data\xf3\xac\xd3\x11\x8c\xd1\x00\xc0O\x8e\xdb\x8a"
_MP3_RATES: Final = {3: (44_100, 48_000, 32_000), 2: (22_050, 24_000, 16_000), 0: (11_025, 12_000, 8_000)}
_OGG_PAGE_BYTES: Final = 65_307
_PIPE_HEAD_BYTES: Final = 1 << 20
"""Kept of a pipe: enough for a picture in front of the sound."""
_PIPE_TAIL_BYTES: Final = 2 * _OGG_PAGE_BYTES


@dataclass(frozen=True)
class Announced:
    """What a file's bytes say of their own completeness.

    missing_bytes: so many bytes of the sound itself are beyond the file's end. whole: its sizes say that none is.
    seconds: exact length of the sound. remark: a sign that it may be cut short, of a format that cannot say for sure.
    """

    missing_bytes: int = 0
    seconds: float | None = None
    whole: bool = False
    remark: str = ""


class Ends(io.RawIOBase):
    """Start and end of what went through a pipe, as a file with a hole in it. Reading the hole raises OSError."""

    def __init__(self) -> None:
        self._head = bytearray()
        self._tail = bytearray()
        self.size = 0
        """Bytes that went through."""
        self._position = 0

    def add(self, data: bytes) -> None:
        """What went through next."""
        self.size += len(data)
        if (room := _PIPE_HEAD_BYTES - len(self._head)) > 0:
            self._head += data[:room]
        self._tail += data
        if len(self._tail) > 2 * _PIPE_TAIL_BYTES:
            del self._tail[:-_PIPE_TAIL_BYTES]

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._position = offset + (0, self._position, self.size)[whence]
        return self._position

    def read(self, size: int = -1) -> bytes:
        end = self.size if size is None or size < 0 else min(self.size, self._position + size)
        start, self._position = self._position, max(self._position, end)
        if end <= len(self._head):
            return bytes(self._head[start:end])
        first = self.size - len(self._tail)
        if start < first and start >= len(self._head):
            raise OSError("this part of the pipe was not kept")
        if start < first:  # as much as there is
            self._position = len(self._head)
            return bytes(self._head[start:])
        return bytes(self._tail[start - first : end - first])


def announced(file: IO[bytes]) -> Announced:
    """What a seekable file says. It is left where it was. What cannot be read, or is nonsense, announces nothing."""
    start = file.tell()
    try:
        try:
            end = file.seek(0, os.SEEK_END)
            file.seek(start)
            return _announced(file, file.read(16), start, end)
        except Exception:  # whatever the file object raises: who decodes the file will meet it again
            return Announced()
    finally:
        file.seek(start)


def _announced(file: IO[bytes], head: bytes, start: int, end: int) -> Announced:
    if head[:4] in (b"RIFF", b"RF64", b"BW64") and head[8:12] == b"WAVE":
        return _of_chunks(file, start + 12, end, "<", b"data")
    if head[:4] == b"FORM" and head[8:11] == b"AIF":
        return _of_chunks(file, start + 12, end, ">", b"SSND")
    if head[:4] == b"riff":
        return _of_wave64(file, start + 40, end)
    if head[:4] == b"caff":
        return _of_caf(file, start + 8, end)
    if head[:4] == b".snd":
        offset, size = struct.unpack(">II", head[4:12])
        return Announced(max(0, start + offset + size - end)) if 0 < size < UNKNOWN_BYTES else Announced()
    if head[:4] == b"OggS":
        return _of_ogg(file, start, end)
    if head[:4] == b"\x1aE\xdf\xa3":
        return _of_matroska(file, start, end)
    if head[4:8] in (b"ftyp", b"styp", b"moov", b"moof"):
        return _of_boxes(file, start, end)
    return _of_mp3(file, start, head)


def _of_chunks(file: IO[bytes], position: int, end: int, order: str, name: bytes) -> Announced:
    """WAV and AIFF: the chunk that holds the samples."""
    large = None
    for _ in range(_MOST_CHUNKS):
        file.seek(position)
        header = file.read(8)
        if len(header) < 8:
            break
        size = int.from_bytes(header[4:], "little" if order == "<" else "big")
        if header[:4] == b"ds64":
            large = struct.unpack("<QQQ", file.read(24))[1]
        if header[:4] == name:
            if size == 0xFFFFFFFF and large:
                return Announced(max(0, position + 8 + large - end))
            return Announced(max(0, position + 8 + size - end) if 0 < size < UNKNOWN_BYTES else 0)
        position += 8 + size + size % 2
    return Announced()


def _of_wave64(file: IO[bytes], position: int, end: int) -> Announced:
    for _ in range(_MOST_CHUNKS):
        file.seek(position)
        header = file.read(24)
        if len(header) < 24:
            break
        (size,) = struct.unpack("<Q", header[16:])
        if header[:16] == _W64_DATA:
            return Announced(max(0, position + size - end) if 24 < size < 1 << 62 else 0)
        position += max(24, size + -size % 8)
    return Announced()


def _of_caf(file: IO[bytes], position: int, end: int) -> Announced:
    for _ in range(_MOST_CHUNKS):
        file.seek(position)
        header = file.read(12)
        if len(header) < 12:
            break
        (size,) = struct.unpack(">q", header[4:])
        if header[:4] == b"data":
            return Announced(max(0, position + 12 + size - end) if size > 0 else 0)
        if size < 0:
            break
        position += 12 + size
    return Announced()


def _of_boxes(file: IO[bytes], position: int, end: int) -> Announced:
    """MP4 in fragments: a box that ends beyond the file. (Of the others the index says how many samples there are.)"""
    fragmented = False
    while position + 8 <= end:
        file.seek(position)
        header = file.read(16)
        size, kind = int.from_bytes(header[:4], "big"), header[4:8]
        if size == 1:
            size = int.from_bytes(header[8:16], "big")
        if size < 8:
            break
        fragmented |= kind == b"moof"
        position += size
    return Announced(max(0, position - end) if fragmented else 0)


def _of_ogg(file: IO[bytes], start: int, end: int) -> Announced:
    """The last page: does it end with the file, and does it end its stream?"""
    file.seek(max(start, end - 2 * _OGG_PAGE_BYTES))
    tail = file.read()
    position = tail.rfind(b"OggS\0")
    if position < 0:
        return Announced()
    page = tail[position:]
    if len(page) < 27 or len(page) < 27 + page[26]:
        return Announced(missing_bytes=1)
    size = 27 + page[26] + sum(page[27 : 27 + page[26]])
    if len(page) < size:
        return Announced(missing_bytes=size - len(page))
    return Announced() if page[5] & 4 else Announced(remark="its last page does not end the stream: it may be cut short")


def _of_matroska(file: IO[bytes], start: int, end: int) -> Announced:
    """The size of the segment, where it is known: the length in its header is that of the longest track."""
    file.seek(start)
    data = file.read(_HEAD)
    for identifier, content, size in _elements(data, 0):
        if identifier == 0x18538067:
            missing = max(0, start + content + size - end) if size is not None else 0
            return Announced(missing, whole=size is not None and not missing)
    return Announced()


def _elements(data: bytes, position: int) -> Iterator[tuple[int, int, int | None]]:
    """Identifier, start of the content and its size (None: unknown) of each element of one level of EBML."""
    while position < len(data):
        identifier, position = _number(data, position, keep_marker=True)
        width = 9 - data[position].bit_length()
        size, position = _number(data, position, keep_marker=False)
        unknown = size == (1 << 7 * width) - 1
        yield identifier, position, None if unknown else size
        if unknown:
            return
        position += size


def _number(data: bytes, position: int, *, keep_marker: bool) -> tuple[int, int]:
    width = 9 - data[position].bit_length()
    if width > 8:
        raise ValueError("no EBML number")
    value = int.from_bytes(data[position : position + width], "big")
    return (value if keep_marker else value & ((1 << 7 * width) - 1)), position + width


def _of_mp3(file: IO[bytes], start: int, head: bytes) -> Announced:
    """The frame that Xing, LAME or VBRI put in front says how many follow. Without one, any length is an estimate."""
    position = start
    while head[:3] == b"ID3":
        size = sum((byte & 127) << 7 * (3 - index) for index, byte in enumerate(head[6:10]))
        position += 10 + size + (10 if head[5] & 16 else 0)
        file.seek(position)
        head = file.read(16)
    file.seek(position)
    data = file.read(_HEAD)
    for sync in range(min(len(data) - 4, 8_192)):
        if data[sync] == 0xFF and data[sync + 1] & 0xE0 == 0xE0 and data[sync + 1] & 0x06 == 2:
            break
    else:
        return Announced()
    version, rate_index = data[sync + 1] >> 3 & 3, data[sync + 2] >> 2 & 3
    if version == 1 or rate_index == 3:
        return Announced()
    mono = data[sync + 3] >> 6 == 3
    side = (17 if mono else 32) if version == 3 else (9 if mono else 17)
    at = sync + 4 + side
    frames = 0
    if data[at : at + 4] in (b"Xing", b"Info") and data[at + 7] & 1:
        frames = int.from_bytes(data[at + 8 : at + 12], "big")
    elif data[sync + 36 : sync + 40] == b"VBRI":
        frames = int.from_bytes(data[sync + 50 : sync + 54], "big")
    if not frames:
        return Announced()
    return Announced(seconds=frames * (1_152 if version == 3 else 576) / _MP3_RATES[version][rate_index])
