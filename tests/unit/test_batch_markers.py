"""Markers of the batch engine: when they come, behind which words, and what their early answers cost."""

import asyncio
import random

import numpy as np
import pytest
from tests.support.batch import (
    engine,
    noise,
    rest,
    steps_of,
    transcribe,
    until,
    without_timing,
    words_of,
)
from tests.support.scripted_backend import FakeBackend, LevelModel, Scripted
from tests.support.serving import until as comes_true

from moshi_stt.constants import FRAME_SAMPLES
from moshi_stt.engine.commands import Audio, Finish, Mark
from moshi_stt.engine.stream import StreamLimits
from moshi_stt.events import Marker, Step, Word

WORKED = [9, 9, 9, 9, 9, 0, 531, 17, 3, 3, 0, 42, 0]
"""Contract section 5.6, delay 6."""


def worked(slots: int) -> FakeBackend:
    return Scripted(slots, WORKED)


async def test_a_marker_with_nothing_behind_it() -> None:
    """Flaws F3 and F11: the last word and the marker come without more audio, and no `Step` without a frame of the client."""
    async with engine(lambda slots: Scripted(slots, [*WORKED, 3, 3, 7, 8])) as started:
        stream = started.open()
        await stream.send(Audio(noise(11)))
        await stream.send(Mark(1))
        events = await until(stream, lambda e: Marker(1) in e)
        assert steps_of(events) == 11
        assert [e.text for e in events if isinstance(e, Word)] == ["531.17", "42", "7.8"]
        assert events[-1] == Marker(1)
        stream.close()


async def test_audio_behind_an_answered_marker() -> None:
    """The silence was heard by a copy: times go on with the client's audio alone, and no word comes twice."""
    script = [*WORKED, *[3] * 8, 0, 70, 3, 0]
    async with engine(lambda slots: Scripted(slots, script)) as started:
        plain = words_of(await transcribe(started, noise(30)))
        stream = started.open()
        events = []
        for part in (4, 7, 9.5, 9.5):
            await stream.send(Audio(noise(part)))
            await stream.send(Mark(int(part)))
            events += await until(stream, lambda e, part=part: Marker(int(part)) in e)
        await stream.send(Finish())
        events += await rest(stream)
        assert words_of(events) == plain
        assert steps_of(events) == 30
        stream.close()


async def test_a_marker_in_the_middle_of_speech_changes_no_word() -> None:
    """As long as audio goes on, a marker comes in the stream's own time, behind the word under way, and that is all."""
    pcm = noise(120, seed=3)
    roomy = StreamLimits(outbox_events=4_096)  # where a quarter of them wait, `Step`s are merged
    async with engine(marker_wait=30.0, limits=roomy) as started:
        plain = without_timing(await transcribe(started, pcm))
        stream = started.open()
        for mark in range(120):
            await stream.send(Audio(pcm[mark * FRAME_SAMPLES : (mark + 1) * FRAME_SAMPLES]))
            await stream.send(Mark(mark))
        await stream.send(Finish())
        events = without_timing(await rest(stream))
        assert [e for e in events if not isinstance(e, Marker)] == plain
        assert [e.id for e in events if isinstance(e, Marker)] == list(range(120))
        stream.close()


async def test_a_marker_is_due_in_the_streams_own_steps() -> None:
    """As in moshi-server with one stream: behind the step that is `delay` behind the audio; other streams do not count (F2)."""
    async with engine(lambda slots: Scripted(slots, []), marker_wait=30.0) as started:
        a, b = started.open(), started.open()
        await a.send(Audio(noise(8)))
        await a.send(Mark(-5))
        await b.send(Audio(noise(60)))
        await until(b, lambda e: steps_of(e) == 60)
        await a.send(Audio(noise(5)))
        events = await until(a, lambda e: steps_of(e) == 13)
        assert Marker(-5) not in events
        await a.send(Audio(noise(1)))
        assert [type(e) for e in await until(a, lambda e: Marker(-5) in e)] == [Step, Marker]
        a.close()
        b.close()


async def test_a_partial_frame_counts() -> None:
    """moshi-server answers a marker behind half a frame one frame early."""
    async with engine(lambda slots: Scripted(slots, []), marker_wait=30.0) as started:
        stream = started.open()
        await stream.send(Audio(noise(2.5)))
        await stream.send(Mark(3))
        await stream.send(Audio(noise(6.5)))
        events = await until(stream, lambda e: Marker(3) in e)
        assert steps_of(events) == 9
        stream.close()


async def test_a_marker_waits_for_the_word_under_way() -> None:
    """It does not split the word, unless that goes on for long."""
    word = [3] * 9 + [0, 50, 51, 52, 53, 3]
    async with engine(lambda slots: Scripted(slots, word), marker_wait=30.0) as started:
        stream = started.open()
        await stream.send(Audio(noise(5)))
        await stream.send(Mark(1))
        await stream.send(Audio(noise(20)))
        events = await until(stream, lambda e: Marker(1) in e)
        at = events.index(Marker(1))
        assert steps_of(events[:at]) == 15
        assert isinstance(events[at - 1], Word)
        assert events[at - 1].text == "50.51.52.53"
        stream.close()


@pytest.mark.parametrize("wait", [0.02, 30.0], ids=["nothing behind it", "audio behind it"])
async def test_a_word_in_the_last_frame_comes_before_the_marker(wait: float) -> None:
    """As late as a word can be: its boundary comes with the step at which the marker is due, its piece one step later."""
    pcm = np.zeros(6 * FRAME_SAMPLES, np.float32)
    pcm[-FRAME_SAMPLES:] = 0.07
    async with engine(LevelModel, marker_wait=wait) as started:
        stream = started.open()
        await stream.send(Audio(pcm))
        await stream.send(Mark(1))
        if wait == 30.0:
            await stream.send(Audio(np.zeros(20 * FRAME_SAMPLES, np.float32)))
        events = await until(stream, lambda e: Marker(1) in e)
        before = events[: events.index(Marker(1))]
        assert [(e.text, e.start_time) for e in before if isinstance(e, Word)] == [("17", 0.48)]
        stream.close()


async def test_a_word_without_end_does_not_hold_a_marker_for_ever() -> None:
    async with engine(lambda slots: Scripted(slots, [5] * 400)) as started:
        stream = started.open()
        await stream.send(Audio(noise(10)))
        await stream.send(Mark(1))
        events = await until(stream, lambda e: Marker(1) in e)
        assert steps_of(events) == 10
        assert isinstance(events[-2], Word)
        stream.close()


async def test_markers_before_any_audio() -> None:
    async with engine() as started:
        stream = started.open()
        for mark in (0, -(2**63), 2**63 - 1):
            await stream.send(Mark(mark))
        events = await until(stream, lambda e: Marker(2**63 - 1) in e)
        assert [e for e in events if isinstance(e, Marker)] == [Marker(0), Marker(-(2**63)), Marker(2**63 - 1)]
        await stream.send(Audio(noise(20, seed=2)))
        await stream.send(Finish())
        later = await rest(stream)
        plain = await transcribe(started, noise(20, seed=2))
        assert [e for e in without_timing(later) if isinstance(e, Step)] == [
            e for e in without_timing(plain) if isinstance(e, Step)
        ]
        stream.close()


async def test_a_marker_again_at_the_same_place() -> None:
    """It has its answer already."""
    async with engine(worked) as started:
        stream = started.open()
        await stream.send(Audio(noise(11)))
        await stream.send(Mark(1))
        await until(stream, lambda e: Marker(1) in e)
        before = started.fake.steps
        await stream.send(Mark(2))
        assert await until(stream, lambda e: Marker(2) in e) == [Marker(2)]
        assert started.fake.steps == before
        await stream.send(Finish())
        assert await rest(stream) == []
        stream.close()


async def test_more_waiting_markers_than_copies() -> None:
    """Each gets its turn on the spare slots."""
    async with engine(streams=32) as started:
        streams = [started.open() for _ in range(32)]
        for seed, stream in enumerate(streams):
            await stream.send(Audio(noise(5.5, seed)))
            await stream.send(Mark(seed))
        for seed, stream in enumerate(streams):
            assert (await until(stream, lambda e, seed=seed: Marker(seed) in e))[-1] == Marker(seed)
            stream.close()


async def test_a_slow_reader_does_not_keep_the_copy() -> None:
    """Its outbox fills while the one spare slot is its: the few steps are done all the same, and another's marker comes."""
    limits = StreamLimits(outbox_events=8)
    async with engine(lambda slots: Scripted(slots, [0, 9] * 50, heads=0), streams=2, limits=limits) as started:
        slow, other = started.open(), started.open()
        started.fake.step_seconds = 0.01  # so that the outbox is seen to be full
        await slow.send(Audio(noise(9)))
        await slow.send(Mark(1))
        await comes_true(lambda: len(slow._outbox) > 8)
        await other.send(Audio(noise(2)))
        await other.send(Mark(2))
        assert (await until(other, lambda e: Marker(2) in e))[-1] == Marker(2)
        assert (await until(slow, lambda e: Marker(1) in e))[-1] == Marker(1)
        slow.close()
        other.close()


async def test_a_stream_that_closes_gives_its_copy_back() -> None:
    async with engine(streams=2) as started:
        assert started.fake.slots == 3
        for seed in range(20):
            stream = started.open()
            await stream.send(Audio(noise(3, seed)))
            await stream.send(Mark(1))
            if seed % 2:
                await until(stream, lambda e: steps_of(e) == 3)
                await asyncio.sleep(0.021 + seed / 1000)
            stream.close()
        stream = started.open()
        await stream.send(Audio(noise(3)))
        await stream.send(Mark(1))
        await until(stream, lambda e: Marker(1) in e)
        stream.close()


@pytest.mark.parametrize("seed", range(6))
async def test_silence_behind_a_marker_may_come_early_or_late(seed: int) -> None:
    """Whether the client's silence is used or the engine's own comes before it: the transcript is the same."""
    chance = random.Random(seed)
    pcm, silence = noise(25, seed), np.zeros(30 * FRAME_SAMPLES, np.float32)
    async with engine() as started:
        plain = await transcribe(started, np.concatenate([pcm, silence]))
        stream = started.open()
        await stream.send(Audio(pcm))
        await stream.send(Mark(1))
        await asyncio.sleep(chance.choice([0, 0.01, 0.02, 0.03, 0.05]))
        for part in np.array_split(silence, chance.randint(1, 40)):
            await stream.send(Audio(part))
            await asyncio.sleep(chance.choice([0, 0, 0.002, 0.005]))
        await stream.send(Finish())
        events = await rest(stream)
        assert words_of(events) == words_of(plain)
        assert [e.prs for e in events if isinstance(e, Step)] == [e.prs for e in plain if isinstance(e, Step)]
        stream.close()
