"""What `SegmentEngine` asks of a recogniser that wants whole stretches of speech. Knows no model and no stream."""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

RECOGNISER_RATE = 16_000
"""Samples a second of everything a `Recogniser` takes (mono float32)."""

VAD_FRAME = 512
"""Samples in one frame of `Recogniser.speech_probability`: 32 ms."""


class Spoken(NamedTuple):
    """One recognised word.

    text: as written, with its case and punctuation. tokens: what the model emitted for it.
    logprob: natural-log probability, summed over the tokens.
    """

    text: str
    tokens: tuple[int, ...]
    logprob: float


class Hypothesis(NamedTuple):
    """What was said, as far as it can be told.

    whole: whether the model came to an end by itself, rather than being stopped where it said more than anybody can.
    """

    words: list[Spoken]
    whole: bool = True


class Span(NamedTuple):
    """When a word was said: seconds from the start of the samples given."""

    start: float
    stop: float


VadState = Any
"""State of the speech detector between two frames of a stream: immutable, and the recogniser's own affair."""


Memory = Any
"""What a recogniser keeps of a stretch of audio that grows: mutable, of one stream, and the recogniser's own affair."""


class Recogniser(Protocol):
    """A loaded model, shared by all streams. Every method may be called from several threads at once.

    A result depends on its arguments alone; `memory` changes what it costs.
    """

    name: str
    languages: tuple[str, ...]
    notes: dict[str, str]
    """What a user should know, for the start-up log."""

    def sample(self) -> NDArray[np.float32]:
        """Some seconds of speech, float32 (S,): to warm up, to measure, and to tell whether the model still works."""
        ...

    def vad_start(self) -> VadState:
        """The detector's state before the first frame."""
        ...

    def speech_probability(self, frame: NDArray[np.float32], state: VadState) -> tuple[float, VadState]:
        """Probability in [0, 1] that `frame`, float32 (VAD_FRAME,), holds speech; and the state for the next frame."""
        ...

    def memory(self) -> Memory:
        """For `recognise`: of a stretch of audio of which nothing was heard yet."""
        ...

    def recognise(
        self,
        samples: NDArray[np.float32],
        said: Sequence[Spoken] = (),
        draft: Sequence[Spoken] = (),
        said_seconds: float = 0.0,
        memory: Memory | None = None,
    ) -> Hypothesis:
        """The words of samples, float32 (S,) of at most 30 s, that follow `said`.

        said: words at the start of the samples that are settled: the result continues them. said_seconds: where they end.
        draft: a guess of what follows (an earlier hypothesis); it saves time where it is right, and leads nowhere else.
        memory: of calls with the same samples, or a part of them from the start: saves time. None: there were none.
        Raises whatever the model's framework raises.
        """
        ...

    def align(self, samples: NDArray[np.float32], texts: Sequence[str], needed: int | None = None) -> list[Span]:
        """When each of these words was said within samples, float32 (S,).

        needed: how many of the spans are wanted, None for all. The words behind them only say what else is in the audio, as far
        as they are right. Spans lie inside the samples and do not overlap; a word that cannot be placed gets a guess.
        """
        ...

    def close(self) -> None:
        """Free the memory."""
        ...
