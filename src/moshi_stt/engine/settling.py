"""Which words of a growing segment may be sent: those that the recogniser will most likely still hear when the segment is over.

The recogniser changes its mind about the end of what it heard. A word's chance to stay grows with its own probability, with
that of the words after it, and with how long and how often hypotheses have agreed on it. `chance` is a logistic regression on
these, fitted to hypotheses about real speech.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from moshi_stt.engine.recogniser import RECOGNISER_RATE, Spoken

LOWEST_LOGPROB = -3.0
MOST_AGREEMENTS = 4
LONGEST_SECONDS = 1.0
"""Where each of the measures stops counting."""

WEIGHTS: Final = (4.36, -3.70, 1.07, 0.65, 1.37, -0.38, -2.00)
"""Of `measures`, in their order."""


@dataclass
class Standing:
    """A word of the latest hypothesis that is not sent yet. since: the position up to which the first that had it was made."""

    word: Spoken
    since: int
    count: int = 1
    """Hypotheses in a row that agree on it and on all words before it."""


def measures(partial: Sequence[Standing], index: int, now: int, *, pause: bool) -> tuple[float, ...]:
    """What tells whether the word at `index` stays, at position `now` (samples at 16 kHz)."""
    standing = partial[index]
    doubt = math.sqrt(-max(standing.word.logprob, LOWEST_LOGPROB))
    following = [-max(after.word.logprob, LOWEST_LOGPROB) for after in partial[index + 1 : index + 3]]
    seconds = min((now - standing.since) / RECOGNISER_RATE, LONGEST_SECONDS)
    agreements = float(min(standing.count, MOST_AGREEMENTS) - 1)
    return 1.0, doubt, agreements, seconds, float(pause), math.sqrt(max(following, default=0.0)), doubt * seconds


def chance(partial: Sequence[Standing], index: int, now: int, *, pause: bool) -> float:
    """Probability in (0, 1) that the word at `index` stays if those before it do."""
    values = measures(partial, index, now, pause=pause)
    return 1.0 / (1.0 + math.exp(-sum(weight * value for weight, value in zip(WEIGHTS, values, strict=True))))


def follow(partial: Sequence[Standing], words: Sequence[Spoken], now: int) -> list[Standing]:
    """The standing of a new hypothesis's words, after the last one's."""
    agreed = agreeing([standing.word for standing in partial], words)
    kept = [Standing(word, old.since, old.count + 1) for word, old in zip(words, partial[:agreed], strict=False)]
    return kept + [Standing(word, now) for word in words[agreed:]]


def agreeing(earlier: Sequence[Spoken], later: Sequence[Spoken]) -> int:
    """How many words two hypotheses have in common at their start, case and punctuation aside."""
    count = 0
    for one, other in zip(earlier, later, strict=False):
        if bare(one.text) != bare(other.text):
            break
        count += 1
    return count


def bare(text: str) -> str:
    """The letters and digits of a word, without case."""
    return "".join(letter for letter in text.casefold() if letter.isalnum())


@dataclass(frozen=True)
class LoopSettings:
    """From how many repetitions on a phrase of so many words is a decoder's loop rather than speech."""

    word: int = 5
    pair: int = 4
    phrase: int = 3
    longest_phrase: int = 12
    twice: int = 3
    """A phrase of so many words or more that is said twice running"""
    fastest: float = 6.0
    """by somebody who would have to say so many words in a second of speech, was said once."""


def loop_start(texts: Sequence[str], settings: LoopSettings, repetitions: int = 0) -> int | None:
    """Where the first phrase begins that is repeated at once, again and again, in a list of bare words; None without one.

    repetitions: where not 0, so many make a loop of any phrase of three words or more.
    """
    for start in range(len(texts)):
        for length in range(1, min(settings.longest_phrase, (len(texts) - start) // 2) + 1):
            wanted = settings.word if length == 1 else settings.pair if length == 2 else repetitions or settings.phrase
            phrase = texts[start : start + length]
            count = 1
            while texts[start + count * length : start + (count + 1) * length] == phrase:
                count += 1
            if count >= wanted:
                return start
    return None


def said_again(texts: Sequence[str], start: int, settings: LoopSettings) -> int:
    """Where in a list of bare words, from `start` on, the phrase before it begins again; its length where none does."""
    for second in range(max(start, settings.twice), len(texts) - settings.twice + 1):
        for length in range(settings.twice, min(settings.longest_phrase, second, len(texts) - second) + 1):
            if texts[second - length : second] == texts[second : second + length]:
                return second
    return len(texts)
