"""The segment engine over a recogniser without a model: streams, threads, order, bounds and failures."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import numpy as np
import pytest
from numpy.typing import NDArray
from tests.support.level_speech import LevelRecogniser, pause, say
from tests.support.serving import until as comes_true

from moshi_stt.constants import SAMPLE_RATE
from moshi_stt.engine import segment
from moshi_stt.engine.commands import Audio, Finish, Mark, Reset
from moshi_stt.engine.engine import SilentObserver, StreamOptions
from moshi_stt.engine.segment import SegmentEngine, measure, speech_seconds
from moshi_stt.engine.segmenter import SegmentSettings
from moshi_stt.engine.stream import Stream, StreamLimits
from moshi_stt.errors import CheckpointError, EngineError, EngineFailed, NoFreeSlot
from moshi_stt.events import AnyEvent, EndWord, Error, Marker, Ready, Step, Warning, Word  # noqa: A004 - the event

DEADLINE = 60.0


class Engine(SegmentEngine):
    recogniser: LevelRecogniser


@asynccontextmanager
async def engine(slots: int | None = 8, threads: int = 2, **options: object) -> AsyncIterator[Engine]:
    recogniser = LevelRecogniser()
    made = Engine(lambda: recogniser, slots=slots, threads=threads, **options)  # type: ignore[arg-type]
    await made.start()
    made.recogniser = recogniser
    recogniser.calls = 0
    try:
        yield made
    finally:
        recogniser.gate.set()
        recogniser.let_go()
        await made.stop()


async def until(stream: Stream, last: Callable[[AnyEvent], bool]) -> list[AnyEvent]:
    """Events up to and with the first that is the last one, without the steps."""
    events: list[AnyEvent] = []
    async with asyncio.timeout(DEADLINE):
        async for event in stream:
            if not isinstance(event, Step):
                events.append(event)
            if last(event):
                break
    return events


async def to_end(stream: Stream) -> list[AnyEvent]:
    return await until(stream, lambda _: False)


async def transcribe(
    engine: SegmentEngine, audio: NDArray[np.float32], *, live: bool = True, size: int = 1920
) -> list[AnyEvent]:
    stream = engine.open(live=live)
    try:
        reading = asyncio.create_task(to_end(stream))
        for start in range(0, len(audio), size):
            await stream.send(Audio(audio[start : start + size]))
        await stream.send(Finish())
        return await reading
    finally:
        stream.close()


def texts(events: list[AnyEvent]) -> list[str]:
    return [event.text for event in events if isinstance(event, Word)]


async def test_ready_then_words_then_the_end() -> None:
    async with engine() as served:
        events = await transcribe(served, say([10, 20, 30]))
    assert events[0] == Ready()
    assert texts(events) == ["w10.", "w20.", "w30."]
    assert [type(event) for event in events[1:]] == [Word, EndWord] * 3


async def test_audio_and_a_marker_and_then_nothing_gives_the_last_word_and_the_marker() -> None:
    async with engine() as served:
        stream = served.open()
        await stream.send(Audio(say([10, 20])[:-1_000]))
        await stream.send(Mark(7))
        events = await until(stream, lambda event: isinstance(event, Marker))
        assert texts(events) == ["w10.", "w20."]
        assert events[-1] == Marker(7)
        await stream.send(Audio(say([30])))
        await stream.send(Mark(8))
        await stream.send(Mark(9))
        events = await until(stream, lambda event: event == Marker(9))
        assert texts(events) == ["w30."]
        assert events[-2:] == [Marker(8), Marker(9)]
        assert isinstance(events[0], Word)
        assert events[0].start_time > 0.8
        stream.close()


async def test_a_file_is_recognised_once_where_speech_ends() -> None:
    """Nobody waits for a file's words while somebody speaks in it; a file that asks for `Interim` is heard as it goes."""
    audio = np.concatenate([say(range(10, 20)), pause(2.0), say(range(20, 50)), pause(2.0)])
    async with engine() as served:
        live = texts(await transcribe(served, audio))
        live_calls, served.recogniser.calls = served.recogniser.calls, 0
        file = texts(await transcribe(served, audio, live=False))
        assert file == live == [f"w{number}." for number in range(10, 50)]
        assert served.recogniser.calls <= 4 < live_calls
        served.recogniser.calls = 0
        stream = served.open(live=False, options=StreamOptions(interim=True))
        await stream.send(Audio(audio[: 8 * SAMPLE_RATE]))
        await stream.send(Finish())
        await to_end(stream)
        assert served.recogniser.calls > 4
        stream.close()


async def test_steps_come_with_the_pause_probabilities() -> None:
    async with engine() as served:
        stream = served.open()
        await stream.send(Audio(np.concatenate([say([10]), pause(3.0)])))
        await stream.send(Finish())
        async with asyncio.timeout(DEADLINE):
            steps = [event async for event in stream if isinstance(event, Step)]
        stream.close()
    assert [step.step_idx for step in steps] == list(range(len(steps)))
    assert len(steps) == int((0.5 + 3.0) / 0.08)
    assert steps[0].prs == (1.0,) * 4
    assert steps[-1].prs[2] > steps[20].prs[2] > 0
    assert all(0 <= step.buffered_pcm <= 3.5 * SAMPLE_RATE for step in steps)


async def test_a_marker_before_any_audio_is_answered() -> None:
    async with engine() as served:
        stream = served.open()
        await stream.send(Mark(-1))
        assert await until(stream, lambda event: isinstance(event, Marker)) == [Ready(), Marker(-1)]
        stream.close()


async def test_reset_says_what_was_pending_and_starts_anew() -> None:
    async with engine() as served:
        stream = served.open()
        await stream.send(Audio(say([10, 20])))
        await stream.send(Reset())
        await stream.send(Audio(say([30])))
        await stream.send(Finish())
        events = await to_end(stream)
        stream.close()
    said = [event.text if isinstance(event, Word) else event for event in events if not isinstance(event, EndWord)]
    assert said == [Ready(), "w10.", "w20.", Ready(), "w30."]
    last = next(event for event in reversed(events) if isinstance(event, Word))
    assert last.start_time == pytest.approx(0.1, abs=0.01)


async def test_streams_at_once_say_what_each_says_alone() -> None:
    audios = [say([10 + 3 * index + step for step in range(12)]) for index in range(8)]
    async with engine() as served:
        alone = [await transcribe(served, audio, live=index % 2 == 0) for index, audio in enumerate(audios)]
        together = await asyncio.gather(
            *(transcribe(served, audio, live=index % 2 == 0, size=777) for index, audio in enumerate(audios))
        )
    assert together == alone
    assert all(len(texts(events)) == 12 for events in alone)


async def test_overload_loses_nothing_and_feeding_waits() -> None:
    """While the recogniser stands still the inbox fills and `feed` waits; then every word comes, the same as ever."""
    audio = np.concatenate([say(range(10, 60)), pause(1.0)] * 2)
    limits = StreamLimits(inbox_samples=2 * SAMPLE_RATE)
    async with engine(limits=limits) as served:
        expected = await transcribe(served, audio)
        served.recogniser.gate.clear()
        stream = served.open()
        feeding = asyncio.create_task(stream.send(Audio(audio)))
        reading = asyncio.create_task(to_end(stream))
        await comes_true(lambda: stream.pending_samples == limits.inbox_samples, "a full inbox")
        assert not feeding.done()
        assert served.queued_samples == stream.pending_samples
        served.recogniser.gate.set()
        async with asyncio.timeout(DEADLINE):
            await feeding
        await stream.send(Finish())
        assert await reading == expected
        assert served.queued_samples == 0
        stream.close()


async def test_a_reader_that_stands_still_stops_only_its_own_stream() -> None:
    limits = StreamLimits(outbox_events=8)
    audio = say(range(10, 40))
    async with engine(limits=limits, threads=1) as served:
        stuck = served.open()
        feeding = asyncio.create_task(stuck.send(Audio(audio)))
        assert len(texts(await transcribe(served, audio))) == 30
        await feeding
        await stuck.send(Finish())
        assert len(texts(await to_end(stuck))) == 30
        stuck.close()


async def test_a_live_stream_overtakes_files_and_files_go_on() -> None:
    """One thread, three long files queued before a live stream of a second: the live one ends first, the files end too."""
    order: list[str] = []

    async def named(name: str, served: SegmentEngine, audio: NDArray[np.float32], live: bool) -> None:
        await transcribe(served, audio, live=live, size=SAMPLE_RATE)
        order.append(name)

    async with engine(threads=1) as served:
        served.recogniser.gate.clear()
        files = [asyncio.create_task(named("file", served, say(range(10, 90)), False)) for _ in range(3)]
        await asyncio.sleep(0)
        live = asyncio.create_task(named("live", served, say([10, 20]), True))
        await asyncio.sleep(0)
        served.recogniser.gate.set()
        async with asyncio.timeout(DEADLINE):
            await asyncio.gather(live, *files)
    assert order == ["live", "file", "file", "file"]


async def test_a_file_is_not_starved_by_live_streams() -> None:
    """Live streams that never run out of audio share one thread with a file: the file ends while they go on."""
    async with engine(threads=1) as served:
        over = asyncio.Event()

        async def endless() -> None:
            stream = served.open()
            reading = asyncio.create_task(to_end(stream))
            while not over.is_set():
                await stream.send(Audio(say(range(10, 30))))
            stream.close()
            await reading

        live = [asyncio.create_task(endless()) for _ in range(3)]
        async with asyncio.timeout(DEADLINE):
            assert len(texts(await transcribe(served, say(range(10, 30)), live=False))) == 20
        over.set()
        await asyncio.gather(*live)


async def test_no_slot_is_refused_and_a_closed_stream_frees_its_slot_at_once() -> None:
    async with engine(slots=2) as served:
        first, second = served.open(), served.open()
        assert served.used_slots == 2
        with pytest.raises(NoFreeSlot, match="no free channels"):
            served.open()
        served.recogniser.gate.clear()
        await first.send(Audio(say([10, 20, 30])))
        first.close()
        third = served.open()
        served.recogniser.gate.set()
        await third.send(Audio(say([40])))
        await third.send(Finish())
        assert texts(await to_end(third)) == ["w40."]
        waiting = asyncio.create_task(served.open_when_free(DEADLINE))
        await asyncio.sleep(0)
        second.close()
        (await waiting).close()
        third.close()
        assert served.used_slots == 0


async def test_a_stream_whose_audio_the_recogniser_cannot_take_fails_alone() -> None:
    async with engine() as served:
        served.recogniser.poison = 66
        bad, good = await asyncio.gather(transcribe(served, say([10, 66])), transcribe(served, say([10, 20])))
        assert isinstance(bad[-1], Error)
        assert bad[-1].close_code == 1011
        assert "cannot hear this" in bad[-1].message
        assert texts(good) == ["w10.", "w20."]
        assert served.ready
        assert texts(await transcribe(served, say([30]))) == ["w30."]


async def test_a_broken_recogniser_fails_the_engine_and_every_stream() -> None:
    async with engine() as served:
        other = served.open()
        served.recogniser.broken = True
        events = await transcribe(served, say([10]))
        assert isinstance(events[-1], Error)
        failure = await asyncio.wait_for(served.wait_failed(), DEADLINE)
        assert "broken" in str(failure)
        assert isinstance((await to_end(other))[-1], Error)
        assert not served.ready
        with pytest.raises(EngineFailed):
            served.open()
        other.close()


async def test_stop_ends_every_stream_and_may_be_called_twice() -> None:
    async with engine() as served:
        stream = served.open()
        await stream.send(Audio(say([10])))
        await served.stop()
        last = (await to_end(stream))[-1]
        assert isinstance(last, Error)
        assert last.close_code == 1001
        assert served.recogniser.closed
        with pytest.raises(EngineError):
            served.open()
        stream.close()


@pytest.mark.parametrize(("cost", "streams"), [(0.25, 4), (3.0, 2), (1e-6, 1_024)])
async def test_as_many_streams_as_can_be_recognised_in_real_time(
    cost: float, streams: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two at least, so that a file can wait for a slot next to a live stream."""
    monkeypatch.setattr(segment, "measure", lambda *_: cost)
    async with engine(slots=None, threads=1) as served:
        assert served.total_slots == streams
        assert f"{streams} are admitted" in served.info.details["real-time streams"]
        opened = [served.open() for _ in range(streams)]
        with pytest.raises(NoFreeSlot):
            served.open()
        for stream in opened:
            stream.close()


async def test_more_streams_than_keep_up_are_admitted_and_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segment, "measure", lambda *_: 0.5)
    async with engine(slots=3, threads=1) as served:
        assert served.total_slots == 3
        assert "batch_size admits 3" in served.info.details["real-time streams"]


async def test_a_model_that_cannot_be_loaded_is_an_error_of_start() -> None:
    def missing() -> LevelRecogniser:
        raise CheckpointError("the wheel is missing: run `pip install it`")

    served = SegmentEngine(missing, slots=1)
    with pytest.raises(CheckpointError, match="pip install"):
        await served.start()
    assert not served.ready
    with pytest.raises(EngineError, match="not loaded"):
        served.open()
    await served.stop()


class Foreign(SilentObserver):
    count = 0

    def foreign(self) -> None:
        self.count += 1


async def test_another_language_is_counted_logged_and_said_to_who_asked(caplog: pytest.LogCaptureFixture) -> None:
    observer = Foreign()
    foreign = np.full(12 * SAMPLE_RATE, 0.001, np.float32)  # below the quietest word: loud enough for this detector alone
    async with engine(observer=observer) as served:
        served.recogniser.speech_probability = lambda frame, state: (1.0, state)  # type: ignore[method-assign]
        stream = served.open(options=StreamOptions(warnings=True))
        await stream.send(Audio(foreign))
        await stream.send(Finish())
        events = await to_end(stream)
        stream.close()
        assert [event.code for event in events if isinstance(event, Warning)] == ["language"]
        silent = await transcribe(served, foreign)
        assert silent == [Ready()]
    assert observer.count == 2
    assert sum("For French: moshi-stt worker --config stt-1b-en_fr" in record.message for record in caplog.records) == 2


class Counting(SilentObserver):
    def __init__(self) -> None:
        self.steps = self.lags = self.open = self.refusals = self.failures = 0
        self.closed_steps: list[int] = []

    def stepped(self, seconds: float, rows: int) -> None:
        assert seconds >= 0
        assert rows == 1
        self.steps += 1

    def lagged(self, seconds: float) -> None:
        assert 0 <= seconds < DEADLINE
        self.lags += 1

    def opened(self) -> None:
        self.open += 1

    def closed(self, steps: int) -> None:
        self.closed_steps.append(steps)

    def refused(self) -> None:
        self.refusals += 1

    def failed(self) -> None:
        self.failures += 1


async def test_the_observer_counts() -> None:
    seen = Counting()
    async with engine(slots=1, observer=seen) as served:
        await transcribe(served, say([10, 20]))
        held = served.open()
        with pytest.raises(NoFreeSlot):
            served.open()
        held.close()
        served.recogniser.poison = 66
        await transcribe(served, say([66]))
        calls = served.recogniser.calls
    assert seen.open == 3
    assert seen.refusals == 1
    assert seen.failures == 1
    assert seen.lags >= 1
    assert len(seen.closed_steps) == 3
    assert seen.closed_steps[1] == 0
    assert seen.closed_steps[0] == seen.steps > 0
    assert calls >= seen.steps


async def test_info_says_what_the_machine_can_carry() -> None:
    async with engine(slots=3, threads=2) as served:
        assert served.info.kind == "embedded"
        assert served.info.total_slots == served.total_slots == 3
        assert served.info.languages == ("en",)
        assert "of a core" in served.info.details["cost of a live stream"]
        assert "about" in served.info.details["real-time streams"]
    assert measure(LevelRecogniser(), SegmentSettings()) > 0


def test_pauses_of_the_sample_do_not_make_speech_cheap() -> None:
    """What a stream costs is counted for the speech in the sample, not for its pauses."""
    samples = np.concatenate([np.full(32_000, 0.5, np.float32), np.zeros(48_000, np.float32)])
    assert speech_seconds(LevelRecogniser(), samples, SegmentSettings()) == pytest.approx(2.0, abs=0.05)
    assert speech_seconds(LevelRecogniser(), samples[40_000:], SegmentSettings()) == 0.0


# ---- recognition that does not come back ---------------------------------------------------------------------------------

HANG_SECONDS = 0.2


@asynccontextmanager
async def hanging(threads: int) -> AsyncIterator[tuple[Engine, Stream]]:
    """An engine whose recogniser holds its next call for good, and the stream that makes that call."""
    async with engine(threads=threads, hang_seconds=HANG_SECONDS) as made:
        made.recogniser.hang()
        stream = made.open()
        await stream.send(Audio(say([3])))
        await stream.send(Finish())
        yield made, stream


async def test_recognition_that_hangs_once_costs_its_own_stream_alone(caplog: pytest.LogCaptureFixture) -> None:
    """Another thread takes the place of the one that hangs, after the model has taken its own sample."""
    async with hanging(threads=1) as (made, stream):
        events = await to_end(stream)
        last = events[-1]
        assert isinstance(last, Error)
        assert last.message.startswith("recognition has not come back for ")
        assert last.close_code == 1011
        assert "recogniser-0 has not come back from recognition" in caplog.text
        stream.close()
        assert [e.text for e in await transcribe(made, say([4, 5])) if isinstance(e, Word)] == ["w4.", "w5."]
        assert made.ready


async def test_recognition_that_hangs_always_fails_the_engine(caplog: pytest.LogCaptureFixture) -> None:
    """Its health is red then, and stopping does not wait for the threads that hang."""
    async with hanging(threads=2) as (made, stream):
        made.recogniser.hang(always=True)
        async with asyncio.timeout(DEADLINE):
            failure = await made.wait_failed()
        assert "it hangs" in str(failure)
        assert not made.ready
        with pytest.raises(EngineFailed):
            made.open()
        assert isinstance((await to_end(stream))[-1], Error)
        await made.stop()
        assert not made.recogniser.closed, "a thread still uses it"
        assert "recognition hangs" not in caplog.text, "it did not wait for those that were given up"
