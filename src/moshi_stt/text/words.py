"""Token ids, one a step, to words with times: contract section 5.6 with flaws F11 and F12 fixed.

A pure function of the token list and the delay. Token 0 says that a word starts at the next position, token 3 is
padding, everything else is a piece of the word under way. Where this differs from the Rust server:

* F12: there a word that follows another without a 0 between them starts where the other started, and the other never
  ends. Here the missing boundary is put where the 0 would have been, one position before the first piece of the second
  word: the first word ends there and the second starts there.
* F11: there a word is lost if nothing follows its last piece. `flush` emits it; `finish` also ends the last word.

`fork`, `join` and `restart` are for token lists that hear the same audio twice: see `Ledger`.
"""

import math
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, field
from typing import Final

from moshi_stt.constants import FRAME_RATE
from moshi_stt.events import EndWord, Interim, Word

BOUNDARY: Final = 0
PAD: Final = 3
LAST_WORD_SECONDS: Final = 1.0
"""Length of a stream's last word when no boundary ends it, as in Kyutai's own file script (contract section 7.2)."""
MOST_PIECES: Final = 4_096
"""A word of so many pieces (five minutes and a half) is emitted as it is: a model that babbles must not fill the memory."""
SAME_WORD_STEPS: Final = 3
"""Words of two token lists are the same word when their first pieces are no further apart."""

WordEvent = Word | EndWord | Interim

_NOTHING: Final[tuple[WordEvent, ...]] = ()


@dataclass(slots=True)
class _Emitted:
    """A word that a token list emitted. step: of its first piece; ended: whether its `EndWord` was emitted, too."""

    step: int
    ended: bool = False


@dataclass(slots=True)
class Ledger:
    """Which words of the audio that is being heard again have been emitted already.

    A stream has one only while it needs it: a fork always, its origin until it has reached what the fork emitted, and a list
    that was restarted until it has passed the last word that it had emitted.
    """

    ahead: list[_Emitted] = field(default_factory=list)
    """What forks emitted, and this list has not reached yet."""
    until: float = 0.0
    """Every word that starts before this time was emitted, and ended, before a restart."""
    mute_end: bool = False
    """Whether the last word's end was emitted by a fork or before a restart."""
    own: list[_Emitted] | None = None
    """Of a fork: the words it came to, emitted by it or by a fork before it."""
    ended_inherited: bool = False
    """Of a fork: whether it ended the word that was the last when it began."""

    def holds(self, step: int, start: float) -> bool:
        """Whether the word under way, of this first piece and start, was emitted."""
        return start < self.until or any(abs(word.step - step) <= SAME_WORD_STEPS for word in self.ahead)

    def take(self, step: int, start: float) -> _Emitted | None:
        """The word of this first piece and start, if it was emitted. It is asked for once."""
        if start < self.until:
            return _Emitted(step, ended=True)
        if not self.ahead:
            return None
        nearest = min(self.ahead, key=lambda word: abs(word.step - step))
        if abs(nearest.step - step) > SAME_WORD_STEPS:
            return None
        self.ahead.remove(nearest)
        return nearest

    def is_over(self, start: float) -> bool:
        """Whether it says nothing about words from this start on."""
        return self.own is None and not self.ahead and not self.mute_end and start >= self.until


class WordAssembler:
    """The words of one stream: `engine.backend.Words` for Kyutai's models."""

    __slots__ = (
        "_announced",
        "_confidence",
        "_decode",
        "_delay",
        "_first_step",
        "_ids",
        "_interim",
        "_ledger",
        "_logprob",
        "_start",
        "_unended",
        "_warm_step",
        "_word_closed",
        "_word_start",
        "steps",
    )

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        delay_frames: int,
        *,
        confidence: bool = False,
        interim: bool = False,
    ) -> None:
        """decode: ids of one word to its text. delay_frames: `asr_delay_in_tokens`.

        confidence: give each `Word` its probability. interim: also emit the word under way, an `Interim` for each piece.
        """
        self._decode = decode
        self._delay = delay_frames
        self._confidence = confidence
        self._interim = interim
        self.steps = 0
        """Tokens pushed: the local counter `s` of the contract."""
        self._warm_step = delay_frames
        """The first step whose token means anything."""
        self._ids: list[int] = []
        self._first_step = 0
        """Of the word under way."""
        self._logprob = 0.0
        self._start = 0.0
        """Where the next word starts: the boundary before it."""
        self._announced = False
        """Whether the last token was a boundary: a word starts at the next."""
        self._unended = False
        """Whether the last word's end is still to come."""
        self._word_start = 0.0
        self._word_closed = 0.0
        """When the last word started, and the time of the token that closed it."""
        self._ledger: Ledger | None = None

    @property
    def in_word(self) -> bool:
        """Whether a word has begun, or is about to, that was not emitted yet."""
        return self._announced or bool(self._ids)

    @property
    def settled(self) -> float:
        """No word that starts before this many seconds of the stream is emitted any more."""
        heard = max(0.0, self._time(self.steps))
        return min(heard, max(0.0, self._start)) if self.in_word else heard

    def push(self, token: int, logprob: float = 0.0) -> Sequence[WordEvent]:
        """Take the next step's token and its natural-log probability; return what it completes."""
        self.steps = step = self.steps + 1
        if step < self._warm_step:
            return _NOTHING
        if token == PAD:
            self._announced = False
            return self._close([]) if self._ids else _NOTHING
        if token == BOUNDARY:
            self._announced = True
            return self._bound(step, self._close([]))
        self._announced = False
        events: Sequence[WordEvent] = _NOTHING
        if not self._ids:
            self._first_step = step
            if self._unended:
                events = self._bound(step - 1, [])  # F12: the boundary that the model left out
        self._ids.append(token)
        self._logprob += logprob
        if len(self._ids) >= MOST_PIECES:
            return self._close(list(events))
        if self._interim and not (self._ledger is not None and self._ledger.holds(self._first_step, self._start)):
            return [*events, Interim(self._decode(self._ids), self._start)]
        return events

    def flush(self) -> Sequence[WordEvent]:
        """Emit the word under way as it is; later pieces make a word of their own."""
        self._announced = False
        return self._close([])

    def finish(self, audio_seconds: float) -> Sequence[WordEvent]:
        """Nothing follows: emit the word under way and the end of the last word, which is within the audio's length."""
        events = list(self.flush())
        stop = max(self._word_closed, self._word_start + LAST_WORD_SECONDS)
        self._end(max(self._word_start, min(stop, audio_seconds)), events)
        return events

    def restart(self, step: int) -> Sequence[WordEvent]:
        """The model starts again from a fresh state and hears the stream from that step on. See `engine.backend.Words`.

        A word is heard again a few steps earlier or later than the first time, so what starts before the middle of the last
        emitted word, or less than SAME_WORD_STEPS after its start, is that word or one before it.
        """
        events: list[WordEvent] = []
        self._end(max(self._word_start, self._word_closed), events)
        until = 0.0
        if self._word_closed:
            until = max((self._word_start + self._word_closed) / 2, self._word_start + SAME_WORD_STEPS / FRAME_RATE)
        if self._ledger is not None:
            emitted = [self._time(word.step + SAME_WORD_STEPS) for word in self._ledger.ahead]
            until = max([until, self._ledger.until, *emitted])
        self.steps, self._warm_step = step, step + self._delay
        self._announced = False
        self._ids.clear()
        self._logprob = 0.0
        self._start = self._time(self._warm_step)
        self._ledger = Ledger(until=until)
        return events

    def fork(self) -> "WordAssembler":
        """An assembler in the same state, for tokens of another future."""
        other = copy(self)
        other._ids = self._ids.copy()
        ledger = self._ledger or Ledger()
        other._ledger = Ledger([copy(word) for word in ledger.ahead], ledger.until, ledger.mute_end, own=[])
        return other

    def join(self, fork: "WordAssembler") -> None:
        """What the fork emitted has been sent: do not emit the same words again when this list's tokens make them."""
        forked = fork._ledger
        assert forked is not None
        assert forked.own is not None
        ledger = self._ledger or Ledger()
        known = {word.step for word in forked.own}
        recent = [word for word in ledger.ahead if word.step not in known and word.step > self.steps - SAME_WORD_STEPS]
        joined = Ledger(recent + forked.own, ledger.until, ledger.mute_end or forked.ended_inherited)
        self._ledger = None if joined.is_over(self._start) else joined

    def _close(self, events: list[WordEvent]) -> list[WordEvent]:
        """Emit the word under way, if there is one and it was not emitted."""
        if not self._ids:
            return events
        self._word_start = self._start
        self._word_closed = self._time(self.steps)
        self._unended = True
        ledger = self._ledger
        emitted = ledger.take(self._first_step, self._start) if ledger is not None else None
        if emitted is None:
            confidence = min(1.0, math.exp(self._logprob)) if self._confidence else None
            events.append(Word(self._decode(self._ids), self._start, confidence))
        if ledger is not None:
            ledger.mute_end = emitted is not None and emitted.ended
            if emitted is None:
                emitted = _Emitted(self._first_step)
                for earlier in ledger.ahead:
                    earlier.ended = True  # an end sent after this word would be taken for this word's
            if ledger.own is not None:
                ledger.own.append(emitted)
        self._ids.clear()
        self._logprob = 0.0
        return events

    def _bound(self, step: int, events: list[WordEvent]) -> list[WordEvent]:
        self._start = self._time(step)
        self._end(self._start, events)
        return events

    def _end(self, stop: float, events: list[WordEvent]) -> None:
        ledger = self._ledger
        if self._unended and not (ledger is not None and ledger.mute_end):
            events.append(EndWord(stop))
            if ledger is not None and ledger.own:
                ledger.own[-1].ended = True
            elif ledger is not None:
                ledger.ended_inherited = True
        self._unended = False
        if ledger is not None:
            ledger.mute_end = False
            if ledger.is_over(self._start):
                self._ledger = None

    def _time(self, step: int) -> float:
        """Seconds: an integer difference, then one division, as the wire's values are made."""
        return (step - self._delay) / FRAME_RATE
