"""`batch_size = "auto"` against a backend whose steps take times of a table, on a clock of its own."""

import numpy as np
import pytest
from numpy.typing import NDArray

from moshi_stt.engine.backend import StepOutput
from moshi_stt.engine.timings import step_seconds
from moshi_stt.models.autosize import sustained_streams


class TimedBackend:
    """Each step moves the clock on by `fixed_ms + row_ms` for each row."""

    def __init__(self, slots: int, fixed_ms: float, row_ms: float) -> None:
        self.slots = slots
        self.pause_heads = 0
        self.now = 0.0
        self.rows: list[int] = []
        self._fixed_ms, self._row_ms = fixed_ms, row_ms

    def step(self, pcm: NDArray[np.float32], slots: NDArray[np.int64], fresh: NDArray[np.bool_]) -> StepOutput:
        rows = len(slots)
        assert pcm.shape == (rows, 1_920)
        assert len(set(slots.tolist())) == rows
        assert slots.max() < self.slots
        self.rows.append(rows)
        self.now += 1e-3 * (self._fixed_ms + self._row_ms * rows)
        return StepOutput(np.zeros(rows, np.int64), np.zeros(rows, np.float32), np.zeros((rows, 0), np.float32))

    def copy(self, source: int, target: int) -> None: ...

    def warm_up(self) -> None: ...

    def close(self) -> None: ...


@pytest.mark.parametrize(
    ("slots", "fixed_ms", "row_ms", "streams"),
    [
        (64, 4.0, 1.0, 60),  # 64 ms of 80 for 60 rows
        (40, 4.0, 1.0, 40),  # memory ends first
        (64, 100.0, 1.0, 1),  # not even one in real time: one is still served
        (1, 1.0, 1.0, 1),
        (2048, 2.0, 0.0, 2048),
        (100, 0.0, 20.0, 3),
    ],
)
def test_as_many_streams_as_fit_four_fifths_of_a_frame(slots: int, fixed_ms: float, row_ms: float, streams: int) -> None:
    backend = TimedBackend(slots, fixed_ms, row_ms)
    assert sustained_streams(backend, slots, clock=lambda: backend.now) == streams


def test_no_more_is_measured_than_needed() -> None:
    backend = TimedBackend(1024, 1.0, 10.0)
    sustained_streams(backend, 1024, clock=lambda: backend.now)
    assert max(backend.rows) == 8


def test_a_step_is_timed_without_its_first_turn_and_within_its_time() -> None:
    backend = TimedBackend(4, 5.0, 1.0)
    assert step_seconds(backend, 2, clock=lambda: backend.now) == pytest.approx(0.007)
    assert backend.rows == [2] * 6
    slow = TimedBackend(4, 50.0, 0.0)
    assert step_seconds(slow, 4, clock=lambda: slow.now, deadline=0.04) == pytest.approx(0.05)
    assert slow.rows == [4]
