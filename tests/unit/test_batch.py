"""The batch engine over backends without a model: order, markers, ends, resets, chunking, independence of slots."""

import asyncio
import math
import random
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray
from tests.support.batch import (
    DEADLINE,
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
from tests.support.mute_model import Mute, counted
from tests.support.scripted_backend import FakeBackend, Scripted

from moshi_stt.audio.decode import decode_file
from moshi_stt.constants import FRAME_SAMPLES, SAMPLE_RATE
from moshi_stt.engine.batch import BatchEngine
from moshi_stt.engine.commands import Audio, Finish, Mark, Reset
from moshi_stt.engine.engine import SilentObserver, StreamOptions
from moshi_stt.engine.mute import MuteSettings, hears_speech
from moshi_stt.engine.stream import StreamLimits
from moshi_stt.errors import EngineError, NoFreeSlot
from moshi_stt.events import EndWord, Interim, Marker, Ready, Step, Warning, Word  # noqa: A004 - the event
from moshi_stt.sample import sample_path

WORKED = [9, 9, 9, 9, 9, 0, 531, 17, 3, 3, 0, 42, 0]
"""Contract section 5.6, delay 6."""


def worked(slots: int) -> FakeBackend:
    return Scripted(slots, WORKED)


async def test_a_lone_stream() -> None:
    """`Ready`, then a `Step` for each frame, counted from 3 as moshi-server counts, words behind the step that made them."""
    async with engine(worked) as started:
        stream = started.open()
        await stream.send(Audio(noise(13)))
        events = await until(stream, lambda e: steps_of(e) == 13)
        assert events[0] == Ready()
        assert [e.step_idx for e in events if isinstance(e, Step)] == list(range(3, 16))
        assert [e.buffered_pcm for e in events if isinstance(e, Step)] == [FRAME_SAMPLES * n for n in range(12, -1, -1)]
        kinds = [type(e) for e in events]
        assert kinds == [Ready, *[Step] * 9, Word, Step, Step, EndWord, Step, Step, Word, EndWord]
        assert [e for e in events if isinstance(e, Word)] == [Word("531.17", 0.0), Word("42", 0.4)]
        stream.close()


async def test_extras_come_to_the_streams_that_asked_and_to_no_other() -> None:
    async with engine(worked) as started:
        plain, asking = started.open(), started.open(options=StreamOptions(interim=True, confidence=True))
        heard = []
        for stream in (plain, asking):
            await stream.send(Audio(noise(13)))
            heard.append(await until(stream, lambda e: sum(isinstance(event, EndWord) for event in e) == 2))
        assert [e for e in heard[0] if isinstance(e, Word | Interim)] == [Word("531.17", 0.0), Word("42", 0.4)]
        assert [e for e in heard[1] if isinstance(e, Word | Interim)] == [
            Interim("531", 0.0),
            Interim("531.17", 0.0),
            Word("531.17", 0.0, math.exp(-2.75)),
            Interim("42", 0.4),
            Word("42", 0.4, math.exp(-0.25)),
        ]


class Restarts(SilentObserver):
    count = 0

    def restarted(self) -> None:
        self.count += 1


@pytest.mark.parametrize("is_speech", [None, lambda pcm: len(pcm) == 75 * FRAME_SAMPLES], ids=["heads", "detector"])
async def test_a_stream_that_the_model_stops_transcribing_is_started_again(
    is_speech: Callable[[NDArray[np.float32]], bool] | None, caplog: pytest.LogCaptureFixture
) -> None:
    """Counted, logged, and said to the client that asked; another stream notices nothing."""
    observer, mute = Restarts(), MuteSettings(4.0, is_speech)
    async with engine(lambda slots: Mute(slots, 30), observer=observer, mute=mute) as started:
        stalled, other = started.open(options=StreamOptions(warnings=True)), started.open()
        await stalled.send(Audio(counted(0, 120)))
        await other.send(Audio(counted(0, 29)))
        await other.send(Finish())
        events = await until(stalled, lambda e: any(isinstance(event, Warning) for event in e))
        await stalled.send(Audio(counted(120, 196)))
        await stalled.send(Finish())
        events += await rest(stalled)
        assert [e.text for e in events if isinstance(e, Word)] == [str(10 + n) for n in range(25)]
        assert [e.start_time for e in events if isinstance(e, Word)] == [(8 * n + 1) / 12.5 for n in range(25)]
        (warning,) = [e for e in events if isinstance(e, Warning)]
        assert warning.code == "stall"
        assert "the 6 s of audio from" in warning.message
        assert observer.count == 1
        assert "the model had stopped transcribing a stream" in caplog.text
        assert [e.text for e in await rest(other) if isinstance(e, Word)] == ["10", "11", "12", "13"]


def raises(pcm: NDArray[np.float32]) -> bool:
    raise RuntimeError("no detector")


NO_STALLS = {
    "off": None,
    "zero": MuteSettings(0.0),
    "no speech": MuteSettings(4.0, lambda pcm: False),
    "no detector": MuteSettings(4.0, raises),
}


@pytest.mark.parametrize("mute", NO_STALLS.values(), ids=NO_STALLS)
async def test_what_is_no_stall_is_left_alone(mute: MuteSettings | None) -> None:
    observer = Restarts()
    async with engine(lambda slots: Mute(slots, 30), observer=observer, mute=mute) as started:
        events = await transcribe(started, counted(0, 200))
    assert [e.text for e in events if isinstance(e, Word)] == ["10", "11", "12", "13"]
    assert observer.count == 0


def test_the_detector_tells_speech_from_noise() -> None:
    speech = np.concatenate(list(decode_file(sample_path())))
    assert hears_speech(speech)
    assert not hears_speech(np.zeros(10 * SAMPLE_RATE, np.float32))
    assert not hears_speech(0.1 * noise(100))


async def test_no_heads_no_steps() -> None:
    async with engine(lambda slots: Scripted(slots, WORKED, heads=0)) as started:
        assert [type(e) for e in await transcribe(started, noise(13))] == [Ready, Word, EndWord, Word, EndWord]


async def test_less_than_a_frame_steps_nothing() -> None:
    async with engine() as started:
        stream = started.open()
        before = started.fake.steps
        await stream.send(Audio(noise(0.99)))
        await stream.send(Audio(np.zeros(0, np.float32)))
        other = started.open()
        await other.send(Audio(noise(1)))
        assert steps_of(await until(other, lambda e: steps_of(e) == 1)) == 1
        assert (started.fake.steps, started.fake.rows[-1]) == (before + 1, 1)
        assert started.queued_samples == int(0.99 * FRAME_SAMPLES)
        await stream.send(Audio(noise(0.02)))
        assert steps_of(await until(stream, lambda e: steps_of(e) == 1)) == 1
        stream.close()
        other.close()


# ---- chunking, slots -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 7, 240, 700, 1919, 1920, 1921, 24_000, 60_000])
async def test_any_chunking_gives_the_same(size: int) -> None:
    pcm = noise(31.3, seed=5)[: 2_000 if size == 1 else None]
    async with engine(limits=StreamLimits(inbox_samples=30_000)) as started:
        whole = await transcribe(started, pcm)
        stream = started.open()
        task = asyncio.create_task(rest(stream))
        await feed_in_pieces(stream, pcm, [size] * (len(pcm) // size))
        await stream.send(Finish())
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
            stream = await started.open_when_free(20, live=True)
            task = asyncio.create_task(rest(stream))
            start = 0
            while start < len(pcm):
                size = chance.randint(1, 9_000)
                await stream.send(Audio(pcm[start : start + size]))
                start += size
                if chance.random() < 0.2:
                    await asyncio.sleep(chance.uniform(0, 0.02))
            if seed % 5 == 0:  # leaves in the middle
                stream.close()
                await task
                return
            if seed % 7 == 0:  # starts anew
                await stream.send(Audio(pcm[: -len(pcm) % FRAME_SAMPLES]))
                await stream.send(Reset())
                await stream.send(Audio(pcm))
            await stream.send(Finish())
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
            await a.send(Audio(noise(20, seed=9)))
            a.close()
            a.close()
            c = started.open()
            await c.send(Audio(noise(20)))
            await c.send(Finish())
            assert without_timing(await rest(c)) == without_timing(first)
            b.close()
            c.close()
            assert started.used_slots == 0


# ---- ends and resets -------------------------------------------------------------------------------------------------


async def test_finish_transcribes_what_is_left() -> None:
    """Half a frame is filled with zeros and counts as a step; silence of our own is none; the last word comes and ends."""
    script = [3] * 9 + [0, 50, 51]
    async with engine(lambda slots: Scripted(slots, script)) as started:
        events = await transcribe(started, noise(4.5))
        assert steps_of(events) == 5
        assert words_of(events) == [Word("50.51", 4 / 12.5), EndWord(0.36)]


async def test_finish_without_audio() -> None:
    async with engine() as started:
        assert await transcribe(started, noise(0)) == [Ready()]


async def test_markers_come_before_the_end() -> None:
    async with engine(lambda slots: Scripted(slots, [3] * 9 + [0, 50, 51])) as started:
        stream = started.open()
        await stream.send(Mark(0))
        await stream.send(Audio(noise(4.5)))
        await stream.send(Mark(1))
        await stream.send(Mark(2))
        await stream.send(Finish())
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
        await stream.send(Audio(noise(7)))
        await stream.send(Reset())
        await stream.send(Audio(pcm))
        await stream.send(Finish())
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
        await stream.send(Audio(noise(3)))
        await stream.send(Audio(pcm[:1000]))
        await stream.send(Mark(4))
        await stream.send(Reset())
        await stream.send(Audio(pcm[1000:]))
        await stream.send(Finish())
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
        writer = asyncio.create_task(slow.send(Audio(pcm)))
        for seed in range(3):
            other = started.open()
            task = asyncio.create_task(rest(other))
            await other.send(Audio(noise(50, seed)))
            await other.send(Finish())
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
        async with asyncio.timeout(DEADLINE):
            await stream.send(Audio(noise(300)))
        (error,) = await rest(stream)
        assert error.close_code == 1008
        stream.close()


async def test_files_and_live_streams_share_the_engine() -> None:
    """How they share it is the scheduler's, and tested there on a clock of the test's own."""
    async with engine(streams=3) as started:
        live, file = started.open(), started.open(live=False)
        file_task = asyncio.create_task(rest(file))
        await file.send(Audio(noise(30)))
        await file.send(Finish())
        for seed in range(20):
            await live.send(Audio(noise(1, seed)))
            await until(live, lambda e: steps_of(e) == 1)
        events = await file_task
        assert words_of(events)
        assert steps_of(events) == 0  # nobody looks at a file's
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
        await stream.send(Audio(noise(3)))
        await until(stream, lambda e: steps_of(e) == 3)
        stream.close()
        await asyncio.sleep(0)
        assert observer.seen.count(("lagged", None)) == 3
        seen = list(observer.seen)
        await transcribe(started, noise(3), live=False)
    assert observer.seen.count(("lagged", None)) == 3, "nobody waits for a file's words"
    assert [entry for entry in seen if entry[0] != "lagged"] == [
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
    engine_ = BatchEngine(lambda: pytest.fail("not asked to load"))
    assert not engine_.ready
    assert engine_.used_slots == engine_.queued_samples == engine_.total_slots == 0
    with pytest.raises(EngineError, match="not loaded yet"):
        engine_.open()
    await engine_.stop()
