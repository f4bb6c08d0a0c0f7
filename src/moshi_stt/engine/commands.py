"""What a session asks of its stream: the only command type, from the protocol to the engine."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Audio(NamedTuple):
    """Audio of the stream.

    samples: float32 (S,), 24 kHz mono, finite, S ≥ 0; the engine keeps the array, so nobody may write to it any more.
    arrived: time.monotonic() when the samples came; None stands for now.
    """

    samples: NDArray[np.float32]
    arrived: float | None = None


class Mark(NamedTuple):
    """Answered by exactly one `Marker(id)` when everything before it has been transcribed."""

    id: int


class Reset(NamedTuple):
    """Start the model's state again after what came before; answered by exactly one `Ready`."""


class Finish(NamedTuple):
    """No more audio: transcribe what is pending, then end the stream."""


Command = Audio | Mark | Reset | Finish
