"""The engine of frame-synchronous models: many streams, one model thread, one `Backend`. Knows no model and no socket.

The model thread turns: drain what woken streams sent, gather the rows that have a frame, step them, scatter what came
out. A step starts as soon as there is one row, so a lone stream never waits; while it runs, the frames of others gather for
the next one, so a busy engine steps many rows at once without any timer. Ways and reasons: docs/engine.md.
"""

import asyncio
import logging
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from moshi_stt.constants import FRAME_SAMPLES, FRAME_SECONDS
from moshi_stt.engine.costs import StepCosts, measure
from moshi_stt.engine.engine import (
    NO_EXTRAS,
    Backend,
    Engine,
    EngineInfo,
    EngineObserver,
    StepInputs,
    StepOutput,
    StepRecorder,
    StreamOptions,
    TakesInPlace,
    TimesSteps,
    WarmsUpInParts,
)
from moshi_stt.engine.lane import Lane
from moshi_stt.engine.rows import RowBlock, RowHub, RowRequest, shared_file
from moshi_stt.engine.share import Line, Share
from moshi_stt.engine.slots import Slot, SlotPool, spare_share
from moshi_stt.engine.stalls import StallWatch
from moshi_stt.engine.stream import Delivery, Stream, StreamLimits, deliver_all
from moshi_stt.engine.turns import PauseMeter, SpeechDetector
from moshi_stt.errors import EngineError, EngineFailed, MoshiSttError, NoFreeSlot
from moshi_stt.events import Ready
from moshi_stt.text.words import WordAssembler

log = logging.getLogger(__name__)

FIRST_STEP_IDX = 3
"""moshi-server counts its two warm-up steps, so the first step of a process is 3."""

LIVE_BUDGET_SECONDS = FRAME_SECONDS / 2
"""While live streams speak, rows of files are added only as far as a step is expected to stay below this."""

WARMING_SECONDS = 0.05
"""How often an idle engine asks its backend whether more of the warm-up can be done."""

WARMING_TURNS = 16
"""A busy engine does so each so manieth turn."""

FILE_TURN = 8
"""Where there is no room at all for files beside live streams, one file row goes along in each so manieth step."""


@dataclass(frozen=True)
class LoadedModel:
    """What `BatchEngine`'s loader hands over, made on the model thread.

    backend: with `streams + spare_slots(streams, processes)` slots at least. decode: ids of one word to its text; can be
    pickled where there are processes. info: of this model, its `total_slots` equal to streams. processes: how many others will
    share it. costs: of its steps; measured where it is None. recorder: whom the backend tells of its steps.
    """

    backend: Backend
    decode: Callable[[Sequence[int]], str]
    info: EngineInfo
    streams: int
    processes: int = 0
    costs: StepCosts | None = None
    recorder: StepRecorder | None = None


class BatchEngine(Engine):
    """Streams over one `Backend`."""

    def __init__(
        self,
        load: Callable[[], LoadedModel],
        *,
        delay_frames: int,
        limits: StreamLimits | None = None,
        observer: EngineObserver | None = None,
        name: str = "",
        marker_wait_seconds: float = 0.25,
        hang_seconds: float = 30.0,
    ) -> None:
        """load: makes the model; called once, on the model thread. delay_frames: `asr_delay_in_tokens`.

        marker_wait_seconds: when nothing followed a marker for so long, silence of our own answers it.
        hang_seconds: a step that takes longer counts as failed (at least 20 times the measured step).
        """
        super().__init__(observer)
        self.info = EngineInfo("batched_asr", name, "", (), "not loaded", "", 0)
        self._load = load
        self._delay = delay_frames
        self._limits = limits or StreamLimits()
        self._marker_wait = marker_wait_seconds
        self._hang_seconds = hang_seconds
        self._thread: threading.Thread | None = None
        self._watchdog: asyncio.Task[None] | None = None
        self._ready = False
        self._stopping = False
        self._wake: threading.Event | RowHub = threading.Event()
        self._hub: RowHub | None = None
        self._lanes: dict[Stream, Lane] = {}
        self._woken: deque[Lane] = deque()
        self._step_started: float | None = None
        self._steps = 0
        self._step_seconds = 0.0
        self._warming: WarmsUpInParts | None = None
        self._forked: list[Lane] = []

    # ---- the event loop's side ---------------------------------------------------------------------------------------

    async def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        started: asyncio.Future[None] = self._loop.create_future()
        self._thread = threading.Thread(target=self._main, args=(started,), name="model", daemon=True)
        self._thread.start()
        await started
        self._ready = True
        self._watchdog = self._loop.create_task(self._watch())

    async def stop(self) -> None:
        self._ready = False
        self._stopping = True
        self._wake.set()
        if self._watchdog is not None:
            self._watchdog.cancel()
            with suppress(asyncio.CancelledError):
                await self._watchdog
            self._watchdog = None
        for lane in self._open_lanes():
            lane.stream.fail("the server is shutting down", 1001)
        self._woken.clear()
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join, 10.0)
            if self._thread.is_alive():
                log.error("the model thread did not end within 10 s; its step hangs")
            self._thread = None

    def open(self, *, live: bool = True, options: StreamOptions = NO_EXTRAS) -> Stream:
        slot = self.lend()
        stream = Stream(
            self._limits if live else self._limits.of_recordings, live=live, wake=self._wake_stream, release=self._release
        )
        self._lanes[stream] = self._table[slot.index] = Lane(
            stream, slot, partial(self._new_words, options), self._delay, self._meter(options)
        )
        stream.deliver([Ready()])
        self.observer.opened()
        return stream

    def _release(self, stream: Stream) -> None:
        """Called by `Stream.close`: the slot is free at once; a step of it that is under way goes nowhere."""
        lane = self._lanes.pop(stream)
        if self._pool.release(lane.slot):
            self._table[lane.slot.index] = None
            self.observer.closed(lane.frames)
            self._announce_free_slot()
            self._wake.set()

    def _wake_stream(self, stream: Stream) -> None:
        lane = self._lanes.get(stream)
        if lane is not None and not (lane.woken or self._stopping or self.failure):
            lane.woken = True
            self._woken.append(lane)
            self._wake.set()

    # ---- streams of other processes ----------------------------------------------------------------------------------

    @property
    def processes(self) -> int:
        """How many other processes may share the backend. Known once started."""
        return self._loaded.processes if self._ready else 0

    @property
    def heads(self) -> int:
        """Extra heads of the model; 0 means that its streams send no `Step`. Known once started."""
        return self._backend.heads

    def share(self, number: int) -> Share:
        """What process `number` (from 0) has of this engine."""
        loaded = self._loaded
        count = spare_share(loaded.streams, loaded.processes)
        first = loaded.streams + (number + 1) * count
        return Share(
            info=self.info,
            decode=loaded.decode,
            heads=self._backend.heads,
            slots=self._backend.slots,
            spares=range(first, first + count),
            costs=self._costs,
            delay_frames=self._delay,
            marker_wait_seconds=self._marker_wait,
            hang_seconds=self._hang_seconds,
            limits=self._limits,
        )

    def connect(self, on_gone: Callable[[], None]) -> Line:
        """A line to the backend for another process.

        on_gone: called on the event loop when that process has gone and no row of it is under way any more: its slots can be
        taken back.
        """
        assert self._hub is not None, "loaded for this process alone"
        rows, heads = self._loaded.streams, self._backend.heads
        memory = shared_file(RowBlock.size(rows, heads))
        try:
            block = RowBlock(memory, rows, heads)
            here, there = socket.socketpair()
        except BaseException:
            os.close(memory)
            raise
        self._hub.add(block, here, lambda: self._post(on_gone))
        return Line(memory, there)

    def lend(self) -> Slot:
        """A slot for a stream of another process. Raises NoFreeSlot, or EngineFailed after a failure, as `open` does."""
        self._check_ready()
        try:
            return self._pool.acquire()
        except NoFreeSlot:
            self.observer.refused()
            raise

    def take_back(self, slot: Slot) -> None:
        """A lent slot that no row of the other process will name again."""
        if self._pool.release(slot):
            self._announce_free_slot()

    def _check_ready(self) -> None:
        if self.failure is not None:
            raise EngineFailed(str(self.failure))
        if not self._ready:
            raise EngineError("the model is not loaded yet, or the server is shutting down")

    @property
    def ready(self) -> bool:
        return self._ready and self.failure is None

    @property
    def used_slots(self) -> int:
        return self._pool.used if self._ready else 0

    @property
    def queued_samples(self) -> int:
        return sum(lane.stream.pending_samples for lane in self._open_lanes())

    def _open_lanes(self) -> list[Lane]:
        return [lane for lane in getattr(self, "_table", ()) if lane is not None]

    async def _watch(self) -> None:
        """Fail the engine when a step hangs."""
        limit = max(self._hang_seconds, 20 * self._costs.slowest)
        while self.failure is None:
            await asyncio.sleep(limit / 8)
            started = self._step_started
            if started is not None and time.monotonic() - started > limit:
                self._fail(
                    EngineFailed(f"a model step has not come back for {limit:g} s; the device hangs. Restart the server.")
                )

    def _fail(self, failure: EngineFailed) -> None:
        """Every stream ends with an `Error`; nothing new is admitted."""
        if self.failure is not None or self._stopping:
            return
        self._announce_failure(failure)
        for lane in self._open_lanes():
            lane.stream.fail(str(failure), 1011)
            self.observer.failed()
        self._woken.clear()

    def _deliver(self, deliveries: list[Delivery], arrivals: list[float]) -> None:
        deliver_all(deliveries)
        now = time.monotonic()
        for arrived in arrivals:
            self.observer.lagged(now - arrived)

    # ---- the model thread --------------------------------------------------------------------------------------------

    def _main(self, started: "asyncio.Future[None]") -> None:
        """Load, run, free. Whatever goes wrong is told on the event loop."""
        backend: Backend | None = None
        recorder: StepRecorder | None = None
        running = False
        try:
            loaded = self._load()
            backend, recorder = loaded.backend, loaded.recorder
            self._adopt(loaded)
            if recorder is not None:
                recorder.start()
            running = True
            self._post(_set_result, started)
            self._run()
        except Exception as error:
            if running:
                log.exception("the engine failed")
                self._post(self._fail, EngineFailed(f"a model step failed: {type(error).__name__}: {error}"))
            elif isinstance(error, MoshiSttError):
                self._post(_set_exception, started, error)
            else:
                log.exception("the model could not be started")
                text = f"the model could not be started: {type(error).__name__}: {error}"
                self._post(_set_exception, started, EngineError(text))
        finally:
            self._step_started = None
            if self._hub is not None:
                self._hub.close()
            if backend is not None:
                with suppress(Exception):
                    backend.close()
            if recorder is not None:
                recorder.stop()

    def _run(self) -> None:
        """Turn, and wait where there is nothing to do."""
        backend = self._backend
        watch = StallWatch((lambda: backend.device_seconds) if isinstance(backend, TimesSteps) else lambda: None)
        turns = 0
        try:
            while not self._stopping and self.failure is None:
                self._wake.clear()
                watch.begin()
                now, self._step_seconds = time.monotonic(), 0.0
                rows = self._turn(now)
                turns += 1
                if self._warming is not None and (not rows or turns % WARMING_TURNS == 0):
                    self._go_on_warming_up(watch)
                watch.end(rows, self._step_seconds)
                if not rows:
                    self._wake.wait(self._idle_seconds(now))
        finally:
            watch.close()

    def _go_on_warming_up(self, watch: StallWatch) -> None:
        """Do the next part of the warm-up, between two steps."""
        assert self._warming is not None
        if not self._warming.go_on_warming_up():
            self._warming = None
        watch.note("went on warming up")

    def _turn(self, now: float) -> int:
        """Gather, step, scatter. How many rows were stepped."""
        self._drain(now)
        requests = self._hub.collect(self._backend.copy) if self._hub is not None else []
        others = sum(request.rows for request in requests)
        lanes = self._gather(now, others)
        if lanes or requests:
            output = self._step(len(lanes), requests)
            if self._hub is not None and requests:
                self._hub.answer(requests, output, len(lanes))
                output = output.rows(0, len(lanes))
            self._scatter(lanes, output)
        return len(lanes) + others

    def _drain(self, now: float) -> None:
        """Take every pending command of every stream that has some, so that small packets cost no turns."""
        deliveries: list[Delivery] = []
        while (lane := self._next_woken()) is not None:
            lane.woken = False  # before the drain: what comes during it wakes the lane again
            events = lane.absorb(now)
            if events or lane.done:
                deliveries.append(Delivery(lane.stream, events, lane.done))
        if deliveries:
            self._post(self._deliver, deliveries, [])

    def _next_woken(self) -> Lane | None:
        try:
            return self._woken.popleft()
        except IndexError:  # also where the event loop has just let go of them all
            return None

    def _gather(self, now: float, others: int) -> list[Lane]:
        """Choose the lanes that step now, beside so many rows of others, and write their frames and slots into the batch."""
        self._fork_stalled(now)
        lanes = [lane for lane in self._table if lane is not None and lane.has_row and (lane.stream.writable or lane.borrows)]
        lanes = self._choose(lanes, now, others)
        turn = self._steps
        for lane, row in zip(lanes, self._inputs.pcm, strict=False):
            lane.gather(row)
            lane.turn = turn
        self._inputs.slots[: len(lanes)] = [lane.row_slot for lane in lanes]
        self._inputs.fresh[: len(lanes)] = [lane.row_fresh for lane in lanes]
        return lanes

    def _choose(self, lanes: list[Lane], now: float, others: int) -> list[Lane]:
        """Live streams before files: files take what room is left, those that waited longest first. Others' rows are live."""
        files = [lane for lane in lanes if not lane.stream.live]
        if not files or not self._is_spoken(now):
            return lanes
        live = [lane for lane in lanes if lane.stream.live]
        room = self._costs.rows_within(LIVE_BUDGET_SECONDS, len(self._table)) - len(live) - others
        if room <= 0:
            room = 1 if self._steps % FILE_TURN == 0 or not live else 0
        files.sort(key=lambda lane: lane.turn)
        return live + files[:room]

    def _is_spoken(self, now: float) -> bool:
        """Whether a live stream was heard within the last second."""
        if self._hub is not None and now - self._hub.heard_at < 1.0:
            return True
        return any(lane is not None and lane.stream.live and now - lane.heard_at < 1.0 for lane in self._table)

    def _step(self, rows: int, requests: Sequence[RowRequest]) -> StepOutput:
        """Step the gathered rows, and behind them those of other processes."""
        for request in requests:
            self._inputs.put(request.port.block.inputs.rows(0, request.rows), rows)
            rows += request.rows
        self._step_started = begun = time.monotonic()
        output = self._backend.step(*self._inputs.rows(0, rows))
        self._step_started = None
        self._steps += 1
        self._step_seconds = time.monotonic() - begun
        self._stepped(self._step_seconds, rows)
        return output

    def _stepped(self, seconds: float, rows: int) -> None:
        self.observer.stepped(seconds, rows)

    def _scatter(self, lanes: list[Lane], output: StepOutput) -> None:
        """Each row's output to its own stream, all in one turn of the event loop."""
        now, index = time.monotonic(), FIRST_STEP_IDX - 1 + self._steps
        pauses = output.pause.tolist() if self._backend.heads else [None] * len(lanes)
        deliveries: list[Delivery] = []
        arrivals: list[float] = []
        rows = zip(lanes, output.text_token.tolist(), output.logprob.tolist(), pauses, strict=True)
        for lane, token, logprob, pause in rows:
            had_tail = lane.tail
            events = lane.scatter(token, logprob, pause, index)
            if had_tail is not None and lane.tail is None:
                self._give_back(had_tail.spare)
            if lane.marks:
                lane.heard_at = now  # a client that waits for our answer has its time from here
            if lane.commands:
                events += lane.absorb(now)
            if events or lane.done:
                deliveries.append(Delivery(lane.stream, events, lane.done))
                arrivals.append(lane.arrived)
        if deliveries:
            self._post(self._deliver, deliveries, arrivals)

    # ---- markers behind which nothing came ---------------------------------------------------------------------------

    def _fork_stalled(self, now: float) -> None:
        """Start a tail on a copy of the slot where a marker has waited long enough; while all copies are in use, it waits."""
        for lane in self._forked:
            if lane.stream.closed and lane.tail is not None:
                self._give_back(lane.tail.spare)
                lane.tail = None
        self._forked = [lane for lane in self._forked if lane.tail is not None]
        for lane in self._waiting_lanes():
            if now - lane.heard_at < self._marker_wait:
                continue
            if lane.fresh:  # no state yet: its own slot serves, and is started from zero again
                lane.fork(lane.slot.index, None)
            elif self._spares.used < self._spares.total:
                spare = self._spares.acquire()
                self._backend.copy(lane.slot.index, spare.index)
                lane.fork(spare.index, spare)
                self._forked.append(lane)

    def _give_back(self, spare: Slot | None) -> None:
        if spare is not None:
            self._spares.release(spare)

    def _waiting_lanes(self) -> list[Lane]:
        return [lane for lane in self._table if lane is not None and lane.marks and lane.waiting and lane.stream.writable]

    def _idle_seconds(self, now: float) -> float | None:
        """How long nothing happens unless somebody wakes this thread."""
        waits = [self._marker_wait - (now - lane.heard_at) for lane in self._waiting_lanes()]
        if self._warming is not None:
            waits.append(WARMING_SECONDS)
        return max(0.001, min(waits)) if waits else None

    # ---- start -------------------------------------------------------------------------------------------------------

    def _adopt(self, loaded: LoadedModel) -> None:
        """Take over a model: tables for its slots, warm it, measure it."""
        backend, streams = loaded.backend, loaded.streams
        least = spare_share(streams, loaded.processes) * loaded.processes + 1
        if backend.slots < streams + least:
            raise EngineError(
                f"a backend of {backend.slots} slots cannot carry {streams} streams: {least} more are needed at least"
            )
        self._loaded = loaded
        self._backend = backend
        self._pool, self._spares = self._pools(loaded)
        self._table: list[Lane | None] = [None] * streams
        if isinstance(backend, TakesInPlace) and len(backend.inputs.slots) >= streams:
            self._inputs = backend.inputs
        else:
            pcm = np.zeros((streams, FRAME_SAMPLES), np.float32)
            self._inputs = StepInputs(pcm, np.zeros(streams, np.int64), np.zeros(streams, np.bool_))
        begun = time.monotonic()
        if isinstance(backend, WarmsUpInParts):
            backend.begin_warm_up()
            self._warming = backend
        else:
            backend.warm_up()
        warm = time.monotonic()
        self._costs = loaded.costs if loaded.costs is not None else measure(backend, streams)
        log.info("start: warming up took %.1f s, measuring steps %.1f s", warm - begun, time.monotonic() - warm)
        if loaded.processes:
            self._hub = self._wake = RowHub()
        self.info = replace(loaded.info, total_slots=streams, details=loaded.info.details | self._costs.describe(streams))

    def _new_words(self, options: StreamOptions) -> WordAssembler:
        """The word assembler of a new stream, or of one that was reset."""
        return WordAssembler(self._loaded.decode, self._delay, confidence=options.confidence, interim=options.interim)

    def _meter(self, options: StreamOptions) -> PauseMeter | None:
        """What makes the `Pause` events of a stream that asked for turns: from the model's heads, else from a detector."""
        if not options.turns:
            return None
        return PauseMeter(None if self._backend.heads else SpeechDetector())

    def _pools(self, loaded: LoadedModel) -> tuple[SlotPool, SlotPool]:
        """The slots that this process lends: of streams, and for copies."""
        own = loaded.backend.slots - loaded.streams
        if loaded.processes:
            own = spare_share(loaded.streams, loaded.processes)
        return SlotPool(loaded.streams), SlotPool(own, first=loaded.streams)

    def _post(self, call: Callable[..., object], *args: object) -> None:
        """Run on the event loop; nothing when that is closed already."""
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(call, *args)


def _set_result(future: "asyncio.Future[None]") -> None:
    if not future.done():
        future.set_result(None)


def _set_exception(future: "asyncio.Future[None]", error: BaseException) -> None:
    if not future.done():
        future.set_exception(error)
