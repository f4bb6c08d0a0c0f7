"""The engine of frame-synchronous models: many streams, one model thread, one `Backend`. Knows no model and no socket.

The model thread turns: drain what woken streams sent, gather the rows that have a frame, step them, scatter what came
out. A step starts as soon as there is one row, so a lone stream never waits; while it runs, the frames of others gather for
the next one, so a busy engine steps many rows at once without any timer. Ways and reasons: docs/engine.md.
"""

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import numpy as np

from moshi_stt.constants import FRAME_SAMPLES, FRAME_SECONDS
from moshi_stt.engine.engine import Ages, Backend, Engine, EngineInfo, EngineObserver, StepOutput, TakesInPlace
from moshi_stt.engine.lane import Lane
from moshi_stt.engine.slots import Slot, SlotPool
from moshi_stt.engine.stream import Delivery, Stream, StreamLimits, deliver_all
from moshi_stt.errors import EngineError, EngineFailed, MoshiSttError, NoFreeSlot
from moshi_stt.events import Ready
from moshi_stt.text.words import WordAssembler

log = logging.getLogger(__name__)

FIRST_STEP_IDX = 3
"""moshi-server counts its two warm-up steps, so the first step of a process is 3."""

LIVE_BUDGET_SECONDS = FRAME_SECONDS / 2
"""While live streams speak, rows of files are added only as far as a step is expected to stay below this."""

FILE_TURN = 8
"""Where there is no room at all for files beside live streams, one file row goes along in each so manieth step."""


@dataclass(frozen=True)
class LoadedModel:
    """What `BatchEngine`'s loader hands over, made on the model thread.

    backend: with `streams + spare_slots(streams)` slots at least. decode: ids of one word to its text.
    info: of this model, its `total_slots` equal to streams.
    """

    backend: Backend
    decode: Callable[[Sequence[int]], str]
    info: EngineInfo
    streams: int


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
        self._wake = threading.Event()
        self._woken: deque[Lane] = deque()
        self._step_started: float | None = None
        self._steps = 0
        self._forked: list[Lane] = []
        self._costs: list[tuple[int, float]] = []
        """(rows, seconds) of a step, measured at start, by rows."""

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
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join, 10.0)
            if self._thread.is_alive():
                log.error("the model thread did not end within 10 s; its step hangs")
            self._thread = None

    def open(self, *, live: bool = True) -> Stream:
        if self.failure is not None:
            raise EngineFailed(str(self.failure))
        if not self._ready:
            raise EngineError("the model is not loaded yet, or the server is shutting down")
        try:
            slot = self._pool.acquire()
        except NoFreeSlot:
            self.observer.refused()
            raise
        stream = Stream(self._limits, live=live, wake=lambda: self._wake_lane(lane), release=lambda _: self._release(lane))
        lane = Lane(stream, slot, self._new_words, self._delay)
        self._table[slot.index] = lane
        stream.deliver([Ready()])
        self.observer.opened()
        return stream

    def _release(self, lane: Lane) -> None:
        """Called by `Stream.close`: the slot is free at once; a step of it that is under way goes nowhere."""
        if self._pool.release(lane.slot):
            self._table[lane.slot.index] = None
            self.observer.closed(lane.frames)
            self._announce_free_slot()
            self._wake.set()

    def _wake_lane(self, lane: Lane) -> None:
        if not lane.woken:
            lane.woken = True
            self._woken.append(lane)
            self._wake.set()

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
        limit = max(self._hang_seconds, 20 * max((seconds for _, seconds in self._costs), default=0.0))
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

    def _deliver(self, deliveries: list[Delivery], arrivals: list[float]) -> None:
        deliver_all(deliveries)
        now = time.monotonic()
        for arrived in arrivals:
            self.observer.lagged(now - arrived)

    # ---- the model thread --------------------------------------------------------------------------------------------

    def _main(self, started: "asyncio.Future[None]") -> None:
        """Load, run, free. Whatever goes wrong is told on the event loop."""
        backend: Backend | None = None
        running = False
        try:
            loaded = self._load()
            backend = loaded.backend
            self._adopt(loaded)
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
            if backend is not None:
                with suppress(Exception):
                    backend.close()

    def _run(self) -> None:
        """Gather, step, scatter."""
        while not self._stopping and self.failure is None:
            self._wake.clear()
            now = time.monotonic()
            self._drain(now)
            lanes = self._gather(now)
            if lanes:
                output = self._step(len(lanes))
                self._scatter(lanes, output)
            else:
                self._wake.wait(self._idle_seconds(now))

    def _drain(self, now: float) -> None:
        """Take every pending command of every stream that has some, so that small packets cost no turns."""
        deliveries: list[Delivery] = []
        woken = self._woken
        while woken:
            lane = woken.popleft()
            lane.woken = False  # before the drain: what comes during it wakes the lane again
            events = lane.absorb(now)
            if events or lane.done:
                deliveries.append(Delivery(lane.stream, events, lane.done))
        if deliveries:
            self._post(self._deliver, deliveries, [])

    def _gather(self, now: float) -> list[Lane]:
        """Choose the lanes that step now and write their frames and slots into the batch."""
        self._fork_stalled(now)
        lanes = [lane for lane in self._table if lane is not None and lane.has_row and (lane.stream.writable or lane.borrows)]
        lanes = self._choose(lanes, now)
        turn = self._steps
        for lane, row in zip(lanes, self._pcm, strict=False):
            lane.gather(row)
            lane.turn = turn
        self._slots[: len(lanes)] = [lane.row_slot for lane in lanes]
        self._fresh[: len(lanes)] = [lane.row_fresh for lane in lanes]
        return lanes

    def _choose(self, lanes: list[Lane], now: float) -> list[Lane]:
        """Live streams before files: files take what room is left, those that waited longest first."""
        files = [lane for lane in lanes if not lane.stream.live]
        if not files or not any(lane is not None and lane.stream.live and now - lane.heard_at < 1.0 for lane in self._table):
            return lanes
        live = [lane for lane in lanes if lane.stream.live]
        room = self._rows_within(LIVE_BUDGET_SECONDS) - len(live)
        if room <= 0:
            room = 1 if self._steps % FILE_TURN == 0 or not live else 0
        files.sort(key=lambda lane: lane.turn)
        return live + files[:room]

    def _step(self, rows: int) -> StepOutput:
        self._step_started = begun = time.monotonic()
        output = self._backend.step(self._pcm[:rows], self._slots[:rows], self._fresh[:rows])
        self._step_started = None
        self._steps += 1
        self.observer.stepped(time.monotonic() - begun, rows)
        return output

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
        return max(0.001, min(waits)) if waits else None

    # ---- start -------------------------------------------------------------------------------------------------------

    def _adopt(self, loaded: LoadedModel) -> None:
        """Take over a model: tables for its slots, warm it, measure it."""
        backend, streams = loaded.backend, loaded.streams
        if backend.slots <= streams:
            raise EngineError(
                f"a backend of {backend.slots} slots cannot carry {streams} streams: one slot more is needed at least"
            )
        self._backend = backend
        self._pool = SlotPool(streams)
        self._spares = SlotPool(backend.slots - streams, first=streams)
        self._table: list[Lane | None] = [None] * streams
        self._new_words = lambda: WordAssembler(loaded.decode, self._delay)
        if isinstance(backend, TakesInPlace) and len(backend.inputs.slots) >= streams:
            self._pcm, self._slots, self._fresh = backend.inputs
        else:
            self._pcm = np.zeros((streams, FRAME_SAMPLES), np.float32)  # (B, S)
            self._slots = np.zeros(streams, np.int64)  # (B,)
            self._fresh = np.zeros(streams, np.bool_)  # (B,)
        backend.warm_up()
        self._costs = measure(backend, streams)
        self.info = replace(loaded.info, total_slots=streams, details=loaded.info.details | self._describe())

    def _describe(self) -> dict[str, str]:
        details = {f"step of {rows} row{'s' if rows > 1 else ''}": f"{1e3 * seconds:.3g} ms" for rows, seconds in self._costs}
        held = self._rows_within(FRAME_SECONDS)
        total = len(self._table)
        details["real-time streams"] = (
            f"{held} of {total} slots"
            if held
            else "none: one step takes longer than the 80 ms of audio in it; use a faster device"
        )
        return details

    def _rows_within(self, seconds: float) -> int:
        """The most rows whose step is expected to take no longer than this; 0 when not even one."""
        rows, times = zip(*self._costs, strict=True)
        if seconds < times[0]:
            return 0
        fits = int(np.interp(seconds, np.maximum.accumulate(times), rows))
        return min(fits, len(self._table))

    def _post(self, call: Callable[..., object], *args: object) -> None:
        """Run on the event loop; nothing when that is closed already."""
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(call, *args)


def measure(backend: Backend, streams: int, budget_seconds: float = 5.0) -> list[tuple[int, float]]:
    """Median seconds of a step at 1, some and all rows, as far as there is time for: [(rows, seconds), …], by rows.

    With full contexts, where the backend can pretend them.
    """
    costs: list[tuple[int, float]] = []
    begun = time.monotonic()
    for rows in sorted({1, min(8, streams), streams}):
        if costs and costs[-1][1] * rows / costs[-1][0] > budget_seconds:
            break
        pcm = np.zeros((rows, FRAME_SAMPLES), np.float32)
        slots = np.arange(rows, dtype=np.int64)
        taken: list[float] = []
        for turn in range(5):
            step_begun = time.monotonic()
            backend.step(pcm, slots, np.full(rows, turn == 0))
            taken.append(time.monotonic() - step_begun)
            if turn == 0 and isinstance(backend, Ages):
                backend.age()
            if time.monotonic() - begun > budget_seconds:
                break
        costs.append((rows, sorted(taken)[len(taken) // 2]))
        if time.monotonic() - begun > budget_seconds:
            break
    return costs


def _set_result(future: "asyncio.Future[None]") -> None:
    if not future.done():
        future.set_result(None)


def _set_exception(future: "asyncio.Future[None]", error: BaseException) -> None:
    if not future.done():
        future.set_exception(error)
