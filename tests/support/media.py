"""Sound files made on the fly, and sounds to put in them. Knows nothing of the package."""

import io
from fractions import Fraction
from pathlib import Path
from tempfile import TemporaryDirectory

import av
import numpy as np
import soxr
from numpy.typing import NDArray

FORMATS = {
    "wav": ("wav", "pcm_s16le", "s16"),
    "wav-float": ("wav", "pcm_f32le", "flt"),
    "wav-double": ("wav", "pcm_f64le", "dbl"),
    "wav-24bit": ("wav", "pcm_s24le", "s32"),
    "wav-8bit": ("wav", "pcm_u8", "u8"),
    "wav-ulaw": ("wav", "pcm_mulaw", "s16"),
    "aiff": ("aiff", "pcm_s16be", "s16"),
    "flac": ("flac", "flac", "s16"),
    "mp3": ("mp3", "libmp3lame", "fltp"),
    "vorbis": ("ogg", "vorbis", "fltp"),
    "opus": ("ogg", "libopus", "flt"),
    "m4a": ("ipod", "aac", "fltp"),
    "webm": ("webm", "libopus", "flt"),
    "mkv-flac": ("matroska", "flac", "s16"),
}
"""Name -> container, codec, sample format."""


def noise(seconds: float, rate: int = 24_000, *, seed: int = 0) -> NDArray[np.float32]:
    """Speech-band noise in bursts: every stretch is unlike every other, so that a shift shows. float32 (S,)."""
    samples = round(seconds * rate)
    white = np.random.default_rng(seed).standard_normal(round(seconds * 6_000) + 64).astype(np.float32)
    band = soxr.resample(white, 6_000, rate)[:samples].astype(np.float32)
    envelope = 0.5 + 0.5 * np.sin(2 * np.pi * 2.1 * np.arange(samples) / rate)
    return (0.12 * band * envelope).astype(np.float32)


def encode(
    pcm: NDArray[np.float32], rate: int, format: str = "wav", *, options: dict[str, str] | None = None, **codec: str
) -> bytes:
    """pcm: float32 (S,) or (S, C). options: the muxer's; keywords: the codec's."""
    container_name, codec_name, sample_format = FORMATS[format]
    options, codec = dict(options or {}), dict(codec)
    if codec_name == "vorbis":
        codec["strict"] = "experimental"
    with TemporaryDirectory() as folder:
        path = Path(folder) / "sound"
        _write(path, np.asarray(pcm), rate, container_name, codec_name, sample_format, options, codec)
        return path.read_bytes()


def _write(
    path: Path,
    pcm: NDArray[np.float32],
    rate: int,
    container_name: str,
    codec_name: str,
    sample_format: str,
    options: dict[str, str],
    codec: dict[str, str],
) -> None:
    channels = 1 if pcm.ndim == 1 else pcm.shape[1]
    layout = {1: "mono", 2: "stereo", 4: "quad", 6: "5.1", 8: "7.1", 16: "hexadecagonal"}[channels]
    with av.open(str(path), "w", format=container_name, options=options) as container:
        stream = container.add_stream(codec_name, rate=rate, layout=layout, options=codec)
        stream.codec_context.format = sample_format
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(pcm.reshape(1, -1)), format="flt", layout=layout)
        frame.sample_rate = rate
        frame.pts, frame.time_base = 0, Fraction(1, rate)
        resampler = av.AudioResampler(sample_format, layout, rate)
        for converted in [*resampler.resample(frame), *resampler.resample(None)]:
            container.mux(stream.encode(converted))
        container.mux(stream.encode(None))


def shift_of(got: NDArray[np.float32], expected: NDArray[np.float32]) -> int:
    """By how many samples `got` lags behind `expected`: the peak of their correlation."""
    size = 1 << (len(got) + len(expected) - 1).bit_length()
    correlation = np.fft.irfft(np.fft.rfft(got, size) * np.conj(np.fft.rfft(expected, size)), size)
    peak = int(np.argmax(correlation))
    return peak if peak < size // 2 else peak - size


class Pipe(io.RawIOBase):
    """Bytes that can be read once, in pieces, from the front."""

    def __init__(self, data: bytes, piece: int = 4_096) -> None:
        self._data = io.BytesIO(data)
        self._piece = piece

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return False

    def read(self, size: int = -1) -> bytes:
        return self._data.read(self._piece if size < 0 else min(size, self._piece))
