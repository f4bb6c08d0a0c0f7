"""Answers to markers that nothing follows, on copies of their streams' slots.

The answer needs silence after the last audio. The stream itself must not hear that silence, because the client may go on. So
the slot's state is copied to a scratch slot, which hears it instead (docs/internals/engine.md, "Markers").
"""

from collections.abc import Callable, Iterable

from moshi_stt.engine.slots import SlotPool
from moshi_stt.engine.stream_state import Flush, StreamState


class MarkerCopies:
    """The scratch slots, and which streams use them. Belongs to the model thread."""

    def __init__(self, copy: Callable[[int, int], None], scratch: SlotPool, wait_seconds: float) -> None:
        """copy: `Backend.copy`. wait_seconds: how long a marker waits for audio before a copy answers it."""
        self._copy = copy
        self._scratch = scratch
        self._wait_seconds = wait_seconds

    def start(self, states: Iterable[StreamState], now: float) -> None:
        """Start a flush where a marker has waited long enough; while all scratch slots are in use, it waits."""
        for state in states:
            if not state.marks or not _waits(state) or now - state.last_audio_at < self._wait_seconds:
                continue
            if state.fresh:  # no state yet: its own slot serves, and is started from zero again
                state.flush_copy(state.slot.index, None)
            elif self._scratch.used < self._scratch.total:
                scratch = self._scratch.acquire()
                self._copy(state.slot.index, scratch.index)
                state.flush_copy(scratch.index, scratch)

    def release(self, flush: Flush | None) -> None:
        """The flush is over, or its stream has gone."""
        if flush is not None and flush.scratch is not None:
            self._scratch.release(flush.scratch)
            flush.scratch = None

    def idle_seconds(self, states: Iterable[StreamState], now: float) -> float | None:
        """When the next flush is due; None when no marker waits."""
        waits = [self._wait_seconds - (now - state.last_audio_at) for state in states if _waits(state)]
        return max(0.001, min(waits)) if waits else None


def _waits(state: StreamState) -> bool:
    return state.waiting and state.stream.writable
