"""What every engine must do, held against both: the one of frame-synchronous models and the one of whole utterances.

Both hear the language of `level_speech`, in which it is known what was said. Nothing here knows which engine it has.
"""

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Sequence

import numpy as np
import pytest
from numpy.typing import NDArray
from tests.support.client_flows import FLOWS
from tests.support.level_speech import LevelRecogniser, pause, say
from tests.support.scripted_backend import LevelModel, loader, spell_level
from tests.support.serving import serving

from moshi_stt.engine.batch import BatchEngine
from moshi_stt.engine.engine import Engine, SilentObserver
from moshi_stt.engine.segment import SegmentEngine
from moshi_stt.engine.stream import Stream, StreamLimits
from moshi_stt.errors import EngineError, NoFreeSlot
from moshi_stt.events import AnyEvent, EndWord, Error, Marker, Ready, Word

STREAMS = 3
DEADLINE = 30.0
GAP = 0.24
"""Three frames of silence between words."""

LIMITS = StreamLimits(inbox_samples=5 * 24_000)


def batch_engine() -> Engine:
    return BatchEngine(loader(LevelModel, STREAMS, spell_level), delay_frames=6, limits=LIMITS, marker_wait_seconds=0.05)


def segment_engine() -> Engine:
    return SegmentEngine(LevelRecogniser, slots=STREAMS, threads=2, limits=LIMITS)


ENGINES: dict[str, Callable[[], Engine]] = {"batch": batch_engine, "segment": segment_engine}


@pytest.fixture(params=list(ENGINES))
async def engine(request: pytest.FixtureRequest) -> AsyncIterator[Engine]:
    made = ENGINES[request.param]()
    await made.start()
    yield made
    await made.stop()


def speech(numbers: Sequence[int]) -> NDArray[np.float32]:
    return np.concatenate([say(numbers, gap=GAP), pause(0.5)])


def texts(numbers: Sequence[int]) -> list[str]:
    return [f"w{number}." for number in numbers]


def heard(events: Sequence[AnyEvent]) -> list[str]:
    return [event.text for event in events if isinstance(event, Word)]


async def rest(stream: Stream) -> list[AnyEvent]:
    async with asyncio.timeout(DEADLINE):
        return [event async for event in stream]


async def until(stream: Stream, event: AnyEvent) -> list[AnyEvent]:
    """Events up to this one."""
    events: list[AnyEvent] = []
    async with asyncio.timeout(DEADLINE):
        async for got in stream:
            events.append(got)
            if got == event:
                return events
    raise AssertionError(f"the stream ended without {event}: {events[-5:]}")


async def transcribe(engine: Engine, pcm: NDArray[np.float32], *, live: bool = True) -> list[AnyEvent]:
    stream = engine.open(live=live)
    task = asyncio.create_task(rest(stream))
    await stream.feed(pcm)
    await stream.finish()
    events = await task
    stream.close()
    return events


@pytest.mark.parametrize("live", [True, False])
async def test_words_with_their_times(engine: Engine, live: bool) -> None:
    """`Ready` first; each word once, in order, between its start and its end, near where it was said."""
    numbers = [3, 9, 5, 20, 31, 4]
    events = await transcribe(engine, speech(numbers), live=live)
    assert events[0] == Ready()
    assert heard(events) == texts(numbers)
    marks = [e for e in events if isinstance(e, Word | EndWord)]
    assert [type(e) for e in marks] == [Word, EndWord] * len(numbers)
    for i, (word, end) in enumerate(zip(marks[::2], marks[1::2], strict=True)):
        said = GAP + i * (GAP + 0.3)
        assert isinstance(word, Word)
        assert isinstance(end, EndWord)
        assert said - 0.25 <= word.start_time <= said + 0.25
        assert word.start_time < end.stop_time <= said + 1.3


@pytest.mark.parametrize("size", [7, 240, 1_919, 24_000, 1_000_000])
async def test_any_chunking(engine: Engine, size: int) -> None:
    numbers = [3, 9] if size == 7 else [3, 9, 5, 20]
    pcm = speech(numbers)
    whole = [e for e in await transcribe(engine, pcm) if isinstance(e, Word | EndWord)]
    stream = engine.open()
    task = asyncio.create_task(rest(stream))
    for start in range(0, len(pcm), size):
        await stream.feed(pcm[start : start + size])
    await stream.finish()
    assert [e for e in await task if isinstance(e, Word | EndWord)] == whole
    stream.close()


async def test_nothing_said_nothing_heard(engine: Engine) -> None:
    assert heard(await transcribe(engine, pause(6))) == []
    assert heard(await transcribe(engine, pause(0))) == []


async def test_a_marker_needs_nothing_behind_it(engine: Engine) -> None:
    """The last words come before it; more audio goes on behind it, its times as if there had been no marker."""
    first, second = [3, 9, 5], [20, 31]
    plain = await transcribe(engine, np.concatenate([speech(first), speech(second)]))
    stream = engine.open()
    await stream.feed(speech(first))
    await stream.mark(7)
    before = await until(stream, Marker(7))
    assert heard(before) == texts(first)
    await stream.mark(-1)
    assert heard(await until(stream, Marker(-1))) == []
    await stream.feed(speech(second))
    await stream.finish()
    after = await rest(stream)
    assert heard(after) == texts(second)
    times = [[e.start_time for e in events if isinstance(e, Word)] for events in (plain, [*before, *after])]
    np.testing.assert_allclose(times[1], times[0], atol=0.25)
    stream.close()


async def test_markers_come_once_and_in_order(engine: Engine) -> None:
    stream = engine.open()
    task = asyncio.create_task(rest(stream))
    for mark in range(20):
        await stream.feed(say([mark + 3], gap=GAP))
        await stream.mark(mark)
    await stream.mark(20)
    await stream.finish()
    events = await task
    assert [e.id for e in events if isinstance(e, Marker)] == list(range(21))
    assert heard(events) == texts(range(3, 23))
    stream.close()


async def test_a_reset_begins_at_zero(engine: Engine) -> None:
    stream = engine.open()
    task = asyncio.create_task(rest(stream))
    await stream.feed(speech([3, 9, 5]))
    await stream.feed(pause(1.5))
    await stream.mark(1)
    await stream.reset()
    await stream.feed(speech([20, 31]))
    await stream.finish()
    events = await task
    second = max(i for i, e in enumerate(events) if e == Ready())
    assert second > events.index(Marker(1))
    assert heard(events[:second]) == texts([3, 9, 5])
    assert heard(events[second:]) == texts([20, 31])
    assert next(e for e in events[second:] if isinstance(e, Word)).start_time < 0.5
    stream.close()


async def test_streams_do_not_hear_each_other(engine: Engine) -> None:
    chance = random.Random(1)

    async def one(seed: int) -> None:
        numbers = [seed + 2, 2 * seed + 3, seed + 40]
        stream = await engine.open_when_free(DEADLINE)
        task = asyncio.create_task(rest(stream))
        for part in np.array_split(speech(numbers), chance.randint(1, 30)):
            await stream.feed(part)
            await asyncio.sleep(chance.choice([0, 0, 0.002]))
        if seed % 4 == 3:
            stream.close()
            await task
            return
        await stream.finish()
        assert heard(await task) == texts(numbers)
        stream.close()

    await asyncio.gather(*(one(seed) for seed in range(12)))
    assert engine.used_slots == 0
    assert engine.queued_samples == 0


async def test_slots_are_counted(engine: Engine) -> None:
    """Refused with the text that clients know; free again the moment one closes; waited for by who wants to."""
    assert engine.ready
    assert engine.total_slots == STREAMS
    streams = [engine.open() for _ in range(STREAMS)]
    assert engine.used_slots == STREAMS
    with pytest.raises(NoFreeSlot, match="no free channels"):
        engine.open()
    with pytest.raises(NoFreeSlot):
        await engine.open_when_free(0.01)
    waiting = asyncio.create_task(engine.open_when_free(DEADLINE))
    await asyncio.sleep(0)
    streams[0].close()
    async with asyncio.timeout(DEADLINE):
        streams[0] = await waiting
    for stream in streams:
        stream.close()
        stream.close()
    assert engine.used_slots == 0


class Refusals(SilentObserver):
    def __init__(self) -> None:
        self.count = 0

    def refused(self) -> None:
        self.count += 1


async def test_who_waits_for_a_slot_is_refused_only_when_none_came(engine: Engine) -> None:
    """Each look for a free slot used to count, so that a file that waited and was served showed as several refusals."""
    engine.observer = refusals = Refusals()
    streams = [engine.open() for _ in range(STREAMS)]
    waiting = [asyncio.create_task(engine.open_when_free(DEADLINE)) for _ in range(2)]
    giving_up = asyncio.create_task(engine.open_when_free(0.01))
    async with asyncio.timeout(DEADLINE):
        with pytest.raises(NoFreeSlot):
            await giving_up
        assert refusals.count == 1
        for stream in streams:
            stream.close()
        for stream in await asyncio.gather(*waiting):
            stream.close()
    assert refusals.count == 1


async def test_a_free_slot_is_not_lost_with_who_gave_up(engine: Engine) -> None:
    """The first in line gives up in the moment in which it is told of the slot: the next one has it."""
    streams = [engine.open() for _ in range(STREAMS)]
    first, second = (asyncio.create_task(engine.open_when_free(DEADLINE)) for _ in range(2))
    await asyncio.sleep(0)
    streams.pop().close()
    await asyncio.sleep(0)  # the line is told
    first.cancel()
    async with asyncio.timeout(DEADLINE):
        (await second).close()
        await asyncio.gather(first, return_exceptions=True)
    if not first.cancelled():
        first.result().close()
    for stream in streams:
        stream.close()


async def test_a_closed_or_finished_stream_says_so(engine: Engine) -> None:
    stream = engine.open()
    await stream.finish()
    await stream.finish()
    with pytest.raises(EngineError, match="cannot feed: the stream is finished"):
        await stream.feed(pause(0.1))
    stream.close()
    with pytest.raises(EngineError, match="cannot mark: the stream is closed"):
        await stream.mark(1)


async def test_a_full_inbox_makes_the_writer_wait(engine: Engine) -> None:
    """Three times of what a stream may hold, offered at once: all of it is heard, and never more is held."""
    numbers = [n % 40 + 3 for n in range(28)]
    stream = engine.open()
    task = asyncio.create_task(rest(stream))
    writer = asyncio.create_task(stream.feed(speech(numbers)))
    while not writer.done():
        assert stream.pending_samples <= LIMITS.inbox_samples
        await asyncio.sleep(0.001)
    await stream.finish()
    assert heard(await task) == texts(numbers)
    stream.close()


async def test_stop_ends_every_stream(engine: Engine) -> None:
    stream = engine.open()
    await stream.feed(speech([3]))
    await engine.stop()
    last = (await rest(stream))[-1]
    assert isinstance(last, Error)
    assert last.close_code == 1001
    stream.close()
    assert not engine.ready
    await engine.stop()


@pytest.mark.parametrize("name", list(ENGINES))
@pytest.mark.parametrize("flow", list(FLOWS))
async def test_known_clients(name: str, flow: str) -> None:
    """The whole server on each engine: Kyutai's script, the Mac installer's, and one that trusts the marker."""
    numbers = [3, 9, 5, 20, 31, 4]
    async with serving(ENGINES[name]()) as running:
        options = {"rtf": 50} if flow == "dsm" else {}
        transcript = await FLOWS[flow](running.ws, speech(numbers), **options)
    assert transcript.text == " ".join(texts(numbers))
    assert transcript.markers == [0]
    assert transcript.close_code == 1000
