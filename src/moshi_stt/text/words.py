"""Token ids, one a step, to words with times: contract section 5.6 with flaws F11 and F12 mended. Knows no model and no clock.

A pure function of the token list and the delay. Token 0 says that a word starts at the next position, token 3 is
padding, everything else is a piece of the word under way. Where this differs from the Rust server:

* F12: there a word that follows another without a 0 between them starts where the other started, and the other never
  ends. Here the missing boundary is put where the 0 would have been, one position before the first piece of the second
  word: the first word ends there and the second starts there.
* F11: there a word is lost if nothing follows its last piece. `flush` emits it; `finish` also ends the last word.
"""

from collections.abc import Callable, Sequence
from typing import Final

from moshi_stt.constants import FRAME_RATE
from moshi_stt.events import EndWord, Word

BOUNDARY: Final = 0
PAD: Final = 3
LAST_WORD_SECONDS: Final = 1.0
"""Length of a stream's last word when no boundary ends it, as in Kyutai's own file script (contract section 7.2)."""

_NOTHING: Final[tuple[Word | EndWord, ...]] = ()


class WordAssembler:
    """The words of one stream."""

    def __init__(self, decode: Callable[[Sequence[int]], str], delay_frames: int) -> None:
        """decode: ids of one word to its text. delay_frames: `asr_delay_in_tokens`."""
        self._decode = decode
        self._delay = delay_frames
        self.steps = 0
        """Tokens pushed: the local counter `s` of the contract."""
        self._hears_from = delay_frames
        """Tokens of earlier steps are no text."""
        self._ids: list[int] = []
        self._logprob = 0.0
        self._start = 0.0
        """Where the next word starts: the boundary before it."""
        self._unended = False
        """Whether a word was emitted and its end was not."""
        self._word_start = 0.0
        self._word_closed = 0.0
        """When that word started, and the time of the token that closed it."""
        self._announced = False
        """Whether the last token was a boundary: a word starts at the next."""

    @property
    def under_way(self) -> bool:
        """Whether a word has begun, or is about to, that was not emitted yet."""
        return self._announced or bool(self._ids)

    def push(self, token: int, logprob: float = 0.0) -> Sequence[Word | EndWord]:
        """Take the next step's token and its natural-log probability; return what it completes."""
        self.steps = step = self.steps + 1
        if step < self._hears_from:
            return _NOTHING
        if token == PAD:
            self._announced = False
            return (self._close(),) if self._ids else _NOTHING
        if token == BOUNDARY:
            self._announced = True
            events: list[Word | EndWord] = [self._close()] if self._ids else []
            return self._bound(step, events)
        self._announced = False
        if self._ids or not self._unended:
            events = []
        else:
            events = self._bound(step - 1, [])  # F12: the boundary that the model left out
        self._ids.append(token)
        self._logprob += logprob
        return events

    def flush(self) -> Sequence[Word | EndWord]:
        """Emit the word under way as it is; later pieces make a word of their own."""
        self._announced = False
        return (self._close(),) if self._ids else _NOTHING

    def finish(self, audio_seconds: float) -> Sequence[Word | EndWord]:
        """Nothing follows: emit the word under way and the end of the last word, which is within the audio's length."""
        events = list(self.flush())
        if self._unended:
            self._unended = False
            stop = max(self._word_closed, self._word_start + LAST_WORD_SECONDS)
            events.append(EndWord(max(self._word_start, min(stop, audio_seconds))))
        return events

    def copy(self) -> "WordAssembler":
        """An assembler in the same state that goes its own way."""
        other = WordAssembler(self._decode, self._delay)
        other.__dict__.update(self.__dict__)
        other._ids = self._ids.copy()
        return other

    def rewind(self, steps: int) -> None:
        """Count on from `steps` again, taking the tokens up to the present step as heard: they are no text a second time."""
        self._hears_from = max(self._hears_from, self.steps + 1)
        self.steps = steps

    def _close(self) -> Word:
        word = Word(self._decode(self._ids), self._start, self._logprob)
        self._word_start = self._start
        self._word_closed = self._time(self.steps)
        self._unended = True
        self._ids.clear()
        self._logprob = 0.0
        return word

    def _bound(self, step: int, events: list[Word | EndWord]) -> list[Word | EndWord]:
        self._start = self._time(step)
        if self._unended:
            self._unended = False
            events.append(EndWord(self._start))
        return events

    def _time(self, step: int) -> float:
        """Seconds: an integer difference, then one division, as the wire's values are made."""
        return (step - self._delay) / FRAME_RATE
