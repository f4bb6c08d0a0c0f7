"""The batch engine over a model that says what a script says: words at given frames, one `Step` a frame.

Streams, markers, resets and failures are the real engine's; only the backend and the word assembler are not. Tests can hold the
model still (`hold`, `release`), let it fail (`fail_next`), or make it slow.
"""

import threading
import time
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from moshi_stt.constants import FRAME_SECONDS
from moshi_stt.engine.backend import StepOutput, WordEvent
from moshi_stt.engine.batch import BatchEngine
from moshi_stt.engine.commands import Audio, Command
from moshi_stt.engine.engine import NO_EXTRAS, EngineInfo, EngineObserver, StreamOptions
from moshi_stt.engine.loaded import LoadedModel
from moshi_stt.engine.slots import spare_slots
from moshi_stt.engine.stream import Stream, StreamLimits
from moshi_stt.errors import EngineFailed
from moshi_stt.events import EndWord, Word

PRS = (0.5, 0.25, 0.125, 0.0625)
HANG_SECONDS = 600.0
"""A model that is held still does not count as one that hangs."""


@dataclass(frozen=True)
class ScriptedWord:
    """A word that is spoken between two frames of the stream's own count."""

    text: str
    start_frame: int
    end_frame: int


def counting(words: int, every_frames: int = 2) -> list[ScriptedWord]:
    """`words` words named w0, w1, …, one every `every_frames` frames."""
    return [ScriptedWord(f"w{i}", i * every_frames, i * every_frames + every_frames - 1) for i in range(words)]


SOUND, SILENCE = 4, 3
"""Tokens: whether a frame has anything of the client's, or is of the engine's own."""


class ScriptedWords:
    """The words of one stream, as far as its own audio goes. A frame is heard `delay` steps after it came."""

    def __init__(self, engine: "ScriptedEngine") -> None:
        self._engine = engine
        self.steps = 0
        self._frames = 0
        """Of the client's audio."""
        self._next = 0
        """The word that comes next."""
        self._open: ScriptedWord | None = None
        self._is_fork = False

    @property
    def in_word(self) -> bool:
        return self._open is not None

    @property
    def settled(self) -> float:
        return max(0, self.steps - self._engine.delay_frames) * FRAME_SECONDS

    def push(self, token: int, logprob: float) -> Sequence[WordEvent]:
        self.steps += 1
        if token == SOUND:
            self._frames = self.steps
        words, now = self._engine.words, self.steps - 1 - self._engine.delay_frames
        events: list[WordEvent] = []
        if self._open is not None and self._open.end_frame <= now:
            self._end(events)
        while self._next < len(words) and words[self._next].start_frame <= min(now, self._frames - 1):
            self._end(events)
            self._open = words[self._next]
            self._next += 1
            events.append(Word(self._open.text, round(self._open.start_frame * FRAME_SECONDS, 6)))
        if self._is_fork:
            self._end(events)
        return events

    def flush(self) -> Sequence[WordEvent]:
        events: list[WordEvent] = []
        self._end(events)
        return events

    def finish(self, audio_seconds: float) -> Sequence[WordEvent]:
        return self.flush()

    def restart(self, step: int) -> Sequence[WordEvent]:
        raise NotImplementedError("a scripted model never stops transcribing")

    def fork(self) -> Self:
        other = copy(self)
        other._is_fork = True
        return other

    def join(self, fork: Self) -> None:
        self._next, self._open = fork._next, fork._open

    def _end(self, events: list[WordEvent]) -> None:
        if self._open is not None:
            events.append(EndWord(round(self._open.end_frame * FRAME_SECONDS, 6)))
            self._open = None


class _Sounding(Stream):
    """Whatever a client sends, silence too, is no silence to the model: that is what the engine adds."""

    def offer(self, command: Command) -> Command | None:
        return super().offer(Audio(np.ones_like(command.samples), command.arrived) if type(command) is Audio else command)


class _Backend:
    """Says nothing, with the pauses of `PRS`."""

    def __init__(self, engine: "ScriptedEngine", slots: int) -> None:
        self.slots = slots
        self.pause_heads = len(PRS) if engine.send_steps else 0
        self._engine = engine

    def warm_up(self) -> None: ...

    def close(self) -> None: ...

    def copy(self, source: int, target: int) -> None: ...

    def step(self, pcm: NDArray[np.float32], slots: NDArray[np.int64], fresh: NDArray[np.bool_]) -> StepOutput:
        if self._engine.ready:
            assert self._engine.going.wait(HANG_SECONDS)
            if self._engine.failing is not None:
                raise RuntimeError(self._engine.failing)
            if self._engine.step_seconds:
                time.sleep(self._engine.step_seconds)
        rows = len(slots)
        pause = np.tile(np.float32(PRS[: self.pause_heads]), (rows, 1))
        tokens = np.where(pcm.any(axis=1), SOUND, SILENCE)
        return StepOutput(tokens, np.zeros(rows, np.float32), pause)


class ScriptedEngine(BatchEngine):
    """See the module's docstring. All of its knobs may be turned while it runs."""

    def __init__(
        self,
        words: Sequence[ScriptedWord] = (),
        *,
        slots: int = 4,
        delay_frames: int = 0,
        steps: bool = True,
        step_seconds: float = 0.0,
        limits: StreamLimits | None = None,
        observer: EngineObserver | None = None,
        kind: str = "batched_asr",
        prefix_silence_seconds: float = 0.0,
    ) -> None:
        """steps: whether streams get `Step`s, as with a model that has extra heads."""
        info = EngineInfo(kind, "scripted", "", ("en",), "cpu", "float32", slots, prefix_silence_seconds)

        def load() -> LoadedModel:
            backend = _Backend(self, slots + spare_slots(slots))
            return LoadedModel(backend, lambda **_: ScriptedWords(self), info, slots, delay_frames)

        super().__init__(load, limits=limits, observer=observer, marker_wait_seconds=0.0, hang_seconds=HANG_SECONDS)
        self.info = info
        self.words = list(words)
        self.delay_frames = delay_frames
        self.send_steps = steps
        self.step_seconds = step_seconds
        self.going = threading.Event()
        self.going.set()
        self.failing: str | None = None
        """What the next step raises."""
        self.streams_opened = 0
        self.samples: list[int] = []
        """Samples that each ended stream was fed, in the order of their end."""

    def hold(self) -> None:
        """Step nothing until `release`."""
        self.going.clear()

    def release(self) -> None:
        self.going.set()

    def fail_next(self, message: str = "scripted failure") -> None:
        """The next step raises, which is one that is held, or one that is made for it."""
        self.failing = message
        if not self.queued_samples:
            self._loop.call_soon(self._fail, EngineFailed(f"a model step failed: RuntimeError: {message}"))
        self.going.set()

    async def stop(self) -> None:
        self.going.set()
        await super().stop()

    def open(self, *, live: bool = True, options: StreamOptions = NO_EXTRAS) -> Stream:
        stream = super().open(live=live, options=options)
        stream.__class__ = _Sounding
        self.streams_opened += 1
        return stream

    def _release(self, stream: Stream) -> None:
        self.samples.append(self._states[stream].samples)
        super()._release(stream)
