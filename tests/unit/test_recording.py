"""Long recordings in overlapping pieces: whatever is cut wherever, each word comes once, in order, at its time."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.media import noise
from tests.support.serving import until
from tests.support.written import Reader, written

from moshi_stt.audio.cut import CutRule, Piece, cut_pieces, find_pause
from moshi_stt.audio.decode import read_file
from moshi_stt.constants import SAMPLE_RATE
from moshi_stt.engine.engine import NO_EXTRAS, StreamOptions
from moshi_stt.engine.recording import RecordingOptions, recording_events, transcribe_recording
from moshi_stt.engine.stream import Stream
from moshi_stt.errors import AudioError, EngineError
from moshi_stt.events import Word
from moshi_stt.text.merge import WordMerger
from moshi_stt.text.subtitles import TimedWord

RULE = CutRule(earliest=6.0, latest=10.0, before=3.0, after=1.5)


def in_pieces(pcm: np.ndarray, size: int = 10_007) -> Iterator[np.ndarray]:
    for start in range(0, len(pcm), size):
        yield pcm[start : start + size]


def check(words: list[TimedWord], times: list[tuple[float, float]], tolerance: float = 1e-3) -> None:
    assert [word.text for word in words] == [f"w{number}" for number in range(len(times))]
    for word, (start, end) in zip(words, times, strict=True):
        assert abs(word.start - start) <= tolerance
        assert abs(word.end - end) <= tolerance


def speech(count: int, word_seconds: float = 0.3, gap_seconds: float = 0.05, pause_every: int = 0) -> list[tuple[float, float]]:
    times, now = [], 0.5
    for number in range(count):
        times.append((now, now + word_seconds))
        now += word_seconds + (0.5 if pause_every and number % pause_every == pause_every - 1 else gap_seconds)
    return times


@pytest.mark.parametrize("pause_every", [0, 5])
@pytest.mark.parametrize("gap", [0.0, 0.05])
@pytest.mark.parametrize("jitter", [0.0, 0.16])
async def test_each_word_comes_once_at_its_time(pause_every: int, gap: float, jitter: float) -> None:
    """With and without pauses to cut at, and with pieces that do not agree on when a word was said."""
    times = speech(250, gap_seconds=gap, pause_every=pause_every)
    engine = Reader(jitter_seconds=jitter)
    pcm = written(times, times[-1][1] + 0.5)
    progress: list[float] = []
    words = await transcribe_recording(engine, in_pieces(pcm), RecordingOptions(cut=RULE), on_progress=progress.append)
    check(words, times, jitter + 2e-3)
    assert engine.streams > 5
    assert engine.used_slots == 0
    assert sum(progress) == pytest.approx(len(pcm) / SAMPLE_RATE)


async def test_pieces_run_on_all_slots_at_once() -> None:
    times = speech(250)
    engine = Reader(wait_for_all=True)
    check(await transcribe_recording(engine, in_pieces(written(times, 90.0)), RecordingOptions(cut=RULE)), times)


@pytest.mark.parametrize("rule", [None, RULE])
async def test_a_prefix_is_taken_out_of_the_times(rule: CutRule | None) -> None:
    times = speech(100)
    words = await transcribe_recording(
        Reader(), in_pieces(written(times, 40.0)), RecordingOptions(cut=rule, prefix_seconds=1.0)
    )
    check(words, times)


@pytest.mark.parametrize(("asked", "samples"), [(None, 5.5), (0.0, 4.0), (0.5, 4.5)])
async def test_the_model_says_what_silence_it_needs(asked: float | None, samples: float) -> None:
    engine = Reader(prefix_silence_seconds=1.5)
    times = speech(5)
    check(await transcribe_recording(engine, in_pieces(written(times, 4.0)), RecordingOptions(prefix_seconds=asked)), times)
    assert engine.samples == [round(samples * SAMPLE_RATE)]


@pytest.mark.parametrize(("seconds", "cut"), [(39.0, False), (41.0, True)])
async def test_up_to_some_length_it_is_one_stream(seconds: float, cut: bool) -> None:
    engine = Reader()
    times = speech(100)
    options = RecordingOptions(cut=RULE, cut_from_seconds=40.0)
    check(await transcribe_recording(engine, in_pieces(written(times, seconds)), options), times)
    assert (engine.streams > 1) == cut


async def test_an_engine_that_cuts_speech_gets_any_length_as_one_stream() -> None:
    engine = Reader()
    engine.cuts_speech = True
    times = speech(250)
    check(await transcribe_recording(engine, in_pieces(written(times, 90.0)), RecordingOptions(cut=RULE)), times)
    assert engine.streams == 1


class Counting(Reader):
    """Counts how many streams there were at once."""

    most = 0

    def open(self, *, live: bool = True, options: StreamOptions = NO_EXTRAS) -> Stream:
        stream = super().open(live=live, options=options)
        self.most = max(self.most, self.used_slots)
        return stream


async def test_slots_are_kept_free_for_live_streams_and_one_stream_runs_all_the_same() -> None:
    """Two live streams on four slots, of which one is to be kept free: one piece runs at a time, and without a slot none."""
    engine = Counting(slots=4, files_only=False)
    live = [engine.open(), engine.open()]
    times = speech(250)
    options = RecordingOptions(cut=RULE, keep_free=1)
    check(await transcribe_recording(engine, in_pieces(written(times, 90.0)), options), times)
    assert engine.most == 3
    live += [engine.open(), engine.open()]
    waiting = asyncio.create_task(transcribe_recording(engine, in_pieces(written(times, 90.0)), options))
    await until(lambda: engine.waiting == 1)
    live.pop().close()
    check(await waiting, times)
    for stream in live:
        stream.close()


async def test_words_come_in_order() -> None:
    times = speech(250)
    events = [event async for event in recording_events(Reader(), in_pieces(written(times, 90.0)), RecordingOptions(cut=RULE))]
    words = [event for event in events if isinstance(event, Word)]
    assert [word.text for word in words] == [f"w{number}" for number in range(250)]
    assert [word.start_time for word in words] == sorted(word.start_time for word in words)


@pytest.mark.parametrize("fail_on", [None, 2])
async def test_pieces_from_elsewhere_are_given_back(fail_on: int | None) -> None:
    times = speech(100)
    pieces = list(cut_pieces(in_pieces(written(times, 40.0)), RULE))
    released: list[int] = []
    given = 0

    async def elsewhere() -> AsyncIterator[Piece]:
        nonlocal given
        for number, piece in enumerate(pieces):
            given += 1
            yield replace(piece, release=partial(released.append, number))

    if fail_on is None:
        check(await transcribe_recording(Reader(), elsewhere()), times)
        assert given == len(pieces)
    else:
        with pytest.raises(EngineError):
            await transcribe_recording(Reader(fail_on=fail_on), elsewhere())
    assert sorted(released) == list(range(given))


async def test_one_stream_where_the_engine_cuts_by_itself() -> None:
    times = speech(100)
    engine = Reader()
    progress: list[float] = []
    check(await transcribe_recording(engine, in_pieces(written(times, 40.0)), on_progress=progress.append), times)
    assert engine.streams == 1
    assert sum(progress) == pytest.approx(40.0)


@pytest.mark.parametrize("rule", [None, RULE])
async def test_an_engine_that_fails_ends_the_recording(rule: CutRule | None) -> None:
    engine = Reader(fail_on=1 if rule is None else 3)
    with pytest.raises(EngineError, match="the model step failed"):
        await transcribe_recording(engine, in_pieces(written(speech(100), 40.0)), RecordingOptions(cut=rule))
    assert engine.used_slots == 0


@pytest.mark.parametrize("rule", [None, RULE])
async def test_audio_that_fails_ends_the_recording(rule: CutRule | None) -> None:
    def broken() -> Iterator[np.ndarray]:
        yield from in_pieces(written(speech(100), 40.0))
        raise AudioError("the file is cut short")

    engine = Reader()
    with pytest.raises(AudioError, match="cut short"):
        await transcribe_recording(engine, broken(), RecordingOptions(cut=rule))
    assert engine.used_slots == 0


@pytest.mark.parametrize("rule", [None, RULE])
async def test_cancelling_frees_every_slot(rule: CutRule | None) -> None:
    started = asyncio.Event()
    loop = asyncio.get_running_loop()

    def endless() -> Iterator[np.ndarray]:
        while True:
            loop.call_soon_threadsafe(started.set)
            yield np.zeros(24_000, np.float32)

    engine = Reader()
    task = asyncio.create_task(transcribe_recording(engine, endless(), RecordingOptions(cut=rule)))
    await started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert engine.used_slots == 0


@pytest.mark.parametrize("rule", [None, RULE])
async def test_an_empty_recording_has_no_words(rule: CutRule | None) -> None:
    assert await transcribe_recording(Reader(), iter([]), RecordingOptions(cut=rule)) == []


@settings(max_examples=40, deadline=None)
@given(st.floats(0, 60), st.integers(500, 100_000), st.integers(0, 2**32 - 1))
def test_pieces_cover_the_recording_in_order(seconds: float, size: int, seed: int) -> None:
    pcm = noise(seconds, seed=seed)
    pieces = list(cut_pieces(in_pieces(pcm, size), RULE))
    assert pieces[0].start == 0
    assert pieces[-1].end == float("inf")
    for piece in pieces:
        first = round(piece.offset * SAMPLE_RATE)
        np.testing.assert_array_equal(piece.pcm, pcm[first : first + len(piece.pcm)])
        assert len(piece.pcm) <= (RULE.before + RULE.latest + RULE.after) * SAMPLE_RATE + size
    for earlier, later in pairwise(pieces):
        assert earlier.end == later.start
        assert RULE.earliest <= earlier.end - earlier.start <= RULE.latest
        assert later.offset == pytest.approx(max(0.0, later.start - RULE.before))
        assert earlier.offset + len(earlier.pcm) / SAMPLE_RATE == pytest.approx(earlier.end + RULE.after)
    assert pieces[-1].offset + len(pieces[-1].pcm) / SAMPLE_RATE == pytest.approx(len(pcm) / SAMPLE_RATE)


def test_the_cut_does_not_depend_on_the_arrays() -> None:
    pcm = noise(47.0)
    cuts = {tuple(piece.end for piece in cut_pieces(in_pieces(pcm, size), RULE)) for size in (100, 1_920, 10**7)}
    assert len(cuts) == 1


def test_the_longest_pause_is_taken_at_its_middle() -> None:
    pcm = noise(8.0)
    pcm[60_000:66_000] *= 0.001
    pcm[120_000:132_000] *= 0.001
    assert abs(find_pause(pcm) - 126_000) <= 960


def test_without_a_pause_the_quietest_place_is_taken() -> None:
    pcm = np.full(120_000, 0.3, np.float32)
    pcm[70_000:73_000] = 0.2
    assert abs(find_pause(pcm) - 71_500) < 4_000


@pytest.mark.parametrize("pcm", [np.zeros(96_000, np.float32), np.zeros(100, np.float32), np.full(96_000, 0.5, np.float32)])
def test_a_cut_is_found_in_anything(pcm: np.ndarray) -> None:
    assert 0 <= find_pause(pcm) <= len(pcm)


def test_cuts_of_real_speech_fall_into_pauses(shared: Path) -> None:
    pcm = read_file(shared / "audio" / "en_two_cities.wav")
    pieces = list(cut_pieces(in_pieces(pcm), RULE))
    assert len(pieces) >= 4
    loud = np.sqrt(np.mean(pcm**2))
    for piece in pieces[:-1]:
        middle = round(piece.end * SAMPLE_RATE)
        assert np.sqrt(np.mean(pcm[middle - 1_200 : middle + 1_200] ** 2)) < 0.1 * loud


@pytest.mark.parametrize("bad", [{"earliest": 0.0}, {"latest": 1.0}, {"before": -1.0}, {"before": 30.0}])
def test_a_rule_that_makes_no_sense_is_refused(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="no piece satisfies"):
        CutRule(**bad)


def word(text: str, middle: float) -> TimedWord:
    return TimedWord(text, middle - 0.1, middle + 0.1)


@pytest.mark.parametrize(
    ("earlier", "later", "expected"),
    [
        ([word("a", 9.8), word("b", 10.2)], [word("a", 9.8), word("b", 10.2)], "a b"),
        ([word("a", 9.9)], [word("A,", 10.1)], "a"),
        ([word("a", 10.1)], [word("a", 9.9)], "a"),
        ([word("no", 9.8), word("no", 10.2)], [word("no", 9.8), word("no", 10.2)], "no no"),
        ([word("no", 9.8), word("no", 10.1)], [word("no", 9.9), word("no", 10.3)], "no no"),
        ([word("a", 9.9)], [word("b", 10.1)], "a b"),
        ([word("a", 9.0)], [word("a", 11.0)], "a a"),
        ([word("as", 9.3)], [word("As", 10.2)], "as"),
        ([word("cut", 11.4)], [word("cat", 7.1), word("a", 10.4)], "a"),
        ([], [word("a", 10.4)], "a"),
        ([word("a", 9.6)], [], "a"),
        ([word("?", 9.9)], [word("!", 10.1)], "? !"),
    ],
)
def test_words_at_a_cut(earlier: list[TimedWord], later: list[TimedWord], expected: str) -> None:
    merger = WordMerger()
    merged = [*merger.add(0.0, earlier), *merger.add(10.0, later), *merger.finish()]
    assert " ".join(found.text for found in merged) == expected
