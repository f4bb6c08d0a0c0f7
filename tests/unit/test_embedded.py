"""The embedded model on real speech that its makers publish."""

import asyncio
import itertools
import os
import threading
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from moshi_stt.audio.decode import read_file
from moshi_stt.audio.resample import StreamingResampler
from moshi_stt.constants import SAMPLE_RATE
from moshi_stt.data import SAMPLE, data_file
from moshi_stt.engine.commands import Audio, Mark
from moshi_stt.engine.engine import StreamOptions
from moshi_stt.engine.recogniser import RECOGNISER_RATE, Spoken
from moshi_stt.engine.segment import SegmentEngine
from moshi_stt.engine.segmenter import Segmenter
from moshi_stt.errors import CheckpointError
from moshi_stt.events import AnyEvent, EndWord, Marker, Ready, Step, Word
from moshi_stt.models import embedded
from moshi_stt.models.alignment import Aligner, share_out
from moshi_stt.models.cross_attention import AttentionAligner, monotone_path
from moshi_stt.models.embedded import EmbeddedRecogniser, load_embedded
from moshi_stt.text.word_errors import word_errors

DEADLINE = 120.0
BECKETT = "ever tried ever failed no matter try again fail again fail better"
CITIES = "it was the best of times it was the worst of times"


def recording(name: str) -> NDArray[np.float32]:
    """float32 (S,) at 24 kHz."""
    return read_file(data_file(SAMPLE) if name == "beckett.wav" else Path(__file__).parents[1] / "data" / name)


def to_16k(pcm: NDArray[np.float32]) -> NDArray[np.float32]:
    resampler = StreamingResampler(SAMPLE_RATE, RECOGNISER_RATE)
    return np.concatenate([resampler.feed(pcm), resampler.finish()])


@pytest.fixture(scope="module")
def recogniser() -> Iterator[EmbeddedRecogniser]:
    loaded = load_embedded(2)
    yield loaded
    loaded.close()


@pytest.fixture(scope="module", params=["pocketsphinx", "attention"])
def aligner(request: pytest.FixtureRequest, recogniser: EmbeddedRecogniser) -> Iterator[Aligner | AttentionAligner]:
    """Each way to place words."""
    if request.param == "attention":
        yield AttentionAligner(recogniser._moonshine, recogniser._tokenizer)
        return
    pytest.importorskip("pocketsphinx", reason="pocketsphinx has no wheel for this version of Python")
    made = Aligner(2)
    yield made
    made.close()


@pytest.fixture(scope="module")
def beckett() -> NDArray[np.float32]:
    return recording("beckett.wav")


@pytest.fixture(scope="module")
def cities() -> NDArray[np.float32]:
    return recording("two_cities.flac")[: 9 * SAMPLE_RATE]


CONFIDENCE = StreamOptions(confidence=True)


def run(recogniser: EmbeddedRecogniser, *pieces: NDArray[np.float32]) -> list[AnyEvent]:
    """Everything but the steps."""
    segmenter = Segmenter(recogniser, options=CONFIDENCE)
    events = [event for piece in pieces for batch in segmenter.feed(piece) for event in batch]
    events += [event for batch in segmenter.flush() for event in batch]
    return [event for event in events if not isinstance(event, Step)]


def plain(events: list[AnyEvent]) -> list[str]:
    """Words without case and punctuation."""
    words = [event.text.lower() for event in events if isinstance(event, Word)]
    return [word for word in ("".join(letter for letter in word if letter.isalnum()) for word in words) if word]


def bare(words: Iterable[Spoken]) -> list[str]:
    return ["".join(letter for letter in word.text.lower() if letter.isalnum()) for word in words]


def check_times(events: list[AnyEvent], seconds: float) -> None:
    last = 0.0
    for word, end in zip(events[::2], events[1::2], strict=True):
        assert isinstance(word, Word)
        assert isinstance(end, EndWord)
        assert word.text
        assert last <= word.start_time <= end.stop_time <= seconds + 0.001
        assert word.confidence is not None
        assert 0 < word.confidence <= 1
        last = end.stop_time


# ---- the recogniser --------------------------------------------------------------------------------------------------


def test_unsigned_weights_say_the_same(
    recogniser: EmbeddedRecogniser, beckett: NDArray[np.float32], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where products of unsigned and signed bytes saturate, weights are unsigned: every result must stay what it was."""
    if embedded.int8_saturates():
        pytest.skip("this processor can only compute with unsigned weights")
    monkeypatch.setattr(embedded, "int8_saturates", lambda: True)
    unsigned = load_embedded(1)
    samples = to_16k(beckett)
    for seconds in (1, 3, 7):
        part = samples[: seconds * RECOGNISER_RATE]
        assert unsigned.recognise(part) == recogniser.recognise(part)
    unsigned.close()


@pytest.mark.parametrize(("left", "saturates"), [(255 * 127 * 64, False), (32_767 * 32, True)])
def test_saturating_products_are_told_from_exact_ones(left: int, saturates: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    class Session:
        def run(self, _outputs: object, feed: dict[str, NDArray[np.uint8]]) -> list[NDArray[np.int32]]:
            assert (feed["left"] == 255).all()
            return [np.full((8, 32), left, np.int32)]

    monkeypatch.setattr(embedded, "one_thread_session", lambda _path: Session())
    assert embedded.int8_saturates() == saturates


def test_the_decoder_continues_from_its_caches(recogniser: EmbeddedRecogniser, beckett: NDArray[np.float32]) -> None:
    """Logits after a text in parts are those after the text at once, but for what quantizing another pass changes."""
    model = recogniser._moonshine
    samples = to_16k(beckett)
    heard = model.encode(samples)
    fixed = dict(zip(model._heard, heard, strict=True))
    tokens = [1, *model.decode(heard, [], [], 100)[0]]
    whole, caches = model._run(fixed, model._no_past, tokens)
    for cut in (1, len(tokens) // 2, len(tokens) - 1):
        first, past = model._run(fixed, model._no_past, tokens[:cut])
        second, grown = model._run(fixed, past, tokens[cut:])
        parts = np.concatenate([first, second])
        assert min(np.corrcoef(one, two)[0, 1] for one, two in zip(parts, whole, strict=True)) > 0.99
        assert [cache.shape for cache in grown] == [cache.shape for cache in caches]
    late, _ = model._run(fixed, model._no_past, tokens, first=3)
    assert len(late) == len(tokens) - 3
    assert min(np.corrcoef(one, two)[0, 1] for one, two in zip(late, whole[3:], strict=True)) > 0.99


@pytest.mark.parametrize("pieces", [(2.0, 5.0, 9.0), (0.3, 0.31, 0.332, 4.7), (6.0, 3.0, 3.0, 8.5), (5.0, 0.1, 7.0)])
def test_memory_of_the_audio_changes_no_result(
    pieces: Sequence[float], recogniser: EmbeddedRecogniser, beckett: NDArray[np.float32]
) -> None:
    """Audio that grows by much or by next to nothing, that is asked for twice, or that a part of is."""
    samples, memory = to_16k(beckett), recogniser.memory()
    for seconds in pieces:
        part = samples[: round(seconds * RECOGNISER_RATE)]
        heard = recogniser._moonshine.encode(part, memory)
        assert all(np.array_equal(one, two) for one, two in zip(heard, recogniser._moonshine.encode(part), strict=True))
    assert recogniser.recognise(part, memory=memory) == recogniser.recognise(part)


def test_attention_covers_every_token_and_the_end(recogniser: EmbeddedRecogniser, beckett: NDArray[np.float32]) -> None:
    model = recogniser._moonshine
    heard = model.encode(to_16k(beckett))
    tokens, _, _ = model.decode(heard, [], [], 100)
    attention = model.cross_attention(heard, tokens)
    assert attention.shape == (48, len(tokens) + 1, heard[0].shape[2])
    assert np.allclose(attention.sum(axis=2), 1.0, atol=1e-4)


def test_it_says_what_was_said(recogniser: EmbeddedRecogniser, beckett: NDArray[np.float32]) -> None:
    hypothesis = recogniser.recognise(to_16k(beckett))
    assert hypothesis.whole
    assert " ".join(word.text for word in hypothesis.words).lower().replace(",", "").rstrip(".") == BECKETT
    assert all(word.logprob <= 0 and word.tokens for word in hypothesis.words)


def test_words_said_are_continued_and_a_draft_changes_nothing(
    recogniser: EmbeddedRecogniser, beckett: NDArray[np.float32]
) -> None:
    samples = to_16k(beckett)
    words = recogniser.recognise(samples).words
    texts = [word.text for word in words]
    assert [word.text for word in recogniser.recognise(samples, words[:4]).words] == texts[4:]
    assert [word.text for word in recogniser.recognise(samples, words[:4], words[4:]).words] == texts[4:]
    wrong = [*words[:2], *words[6:8]]
    assert bare(recogniser.recognise(samples, (), wrong).words) == bare(words)


def test_what_follows_words_said_never_lengthens_the_last(recogniser: EmbeddedRecogniser, beckett: NDArray[np.float32]) -> None:
    samples = to_16k(beckett)
    first = recogniser.recognise(samples).words[0]
    half = first._replace(tokens=first.tokens[:1])
    for word in recogniser.recognise(samples, [half]).words[:1]:
        assert recogniser._tokenizer.pieces[word.tokens[0]].startswith(b" ")


def test_a_decoder_in_a_loop_is_stopped(recogniser: EmbeddedRecogniser) -> None:
    """Amplitude-modulated noise makes this model repeat one token for ever."""
    time = np.arange(8 * RECOGNISER_RATE) / RECOGNISER_RATE
    noise = np.random.default_rng(0).standard_normal(len(time)) * 0.1 * (1 + np.sin(2 * np.pi * 4 * time))
    hypothesis = recogniser.recognise(noise.astype(np.float32))
    assert not hypothesis.whole
    assert sum(len(word.tokens) for word in hypothesis.words) <= 8 * 6.5 + 8


@pytest.mark.parametrize("samples", [0, 1, 100, 5_000])
def test_any_length_is_taken(recogniser: EmbeddedRecogniser, samples: int) -> None:
    recogniser.recognise(np.zeros(samples, np.float32))
    assert len(recogniser.align(np.zeros(samples, np.float32), ["a", "b"])) == 2


def test_threads_share_one_model(recogniser: EmbeddedRecogniser, beckett: NDArray[np.float32]) -> None:
    """More callers than decoders of the aligner, all with the same answer."""
    samples = to_16k(beckett)[: 3 * RECOGNISER_RATE]
    start = threading.Barrier(4)

    def once(_: int) -> tuple[list[str], list[tuple[float, float]]]:
        start.wait(30)
        words = [word.text for word in recogniser.recognise(samples).words]
        return words, [tuple(span) for span in recogniser.align(samples, words)]  # type: ignore[misc]

    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(once, range(4)))
    assert all(answer == answers[0] for answer in answers)
    assert answers[0][0]


def test_the_same_words_as_its_makers_own_library(recogniser: EmbeddedRecogniser, beckett: NDArray[np.float32]) -> None:
    """The oracle is the wheel's C++ code, which cuts by itself: what it says of a line, ours says of the line's samples.

    Its graphs round elsewhere, so that a word that is as likely as another ("fair", "fare") may be the other.
    """
    transcriber = pytest.importorskip("moonshine_voice.transcriber")
    api = pytest.importorskip("moonshine_voice.moonshine_api")
    oracle = transcriber.Transcriber(Path(transcriber.__file__).parent / "assets" / "tiny-en", api.ModelArch.TINY)
    try:
        lines = oracle.transcribe_without_streaming(to_16k(beckett).tolist(), RECOGNISER_RATE).lines
    finally:
        oracle.close()
    long = [line for line in lines if line.duration >= 0.5]
    assert len(long) >= 4
    theirs = [word for line in long for word in line.text.split()]
    ours = [word.text for line in long for word in recogniser.recognise(np.array(line.audio_data, np.float32)).words]
    assert len(theirs) >= 10
    assert word_errors(theirs, ours) <= 1


# ---- when ------------------------------------------------------------------------------------------------------------


def test_words_lie_where_the_energy_is(aligner: Aligner | AttentionAligner, beckett: NDArray[np.float32]) -> None:
    """Six phrases with silence between them: each word's span is louder than the longest gaps."""
    samples = to_16k(beckett)
    words = BECKETT.split()
    spans = aligner.align(samples, words)
    gaps = [(before.stop, after.start) for before, after in itertools.pairwise(spans) if after.start - before.stop > 0.3]
    assert len(gaps) >= 4

    def level(start: float, stop: float) -> float:
        return float(np.square(samples[int(start * RECOGNISER_RATE) : int(stop * RECOGNISER_RATE)]).mean())

    quiet = np.median([level(*gap) for gap in gaps])
    assert all(level(*span) > 3 * quiet for span in spans)


def test_words_outside_the_dictionary_are_placed(aligner: Aligner | AttentionAligner, beckett: NDArray[np.float32]) -> None:
    samples = to_16k(beckett)
    known = aligner.align(samples, BECKETT.split())
    odd = ["Evver", "tryed,", "ever", "fayled—", "no", "mattur", "try", "agane", "fale", "again", "faile", "bettar."]
    for span, other in zip(aligner.align(samples, odd), known, strict=True):
        assert span.start == pytest.approx(other.start, abs=0.25)


def test_words_that_nobody_said_do_not_move_those_before(
    aligner: Aligner | AttentionAligner, beckett: NDArray[np.float32]
) -> None:
    """The end of a hypothesis that is still growing is often wrong; the words that are settled keep their times."""
    samples = to_16k(beckett)[: 2 * RECOGNISER_RATE + 6_000]
    right = aligner.align(samples, ["ever", "tried", "ever"])
    for extra in ("a little bit of it", "and", "ever failed again and again"):
        spans = aligner.align(samples, ["ever", "tried", "ever", *extra.split()], 2)
        assert len(spans) == 2
        for span, other in zip(spans, right, strict=False):
            assert span.start == pytest.approx(other.start, abs=0.1)


@pytest.mark.parametrize(
    "texts",
    [
        ["—", "♪", "..."],
        ["ever", "—", "tried", "♪"],
        ["1813", "$5", "Mr.", "ill-disposed", "don't", "日本", "BBC", "3rd", "’", "''"],
        ["word"] * 200,
        ["xqzwv" * 20],
    ],
)
def test_alignment_never_fails_and_never_overlaps(
    aligner: Aligner | AttentionAligner, beckett: NDArray[np.float32], texts: list[str]
) -> None:
    samples = to_16k(beckett)[: 3 * RECOGNISER_RATE]
    spans = aligner.align(samples, texts)
    assert len(spans) == len(texts)
    edges = [edge for span in spans for edge in span]
    assert edges == sorted(edges)
    assert edges[0] >= 0
    assert edges[-1] <= 3.0


def test_the_two_ways_agree(recogniser: EmbeddedRecogniser, beckett: NDArray[np.float32]) -> None:
    pytest.importorskip("pocketsphinx", reason="pocketsphinx has no wheel for this version of Python")
    samples, texts = to_16k(beckett), BECKETT.split()
    aligner = Aligner(1)
    expected = aligner.align(samples, texts)
    aligner.close()
    found = AttentionAligner(recogniser._moonshine, recogniser._tokenizer).align(samples, texts)
    off = [abs(ours.start - theirs.start) for ours, theirs in zip(found, expected, strict=True)]
    assert np.median(off) < 0.05
    assert max(off) < 0.2


def test_without_pocketsphinx_the_decoder_places_the_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "ALIGNER_PACKAGE", "a_package_that_is_not_here")
    loaded = load_embedded(1)
    assert loaded.notes["word times"] == "from the decoder (pocketsphinx is not installed)"
    words = [event for event in run(loaded, recording("beckett.wav")) if isinstance(event, Word)]
    loaded.close()
    assert [word.text.strip(",.").lower() for word in words[:2]] == ["ever", "tried"]
    assert words[0].start_time < words[1].start_time < words[2].start_time


@given(st.integers(1, 6), st.integers(0, 8), st.integers(0, 1_000))
def test_the_path_is_the_best_of_all(rows: int, more: int, seed: int) -> None:
    weights = np.random.default_rng(seed).random((rows, rows + more)).astype(np.float32)
    frames = weights.shape[1]

    def total(starts: Sequence[int]) -> float:
        edges = [*starts, frames]
        return float(sum(weights[row, edges[row] : edges[row + 1]].sum(dtype=np.float64) for row in range(rows)))

    best = max(total((0, *rest)) for rest in itertools.combinations(range(1, frames), rows - 1))
    starts = monotone_path(weights).tolist()
    assert starts[0] == 0
    assert starts == sorted(set(starts))
    assert total(starts) == pytest.approx(best)


def test_a_word_is_encoded_as_the_model_writes_it(recogniser: EmbeddedRecogniser, beckett: NDArray[np.float32]) -> None:
    tokenizer = recogniser._tokenizer
    for word in recogniser.recognise(to_16k(beckett)).words:
        tokens = tokenizer.encode(word.text)
        assert b"".join(tokenizer.pieces[token] for token in tokens).decode() == f" {word.text}"
    assert tokenizer.encode("\N{SNOWMAN}\N{SNOWMAN}") == [] or all(tokenizer.encode("\N{SNOWMAN}"))


def test_what_was_aligned_before_does_not_move_a_word(beckett: NDArray[np.float32]) -> None:
    """One decoder, loud audio in between: the second answer is the first."""
    pytest.importorskip("pocketsphinx", reason="pocketsphinx has no wheel for this version of Python")
    aligner = Aligner(1)
    samples = to_16k(beckett)[: 3 * RECOGNISER_RATE]
    first = aligner.align(samples, ["ever", "tried"])
    aligner.align(np.clip(samples * 50, -1, 1), ["something", "loud"])
    assert aligner.align(samples, ["ever", "tried"]) == first
    aligner.close()


def test_shared_out_words_fill_their_place() -> None:
    spans = share_out(["a", "bbb"], 1.0, 3.0)
    assert [tuple(span) for span in spans] == [(1.0, 1.5), (1.5, 3.0)]


# ---- streams ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [7, 1920, 24_000])
def test_any_cutting_gives_the_same_words_and_times(
    recogniser: EmbeddedRecogniser, beckett: NDArray[np.float32], size: int
) -> None:
    audio = beckett[: round(4.6 * SAMPLE_RATE)]  # in the pause behind `no matter`
    whole = run(recogniser, audio)
    assert plain(whole) == BECKETT.split()[:6]
    check_times(whole, len(audio) / SAMPLE_RATE)
    assert run(recogniser, *(audio[start : start + size] for start in range(0, len(audio), size))) == whole


def test_long_sentences_come_whole(recogniser: EmbeddedRecogniser, cities: NDArray[np.float32]) -> None:
    events = run(recogniser, cities)
    assert " ".join(plain(events)).startswith(CITIES)
    check_times(events, len(cities) / SAMPLE_RATE)


def noises() -> dict[str, NDArray[np.float32]]:
    count = 8 * SAMPLE_RATE
    time = np.arange(count) / SAMPLE_RATE
    white = np.random.default_rng(3).standard_normal(count)
    brown = np.cumsum(white)
    notes = np.concatenate(
        [
            np.sin(2 * np.pi * pitch * np.arange(6_000) / SAMPLE_RATE) * np.exp(-np.arange(6_000) / 3_000)
            for pitch in (262, 294, 330, 349, 392, 440, 494, 523) * 4
        ]
    )
    made = {
        "digital silence": np.zeros(count),
        "hiss": white * 1e-4,
        "white": white * 0.1,
        "brown": (brown - brown.mean()) / np.abs(brown).max() * 0.5,
        "hum": 0.1 * np.sign(np.sin(2 * np.pi * 50 * time)),
        "offset": np.full(count, 0.5),
        "clicks": (np.arange(count) % 12_000 == 0) * 1.0,
        "melody": notes[:count] * 0.3,
        "throbbing": 0.1 * white * (1 + np.sin(2 * np.pi * 4 * time)),
        "vibrato": sum(0.2 / k * np.sin(k * (2 * np.pi * 200 * time + 4 * np.sin(2 * np.pi * 5 * time))) for k in range(1, 8)),
    }
    return {name: np.asarray(noise, np.float32) for name, noise in made.items()}


@pytest.mark.parametrize("name", noises())
def test_silence_and_noise_say_nothing(recogniser: EmbeddedRecogniser, name: str) -> None:
    assert plain(run(recogniser, noises()[name])) == []


def test_speech_is_heard_in_noise_and_at_a_whisper(recogniser: EmbeddedRecogniser, beckett: NDArray[np.float32]) -> None:
    audio = beckett[: 5 * SAMPLE_RATE]
    noise = np.random.default_rng(4).standard_normal(len(audio)).astype(np.float32) * 0.004
    for changed in (audio + noise, audio * np.float32(0.02)):
        assert plain(run(recogniser, changed))[:4] == BECKETT.split()[:4]


@pytest.fixture
async def engine(recogniser: EmbeddedRecogniser) -> AsyncIterator[SegmentEngine]:
    class Kept:
        """The loaded model, which outlives the engine."""

        def __getattr__(self, name: str) -> object:
            return (lambda: None) if name == "close" else getattr(recogniser, name)

    made = SegmentEngine(lambda: Kept(), slots=16, threads=2)  # type: ignore[arg-type,return-value]
    await made.start()
    yield made
    await made.stop()


async def collect(engine: SegmentEngine, audio: NDArray[np.float32], size: int) -> list[AnyEvent]:
    """Audio and a marker, then nothing: what came, up to the marker."""
    stream = engine.open(options=CONFIDENCE)
    try:
        events: list[AnyEvent] = []
        for start in range(0, len(audio), size):
            await stream.send(Audio(audio[start : start + size]))
        await stream.send(Mark(1))
        async with asyncio.timeout(DEADLINE):
            async for event in stream:
                if not isinstance(event, Step):
                    events.append(event)
                if isinstance(event, Marker):
                    return events
        raise AssertionError("the stream ended before its marker")
    finally:
        stream.close()


async def test_eight_streams_at_once_say_what_each_says_alone(
    engine: SegmentEngine, beckett: NDArray[np.float32], cities: NDArray[np.float32]
) -> None:
    """More speech at once than two cores follow in real time; each stream starts elsewhere and gets its last word."""
    seconds = 3 * SAMPLE_RATE
    audios = [(cities if index % 2 else beckett)[9_000 * index :][:seconds] for index in range(8)]
    together = await asyncio.gather(*(collect(engine, audio, 480 * (1 + index)) for index, audio in enumerate(audios)))
    for index, (audio, events) in enumerate(zip(audios, together, strict=True)):
        assert events[0] == Ready()
        assert events[-1] == Marker(1)
        assert events[1:-1] == run(engine._recogniser, audio), index  # type: ignore[arg-type]
        assert len(plain(events)) >= 2


# ---- what is missing -------------------------------------------------------------------------------------------------


def test_a_missing_file_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("moshi_stt.data.__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(CheckpointError, match=r"stem\.onnx is missing: .* Install it again"):
        load_embedded()


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    damaged = tmp_path / "encoder.onnx"
    damaged.write_bytes(os.urandom(1_000))
    with pytest.raises(CheckpointError, match="cannot load"):
        embedded.one_thread_session(damaged)
