"""The batch engine over backends without a model: order, markers, ends, resets, chunking, independence of slots."""

import asyncio
import random

import numpy as np
import pytest
from tests.support.batch import (
    engine,
    feed_in_pieces,
    noise,
    rest,
    steps_of,
    transcribe,
    until,
    without_timing,
    words_of,
)
from tests.support.scripted_backend import FakeBackend, LevelModel, PseudoModel, Scripted
from tests.support.serving import until as comes_true

from moshi_stt.constants import FRAME_SAMPLES
from moshi_stt.engine.batch import BatchEngine
from moshi_stt.engine.engine import SilentObserver
from moshi_stt.engine.stream import StreamLimits
from moshi_stt.errors import EngineError, NoFreeSlot
from moshi_stt.events import EndWord, Marker, Ready, Step, Word

WORKED = [9, 9, 9, 9, 9, 0, 531, 17, 3, 3, 0, 42, 0]
"""Contract section 5.6, delay 6."""


def worked(slots: int) -> FakeBackend:
    return Scripted(slots, WORKED)


async def test_a_lone_stream() -> None:
    """`Ready`, then a `Step` for each frame, counted from 3 as moshi-server counts, words behind the step that made them."""
    async with engine(worked) as started:
        stream = started.open()
        await stream.feed(noise(13))
        events = await until(stream, lambda e: steps_of(e) == 13)
        assert events[0] == Ready()
        assert [e.step_idx for e in events if isinstance(e, Step)] == list(range(3, 16))
        assert [e.buffered_pcm for e in events if isinstance(e, Step)] == [FRAME_SAMPLES * n for n in range(12, -1, -1)]
        kinds = [type(e) for e in events]
        assert kinds == [Ready, *[Step] * 9, Word, Step, Step, EndWord, Step, Step, Word, EndWord]
        assert [(e.text, e.start_time, e.logprob) for e in events if isinstance(e, Word)] == [
            ("531.17", 0.0, -2.75),
            ("42", 0.4, -0.25),
        ]
        stream.close()


async def test_no_heads_no_steps() -> None:
    async with engine(lambda slots: Scripted(slots, WORKED, heads=0)) as started:
        assert [type(e) for e in await transcribe(started, noise(13))] == [Ready, Word, EndWord, Word, EndWord]


async def test_less_than_a_frame_steps_nothing() -> None:
    async with engine() as started:
        stream = started.open()
        before = started.fake.steps
        await stream.feed(noise(0.99))
        await stream.feed(np.zeros(0, np.float32))
        await asyncio.sleep(0.05)
        assert started.fake.steps == before
        assert started.queued_samples == int(0.99 * FRAME_SAMPLES)
        await stream.feed(noise(0.02))
        assert steps_of(await until(stream, lambda e: steps_of(e) == 1)) == 1
        stream.close()


# ---- chunking, slots -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 7, 240, 700, 1919, 1920, 1921, 24_000, 60_000])
async def test_any_chunking_gives_the_same(size: int) -> None:
    pcm = noise(31.3, seed=5)[: 2_000 if size == 1 else None]
    async with engine(limits=StreamLimits(inbox_samples=30_000)) as started:
        whole = await transcribe(started, pcm)
        stream = started.open()
        task = asyncio.create_task(rest(stream))
        await feed_in_pieces(stream, pcm, [size] * (len(pcm) // size))
        await stream.finish()
        assert without_timing(await task) == without_timing(whole)
        stream.close()


async def test_small_packets_cost_no_steps() -> None:
    """A hundred packets of 10 ms that wait are taken at once: as many steps as there are frames (flaw F1)."""
    async with engine() as started:
        stream = started.open()
        before = started.fake.steps
        await feed_in_pieces(stream, noise(12.5), [240] * 100)
        await until(stream, lambda e: steps_of(e) == 12)
        assert started.fake.steps == before + 12
        stream.close()


async def test_streams_do_not_depend_on_each_other() -> None:
    """Joins, leaves, idle gaps, resets and slot reuse over 16 slots: each stream hears itself alone."""
    chance = random.Random(4)
    async with engine(streams=16) as started:

        async def one(seed: int) -> None:
            pcm = noise(chance.uniform(1, 40), seed)
            await asyncio.sleep(chance.uniform(0, 0.3))
            stream = await started.open_when_free(20)
            task = asyncio.create_task(rest(stream))
            start = 0
            while start < len(pcm):
                size = chance.randint(1, 9_000)
                await stream.feed(pcm[start : start + size])
                start += size
                if chance.random() < 0.2:
                    await asyncio.sleep(chance.uniform(0, 0.02))
            if seed % 5 == 0:  # leaves in the middle
                stream.close()
                await task
                return
            if seed % 7 == 0:  # starts anew
                await stream.feed(pcm[: -len(pcm) % FRAME_SAMPLES])
                await stream.reset()
                await stream.feed(pcm)
            await stream.finish()
            events = await task
            stream.close()
            if seed % 7 == 0:
                events = [Ready(), *events[[i for i, e in enumerate(events) if e == Ready()][1] + 1 :]]
            results[seed] = (pcm, events)

        results: dict[int, tuple[np.ndarray, list[object]]] = {}
        await asyncio.gather(*(one(seed) for seed in range(80)))
        assert started.used_slots == 0
        assert len(results) == 64
        assert max(started.fake.rows) > 8, "the streams were to meet in one batch"
        for pcm, events in results.values():
            assert without_timing(events) == without_timing(await transcribe(started, pcm))


async def test_slots_are_used_again_at_once() -> None:
    async with engine(streams=2) as started:
        first = await transcribe(started, noise(20))
        for _ in range(5):
            a, b = started.open(), started.open()
            with pytest.raises(NoFreeSlot, match="no free channels"):
                started.open()
            await a.feed(noise(20, seed=9))
            a.close()
            a.close()
            c = started.open()
            await c.feed(noise(20))
            await c.finish()
            assert without_timing(await rest(c)) == without_timing(first)
            b.close()
            c.close()
            assert started.used_slots == 0


# ---- markers ---------------------------------------------------------------------------------------------------------


async def test_a_marker_with_nothing_behind_it() -> None:
    """Flaws F3 and F11: the last word and the marker come without more audio, and no `Step` without a frame of the client."""
    async with engine(lambda slots: Scripted(slots, [*WORKED, 3, 3, 7, 8])) as started:
        stream = started.open()
        await stream.feed(noise(11))
        await stream.mark(1)
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
            await stream.feed(noise(part))
            await stream.mark(int(part))
            events += await until(stream, lambda e, part=part: Marker(int(part)) in e)
        await stream.finish()
        events += await rest(stream)
        assert words_of(events) == plain
        assert steps_of(events) == 30
        stream.close()


async def test_a_marker_in_the_middle_of_speech_changes_no_word() -> None:
    """As long as audio goes on, a marker comes in the stream's own time, behind the word under way, and that is all."""
    pcm = noise(120, seed=3)
    async with engine(marker_wait=30.0) as started:
        plain = without_timing(await transcribe(started, pcm))
        stream = started.open()
        for mark in range(120):
            await stream.feed(pcm[mark * FRAME_SAMPLES : (mark + 1) * FRAME_SAMPLES])
            await stream.mark(mark)
        await stream.finish()
        events = without_timing(await rest(stream))
        assert [e for e in events if not isinstance(e, Marker)] == plain
        assert [e.id for e in events if isinstance(e, Marker)] == list(range(120))
        stream.close()


async def test_a_marker_is_due_in_the_streams_own_steps() -> None:
    """As in moshi-server with one stream: behind the step that is `delay` behind the audio; other streams do not count (F2)."""
    async with engine(lambda slots: Scripted(slots, []), marker_wait=30.0) as started:
        a, b = started.open(), started.open()
        await a.feed(noise(8))
        await a.mark(-5)
        await b.feed(noise(60))
        await until(b, lambda e: steps_of(e) == 60)
        await a.feed(noise(5))
        events = await until(a, lambda e: steps_of(e) == 13)
        assert Marker(-5) not in events
        await a.feed(noise(1))
        assert [type(e) for e in await until(a, lambda e: Marker(-5) in e)] == [Step, Marker]
        a.close()
        b.close()


async def test_a_partial_frame_counts() -> None:
    """moshi-server answers a marker behind half a frame one frame early."""
    async with engine(lambda slots: Scripted(slots, []), marker_wait=30.0) as started:
        stream = started.open()
        await stream.feed(noise(2.5))
        await stream.mark(3)
        await stream.feed(noise(6.5))
        events = await until(stream, lambda e: Marker(3) in e)
        assert steps_of(events) == 9
        stream.close()


async def test_a_marker_waits_for_the_word_under_way() -> None:
    """It does not split the word, unless that goes on for long."""
    word = [3] * 9 + [0, 50, 51, 52, 53, 3]
    async with engine(lambda slots: Scripted(slots, word), marker_wait=30.0) as started:
        stream = started.open()
        await stream.feed(noise(5))
        await stream.mark(1)
        await stream.feed(noise(20))
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
        await stream.feed(pcm)
        await stream.mark(1)
        if wait == 30.0:
            await stream.feed(np.zeros(20 * FRAME_SAMPLES, np.float32))
        events = await until(stream, lambda e: Marker(1) in e)
        before = events[: events.index(Marker(1))]
        assert [(e.text, e.start_time) for e in before if isinstance(e, Word)] == [("17", 0.48)]
        stream.close()


async def test_a_word_without_end_does_not_hold_a_marker_for_ever() -> None:
    async with engine(lambda slots: Scripted(slots, [5] * 400)) as started:
        stream = started.open()
        await stream.feed(noise(10))
        await stream.mark(1)
        events = await until(stream, lambda e: Marker(1) in e)
        assert steps_of(events) == 10
        assert isinstance(events[-2], Word)
        stream.close()


async def test_markers_before_any_audio() -> None:
    async with engine() as started:
        stream = started.open()
        for mark in (0, -(2**63), 2**63 - 1):
            await stream.mark(mark)
        events = await until(stream, lambda e: Marker(2**63 - 1) in e)
        assert [e for e in events if isinstance(e, Marker)] == [Marker(0), Marker(-(2**63)), Marker(2**63 - 1)]
        await stream.feed(noise(20, seed=2))
        await stream.finish()
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
        await stream.feed(noise(11))
        await stream.mark(1)
        await until(stream, lambda e: Marker(1) in e)
        before = started.fake.steps
        await stream.mark(2)
        assert await until(stream, lambda e: Marker(2) in e) == [Marker(2)]
        assert started.fake.steps == before
        await stream.finish()
        assert await rest(stream) == []
        stream.close()


async def test_more_waiting_markers_than_copies() -> None:
    """Each gets its turn on the spare slots."""
    async with engine(streams=32) as started:
        streams = [started.open() for _ in range(32)]
        for seed, stream in enumerate(streams):
            await stream.feed(noise(5.5, seed))
            await stream.mark(seed)
        for seed, stream in enumerate(streams):
            assert (await until(stream, lambda e, seed=seed: Marker(seed) in e))[-1] == Marker(seed)
            stream.close()


async def test_a_slow_reader_does_not_keep_the_copy() -> None:
    """Its outbox fills while the one spare slot is its: the few steps are done all the same, and another's marker comes."""
    limits = StreamLimits(outbox_events=8)
    async with engine(lambda slots: Scripted(slots, [0, 9] * 50, heads=0), streams=2, limits=limits) as started:
        slow, other = started.open(), started.open()
        started.fake.step_seconds = 0.01  # so that the outbox is seen to be full
        await slow.feed(noise(9))
        await slow.mark(1)
        await comes_true(lambda: len(slow._outbox) > 8)
        await other.feed(noise(2))
        await other.mark(2)
        assert (await until(other, lambda e: Marker(2) in e))[-1] == Marker(2)
        assert (await until(slow, lambda e: Marker(1) in e))[-1] == Marker(1)
        slow.close()
        other.close()


async def test_a_stream_that_closes_gives_its_copy_back() -> None:
    async with engine(streams=2) as started:
        assert started.fake.slots == 3
        for seed in range(20):
            stream = started.open()
            await stream.feed(noise(3, seed))
            await stream.mark(1)
            if seed % 2:
                await until(stream, lambda e: steps_of(e) == 3)
                await asyncio.sleep(0.021 + seed / 1000)
            stream.close()
        stream = started.open()
        await stream.feed(noise(3))
        await stream.mark(1)
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
        await stream.feed(pcm)
        await stream.mark(1)
        await asyncio.sleep(chance.choice([0, 0.01, 0.02, 0.03, 0.05]))
        for part in np.array_split(silence, chance.randint(1, 40)):
            await stream.feed(part)
            await asyncio.sleep(chance.choice([0, 0, 0.002, 0.005]))
        await stream.finish()
        events = await rest(stream)
        assert words_of(events) == words_of(plain)
        assert [e.prs for e in events if isinstance(e, Step)] == [e.prs for e in plain if isinstance(e, Step)]
        stream.close()


# ---- ends and resets -------------------------------------------------------------------------------------------------


async def test_finish_transcribes_what_is_left() -> None:
    """Half a frame is filled with zeros and counts as a step; silence of our own is none; the last word comes and ends."""
    script = [3] * 9 + [0, 50, 51]
    async with engine(lambda slots: Scripted(slots, script)) as started:
        events = await transcribe(started, noise(4.5))
        assert steps_of(events) == 5
        assert words_of(events) == [Word("50.51", 4 / 12.5, -1.25), EndWord(0.36)]


async def test_finish_without_audio() -> None:
    async with engine() as started:
        assert await transcribe(started, noise(0)) == [Ready()]


async def test_markers_come_before_the_end() -> None:
    async with engine(lambda slots: Scripted(slots, [3] * 9 + [0, 50, 51])) as started:
        stream = started.open()
        await stream.mark(0)
        await stream.feed(noise(4.5))
        await stream.mark(1)
        await stream.mark(2)
        await stream.finish()
        events = await rest(stream)
        assert [type(e) for e in events[-4:]] == [Word, EndWord, Marker, Marker]
        assert [e.id for e in events if isinstance(e, Marker)] == [0, 1, 2]
        stream.close()


async def test_a_reset_starts_anew() -> None:
    """What was fed before it is stepped first; then `Ready`, and words from 0 on."""
    pcm = noise(20, seed=8)
    async with engine() as started:
        plain = await transcribe(started, pcm)
        stream = started.open()
        await stream.feed(noise(7))
        await stream.reset()
        await stream.feed(pcm)
        await stream.finish()
        events = await rest(stream)
        again = [i for i, e in enumerate(events) if e == Ready()]
        assert again[0] == 0
        assert steps_of(events[: again[1]]) == 7
        assert without_timing(events[again[1] :]) == without_timing(plain)
        stream.close()


async def test_a_reset_keeps_the_rest_of_a_frame_and_answers_markers() -> None:
    """No sample is lost: half a frame before the reset begins the new state. A marker before it comes before `Ready`."""
    pcm = noise(10, seed=8)
    async with engine(marker_wait=30.0) as started:
        plain = await transcribe(started, pcm)
        stream = started.open()
        await stream.feed(noise(3))
        await stream.feed(pcm[:1000])
        await stream.mark(4)
        await stream.reset()
        await stream.feed(pcm[1000:])
        await stream.finish()
        events = await rest(stream)
        second = max(i for i, e in enumerate(events) if e == Ready())
        assert events.index(Marker(4)) < second
        assert without_timing(events[second:]) == without_timing(plain)
        stream.close()


# ---- bounds ----------------------------------------------------------------------------------------------------------


async def test_a_slow_reader_holds_only_itself_up() -> None:
    """A full outbox: its audio is left where it is, its writer waits, others go on; reading again, nothing is missing."""
    limits = StreamLimits(inbox_samples=4 * FRAME_SAMPLES, outbox_events=16)
    pcm = noise(300, seed=1)
    async with engine(lambda slots: Scripted(slots, [0, 9] * 200), limits=limits) as started:
        slow = started.open()
        writer = asyncio.create_task(slow.feed(pcm))
        for seed in range(3):
            other = started.open()
            task = asyncio.create_task(rest(other))
            await other.feed(noise(50, seed))
            await other.finish()
            assert len([e for e in await task if isinstance(e, Word)]) >= 23
            other.close()
        assert not writer.done()
        assert slow.pending_samples <= limits.inbox_samples
        events = await until(slow, lambda e: len([w for w in e if isinstance(w, Word)]) >= 147)
        await writer
        assert [w.text for w in events if isinstance(w, Word)] == ["9"] * 147
        slow.close()


async def test_a_reader_that_is_stuck_is_given_up() -> None:
    limits = StreamLimits(inbox_samples=4 * FRAME_SAMPLES, outbox_events=8, stuck_seconds=0.05)
    async with engine(lambda slots: Scripted(slots, [0, 9] * 200), limits=limits) as started:
        stream = started.open()
        async with asyncio.timeout(20):
            await stream.feed(noise(300))
        (error,) = await rest(stream)
        assert error.close_code == 1008
        stream.close()


async def test_files_leave_room_for_live_streams() -> None:
    """A step that is as slow as its frame: live streams keep their pace, files get a turn now and then."""

    class Slow(PseudoModel):
        def step(self, *args: object) -> object:
            self.step_seconds = 0.025 * len(args[1])  # type: ignore[arg-type]
            return super().step(*args)  # type: ignore[arg-type]

    async with engine(Slow, streams=3) as started:
        live, file = started.open(), started.open(live=False)
        file_task = asyncio.create_task(rest(file))
        await file.feed(noise(30))
        await file.finish()
        rows_before = len(started.fake.rows)
        for seed in range(20):
            await live.feed(noise(1, seed))
            await until(live, lambda e: steps_of(e) == 1)
        beside = [rows for rows in started.fake.rows[rows_before:] if rows == 2]
        assert len(beside) <= 6
        assert steps_of(await file_task) == 30
        live.close()
        file.close()


async def test_an_observer_sees_everything() -> None:
    class Observer(SilentObserver):
        def __init__(self) -> None:
            self.seen: list[tuple[str, object]] = []

        def stepped(self, seconds: float, rows: int) -> None:
            self.seen.append(("stepped", rows))

        def lagged(self, seconds: float) -> None:
            assert 0 <= seconds < 30
            self.seen.append(("lagged", None))

        def opened(self) -> None:
            self.seen.append(("opened", None))

        def closed(self, steps: int) -> None:
            self.seen.append(("closed", steps))

        def refused(self) -> None:
            self.seen.append(("refused", None))

    observer = Observer()
    async with engine(streams=1, observer=observer) as started:
        stream = started.open()
        with pytest.raises(NoFreeSlot):
            started.open()
        await stream.feed(noise(3))
        await until(stream, lambda e: steps_of(e) == 3)
        stream.close()
        await asyncio.sleep(0)
    assert observer.seen.count(("lagged", None)) == 3
    assert [entry for entry in observer.seen if entry[0] != "lagged"] == [
        ("opened", None),
        ("refused", None),
        *[("stepped", 1)] * 3,
        ("closed", 3),
    ]


async def test_start_tells_what_the_machine_can_carry() -> None:
    async with engine(streams=16) as started:
        assert started.ready
        assert started.total_slots == 16
        assert list(started.info.details)[:3] == ["step of 1 row", "step of 8 rows", "step of 16 rows"]
        assert started.info.details["real-time streams"] == "16 of 16 slots"
    assert not started.ready


async def test_nothing_opens_before_the_start() -> None:
    engine_ = BatchEngine(lambda: pytest.fail("not asked to load"), delay_frames=6)
    assert not engine_.ready
    assert engine_.used_slots == engine_.queued_samples == engine_.total_slots == 0
    with pytest.raises(EngineError, match="not loaded yet"):
        engine_.open()
    await engine_.stop()
