"""Frames out of any chunking: the samples in order, none lost, each frame with the time of its last sample."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from moshi_stt.audio.framer import Framer
from moshi_stt.constants import FRAME_SAMPLES

SIZES = st.lists(
    st.sampled_from([0, 1, 7, 240, 700, 1919, 1920, 1921, 3840, 5000, 24_000]) | st.integers(0, 6_000), max_size=12
)


@given(SIZES, st.randoms(use_true_random=False))
def test_any_chunking(sizes: list[int], random: object) -> None:
    samples = np.arange(1, sum(sizes) + 1, dtype=np.float32)
    ends = np.cumsum(sizes)
    framer = Framer()
    taken: list[np.ndarray] = []
    start = 0

    def pop() -> None:
        frame, arrived = framer.pop()
        last = min((len(taken) + 1) * FRAME_SAMPLES, start)
        assert arrived == np.searchsorted(ends, last), "the time of the piece with the frame's last sample"
        taken.append(frame)

    for index, size in enumerate(sizes):
        framer.push(samples[start : start + size], float(index))
        start += size
        assert framer.samples == start - len(taken) * FRAME_SAMPLES
        while framer.frames and random.random() < 0.7:  # type: ignore[attr-defined]
            pop()
    while framer.frames:
        pop()
    assert framer.samples == len(samples) % FRAME_SAMPLES
    if framer.samples:
        held = framer.samples
        peeked, seen = framer.peek()
        assert framer.samples == held
        last, arrived = framer.pop()
        assert seen == arrived
        assert np.array_equal(peeked, last)
        taken.append(last)
    whole = np.concatenate([*taken, np.zeros(0, np.float32)])
    assert np.array_equal(whole[: len(samples)], samples)
    assert not whole[len(samples) :].any()
    assert framer.samples == 0


def test_a_large_message_is_not_copied() -> None:
    """The piece itself is kept: an hour that came at once costs its own memory and no more."""
    framer, samples = Framer(), np.zeros(FRAME_SAMPLES * 100, np.float32)
    framer.push(samples, 0.0)
    frame, _ = framer.pop()
    assert np.shares_memory(frame, samples)
