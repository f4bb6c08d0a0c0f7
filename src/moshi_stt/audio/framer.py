"""Any chunking of a stream's samples in, model frames out, each with the time its last sample came."""

from collections import deque

import numpy as np
from numpy.typing import NDArray

from moshi_stt.constants import FRAME_SAMPLES


class Framer:
    """Holds the pieces a client sent until they make whole frames.

    A sample is copied once on its way, from the piece it came in to the row of the batch: pieces are kept as they are.
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

    def pop(self, row: NDArray[np.float32]) -> float:
        """Move the next frame into row, float32 (frame_samples,); return when its last sample came.

        Fewer samples than a frame are followed by zeros. Raises IndexError when nothing is held.
        """
        pieces, offset, size = self._pieces, self._offset, self._frame_samples
        samples, arrived = pieces[0]
        end = offset + size
        if end < len(samples):  # the common case of a large message: the piece outlives the frame
            row[:] = samples[offset:end]
            self._offset = end
            self.samples -= size
            return arrived
        filled = 0
        while filled < size and pieces:
            samples, arrived = pieces[0]
            part = samples[offset : offset + size - filled]
            row[filled : filled + len(part)] = part
            filled += len(part)
            offset += len(part)
            if offset == len(samples):
                pieces.popleft()
                offset = 0
        row[filled:] = 0.0
        self._offset = offset
        self.samples -= filled
        return arrived

    def peek(self, row: NDArray[np.float32]) -> float:
        """Copy less than a frame into row, zeros after it, and keep it here too. Returns when its last sample came.

        Raises IndexError when nothing is held.
        """
        filled, offset, arrived = 0, self._offset, self._pieces[-1][1]
        for samples, _ in self._pieces:
            part = samples[offset : offset + self._frame_samples - filled]
            row[filled : filled + len(part)] = part
            filled += len(part)
            offset = 0
        row[filled:] = 0.0
        return arrived
