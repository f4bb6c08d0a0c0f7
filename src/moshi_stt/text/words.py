"""Token ids, one a step, to words with times: contract section 5.6 with flaws F11 and F12 mended. Knows no model and no clock.

A pure function of the token list and the delay. Token 0 says that a word starts at the next position, token 3 is
padding, everything else is a piece of the word under way. Where this differs from the Rust server:

* F12: there a word that follows another without a 0 between them starts where the other started, and the other never
  ends. Here the missing boundary is put where the 0 would have been, one position before the first piece of the second
  word: the first word ends there and the second starts there.
* F11: there a word is lost if nothing follows its last piece. `flush` emits it; `finish` also ends the last word.

`fork` and `join` let another token list run ahead of this one for a few steps (silence instead of what the client will send)
without saying a word twice.
"""

import math
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
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
"""A word of this list and one of a fork are the same when their first pieces are no further apart."""

WordEvent = Word | EndWord | Interim

_NOTHING: Final[tuple[WordEvent, ...]] = ()


@dataclass(slots=True)
class _Said:
    """A word that a fork emitted. step: of its first piece; ended: whether its `EndWord` went out, too."""

    step: int
    ended: bool = False


class WordAssembler:
    """The words of one stream."""

    __slots__ = (
        "_ahead",
        "_announced",
        "_confidence",
        "_decode",
        "_delay",
        "_ended_inherited",
        "_first_step",
        "_ids",
        "_interim",
        "_logprob",
        "_mute_end",
        "_own",
        "_start",
        "_unended",
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
        self._confidence = confidence
        self._interim = interim
        self._delay = delay_frames
        self.steps = 0
        """Tokens pushed: the local counter `s` of the contract."""
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
        self._mute_end = False
        """Whether a fork emitted the last word's end already."""
        self._ahead: list[_Said] = []
        """What forks emitted and this list has not reached yet."""
        self._own: list[_Said] | None = None
        """Of a fork: the words it came to, sent by it or by a fork before it."""
        self._ended_inherited = False
        """Of a fork: whether it ended the word that was the last when it began."""

    @property
    def under_way(self) -> bool:
        """Whether a word has begun, or is about to, that was not emitted yet."""
        return self._announced or bool(self._ids)

    @property
    def settled(self) -> float:
        """No word that starts before this many seconds of the stream is emitted any more."""
        heard = max(0.0, self._time(self.steps))
        return min(heard, max(0.0, self._start)) if self.under_way else heard

    def push(self, token: int, logprob: float = 0.0) -> Sequence[WordEvent]:
        """Take the next step's token and its natural-log probability; return what it completes."""
        self.steps = step = self.steps + 1
        if step < self._delay:
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
        if self._interim and not (self._ahead and self._is_said()):
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

    def fork(self) -> "WordAssembler":
        """An assembler in the same state, for tokens of another future."""
        other = copy(self)
        other._ids = self._ids.copy()
        other._ahead = [_Said(said.step, said.ended) for said in self._ahead]
        other._own, other._ended_inherited = [], False
        return other

    def join(self, fork: "WordAssembler") -> None:
        """What the fork emitted has been sent: do not emit the same words again when this list's tokens make them."""
        own = fork._own or []
        known = {said.step for said in own}
        recent = [s for s in self._ahead if s.step not in known and s.step > self.steps - SAME_WORD_STEPS]
        self._ahead = recent + own
        self._mute_end |= fork._ended_inherited

    def _close(self, events: list[WordEvent]) -> list[WordEvent]:
        """Emit the word under way, if there is one and no fork did."""
        if not self._ids:
            return events
        self._word_start = self._start
        self._word_closed = self._time(self.steps)
        self._unended = True
        said = self._find_said() if self._ahead else None
        self._mute_end = said is not None and said.ended
        if said is None:
            said = _Said(self._first_step)
            confidence = min(1.0, math.exp(self._logprob)) if self._confidence else None
            events.append(Word(self._decode(self._ids), self._start, confidence))
            for earlier in self._ahead:
                earlier.ended = True  # an end sent after this word would be taken for this word's
        if self._own is not None:
            self._own.append(said)
        self._ids.clear()
        self._logprob = 0.0
        return events

    def _is_said(self) -> bool:
        """Whether a fork emitted the word under way."""
        return any(abs(said.step - self._first_step) <= SAME_WORD_STEPS for said in self._ahead)

    def _find_said(self) -> _Said | None:
        """Take out the fork's word that is the one under way."""
        said = min(self._ahead, key=lambda said: abs(said.step - self._first_step))
        if abs(said.step - self._first_step) > SAME_WORD_STEPS:
            return None
        self._ahead.remove(said)
        return said

    def _bound(self, step: int, events: list[WordEvent]) -> list[WordEvent]:
        self._start = self._time(step)
        self._end(self._start, events)
        return events

    def _end(self, stop: float, events: list[WordEvent]) -> None:
        if self._unended and not self._mute_end:
            events.append(EndWord(stop))
            if self._own:
                self._own[-1].ended = True
            else:
                self._ended_inherited = True
        self._unended = self._mute_end = False

    def _time(self, step: int) -> float:
        """Seconds: an integer difference, then one division, as the wire's values are made."""
        return (step - self._delay) / FRAME_RATE
