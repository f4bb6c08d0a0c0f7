"""The turns of the model thread: drain what streams sent, gather the rows that have a frame, step them, scatter what came out.

A step starts as soon as there is one row, so a lone stream never waits; while it runs, the frames of others gather for the next
one, so a busy engine steps many rows at once without any timer. With files alone the device need not wait for this thread:
while it steps some rows, those of the step before are scattered and others gathered. Reasons: docs/internals/engine.md.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import numpy as np

from moshi_stt.engine.backend import HasInputBuffers, StepInputs, StepOutput, StepsAhead, TimesSteps, WarmsUpInParts
from moshi_stt.engine.engine import EngineInfo
from moshi_stt.engine.loaded import LoadedModel
from moshi_stt.engine.marker_copies import MarkerCopies
from moshi_stt.engine.scheduler import Outcome, Scheduler
from moshi_stt.engine.shared_backend import BackendServer, RowRequest
from moshi_stt.engine.slots import SlotPool, spare_share
from moshi_stt.engine.stalls import StallWatch
from moshi_stt.engine.stream_state import StreamState
from moshi_stt.engine.timings import StepTimings, measure
from moshi_stt.errors import EngineError

log = logging.getLogger(__name__)

WARMING_SECONDS = 0.05
"""How often an idle engine asks its backend whether more of the warm-up can be done."""

WARMING_TURNS = 16
"""A busy engine asks in every WARMING_TURNS-th turn."""


class Wakeup(Protocol):
    """What the model thread waits on: a `threading.Event`, or `BackendServer.wakeup` where other processes wake it, too."""

    def set(self) -> None:
        """Wake the model thread. Any thread."""

    def clear(self) -> None:
        """Forget that `set` was called. What it was called for must be looked at after this."""

    def wait(self, timeout: float | None = None) -> object:
        """Return when `set` was called, or the time is over."""


@dataclass(frozen=True)
class LoopEvents:
    """What the loop tells, by calls on the model thread."""

    deliver: Callable[[Outcome], object]
    """Hand these over to the event loop."""
    stepped: Callable[[float, int], object]
    """A step took so many seconds, of so many rows."""
    left: Callable[[StreamState], object] = lambda _: None
    """No later row will name this stream's slot."""
    suspect: Callable[[StreamState], object] = lambda _: None
    """The model may have stopped transcribing this stream."""
    restarted: Callable[[StreamState], object] = lambda _: None
    """This stream's state was started again."""


class _UnderWay(NamedTuple):
    """A step that was begun."""

    states: list[StreamState]
    finish: Callable[[], StepOutput]
    begun: float


class ModelLoop:
    """Owns a loaded model. Made, run and closed on the model thread; `wakeup`, `scheduler`, `server` are there for others."""

    def __init__(self, loaded: LoadedModel, events: LoopEvents, *, marker_wait_seconds: float) -> None:
        """Warms the model up and measures it. Raises EngineError for a backend of too few slots."""
        backend, streams = loaded.backend, loaded.streams
        self.loaded = loaded
        self.step_started: float | None = None
        """time.monotonic() when the step that is under way began."""
        self._backend = backend
        self._events = events
        scratch = SlotPool(*_scratch_of(loaded))
        self._step_seconds = 0.0
        """Of the last turn."""
        self._under_way: _UnderWay | None = None
        self._ahead = (backend, _empty_inputs(loaded)) if isinstance(backend, StepsAhead) else None
        """The backend, and where rows are gathered while it reads its own arrays; None where it does not step ahead."""
        self._warming: WarmsUpInParts | None = None
        """Whose warm-up goes on between steps."""
        begun = time.monotonic()
        self._warm_up()
        warm = time.monotonic()
        self.timings: StepTimings = loaded.timings or measure(backend, streams, loaded.frame_samples)
        if loaded.timings is None:
            log.info("start: warming up took %.1f s, measuring steps %.1f s", warm - begun, time.monotonic() - warm)
        self.server = BackendServer(streams, backend.pause_heads, loaded.frame_samples) if loaded.processes else None
        """Where other processes have their rows stepped."""
        self.wakeup: Wakeup = self.server.wakeup if self.server is not None else threading.Event()
        details = loaded.info.details | self.timings.describe(streams, loaded.frame_seconds)
        self.info: EngineInfo = replace(loaded.info, total_slots=streams, details=details)
        self.scheduler = Scheduler(
            _inputs_of(loaded),
            streams,
            MarkerCopies(backend.copy, scratch, marker_wait_seconds),
            self.timings,
            loaded.frame_seconds,
            on_left=events.left,
            on_suspect=events.suspect,
            on_restart=events.restarted,
        )

    def run(self, is_over: Callable[[], bool]) -> None:
        """Turn, and wait where there is nothing to do.

        is_over: asked before each turn; `wakeup` must be set when it changes.
        """
        if self.loaded.recorder is not None:
            self.loaded.recorder.start()
        watch = StallWatch(self._device_seconds)
        turns = 0
        has_served = False  # before the first row there is nobody whom a long turn could keep waiting
        try:
            while not is_over():
                self.wakeup.clear()
                watch.begin()
                now, self._step_seconds = time.monotonic(), 0.0
                rows = self.turn(now)
                turns += 1
                if self._warming is not None and (not rows or turns % WARMING_TURNS == 0):
                    self._go_on_warming_up(watch)
                has_served = has_served or rows > 0
                if has_served:
                    watch.end(rows, self._step_seconds)
                if not rows:
                    self.wakeup.wait(self._idle_seconds(now))
        finally:
            watch.close()
            if self._under_way is not None:
                with suppress(Exception):
                    self._under_way.finish()  # the device works for nobody when the model is freed

    def turn(self, now: float) -> int:
        """Drain, gather, step, scatter. Returns how many rows were stepped, or are being stepped."""
        scheduler, server = self.scheduler, self.server
        answers = scheduler.drain(now)
        if answers:
            self._events.deliver(Outcome(answers, []))
        is_shared = server is not None and server.is_shared
        if self._ahead is not None and self._warming is None and not is_shared and scheduler.has_files_only:
            return self._turn_ahead(*self._ahead)
        if self._under_way is not None:
            states, output = self._finish(self._under_way)
            self._scatter(states, output)
            return len(states)
        requests = server.collect(self._backend.copy) if server is not None else []
        others = sum(request.rows for request in requests)
        states = scheduler.gather(now, others)
        rows = len(states) + others
        if rows:
            output = self._step(len(states), requests)
            if server is not None and requests:
                server.answer(requests, output, len(states))
            self._scatter(states, output)
        return rows

    def _turn_ahead(self, backend: StepsAhead, spare: StepInputs) -> int:
        """Begin the next step as soon as the one before is over, and scatter that while the device works.

        spare: where rows are gathered while the backend's own arrays are being read.
        """
        inputs = self.scheduler.inputs if backend.has_read_inputs else spare
        states, before = self.scheduler.gather_ahead(inputs), self._under_way
        stepped, output = self._finish(before) if before is not None else ([], None)
        if states:
            self.step_started = begun = time.monotonic()
            self._under_way = _UnderWay(states, backend.begin(*inputs.rows(0, len(states))), begun)
        if output is not None:
            self._scatter(stepped, output)
        return len(states) + len(stepped)

    def _finish(self, step: _UnderWay) -> tuple[list[StreamState], StepOutput]:
        """Wait for a step that was begun."""
        self._under_way = None
        output = step.finish()
        self.step_started = None
        seconds = self._device_seconds()
        self._step_seconds = time.monotonic() - step.begun if seconds is None else seconds
        self._events.stepped(self._step_seconds, len(step.states))
        return step.states, output

    def _scatter(self, states: list[StreamState], output: StepOutput) -> None:
        outcome = self.scheduler.scatter(states, output, time.monotonic())
        if outcome.deliveries:
            self._events.deliver(outcome)

    def _step(self, rows: int, requests: Sequence[RowRequest]) -> StepOutput:
        """Step the gathered rows, and after them those of other processes."""
        inputs = self.scheduler.inputs
        for request in requests:
            inputs.put(request.inputs, rows)
            rows += request.rows
        self.step_started = begun = time.monotonic()
        output = self._backend.step(*inputs.rows(0, rows))
        self.step_started = None
        self._step_seconds = time.monotonic() - begun
        self._events.stepped(self._step_seconds, rows)
        return output

    def _warm_up(self) -> None:
        backend = self._backend
        if isinstance(backend, WarmsUpInParts):
            backend.begin_warm_up()
            self._warming = backend
        else:
            backend.warm_up()

    def _go_on_warming_up(self, watch: StallWatch) -> None:
        """Do the next part of the warm-up, between two steps."""
        assert self._warming is not None
        if not self._warming.go_on_warming_up():
            self._warming = None
        watch.note("went on warming up")

    def _idle_seconds(self, now: float) -> float | None:
        """How long nothing happens unless somebody wakes this thread."""
        seconds = self.scheduler.idle_seconds(now)
        if self._warming is None:
            return seconds
        return WARMING_SECONDS if seconds is None else min(seconds, WARMING_SECONDS)

    def _device_seconds(self) -> float | None:
        return self._backend.device_seconds if isinstance(self._backend, TimesSteps) else None

    def close(self) -> None:
        """Let go of the streams, of the other processes, and of the model."""
        self.step_started = None
        self.scheduler.end()
        if self.server is not None:
            self.server.close()


def close_model(loaded: LoadedModel) -> None:
    """Free the model's memory, whatever state it is in."""
    with suppress(Exception):
        loaded.backend.close()
    if loaded.recorder is not None:
        loaded.recorder.stop()


def _scratch_of(loaded: LoadedModel) -> tuple[int, int]:
    """How many slots this process has for copies of its streams, and the first of them. Raises EngineError for too few."""
    backend, streams = loaded.backend, loaded.streams
    if loaded.scratch is not None:
        return len(loaded.scratch), loaded.scratch.start
    least = spare_share(streams, loaded.processes) * loaded.processes + 1
    if backend.slots < streams + least:
        raise EngineError(
            f"a backend of {backend.slots} slots cannot carry {streams} streams: {least} more are needed at least"
        )
    own = spare_share(streams, loaded.processes) if loaded.processes else backend.slots - streams
    return own, streams


def _inputs_of(loaded: LoadedModel) -> StepInputs:
    """Arrays for the rows of all streams: the backend's own where it has some."""
    backend, streams = loaded.backend, loaded.streams
    if isinstance(backend, HasInputBuffers) and len(backend.inputs.slots) >= streams:
        return backend.inputs
    return _empty_inputs(loaded)


def _empty_inputs(loaded: LoadedModel) -> StepInputs:
    """Arrays of our own for the rows of all streams."""
    streams = loaded.streams
    pcm = np.zeros((streams, loaded.frame_samples), np.float32)
    return StepInputs(pcm, np.zeros(streams, np.int64), np.zeros(streams, np.bool_))
