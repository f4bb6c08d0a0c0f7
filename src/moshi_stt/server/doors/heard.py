"""What one stream has said so far, for the sessions of other protocols: words with their ends, and how far it is heard."""

import math
from collections import deque

from moshi_stt.constants import FRAME_SECONDS
from moshi_stt.events import AnyEvent, EndWord, Pause, Word
from moshi_stt.text.subtitles import UNKNOWN_WORD_SECONDS, TimedWord


class Heard:
    """Words and pauses of one stream. `words` holds what nobody has taken yet, in order."""

    def __init__(self) -> None:
        self.words: deque[TimedWord] = deque()
        self.settled = 0.0
        """No word that starts before this comes any more."""
        self.time = 0.0
        self.silence = math.inf
        """Seconds since somebody spoke, by the pause source."""
        self.heads: tuple[float, ...] = ()
        self.last_end = 0.0
        """Where the latest word ended, as far as it is known."""
        self.has_words = False
        self._open = False

    def take(self, event: AnyEvent) -> None:
        """The stream's next event."""
        if type(event) is Pause:
            self.time, self.settled = event.time, max(self.settled, event.settled)
            self.silence, self.heads = event.silence, event.heads
            if self.has_words:  # a word is speech, also where the pause source heard none
                self.silence = min(self.silence, max(0.0, self.time - self.last_end))
        elif type(event) is Word:
            self._word(event)
        elif type(event) is EndWord and self._open:
            self._open = False
            self._end(event.stop_time)

    def settle(self, time: float) -> None:
        """A marker at `time` has come back."""
        self.settled = max(self.settled, time)

    @property
    def word_gap(self) -> float:
        """Seconds of settled audio after the latest word."""
        return max(0.0, self.settled - self.last_end)

    @property
    def caught_up(self) -> bool:
        """Whether every word of the speech that was heard has come."""
        return self.settled >= self.time - self.silence - FRAME_SECONDS / 2

    @property
    def gap(self) -> float:
        """Seconds of silence after the latest word, by the words and by the pause source; 0.0 where more words may come."""
        return max(0.0, min(self.word_gap, self.silence)) if self.caught_up else 0.0

    def _word(self, event: Word) -> None:
        self.has_words = True
        if self._open and self.words:  # its end was left out
            self._end(min(self.words[-1].end, event.start_time))
        logprob = None if event.confidence is None else math.log(max(event.confidence, 1e-30))
        end = event.start_time + UNKNOWN_WORD_SECONDS
        self.words.append(TimedWord(event.text, event.start_time, end, logprob))
        self._open = True
        self.last_end = max(self.last_end, event.start_time + FRAME_SECONDS, min(end, self.settled))

    def _end(self, stop: float) -> None:
        self.last_end = stop
        if self.words:
            last = self.words[-1]
            self.words[-1] = last._replace(end=max(stop, last.start + 0.001))


def confidence(word: TimedWord) -> float:
    """In [0, 1]."""
    return 1.0 if word.logprob is None else min(1.0, max(0.0, math.exp(word.logprob)))


def mean_confidence(words: list[TimedWord]) -> float:
    """0.0 for no words."""
    return round(sum(map(confidence, words)) / len(words), 4) if words else 0.0
