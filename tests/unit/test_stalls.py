"""What `StallWatch` says of a long turn. Time is a clock of the test's own."""

import gc
import logging
from pathlib import Path

import pytest

from moshi_stt.engine import stalls
from moshi_stt.engine.stalls import StallWatch


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(stalls, "time", clock)
    return clock


def turn(watch: StallWatch, clock: Clock, seconds: float, rows: int = 4, note: str = "") -> None:
    watch.begin()
    if note:
        watch.note(note)
    clock.now += seconds
    watch.end(rows, seconds / 2)


def test_the_longest_turn_is_kept_with_its_reason(clock: Clock) -> None:
    watch = StallWatch(lambda: 0.004)
    turn(watch, clock, 0.010)
    turn(watch, clock, 0.030, rows=9, note="captured the graph of 16 rows")
    turn(watch, clock, 0.020)
    watch.close()
    assert (watch.longest.rows, round(watch.longest.seconds, 3)) == (9, 0.030)
    assert watch.longest.reason.startswith("captured the graph of 16 rows, the device worked 4 ms of the step's 15 ms")


def test_a_turn_without_rows_counts_only_when_it_is_long(clock: Clock) -> None:
    watch = StallWatch()
    turn(watch, clock, 0.050, rows=0)
    assert watch.longest.seconds == 0
    turn(watch, clock, 0.090, rows=0)
    assert watch.longest.rows == 0
    assert round(watch.longest.seconds, 3) == 0.090
    watch.close()


def test_a_collection_is_named(clock: Clock) -> None:
    watch = StallWatch()
    watch.begin()
    watch._collect("start", {"generation": 2})
    clock.now += 0.2
    watch._collect("stop", {"generation": 2})
    watch.end(3, 0.01)
    watch.close()
    assert "garbage collector (generation 2) took 200 ms" in watch.longest.reason


def test_pythons_own_collections_are_heard() -> None:
    watch = StallWatch()
    watch.begin()
    gc.collect()
    assert watch._generations
    watch.close()
    assert watch._collect not in gc.callbacks


def test_late_turns_are_logged_but_not_each(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    watch = StallWatch()
    with caplog.at_level(logging.INFO):
        for seconds in (0.1, 0.1, 0.02, 11.0):
            turn(watch, clock, seconds)
            clock.now += 1
        assert sum("longer than a frame" in line for line in caplog.messages) == 1, "the two others came within ten seconds"
        turn(watch, clock, 0.2)
        assert sum("longer than a frame" in line for line in caplog.messages) == 2
        watch.close()
    assert "11000.0 ms of 4 rows" in caplog.messages[-1]


def test_a_wait_for_a_processor_is_named(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    watch = StallWatch()
    waits = iter((1.0, 1.045))
    monkeypatch.setattr(watch._queue, "seconds", lambda: next(waits))
    turn(watch, clock, 0.050)
    watch.close()
    assert "waited 45 ms for a processor" in watch.longest.reason


@pytest.mark.skipif(not Path("/proc/thread-self/schedstat").exists(), reason="only Linux counts that")
def test_what_the_kernel_counts_is_read() -> None:
    watch = StallWatch()
    counted = int(Path("/proc/thread-self/schedstat").read_text().split()[1]) / 1e9
    assert counted <= watch._queue.seconds() < counted + 60
    watch.close()
    assert watch._queue.seconds() == 0.0
