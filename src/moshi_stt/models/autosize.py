"""`batch_size = "auto"`: how many streams a model holds in real time here. Knows backends only by their interface."""

import time
from collections.abc import Callable

import numpy as np

from moshi_stt.constants import FRAME_SECONDS
from moshi_stt.engine.backend import Backend
from moshi_stt.engine.timings import step_seconds

BUDGET_SECONDS = 0.8 * FRAME_SECONDS
"""What a step of all streams may take: the rest of the frame's 80 ms is for the sockets and for bad moments."""


def sustained_streams(backend: Backend, most: int, clock: Callable[[], float] = time.perf_counter) -> int:
    """The most rows, 1 to `most`, whose step takes no longer than BUDGET_SECONDS, measured at 1, 2, 4, … rows.

    backend: warm, with `most` slots at least; their state is undefined afterwards.
    """
    measured: list[tuple[int, float]] = []
    rows = 1
    while True:
        measured.append((rows, step_seconds(backend, rows, clock=clock)))
        if measured[-1][1] > BUDGET_SECONDS or rows == most:
            break
        rows = min(2 * rows, most)
    counts, seconds = zip(*measured, strict=True)
    if seconds[-1] <= BUDGET_SECONDS:
        return most
    return max(1, int(np.interp(BUDGET_SECONDS, np.maximum.accumulate(seconds), counts) + 1e-6))
