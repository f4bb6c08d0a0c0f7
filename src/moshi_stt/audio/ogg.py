"""Ogg pages in any pieces in, whole packets out, and back (RFC 3533). Knows nothing of what a packet means.

Nothing is held but the page that is not yet whole (65,307 bytes at most) and the packet that is not yet whole.
"""

import struct
import zlib
from collections.abc import Iterator
from typing import NamedTuple

from moshi_stt.errors import AudioError
from moshi_stt.signatures import name_of

_HEADER = struct.Struct("<4sBBqIIIB")  # capture, version, flags, granule, serial, sequence, checksum, segments
_CONTINUED, _FIRST, _LAST = 1, 2, 4
MAX_PACKET_BYTES = 255 * 255
"""Longest packet that is taken: one page's worth. An Opus packet has at most 61,298 bytes."""

_BIT_REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


class Packet(NamedTuple):
    """One packet of one logical stream.

    first: it begins its logical stream. page_end: no other packet ends on its page. last: it ends its logical stream.
    granule: the codec's position at the end of its page, -1 where the page has none.
    """

    data: bytes
    serial: int
    granule: int
    first: bool
    page_end: bool
    last: bool


def checksum(page: bytes) -> int:
    """The CRC of a page whose checksum field is zero: polynomial 0x04c11db7, most significant bit first, from 0.

    zlib has the same polynomial with the bits the other way round, so the bytes are mirrored on the way in and the
    result on the way out.
    """
    mirrored = zlib.crc32(page.translate(_BIT_REVERSED), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return int.from_bytes(mirrored.to_bytes(4, "little").translate(_BIT_REVERSED), "big")


def encode_page(packet: bytes, serial: int, sequence: int, granule: int, *, first: bool = False, last: bool = False) -> bytes:
    """One page with one whole packet of fewer than `MAX_PACKET_BYTES` bytes."""
    lacing = b"\xff" * (len(packet) // 255) + bytes([len(packet) % 255])
    flags = (_FIRST if first else 0) | (_LAST if last else 0)
    body = lacing + packet
    page = _HEADER.pack(b"OggS", 0, flags, granule, serial, sequence, 0, len(lacing)) + body
    return page[:22] + struct.pack("<I", checksum(page)) + page[26:]


class OggReader:
    """Splits one physical stream into packets. Not for several threads."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._offset = 0  # bytes of the stream before the buffer, for error messages
        self._partial: dict[int, bytearray] = {}  # serial -> packet that goes on in its next page

    def packets(self, data: bytes) -> Iterator[Packet]:
        """Every packet that `data` completes. Exhaust the iterator before the next call.

        Raises AudioError at the first byte that is not of an Ogg stream, behind the packets before it.
        """
        self._buffer += data
        while (size := self._page_size()) is not None:
            page = bytes(self._buffer[:size])
            del self._buffer[:size]
            yield from self._split(page)
            self._offset += size

    def _page_size(self) -> int | None:
        """Size of the first page, None while it is not whole. Raises AudioError where there is no page."""
        buffer = self._buffer
        if not b"OggS".startswith(bytes(buffer[:4])):
            raise AudioError(self._not_ogg())
        if len(buffer) < _HEADER.size:
            return None
        if buffer[4] != 0:
            raise AudioError(f"Ogg page at byte {self._offset} has version {buffer[4]}, expected 0: the stream is damaged")
        segments = buffer[26]
        if len(buffer) < _HEADER.size + segments:
            return None
        size = _HEADER.size + segments + sum(buffer[_HEADER.size : _HEADER.size + segments])
        return size if len(buffer) >= size else None

    def _not_ogg(self) -> str:
        start = bytes(self._buffer[:12])
        found = f"bytes {start[:4].hex(' ')}"
        if self._offset:
            return (
                f"{found} at byte {self._offset} where an Ogg page (OggS) was expected: "
                "send every byte of the encoder's output once and in order"
            )
        kind = name_of(start)
        return (
            f"not an Ogg stream: it starts with {found}{f', which is {kind}' if kind else ''}. "
            "OggOpus takes Opus in Ogg pages, from the first page (OpusHead) on"
        )

    def _split(self, page: bytes) -> Iterator[Packet]:
        _, _, flags, granule, serial, _, crc, segments = _HEADER.unpack_from(page)
        if checksum(page[:22] + bytes(4) + page[26:]) != crc:
            raise AudioError(f"Ogg page at byte {self._offset} fails its checksum: the stream is damaged")
        lacing = page[_HEADER.size : _HEADER.size + segments]
        partial = self._partial.pop(serial, bytearray())
        skip = False
        if flags & _CONTINUED:
            skip = not partial  # its beginning was never seen: drop what is left of it
        else:
            partial.clear()
        position = _HEADER.size + segments
        last_end = max((index for index, length in enumerate(lacing) if length < 255), default=-1)
        first = bool(flags & _FIRST)
        for index, length in enumerate(lacing):
            partial += page[position : position + length]
            position += length
            if len(partial) > MAX_PACKET_BYTES:
                # Cover pictures in comments are this long; no audio is. The cut packet is still told from others by its start.
                del partial[MAX_PACKET_BYTES:]
            if length < 255:
                if not skip:
                    ends_page = index == last_end
                    yield Packet(bytes(partial), serial, granule, first, ends_page, ends_page and bool(flags & _LAST))
                    first = False
                skip = False
                partial = bytearray()
        if lacing and lacing[-1] == 255 and not skip and len(self._partial) < 16:
            self._partial[serial] = partial
        if flags & _LAST and last_end < 0:
            yield Packet(b"", serial, granule, False, True, True)
