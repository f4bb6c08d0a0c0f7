"""Driving a backend and writing down everything it says. Knows no engine."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moshi_stt.constants import FRAME_SAMPLES


class Outputs(NamedTuple):
    """Of one stream: tokens, logprob (T,), pause (T, H), codes (T, K), logits (T, V)."""

    tokens: NDArray[np.int64]
    logprob: NDArray[np.float32]
    pause: NDArray[np.float32]
    codes: NDArray[np.int64]
    logits: NDArray[np.float32]


def to_numpy(array: Any) -> NDArray[Any]:
    """A copy of any framework's array, on the host."""
    return array.numpy(force=True).copy() if hasattr(array, "numpy") else np.array(array)


def noise(frames: int, seed: int) -> NDArray[np.float32]:
    """float32 (frames * 1920,): coloured noise that swells and fades, so that frames differ."""
    rng = np.random.default_rng(seed)
    white = rng.standard_normal(frames * FRAME_SAMPLES + 8)
    coloured = np.convolve(white, np.ones(8) / 8, "valid")[: frames * FRAME_SAMPLES]
    knots = np.arange(0, len(coloured) + 4_000, 4_000)
    swell = np.interp(np.arange(len(coloured)), knots, rng.uniform(0, 0.8, len(knots)))
    return (coloured * swell).astype(np.float32)


def drive(backend: Any, pcm: NDArray[np.float32], slot: int = 1) -> Outputs:
    """Step one stream alone, from fresh, over all whole frames of pcm (S,)."""
    frames = len(pcm) // FRAME_SAMPLES
    logits, step = [], backend.lm.step

    def record(*args: Any) -> Any:
        output = step(*args)
        logits.append(to_numpy(output.logits[0]))
        return output

    backend.lm.step = record
    outputs, codes = [], []
    try:
        for n, frame in enumerate(pcm[: frames * FRAME_SAMPLES].reshape(frames, -1)):
            outputs.append(backend.step(frame[None], np.array([slot]), np.array([n == 0])))
            codes.append(to_numpy(backend.state.codes[slot]))
    finally:
        del backend.lm.step
    return Outputs(
        np.concatenate([output.text_token for output in outputs]),
        np.concatenate([output.logprob for output in outputs]),
        np.concatenate([output.pause for output in outputs]),
        np.stack(codes),
        np.stack(logits),
    )


def step_rows(backend: Any, frames: Sequence[NDArray[np.float32]], slots: Sequence[int], fresh: Sequence[bool]) -> Any:
    """One step of several rows."""
    return backend.step(np.stack(frames), np.array(slots, np.int64), np.array(fresh))
