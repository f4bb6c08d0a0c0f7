"""Streams over a model in another process: `RemoteEngine`.

The process that has the model lends the slots: `grant` says which may be used next, and `on_freed` tells of each that no row
will name again. All else is `BatchEngine`'s: words, markers, bounds and events are made here, and only rows go over.
"""

import os
from collections.abc import Callable
from functools import partial

from moshi_stt.engine.batch import BatchEngine
from moshi_stt.engine.engine import EngineObserver
from moshi_stt.engine.loaded import LoadedModel
from moshi_stt.engine.shared_backend import RemoteBackend, RowBlock
from moshi_stt.engine.sharing import BackendLink, WorkerConfig
from moshi_stt.engine.slots import Slot
from moshi_stt.errors import NoFreeSlot


class GrantedSlots:
    """A `SlotSource` of slots of another process's pool, each granted for one loan."""

    def __init__(self) -> None:
        self._granted: list[int] = []
        self._lent: dict[int, Slot] = {}
        self._loans = 0

    @property
    def used(self) -> int:
        return len(self._lent)

    def grant(self, index: int) -> None:
        self._granted.append(index)

    def withdraw(self) -> int | None:
        """Take back a grant that was not used; None when there is none."""
        return self._granted.pop() if self._granted else None

    def acquire(self) -> Slot:
        """The slot that was granted last. Raises NoFreeSlot."""
        if not self._granted:
            raise NoFreeSlot
        self._loans += 1
        slot = Slot(self._granted.pop(), self._loans)
        self._lent[slot.index] = slot
        return slot

    def release(self, slot: Slot) -> bool:
        """End a loan. False, and nothing done, when it is over already."""
        if self._lent.get(slot.index) != slot:
            return False
        del self._lent[slot.index]
        return True


class RemoteEngine(BatchEngine):
    """See `engine.Engine`. `open` takes the slot that was granted last."""

    def __init__(
        self,
        config: WorkerConfig,
        link: BackendLink,
        *,
        on_freed: Callable[[int], None],
        observer: EngineObserver | None = None,
    ) -> None:
        """link: taken over. on_freed: told on the event loop of a slot that is not used any more."""
        self._granted = GrantedSlots()
        super().__init__(
            partial(_connect, config, link),
            limits=config.limits,
            observer=observer,
            name=config.info.model,
            marker_wait_seconds=config.marker_wait_seconds,
            hang_seconds=config.hang_seconds,
            mute=config.mute,
            slots=self._granted,
            on_left=lambda slot: on_freed(slot.index),
            counts_steps=False,  # the process that has the model counts them
        )

    def grant(self, index: int) -> None:
        """Let the next `open` use this slot."""
        self._granted.grant(index)

    def withdraw(self) -> int | None:
        """A granted slot that no `open` has taken, which is not granted any more."""
        return self._granted.withdraw()


def _connect(config: WorkerConfig, link: BackendLink) -> LoadedModel:
    """The model of the other process, as if it had been loaded here."""
    streams = config.info.total_slots
    block = RowBlock(link.memory, streams, config.pause_heads, config.frame_samples)
    os.close(link.memory)
    return LoadedModel(
        RemoteBackend(block, link.signal, config.slots, config.pause_heads),
        config.new_words,
        config.info,
        streams,
        config.delay_frames,
        config.frame_samples,
        scratch=config.scratch,
        timings=config.timings,
    )
