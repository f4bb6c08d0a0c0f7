"""Live audio in whatever form a client sends it, in any pieces, to 24 kHz mono float32 per channel.

`PcmInput` takes raw samples of one format, `ContainerInput` bytes whose format their header tells (WAV and Ogg Opus).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from moshi_stt.audio import g711
from moshi_stt.audio.opus import OpusStream
from moshi_stt.audio.resample import StreamingResampler
from moshi_stt.errors import AudioError

LOWEST_LIVE_RATE: Final = 8_000
HIGHEST_LIVE_RATE: Final = 48_000
MOST_CHANNELS: Final = 16
HEADER_BYTES: Final = 4_096
"""A container must be known by its first bytes: no more are held."""
UNKNOWN_LENGTH: Final = 0x7FFF_F000
"""A WAV header that announces more than this was written before the length was known."""

Encoding = Literal["linear16", "linear24", "linear32i", "linear32", "linear8", "mulaw", "alaw"]
Pieces = list[NDArray[np.float32]]
"""One array for each channel, float32 (S,) at 24 kHz."""

_WIDTH: Final[dict[str, int]] = {
    "linear8": 1, "linear16": 2, "linear24": 3, "linear32i": 4, "linear32": 4, "mulaw": 1, "alaw": 1,
}  # fmt: skip


@dataclass(frozen=True)
class PcmFormat:
    """Raw samples. linear32 is float32 as Deepgram means it; all are little-endian, linear8 is unsigned.

    Raises AudioError for a rate outside 8,000 to 48,000 Hz and for more than 16 channels.
    """

    encoding: Encoding = "linear16"
    rate: int = 24_000
    channels: int = 1

    def __post_init__(self) -> None:
        if not LOWEST_LIVE_RATE <= self.rate <= HIGHEST_LIVE_RATE:
            raise AudioError(f"sample rate {self.rate} Hz: expected {LOWEST_LIVE_RATE} to {HIGHEST_LIVE_RATE} Hz")
        if not 1 <= self.channels <= MOST_CHANNELS:
            raise AudioError(f"{self.channels} channels: expected 1 to {MOST_CHANNELS}")

    @property
    def frame_bytes(self) -> int:
        """Bytes of one sample of every channel."""
        return _WIDTH[self.encoding] * self.channels

    @property
    def bytes_per_second(self) -> int:
        return self.frame_bytes * self.rate


class LiveInput(Protocol):
    """Bytes of one stream, in order."""

    def feed(self, data: bytes) -> Iterator[Pieces]:
        """The next bytes, cut anywhere. Raises AudioError, after what was good."""
        ...

    def flush(self) -> Pieces:
        """What the conversion still holds back. More may follow: it is joined to this without a gap."""
        ...


class PcmInput:
    """Raw samples of one format. mix: average the channels to one; else one array for each."""

    def __init__(self, format: PcmFormat, *, mix: bool = True) -> None:
        self.format = format
        self._outputs = 1 if mix else format.channels
        self._rest = b""
        self._resamplers: list[StreamingResampler] = []

    def feed(self, data: bytes) -> Iterator[Pieces]:
        if self._rest:
            data = self._rest + data
        whole = len(data) - len(data) % self.format.frame_bytes
        data, self._rest = data[:whole], data[whole:]
        if not data:
            return
        samples = _decode(data, self.format.encoding).reshape(-1, self.format.channels)  # (S, C)
        np.copyto(samples, 0, where=~(np.abs(samples) <= 1e9))  # no numbers: they would stay in the resampler
        channels = [samples.mean(axis=1, dtype=np.float32)] if self._outputs == 1 else [*samples.T]
        if not self._resamplers:
            self._resamplers = [StreamingResampler(self.format.rate) for _ in range(self._outputs)]
        pieces = [
            resampler.feed(np.ascontiguousarray(channel)) for resampler, channel in zip(self._resamplers, channels, strict=True)
        ]
        if len(pieces[0]):
            yield pieces

    def flush(self) -> Pieces:
        resamplers, self._resamplers = self._resamplers, []
        if not resamplers:
            return [np.zeros(0, np.float32)] * self._outputs
        return [resampler.finish() for resampler in resamplers]


def _decode(data: bytes, encoding: str) -> NDArray[np.float32]:
    """Samples in [-1, 1], float32 (S,), writable."""
    if encoding == "linear16":
        return np.frombuffer(data, "<i2").astype(np.float32) * np.float32(2**-15)
    if encoding == "linear32":
        return np.frombuffer(data, "<f4").astype(np.float32)
    if encoding in ("mulaw", "alaw"):
        return g711.decode(data, g711.MULAW if encoding == "mulaw" else g711.ALAW)
    if encoding == "linear8":
        return (np.frombuffer(data, np.uint8).astype(np.float32) - 128) * np.float32(2**-7)
    if encoding == "linear32i":
        return np.frombuffer(data, "<i4").astype(np.float32) * np.float32(2**-31)
    wide = np.zeros((len(data) // 3, 4), np.uint8)
    wide[:, 1:] = np.frombuffer(data, np.uint8).reshape(-1, 3)
    return wide.reshape(-1).view("<i4").astype(np.float32) * np.float32(2**-31)


class ContainerInput:
    """A stream that begins with a header: WAV of any PCM kind (whatever length it announces), or Ogg Opus.

    mix: average the channels to one; else one array for each of `channels` (a WAV file must have as many).
    """

    def __init__(self, *, mix: bool = True, channels: int = 1) -> None:
        self._mix = mix
        self._channels = channels
        self._head = b""
        self._input: LiveInput | None = None

    def feed(self, data: bytes) -> Iterator[Pieces]:
        if self._input is None:
            self._head += data
            if len(self._head) < 4:
                return
            self._input, data, self._head = self._known(self._head), self._head, b""
        yield from self._input.feed(data)

    def flush(self) -> Pieces:
        if self._input is None:
            return [np.zeros(0, np.float32)] * (1 if self._mix else self._channels)
        return self._input.flush()

    def _known(self, head: bytes) -> LiveInput:
        if head[:4] == b"RIFF":
            return WavInput(mix=self._mix, channels=self._channels)
        if head[:4] == b"OggS":
            if not self._mix and self._channels > 1:
                raise AudioError("Ogg Opus is mixed to one channel here: send WAV or raw samples for several channels")
            return OpusInput()
        raise AudioError(f"the audio begins with {head[:8].hex(' ')}: expected WAV (RIFF) or Ogg Opus (OggS)")


class OpusInput:
    """An Ogg Opus stream."""

    def __init__(self) -> None:
        self._opus = OpusStream()

    def feed(self, data: bytes) -> Iterator[Pieces]:
        for piece in self._opus.pieces(data):
            yield [piece]

    def flush(self) -> Pieces:
        return [np.zeros(0, np.float32)]


class WavInput:
    """A WAV stream: the header cut anywhere, its sizes right, 0 or absurd. Raises AudioError for what is no PCM."""

    def __init__(self, *, mix: bool = True, channels: int = 1) -> None:
        self._mix = mix
        self._channels = channels
        self._held = b""
        self._skip = 0
        """Bytes of a chunk that does not matter, still to come."""
        self._left: int | None = None
        """Bytes of samples still to come; None where nobody knows."""
        self._format: PcmFormat | None = None
        self._pcm: PcmInput | None = None
        self._in_data = False

    def feed(self, data: bytes) -> Iterator[Pieces]:
        data = self._held + data
        self._held = b""
        while data:
            if self._skip:
                skipped = min(self._skip, len(data))
                self._skip -= skipped
                data = data[skipped:]
            elif self._in_data:
                size = len(data) if self._left is None else min(self._left, len(data))
                assert self._pcm is not None
                yield from self._pcm.feed(data[:size])
                data = data[size:]
                if self._left is not None:
                    self._left -= size
                    self._in_data = self._left > 0
            else:
                rest = self._header(data)
                if rest is None:
                    self._held = data
                    return
                data = rest

    def flush(self) -> Pieces:
        if self._pcm is None:
            return [np.zeros(0, np.float32)] * (1 if self._mix else self._channels)
        return self._pcm.flush()

    def _header(self, data: bytes) -> bytes | None:
        """Read the next chunk's header; what follows it, or None where it is not whole yet."""
        if self._pcm is None and data[:4] == b"RIFF":
            if len(data) < 12:
                return None
            if data[8:12] != b"WAVE":
                raise AudioError(f"a RIFF file of kind {data[8:12]!r}: expected WAVE")
            return data[12:]
        if len(data) < 8:
            return None
        name, size = data[:4], int.from_bytes(data[4:8], "little")
        if name == b"fmt ":
            if size > HEADER_BYTES:
                raise AudioError(f"the WAV header announces a format chunk of {size} bytes: it is damaged")
            if len(data) < 8 + size:
                return None
            self._format = _wav_format(data[8 : 8 + size])
            return data[8 + size + size % 2 :]
        if name == b"data":
            self._begin(size)
            return data[8:]
        if self._pcm is not None and not name.decode("latin-1").isprintable():
            self._in_data, self._left = True, None  # the header announced less than there is
            return data
        self._skip = size + size % 2
        return data[8:]

    def _begin(self, size: int) -> None:
        if self._format is None:
            raise AudioError("the WAV file has samples before its format: it is damaged")
        if not self._mix and self._format.channels != self._channels:
            raise AudioError(f"the WAV file has {self._format.channels} channels: expected {self._channels}")
        if self._pcm is None:
            self._pcm = PcmInput(self._format, mix=self._mix)
        self._in_data = True
        self._left = None if size == 0 or size >= UNKNOWN_LENGTH else size


_WAV_PCM: Final[dict[tuple[int, int], Encoding]] = {
    (1, 8): "linear8", (1, 16): "linear16", (1, 24): "linear24", (1, 32): "linear32i", (3, 32): "linear32",
    (6, 8): "alaw", (7, 8): "mulaw",
}  # fmt: skip
_EXTENSIBLE: Final = 0xFFFE


def _wav_format(chunk: bytes) -> PcmFormat:
    if len(chunk) < 16:
        raise AudioError(f"the WAV header's format chunk has {len(chunk)} bytes: expected 16 or more")
    tag, channels = int.from_bytes(chunk[0:2], "little"), int.from_bytes(chunk[2:4], "little")
    rate, bits = int.from_bytes(chunk[4:8], "little"), int.from_bytes(chunk[14:16], "little")
    if tag == _EXTENSIBLE and len(chunk) >= 26:
        tag = int.from_bytes(chunk[24:26], "little")
    encoding = _WAV_PCM.get((tag, bits))
    if encoding is None:
        raise AudioError(f"a WAV file of format {tag} with {bits} bits: expected PCM, float, A-law or μ-law")
    return PcmFormat(encoding, rate, channels)
