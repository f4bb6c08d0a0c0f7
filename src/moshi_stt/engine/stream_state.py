"""One stream inside the batch engine: its commands in order, its next frame, its words and markers.

A state machine that the model thread drives: `absorb` what the client sent, `gather` the next row, `scatter` what the model
said of it. Its clock is `words.steps`, the frames of this stream alone since its last reset.

A mark is due `delay` frames after the audio before it. As long as the client's audio goes on, it is used, and the mark changes
nothing but that a `Marker` comes. Where the client's audio stops there is a *flush*: frames of silence that the engine adds.

* finish: on the stream's own slot, nothing comes after it.
* reset with marks pending: on the stream's own slot, its state goes away anyway.
* nothing followed the mark for `marker_wait_seconds`: on a copy of the slot, so that the stream's own time and state stay as
  they are. The words found there are sent, and are not sent again when the stream itself gets there.

Where the model has stopped transcribing (`mute.py`) its state is reset and hears the last audio again, as fast as there are
steps: the *replay*. It gives the client words, and nothing else that it has had already.
"""

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from moshi_stt.audio.framer import Framer
from moshi_stt.constants import SAMPLE_RATE
from moshi_stt.engine.backend import Words
from moshi_stt.engine.commands import Audio, Command, Finish, Mark, Reset
from moshi_stt.engine.mute import MuteGuard
from moshi_stt.engine.slots import Slot
from moshi_stt.engine.stream import Stream
from moshi_stt.engine.turns import PauseMeter
from moshi_stt.events import AnyEvent, Marker, Ready, Step, Warning, Word  # noqa: A004 - the event

HOLD_FRAMES = 12
"""A due marker waits so long for the word under way to end (about 1 s); then the word is cut."""


@dataclass(slots=True)
class PendingMark:
    """id: the client's. due: the local step after which it is sent."""

    id: int
    due: int


@dataclass(slots=True)
class Flush:
    """Silence after the last audio."""

    kind: Literal["finish", "reset", "copy"]
    slot: int
    """Where it is stepped."""
    words: Words
    """Hear it."""
    end: int
    """The local step after which it may end."""
    fresh: bool
    """Whether the slot's state must be started from zero."""
    partial: bool
    """Whether the stream's last, incomplete frame comes first."""
    scratch: Slot | None = None
    """The slot to give back."""


class StreamState:
    """A stream and its slot. Everything but `slot`, `stream` and `woken` belongs to the model thread."""

    __slots__ = (
        "answered",
        "answering",
        "arrived",
        "commands",
        "delay",
        "done",
        "flush",
        "frame_samples",
        "framer",
        "frames",
        "fresh",
        "guard",
        "in_flight",
        "last_audio_at",
        "last_step",
        "marks",
        "meter",
        "new_words",
        "replay",
        "row_fresh",
        "row_slot",
        "samples",
        "slot",
        "stream",
        "warns",
        "woken",
        "words",
    )

    def __init__(
        self,
        stream: Stream,
        slot: Slot,
        new_words: Callable[[], Words],
        delay_frames: int,
        frame_samples: int,
        *,
        meter: PauseMeter | None = None,
        guard: MuteGuard | None = None,
        warns: bool = False,
    ) -> None:
        """meter: makes the `Pause` events of a stream that asked for turns.

        guard: notices when the model stops transcribing. warns: whether the client is told of that.
        """
        self.stream = stream
        self.slot = slot
        self.new_words = new_words
        self.delay = delay_frames
        self.frame_samples = frame_samples
        self.meter = meter
        self.guard = guard
        self.warns = warns
        self.words = new_words()
        self.framer = Framer(frame_samples)
        self.commands: deque[Command] = deque()
        """Drained and not yet absorbed: what comes after a reset, a finish, or a flush."""
        self.marks: deque[PendingMark] = deque()
        self.flush: Flush | None = None
        self.replay: deque[NDArray[np.float32]] = deque()
        """Frames that a reset model hears again, before the client's next one."""
        self.fresh = True
        """Whether the slot's state must be started from zero."""
        self.samples = 0
        """Samples absorbed since the last reset."""
        self.answered = -1
        """That count when everything before it had been answered by a flush on a copy."""
        self.answering = self.words
        """The words that heard that flush."""
        self.last_audio_at = 0.0
        """time.monotonic() of the client's last audio or mark, or of the step that consumed it."""
        self.arrived = 0.0
        """When the last sample of the frame being stepped came."""
        self.frames = 0
        """Frames of client audio stepped in all."""
        self.row_slot = slot.index
        self.row_fresh = True
        """Of the row gathered last: the slot to step, and whether its state starts from zero."""
        self.last_step = 0
        """Number of the engine's step in which this stream last took part, from 1 on."""
        self.in_flight = False
        """Whether a row of it was gathered and not yet scattered."""
        self.done = False
        """Whether the last event has been made."""
        self.woken = False

    # ---- commands ----------------------------------------------------------------------------------------------------

    def absorb(self, now: float) -> list[AnyEvent]:
        """Take the stream's commands as far as they can be acted on now; return what they answer at once."""
        commands = self.commands
        commands.extend(self.stream.drain())
        events: list[AnyEvent] = []
        while commands and self.flush is None and not self.done:
            command = commands[0]
            if isinstance(command, Audio):
                self.last_audio_at = now if command.arrived is None else command.arrived
                self.framer.push(command.samples, self.last_audio_at)
                self.samples += len(command.samples)
            elif isinstance(command, Mark):
                self._mark(command.id, now, events)
            elif self.framer.frames or self.replay or self.is_held:
                break  # a reset or the end: the audio before it first
            elif isinstance(command, Finish):
                self._finish(events)
            elif not self._reset(command, events):
                break
            commands.popleft()
        return events

    def _mark(self, id: int, now: float, events: list[AnyEvent]) -> None:
        self.last_audio_at = now
        if self.samples == self.answered:
            events.append(Marker(id))
        else:
            self.marks.append(PendingMark(id, math.ceil(self.samples / self.frame_samples) + self.delay))

    def _finish(self, events: list[AnyEvent]) -> None:
        if self.samples in (0, self.answered):
            self._end(self.answering if self.samples else self.words, events)
        else:
            self._start_flush("finish", self.slot.index, self.words)

    def _reset(self, command: Reset, events: list[AnyEvent]) -> bool:
        """False while marks from before the reset have no answer yet; what is left of a frame stays for the new state."""
        if self.marks:
            self._start_flush("reset", self.slot.index, self.words)
            return False
        self.words = self.new_words()
        self.fresh = True
        self.samples = self.framer.samples
        self.answered = -1
        if self.meter is not None:
            self.meter.restart()
        if self.guard is not None:
            self.guard.reset()
        events.append(Ready())
        return True

    def _end(self, words: Words, events: list[AnyEvent]) -> None:
        events += words.finish(self.samples / SAMPLE_RATE)
        events += [Marker(mark.id) for mark in self.marks]
        self.marks.clear()
        self.done = True

    # ---- flushes -----------------------------------------------------------------------------------------------------

    @property
    def waiting(self) -> bool:
        """Whether a mark waits for audio that is not there."""
        return bool(self.marks) and not (
            self.flush is not None or self.framer.samples >= self.frame_samples or self.commands or self.replay or self.is_held
        )

    @property
    def holds_scratch(self) -> bool:
        """Whether it holds a scratch slot, which others wait for: then its few last events may go over the outbox's bound."""
        return self.flush is not None and self.flush.scratch is not None

    def flush_copy(self, slot: int, scratch: Slot | None) -> None:
        """Answer the pending marks on `slot`, into which this stream's state has been copied (if it has any yet)."""
        self._start_flush("copy", slot, self.words.fork(), scratch)

    def _start_flush(
        self, kind: Literal["finish", "reset", "copy"], slot: int, words: Words, scratch: Slot | None = None
    ) -> None:
        # One frame more than the delay: the model hears a frame one step after it came (contract section 5.5).
        end = math.ceil(self.samples / self.frame_samples) + self.delay + 1
        self.flush = Flush(kind, slot, words, end, self.fresh, self.framer.samples > 0, scratch)

    def _end_flush(self, flush: Flush, events: list[AnyEvent]) -> None:
        self.flush = None
        if flush.kind == "finish":
            self._end(self.words, events)
        elif flush.kind == "copy":
            self.words.join(flush.words)
            self.answered, self.answering = self.samples, flush.words

    # ---- rows --------------------------------------------------------------------------------------------------------

    @property
    def may_absorb(self) -> bool:
        """Whether `absorb` can do more than it did before the last row: a whole frame still holds up what comes after it."""
        return bool(self.commands) and self.framer.samples < self.frame_samples

    @property
    def has_row(self) -> bool:
        """Whether a frame, or a frame of silence, can be stepped now."""
        if self.done or (self.guard is not None and self.guard.suspected):
            return False
        return self.framer.samples >= self.frame_samples or self.flush is not None or bool(self.replay)

    def gather(self, row: NDArray[np.float32]) -> None:
        """Write the next frame into row, float32 (frame_samples,); `row_slot` and `row_fresh` then say how to step it."""
        flush = self.flush
        if flush is None:
            self.row_slot, self.row_fresh = self.slot.index, self.fresh
            if self.replay:
                row[:] = self.replay[0]  # gone when its step is done
                return
            frame, self.arrived = self.framer.pop()
            row[:] = frame
            if self.meter is not None:
                self.meter.hear(frame)
            if self.guard is not None:
                self.guard.hear(frame)
            return
        if not flush.partial:
            row[:] = 0.0
        elif flush.kind == "finish":
            frame, self.arrived = self.framer.pop()
            row[:] = frame
            if self.meter is not None:
                self.meter.hear(frame)
        else:
            row[:], self.arrived = self.framer.peek()
        self.row_slot, self.row_fresh = flush.slot, flush.fresh

    def scatter(self, token: int, logprob: float, pause: list[float] | None, step_idx: int) -> list[AnyEvent]:
        """Take what the model said of the gathered row; return the events that it makes, in the order of the wire."""
        if self.flush is not None:
            return self._scatter_flush(self.flush, token, logprob, pause, step_idx)
        self.fresh = False
        events: list[AnyEvent] = []
        if self.replay:
            self.replay.popleft()
            events += self.words.push(token, logprob)
        else:
            self.frames += 1
            stream = self.stream
            stream.stepped(self.frame_samples)
            if pause is not None and stream.live:  # nobody looks at a file's steps
                events.append(Step(step_idx, tuple(pause), stream.pending_samples))
            words = self.words.push(token, logprob)
            if words:
                events += words
            if self.meter is not None:
                events.append(self.meter.pause(self.words, pause))
            if self.guard is not None and pause is not None:
                self.guard.judge(any(type(event) is Word for event in words), pause)
        if self.marks:
            self._send_marks(self.words, 0, events)
        return events

    def _scatter_flush(
        self, flush: Flush, token: int, logprob: float, pause: list[float] | None, step_idx: int
    ) -> list[AnyEvent]:
        events: list[AnyEvent] = []
        if flush.partial and flush.kind == "finish":
            self.frames += 1
            self.stream.stepped(self.samples % self.frame_samples)
            if pause is not None and self.stream.live:
                events.append(Step(step_idx, tuple(pause), self.stream.pending_samples))
        is_audio = flush.partial and flush.kind == "finish"
        flush.partial = flush.fresh = False
        words = flush.words
        events += words.push(token, logprob)
        if self.meter is not None and is_audio:
            events.append(self.meter.pause(words, pause))
        self._send_marks(words, 1, events)
        over = words.steps >= flush.end and (not words.in_word or words.steps >= flush.end + HOLD_FRAMES)
        if over and (flush.kind == "finish" or not self.marks):
            self._end_flush(flush, events)
        return events

    def _send_marks(self, words: Words, late_frames: int, events: list[AnyEvent]) -> None:
        """Send the marks that are due, after the word under way if there is one."""
        marks = self.marks
        last = self.flush.end if self.flush is not None and self.flush.kind == "finish" else math.inf
        while marks and words.steps >= marks[0].due + late_frames < last:  # `_end` sends those that follow all audio
            if words.in_word and marks[0].due > self.delay:  # else no audio is before the mark, so no word
                if words.steps < marks[0].due + late_frames + HOLD_FRAMES:
                    break
                events += words.flush()
            events.append(Marker(marks.popleft().id))

    # ---- stalls ------------------------------------------------------------------------------------------------------

    @property
    def is_held(self) -> bool:
        """Whether nothing is stepped, because the model may have stopped transcribing and the verdict is still to come."""
        return self.guard is not None and self.guard.suspected

    def restart(self) -> list[AnyEvent]:
        """The model has stopped transcribing: start its state again, and let it hear the kept audio again.

        Not during a flush or a replay.
        """
        assert self.guard is not None
        assert self.flush is None
        self.replay = self.guard.take()
        first = self.words.steps - len(self.replay)
        events: list[AnyEvent] = list(self.words.restart(first))
        self.fresh = True
        self.answered = -1
        if self.warns:
            at, again = first * self.frame_samples / SAMPLE_RATE, len(self.replay) * self.frame_samples / SAMPLE_RATE
            sentence = f"the model had stopped transcribing; the {again:.0f} s of audio from {at:.1f} s on are heard again"
            events.append(Warning("stall", sentence))
        return events
