"""Any chunking of a stream's samples in, model frames out, each with the time its last sample came."""

from collections import deque

import numpy as np
from numpy.typing import NDArray

from moshi_stt.constants import FRAME_SAMPLES


class Framer:
    """Holds the pieces a client sent until they make whole frames.

    Pieces are kept as they are, and a frame that lies within one is a view of it.
    """

    __slots__ = ("_frame_samples", "_offset", "_pieces", "samples")

    def __init__(self, frame_samples: int = FRAME_SAMPLES) -> None:
        self._frame_samples = frame_samples
        self._pieces: deque[tuple[NDArray[np.float32], float]] = deque()
        self._offset = 0
        """Samples of the first piece that are gone."""
        self.samples = 0
        """Samples held."""

    @property
    def frames(self) -> int:
        """Whole frames held."""
        return self.samples // self._frame_samples

    def push(self, samples: NDArray[np.float32], arrived: float) -> None:
        """Append float32 (S,), any length, 0 included; the array is kept, not copied. arrived: when they came."""
        if len(samples):
            self._pieces.append((samples, arrived))
            self.samples += len(samples)

    def pop(self) -> tuple[NDArray[np.float32], float]:
        """The next frame, float32 (frame_samples,), and when its last sample came. Nobody may write to the frame.

        Fewer samples than a frame are followed by zeros. Raises IndexError when nothing is held.
        """
        pieces, offset, size = self._pieces, self._offset, self._frame_samples
        samples, arrived = pieces[0]
        end = offset + size
        if end <= len(samples):
            self._offset = end
            self.samples -= size
            if end == len(samples):
                pieces.popleft()
                self._offset = 0
            return samples[offset:end], arrived
        frame = np.zeros(size, np.float32)
        filled = 0
        while filled < size and pieces:
            samples, arrived = pieces[0]
            part = samples[offset : offset + size - filled]
            frame[filled : filled + len(part)] = part
            filled += len(part)
            offset += len(part)
            if offset == len(samples):
                pieces.popleft()
                offset = 0
        self._offset = offset
        self.samples -= filled
        return frame, arrived

    def peek(self) -> tuple[NDArray[np.float32], float]:
        """What `pop` returns of less than a frame; the samples stay here, too. Raises IndexError when nothing is held."""
        filled, offset, arrived = 0, self._offset, self._pieces[-1][1]
        frame = np.zeros(self._frame_samples, np.float32)
        for samples, _ in self._pieces:
            part = samples[offset : offset + self._frame_samples - filled]
            frame[filled : filled + len(part)] = part
            filled += len(part)
            offset = 0
        return frame, arrived
