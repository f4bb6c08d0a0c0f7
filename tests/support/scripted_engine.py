"""An engine that says what a script says: one `Step` a frame, words at given frames. Knows no model; its thread is a real one.

It keeps the whole contract of `Engine` and `Stream`: commands are drained and stepped in a worker thread, a full outbox stops
a stream, a marker comes behind `delay_frames` of silence that the engine supplies itself. Tests can hold it still (`hold`,
`release`), make its next step fail (`fail_next`), or make it slow.
"""

import asyncio
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from moshi_stt.constants import FRAME_SAMPLES, FRAME_SECONDS
from moshi_stt.engine.commands import Audio, Finish, Mark, Reset
from moshi_stt.engine.engine import NO_EXTRAS, Engine, EngineInfo, EngineObserver, StreamOptions
from moshi_stt.engine.stream import Delivery, Stream, StreamLimits, deliver_all
from moshi_stt.errors import EngineError, EngineFailed, NoFreeSlot
from moshi_stt.events import AnyEvent, EndWord, Marker, Ready, Step, Word

PRS = (0.5, 0.25, 0.125, 0.0625)


@dataclass(frozen=True)
class ScriptedWord:
    """A word that is spoken between two frames of the stream's own count."""

    text: str
    start_frame: int
    end_frame: int


def counting(words: int, every_frames: int = 2) -> list[ScriptedWord]:
    """`words` words named w0, w1, …, one every `every_frames` frames."""
    return [ScriptedWord(f"w{i}", i * every_frames, i * every_frames + every_frames - 1) for i in range(words)]


@dataclass
class _Slot:
    """What the worker keeps of one stream."""

    stream: Stream
    buffered: int = 0
    frame: int = 0
    steps: int = 0
    next_word: int = 0
    open_word: ScriptedWord | None = None
    commands: list[Mark | Reset | Finish | int] = field(default_factory=list)
    """In order; an int is that many samples."""
    samples_seen: int = 0
    ready_due: bool = True


class ScriptedEngine(Engine):
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
    ) -> None:
        """steps: whether streams get `Step`s, as with a model that has extra heads."""
        super().__init__(observer)
        self.words = list(words)
        self.delay_frames = delay_frames
        self.send_steps = steps
        self.step_seconds = step_seconds
        self.limits = limits or StreamLimits()
        self.info = EngineInfo(kind, "scripted", "", ("en",), "cpu", "float32", slots)
        self.streams_opened = 0
        self.samples: list[int] = []
        """Samples that each ended stream was fed, in the order of their end."""
        self._lock = threading.Condition()
        self._slots: dict[Stream, _Slot] = {}
        self._thread: threading.Thread | None = None
        self._stopping = False
        self._work = False
        self._held = False
        self._fail_message: str | None = None

    # ---- knobs -------------------------------------------------------------------------------------------------------

    def hold(self) -> None:
        """Step nothing until `release`."""
        with self._lock:
            self._held = True

    def release(self) -> None:
        with self._lock:
            self._held = False
        self._wake()

    def fail_next(self, message: str = "scripted failure") -> None:
        """The next step of any stream raises."""
        with self._lock:
            self._fail_message = message
        self._wake()

    def release_failing(self, message: str) -> None:
        """Go on from `hold` with a step that raises."""
        with self._lock:
            self._held = False
            self._fail_message = message
        self._wake()

    # ---- Engine ------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._run, name="scripted-engine", daemon=True)
        self._thread.start()

    async def stop(self) -> None:
        thread, self._thread = self._thread, None
        if thread is None:
            return
        with self._lock:
            self._stopping = True
            self._lock.notify()
        await asyncio.to_thread(thread.join)
        for stream in list(self._slots):
            stream.fail("the server is shutting down", 1001)

    def open(self, *, live: bool = True, options: StreamOptions = NO_EXTRAS) -> Stream:
        if self.failure is not None:
            raise self.failure
        if self._thread is None:
            raise EngineError("the engine is not started")
        if len(self._slots) >= self.info.total_slots:
            self.observer.refused()
            raise NoFreeSlot
        stream = Stream(self.limits, live=live, wake=lambda _: self._wake(), release=self._free)
        with self._lock:
            self._slots[stream] = _Slot(stream)
        self.streams_opened += 1
        self.observer.opened()
        self._wake()
        return stream

    @property
    def ready(self) -> bool:
        return self._thread is not None and self.failure is None

    @property
    def used_slots(self) -> int:
        return len(self._slots)

    @property
    def queued_samples(self) -> int:
        with self._lock:
            return sum(stream.pending_samples for stream in self._slots)

    # ---- the worker --------------------------------------------------------------------------------------------------

    def _wake(self) -> None:
        with self._lock:
            self._work = True
            self._lock.notify()

    def _free(self, stream: Stream) -> None:
        with self._lock:
            slot = self._slots.pop(stream, None)
        if slot is not None:
            self.samples.append(slot.samples_seen)
            self.observer.closed(slot.steps)
            self._announce_free_slot()

    def _run(self) -> None:
        while True:
            with self._lock:
                while not self._stopping and (self._held or not (self._work or self._fail_message)):
                    self._lock.wait()
                if self._stopping:
                    return
                self._work = False
                slots = list(self._slots.values())
                failure = self._fail_message
            try:
                if failure is not None:
                    raise RuntimeError(failure)
                self._turn(slots)
            except Exception as error:
                self._loop.call_soon_threadsafe(self._fail, EngineFailed(str(error)))
                return

    def _turn(self, slots: list[_Slot]) -> None:
        """One frame, at most, of each stream."""
        began = time.perf_counter()
        deliveries: list[Delivery] = []
        rows = 0
        for slot in slots:
            if not slot.stream.writable:
                continue
            for command in slot.stream.drain():
                if isinstance(command, Audio):
                    slot.commands.append(len(command.samples))
                    slot.samples_seen += len(command.samples)
                else:
                    slot.commands.append(command)
            if slot.ready_due:
                slot.ready_due = False
                deliveries.append(Delivery(slot.stream, [Ready()]))
            events, ended, stepped = self._advance(slot)
            rows += stepped
            if events or ended:
                deliveries.append(Delivery(slot.stream, events, ended))
        if rows:
            if self.step_seconds:
                time.sleep(self.step_seconds)
            self.observer.stepped(time.perf_counter() - began, rows)
            with self._lock:
                self._work = True
        if deliveries:
            self._loop.call_soon_threadsafe(deliver_all, deliveries)

    def _advance(self, slot: _Slot) -> tuple[list[AnyEvent], bool, bool]:
        """Events, whether the stream has ended, and whether a frame was stepped."""
        events: list[AnyEvent] = []
        while slot.commands:
            command = slot.commands[0]
            if isinstance(command, int):
                need = FRAME_SAMPLES - slot.buffered
                take = min(need, command)
                slot.buffered += take
                if take == command:
                    slot.commands.pop(0)
                else:
                    slot.commands[0] = command - take
                if slot.buffered == FRAME_SAMPLES:
                    slot.buffered = 0
                    slot.stream.stepped(FRAME_SAMPLES)
                    events += self._step(slot)
                    return events, False, True
                continue
            slot.commands.pop(0)
            if isinstance(command, Reset):
                self._restart(slot)
                events.append(Ready())
                continue
            if not isinstance(command, Mark):
                slot.stream.stepped(slot.buffered)
            if isinstance(command, Mark):
                events += self._mark(slot, command.id)
                continue
            if slot.buffered:
                slot.buffered = 0
                events += self._step(slot)
            return [*events, *self._lookahead(slot)], True, True
        return events, False, False

    def _mark(self, slot: _Slot, id: int) -> list[AnyEvent]:
        return [*self._lookahead(slot), Marker(id)]

    def _lookahead(self, slot: _Slot) -> list[AnyEvent]:
        """What comes when the engine supplies `delay_frames` of silence: the words that began by now, without their steps."""
        events: list[AnyEvent] = []
        until = slot.frame + (slot.buffered > 0)
        while slot.next_word < len(self.words) and self.words[slot.next_word].start_frame < until:
            events += self._word(slot)
        if slot.open_word is not None:
            events.append(EndWord(round(slot.frame * FRAME_SECONDS, 6)))
            slot.open_word = None
        return events

    def _word(self, slot: _Slot) -> list[AnyEvent]:
        word = self.words[slot.next_word]
        slot.next_word += 1
        slot.open_word = word
        return [Word(word.text, round(word.start_frame * FRAME_SECONDS, 6))]

    def _step(self, slot: _Slot) -> list[AnyEvent]:
        """One frame: Step, then EndWord or Word as due, `delay_frames` later than spoken."""
        heard = slot.frame - self.delay_frames
        events: list[AnyEvent] = []
        if self.send_steps:
            events.append(Step(slot.steps + 3, PRS, max(0, slot.stream.pending_samples)))
        if slot.open_word is not None and slot.open_word.end_frame <= heard:
            events.append(EndWord(round(slot.open_word.end_frame * FRAME_SECONDS, 6)))
            slot.open_word = None
        if slot.next_word < len(self.words) and self.words[slot.next_word].start_frame <= heard and slot.open_word is None:
            events += self._word(slot)
        slot.frame += 1
        slot.steps += 1
        return events

    def _restart(self, slot: _Slot) -> None:
        slot.frame = slot.next_word = 0
        slot.open_word = None

    def _fail(self, failure: EngineFailed) -> None:
        for stream in list(self._slots):
            stream.fail(f"the model failed: {failure}", 1011)
            self.observer.failed()
        self._announce_failure(failure)
