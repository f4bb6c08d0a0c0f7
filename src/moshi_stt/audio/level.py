"""Why a recording gave no words, as far as its samples tell."""

import numpy as np
from numpy.typing import NDArray

from moshi_stt.constants import SAMPLE_RATE

FAINT_RMS = 1e-4
"""-80 dB of full scale: below the noise of any microphone that hears a voice."""

OFFSET = 0.02
SHORTEST_SECONDS = 0.2


class LevelMeter:
    """Listens to a decoded recording."""

    def __init__(self) -> None:
        self.samples = 0
        self._sum = 0.0
        self._squares = 0.0
        self._peak = 0.0

    def hear(self, pcm: NDArray[np.float32]) -> None:
        """pcm: finite float32 (S,) at 24 kHz."""
        if not len(pcm):
            return
        self.samples += len(pcm)
        self._sum += float(pcm.sum(dtype=np.float64))
        self._squares += float(np.dot(pcm, pcm))
        self._peak = max(self._peak, float(pcm.max()), -float(pcm.min()))

    def reason(self) -> str:
        """Why there can be no words, as a clause; empty where the level explains nothing."""
        if self.samples < SHORTEST_SECONDS * SAMPLE_RATE:
            return f"it is only {self.samples / SAMPLE_RATE:.2f} s long"
        if self._peak == 0:
            return "every sample is zero"
        mean = self._sum / self.samples
        moving = max(0.0, self._squares / self.samples - mean * mean) ** 0.5
        if moving < FAINT_RMS and abs(mean) > OFFSET:
            return f"it is a constant offset of {mean:.2f} of full scale and no sound"
        if moving < FAINT_RMS:
            return f"it is too faint: its loudest sample is {self._peak:.1e} of full scale"
        return ""
