"""Word times of a clip whose engine does not tell them, from another reading of the same words whose times are known.

Dynamic time warping between the log-mel spectra of the two: both say the same sounds in the same order. espeak-ng gives the
reading with known times, in any language.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from training.voices import RATE, Clip, Timed, sounding

HOP = RATE // 100
"""10 ms."""
_WINDOW = 2 * HOP
_BANDS = 40


def log_mel(samples: NDArray[np.float32]) -> NDArray[np.float32]:
    """(T, bands), one row per 10 ms, each band with the mean of the clip taken off."""
    count = max(1, (len(samples) - _WINDOW) // HOP + 1)
    padded = np.pad(samples, (0, max(0, _WINDOW - len(samples))))
    frames = np.lib.stride_tricks.sliding_window_view(padded, _WINDOW)[::HOP][:count] * np.hanning(_WINDOW)
    power = np.abs(np.fft.rfft(frames, 512)) ** 2
    mel = np.log(power @ _filters() + 1e-6)
    return np.asarray((mel - mel.mean(0)) / (mel.std() + 1e-6), np.float32)


def _filters() -> NDArray[np.float64]:
    """Triangles on the mel scale from 80 Hz to 7 kHz: (bins, bands)."""
    low, high = 1_127 * np.log1p(80 / 700), 1_127 * np.log1p(7_000 / 700)
    edges = 700 * np.expm1(np.linspace(low, high, _BANDS + 2) / 1_127)
    bins = np.arange(257) * RATE / 512
    rise = (bins[:, None] - edges[:-2]) / (edges[1:-1] - edges[:-2])
    fall = (edges[2:] - bins[:, None]) / (edges[2:] - edges[1:-1])
    return np.clip(np.minimum(rise, fall), 0, None)


def warp(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.int64]:
    """For each row of a (T, D) the row of b (U, D) on the cheapest path; steps that repeat a row cost a little more."""
    cost = ((a[:, None] - b[None]) ** 2).sum(-1)
    rows, columns = cost.shape
    best = np.full((rows + 1, columns + 1), np.inf)
    best[0, 0] = 0
    for diagonal in range(2, rows + columns + 1):
        i = np.arange(max(1, diagonal - columns), min(rows, diagonal - 1) + 1)
        j = diagonal - i
        here = cost[i - 1, j - 1]
        best[i, j] = np.minimum(best[i - 1, j - 1] + here, np.minimum(best[i - 1, j], best[i, j - 1]) + 1.2 * here)
    path = np.zeros(rows, np.int64)
    i, j = rows, columns
    while i > 0 and j > 0:
        path[i - 1] = j - 1
        step = int(np.argmin([best[i - 1, j - 1], best[i - 1, j], best[i, j - 1]]))
        i, j = i - (step != 2), j - (step != 1)
    return path


class Reading(NamedTuple):
    """What `align` needs of a reading: its spectrum, one row per 10 ms from the first word's start, and each word's first
    row.
    """

    mel: NDArray[np.float32]
    words: tuple[str, ...]
    rows: tuple[int, ...]


def reading_of(clip: Clip) -> Reading:
    """Of a clip with known times."""
    begin, end = clip.words[0].start, clip.words[-1].end
    mel = log_mel(clip.samples[int(begin * RATE) : int(end * RATE)])
    rows = [min(len(mel) - 1, round((word.start - begin) * 100)) for word in clip.words]
    return Reading(mel, tuple(word.text for word in clip.words), tuple(rows))


def joined(readings: Sequence[Reading]) -> Reading:
    """Readings one after the other, as one."""
    offsets = np.cumsum([0, *(len(reading.mel) for reading in readings)])
    rows = [int(offset) + row for offset, reading in zip(offsets, readings, strict=False) for row in reading.rows]
    return Reading(np.concatenate([r.mel for r in readings]), tuple(w for r in readings for w in r.words), tuple(rows))


def align(clip: Clip, reading: Reading) -> Clip:
    """The clip with the times of the reading's words carried over to it."""
    first, last = sounding(clip.samples, RATE)
    edges = [first]
    if len(reading.words) > 1:
        path = warp(reading.mel, log_mel(clip.samples[int(first * RATE) : int(last * RATE)]))
        for row in reading.rows[1:]:
            edges.append(max(edges[-1] + 0.02, first + float(path[row]) / 100))
    edges.append(max(last, edges[-1] + 0.02))
    words = tuple(Timed(w, a, b) for w, a, b in zip(reading.words, edges, edges[1:], strict=False))
    return Clip(clip.samples, clip.text, words, clip.voice, clip.language)
