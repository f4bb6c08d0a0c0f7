"""The engine of frame-synchronous models: many streams, one model thread, one `Backend`.

Here is the event loop's side: admitting streams, lending slots, starting, failing, stopping. The model thread runs a
`ModelLoop`.
"""

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial

import numpy as np
from numpy.typing import NDArray

from moshi_stt.engine.engine import NO_EXTRAS, Engine, EngineInfo, EngineObserver, StreamOptions
from moshi_stt.engine.loaded import LoadedModel
from moshi_stt.engine.model_loop import LoopEvents, ModelLoop, close_model
from moshi_stt.engine.mute import MuteGuard, MuteSettings
from moshi_stt.engine.scheduler import Outcome
from moshi_stt.engine.sharing import BackendLink, WorkerConfig
from moshi_stt.engine.slots import Slot, SlotPool, SlotSource, spare_share
from moshi_stt.engine.stream import Stream, StreamLimits, deliver_all
from moshi_stt.engine.stream_state import StreamState
from moshi_stt.engine.threads import join_threads, overdue
from moshi_stt.engine.turns import PauseMeter, SpeechDetector
from moshi_stt.errors import EngineError, EngineFailed, MoshiSttError, NoFreeSlot
from moshi_stt.events import Ready

log = logging.getLogger(__name__)

EXAMINATION_SECONDS = 5.0
"""How long the speech detector has; the stream is held meanwhile."""

FILE_EXAMINATION_SECONDS = 300.0
"""The same for files, which wait: what they say may not depend on how busy the machine is."""

JOIN_SECONDS = 10.0
"""How long the model thread has to end."""


class BatchEngine(Engine):
    """Streams over one `Backend`. Other processes may share it: see `ShareableEngine`."""

    def __init__(
        self,
        load: Callable[[], LoadedModel],
        *,
        limits: StreamLimits | None = None,
        observer: EngineObserver | None = None,
        name: str = "",
        marker_wait_seconds: float = 0.25,
        hang_seconds: float = 30.0,
        mute: MuteSettings | None = None,
        slots: SlotSource | None = None,
        on_left: Callable[[Slot], None] | None = None,
        counts_steps: bool = True,
    ) -> None:
        """load: makes the model; called once, on the model thread.

        marker_wait_seconds: when nothing followed a marker for so long, the engine adds silence to answer it.
        hang_seconds: a step that takes longer counts as failed (at least 20 times the measured step).
        mute: when a stream counts as one that the model has stopped transcribing; None never. Only models with pause heads do.
        slots: where streams get theirs; None lends those of the model. on_left: told, on the event loop, of a slot whose stream
        was closed and which no later row will name. counts_steps: whether the observer is told of each step.
        """
        super().__init__(observer)
        self.info = EngineInfo("batched_asr", name, "", (), "not loaded", "", 0)
        self._load = load
        self._limits = limits or StreamLimits()
        self._marker_wait = marker_wait_seconds
        self._hang_seconds = hang_seconds
        self._mute = mute
        self._slots = slots
        self._on_left = on_left
        self._counts_steps = counts_steps
        self._model: ModelLoop | None = None
        self._thread: threading.Thread | None = None
        self._watchdog: asyncio.Task[None] | None = None
        self._examinations: set[asyncio.Task[None]] = set()
        self._states: dict[Stream, StreamState] = {}
        self._ready = False
        self._stopping = False

    # ---- starting and ending -----------------------------------------------------------------------------------------

    async def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        started: asyncio.Future[ModelLoop] = self._loop.create_future()
        self._thread = threading.Thread(target=self._main, args=(started,), name="model", daemon=True)
        self._thread.start()
        model = await started
        self.info = model.info
        self._slots = self._slots or SlotPool(model.loaded.streams)
        self._ready = True
        self._watchdog = self._loop.create_task(self._watch(model))

    def _main(self, started: "asyncio.Future[ModelLoop]") -> None:
        """The model thread: load, run, free. Whatever goes wrong is told on the event loop."""
        loaded: LoadedModel | None = None
        model: ModelLoop | None = None
        try:
            loaded = self._load()
            model = self._model = ModelLoop(loaded, self._loop_events(), marker_wait_seconds=self._marker_wait)
            self._post(_set_result, started, model)
            model.run(lambda: self._stopping or self.failure is not None)
        except Exception as error:
            if model is not None:
                log.exception("the engine failed")
                self._post(self._fail, EngineFailed(f"a model step failed: {type(error).__name__}: {error}"))
            elif isinstance(error, MoshiSttError):
                self._post(_set_exception, started, error)
            else:
                log.exception("the model could not be started")
                text = f"the model could not be started: {type(error).__name__}: {error}"
                self._post(_set_exception, started, EngineError(text))
        finally:
            if model is not None:
                model.close()
            if loaded is not None:
                close_model(loaded)

    def _loop_events(self) -> LoopEvents:
        return LoopEvents(
            deliver=partial(self._post, self._deliver),
            stepped=self._stepped,
            left=self._left,
            suspect=self._suspect,
            restarted=lambda state: self._post(self._restarted, state.words.steps),
        )

    async def stop(self) -> None:
        self._ready = False
        self._stopping = True
        self._wake_model()
        if self._watchdog is not None:
            self._watchdog.cancel()
            with suppress(asyncio.CancelledError):
                await self._watchdog
            self._watchdog = None
        self._end_streams("the server is shutting down", 1001)
        if self._thread is not None:
            if await join_threads([self._thread], JOIN_SECONDS):
                log.error("the model thread did not end within %g s; its step hangs", JOIN_SECONDS)
            self._thread = None

    async def _watch(self, model: ModelLoop) -> None:
        """Fail the engine when a step hangs."""
        limit = max(self._hang_seconds, 20 * model.timings.slowest)
        await overdue(lambda: [model.step_started], limit)
        self._fail(EngineFailed(f"a model step has not come back for {limit:g} s; the device hangs. Restart the server."))

    def _fail(self, failure: EngineFailed) -> None:
        """Every stream ends with an `Error`; nothing new is admitted."""
        if self.failure is not None or self._stopping:
            return
        log.error("%s", failure)
        self._announce_failure(failure)
        for _ in range(self._end_streams(str(failure), 1011)):
            self.observer.failed()

    def _end_streams(self, sentence: str, close_code: int) -> int:
        """End every stream with an `Error`; how many those were."""
        for stream in list(self._states):
            stream.fail(sentence, close_code)
        if self._model is not None:
            self._model.scheduler.clear()
        return len(self._states)

    # ---- streams -----------------------------------------------------------------------------------------------------

    def open(self, *, live: bool = True, options: StreamOptions = NO_EXTRAS) -> Stream:
        slot, model = self.lend(), self._running()
        limits = self._limits if live else self._limits.of_recordings
        stream = Stream(limits, live=live, wake=self._wake, release=self._release)
        self._states[stream] = state = self._new_state(model.loaded, stream, slot, options)
        model.scheduler.admit(state)
        stream.deliver([Ready()])
        self.observer.opened()
        return stream

    def _new_state(self, loaded: LoadedModel, stream: Stream, slot: Slot, options: StreamOptions) -> StreamState:
        meter = guard = None
        if options.turns:
            meter = PauseMeter(None if loaded.backend.pause_heads else SpeechDetector())
        if self._mute is not None and self._mute.seconds and loaded.backend.pause_heads:
            guard = MuteGuard(self._mute, loaded.frame_seconds, live=stream.live)
        return StreamState(
            stream,
            slot,
            partial(loaded.new_words, confidence=options.confidence, interim=options.interim),
            loaded.delay_frames,
            loaded.frame_samples,
            meter=meter,
            guard=guard,
            warns=options.warnings,
        )

    def _wake(self, stream: Stream) -> None:
        """The stream has commands, or room for events again."""
        state, model = self._states.get(stream), self._model
        if state is not None and model is not None and not (state.woken or self._stopping or self.failure):
            model.scheduler.wake(state)
            model.wakeup.set()

    def _release(self, stream: Stream) -> None:
        """Called by `Stream.close`: the slot is free at once; a step of it that is under way goes nowhere."""
        state = self._states.pop(stream)
        if not (self._stopping or self.failure):
            self._running().scheduler.dismiss(state)
            self._wake_model()
        self.observer.closed(state.frames)
        self.take_back(state.slot)

    def _stepped(self, seconds: float, rows: int) -> None:
        """On the model thread."""
        if self._counts_steps:
            self.observer.stepped(seconds, rows)

    def _left(self, state: StreamState) -> None:
        """On the model thread."""
        if self._on_left is not None:
            self._post(self._on_left, state.slot)

    def _deliver(self, outcome: Outcome) -> None:
        deliver_all(outcome.deliveries)
        now = time.monotonic()
        for arrived in outcome.arrivals:
            self.observer.lagged(now - arrived)

    def _wake_model(self) -> None:
        if self._model is not None:
            self._model.wakeup.set()

    # ---- streams that the model has stopped transcribing ----------------------------------------------------------------

    def _suspect(self, state: StreamState) -> None:
        """On the model thread."""
        assert state.guard is not None
        assert self._mute is not None
        if self._mute.is_speech is None:
            self._decide(state, True)
        else:
            self._post(self._begin_examination, state, state.guard.audio())

    def _begin_examination(self, state: StreamState, audio: NDArray[np.float32]) -> None:
        task = self._loop.create_task(self._examine(state, audio))
        self._examinations.add(task)
        task.add_done_callback(self._examinations.discard)

    async def _examine(self, state: StreamState, audio: NDArray[np.float32]) -> None:
        """Ask the speech detector whether somebody speaks."""
        assert self._mute is not None
        assert self._mute.is_speech is not None
        try:
            async with asyncio.timeout(EXAMINATION_SECONDS if state.stream.live else FILE_EXAMINATION_SECONDS):
                verdict = await asyncio.to_thread(self._mute.is_speech, audio)
        except Exception:
            log.exception("the speech detector failed")
            verdict = False
        self._decide(state, verdict)

    def _decide(self, state: StreamState, is_stalled: bool) -> None:
        """Any thread."""
        assert state.guard is not None
        state.guard.verdict = is_stalled
        self._running().scheduler.wake(state)
        self._wake_model()

    def _restarted(self, step: int) -> None:
        log.warning("the model had stopped transcribing a stream, which is heard again from its frame %d on", step)
        self.observer.restarted()

    # ---- sharing: see `ShareableEngine` ------------------------------------------------------------------------------

    @property
    def pause_heads(self) -> int:
        """Of the model; 0 means that its streams send no `Step`. Known once started."""
        return self._running().loaded.backend.pause_heads

    @property
    def processes(self) -> int:
        return self._running().loaded.processes if self._ready else 0

    def share(self, number: int) -> WorkerConfig:
        loaded = self._running().loaded
        count = spare_share(loaded.streams, loaded.processes)
        first = loaded.streams + (number + 1) * count
        return WorkerConfig(
            info=self.info,
            new_words=loaded.new_words,
            pause_heads=loaded.backend.pause_heads,
            slots=loaded.backend.slots,
            scratch=range(first, first + count),
            timings=self._running().timings,
            delay_frames=loaded.delay_frames,
            frame_samples=loaded.frame_samples,
            marker_wait_seconds=self._marker_wait,
            hang_seconds=self._hang_seconds,
            limits=self._limits,
            mute=self._mute,
        )

    def connect(self, on_gone: Callable[[], None]) -> BackendLink:
        server = self._running().server
        assert server is not None, "loaded for this process alone"
        return server.connect(lambda: self._post(on_gone))

    def lend(self) -> Slot:
        if self.failure is not None:
            raise EngineFailed(str(self.failure))
        if not self._ready or self._slots is None:
            raise EngineError("the model is not loaded yet, or the server is shutting down")
        try:
            return self._slots.acquire()
        except NoFreeSlot:
            self.observer.refused()
            raise

    def take_back(self, slot: Slot) -> None:
        assert self._slots is not None
        if self._slots.release(slot):
            self._announce_free_slot()

    # ---- state -------------------------------------------------------------------------------------------------------

    @property
    def ready(self) -> bool:
        return self._ready and self.failure is None

    @property
    def used_slots(self) -> int:
        return self._slots.used if self._ready and self._slots is not None else 0

    @property
    def queued_samples(self) -> int:
        return sum(stream.pending_samples for stream in self._states)

    def _running(self) -> ModelLoop:
        assert self._model is not None, "not started"
        return self._model

    def _post(self, call: Callable[..., object], *args: object) -> None:
        """Run on the event loop; nothing when that is closed already."""
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(call, *args)


def _set_result(future: "asyncio.Future[ModelLoop]", model: ModelLoop) -> None:
    if not future.done():
        future.set_result(model)


def _set_exception(future: "asyncio.Future[ModelLoop]", error: BaseException) -> None:
    if not future.done():
        future.set_exception(error)
