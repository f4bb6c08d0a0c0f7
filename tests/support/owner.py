"""Stands for the engine that a `Stream` belongs to."""

import threading

import numpy as np
from numpy.typing import NDArray

from moshi_stt.engine.stream import Stream, StreamLimits


class Owner:
    """Stands for the engine: counts wakes, takes the slot back."""

    def __init__(self) -> None:
        self.wakes = 0
        self.released: list[Stream] = []
        self.event = threading.Event()

    def wake(self, _stream: Stream) -> None:
        self.wakes += 1
        self.event.set()

    def stream(self, **limits: float) -> Stream:
        return Stream(StreamLimits(**limits), live=True, wake=self.wake, release=self.released.append)  # type: ignore[arg-type]


def ramp(start: int, stop: int) -> NDArray[np.float32]:
    return np.arange(start, stop, dtype=np.float32)
