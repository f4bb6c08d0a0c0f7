"""One stream inside the batch engine: its commands in order, its next frame, its words and markers. Knows no model.

A lane is a state machine that the model thread drives: `absorb` what the client sent, `gather` the next row, `scatter` what
the model said of it. Its clock is `words.steps`, the frames of this stream alone since its last reset.

A mark is due `delay` frames after the audio before it. As long as the client's audio goes on, it is used, and the mark changes
nothing but that a `Marker` comes. Where the client's audio stops there is a *tail*: frames of silence of our own.

* finish: on the stream's own slot, nothing comes after it.
* reset with marks pending: on the stream's own slot, its state goes away anyway.
* nothing followed the mark for `marker_wait_seconds`: on a copy of the slot, so that the stream's own time and state stay as
  they are. The words found there are sent, and are not sent again when the stream itself gets there.
"""

import math
from collections import deque
from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moshi_stt.audio.framer import Framer
from moshi_stt.constants import FRAME_SAMPLES, SAMPLE_RATE
from moshi_stt.engine.commands import Audio, Command, Finish, Mark, Reset
from moshi_stt.engine.slots import Slot
from moshi_stt.engine.stream import Stream
from moshi_stt.engine.turns import PauseMeter
from moshi_stt.events import AnyEvent, Marker, Ready, Step
from moshi_stt.text.words import WordAssembler

HOLD_FRAMES = 12
"""A due marker waits so long for the word under way to end (about 1 s); then the word is cut."""


class PendingMark(NamedTuple):
    """id: the client's. due: the local step after which it is sent."""

    id: int
    due: int


class Tail:
    """Silence behind the last audio. words: who hears it; end: the local step after which it may end."""

    __slots__ = ("end", "fresh", "kind", "partial", "slot", "spare", "words")

    def __init__(
        self,
        kind: Literal["finish", "reset", "fork"],
        slot: int,
        words: WordAssembler,
        end: int,
        *,
        fresh: bool,
        partial: bool,
        spare: Slot | None = None,
    ) -> None:
        self.kind = kind
        self.slot = slot
        self.words = words
        self.end = end
        self.fresh = fresh
        self.partial = partial
        """Whether the stream's last, incomplete frame comes first."""
        self.spare = spare
        """The slot to give back."""


class Lane:
    """A stream and its slot. Everything but `slot` and `stream` belongs to the model thread."""

    __slots__ = (
        "answer",
        "answered",
        "arrived",
        "commands",
        "delay",
        "done",
        "framer",
        "frames",
        "fresh",
        "heard_at",
        "marks",
        "meter",
        "new_words",
        "row_fresh",
        "row_slot",
        "samples",
        "slot",
        "stream",
        "tail",
        "turn",
        "woken",
        "words",
    )

    def __init__(
        self,
        stream: Stream,
        slot: Slot,
        new_words: Callable[[], WordAssembler],
        delay_frames: int,
        meter: PauseMeter | None = None,
    ) -> None:
        """meter: makes the `Pause` events of a stream that asked for turns."""
        self.stream = stream
        self.slot = slot
        self.new_words = new_words
        self.delay = delay_frames
        self.meter = meter
        self.words = new_words()
        self.framer = Framer()
        self.commands: deque[Command] = deque()
        """Drained and not yet absorbed: what stands behind a reset, a finish, or a tail."""
        self.marks: deque[PendingMark] = deque()
        self.tail: Tail | None = None
        self.fresh = True
        """Whether the slot's state must be started from zero."""
        self.samples = 0
        """Samples absorbed since the last reset."""
        self.answered = -1
        """That count when everything before it had been answered by a tail on a copy."""
        self.answer = self.words
        """Who heard that tail."""
        self.heard_at = 0.0
        """time.monotonic() of the client's last audio or mark, or of the step that consumed it."""
        self.arrived = 0.0
        """When the last sample of the frame being stepped came."""
        self.frames = 0
        """Frames of client audio stepped in all."""
        self.row_slot = slot.index
        self.row_fresh = True
        """Of the row gathered last: the slot to step, and whether its state starts from zero."""
        self.turn = 0
        """Engine step in which this lane last took part."""
        self.done = False
        """Whether the last event has been made."""
        self.woken = False

    # ---- commands ----------------------------------------------------------------------------------------------------

    def absorb(self, now: float) -> list[AnyEvent]:
        """Take the stream's commands as far as they can be acted on now; return what they answer at once."""
        commands = self.commands
        commands.extend(self.stream.drain())
        events: list[AnyEvent] = []
        while commands and self.tail is None and not self.done:
            command = commands[0]
            if isinstance(command, Audio):
                self.heard_at = now if command.arrived is None else command.arrived
                self.framer.push(command.samples, self.heard_at)
                self.samples += len(command.samples)
            elif isinstance(command, Mark):
                self._mark(command.id, now, events)
            elif self.framer.frames:
                break  # a reset or the end: the audio before it first
            elif isinstance(command, Finish):
                self._finish(events)
            elif not self._reset(command, events):
                break
            commands.popleft()
        return events

    def _mark(self, id: int, now: float, events: list[AnyEvent]) -> None:
        self.heard_at = now
        if self.samples == self.answered:
            events.append(Marker(id))
        else:
            self.marks.append(PendingMark(id, math.ceil(self.samples / FRAME_SAMPLES) + self.delay))

    def _finish(self, events: list[AnyEvent]) -> None:
        if self.samples in (0, self.answered):
            self._end(self.answer if self.samples else self.words, events)
        else:
            self._start_tail("finish", self.slot.index, self.words)

    def _reset(self, command: Reset, events: list[AnyEvent]) -> bool:
        """False while marks from before the reset have no answer yet; what is left of a frame stays for the new state."""
        if self.marks:
            self._start_tail("reset", self.slot.index, self.words)
            return False
        self.words = self.new_words()
        self.fresh = True
        self.samples = self.framer.samples
        self.answered = -1
        if self.meter is not None:
            self.meter.restart()
        events.append(Ready())
        return True

    def _end(self, words: WordAssembler, events: list[AnyEvent]) -> None:
        events += words.finish(self.samples / SAMPLE_RATE)
        events += [Marker(mark.id) for mark in self.marks]
        self.marks.clear()
        self.done = True

    # ---- tails -------------------------------------------------------------------------------------------------------

    @property
    def waiting(self) -> bool:
        """Whether a mark waits for audio that is not there."""
        return bool(self.marks) and self.tail is None and self.framer.samples < FRAME_SAMPLES and not self.commands

    @property
    def borrows(self) -> bool:
        """Whether it holds a spare slot, which others wait for: then its few last events may go over the outbox's bound."""
        return self.tail is not None and self.tail.spare is not None

    def fork(self, slot: int, spare: Slot | None) -> None:
        """Answer the pending marks on `slot`, into which this lane's state has been copied (if it has any yet)."""
        self._start_tail("fork", slot, self.words.fork(), spare)

    def _start_tail(
        self, kind: Literal["finish", "reset", "fork"], slot: int, words: WordAssembler, spare: Slot | None = None
    ) -> None:
        # One frame more than the delay: the model hears a frame one step after it came (contract section 5.5).
        end = math.ceil(self.samples / FRAME_SAMPLES) + self.delay + 1
        self.tail = Tail(kind, slot, words, end, fresh=self.fresh, partial=self.framer.samples > 0, spare=spare)

    def _end_tail(self, tail: Tail, events: list[AnyEvent]) -> None:
        self.tail = None
        if tail.kind == "finish":
            self._end(self.words, events)
        elif tail.kind == "fork":
            self.words.join(tail.words)
            self.answered, self.answer = self.samples, tail.words

    # ---- rows --------------------------------------------------------------------------------------------------------

    @property
    def has_row(self) -> bool:
        """Whether a frame, or a frame of silence, can be stepped now."""
        return (self.framer.samples >= FRAME_SAMPLES or self.tail is not None) and not self.done

    def gather(self, row: NDArray[np.float32]) -> None:
        """Write the next frame into row, float32 (1920,); `row_slot` and `row_fresh` then say how to step it."""
        tail = self.tail
        if tail is None:
            self.arrived = self.framer.pop(row)
            self.row_slot, self.row_fresh = self.slot.index, self.fresh
            if self.meter is not None:
                self.meter.hear(row)
            return
        if not tail.partial:
            row[:] = 0.0
        elif tail.kind == "finish":
            self.arrived = self.framer.pop(row)
            if self.meter is not None:
                self.meter.hear(row)
        else:
            self.arrived = self.framer.peek(row)
        self.row_slot, self.row_fresh = tail.slot, tail.fresh

    def scatter(self, token: int, logprob: float, pause: list[float] | None, step_idx: int) -> list[AnyEvent]:
        """Take what the model said of the gathered row; return the events that it makes, in the order of the wire."""
        if self.tail is not None:
            return self._scatter_tail(self.tail, token, logprob, pause, step_idx)
        self.fresh = False
        self.frames += 1
        stream = self.stream
        stream.stepped(FRAME_SAMPLES)
        events: list[AnyEvent] = []
        if pause is not None and stream.live:  # nobody looks at a file's steps
            events.append(Step(step_idx, tuple(pause), stream.pending_samples))
        if words := self.words.push(token, logprob):
            events += words
        if self.meter is not None:
            events.append(self.meter.pause(self.words, pause))
        if self.marks:
            self._release(self.words, 0, events)
        return events

    def _scatter_tail(self, tail: Tail, token: int, logprob: float, pause: list[float] | None, step_idx: int) -> list[AnyEvent]:
        events: list[AnyEvent] = []
        if tail.partial and tail.kind == "finish":
            self.frames += 1
            self.stream.stepped(self.samples % FRAME_SAMPLES)
            if pause is not None and self.stream.live:
                events.append(Step(step_idx, tuple(pause), self.stream.pending_samples))
        is_audio = tail.partial and tail.kind == "finish"
        tail.partial = tail.fresh = False
        words = tail.words
        events += words.push(token, logprob)
        if self.meter is not None and is_audio:
            events.append(self.meter.pause(words, pause))
        self._release(words, 1, events)
        over = words.steps >= tail.end and (not words.under_way or words.steps >= tail.end + HOLD_FRAMES)
        if over and (tail.kind == "finish" or not self.marks):
            self._end_tail(tail, events)
        return events

    def _release(self, words: WordAssembler, late_frames: int, events: list[AnyEvent]) -> None:
        """Send the marks that are due, behind the word under way if there is one."""
        marks = self.marks
        last = self.tail.end if self.tail is not None and self.tail.kind == "finish" else math.inf
        while marks and words.steps >= marks[0].due + late_frames < last:  # `_end` sends those behind all audio
            if words.under_way and marks[0].due > self.delay:  # else no audio is before the mark, so no word
                if words.steps < marks[0].due + late_frames + HOLD_FRAMES:
                    break
                events += words.flush()
            events.append(Marker(marks.popleft().id))
