"""Streams over a backend in another process: `RemoteEngine`. Knows no sockets but its line to that process.

The process that has the model lends the slots: `grant` says which may be used next, and `on_freed` tells of each that no row
will name again. All else is `BatchEngine`'s: words, markers, bounds and events are made here, and only rows go over.
"""

import os
from collections import deque
from collections.abc import Callable

from moshi_stt.engine.batch import BatchEngine, LoadedModel
from moshi_stt.engine.engine import EngineObserver
from moshi_stt.engine.rows import RowBlock, RowClient
from moshi_stt.engine.share import Line, Share
from moshi_stt.engine.slots import Slot, SlotPool
from moshi_stt.engine.stream import Stream


class GrantedSlots(SlotPool):
    """Slots of another pool, each granted for one loan."""

    def __init__(self, count: int) -> None:
        super().__init__(count)
        self._free.clear()

    @property
    def used(self) -> int:
        return sum(self._lent)

    def grant(self, index: int) -> None:
        self._free.append(index)

    def withdraw(self) -> int | None:
        """Take back a grant that was not used; None when there is none."""
        return self._free.pop() if self._free else None

    def release(self, slot: Slot) -> bool:
        released = super().release(slot)
        if released:
            self._free.pop()  # it goes back to where it came from
        return released


class RemoteEngine(BatchEngine):
    """See `engine.Engine`. `open` takes the slot that was granted last."""

    def __init__(
        self, share: Share, line: Line, *, on_freed: Callable[[int], None], observer: EngineObserver | None = None
    ) -> None:
        """line: taken over. on_freed: told on the event loop of a slot that is not used any more."""
        super().__init__(
            self._connect,
            delay_frames=share.delay_frames,
            limits=share.limits,
            observer=observer,
            name=share.info.model,
            marker_wait_seconds=share.marker_wait_seconds,
            hang_seconds=share.hang_seconds,
        )
        self._share = share
        self._line = line
        self._on_freed = on_freed
        self._granted = GrantedSlots(share.info.total_slots)
        self._leaving: deque[int] = deque()
        """Slots whose stream is closed, and whose last row may still be under way."""

    def grant(self, index: int) -> None:
        """Let the next `open` use this slot."""
        self._granted.grant(index)

    def withdraw(self) -> int | None:
        """A granted slot that no `open` has taken, which is not granted any more."""
        return self._granted.withdraw()

    def _connect(self) -> LoadedModel:
        share, (memory, signal) = self._share, self._line
        streams = share.info.total_slots
        block = RowBlock(memory, streams, share.heads)
        os.close(memory)
        client = RowClient(block, signal, share.slots, share.heads)
        return LoadedModel(client, share.decode, share.info, streams, costs=share.costs)

    def _pools(self, loaded: LoadedModel) -> tuple[SlotPool, SlotPool]:
        return self._granted, SlotPool(len(self._share.spares), first=self._share.spares.start)

    def _release(self, stream: Stream) -> None:
        lane = self._lanes[stream]
        super()._release(stream)
        self._leaving.append(lane.slot.index)
        self._wake.set()

    def _drain(self, now: float) -> None:
        """Also tell of the slots that were left: this is between two steps."""
        while self._leaving:
            self._post(self._on_freed, self._leaving.popleft())
        super()._drain(now)

    def _stepped(self, seconds: float, rows: int) -> None:
        """The process that has the model counts its steps."""
