"""Ogg-Opus in any pieces in, 24 kHz mono PCM out, and the way back for clients.

Each packet goes to libopus (through sphn or PyAV) on its own, so the output does not depend on how the bytes were cut, and a
packet's length is known from its first bytes before anything is decoded (RFC 6716 section 3.1, RFC 7845).
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moshi_stt.audio.ogg import MAX_PACKET_BYTES, OggReader, Packet, encode_page
from moshi_stt.constants import SAMPLE_RATE
from moshi_stt.errors import AudioError

_PIECE_SAMPLES = SAMPLE_RATE
_GRANULE_RATE = 48_000  # granule positions and pre-skip count samples at this rate, whatever the stream's own
_PER_GRANULE = _GRANULE_RATE // SAMPLE_RATE
_MAX_PACKET_SAMPLES = SAMPLE_RATE * 120 // 1000  # RFC 6716: 120 ms
_SILK_MS, _CELT_MS = (10.0, 20.0, 40.0, 60.0), (2.5, 5.0, 10.0, 20.0)
_EMPTY: NDArray[np.float32] = np.zeros(0, np.float32)


def libopus() -> Any:
    """What binds libopus: the package sphn, or PyAV where sphn has no wheel (Linux on ARM)."""
    try:
        import sphn
    except ImportError:
        from moshi_stt.audio import opus_av

        return opus_av
    return sphn


def packet_samples(packet: bytes) -> int:
    """Samples at 24 kHz in one Opus packet, from its first two bytes. Raises AudioError for what is no Opus packet."""
    if not packet:
        return 0
    config, code = packet[0] >> 3, packet[0] & 3
    if config < 12:
        frame_ms = _SILK_MS[config & 3]
    elif config < 16:
        frame_ms = _SILK_MS[config & 1]
    else:
        frame_ms = _CELT_MS[config & 3]
    if code == 3 and len(packet) < 2:
        raise AudioError("Opus packet of one byte announces a frame count that is not there: the stream is damaged")
    frames = (1, 2, 2, packet[1] & 63 if code == 3 else 0)[code]
    samples = round(frames * frame_ms * SAMPLE_RATE / 1000)
    if not 0 < samples <= _MAX_PACKET_SAMPLES:
        raise AudioError(f"Opus packet announces {samples / SAMPLE_RATE * 1000:g} ms of audio, at most 120 ms is legal")
    return samples


class OpusStream:
    """One client's Ogg-Opus stream: pages cut anywhere, packets of any length, mono or stereo (mixed to mono by libopus).

    Pre-skip, output gain and the end trimming of the last page are applied. Streams may be chained.
    After an AudioError every further call raises it again.
    """

    def __init__(self) -> None:
        self._ogg = OggReader()
        self._logical: _LogicalStream | None = None
        self._other_codec = ""
        self._received = 0
        self.failure: AudioError | None = None
        """Why the stream cannot go on."""

    def pieces(self, data: bytes | bytearray | memoryview) -> Iterator[NDArray[np.float32]]:
        """Decode the next bytes, lazily, in arrays of about a second at most. Exhaust the iterator before the next call.

        Raises AudioError behind the audio that came before the fault.
        """
        self._check()
        self._received += len(data)
        held: list[NDArray[np.float32]] = []
        held_samples = 0
        try:
            for packet in self._ogg.packets(bytes(data)):
                pcm = self._decode(packet)
                if len(pcm):
                    held.append(pcm)
                    held_samples += len(pcm)
                if held_samples >= _PIECE_SAMPLES:
                    piece, held, held_samples = np.concatenate(held), [], 0
                    yield piece
        except AudioError as error:
            self.failure = error
        if held:
            yield np.concatenate(held)
        self._check()

    def finish(self) -> NDArray[np.float32]:
        """No more bytes. Nothing is held back, so the array is empty. Raises AudioError where no audio stream ever began."""
        self._check()
        if self._received and self._logical is None:
            self.failure = AudioError(
                f"the Opus stream ended after {self._received} bytes, before its header (OpusHead) was whole"
            )
            self._check()
        return _EMPTY

    def _check(self) -> None:
        if self.failure is not None:
            raise self.failure

    def _decode(self, packet: Packet) -> NDArray[np.float32]:
        logical = self._logical
        if packet.first:
            if packet.data.startswith(b"OpusHead"):
                if logical is None or logical.ended:
                    self._logical = _LogicalStream(packet)
            else:
                self._other_codec = _codec_name(packet.data)
            return _EMPTY
        if logical is None:
            carries = f"carries {self._other_codec}" if self._other_codec else "does not start with OpusHead"
            raise AudioError(f"the Ogg stream {carries}: OggOpus takes Opus, from the first page on")
        if packet.serial != logical.serial:
            return _EMPTY
        return logical.decode(packet)


class _LogicalStream:
    """From one OpusHead to its last page."""

    def __init__(self, head: Packet) -> None:
        self.serial = head.serial
        self.ended = head.last
        data = head.data
        if len(data) < 19 or data[8] >> 4 != 0:
            version = data[8:9].hex() or "none"
            raise AudioError(f"OpusHead of {len(data)} bytes and version {version}: expected 19 bytes, version 1")
        channels, mapping = data[9], data[18]
        if mapping != 0 or channels not in (1, 2):
            raise AudioError(f"Opus with {channels} channels, mapping {mapping}: send mono or stereo (mapping family 0)")
        self._reader = libopus().OpusStreamReader(SAMPLE_RATE)
        delay: int = getattr(self._reader, "delay", 0)
        self._skip = int.from_bytes(data[10:12], "little") // _PER_GRANULE + delay
        gain_db = int.from_bytes(data[16:18], "little", signed=True) / 256
        self._gain = np.float32(10 ** (gain_db / 20))
        self._tags_seen = False
        self._page_start: int | None = None  # granule before this page's first sample
        self._page_samples = 0  # decoded from this page so far
        self._sequence = 2
        header = b"OpusHead\x01" + bytes([channels]) + bytes(2) + data[12:16] + bytes(3)
        self._append(encode_page(header, 1, 0, 0, first=True))
        self._append(encode_page(b"OpusTags" + bytes(8), 1, 1, 0))

    def decode(self, packet: Packet) -> NDArray[np.float32]:
        if not self._tags_seen:
            if not packet.data.startswith(b"OpusTags"):
                raise AudioError(f"the second Opus packet starts with {packet.data[:8].hex(' ')}, expected OpusTags")
            self._tags_seen = True
            return _EMPTY
        pcm = self._decode_audio(packet.data)
        self._page_samples += len(pcm)
        if packet.page_end:
            if packet.last:
                if hasattr(self._reader, "flush"):
                    pcm = np.concatenate([pcm, self._reader.flush()])
                pcm = pcm[: max(0, len(pcm) - self._surplus(packet.granule))]
                self.ended = True
            self._page_start = packet.granule if packet.granule >= 0 else None
            self._page_samples = 0
        if self._skip:
            skipped = min(self._skip, len(pcm))
            self._skip -= skipped
            pcm = pcm[skipped:]
        return pcm if self._gain == 1 else pcm * self._gain

    def _decode_audio(self, packet: bytes) -> NDArray[np.float32]:
        samples = packet_samples(packet)
        if not samples:
            return _EMPTY
        if len(packet) >= MAX_PACKET_BYTES:
            raise AudioError(f"Opus packet of {len(packet)} bytes or more: the stream is damaged")
        self._sequence += 1
        return self._append(encode_page(packet, 1, self._sequence & 0xFFFFFFFF, 0))

    def _append(self, page: bytes) -> NDArray[np.float32]:
        try:
            pcm: NDArray[np.float32] = self._reader.append_bytes(page)
        except ValueError as error:
            raise AudioError(f"Opus packet cannot be decoded ({error}): the stream is damaged") from None
        return pcm

    def _surplus(self, granule: int) -> int:
        """Samples at the end of the last page that are only padding (RFC 7845 section 4.4)."""
        if granule < 0:
            return 0
        start = self._page_start if self._page_start is not None else 0
        real = (granule - start) // _PER_GRANULE
        return min(max(0, self._page_samples - real), self._page_samples)


def _codec_name(head: bytes) -> str:
    if head.startswith(b"\x01vorbis"):
        return "Vorbis"
    if head.startswith(b"\x7fFLAC"):
        return "FLAC"
    if head.startswith(b"Speex"):
        return "Speex"
    return f"a codec whose header starts with {head[:8].hex(' ')}"


class OpusEncoder:
    """24 kHz mono PCM in any chunks in, an Ogg-Opus stream out, in packets of 40 ms.

    Sample 0 in is sample 0 out of a decoder that trims the pre-skip, and the last one comes out too; up to 40 ms of
    silence follows it.
    """

    packet_samples = 960
    _PRE_SKIP = 1_920  # at 24 kHz: what sphn writes into OpusHead
    _LOOKAHEAD = 156  # at 24 kHz: by how much libopus itself delays

    def __init__(self) -> None:
        self._writer = libopus().OpusStreamWriter(SAMPLE_RATE)
        self._held: NDArray[np.float32] = np.zeros(self._PRE_SKIP - self._LOOKAHEAD, np.float32)

    def feed(self, pcm: NDArray[np.float32]) -> bytes:
        """pcm: float32 (S,). Returns the pages that became whole; the first call's begin with the headers."""
        pcm = np.concatenate([self._held, np.asarray(pcm, np.float32)])
        whole = len(pcm) - len(pcm) % self.packet_samples
        self._held = pcm[whole:]
        return b"".join(
            self._writer.append_pcm(pcm[start : start + self.packet_samples]) for start in range(0, whole, self.packet_samples)
        )

    def finish(self) -> bytes:
        """What is left, filled up with silence to a packet."""
        left = len(self._held) + self._LOOKAHEAD
        return self.feed(np.zeros(self._LOOKAHEAD + -left % self.packet_samples, np.float32))
