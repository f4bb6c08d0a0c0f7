"""Whether words were spoken, or invented by a recogniser that hears noise.

Two questions, two measures. Does a segment hold speech at all: the best stretch of the detector's probabilities and the
recogniser's own probability, for music, noise and clicks that set in. Was a word heard right: its own probability and that of
the words around it, for speech that drowns in noise or in other voices, where a recogniser does not fall silent but goes on
fluently. `benchmarks/bench_embedded_sounds.py` measures both; docs/internals/embedded.md has the figures.
"""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from moshi_stt.engine.recogniser import Spoken
from moshi_stt.engine.settling import bare

STRETCH_FRAMES = 6
"""0.2 s: the shortest words last so long."""

PHANTOMS: Final = frozenset({"you", "thank you", "thank you for watching", "thanks for watching", "bye", "so", "the"})
"""What the recogniser says of noise more often than people say it alone: these need better evidence."""

LAST_LATIN: Final = "\u024f"
"""Letters after this are of other scripts, which nobody reads out in English."""

LOWEST_LOGPROB = -4.0


@dataclass(frozen=True)
class EvidenceSettings:
    """Bounds of the measures."""

    heard: float = 0.4
    """A segment whose best stretch is below this is not recognised at all."""
    logprob_weight: float = 0.3
    speech: float = 0.4
    """Words are sent of a segment whose best stretch, and its mean log-probability a token times the weight, reach this,"""
    phantom: float = 0.65
    """or this where they are among the PHANTOMS."""
    left_out: float = 0.3
    """A word of a confidence below this is left out, where at least so many words stand around it:"""
    fewest_neighbours: int = 3
    passage: float = 0.5
    """In a passage whose words have a mean confidence below this, a word"""
    passage_left_out: float = 0.8
    """below this is left out as well."""
    passage_repeated: float = 0.7
    """In one whose mean is below this, a word that repeats what has just been said is left out."""


@dataclass
class Evidence:
    """What the detector heard of one segment."""

    best: float = 0.0
    """The best mean probability of STRETCH_FRAMES frames in a row."""
    _latest: deque[float] = field(default_factory=lambda: deque([0.0] * STRETCH_FRAMES, STRETCH_FRAMES))

    def hear(self, probability: float) -> None:
        self._latest.append(probability)
        self.best = max(self.best, sum(self._latest) / STRETCH_FRAMES)

    def supports(self, words: Sequence[Spoken], settings: EvidenceSettings) -> bool:
        """Whether these words, all that a segment holds so far, may have been spoken."""
        tokens = sum(len(word.tokens) for word in words)
        if not tokens or any(letter.isalpha() and letter > LAST_LATIN for word in words for letter in word.text):
            return False
        score = self.best + settings.logprob_weight * sum(word.logprob for word in words) / tokens
        phantom = " ".join(bare(word.text) for word in words) in PHANTOMS
        return score >= (settings.phantom if phantom else settings.speech)


KEPT_WORDS, FOLLOWING_WORDS = 6, 2
"""A word's neighbours: so many before it and after it."""

ABSENT_WORDS = 2
"""So many more count as certain, so that a lone word is judged by itself."""

PASSAGE_WORDS, PASSAGE_PRIOR = 24, (4, 0.8)
"""A passage is so many words; at its start so many more count, of this confidence."""

FORGET_SECONDS = 5.0
"""Words that ended earlier say nothing about the next."""

LONGEST_REPEAT = 16
CERTAINTY, OWN, NEIGHBOURS = 6.3, 2.97, 5.41
"""Of the logistic regression: constant, and weights of the doubts."""


class Judgement(NamedTuple):
    """What is thought of a word. confidence: probability in (0, 1) that it was said."""

    confidence: float
    left_out: bool


class Plausibility:
    """How right the words of one stream are likely to be."""

    def __init__(self, settings: EvidenceSettings) -> None:
        self._settings = settings
        self._texts: deque[str] = deque(maxlen=2 * LONGEST_REPEAT)
        self._doubts: deque[float] = deque(maxlen=KEPT_WORDS)
        self._passage: deque[float] = deque(maxlen=PASSAGE_WORDS)
        self._last_stop = 0.0

    def judge(self, words: Sequence[Spoken], start_seconds: float, stop_seconds: float) -> Judgement:
        """What to think of the first of these words. It is a neighbour of the next, whether it is left out or not.

        words: that word and what follows it. start_seconds, stop_seconds: when it was said, in the stream's time.
        """
        if start_seconds - self._last_stop > FORGET_SECONDS:
            for kept in (self._texts, self._doubts, self._passage):
                kept.clear()
        word, settings = words[0], self._settings
        around = [*self._doubts, *(_doubt(after) for after in words[1 : 1 + FOLLOWING_WORDS])]
        neighbours = math.sqrt(min(-LOWEST_LOGPROB, sum(around) / (len(around) + ABSENT_WORDS)))
        own = math.sqrt(min(-LOWEST_LOGPROB, -word.logprob))
        confidence = 1.0 / (1.0 + math.exp(OWN * own + NEIGHBOURS * neighbours - CERTAINTY))
        count, prior = PASSAGE_PRIOR
        passage = (sum(self._passage) + count * prior) / (len(self._passage) + count)
        left_out = confidence < settings.left_out and len(around) >= settings.fewest_neighbours
        self._last_stop = stop_seconds
        self._texts.append(bare(word.text))
        repeated = repeats(list(self._texts))
        left_out |= confidence < settings.passage_left_out and passage < settings.passage
        left_out |= repeated and passage < settings.passage_repeated
        self._passage.append(confidence)
        if not repeated:
            self._doubts.append(_doubt(word))
        return Judgement(confidence, left_out)


def repeats(texts: Sequence[str]) -> bool:
    """Whether the last three words have just been said: a decoder is sure of what it repeats, so that proves nothing."""
    last = texts[-3:]
    return len(texts) > 3 and any(
        last == texts[-3 - back : -back] for back in range(3, min(LONGEST_REPEAT, len(texts) - 3) + 1)
    )


def _doubt(word: Spoken) -> float:
    """Of a token of the word, on average: its log-probability without the sign."""
    return -word.logprob / max(1, len(word.tokens))
