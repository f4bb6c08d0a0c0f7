"""The engine of recognisers that want whole utterances: many streams on a small pool of threads. Knows no model and no socket.

A turn is one stream's: take what it sent, go through its audio up to the next hypothesis, deliver what came out. Streams
that have work wait in line, live ones before files, and go to the end of the line after each turn; so all advance alike, and
one that sent an hour of audio delays another by one hypothesis. Nothing is skipped under load: what a stream says depends on
its audio alone, and one that sends faster than the machine can follow fills its inbox and waits.
"""

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace

import numpy as np

from moshi_stt.audio.resample import StreamingResampler
from moshi_stt.constants import SAMPLE_RATE
from moshi_stt.cores import usable_cores
from moshi_stt.engine.commands import Audio, Command, Mark, Reset
from moshi_stt.engine.engine import NO_EXTRAS, Engine, EngineInfo, EngineObserver, StreamOptions
from moshi_stt.engine.recogniser import RECOGNISER_RATE, Recogniser
from moshi_stt.engine.segmenter import Segmenter, SegmentSettings
from moshi_stt.engine.stream import Delivery, Stream, StreamLimits, deliver_all
from moshi_stt.errors import EngineError, EngineFailed, MoshiSttError, NoFreeSlot
from moshi_stt.events import AnyEvent, Error, Marker, Ready

log = logging.getLogger(__name__)

TURN_SAMPLES = SAMPLE_RATE
"""Audio of one stream that is gone through in one turn, if no hypothesis comes before."""

FILE_TURN = 4
"""Every so many turns a file goes first, so that live streams that fill the machine leave it some."""

JOIN_SECONDS = 10.0


class _StreamState:
    """One stream inside the engine. A worker that has taken it from the line is alone with it."""

    def __init__(self, stream: Stream, segmenter: Segmenter) -> None:
        self.stream = stream
        self.segmenter = segmenter
        self.commands: deque[Command] = deque()
        self.work: Iterator[list[AnyEvent]] | None = None
        self.command: Command | None = None
        """What `work` is going through; of long `Audio`, the piece."""
        self.arrived = 0.0
        """When the last sample, or the mark behind it, came that the next event may depend on."""
        self.absorbed = 0.0
        self.state = "idle"
        """idle, waiting (in line), running (with a worker), or woken (running, and to be put in line again)."""
        self.done = False

    def absorb(self) -> None:
        """Take what the client sent since the last turn."""
        self.absorbed = time.monotonic()
        self.commands.extend(self.stream.drain())

    def begin(self) -> bool:
        """Start on the next command. False when there is none."""
        if not self.commands:
            return False
        command = self.commands.popleft()
        if isinstance(command, Audio):
            self.arrived = self.absorbed if command.arrived is None else command.arrived
            piece = command.samples[:TURN_SAMPLES]
            if len(piece) < len(command.samples):
                self.commands.appendleft(Audio(command.samples[TURN_SAMPLES:], command.arrived))
            self.command = Audio(piece, command.arrived)
            self.work = self.segmenter.feed(piece)
        else:
            self.arrived = max(self.arrived, self.absorbed)
            self.command = command
            self.work = self.segmenter.flush()
        return True

    def end(self) -> tuple[int, list[AnyEvent]]:
        """The command is through: samples that left our hands, and what it is answered by."""
        command, self.command, self.work = self.command, None, None
        if isinstance(command, Audio):
            return len(command.samples), []
        if isinstance(command, Mark):
            return 0, [Marker(command.id)]
        if isinstance(command, Reset):
            self.segmenter.reset()
            return 0, [Ready()]
        self.done = True
        return 0, []


class SegmentEngine(Engine):
    """Streams on a pool of recogniser threads. See the module's text for how they share it."""

    cuts_speech = True

    def __init__(
        self,
        load: Callable[[], Recogniser],
        *,
        slots: int,
        threads: int = 0,
        limits: StreamLimits | None = None,
        observer: EngineObserver | None = None,
        settings: SegmentSettings | None = None,
    ) -> None:
        """load: called once, on another thread, by `start`. slots: streams at once. threads: 0 for every usable core."""
        super().__init__(observer)
        self.info = EngineInfo("embedded", "", "", (), "cpu", "int8", slots)
        self._load = load
        self._threads_wanted = threads or usable_cores()
        self._limits = limits or StreamLimits()
        self._settings = settings or SegmentSettings()
        self._recogniser: Recogniser | None = None
        self._lanes: dict[Stream, _StreamState] = {}
        self._line = threading.Condition()
        self._live: deque[_StreamState] = deque()
        self._files: deque[_StreamState] = deque()
        self._turns = 0
        self._threads: list[threading.Thread] = []
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
        self.info = replace(
            self.info, model=recogniser.name, languages=recogniser.languages, details=self._describe(recogniser, loaded, cost)
        )
        self._threads = [
            threading.Thread(target=self._main, name=f"recogniser-{index}", daemon=True)
            for index in range(self._threads_wanted)
        ]
        for thread in self._threads:
            thread.start()
        self._ready = True

    def _describe(self, recogniser: Recogniser, load_seconds: float, cost: float) -> dict[str, str]:
        held = int(min(self._threads_wanted, usable_cores()) / cost)
        return {
            "loaded in": f"{load_seconds:.1f} s",
            "recogniser threads": str(self._threads_wanted),
            "cost of a live stream": f"{cost:.2f} of a core, measured",
            "real-time streams": f"about {held} on this machine" if held else "none: this machine is too slow",
            **recogniser.notes,
        }

    async def stop(self) -> None:
        self._ready = False
        self._stopping = True
        self._dismiss()
        for stream in list(self._lanes):
            stream.fail("the server is shutting down", 1001)
        for thread in self._threads:
            await asyncio.to_thread(thread.join, JOIN_SECONDS)
            if thread.is_alive():
                log.error("%s did not end within %g s", thread.name, JOIN_SECONDS)
        self._threads = []
        if self._recogniser is not None:
            self._recogniser.close()
            self._recogniser = None

    def open(self, *, live: bool = True, options: StreamOptions = NO_EXTRAS) -> Stream:
        if self.failure is not None:
            raise EngineFailed(str(self.failure))
        if not self._ready or self._recogniser is None:
            raise EngineError("the model is not loaded yet, or the server is shutting down")
        if len(self._lanes) >= self.info.total_slots:
            self.observer.refused()
            raise NoFreeSlot
        stream = Stream(self._limits if live else self._limits.of_recordings, live=live, wake=self._wake, release=self._release)
        settings = self._settings if live or options.interim else replace(self._settings, while_speaking=False)
        segmenter = Segmenter(self._recogniser, settings, options, lambda: stream.pending_samples)
        self._lanes[stream] = _StreamState(stream, segmenter)
        stream.deliver([Ready()])
        self.observer.opened()
        return stream

    def _release(self, stream: Stream) -> None:
        """Called by `Stream.close`: the slot is free at once; a turn of it that is under way goes nowhere."""
        lane = self._lanes.pop(stream)
        self.observer.closed(lane.segmenter.hypotheses)
        self._announce_free_slot()

    @property
    def ready(self) -> bool:
        return self._ready and self.failure is None

    @property
    def used_slots(self) -> int:
        return len(self._lanes)

    @property
    def queued_samples(self) -> int:
        return sum(stream.pending_samples for stream in self._lanes)

    def _fail(self, failure: EngineFailed) -> None:
        """Every stream ends with an `Error`; nothing new is admitted."""
        if self.failure is not None or self._stopping:
            return
        self._announce_failure(failure)
        self._dismiss()
        for stream in list(self._lanes):
            stream.fail(str(failure), 1011)
            self.observer.failed()

    def _deliver(self, delivery: Delivery, arrived: float, failed: bool) -> None:
        if failed and not delivery.stream.ended:
            self.observer.failed()
        deliver_all([delivery])
        if delivery.events and not failed:
            self.observer.lagged(time.monotonic() - arrived)

    # ---- the line ----------------------------------------------------------------------------------------------------

    def _wake(self, stream: Stream) -> None:
        """Put the stream in line, if it is not there. Any thread."""
        lane = self._lanes.get(stream)
        if lane is None:
            return
        with self._line:
            if lane.state == "idle":
                self._enqueue(lane)
            elif lane.state == "running":
                lane.state = "woken"

    def _dismiss(self) -> None:
        """There are no more turns: let the workers end, and let go of the streams that waited for one."""
        with self._line:
            self._live.clear()
            self._files.clear()
            self._line.notify_all()

    def _enqueue(self, lane: _StreamState) -> None:
        if self._stopping or self.failure:
            return
        lane.state = "waiting"
        (self._live if lane.stream.live else self._files).append(lane)
        self._line.notify()

    def _next(self) -> _StreamState | None:
        """The lane whose turn it is, waiting for one; None when the engine stops."""
        with self._line:
            while not (self._live or self._files or self._stopping or self.failure):
                self._line.wait()
            if self._stopping or self.failure:
                return None
            self._turns += 1
            file_first = self._files and (not self._live or self._turns % FILE_TURN == 0)
            lane = (self._files if file_first else self._live).popleft()
            lane.state = "running"
            return lane

    def _put_back(self, lane: _StreamState, *, more: bool) -> None:
        with self._line:
            if more or lane.state == "woken":
                self._enqueue(lane)
            else:
                lane.state = "idle"

    # ---- the workers -------------------------------------------------------------------------------------------------

    def _main(self) -> None:
        while (lane := self._next()) is not None:
            more = False
            try:
                if not (lane.done or lane.stream.closed):
                    more = self._turn(lane)
            except Exception as error:
                self._blame(lane, error)
            self._put_back(lane, more=more)
            del lane  # while this thread waits for the next one, nothing keeps an ended stream

    def _turn(self, lane: _StreamState) -> bool:
        """Go through one stream's commands up to the next hypothesis or TURN_SAMPLES of audio; whether there is more to do."""
        stream, segmenter = lane.stream, lane.segmenter
        lane.absorb()
        heard = 0
        while heard < TURN_SAMPLES and not lane.done:
            if not stream.writable:
                return False  # `take` wakes the lane when there is room again
            if lane.work is None and not lane.begin():
                return False
            assert lane.work is not None
            made, begun = segmenter.hypotheses, time.monotonic()
            events = next(lane.work, None)
            seconds = time.monotonic() - begun
            if events is None:
                samples, events = lane.end()
                heard += samples
                if samples:
                    stream.stepped(samples)
            if segmenter.hypotheses > made:
                heard = TURN_SAMPLES
                self.observer.stepped(seconds, 1)
            if events or lane.done:
                self._post(self._deliver, Delivery(stream, events, lane.done), lane.arrived, False)
        return not lane.done

    def _blame(self, lane: _StreamState, error: Exception) -> None:
        """A turn raised: where the model still takes its own sample, this stream's audio did it; else the model is broken."""
        log.error("recognition failed", exc_info=error)
        lane.done = True
        lane.work = None
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
        self._post(self._deliver, Delivery(lane.stream, [Error(reason, 1011)], True), lane.arrived, True)

    def _post(self, call: Callable[..., object], *args: object) -> None:
        """Run on the event loop; nothing when that is closed already."""
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(call, *args)


def measure(recogniser: Recogniser, settings: SegmentSettings) -> float:
    """Warm the recogniser up and return what a stream of speech costs: seconds of one thread for a second of audio."""
    sample = recogniser.sample()
    recogniser.align(sample, [word.text for word in recogniser.recognise(sample).words])
    resampler = StreamingResampler(RECOGNISER_RATE, SAMPLE_RATE)
    pcm = np.concatenate([resampler.feed(sample), resampler.finish()])
    segmenter = Segmenter(recogniser, settings)
    begun = time.thread_time()
    for work in (segmenter.feed(pcm), segmenter.flush()):
        for _events in work:
            pass
    return max((time.thread_time() - begun) / (len(pcm) / SAMPLE_RATE), 1e-6)
