"""A model that stops transcribing, and audio of which it is known what it must say."""

import numpy as np
from numpy.typing import NDArray
from tests.support.scripted_backend import Scripted

from moshi_stt.constants import FRAME_SAMPLES
from moshi_stt.engine.backend import StepOutput

DELAY = 6


class Mute(Scripted):
    """Says a word every eight frames; from a stream's `mute_from`-th frame on nothing, until its state is fresh again."""

    def __init__(self, slots: int, mute_from: int) -> None:
        super().__init__(slots, [])
        self.mute_from = mute_from
        self.clock = np.zeros(slots, np.int64)
        """The number of the frame that each slot heard last: written into its first sample."""
        self.cured = np.zeros(slots, np.bool_)
        """Whether a slot's state was made fresh after it had fallen silent."""

    def step(self, pcm: NDArray[np.float32], slots: NDArray[np.int64], fresh: NDArray[np.bool_]) -> StepOutput:
        self.cured[slots[fresh]] = self.clock[slots[fresh]] > self.mute_from + 10
        is_flush = (pcm[:, 0] == 0) & (pcm[:, 1] == 0)  # silence of the engine's own
        self.clock[slots] = np.where(is_flush, self.clock[slots] + 1, np.rint(pcm[:, 0]))
        output = super().step(pcm, slots, fresh)
        return output._replace(pause=np.where(pcm[:, 1:2] > 0, 0.1, 0.9) * np.ones((1, self.pause_heads), np.float32))

    def tokens(self, slots: NDArray[np.int64]) -> list[int]:
        frames = (self.clock[slots] - DELAY).tolist()
        return [self._token(frame, bool(cured)) for frame, cured in zip(frames, self.cured[slots], strict=True)]

    def _token(self, frame: int, cured: bool) -> int:
        if frame < 0 or (frame >= self.mute_from and not cured):
            return 3
        return {0: 0, 1: 10 + frame // 8}.get(frame % 8, 3)


def counted(first: int, last: int, *, speech: bool = True) -> NDArray[np.float32]:
    """Frames that carry their number."""
    frames = np.zeros((last - first, FRAME_SAMPLES), np.float32)
    frames[:, 0] = np.arange(first, last)
    frames[:, 1] = speech
    return frames.reshape(-1)
