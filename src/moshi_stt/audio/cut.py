"""Long recordings to overlapping pieces, cut at pauses (`text/merge.py` joins their words).

Each piece carries some audio from before its first and after its last second, so that a word at a cut is heard whole on
both sides.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moshi_stt.constants import SAMPLE_RATE

_BLOCK = SAMPLE_RATE // 50  # 20 ms
_SMOOTH_BLOCKS = 15
_PAUSE_SECONDS = 0.2
_QUIET_DB = 10.0
"""A block this little above the quietest tenth is part of a pause."""
_LONGEST_USEFUL_PAUSE_SECONDS = 1.0


@dataclass(frozen=True)
class CutRule:
    """Where to cut. All in seconds.

    earliest, latest: a piece's own audio is at least and at most so long (the last piece may be shorter).
    before, after: what it carries of its neighbours.
    """

    earliest: float = 24.0
    latest: float = 40.0
    before: float = 3.0
    after: float = 1.5

    def __post_init__(self) -> None:
        if not 0 < self.earliest <= self.latest or self.before < 0 or self.after < 0 or self.before > self.earliest:
            raise ValueError(f"no piece satisfies {self}")


@dataclass(frozen=True)
class Piece:
    """pcm: float32 (S,) that begins `offset` seconds into the recording. From `start` to `end` it is this piece's own.

    release: to be called when `pcm` is no longer looked at, where its memory belongs to somebody else.
    """

    pcm: NDArray[np.float32]
    offset: float
    start: float
    end: float
    release: Callable[[], None] = lambda: None


def cut_pieces(audio: Iterable[NDArray[np.float32]], rule: CutRule) -> Iterator[Piece]:
    """Cut a decoded recording (float32 (S,) arrays, 24 kHz) at its pauses. Holds one piece's audio.

    The first piece starts at 0, the last one's `end` is infinite, and in between each starts where the one before ends.
    """
    before, after = round(rule.before * SAMPLE_RATE), round(rule.after * SAMPLE_RATE)
    earliest, latest = round(rule.earliest * SAMPLE_RATE), round(rule.latest * SAMPLE_RATE)
    held: NDArray[np.float32] = np.zeros(0, np.float32)
    waiting: list[NDArray[np.float32]] = []
    waiting_samples = 0
    first = 0  # sample of the recording at held[0]
    start = 0  # sample of the recording at which the current piece's own audio begins
    for pcm in audio:
        waiting.append(pcm)
        waiting_samples += len(pcm)
        if first + len(held) + waiting_samples < start + latest + after:
            continue
        held, waiting, waiting_samples = np.concatenate([held, *waiting]), [], 0
        while first + len(held) >= start + latest + after:
            own = start - first
            end = start + earliest + find_pause(held[own + earliest : own + latest])
            yield Piece(held[: end + after - first].copy(), first / SAMPLE_RATE, start / SAMPLE_RATE, end / SAMPLE_RATE)
            start = end
            kept_from = max(0, start - before)
            held = held[kept_from - first :]
            first = kept_from
    held = np.concatenate([held, *waiting])
    if first + len(held) > start or not start:
        yield Piece(held, first / SAMPLE_RATE, start / SAMPLE_RATE, float("inf"))


def find_pause(pcm: NDArray[np.float32]) -> int:
    """The best sample to cut at: in the middle of the longest pause, or where it is quietest. pcm: float32 (S,)."""
    blocks = len(pcm) // _BLOCK
    if blocks < 2:
        return len(pcm) // 2
    power = np.mean(pcm[: blocks * _BLOCK].reshape(blocks, _BLOCK) ** 2, axis=1, dtype=np.float64)
    level = 10 * np.log10(power + 1e-10)
    quiet = level <= np.percentile(level, 10) + _QUIET_DB
    edges = np.flatnonzero(np.diff(np.concatenate([[False], quiet, [False]]).astype(np.int8)))
    starts, ends = edges[::2], edges[1::2]
    lengths = np.minimum(ends - starts, round(_LONGEST_USEFUL_PAUSE_SECONDS * SAMPLE_RATE / _BLOCK))
    best = int(np.argmax(lengths))  # of equals the first: the sooner a piece ends, the sooner it can run
    if lengths[best] * _BLOCK >= _PAUSE_SECONDS * SAMPLE_RATE and not quiet.all():
        return int(starts[best] + ends[best]) * _BLOCK // 2
    width = min(_SMOOTH_BLOCKS, blocks)
    smooth = np.convolve(power, np.full(width, 1 / width), "valid")
    return (int(np.argmin(smooth)) * 2 + width) * _BLOCK // 2
