"""What every engine must do, held against all of them: frame-synchronous, of whole utterances, and with real models.

What must be heard in a recording is known of each (`tests.support.engines`). Nothing here knows which engine it has.
"""

import asyncio
import random
from collections.abc import AsyncIterator, Sequence

import numpy as np
import pytest
from numpy.typing import NDArray
from tests.support.engines import GAP, LIMITS, SETTLED, STREAMS, Kind, speech
from tests.support.level_speech import pause, say

from moshi_stt.engine.commands import Audio, Finish, Mark, Reset
from moshi_stt.engine.engine import Engine, SilentObserver
from moshi_stt.engine.stream import Stream
from moshi_stt.errors import EngineError, NoFreeSlot
from moshi_stt.events import AnyEvent, EndWord, Error, Marker, Ready, Word
from moshi_stt.text.subtitles import TimedWord, pair_words

DEADLINE = 120.0


@pytest.fixture
async def engine(kind: Kind) -> AsyncIterator[Engine]:
    made = kind.make()
    await made.start()
    yield made
    await made.stop()


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
    await stream.send(Audio(pcm))
    await stream.send(Finish())
    events = await task
    stream.close()
    return events


def assert_times(kind: Kind, got: Sequence[TimedWord], expected: Sequence[TimedWord], longest: float = 1.3) -> None:
    """To the frame where the kind knows them so exactly, otherwise near where it was said, and no longer than this."""
    for ours, said in zip(got, expected, strict=True):
        if kind.exact:
            assert (ours.start, ours.end) == (said.start, said.end)
        else:
            assert said.start - 0.25 <= ours.start <= said.start + 0.25
            assert ours.start < ours.end <= said.start + longest


@pytest.mark.parametrize("live", [True, False])
async def test_words_with_their_times(kind: Kind, engine: Engine, live: bool) -> None:
    """`Ready` first; each word once, in order, with its end behind it, where it was said."""
    pcm = speech([3, 9, 5, 20, 31, 4])
    expected = kind.words(pcm)
    assert len(expected) >= 3
    events = await transcribe(engine, pcm, live=live)
    assert events[0] == Ready()
    marks = [e for e in events if isinstance(e, Word | EndWord)]
    assert [type(e) for e in marks] == [Word, EndWord] * len(expected)
    assert heard(events) == [word.text for word in expected]
    assert_times(kind, pair_words(events), expected)


@pytest.mark.parametrize("size", [7, 240, 1_919, 24_000, 1_000_000])
async def test_any_chunking(engine: Engine, size: int) -> None:
    """Samples a message make no difference."""
    numbers = [3, 9] if size == 7 else [3, 9, 5, 20]
    pcm = speech(numbers)
    whole = [e for e in await transcribe(engine, pcm) if isinstance(e, Word | EndWord)]
    assert whole
    stream = engine.open()
    task = asyncio.create_task(rest(stream))
    for start in range(0, len(pcm), size):
        await stream.send(Audio(pcm[start : start + size]))
    await stream.send(Finish())
    assert [e for e in await task if isinstance(e, Word | EndWord)] == whole
    stream.close()


async def test_silence_and_nothing(kind: Kind, engine: Engine) -> None:
    """Only a model with random weights hears words in silence, and even that none in nothing."""
    assert heard(await transcribe(engine, pause(6))) == kind.texts(pause(6))
    assert heard(await transcribe(engine, pause(0))) == []


async def test_a_marker_needs_nothing_behind_it(kind: Kind, engine: Engine) -> None:
    """The last words come before it; more audio goes on behind it, no word lost or doubled, as if there had been no marker."""
    first, second = speech([3, 9, 5]), np.concatenate([pause(SETTLED), speech([20, 31])])
    whole = kind.words(np.concatenate([first, second]))
    stream = engine.open()
    await stream.send(Audio(first))
    await stream.send(Mark(7))
    before = await until(stream, Marker(7))
    assert heard(before) == kind.texts(first) != []
    await stream.send(Mark(-1))
    assert heard(await until(stream, Marker(-1))) == []
    await stream.send(Audio(second))
    await stream.send(Finish())
    after = await rest(stream)
    assert heard([*before, *after]) == [word.text for word in whole]
    assert_times(kind, pair_words([*before, *after]), whole, longest=5.0)  # a word may last until the next one
    stream.close()


async def test_markers_come_once_and_in_order(kind: Kind, engine: Engine) -> None:
    pieces = [say([mark + 3], gap=GAP) for mark in range(12)]
    stream = engine.open()
    task = asyncio.create_task(rest(stream))
    for mark, piece in enumerate(pieces):
        await stream.send(Audio(piece))
        await stream.send(Mark(mark))
    await stream.send(Mark(12))
    await stream.send(Finish())
    events = await task
    assert [e.id for e in events if isinstance(e, Marker)] == list(range(13))
    assert heard(events) == kind.texts(np.concatenate(pieces))
    stream.close()


async def test_a_reset_begins_at_zero(kind: Kind, engine: Engine) -> None:
    first, second = np.concatenate([speech([3, 9, 5]), pause(1.6)]), speech([20, 31])
    stream = engine.open()
    task = asyncio.create_task(rest(stream))
    await stream.send(Audio(first))
    await stream.send(Mark(1))
    await stream.send(Reset())
    await stream.send(Audio(second))
    await stream.send(Finish())
    events = await task
    again = max(i for i, e in enumerate(events) if e == Ready())
    assert again > events.index(Marker(1))
    assert heard(events[:again]) == kind.texts(first)
    assert heard(events[again:]) == kind.texts(second) != []
    assert_times(kind, pair_words(events[again:]), kind.words(second))
    stream.close()


async def test_streams_do_not_hear_each_other(kind: Kind, engine: Engine) -> None:
    chance = random.Random(1)
    said = [speech([seed + 2, 2 * seed + 3, seed + 40]) for seed in range(8)]
    expected = [kind.texts(pcm) for pcm in said]

    async def one(seed: int) -> None:
        stream = await engine.open_when_free(DEADLINE)
        task = asyncio.create_task(rest(stream))
        for part in np.array_split(said[seed], chance.randint(1, 30)):
            await stream.send(Audio(part))
            await asyncio.sleep(chance.choice([0, 0, 0.002]))
        if seed % 4 == 3:
            stream.close()
            await task
            return
        await stream.send(Finish())
        assert heard(await task) == expected[seed]
        stream.close()

    await asyncio.gather(*(one(seed) for seed in range(8)))
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
    await stream.send(Finish())
    await stream.send(Finish())
    with pytest.raises(EngineError, match="cannot feed: the stream is finished"):
        await stream.send(Audio(pause(0.1)))
    stream.close()
    with pytest.raises(EngineError, match="cannot mark: the stream is closed"):
        await stream.send(Mark(1))


async def test_a_full_inbox_makes_the_writer_wait(kind: Kind, engine: Engine) -> None:
    """Twice and a half of what a stream may hold, offered at once: all of it is heard, and never more is held."""
    pcm = speech([n % 40 + 3 for n in range(13)])
    assert len(pcm) > 2.3 * LIMITS.inbox_samples
    stream = engine.open()
    task = asyncio.create_task(rest(stream))
    writer = asyncio.create_task(stream.send(Audio(pcm)))
    while not writer.done():
        assert stream.pending_samples <= LIMITS.inbox_samples
        await asyncio.sleep(0.001)
    await stream.send(Finish())
    assert heard(await task) == kind.texts(pcm)
    stream.close()


async def test_stop_ends_every_stream(engine: Engine) -> None:
    stream = engine.open()
    await stream.send(Audio(speech([3])))
    await engine.stop()
    last = (await rest(stream))[-1]
    assert isinstance(last, Error)
    assert last.close_code == 1001
    stream.close()
    assert not engine.ready
    await engine.stop()
