"""A language in which every word is a level: exact speech for a recogniser without a model. Knows no real audio.

A word is a stretch of constant amplitude, its number in hundredths; silence lies between words. The recogniser reads the
levels off, so what must come out, and when, is known to the sample.
"""

import threading
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from moshi_stt.constants import SAMPLE_RATE
from moshi_stt.engine.recogniser import RECOGNISER_RATE, Hypothesis, Span, Spoken

WORD_SECONDS = 0.3
GAP_SECONDS = 0.1
SHORTEST_WORD = 0.1
"""Less of a word than this is not heard."""


def say(numbers: Sequence[int], *, gap: float = GAP_SECONDS, word: float = WORD_SECONDS) -> NDArray[np.float32]:
    """float32 (S,) at 24 kHz: a gap, then each word and a gap."""
    silence = np.zeros(round(gap * SAMPLE_RATE), np.float32)
    pieces = [silence]
    for number in numbers:
        pieces += [np.full(round(word * SAMPLE_RATE), number / 100, np.float32), silence]
    return np.concatenate(pieces)


def pause(seconds: float) -> NDArray[np.float32]:
    return np.zeros(round(seconds * SAMPLE_RATE), np.float32)


class LevelRecogniser:
    """Hears levels. `gate` holds calls until it is set."""

    name = "levels"
    languages: tuple[str, ...] = ("en",)

    def __init__(self) -> None:
        self.notes: dict[str, str] = {}
        self.calls = 0
        self.gate = threading.Event()
        self.gate.set()
        self.poison: int | None = None
        """A word at which recognition raises."""
        self.broken = False
        self.hanging: Literal["no", "once", "always"] = "no"
        self.closed = False
        self.lock = threading.Lock()
        self._let_go = threading.Event()

    def hang(self, *, always: bool = False) -> None:
        """Let the next call, or all of them, wait until `let_go`."""
        self.hanging = "always" if always else "once"
        self._let_go.clear()

    def let_go(self) -> None:
        self.hanging = "no"
        self._let_go.set()

    def sample(self) -> NDArray[np.float32]:
        return np.full(RECOGNISER_RATE // 2, 0.5, np.float32)

    def vad_start(self) -> int:
        return 0

    def speech_probability(self, frame: NDArray[np.float32], state: int) -> tuple[float, int]:
        return (1.0 if np.abs(frame).max() > 0.005 else 0.0), state + 1

    def memory(self) -> list[NDArray[np.float32]]:
        return []

    def recognise(
        self,
        samples: NDArray[np.float32],
        said: Sequence[Spoken] = (),
        draft: Sequence[Spoken] = (),
        said_seconds: float = 0.0,
        memory: list[NDArray[np.float32]] | None = None,
    ) -> Hypothesis:
        for earlier in memory or []:
            shared = min(len(earlier), len(samples))
            assert np.array_equal(earlier[:shared], samples[:shared]), "this memory is of other samples"
        if memory is not None:
            memory[:] = [samples.copy()]
        assert self.gate.wait(120)
        if self.hanging != "no":
            self.hanging = "no" if self.hanging == "once" else "always"
            assert self._let_go.wait(120)
        with self.lock:
            self.calls += 1
        heard = [number for number, _, _ in _runs(samples)]
        if self.broken or (self.poison in heard):
            raise RuntimeError("cannot hear this")
        return Hypothesis([Spoken(f"w{number}.", (number,), -0.01) for number in heard[len(said) :]])

    def align(self, samples: NDArray[np.float32], texts: Sequence[str], needed: int | None = None) -> list[Span]:
        spans = [Span(start, stop) for _, start, stop in _runs(samples)]
        assert len(spans) >= len(texts), (len(spans), texts)
        return spans[: len(texts) if needed is None else needed]

    def close(self) -> None:
        self.closed = True


def _runs(samples: NDArray[np.float32]) -> list[tuple[int, float, float]]:
    """(number, start, stop) of each word in samples at 16 kHz."""
    numbers = np.rint(np.abs(samples) * 100).astype(int)
    runs: list[tuple[int, float, float]] = []
    loud = np.flatnonzero(np.diff(np.concatenate([[0], (numbers > 0).astype(int), [0]])))
    for start, stop in zip(loud[::2].tolist(), loud[1::2].tolist(), strict=True):
        if stop - start >= SHORTEST_WORD * RECOGNISER_RATE:
            number = int(np.median(numbers[start:stop]))
            runs.append((number, start / RECOGNISER_RATE, stop / RECOGNISER_RATE))
    return runs
