"""What a client makes of the words that come: words with both times, and utterances."""

from typing import NamedTuple

from moshi_stt.events import EndOfTurn, EndWord, Marker, Word
from moshi_stt.text.subtitles import TimedWord, join_words, pair_words

PAUSE_SECONDS = 0.8
"""A silence so long between two words ends an utterance."""


class Utterance(NamedTuple):
    """What somebody says up to the next pause. Times in seconds."""

    text: str
    start: float
    end: float
    words: tuple[TimedWord, ...]


def timed(word: Word, after: Word | EndWord | Marker | EndOfTurn, earlier_seconds: float) -> TimedWord:
    """A word with its end, as the event after it tells it, and its times so much earlier."""
    (paired, *_) = pair_words([word, after])
    return paired._replace(start=max(0.0, paired.start - earlier_seconds), end=max(0.0, paired.end - earlier_seconds))


def utterance_of(words: list[TimedWord]) -> Utterance:
    """words: at least one."""
    return Utterance(join_words(words), words[0].start, words[-1].end, tuple(words))
