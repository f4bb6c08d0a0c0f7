"""Two halves of a step at once: both results, both threads' settings, and either one's failure."""

import threading

import pytest
import torch

from moshi_stt.models.torch_impl.beside import Beside, in_turn


@pytest.mark.parametrize("first_threads", [0, 1, 2])
def test_both_results(first_threads: int) -> None:
    beside = Beside(first_threads, 1)
    first, second = beside(lambda: (threading.get_ident(), torch.get_num_threads()), lambda: threading.get_ident())
    beside.close()
    assert second == threading.get_ident()
    assert (first[0] != second) == (first_threads > 0)
    assert first[1] == max(first_threads, 1)


def test_both_run_at_the_same_time() -> None:
    """Each waits for the other."""
    beside, barrier = Beside(1, 1), threading.Barrier(2, timeout=30)
    assert sorted(beside(barrier.wait, barrier.wait)) == [0, 1]
    beside.close()


def test_inference_mode_reaches_the_other_thread() -> None:
    beside = Beside(1, 1)
    with torch.inference_mode():
        first, second = beside(torch.is_inference_mode_enabled, torch.is_inference_mode_enabled)
    beside.close()
    assert (first, second) == (True, True)


@pytest.mark.parametrize("failing", ["first", "second"])
def test_a_failure_waits_for_the_other_half(failing: str) -> None:
    """A step that fails must not leave the other half writing to the state behind its caller's back."""
    beside, ended = Beside(1, 1), threading.Event()

    def fail() -> None:
        raise ZeroDivisionError(failing)

    halves = (fail, ended.set) if failing == "first" else (ended.set, fail)
    with pytest.raises(ZeroDivisionError, match=failing):
        beside(*halves)
    assert ended.is_set()
    beside.close()
    beside.close()


def test_in_turn() -> None:
    said: list[str] = []
    assert in_turn(lambda: said.append("first"), lambda: said.append("second")) == (None, None)
    assert said == ["first", "second"]
