"""A stream's output depends on its own frames alone: not on its slot, neighbours, predecessor, or how rows are grouped."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from tests.support.checkpoints import Checkpoint
from tests.support.frameworks import FRAMEWORKS, loader, poison, rows_independent
from tests.support.stepping import drive, noise, step_rows

from moshi_stt.constants import FRAME_SAMPLES

SLOTS = 16
FRAMES = 40

Said = list[tuple[int, float, tuple[float, ...]]]
"""Token, log-probability and pauses of each step."""


def load(framework: str, small: Checkpoint, **settings: object) -> Any:
    return loader(framework)(small.lm_file, small.mimi_file, small.spec, SLOTS, settings=settings)


@pytest.fixture(scope="module", params=FRAMEWORKS)
def backend(request: pytest.FixtureRequest, small: Checkpoint) -> Iterator[Any]:
    backend = load(request.param, small)
    yield backend
    backend.close()


def schedule(backend: Any, audio: list[np.ndarray], seed: int) -> dict[int, Said]:
    """Run every stream to its end in a random schedule: joins, leaves, idle gaps, resets, slots taken over from others."""
    rng = np.random.default_rng(seed)
    waiting, running = list(rng.permutation(len(audio))), {}  # slot -> (stream, next frame)
    said: dict[int, Said] = {stream: [] for stream in range(len(audio))}
    while waiting or running:
        free = [slot for slot in range(backend.slots) if slot not in running]
        while waiting and free and rng.random() < 0.4:
            running[int(rng.choice(free))] = [int(waiting.pop()), 0]
            free = [slot for slot in range(backend.slots) if slot not in running]
        rows = [slot for slot in running if rng.random() < 0.7]  # the others are idle in this step
        rng.shuffle(rows)
        if not rows:
            continue
        frames = [audio[running[slot][0]][running[slot][1]] for slot in rows]
        output = step_rows(backend, frames, rows, [running[slot][1] == 0 for slot in rows])
        for row, slot in enumerate(rows):
            stream, n = running[slot]
            said[stream].append((int(output.text_token[row]), float(output.logprob[row]), tuple(output.pause[row])))
            running[slot][1] += 1
            if rng.random() < 0.004:  # a reset: the stream starts over, in this slot
                said[stream], running[slot][1] = [], 0
            elif n + 1 == FRAMES:
                del running[slot]
    return said


def alone(backend: Any, stream: np.ndarray, slot: int) -> Said:
    output = drive(backend, stream.reshape(-1), slot)
    return [
        (int(token), float(logprob), tuple(pause))
        for token, logprob, pause in zip(output.tokens, output.logprob, output.pause, strict=True)
    ]


@pytest.fixture(scope="module")
def audio() -> list[np.ndarray]:
    return [noise(FRAMES, seed).reshape(FRAMES, FRAME_SAMPLES) for seed in range(24)]


def test_random_schedule_bit_for_bit(backend: Any, audio: list[np.ndarray]) -> None:
    """24 streams over 16 slots: every token, log-probability and pause to the last bit as the same stream alone."""
    assert rows_independent(backend), "this processor's products depend on the number of rows"
    poison(backend)
    together = schedule(backend, audio, seed=5)
    for stream, said in together.items():
        assert said == alone(backend, audio[stream], slot=stream % SLOTS), f"stream {stream}"


def test_fixed_shapes_without_repacked_weights(
    small: Checkpoint, audio: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where products are plain ones, whose rounding does depend on the rows, `fixed_shapes` gives the same bit for bit."""
    pytest.importorskip("torch")
    monkeypatch.setattr("moshi_stt.models.torch_impl.linear.can_pack", lambda device, dtype: False)
    backend = load("torch", small, engine_fixed_shapes=True)
    assert backend.fixed_rows == 1
    poison(backend)
    together = schedule(backend, audio[:12], seed=6)
    for stream, said in together.items():
        assert said == alone(backend, audio[stream], slot=(stream + 3) % SLOTS), f"stream {stream}"


def test_attention_for_devices(small: Checkpoint, audio: list[np.ndarray]) -> None:
    """The static-shape attention of devices: the same tokens, in blocks padded with the scratch slot, NaNs in every ring."""
    pytest.importorskip("torch")
    from moshi_stt.models.torch_impl.attention import ring_attention

    backend = load("torch", small)
    expected = [alone(backend, stream, 0) for stream in audio[:12]]
    backend.lm.attention = backend.mimi.attention = ring_attention
    backend.fixed_rows = 8
    poison(backend)
    together = schedule(backend, audio[:12], seed=7)
    for stream, said in together.items():
        assert [step[0] for step in said] == [step[0] for step in expected[stream]], f"stream {stream}"
        np.testing.assert_allclose([step[1] for step in said], [step[1] for step in expected[stream]], atol=1e-4)


def test_absurd_samples_do_not_last(backend: Any, audio: list[np.ndarray]) -> None:
    """NaN, infinities and huge samples: the neighbour notices nothing, and once they have left the window neither does the
    stream itself."""
    mad = audio[0].copy()
    mad[0, :5] = [np.nan, np.inf, -np.inf, 1e38, -1e38]
    expected = alone(backend, audio[1], 0)
    said = []
    for n in range(FRAMES):
        output = step_rows(backend, [mad[n], audio[1][n]], [3, 4], [n == 0] * 2)
        assert np.isfinite(output.logprob).all()
        assert np.isfinite(output.pause).all()
        said.append((int(output.text_token[1]), float(output.logprob[1]), tuple(output.pause[1])))
    assert said == expected


@pytest.mark.parametrize("frames", [3, 30])
def test_copy(backend: Any, audio: list[np.ndarray], frames: int) -> None:
    """A copied slot goes on by itself, and so does the one it was copied from: with rings part filled, and full."""
    other = np.concatenate([audio[2][:frames], audio[7][: FRAMES - frames]])
    poison(backend)
    for n in range(frames):
        step_rows(backend, [audio[2][n]], [5], [n == 0])
    backend.copy(5, 11)
    said: dict[int, Said] = {5: [], 11: []}
    for n in range(frames, FRAMES):
        output = step_rows(backend, [other[n], audio[2][n]], [11, 5], [False, False])
        for row, slot in enumerate((11, 5)):
            said[slot].append((int(output.text_token[row]), float(output.logprob[row]), tuple(output.pause[row])))
    assert said[5] == alone(backend, audio[2], 0)[frames:]
    assert said[11] == alone(backend, other, 0)[frames:]


def test_no_rows(backend: Any) -> None:
    """A step of nobody is allowed and says nothing."""
    output = backend.step(np.zeros((0, FRAME_SAMPLES), np.float32), np.zeros(0, np.int64), np.zeros(0, bool))
    assert output.text_token.shape == (0,)
    assert output.pause.shape == (0, 4)
