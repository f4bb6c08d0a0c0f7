"""The search for the most live streams, over machines that hold a known number."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest


def load_rule() -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks" / "find_most.py"
    spec = importlib.util.spec_from_file_location("find_most", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["find_most"] = module
    spec.loader.exec_module(module)
    return module


rule = load_rule()


def run(start: int, holds: dict[int, int]) -> "rule.Search":  # type: ignore[name-defined]
    """A whole search on a machine that holds so many streams for so many seconds."""
    search = rule.Search(start, {})
    for _ in range(40):
        following = search.next()
        if following is None:
            return search
        streams, seconds = following
        late = 0 if streams <= holds[seconds] else seconds * streams
        search.trials.append(rule.Trial(streams, seconds, streams, late=late, chunks=1_000 * streams, final_ms={"p95": 90.0}))
    raise AssertionError("the search does not end")


@pytest.mark.parametrize("start", [10, 100, 700, 1_500])
def test_it_comes_within_five_percent(start: int) -> None:
    search = run(start, {60: 731, 120: 731})
    answer = search.answer()
    assert answer is not None
    assert 731 / 1.06 <= answer <= 731
    assert search.without_late(120) == answer


def test_what_holds_a_minute_only_goes_down_by_tenths() -> None:
    search = run(500, {60: 1_000, 120: 840})
    long = [trial.streams for trial in search.trials if trial.seconds == 120]
    best = long[0]
    assert long == [int(best * 0.9**i) for i in range(len(long))]
    assert search.answer() == long[-1] <= 840
    assert len(long) <= 3


def test_it_gives_up_after_five_long_trials_and_after_five_short_ones() -> None:
    search = run(100, {60: 1_000, 120: 10})
    assert sum(trial.seconds == 120 for trial in search.trials) == 5
    assert search.answer() is None
    search = run(1_000, {60: 1, 120: 1})
    assert len(search.trials) == 5
    assert search.answer() is None
    assert "no N held" in search.table()


def test_each_rule_fails_a_trial() -> None:
    def failed(**values: object) -> str:
        return str(rule.Trial(10, 60, 1, **({"chunks": 10_000} | values)).failed)

    assert failed() == ""
    assert failed(late=10) == ""
    assert failed(late=11) == "11 of 10000 chunks late (0.11%)"
    assert failed(final_ms={"p95": 1_000.1}) == "last words after 1000 ms (p95)"
    assert failed(aborted="a stream is 3.1 s behind") == "aborted: a stream is 3.1 s behind"
    assert failed(chunks=0) == "no chunk was heard"


def test_a_trial_at_which_another_failed_does_not_count() -> None:
    search = rule.Search(100, {}, [rule.Trial(100, 120, 1, chunks=10), rule.Trial(90, 120, 1, chunks=10)])
    assert search.answer() == 100
    search.trials.append(rule.Trial(100, 60, 1, late=9, chunks=10))
    assert search.answer() == 90


def test_the_state_goes_through_a_file(tmp_path: Path) -> None:
    path = tmp_path / "search.json"
    search = rule.load(path, 64, {"kv": "fp8"})
    assert search.next() == (64, 60)
    search.trials.append(rule.Trial(64, 60, 64, late=1, chunks=48_000, final_ms={"p50": 300.0, "p95": 310.0}, more={"gb": 2}))
    search.save(path)
    again = rule.load(path, 999, {"kv": "fp8"})
    assert again == search
    assert again.next() == (80, 60)
    assert "next: 80 streams, 60 s" in again.table()
    with pytest.raises(ValueError, match="name another file"):
        rule.load(path, 64, {"kv": "bf16"})
