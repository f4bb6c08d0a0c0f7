"""An engine whose model other processes share, and what each of them is given: values that can be pickled, and descriptors."""

import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

from moshi_stt.engine.backend import NewWords
from moshi_stt.engine.engine import EngineInfo
from moshi_stt.engine.mute import MuteSettings
from moshi_stt.engine.slots import Slot
from moshi_stt.engine.stream import StreamLimits
from moshi_stt.engine.timings import StepTimings


@dataclass(frozen=True)
class WorkerConfig:
    """What one process must know of the engine that it shares."""

    info: EngineInfo
    new_words: NewWords
    pause_heads: int
    slots: int
    """Of the backend."""
    scratch: range
    """Slots for copies of this process's streams."""
    timings: StepTimings
    delay_frames: int
    frame_samples: int
    marker_wait_seconds: float
    hang_seconds: float
    limits: StreamLimits
    mute: MuteSettings | None


class BackendLink(NamedTuple):
    """A process's ends of its link to the backend, closed by whoever has them. memory: a descriptor, for `RowBlock`."""

    memory: int
    signal: socket.socket

    def close(self) -> None:
        os.close(self.memory)
        self.signal.close()


@runtime_checkable
class ShareableEngine(Protocol):
    """What the server needs of an engine whose streams other processes may carry."""

    @property
    def ready(self) -> bool: ...

    @property
    def used_slots(self) -> int: ...

    @property
    def total_slots(self) -> int: ...

    @property
    def processes(self) -> int:
        """How many other processes may share the model. Known once started."""
        ...

    def share(self, number: int) -> WorkerConfig:
        """What process `number` (from 0) must know."""
        ...

    def connect(self, on_gone: Callable[[], None]) -> BackendLink:
        """A link to the model for another process.

        on_gone: called on the event loop when that process has gone and no row of it is under way any more: its slots can be
        taken back.
        """
        ...

    def lend(self) -> Slot:
        """A slot for a stream of another process. Raises NoFreeSlot, or EngineFailed after a failure, as `Engine.open` does."""
        ...

    def take_back(self, slot: Slot) -> None:
        """A lent slot that no row of the other process will name again."""
        ...
