"""What a process is given for streams over another's backend. Plain values that can be pickled, but for the descriptors."""

import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from moshi_stt.engine.costs import StepCosts
from moshi_stt.engine.engine import EngineInfo
from moshi_stt.engine.stream import StreamLimits


@dataclass(frozen=True)
class Share:
    """The part of a `BatchEngine` that one process has."""

    info: EngineInfo
    decode: Callable[[Sequence[int]], str]
    """Ids of one word to its text."""
    heads: int
    slots: int
    """Of the backend."""
    spares: range
    """Slots for copies."""
    costs: StepCosts
    delay_frames: int
    marker_wait_seconds: float
    hang_seconds: float
    limits: StreamLimits


class Line(NamedTuple):
    """The other process's ends of its line to the backend, closed by whoever has them. memory: a descriptor, for `RowBlock`."""

    memory: int
    signal: socket.socket

    def close(self) -> None:
        os.close(self.memory)
        self.signal.close()
