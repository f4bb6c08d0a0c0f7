"""Two halves of a step at once: both results, both threads' settings, and either one's failure."""

import threading
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from moshi_stt.config import KyutaiModule
from moshi_stt.config_load import load_config
from moshi_stt.engine.backend import StepOutput
from moshi_stt.models.spec_tables import spec_from_module
from moshi_stt.models.torch_impl.backend import TorchBackend
from moshi_stt.models.torch_impl.beside import Beside, RowShare
from moshi_stt.models.torch_impl.build import load_backend


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


def test_rows_go_to_the_side_that_is_done_first() -> None:
    share = RowShare()
    assert share.rows(64) == 0, "nothing is known yet"
    share.learn(own=1.0, other=3.0)
    taken = share.rows(64)
    assert (1.0 * 64 + 3.0 * taken) == pytest.approx(3.0 * (64 - taken), abs=6.0)
    assert share.rows(6) == 0, "too few for a call of their own"
    for _ in range(100):
        share.learn(own=3.0, other=1.0)
    assert share.rows(64) == 0


def test_a_split_changes_nothing() -> None:
    """Some rows' codes are computed by the language model's thread: the same to the last bit as by one thread alone."""
    slots, rng = np.arange(24), np.random.default_rng(5)
    sounds = (rng.standard_normal((4, 24, 1_920)) * 0.1).astype(np.float32)
    said = []
    for taken in (0, 5, 12):
        backend = small_backend(24)
        backend._share = Taking(taken)
        said.append([backend.step(pcm, slots, np.full(24, n == 0)) for n, pcm in enumerate(sounds)])
        codes = backend.state.codes[:24].clone()
        said[-1].append(StepOutput(codes.numpy(), np.zeros(0), np.zeros(0)))
        backend.close()
    for other in said[1:]:
        for a, b in zip(said[0], other, strict=True):
            for left, right in zip(a, b, strict=True):
                np.testing.assert_array_equal(left, right)


class Taking(RowShare):
    """Always so many rows."""

    def __init__(self, taken: int) -> None:
        super().__init__()
        self._taken = taken

    def rows(self, count: int) -> int:
        return self._taken


def small_backend(slots: int) -> TorchBackend:
    """`phrases` on two threads."""
    (module,) = load_config("phrases").config.modules
    assert isinstance(module, KyutaiModule)
    module = msgspec.structs.replace(module, engine=msgspec.structs.replace(module.engine, device="cpu", threads=2))
    files = Path(module.lm_model_file), Path(module.audio_tokenizer_file)
    backend = load_backend(module, *files, spec_from_module(module), slots)
    assert isinstance(backend, TorchBackend)
    if not backend._splits:
        backend.close()
        pytest.skip("this PyTorch has no packed products, whose rows are independent")
    return backend
