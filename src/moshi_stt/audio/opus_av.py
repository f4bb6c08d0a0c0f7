"""Opus packets to and from 24 kHz PCM through PyAV, for machines that have no wheel of sphn.

It has the two classes of sphn that are used. PyAV decodes to 48 kHz; every second sample is kept after a linear-phase low-pass,
whose delay `OpusStreamReader` names.
"""

import struct
from collections.abc import Iterator
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

from moshi_stt.audio.ogg import OggReader, encode_page

DECODED_RATE = 48_000
HALF_TAPS = 32
"""Taps of the low-pass on either side of its centre: flat to 9.5 kHz, 80 dB down from 14 kHz on."""

SERIAL = 42
PRE_SKIP = 1_920
"""At 24 kHz, what sphn writes: more than libopus' own delay, so that a decoder settles in it."""

_DECODERS = ("libopus", "opus")
_FRAME_MS = "40"


def low_pass() -> NDArray[np.float32]:
    """(2 * HALF_TAPS + 1,): a windowed sinc with its edge at a quarter of the rate, sum 1."""
    taps = np.arange(-HALF_TAPS, HALF_TAPS + 1)
    kernel = np.sinc(taps / 2) * np.kaiser(len(taps), 8.0)
    taps_of_sum_1: NDArray[np.float32] = (kernel / kernel.sum()).astype(np.float32)
    return taps_of_sum_1


class OpusStreamReader:
    """Decodes Ogg pages of one stream. Not thread-safe."""

    delay = HALF_TAPS // 2
    """Samples at 24 kHz by which the output lags; `flush` gives the last ones."""

    def __init__(self, sample_rate: int) -> None:
        assert sample_rate * 2 == DECODED_RATE
        self._ogg = OggReader()
        self._codec: Any = None
        self._kernel = low_pass()
        self._held = np.zeros(2 * HALF_TAPS, np.float32)

    def append_bytes(self, data: bytes) -> NDArray[np.float32]:
        """float32 (S,): what the packets in these pages hold, `delay` samples late. Raises ValueError for a damaged packet."""
        pieces = [piece for packet in self._ogg.packets(data) for piece in self._packet(packet.data)]
        return np.concatenate(pieces) if pieces else np.zeros(0, np.float32)

    def flush(self) -> NDArray[np.float32]:
        """The last `delay` samples."""
        return self._halve(np.zeros(2 * self.delay, np.float32))

    def _packet(self, packet: bytes) -> Iterator[NDArray[np.float32]]:
        if packet.startswith(b"OpusHead"):
            self._codec = _decoder(packet)
        elif not packet.startswith(b"OpusTags"):
            try:
                frames = self._codec.decode(av.Packet(packet))
            except av.error.FFmpegError as error:
                raise ValueError(str(error)) from None
            for frame in frames:
                yield self._halve(_mono(frame))

    def _halve(self, pcm: NDArray[np.float32]) -> NDArray[np.float32]:
        """pcm: (2 * S,) at 48 kHz. Returns (S,) at 24 kHz."""
        pcm = np.concatenate([self._held, pcm])
        self._held = pcm[len(pcm) - 2 * HALF_TAPS :]
        return np.convolve(pcm, self._kernel, "valid")[::2]


def _decoder(head: bytes) -> Any:
    for name in _DECODERS:
        try:
            codec: Any = av.CodecContext.create(name, "r")
        except av.error.FFmpegError:
            continue
        codec.extradata = head
        codec.sample_rate = DECODED_RATE
        codec.layout = "stereo" if head[9] == 2 else "mono"
        return codec
    raise ValueError("this build of PyAV has no Opus decoder")


def _mono(frame: Any) -> NDArray[np.float32]:
    channels = len(frame.layout.channels)
    samples = frame.to_ndarray()
    samples = samples.reshape(channels, -1) if frame.format.is_planar else samples.reshape(-1, channels).T
    if samples.dtype == np.int16:
        samples = samples.astype(np.float32) / 32_768
    mixed: NDArray[np.float32] = samples.mean(0, dtype=np.float32)
    return mixed


class OpusStreamWriter:
    """Encodes 24 kHz mono PCM to Ogg pages, a packet of 40 ms each. Not thread-safe."""

    def __init__(self, sample_rate: int) -> None:
        codec: Any = av.CodecContext.create("libopus", "w")
        codec.sample_rate, codec.format, codec.layout = sample_rate, "flt", "mono"
        codec.options = {"application": "voip", "frame_duration": _FRAME_MS}
        self._codec = codec
        self._rate = sample_rate
        self._sequence = 0
        self._granule = 0

    def append_pcm(self, pcm: NDArray[np.float32]) -> bytes:
        """pcm: float32 (960,). Returns the packet's page; the first time with the headers before it."""
        pages = [] if self._sequence else self._headers()
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(pcm, np.float32)[None], format="flt", layout="mono")
        frame.sample_rate = self._rate
        frame.pts = None
        self._granule += len(pcm) * (DECODED_RATE // self._rate)
        pages += [self._page(bytes(packet), self._granule) for packet in self._codec.encode(frame)]
        return b"".join(pages)

    def _headers(self) -> list[bytes]:
        head = b"OpusHead" + struct.pack("<BBHIhB", 1, 1, PRE_SKIP * 2, DECODED_RATE, 0, 0)
        vendor = b"moshi-stt"
        tags = b"OpusTags" + struct.pack("<I", len(vendor)) + vendor + struct.pack("<I", 0)
        return [self._page(head, 0, first=True), self._page(tags, 0)]

    def _page(self, packet: bytes, granule: int, *, first: bool = False) -> bytes:
        page = encode_page(packet, SERIAL, self._sequence, granule, first=first)
        self._sequence += 1
        return page
