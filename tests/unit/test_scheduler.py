"""What is stepped next, turn by turn, on one thread and with a clock moved by hand."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import pytest
from tests.support.batch import noise
from tests.support.mute_model import Mute, counted
from tests.support.scripted_backend import FakeBackend, PseudoModel, spell

from moshi_stt.constants import FRAME_SAMPLES, FRAME_SECONDS, SAMPLE_RATE
from moshi_stt.engine.backend import StepInputs
from moshi_stt.engine.commands import Audio, Command, Finish, Mark, Reset
from moshi_stt.engine.marker_copies import MarkerCopies
from moshi_stt.engine.mute import MuteGuard, MuteSettings
from moshi_stt.engine.scheduler import FILE_TURN, FIRST_STEP_IDX, Scheduler
from moshi_stt.engine.slots import SlotPool
from moshi_stt.engine.stream import Stream, StreamLimits, deliver_all
from moshi_stt.engine.stream_state import StreamState
from moshi_stt.engine.timings import StepTimings
from moshi_stt.events import AnyEvent, EndWord, Marker, Ready, Step, Word
from moshi_stt.text.words import WordAssembler

STREAMS, SCRATCH, DELAY = 8, 2, 6
MARKER_WAIT = 0.25
FAST = StepTimings((1, 8), (0.001, 0.002))
SLOW = StepTimings((1, 8), (0.02, 0.16))
"""There is time for two rows next to a live one, that one counted."""


@dataclass
class Bench:
    """A scheduler over a backend without a model, driven by hand."""

    backend: FakeBackend = field(default_factory=lambda: PseudoModel(STREAMS + SCRATCH))
    timings: StepTimings = FAST
    limits: StreamLimits = field(default_factory=StreamLimits)
    now: float = 1_000.0

    def __post_init__(self) -> None:
        pcm = np.zeros((STREAMS, FRAME_SAMPLES), np.float32)
        inputs = StepInputs(pcm, np.zeros(STREAMS, np.int64), np.zeros(STREAMS, np.bool_))
        copies = MarkerCopies(self.backend.copy, SlotPool(SCRATCH, first=STREAMS), MARKER_WAIT)
        self.left: list[StreamState] = []
        self.suspects: list[StreamState] = []
        self.restarted: list[StreamState] = []
        self.scheduler = Scheduler(
            inputs,
            STREAMS,
            copies,
            self.timings,
            FRAME_SECONDS,
            on_left=self.left.append,
            on_suspect=self.suspects.append,
            on_restart=self.restarted.append,
        )
        self._slots = SlotPool(STREAMS)

    def open(self, *, live: bool = True, guard: MuteGuard | None = None) -> StreamState:
        slot = self._slots.acquire()
        state: StreamState

        def release(_: Stream) -> None:
            self._slots.release(slot)
            self.scheduler.dismiss(state)

        stream = Stream(self.limits, live=live, wake=lambda _: self.scheduler.wake(state), release=release)
        state = StreamState(stream, slot, partial(WordAssembler, spell, DELAY), DELAY, FRAME_SAMPLES, guard=guard)
        self.scheduler.admit(state)
        return state

    def send(self, state: StreamState, *commands: Command) -> None:
        for command in commands:
            if isinstance(command, Audio):
                command = Audio(command.samples, self.now)
            assert state.stream.offer(command) is None

    def turn(self, others: int = 0) -> list[StreamState]:
        """Drain, gather, step, scatter; whose rows were stepped."""
        deliver_all(self.scheduler.drain(self.now))
        states = self.scheduler.gather(self.now, others)
        if states:
            output = self.backend.step(*self.scheduler.inputs.rows(0, len(states)))
            deliver_all(self.scheduler.scatter(states, output, self.now).deliveries)
        return states

    def run(self) -> int:
        """Turns until there is nothing to do; how many steps those were."""
        steps = 0
        while self.turn():
            steps += 1
        return steps


def kinds(events: Sequence[AnyEvent]) -> list[type]:
    return [type(event) for event in events]


@pytest.fixture
async def bench() -> Bench:
    return Bench()


async def test_every_stream_with_a_frame_takes_part(bench: Bench) -> None:
    first, second, third = (bench.open() for _ in range(3))
    bench.send(first, Audio(noise(2)))
    bench.send(second, Audio(noise(0.5)))
    bench.send(third, Audio(noise(1)))
    assert bench.turn() == [first, third]
    assert bench.turn() == [first]
    assert bench.turn() == []
    bench.send(second, Audio(noise(0.5)))
    assert bench.turn() == [second]
    steps = [event for event in first.stream.take() if isinstance(event, Step)]
    assert [step.step_idx for step in steps] == [FIRST_STEP_IDX, FIRST_STEP_IDX + 1]


async def test_a_stream_whose_outbox_is_full_waits(bench: Bench) -> None:
    bench.limits = StreamLimits(outbox_events=1)
    full, other = bench.open(), bench.open()
    full.stream.deliver([Ready()])
    for state in (full, other):
        bench.send(state, Audio(noise(1)))
    assert bench.turn() == [other]
    full.stream.take()
    assert bench.turn() == [full]
    for state in (full, other):
        state.stream.close()


async def test_files_take_the_room_that_live_streams_leave() -> None:
    """There is time for two rows: one live, one file; and the file that waited longest comes first."""
    bench = Bench(timings=SLOW)
    live, first, second = bench.open(), bench.open(live=False), bench.open(live=False)
    bench.send(live, Audio(noise(4)))
    for file in (first, second):
        bench.send(file, Audio(noise(4)))
    assert [bench.turn() for _ in range(4)] == [[live, first], [live, second], [live, first], [live, second]]


async def test_files_step_together_where_nobody_speaks() -> None:
    bench = Bench(timings=SLOW)
    live, first, second = bench.open(), bench.open(live=False), bench.open(live=False)
    bench.send(live, Audio(noise(1)))
    bench.turn()
    bench.now += 10
    for file in (first, second):
        bench.send(file, Audio(noise(1)))
    assert bench.turn() == [first, second]


async def test_files_make_room_for_the_live_streams_of_other_processes() -> None:
    bench = Bench(timings=SLOW)
    files = [bench.open(live=False) for _ in range(3)]
    for file in files:
        bench.send(file, Audio(noise(3)))
    assert len(bench.turn(others=1)) == 1
    assert len(bench.turn(others=0)) == 2, "they spoke a moment ago"
    bench.now += 10
    assert len(bench.turn(others=0)) == 3


async def test_a_full_engine_still_moves_its_files() -> None:
    """One file row in every FILE_TURN-th step, however little time there is."""
    bench = Bench(timings=StepTimings((1, 8), (0.2, 0.2)))
    live, file = bench.open(), bench.open(live=False)
    bench.send(live, Audio(noise(2 * FILE_TURN)))
    bench.send(file, Audio(noise(2)))
    assert [file in bench.turn() for _ in range(2 * FILE_TURN)] == 2 * [True, *[False] * (FILE_TURN - 1)]


async def test_a_marker_that_nothing_follows_is_answered_on_a_copy(bench: Bench) -> None:
    state = bench.open()
    bench.send(state, Audio(noise(2)), Mark(7))
    bench.run()
    assert bench.scheduler.idle_seconds(bench.now) == MARKER_WAIT
    bench.now += 0.9 * MARKER_WAIT
    assert not bench.turn()
    bench.now += 0.2 * MARKER_WAIT
    assert bench.turn() == [state]
    assert state.row_slot == STREAMS
    bench.run()
    assert Marker(7) in state.stream.take()
    assert state.words.steps == 2, "its own state and clock stay where they are"
    assert bench.scheduler.idle_seconds(bench.now) is None


async def test_scratch_slots_come_back(bench: Bench) -> None:
    """From flushes that end, and from streams that are closed in the middle of one."""
    for end in ("run", "close", "close", "run", "close"):
        states = [bench.open() for _ in range(SCRATCH + 1)]
        for state in states:
            bench.send(state, Audio(noise(2)), Mark(1))
        bench.run()
        bench.now += 2 * MARKER_WAIT
        assert len(bench.turn()) == SCRATCH, "the others wait"
        if end == "run":
            bench.run()
            assert all(Marker(1) in state.stream.take() for state in states)
        for state in states:
            state.stream.close()
        assert bench.turn() == []


async def test_a_closed_stream_is_left_between_two_steps(bench: Bench) -> None:
    state = bench.open()
    bench.send(state, Audio(noise(3)))
    bench.turn()
    state.stream.close()
    assert bench.left == []
    assert bench.turn() == []
    assert bench.left == [state]


async def test_reset_and_end_come_after_the_audio_before_them(bench: Bench) -> None:
    state = bench.open()
    bench.send(state, Audio(noise(2)), Reset(), Audio(noise(1)), Finish())
    bench.run()
    events = state.stream.take()
    steps = [event for event in events if isinstance(event, Step | Ready)]
    assert kinds(steps) == [Step, Step, Ready, Step]
    assert state.stream.ended


async def test_clear_lets_go_of_everything(bench: Bench) -> None:
    state = bench.open()
    bench.send(state, Audio(noise(1)))
    bench.scheduler.clear()
    assert bench.turn() == []


# ---- stalls --------------------------------------------------------------------------------------------------------------


def words_of(events: Sequence[AnyEvent]) -> list[Word | EndWord]:
    return [event for event in events if isinstance(event, Word | EndWord)]


def plain_words(frames: int) -> list[Word | EndWord]:
    """What a model that never stalls says."""
    words = WordAssembler(spell, DELAY)
    model = Mute(1, 10**9)
    said: list[Word | EndWord] = []
    for frame in range(frames):
        model.clock[0] = frame
        said += [event for event in words.push(model.tokens(np.array([0]))[0]) if isinstance(event, Word | EndWord)]
    return said


async def live(bench: Bench, state: StreamState, first: int, last: int, *, speech: bool = True) -> list[AnyEvent]:
    """One frame after the other; what came."""
    events: list[AnyEvent] = []
    for frame in range(first, last):
        bench.send(state, Audio(counted(frame, frame + 1, speech=speech)))
        bench.now += FRAME_SECONDS
        bench.run()
        events += state.stream.take()
        for suspect in bench.suspects:
            assert suspect.guard is not None
            suspect.guard.verdict = True
            bench.scheduler.wake(suspect)
        bench.suspects.clear()
        await asyncio.sleep(0)
    return events


def guard(seconds: float = 4.0) -> MuteGuard:
    return MuteGuard(MuteSettings(seconds), FRAME_SECONDS)


@pytest.mark.parametrize("mute_from", [16, 83, 100, 101, 102, 105, 106])
async def test_a_model_that_falls_silent_is_started_again(mute_from: int) -> None:
    """No word is lost but those that began as it fell silent, none comes twice, and all have their true times."""
    bench = Bench(Mute(STREAMS + SCRATCH, mute_from))
    state = bench.open(guard=guard())
    events = await live(bench, state, 0, 400)
    assert bench.restarted == [state]
    words = [event for event in words_of(events) if isinstance(event, Word)]
    expected = [event for event in plain_words(400) if isinstance(event, Word)]
    assert words == expected
    assert kinds(words_of(events)) == [Word, EndWord] * (len(words_of(events)) // 2) + [Word] * (len(words_of(events)) % 2)
    assert [event.step_idx for event in events if isinstance(event, Step)] == sorted(
        event.step_idx for event in events if isinstance(event, Step)
    )
    assert sum(isinstance(event, Step) for event in events) == 400, "a frame that is heard again makes no Step"


async def test_silence_is_no_stall() -> None:
    bench = Bench(Mute(STREAMS + SCRATCH, 0))
    state = bench.open(guard=guard())
    await live(bench, state, 0, 300, speech=False)
    assert bench.restarted == []
    assert state.guard is not None
    assert len(state.guard.audio()) == 25 * FRAME_SAMPLES, "only the lead is kept while nobody speaks"


async def test_a_suspicion_that_is_dismissed_starts_over() -> None:
    bench = Bench(Mute(STREAMS + SCRATCH, 0))
    state = bench.open(guard=guard())
    assert state.guard is not None
    for frame in range(200):
        bench.send(state, Audio(counted(frame, frame + 1)))
        bench.run()
        state.stream.take()
        for suspect in bench.suspects[-1:] if state.guard.suspected else []:
            state.guard.verdict = False
            bench.scheduler.wake(suspect)
    assert bench.restarted == []
    assert len(bench.suspects) == 200 // 50


async def test_marks_and_the_end_wait_for_the_audio_that_is_heard_again() -> None:
    bench = Bench(Mute(STREAMS + SCRATCH, 20))
    state = bench.open(guard=guard())
    await live(bench, state, 0, 71)
    assert state.guard is not None
    bench.send(state, Audio(counted(71, 90)), Mark(5), Finish())
    while not state.guard.suspected:
        assert bench.turn()
    state.guard.verdict = True
    bench.scheduler.wake(state)
    bench.run()
    events = state.stream.take()
    assert bench.restarted == [state]
    assert [type(event) for event in events][-1] is Marker
    assert [event.text for event in events if isinstance(event, Word)] == [str(10 + n) for n in range(3, 12)]
    assert state.stream.ended


def test_what_a_stream_keeps_to_hear_again_keeps_no_long_message_alive() -> None:
    message = np.zeros(60 * SAMPLE_RATE, np.float32)
    for live in (True, False):
        kept = MuteGuard(MuteSettings(4.0), FRAME_SECONDS, live=live)
        kept.hear(message[:FRAME_SAMPLES])
        assert np.shares_memory(kept.take()[0], message) is not live, "a file's sound is there anyway, and is not copied"
    short = message[: 2 * FRAME_SAMPLES].copy()
    kept = MuteGuard(MuteSettings(4.0), FRAME_SECONDS)
    kept.hear(short[:FRAME_SAMPLES])
    assert np.shares_memory(kept.take()[0], short)
