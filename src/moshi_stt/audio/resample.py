"""Change of sample rate for audio that arrives in pieces. Knows nothing of where it comes from.

The resampler is soxr's at high quality: linear phase, flat to 0.91 of the lower Nyquist rate, its delay taken out, so that
sample 0 stays at time 0. It holds back 12 to 70 ms, by rate, until `finish`.
"""

import numpy as np
import soxr
from numpy.typing import NDArray

from moshi_stt.constants import SAMPLE_RATE
from moshi_stt.errors import AudioError

LOWEST_RATE, HIGHEST_RATE = 1_000, 768_000
_EMPTY: NDArray[np.float32] = np.zeros(0, np.float32)


class StreamingResampler:
    """One live stream at `rate_in` in, at `rate_out` out. Any pieces give the samples that the whole at once gives."""

    def __init__(self, rate_in: int, rate_out: int = SAMPLE_RATE) -> None:
        """Rates in samples a second. Raises AudioError for a rate that is none."""
        for rate in (rate_in, rate_out):
            if not LOWEST_RATE <= rate <= HIGHEST_RATE:
                raise AudioError(f"sample rate {rate} Hz: expected {LOWEST_RATE} to {HIGHEST_RATE} Hz")
        self.rate_in, self.rate_out = rate_in, rate_out
        self._stream = None if rate_in == rate_out else soxr.ResampleStream(rate_in, rate_out, 1, dtype="float32", quality="HQ")
        self._finished = False

    def feed(self, pcm: NDArray[np.float32]) -> NDArray[np.float32]:
        """pcm: float32 (S,) at rate_in. Returns what is ready of it: float32 (S,) at rate_out."""
        self._check(pcm)
        if self._stream is None or not len(pcm):
            return pcm if self._stream is None else _EMPTY
        ready: NDArray[np.float32] = self._stream.resample_chunk(pcm)
        return ready

    def finish(self) -> NDArray[np.float32]:
        """No more audio: what was held back, float32 (S,) at rate_out."""
        self._check(_EMPTY)
        self._finished = True
        if self._stream is None:
            return _EMPTY
        rest: NDArray[np.float32] = self._stream.resample_chunk(_EMPTY, last=True)
        return rest

    def _check(self, pcm: NDArray[np.float32]) -> None:
        if self._finished:
            raise ValueError("this resampler is finished: make a new one for a new stream")
        if pcm.dtype != np.float32 or pcm.ndim != 1:
            raise ValueError(f"feed takes float32 of one dimension, got {pcm.dtype} of shape {pcm.shape}")


def to_mono_float(samples: NDArray[np.generic]) -> NDArray[np.float32]:
    """Any PCM array to float32 (S,) in [-1, 1]: integers by their full scale, channels of (S, C) by their average."""
    if samples.ndim == 2:
        if samples.shape[1] == 1:
            return to_float(samples[:, 0])
        with np.errstate(over="ignore", invalid="ignore"):
            mono: NDArray[np.float32] = to_float(samples).mean(axis=1, dtype=np.float32)
        return mono
    if samples.ndim != 1:
        raise AudioError(f"PCM of shape {samples.shape}: expected (samples,) or (samples, channels)")
    return to_float(samples)


@np.errstate(over="ignore", invalid="ignore")  # what is no sample stays none: its reader decides
def to_float(samples: NDArray[np.generic]) -> NDArray[np.float32]:
    """PCM of any shape to float32 of the same shape in [-1, 1], integers by their full scale."""
    dtype = samples.dtype
    if dtype.kind == "f":
        return np.ascontiguousarray(samples, dtype=np.float32)
    if dtype.kind == "i":
        return np.ascontiguousarray(samples, dtype=np.float32) * np.float32(2.0 ** (1 - 8 * dtype.itemsize))
    if dtype == np.uint8:
        return (np.ascontiguousarray(samples, dtype=np.float32) - np.float32(128)) * np.float32(1 / 128)
    raise AudioError(f"PCM of type {dtype}: expected floats, signed integers or uint8")
