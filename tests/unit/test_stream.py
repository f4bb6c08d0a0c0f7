"""The handoff between the event loop and the engine's threads: order, bounds, wake-ups, endings."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from numpy.typing import NDArray
from tests.support.owner import Owner, ramp
from tests.support.streams import some

from moshi_stt.engine.commands import Audio, Finish, Mark, Reset
from moshi_stt.engine.stream import Delivery, Stream, deliver_all
from moshi_stt.errors import EngineError
from moshi_stt.events import AnyEvent, EndWord, Error, Marker, Ready, Step, Word

DEADLINE_SECONDS = 120

pytestmark = pytest.mark.timeout(DEADLINE_SECONDS)
"""A lost wake-up shows as a hang: no test here may take long."""


@pytest.fixture
def owner() -> Owner:
    return Owner()


def samples_of(stream: Stream) -> list[float]:
    """Drain audio only."""
    return [sample for command in stream.drain() if isinstance(command, Audio) for sample in command.samples.tolist()]


def offered(stream: Stream, pcm: NDArray[np.float32]) -> int:
    """How many samples the stream takes now."""
    rest = stream.offer(Audio(pcm))
    assert rest is None or (isinstance(rest, Audio) and rest.samples.tolist() == pcm[-len(rest.samples) :].tolist())
    return len(pcm) - (len(rest.samples) if isinstance(rest, Audio) else 0)


async def settle() -> None:
    """Let every callback that is due run."""
    for _ in range(5):
        await asyncio.sleep(0)


# ---- inbox ---------------------------------------------------------------------------------------------------------------


async def test_commands_keep_their_order(owner: Owner) -> None:
    stream = owner.stream()
    await stream.send(Audio(ramp(0, 3)))
    await stream.send(Mark(7))
    await stream.send(Reset())
    await stream.send(Audio(ramp(3, 4)))
    await stream.send(Finish())
    first, mark, reset, second, finish = stream.drain()
    assert isinstance(first, Audio)
    assert isinstance(second, Audio)
    assert (first.samples.tolist(), second.samples.tolist()) == ([0, 1, 2], [3])
    assert (mark, reset, finish) == (Mark(7), Reset(), Finish())
    assert owner.wakes == 5
    assert stream.drain() == []


async def test_empty_audio_is_no_command(owner: Owner) -> None:
    stream = owner.stream()
    await stream.send(Audio(ramp(0, 0)))
    assert stream.drain() == []


@pytest.mark.parametrize("pcm", [np.zeros(3), np.zeros((1, 3), np.float32), np.zeros(3, np.int16)])
async def test_feed_takes_float32_of_one_dimension(owner: Owner, pcm: NDArray[np.float32]) -> None:
    with pytest.raises(ValueError, match="float32 of one dimension"):
        await owner.stream().send(Audio(pcm))


async def test_full_inbox_makes_feed_wait_and_drops_nothing(owner: Owner) -> None:
    stream = owner.stream(inbox_samples=10)
    feeding = asyncio.create_task(stream.send(Audio(ramp(0, 25))))
    await settle()
    assert not feeding.done()
    assert stream.pending_samples == 10
    seen = samples_of(stream)
    await settle()
    assert stream.pending_samples == 10, "drained audio counts until it is stepped"
    while not feeding.done():
        stream.stepped(4)
        assert stream.pending_samples <= 10
        await settle()
        seen += samples_of(stream)
    assert seen == list(range(25))


async def test_offer_takes_what_there_is_room_for(owner: Owner) -> None:
    stream = owner.stream(inbox_samples=10)
    assert offered(stream, ramp(0, 7)) == 7
    assert offered(stream, ramp(7, 14)) == 3
    assert offered(stream, ramp(10, 14)) == 0
    stream.stepped(2)
    assert offered(stream, ramp(10, 14)) == 2
    assert samples_of(stream) == list(range(12))


async def test_audio_that_waits_keeps_the_time_of_its_arrival(owner: Owner) -> None:
    stream = owner.stream(inbox_samples=2)
    feeding = asyncio.create_task(stream.send(Audio(ramp(0, 4))))
    await settle()
    stream.stepped(2)
    await feeding
    first, second = stream.drain()
    assert isinstance(first, Audio)
    assert isinstance(second, Audio)
    assert first.arrived == second.arrived


async def test_tiny_pieces_are_bounded_until_they_are_stepped(owner: Owner) -> None:
    """20 s of audio in messages of one sample would be 480,000 arrays in the engine's hands: draining makes no room."""
    stream = owner.stream(inbox_pieces=4)
    taken = sum(offered(stream, ramp(n, n + 1)) for n in range(10))
    assert taken == 4
    assert samples_of(stream) == [0, 1, 2, 3]
    assert offered(stream, ramp(4, 5)) == 0
    stream.stepped(3)
    assert [offered(stream, ramp(n, n + 1)) for n in (4, 5, 6, 7)] == [1, 1, 1, 0]


async def test_half_a_stepped_piece_still_counts(owner: Owner) -> None:
    stream = owner.stream(inbox_pieces=2)
    stream.offer(Audio(ramp(0, 10)))
    stream.offer(Audio(ramp(10, 20)))
    stream.stepped(9)
    assert offered(stream, ramp(20, 21)) == 0
    stream.stepped(1)
    assert offered(stream, ramp(20, 21)) == 1
    assert stream.pending_samples == 11


async def test_default_limits_hold_any_frame_in_pieces_of_one_sample(owner: Owner) -> None:
    stream = owner.stream()
    assert sum(offered(stream, ramp(n, n + 1)) for n in range(1_920)) == 1_920


async def test_more_stepped_than_pending_is_nothing(owner: Owner) -> None:
    """After `close` a step that was under way still reports its samples."""
    stream = owner.stream()
    stream.offer(Audio(ramp(0, 5)))
    stream.close()
    stream.stepped(5)
    assert stream.pending_samples == 0


async def test_room_is_announced_to_the_listener(owner: Owner) -> None:
    stream = owner.stream(inbox_samples=4)
    room = asyncio.Event()
    stream.listen(lambda: None, room.set)
    stream.stepped(0)
    assert offered(stream, ramp(0, 4)) == 4
    await settle()
    assert not room.is_set()
    assert offered(stream, ramp(4, 6)) == 0
    await asyncio.to_thread(stream.stepped, 1)
    await room.wait()
    assert offered(stream, ramp(4, 6)) == 1


# ---- marks and resets ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [Mark(1), Reset()], ids=["mark", "reset"])
async def test_unread_answers_are_bounded(owner: Owner, command: Mark | Reset) -> None:
    """A client that sends `Init` or `Marker` for ever, and reads nothing, fills neither the inbox nor the outbox."""
    stream = owner.stream(unread_answers=4)
    stream.deliver([Ready()])
    assert [stream.offer(command) for _ in range(5)] == [None, None, None, command, command]
    answers: list[AnyEvent] = [Marker(1) if isinstance(command, Mark) else Ready() for command in stream.drain()]
    stream.deliver(answers)
    assert stream.offer(command) == command, "answered is not yet read"
    assert stream.take() == [Ready(), *answers]
    assert [stream.offer(command) for _ in range(5)] == [None, None, None, None, command]


async def test_waiting_mark_goes_on_when_answers_are_read(owner: Owner) -> None:
    stream = owner.stream(unread_answers=2)
    stream.deliver([Ready()])
    await stream.send(Mark(1))
    marking = asyncio.create_task(stream.send(Mark(2)))
    resetting = asyncio.create_task(stream.send(Reset()))
    await settle()
    assert not marking.done()
    assert not resetting.done()
    stream.deliver([Word("a", 0.0), Marker(1)])
    assert await anext(stream) == Ready()
    await settle()
    assert marking.done() != resetting.done()
    assert await anext(stream) == Word("a", 0.0)
    assert await anext(stream) == Marker(1)
    await asyncio.gather(marking, resetting)


async def test_listener_hears_of_room_for_marks(owner: Owner) -> None:
    stream = owner.stream(unread_answers=1)
    calls: list[str] = []
    stream.listen(lambda: None, lambda: calls.append("room"))
    assert stream.offer(Mark(1)) == Mark(1)
    stream.deliver([Ready()])
    assert calls == []
    stream.take()
    assert calls == ["room"]
    assert stream.offer(Mark(1)) is None


# ---- outbox --------------------------------------------------------------------------------------------------------------


def step(index: int) -> Step:
    return Step(index, (0.5,), 0)


async def test_take_gives_everything_in_order_and_then_the_end(owner: Owner) -> None:
    stream = owner.stream()
    events = [Ready(), step(1), Word("a", 0.0), EndWord(1.0), Marker(1)]
    stream.deliver(events[:2])
    stream.deliver(events[2:], ended=True)
    assert await some(stream) == events
    assert await some(stream) == []
    assert stream.ended


async def test_take_waits_for_an_event(owner: Owner) -> None:
    stream = owner.stream()
    taking = asyncio.create_task(some(stream))
    await settle()
    assert not taking.done()
    stream.deliver([Ready()])
    assert await taking == [Ready()]


async def test_cancelled_take_loses_nothing(owner: Owner) -> None:
    stream = owner.stream()
    taking = asyncio.create_task(some(stream))
    await settle()
    stream.deliver([Ready()])
    taking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await taking
    assert await some(stream) == [Ready()]


async def test_iteration_may_stop_and_start_again(owner: Owner) -> None:
    """An iterator that took a whole batch would lose what the loop did not reach."""
    stream = owner.stream()
    stream.deliver([Ready(), Word("a", 0.0), EndWord(1.0)], ended=True)
    async for event in stream:
        assert event == Ready()
        break
    assert [event async for event in stream] == [Word("a", 0.0), EndWord(1.0)]


async def test_full_outbox_is_not_writable_until_it_is_read(owner: Owner) -> None:
    stream = owner.stream(outbox_events=4)
    stream.deliver([Word("a", 0.0)] * 3)
    assert stream.writable
    stream.deliver([Word("a", 0.0)])
    assert not stream.writable
    wakes = owner.wakes
    await anext(stream)
    assert stream.writable
    assert owner.wakes == wakes + 1, "the engine skipped this stream and must look again"
    await some(stream)
    assert owner.wakes == wakes + 1


async def test_steps_are_merged_from_a_quarter_on_and_nothing_else_is(owner: Owner) -> None:
    stream = owner.stream(outbox_events=8)
    stream.deliver([step(1), step(2), step(3), step(4)])
    stream.deliver([Word("a", 0.0), step(5), step(6), EndWord(0.1), Marker(1), step(7), step(8)])
    expected = [step(1), step(4), Word("a", 0.0), step(6), EndWord(0.1), Marker(1), step(8)]
    assert await some(stream) == expected


@pytest.mark.parametrize("outbox_events", [1, 2, 3])
async def test_smallest_outbox_merges_too(owner: Owner, outbox_events: int) -> None:
    stream = owner.stream(outbox_events=outbox_events)
    stream.deliver([step(1), step(2)])
    assert await some(stream) == [step(2)]


async def test_reader_that_stays_stuck_is_ended(owner: Owner) -> None:
    stream = owner.stream(outbox_events=2, stuck_seconds=0.01)
    ended = asyncio.Event()
    stream.listen(lambda: ended.set() if stream.ended else None, lambda: None)
    stream.deliver([Word("a", 0.0), Word("b", 0.0)])
    await ended.wait()
    (error,) = await some(stream)
    assert isinstance(error, Error)
    assert error.close_code == 1008
    assert "nothing was read for 0.01 s while 2 messages waited" in error.message
    assert await some(stream) == []


@contextmanager
def loop_time(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """The loop's clock, to be moved by hand."""
    loop = asyncio.get_running_loop()
    real = loop.time
    offset = [0.0]
    with monkeypatch.context() as patch:
        patch.setattr(loop, "time", lambda: real() + offset[0])
        yield offset


@pytest.mark.parametrize("read", ["take", "anext"])
async def test_reading_anything_starts_the_patience_anew(owner: Owner, monkeypatch: pytest.MonkeyPatch, read: str) -> None:
    with loop_time(monkeypatch) as offset:
        stream = owner.stream(outbox_events=2, stuck_seconds=1_000)
        for _ in range(5):
            stream.deliver([Word("a", 0.0), Word("b", 0.0)])
            offset[0] += 800
            await settle()
            assert not stream.ended
            assert await (some(stream) if read == "take" else anext(stream))
        stream.deliver([Word("a", 0.0), Word("b", 0.0)])
        offset[0] += 1_001
        await settle()
        await settle()
        assert stream.ended


async def test_events_after_the_end_are_dropped(owner: Owner) -> None:
    stream = owner.stream()
    stream.fail("the model broke")
    stream.deliver([Word("late", 0.0)])
    stream.fail("again")
    assert [event async for event in stream] == [Error("the model broke", 1011)]


async def test_deliver_all_serves_each_stream(owner: Owner) -> None:
    one, two = owner.stream(), owner.stream()
    deliver_all([Delivery(one, [Marker(1)]), Delivery(two, [], True)])
    assert await some(one) == [Marker(1)]
    assert not one.ended
    assert two.ended


# ---- endings -------------------------------------------------------------------------------------------------------------


async def test_after_finish_only_reading_goes_on(owner: Owner) -> None:
    stream = owner.stream()
    await stream.send(Finish())
    await stream.send(Finish())
    assert stream.drain() == [Finish()]
    for call in (lambda: stream.send(Audio(ramp(0, 1))), lambda: stream.send(Mark(1)), lambda: stream.send(Reset())):
        with pytest.raises(EngineError, match="the stream is finished"):
            await call()
    stream.deliver([Word("a", 0.0)], ended=True)
    assert [event async for event in stream] == [Word("a", 0.0)]


async def test_close_frees_the_slot_once_and_drops_what_is_pending(owner: Owner) -> None:
    stream = owner.stream()
    await stream.send(Audio(ramp(0, 5)))
    stream.deliver([Word("a", 0.0)])
    stream.close()
    stream.close()
    assert owner.released == [stream]
    assert stream.drain() == []
    assert stream.pending_samples == 0
    assert await some(stream) == []
    with pytest.raises(EngineError, match="the stream is closed"):
        await stream.send(Audio(ramp(0, 1)))
    await stream.send(Finish())
    assert stream.drain() == []


async def test_close_calls_no_listener(owner: Owner) -> None:
    stream = owner.stream(inbox_samples=1)
    calls: list[str] = []
    stream.listen(lambda: calls.append("events"), lambda: calls.append("room"))
    stream.offer(Audio(ramp(0, 2)))
    stream.close()
    stream.deliver([Ready()])
    await asyncio.to_thread(stream.stepped, 1)
    await settle()
    assert calls == []


@pytest.mark.parametrize("action", ["feed", "mark"])
async def test_close_wakes_who_waits(owner: Owner, action: str) -> None:
    stream = owner.stream(inbox_samples=1, unread_answers=1)
    waiting = asyncio.create_task(stream.send(Audio(ramp(0, 5))) if action == "feed" else stream.send(Mark(1)))
    reading = asyncio.create_task(some(stream))
    await settle()
    assert not waiting.done()
    stream.close()
    with pytest.raises(EngineError, match="closed"):
        await waiting
    assert await reading == []


async def test_end_during_feed_lets_it_return(owner: Owner) -> None:
    """The engine failed: the rest of the audio has nowhere to go, and the `Error` says why."""
    stream = owner.stream(inbox_samples=1)
    feeding = asyncio.create_task(stream.send(Audio(ramp(0, 100))))
    await settle()
    stream.fail("the model broke")
    await feeding
    await stream.send(Audio(ramp(0, 100)))
    await stream.send(Mark(1))
    await stream.send(Reset())
    assert [event async for event in stream] == [Error("the model broke", 1011)]


def test_step_after_the_loop_has_closed_is_harmless(owner: Owner) -> None:
    """A worker that outlives the event loop must not die of it."""

    async def fill() -> Stream:
        stream = owner.stream(inbox_samples=1)
        stream.offer(Audio(ramp(0, 2)))
        return stream

    stream = asyncio.run(fill())
    stream.stepped(1)
    assert stream.pending_samples == 0
