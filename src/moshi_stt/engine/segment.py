"""The engine of recognisers that want whole utterances: many streams on a small pool of threads.

A turn is one stream's: take what it sent, go through its audio up to the next hypothesis, deliver what came out. Streams
that have work wait in a queue, live ones before files, and go to its end after each turn; so all advance alike, and
one that sent an hour of audio delays another by one hypothesis. Nothing is skipped under load: what a stream says depends on
its audio alone, and one that sends faster than the machine can follow fills its inbox and waits.
"""

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from moshi_stt.audio.resample import StreamingResampler
from moshi_stt.constants import SAMPLE_RATE
from moshi_stt.cores import usable_cores
from moshi_stt.engine.engine import NO_EXTRAS, Engine, EngineInfo, EngineObserver, StreamOptions
from moshi_stt.engine.heaps import trim_heaps
from moshi_stt.engine.language import foreign_message
from moshi_stt.engine.recogniser import RECOGNISER_RATE, VAD_FRAME, Recogniser
from moshi_stt.engine.segment_state import TURN_SAMPLES, SegmentState, TurnQueue
from moshi_stt.engine.segmenter import Segmenter, SegmentSettings
from moshi_stt.engine.stream import Delivery, Stream, StreamLimits, deliver_all
from moshi_stt.engine.threads import join_threads, overdue
from moshi_stt.errors import EngineError, EngineFailed, MoshiSttError, NoFreeSlot
from moshi_stt.events import Error, Ready

log = logging.getLogger(__name__)

JOIN_SECONDS = 10.0
"""How long all threads together have to end."""

FOREIGN = {"foreign": True}
"""On the log record that says that a stream is in another language, for programs that say it in their own way."""

SLOTS_BEFORE_MEASURING = 64
FEWEST_SLOTS, MOST_SLOTS = 2, 1_024
"""Of an engine that sizes itself: one for a live stream and one for a file, however slow the machine."""

HANG_FACTOR = 10.0
LONGEST_SECONDS = 30.0
"""Audio that a recogniser takes at once."""


class _Worker:
    """A thread and what it is at."""

    def __init__(self, main: Callable[["_Worker"], None], name: str, *, doubts: bool = False) -> None:
        """doubts: whether it first looks if the model still takes its own sample."""
        self.thread = threading.Thread(target=main, args=(self,), name=name, daemon=True)
        self.doubts = doubts
        self.busy_since: float | None = None
        """time.monotonic() when its turn began; None while it has none."""
        self.state: SegmentState | None = None
        """Whose turn it is."""
        self.given_up = False
        """Whether it hangs, and another does its work."""


class SegmentEngine(Engine):
    """Streams on a pool of recogniser threads. See the module's text for how they share it."""

    cuts_speech = True

    def __init__(
        self,
        load: Callable[[], Recogniser],
        *,
        slots: int | None,
        threads: int = 0,
        limits: StreamLimits | None = None,
        observer: EngineObserver | None = None,
        settings: SegmentSettings | None = None,
        hang_seconds: float = 30.0,
    ) -> None:
        """load: called once, on another thread, by `start`. slots: streams at once; None for as many as can be
        recognised in real time, measured by `start`. threads: 0 for every usable core.

        hang_seconds: a turn that takes longer counts as failed (at least HANG_FACTOR times what it should take).
        """
        super().__init__(observer)
        self.info = EngineInfo("embedded", "", "", (), "cpu", "int8", slots or SLOTS_BEFORE_MEASURING)
        self._sizes_itself = slots is None
        self._load = load
        self._threads_wanted = threads or usable_cores()
        self._limits = limits or StreamLimits()
        self._settings = settings or SegmentSettings()
        self._recogniser: Recogniser | None = None
        self._states: dict[Stream, SegmentState] = {}
        self._queue = TurnQueue()
        self._hang_seconds = hang_seconds
        self._workers: list[_Worker] = []
        self._given_up = 0
        self._tasks: list[asyncio.Task[None]] = []
        """The watchdog, and what gives memory back."""
        self._ready = False
        self._stopping = False

    # ---- the event loop's side ---------------------------------------------------------------------------------------

    async def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        begun = time.monotonic()
        try:
            recogniser = await asyncio.to_thread(self._load)
            loaded = time.monotonic() - begun
            cost = await asyncio.to_thread(measure, recogniser, self._settings)
        except MoshiSttError:
            raise
        except Exception as error:
            log.exception("the recogniser could not be started")
            raise EngineError(f"the recogniser could not be started: {type(error).__name__}: {error}") from error
        self._recogniser = recogniser
        held = self._held(cost)
        slots = max(FEWEST_SLOTS, min(held, MOST_SLOTS)) if self._sizes_itself else self.info.total_slots
        self.info = replace(
            self.info,
            model=recogniser.name,
            languages=recogniser.languages,
            total_slots=slots,
            details=self._describe(recogniser, loaded, cost, held, slots),
        )
        for index in range(self._threads_wanted):
            self._start_worker(f"recogniser-{index}")
        hang_seconds = max(self._hang_seconds, HANG_FACTOR * LONGEST_SECONDS * cost)
        self._tasks = [self._loop.create_task(work) for work in (self._watch(hang_seconds), trim_heaps())]
        self._ready = True

    def _start_worker(self, name: str, *, doubts: bool = False) -> None:
        worker = _Worker(self._main, name, doubts=doubts)
        self._workers.append(worker)
        worker.thread.start()

    def _held(self, cost: float) -> int:
        """Streams of speech without pauses that the threads recognise in real time."""
        return int(min(self._threads_wanted, usable_cores()) / cost)

    def _describe(self, recogniser: Recogniser, load_seconds: float, cost: float, held: int, slots: int) -> dict[str, str]:
        streams = f"about {held} on this machine" if held else "none: this machine is too slow"
        if self._sizes_itself:
            streams += f"; {slots} are admitted at once, more only with a batch_size"
        elif slots > held:
            streams += f"; batch_size admits {slots}, and when more than {held} speak, words come late"
        return {
            "loaded in": f"{load_seconds:.1f} s",
            "recogniser threads": str(self._threads_wanted),
            "cost of a live stream": f"{cost:.2f} of a core, measured",
            "real-time streams": streams,
            **recogniser.notes,
        }

    async def stop(self) -> None:
        self._ready = False
        self._stopping = True
        self._queue.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks = []
        for stream in list(self._states):
            stream.fail("the server is shutting down", 1001)
        late = await join_threads([worker.thread for worker in self._workers], JOIN_SECONDS)
        for thread in late:
            log.error("%s did not end within %g s; recognition hangs", thread.name, JOIN_SECONDS)
        self._workers = []
        recogniser, self._recogniser = self._recogniser, None
        if recogniser is not None and not (late or self._given_up):  # else a thread still uses it
            recogniser.close()

    def open(self, *, live: bool = True, options: StreamOptions = NO_EXTRAS) -> Stream:
        if self.failure is not None:
            raise EngineFailed(str(self.failure))
        if not self._ready or self._recogniser is None:
            raise EngineError("the model is not loaded yet, or the server is shutting down")
        if len(self._states) >= self.info.total_slots:
            self.observer.refused()
            raise NoFreeSlot
        stream = Stream(self._limits if live else self._limits.of_recordings, live=live, wake=self._wake, release=self._release)
        settings = self._settings if live or options.interim else replace(self._settings, while_speaking=False)
        segmenter = Segmenter(self._recogniser, settings, options, lambda: stream.pending_samples)
        self._states[stream] = SegmentState(stream, segmenter)
        stream.deliver([Ready()])
        self.observer.opened()
        return stream

    def _wake(self, stream: Stream) -> None:
        """The stream has commands, or room for events again. Any thread."""
        state = self._states.get(stream)
        if state is not None:
            self._queue.wake(state)

    def _release(self, stream: Stream) -> None:
        """Called by `Stream.close`: the slot is free at once; a turn of it that is under way goes nowhere."""
        state = self._states.pop(stream)
        self.observer.closed(state.segmenter.hypotheses)
        self._announce_free_slot()

    @property
    def ready(self) -> bool:
        return self._ready and self.failure is None

    @property
    def used_slots(self) -> int:
        return len(self._states)

    @property
    def queued_samples(self) -> int:
        return sum(stream.pending_samples for stream in self._states)

    def _fail(self, failure: EngineFailed) -> None:
        """Every stream ends with an `Error`; nothing new is admitted."""
        if self.failure is not None or self._stopping:
            return
        log.error("%s", failure)
        self._announce_failure(failure)
        self._queue.close()
        for stream in list(self._states):
            stream.fail(str(failure), 1011)
            self.observer.failed()

    def _deliver(self, delivery: Delivery, arrived: float, failed: bool) -> None:
        if failed and not delivery.stream.ended:
            self.observer.failed()
        deliver_all([delivery])
        if delivery.events and delivery.stream.live and not failed:
            self.observer.lagged(time.monotonic() - arrived)

    # ---- the workers -------------------------------------------------------------------------------------------------

    async def _watch(self, limit_seconds: float) -> None:
        """Give a worker up that hangs, and fail the engine where its successor hangs, too, or as many do as there are."""
        while self.failure is None:
            await overdue(lambda: [worker.busy_since for worker in self._workers], limit_seconds)
            now = time.monotonic()
            for worker in list(self._workers):
                if worker.busy_since is not None and now - worker.busy_since > limit_seconds:
                    self._give_up(worker, limit_seconds)

    def _give_up(self, worker: _Worker, seconds: float) -> None:
        """The stream whose turn it was ends with an `Error`; another thread takes the worker's place."""
        worker.given_up = True
        self._given_up += 1
        self._workers.remove(worker)
        log.error("%s has not come back from recognition for %g s", worker.thread.name, seconds)
        state = worker.state
        if state is not None:
            state.done = True
            error = Error(f"recognition has not come back for {seconds:.0f} s", 1011)
            self._deliver(Delivery(state.stream, [error], True), state.arrived, True)
        if worker.doubts or self._given_up >= max(2, self._threads_wanted):
            self._fail(EngineFailed(f"recognition has not come back for {seconds:.0f} s; it hangs. Restart the server."))
        else:
            self._start_worker(f"{worker.thread.name}+", doubts=True)

    def _main(self, worker: _Worker) -> None:
        if worker.doubts and not self._takes_sample(worker):
            return
        while not worker.given_up and (state := self._queue.next()) is not None:
            more = False
            worker.state, worker.busy_since = state, time.monotonic()
            try:
                if not (state.done or state.stream.closed):
                    more = self._turn(state)
            except Exception as error:
                self._blame(state, error)
            worker.state = worker.busy_since = None
            self._queue.put_back(state, more=more and not worker.given_up)
            del state  # while this thread waits for the next one, nothing keeps an ended stream

    def _takes_sample(self, worker: _Worker) -> bool:
        """Whether the model still takes its own sample; the engine fails where it does not."""
        recogniser = self._recogniser
        if recogniser is None:
            return False
        worker.busy_since = time.monotonic()
        try:
            recogniser.recognise(recogniser.sample())
        except Exception as error:
            log.exception("the recogniser fails at its own sample")
            self._post(self._fail, EngineFailed(f"the recogniser is broken: {type(error).__name__}: {error}"))
            return False
        worker.busy_since = None
        worker.doubts = False
        return not worker.given_up

    def _turn(self, state: SegmentState) -> bool:
        """Go through one stream's commands up to the next hypothesis or TURN_SAMPLES of audio; whether there is more to do."""
        stream, segmenter = state.stream, state.segmenter
        state.absorb()
        heard = 0
        while heard < TURN_SAMPLES and not state.done:
            if not stream.writable:
                return False  # `take` wakes the stream when there is room again
            if state.work is None and not state.begin():
                return False
            assert state.work is not None
            made, alarmed, begun = segmenter.hypotheses, segmenter.language.alarmed, time.monotonic()
            events = next(state.work, None)
            seconds = time.monotonic() - begun
            if events is None:
                samples, events = state.end()
                heard += samples
                if samples:
                    stream.stepped(samples)
            if segmenter.language.alarmed and not alarmed:
                log.warning("a stream: %s", foreign_message(self.info.languages), extra=FOREIGN)
                self.observer.foreign()
            if segmenter.hypotheses > made:
                heard = TURN_SAMPLES
                self.observer.stepped(seconds, 1)
            if events or state.done:
                self._post(self._deliver, Delivery(stream, events, state.done), state.arrived, False)
        return not state.done

    def _blame(self, state: SegmentState, error: Exception) -> None:
        """A turn raised: where the model still takes its own sample, this stream's audio did it; else the model is broken."""
        log.error("recognition failed", exc_info=error)
        state.done = True
        state.work = None
        reason = f"recognition failed: {type(error).__name__}: {error}"
        recogniser = self._recogniser
        if recogniser is None or self._stopping:
            return
        try:
            recogniser.recognise(recogniser.sample())
        except Exception as second:
            log.exception("the recogniser fails at its own sample too")
            self._post(self._fail, EngineFailed(f"the recogniser is broken: {type(second).__name__}: {second}"))
            return
        self._post(self._deliver, Delivery(state.stream, [Error(reason, 1011)], True), state.arrived, True)

    def _post(self, call: Callable[..., object], *args: object) -> None:
        """Run on the event loop; nothing when that is closed already."""
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(call, *args)


def measure(recogniser: Recogniser, settings: SegmentSettings) -> float:
    """Warm the recogniser up and return what speech without pauses costs: seconds of one thread for a second of it."""
    sample = recogniser.sample()
    recogniser.align(sample, [word.text for word in recogniser.recognise(sample).words])
    resampler = StreamingResampler(RECOGNISER_RATE, SAMPLE_RATE)
    pcm = np.concatenate([resampler.feed(sample), resampler.finish()])
    segmenter = Segmenter(recogniser, settings)
    begun = time.thread_time()
    for work in (segmenter.feed(pcm), segmenter.flush()):
        for _events in work:
            pass
    seconds = time.thread_time() - begun
    return max(seconds / max(speech_seconds(recogniser, sample, settings), 1.0), 1e-6)


def speech_seconds(recogniser: Recogniser, samples: NDArray[np.float32], settings: SegmentSettings) -> float:
    """How much of samples, float32 (S,) at 16 kHz, is speech: its pauses cost next to nothing."""
    state, frames = recogniser.vad_start(), 0
    for start in range(0, len(samples) - VAD_FRAME + 1, VAD_FRAME):
        probability, state = recogniser.speech_probability(samples[start : start + VAD_FRAME], state)
        frames += probability >= settings.speech_until
    return frames * VAD_FRAME / RECOGNISER_RATE
