"""Several channels to one, such that no voice is lost: neither by cancelling another channel nor among silent ones.

The mean of the channels would do for most recordings. It loses what two channels have with opposite signs (a cable wired the
wrong way round, a "karaoke" mix), and makes one voice among many silent channels faint.
"""

import numpy as np
from numpy.typing import NDArray

SILENT_RATIO = 1e-4
"""A channel whose loudest moment is 40 dB below that of the loudest channel is silent: it does not count."""

OPPOSITE = -0.7
"""Channels of a correlation below this have opposite signs."""

MEMORY_SECONDS = 10.0
FADE_SECONDS = 0.02
"""Weights change over so long, so that a change is no click."""


class Mixer:
    """One recording. Weights follow what the recording held so far, the samples to be mixed included."""

    def __init__(self, channels: int, rate: int) -> None:
        """rate: samples a second of what is mixed."""
        self._rate = rate
        self._loudest = np.zeros(channels)
        self._products = np.zeros((channels, channels))
        self._weights = np.full(channels, 1 / channels, np.float32)

    def mix(self, samples: NDArray[np.float32]) -> NDArray[np.float32]:
        """samples: finite float32 (S, C). Returns float32 (S,)."""
        if not len(samples):
            return np.zeros(0, np.float32)
        before, self._weights = self._weights, self._next_weights(samples)
        mono: NDArray[np.float32] = samples @ self._weights
        if not np.array_equal(before, self._weights):
            length = min(len(samples), max(1, round(FADE_SECONDS * self._rate)))
            fade = np.linspace(0, 1, length, dtype=np.float32)
            mono[:length] = fade * mono[:length] + (1 - fade) * (samples[:length] @ before)
        return mono

    def _next_weights(self, samples: NDArray[np.float32]) -> NDArray[np.float32]:
        moving = samples - samples.mean(axis=0)
        products = (moving.T @ moving).astype(np.float64)  # (C, C)
        self._products = products + self._products * np.exp(-len(samples) / (MEMORY_SECONDS * self._rate))
        self._loudest = np.maximum(self._loudest, np.diag(products) / len(samples))
        active = self._loudest > SILENT_RATIO * self._loudest.max()
        if not active.any():
            return self._weights
        energy = np.sqrt(np.maximum(np.diag(self._products), 1e-30))
        reference = int(np.argmax(np.where(active, self._loudest, 0)))
        similarity = self._products[reference] / (energy[reference] * energy)
        signs = np.where(similarity < OPPOSITE, -1.0, 1.0)
        weights: NDArray[np.float32] = (np.where(active, signs, 0.0) / active.sum()).astype(np.float32)
        return -weights if weights @ self._weights < 0 else weights  # another reference must not turn the whole
