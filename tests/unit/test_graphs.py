"""`GraphRunner` with a stand-in for CUDA graphs: what reaches the captured function, and what comes back."""

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

from tests.support.graphs import NoGraphs  # noqa: E402

from moshi_stt.constants import FRAME_SAMPLES  # noqa: E402
from moshi_stt.models.torch_impl import graphs  # noqa: E402
from moshi_stt.models.torch_impl.graphs import GraphRunner, Replay, bucket_sizes  # noqa: E402

SCRATCH = 99


class Recorder:
    """A step that says of each row its first sample, its slot and whether it is fresh; and a capturer that counts."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.captured = 0
        self.seen: list[tuple[list[int], list[bool]]] = []

    def step_rows(self, load: "Callable[[], torch.Tensor]", slots: "torch.Tensor", fresh: "torch.Tensor") -> "torch.Tensor":
        self.sizes.append(len(slots))
        self.seen.append((slots.tolist(), fresh.tolist()))
        return torch.stack([load()[:, 0], slots.float(), fresh.float()], dim=1)

    def capture(self, run: Callable[[], None], *, brief: bool) -> Replay:
        self.captured += 1
        return NoGraphs().capture(run, brief=brief)

    def host(self, count: int) -> "torch.Tensor":
        return NoGraphs().host(count)

    def seconds(self) -> float | None:
        return None


def make(buckets: tuple[int, ...] = (1, 2, 4, 8)) -> tuple[Recorder, GraphRunner]:
    recorder = Recorder()
    runner = GraphRunner(
        recorder.step_rows, width=3, scratch=SCRATCH, buckets=buckets, device=torch.device("cpu"), graphs=recorder
    )
    return recorder, runner


def rows(count: int, first: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    pcm = np.zeros((count, FRAME_SAMPLES), np.float32)
    pcm[:, 0] = np.arange(count) + 0.5
    return pcm, np.arange(first, first + count, dtype=np.int64), np.arange(count) % 2 == 0


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8])
def test_rows_come_back_as_given(count: int) -> None:
    recorder, runner = make()
    pcm, slots, fresh = rows(count, first=10)
    out = runner.step(pcm, slots, fresh)
    assert out.shape == (count, 3)
    np.testing.assert_array_equal(out, np.stack([pcm[:, 0], slots, fresh], axis=1))
    assert recorder.sizes[-1] == min(size for size in runner.buckets if size >= count)


def test_much_sound_is_copied_by_several_threads_and_all_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "LARGE_BYTES", 3 * 4 * FRAME_SAMPLES)
    for cores in (1, 3, 16):
        monkeypatch.setattr(graphs, "usable_cores", lambda cores=cores: cores)
        _, runner = make()
        for count in (2, 3, 8, 7):
            pcm = np.random.default_rng(count).random((count, FRAME_SAMPLES), np.float32)
            out = runner.step(pcm, *rows(count)[1:])
            np.testing.assert_array_equal(out[:, 0], pcm[:, 0])
            np.testing.assert_array_equal(runner.inputs.pcm[:count], pcm)


def test_spare_rows_are_fresh_and_point_at_the_scratch_slot() -> None:
    recorder, runner = make()
    runner.step(*rows(8))
    runner.step(*rows(5))
    slots, fresh = recorder.seen[-1]
    assert slots[5:] == [SCRATCH] * 3
    assert fresh[5:] == [True] * 3


def test_more_rows_than_the_largest_bucket_go_in_several_steps() -> None:
    recorder, runner = make((1, 4))
    pcm, slots, fresh = rows(11)
    out = runner.step(pcm, slots, fresh)
    np.testing.assert_array_equal(out[:, 1], slots)
    np.testing.assert_array_equal(out[:, 0], pcm[:, 0])
    assert recorder.sizes[-3:] == [4, 4, 4]


def test_every_bucket_is_captured_once_the_largest_first() -> None:
    recorder, runner = make()
    runner.prepare()
    runner.prepare()
    assert recorder.captured == 4
    for count in (1, 8, 3, 1):
        runner.step(*rows(count))
    assert recorder.captured == 4
    assert recorder.sizes == [1, 8, 4, 1]


def test_the_largest_and_the_small_are_captured_first_and_others_while_steps_go_on() -> None:
    recorder, runner = make((1, 2, 4, 8, 16, 32, 64))
    runner.begin()
    assert list(runner._captured) == [64, 1, 2, 4, 8]
    runner.step(*rows(9))
    assert recorder.sizes[-1] == 64, "no bucket between is there yet"
    assert runner.go_on(lambda size: size != 16), "16 is not ready, so 32 is next"
    runner.step(*rows(9))
    assert recorder.sizes[-1] == 32
    assert runner.go_on(lambda size: False), "nothing is ready"
    assert not runner.go_on()
    out = runner.step(*rows(9))
    assert recorder.sizes[-1] == 16
    np.testing.assert_array_equal(out, np.stack([rows(9)[0][:, 0], rows(9)[1], rows(9)[2]], axis=1))
    assert recorder.captured == 7
    assert not runner.go_on()


def test_what_was_written_in_place_is_stepped_even_where_the_bucket_is_yet_to_be_captured() -> None:
    _, runner = make()
    for count in (3, 8, 1):
        pcm, slots, fresh = runner.inputs
        pcm[:count], slots[:count], fresh[:count] = rows(count, first=20)
        out = runner.step(pcm[:count], slots[:count], fresh[:count])
        np.testing.assert_array_equal(out[:, 0], np.arange(count) + 0.5)
        np.testing.assert_array_equal(out[:, 1], np.arange(20, 20 + count))


def test_output_outlives_the_next_step() -> None:
    _, runner = make()
    first = runner.step(*rows(4))
    kept = first.copy()
    runner.step(*rows(4, first=40))
    np.testing.assert_array_equal(first, kept)


@pytest.mark.parametrize("slots", [1, 2, 3, 64, 100, 1_024, 2_048, 3_000])
def test_buckets_end_at_the_slots_and_waste_at_most_half(slots: int) -> None:
    sizes = bucket_sizes(slots)
    assert list(sizes) == sorted(set(sizes))
    assert sizes[-1] == slots
    assert sizes[0] == 1
    assert all(after <= 2 * before for before, after in pairwise(sizes))
    assert all(2 * after <= 3 * before for before, after in pairwise(sizes) if before >= 256)


def test_a_step_that_is_started_comes_back_when_it_is_asked_for() -> None:
    """What it was given may be written to meanwhile."""
    for buckets in ((1, 2, 4, 8), (4,)):
        _, runner = make(buckets)
        pcm, slots, fresh = rows(6, first=10)
        expected = runner.step(pcm, slots, fresh)
        finish = runner.start(pcm, slots, fresh)
        pcm[:], slots[:], fresh[:] = -1, 0, False
        np.testing.assert_array_equal(finish(), expected)


def test_it_says_when_the_inputs_of_a_step_have_been_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when graphs are captured between two steps, which reads inputs too."""
    recorder, runner = make()
    assert runner.has_read_inputs
    runner.step(*rows(2))
    assert runner.has_read_inputs
    late: list[Callable[[], None]] = []

    def capture_late(run: Callable[[], None], *, brief: bool) -> Replay:
        run()  # as when it is captured
        return Replay(lambda: late.append(run), lambda: late.pop()())

    monkeypatch.setattr(recorder, "capture", capture_late)
    for count in (8, 4, 8):
        finish = runner.start(*rows(count))
        assert not runner.has_read_inputs
        np.testing.assert_array_equal(finish()[:, 0], rows(count)[0][:, 0])
        assert runner.has_read_inputs
