"""What a step takes, by its number of rows: measured at start, asked while running."""

import math
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from moshi_stt.constants import FRAME_SAMPLES, FRAME_SECONDS
from moshi_stt.engine.backend import Backend, FillsContext

TURNS = 5
MEASURING_SECONDS = 5.0


class StepTimings(NamedTuple):
    """Median seconds of steps of so many rows each, ascending."""

    rows: tuple[int, ...]
    seconds: tuple[float, ...]

    @property
    def slowest(self) -> float:
        return max(self.seconds)

    def rows_within(self, seconds: float, most: int) -> int:
        """The most rows, up to `most`, whose step is expected to take no longer than this; 0 when not even one."""
        if seconds < self.seconds[0]:
            return 0
        return min(int(np.interp(seconds, np.maximum.accumulate(self.seconds), self.rows)), most)

    def describe(self, slots: int, frame_seconds: float = FRAME_SECONDS) -> dict[str, str]:
        """Lines for the start-up log."""
        pairs = zip(self.rows, self.seconds, strict=True)
        details = {f"step of {rows} row{'s' if rows > 1 else ''}": f"{1e3 * seconds:.3g} ms" for rows, seconds in pairs}
        held = self.rows_within(frame_seconds, slots)
        details["real-time streams"] = (
            f"{held} of {slots} slots"
            if held
            else f"none: one step takes longer than the {1e3 * frame_seconds:.0f} ms of audio in it; use a faster device"
        )
        return details


def measure(
    backend: Backend, streams: int, frame_samples: int = FRAME_SAMPLES, budget_seconds: float = MEASURING_SECONDS
) -> StepTimings:
    """A warm backend's timings at 1, some and all rows, as far as there is time for.

    With full contexts, where the backend can pretend them. Leaves every slot's state undefined until `fresh`.
    """
    timings: list[tuple[int, float]] = []
    deadline = time.perf_counter() + budget_seconds
    for rows in sorted({1, min(8, streams), streams}):
        if timings and timings[-1][1] * rows / timings[-1][0] > budget_seconds:
            break
        timings.append((rows, step_seconds(backend, rows, frame_samples, deadline=deadline)))
        if time.perf_counter() > deadline:
            break
    return StepTimings(*zip(*timings, strict=True))


def step_seconds(
    backend: Backend,
    rows: int,
    frame_samples: int = FRAME_SAMPLES,
    *,
    clock: Callable[[], float] = time.perf_counter,
    deadline: float = math.inf,
) -> float:
    """Median seconds of a step of so many rows, with full contexts where the backend can pretend them.

    The first step gives the slots fresh states and counts only where there is no time for another. deadline: on `clock`; no
    step begins after it. Leaves the state of slots 0 .. rows - 1 undefined until `fresh`.
    """
    pcm = np.zeros((rows, frame_samples), np.float32)
    slots = np.arange(rows, dtype=np.int64)
    taken: list[float] = []
    for turn in range(TURNS + 1):
        begun = clock()
        backend.step(pcm, slots, np.full(rows, turn == 0))
        taken.append(clock() - begun)
        if turn == 0 and isinstance(backend, FillsContext):
            backend.fill_context()
        if clock() > deadline:
            break
    counted = sorted(taken[1:] or taken)
    return counted[len(counted) // 2]
