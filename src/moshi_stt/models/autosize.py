"""`batch_size = "auto"`: how many streams a model holds in real time here. Knows backends only by their interface."""

import time
from collections.abc import Callable

import numpy as np

from moshi_stt.constants import FRAME_SAMPLES, FRAME_SECONDS
from moshi_stt.engine.engine import Ages, Backend

BUDGET_SECONDS = 0.8 * FRAME_SECONDS
"""What a step of all streams may take: the rest of the frame's 80 ms is for the sockets and for bad moments."""

TRIES = 5


def sustained_streams(backend: Backend, most: int, clock: Callable[[], float] = time.perf_counter) -> int:
    """The most rows, 1 to `most`, whose step takes no longer than BUDGET_SECONDS, measured at 1, 2, 4, … rows.

    backend: warm, with `most` slots at least; their state is undefined afterwards.
    """
    measured: list[tuple[int, float]] = []
    rows = 1
    while True:
        measured.append((rows, step_seconds(backend, rows, clock)))
        if measured[-1][1] > BUDGET_SECONDS or rows == most:
            break
        rows = min(2 * rows, most)
    counts, seconds = zip(*measured, strict=True)
    if seconds[-1] <= BUDGET_SECONDS:
        return most
    return max(1, int(np.interp(BUDGET_SECONDS, np.maximum.accumulate(seconds), counts) + 1e-6))


def step_seconds(backend: Backend, rows: int, clock: Callable[[], float]) -> float:
    """Median time of a step of so many rows."""
    pcm = np.zeros((rows, FRAME_SAMPLES), np.float32)
    slots = np.arange(rows, dtype=np.int64)
    taken = []
    for turn in range(TRIES + 1):  # the first starts the slots anew and is not counted
        begun = clock()
        backend.step(pcm, slots, np.full(rows, turn == 0))
        taken.append(clock() - begun)
        if turn == 0 and isinstance(backend, Ages):
            backend.age()
    return sorted(taken[1:])[TRIES // 2]
