"""The segmenter over speech of levels: every word once, in order, at its time, however the audio is cut."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tests.support.level_speech import LevelRecogniser, pause, say

from moshi_stt.constants import FRAME_SAMPLES, FRAME_SECONDS, SAMPLE_RATE
from moshi_stt.engine.engine import StreamOptions
from moshi_stt.engine.recogniser import Hypothesis, Span, Spoken
from moshi_stt.engine.segmenter import Segmenter, SegmentSettings
from moshi_stt.events import AnyEvent, EndWord, Interim, Pause, Step, Warning, Word  # noqa: A004 - the event


def run(segmenter: Segmenter, *pieces: NDArray[np.float32], flush: bool = True) -> list[AnyEvent]:
    """Everything but the steps."""
    return [event for event in run_whole(segmenter, *pieces, flush=flush) if not isinstance(event, Step)]


def run_whole(segmenter: Segmenter, *pieces: NDArray[np.float32], flush: bool = True) -> list[AnyEvent]:
    events = [event for piece in pieces for batch in segmenter.feed(piece) for event in batch]
    if flush:
        events += [event for batch in segmenter.flush() for event in batch]
    return events


def texts(events: list[AnyEvent]) -> list[str]:
    return [event.text for event in events if isinstance(event, Word)]


def check_order(events: list[AnyEvent], seconds: float) -> None:
    """Each Word is followed by its EndWord; times never go back and stay within the audio."""
    last = 0.0
    for word, end in zip(events[::2], events[1::2], strict=True):
        assert isinstance(word, Word)
        assert isinstance(end, EndWord)
        assert last <= word.start_time <= end.stop_time <= seconds + 0.001
        last = end.stop_time


def test_every_word_comes_once_in_order_and_at_its_time() -> None:
    numbers = [10, 20, 30, 40, 50]
    audio = say(numbers)
    events = run(Segmenter(LevelRecogniser()), audio)
    assert texts(events) == [f"w{number}." for number in numbers]
    check_order(events, len(audio) / SAMPLE_RATE)
    starts = [event.start_time for event in events if isinstance(event, Word)]
    assert starts == pytest.approx([0.1 + 0.4 * index for index in range(5)], abs=0.01)


def test_words_come_while_the_speaker_still_speaks() -> None:
    """Nothing but local agreement can say them: there is no pause and no end in this audio."""
    segmenter = Segmenter(LevelRecogniser())
    events = run(segmenter, say(range(10, 20)), flush=False)
    assert texts(events)[:3] == ["w10.", "w11.", "w12."]
    assert len(texts(events)) < 10


@settings(deadline=None, max_examples=8)
@given(st.lists(st.integers(1, 30_000), min_size=1, max_size=20), st.sampled_from([7, 240, 1920]))
def test_how_the_audio_is_cut_changes_nothing(sizes: list[int], rest: int) -> None:
    audio = np.concatenate([say([11, 22, 33]), pause(0.5), say([44, 55]), pause(2.0), say([66])])
    whole = run(Segmenter(LevelRecogniser()), audio)
    pieces, position = [], 0
    for size in [*sizes, *[rest] * (len(audio) // rest + 1)]:
        pieces.append(audio[position : position + size])
        position += size
    assert run(Segmenter(LevelRecogniser()), *pieces) == whole
    assert len(texts(whole)) == 6


def test_long_speech_without_a_pause_is_cut_between_words() -> None:
    numbers = [5 + index % 90 for index in range(150)]
    audio = say(numbers, gap=0.03)
    events = run(Segmenter(LevelRecogniser()), audio)
    assert texts(events) == [f"w{number}." for number in numbers]
    check_order(events, len(audio) / SAMPLE_RATE)


def test_what_one_stream_holds_does_not_grow_with_its_length() -> None:
    segmenter = Segmenter(LevelRecogniser())
    size = segmenter._audio.nbytes
    for _ in range(12):
        run(segmenter, say(range(10, 40)), pause(3.0), flush=False)
    assert segmenter._audio.nbytes == size
    assert segmenter._segment is None
    assert len(segmenter._block) < 768


def test_silence_makes_no_call_and_no_word() -> None:
    recogniser = LevelRecogniser()
    assert run(Segmenter(recogniser), pause(20.0)) == []
    assert recogniser.calls == 0


def test_a_click_is_not_recognised() -> None:
    recogniser = LevelRecogniser()
    click = np.full(480, 0.5, np.float32)
    assert run(Segmenter(recogniser), pause(1.0), click, pause(1.0)) == []
    assert recogniser.calls == 0


def test_a_flush_ends_the_segment_and_the_clock_runs_on() -> None:
    segmenter = Segmenter(LevelRecogniser())
    first = run(segmenter, say([10, 20])[:-1_000])
    second = run(segmenter, say([30]))
    assert texts(first) == ["w10.", "w20."]
    assert texts(second) == ["w30."]
    (word,) = (event for event in second if isinstance(event, Word))
    assert word.start_time == pytest.approx((len(say([10, 20])) - 1_000) / SAMPLE_RATE + 0.1, abs=0.01)


def test_two_flushes_in_a_row_and_a_flush_of_nothing_say_nothing() -> None:
    segmenter = Segmenter(LevelRecogniser())
    assert run(segmenter) == []
    assert texts(run(segmenter, say([10]))) == ["w10."]
    assert run(segmenter) == []


def test_reset_starts_the_clock_anew() -> None:
    segmenter = Segmenter(LevelRecogniser())
    before = run(segmenter, say([10, 20]))
    segmenter.reset()
    assert run(segmenter, say([10, 20])) == before


def test_samples_that_are_no_numbers_do_no_harm() -> None:
    segmenter = Segmenter(LevelRecogniser())
    bad = np.array([np.nan, np.inf, -np.inf, 1e30, -1e30] * 2_000, np.float32)
    run(segmenter, np.where(np.isfinite(bad), np.float32(0), bad))
    assert texts(run(segmenter, pause(0.5), say([10]))) == ["w10."]


class Changing(LevelRecogniser):
    """Gives one answer after the other, whatever it hears."""

    def __init__(self, *answers: list[Spoken] | None) -> None:
        super().__init__()
        self.answers = list(answers)

    def recognise(self, samples, said=(), draft=(), said_seconds=0.0, memory=None):  # type: ignore[no-untyped-def]
        answer = self.answers[min(self.calls, len(self.answers) - 1)]
        self.calls += 1
        if answer is None:
            return Hypothesis([Spoken("loop", (1,), -0.01)] * 20, whole=False)
        return Hypothesis(answer[len(said) :])

    def align(self, samples, texts, needed=None):  # type: ignore[no-untyped-def]
        from moshi_stt.models.alignment import share_out

        return share_out(texts, 0.0, len(samples) / 16_000)


def spoken(text: str, logprob: float = -0.01) -> list[Spoken]:
    return [Spoken(word, (1,), logprob) for word in text.split()]


RULES = SegmentSettings(hypothesis_frames=15, followers=6, most_followers=10)
"""What these tests count with, whatever the defaults are tuned to."""

STEADY = np.full(SAMPLE_RATE * 4, 0.5, np.float32)
"""Four seconds of somebody speaking without a pause."""


def test_a_word_that_changes_is_not_said_until_it_is_settled() -> None:
    recogniser = Changing(spoken("I less", -0.9), spoken("Unless to be"), spoken("Unless to be rather"))
    events = run(Segmenter(recogniser, RULES), STEADY[: round(SAMPLE_RATE * 1.7)], flush=False)
    assert recogniser.calls == 3
    assert texts(events) == ["Unless", "to"] or texts(events) == ["Unless", "to", "be"]


def test_an_unsure_word_waits_for_the_pause() -> None:
    sure, unsure = Changing(spoken("a b c", -0.01)), Changing(spoken("a b c", -0.6))
    audio = STEADY[: SAMPLE_RATE * 3 // 2]
    assert texts(run(Segmenter(sure, RULES), audio, flush=False)) == ["a", "b"]
    assert texts(run(Segmenter(unsure, RULES), audio, flush=False)) == []
    assert texts(run(Segmenter(unsure, RULES), audio, pause(0.6), flush=False)) == ["a", "b", "c"]


def test_a_word_that_stands_for_long_is_sent() -> None:
    steady = Changing(spoken("a b c", -0.3))
    assert texts(run(Segmenter(steady, RULES), STEADY[: SAMPLE_RATE * 3 // 4], flush=False)) == []
    assert texts(run(Segmenter(steady, RULES), STEADY, flush=False)) == ["a", "b"]


def test_an_unsure_word_with_many_after_it_does_not_wait() -> None:
    unsure = Changing(spoken("a b c d e f g h i j", -0.6))
    assert texts(run(Segmenter(unsure, RULES), STEADY[: SAMPLE_RATE * 3 // 2], flush=False)) == ["a", "b", "c", "d"]


def test_a_word_on_which_no_two_hypotheses_agree_is_settled_by_a_pause_or_by_many_behind_it() -> None:
    """An unending change of mind delays nothing for longer than a pause, or ten words."""
    flip, flop = spoken("the season of light", -0.9), spoken("a season of light", -0.9)
    recogniser = Changing(*[flip, flop] * 20)
    events = run(Segmenter(recogniser, RULES), STEADY, pause(0.6), flush=False)
    assert texts(events)[1:] == ["season", "of", "light"]
    long_flip, long_flop = spoken("the b c d e f g h i j k l", -0.9), spoken("a b c d e f g h i j k l", -0.9)
    assert len(texts(run(Segmenter(Changing(*[long_flip, long_flop] * 20), RULES), STEADY, flush=False))) >= 1


def test_noise_that_the_model_only_guesses_at_says_nothing() -> None:
    assert run(Segmenter(Changing(spoken("you you you you", -2.5))), STEADY) == []


def test_a_decoder_that_lost_its_way_says_nothing_and_hides_no_earlier_guess() -> None:
    assert run(Segmenter(Changing(None)), STEADY) == []
    guess = spoken("a b c", -0.9)
    assert texts(run(Segmenter(Changing(guess, None), RULES), STEADY[: SAMPLE_RATE * 3 // 4])) == ["a", "b", "c"]


def test_speech_that_the_model_passes_over_is_recognised_afresh() -> None:
    """Held to words that it takes for a whole sentence, the model hears no more; the rest of the speech is not lost."""

    class Deaf(LevelRecogniser):
        def recognise(self, samples, said=(), draft=(), said_seconds=0.0, memory=None):  # type: ignore[no-untyped-def]
            heard = super().recognise(samples, said, draft, said_seconds, memory)
            return Hypothesis([]) if len(said) >= 3 else heard

    audio = np.concatenate([say([10, 20, 30]), pause(0.3), say([40, 50, 60]), pause(0.3), say([70, 80])])
    assert texts(run(Segmenter(Deaf()), audio)) == [f"w{number}." for number in range(10, 90, 10)]


def test_words_without_a_letter_are_not_sent_and_not_repeated() -> None:
    assert texts(run(Segmenter(Changing(spoken("♪ hello ♪ there"))), STEADY)) == ["hello", "there"]


def test_hypotheses_are_made_on_the_streams_own_clock() -> None:
    """Their number is a matter of the audio, whatever time they take."""
    first, second = LevelRecogniser(), LevelRecogniser()
    audio = np.concatenate([say(range(10, 40)), pause(2.0)])
    run(Segmenter(first), audio)
    run(Segmenter(second), *np.array_split(audio, 300))
    assert first.calls == second.calls > 10


def test_settings_hold_what_the_buffer_needs() -> None:
    """A segment of the longest length, cut late, with its lead, fits: the buffer never has to drop what is still needed."""
    recogniser = LevelRecogniser()
    settings = SegmentSettings(longest_seconds=3.0, cut_seconds=2.5)
    numbers = [5 + index % 90 for index in range(60)]
    events = run(Segmenter(recogniser, settings), pause(1.0), say(numbers, gap=0.04))
    assert texts(events) == [f"w{number}." for number in numbers]


# ---- sound that is not speech ------------------------------------------------------------------------------------------


class Unsure(Changing):
    """Its detector is as sure as it is told."""

    def __init__(self, probability: float, *answers: list[Spoken] | None) -> None:
        super().__init__(*answers)
        self.probability = probability

    def speech_probability(self, frame, state):  # type: ignore[no-untyped-def]
        return self.probability if np.abs(frame).max() > 0.005 else 0.0, state + 1


def test_what_the_detector_doubts_is_not_recognised() -> None:
    recogniser = Unsure(0.39, spoken("you"))
    assert run(Segmenter(recogniser, SegmentSettings(speech_from=0.3)), STEADY, pause(2.0)) == []
    assert recogniser.calls == 0


def test_words_that_noise_calls_up_need_better_evidence() -> None:
    assert texts(run(Segmenter(Unsure(0.6, spoken("You."))), STEADY, pause(2.0))) == []
    assert texts(run(Segmenter(Unsure(0.6, spoken("Yes."))), STEADY, pause(2.0))) == ["Yes."]
    assert texts(run(Segmenter(Unsure(0.9, spoken("You."))), STEADY, pause(2.0))) == ["You."]


def test_a_lone_short_word_is_sent() -> None:
    word = np.full(round(0.2 * SAMPLE_RATE), 0.5, np.float32)
    assert texts(run(Segmenter(Unsure(0.85, spoken("Yes.", -0.5))), pause(0.5), word, pause(2.0))) == ["Yes."]


def test_words_of_other_scripts_are_not_sent() -> None:
    assert texts(run(Segmenter(Changing(spoken("Ще не"))), STEADY, pause(2.0))) == []
    assert texts(run(Segmenter(Changing(spoken("A café."))), STEADY, pause(2.0))) == ["A", "café."]


@pytest.mark.parametrize(
    ("said", "heard"),
    [
        ("we go on the side we go on the side", "we go on the side"),
        ("so we go on the side we go on the side we go on", "so we go on the side"),
        ("one two three one two three four five six seven", "one two three"),
        ("no no no", "no no no"),
    ],
)
def test_a_phrase_said_twice_by_nobody_so_fast_was_said_once(said: str, heard: str) -> None:
    audio = np.concatenate([np.full(SAMPLE_RATE, 0.5, np.float32), pause(2.0)])
    assert texts(run(Segmenter(Changing(spoken(said)), RULES), audio)) == heard.split()


def test_a_phrase_said_twice_in_time_enough_was_said_twice() -> None:
    said = "we go on the side we go on the side"
    audio = np.concatenate([np.full(2 * SAMPLE_RATE, 0.5, np.float32), pause(2.0)])
    assert texts(run(Segmenter(Changing(spoken(said)), RULES), audio)) == said.split()


def test_nothing_of_a_loop_is_sent_and_what_was_settled_before_stays() -> None:
    settled = spoken("we begin here")
    loop = [*settled, *spoken("I am very happy " * 4)]
    events = run(Segmenter(Changing(settled, loop, None), RULES), STEADY, pause(2.0))
    assert texts(events) == ["we", "begin", "here"]
    assert texts(run(Segmenter(Changing(spoken("I am very happy " * 4)), RULES), STEADY, pause(2.0))) == []


class Soundless(Changing):
    """Its alignment finds no sound for the second of four words, so near the end of the audio."""

    def __init__(self, before_end: float) -> None:
        super().__init__(spoken("we begin here now"))
        self.before_end = before_end

    def align(self, samples, texts, needed=None):  # type: ignore[no-untyped-def]
        seconds = len(samples) / 16_000
        at = seconds - self.before_end
        spans = {"we": (0.0, 0.1), "begin": (at, at), "here": (at, at + 0.05), "now": (at + 0.05, seconds)}
        return [Span(*spans[text]) for text in texts][:needed]


@pytest.mark.parametrize(("before_end", "live"), [(0.2, ["we"]), (0.8, ["we", "begin", "here"])])
def test_only_a_word_without_sound_at_the_end_of_the_audio_waits(before_end: float, live: list[str]) -> None:
    segmenter = Segmenter(Soundless(before_end), RULES)
    heard = [event for batch in segmenter.feed(STEADY[: SAMPLE_RATE * 2]) for event in batch]
    assert texts(heard) == live
    rest = [event for batch in segmenter.flush() for event in batch]
    assert texts(heard + rest) == ["we", "begin", "here", "now"]


def test_what_people_repeat_is_sent() -> None:
    for text in ("can you hear me can you hear me", "no no no", "it was the best of times it was the worst of times"):
        assert texts(run(Segmenter(Changing(spoken(text)), RULES), STEADY, pause(2.0))) == text.split()


def test_a_passage_of_unlikely_words_is_left_out_and_the_next_passage_comes() -> None:
    murmur, clear = spoken("in the name of the father and of", -1.1), spoken("now it is quiet")
    recogniser = Changing(murmur)
    segmenter = Segmenter(recogniser, SegmentSettings(lowest_logprob=-2.0))
    assert len(texts(run(segmenter, STEADY, pause(2.0)))) <= 2
    recogniser.answers = [clear]
    assert texts(run(segmenter, pause(6.0), STEADY, pause(2.0))) == ["now", "it", "is", "quiet"]


# ---- steps, and what comes on request ----------------------------------------------------------------------------------

EXTRAS = StreamOptions(interim=True, confidence=True, turns=True, warnings=True)


def steps(events: list[AnyEvent]) -> list[Step]:
    return [event for event in events if isinstance(event, Step)]


def test_a_step_comes_for_every_80_ms_and_before_what_is_heard_after_it() -> None:
    audio = np.concatenate([say([10, 20]), pause(2.0)])
    events = run_whole(Segmenter(LevelRecogniser()), audio)
    indices = [step.step_idx for step in steps(events)]
    assert indices == list(range(len(audio) // FRAME_SAMPLES))


def test_the_pause_probability_is_one_before_speech_low_in_it_and_rises_through_silence() -> None:
    audio = np.concatenate([pause(1.0), say([10, 20, 30]), pause(8.0)])
    scores = np.array([step.prs for step in steps(run_whole(Segmenter(LevelRecogniser()), audio))])  # (T, H)
    assert scores.shape[1] == 4
    assert (scores[:12] == 1.0).all()
    begin, end = round(1.3 / FRAME_SECONDS), round(2.3 / FRAME_SECONDS)
    assert (scores[begin : begin + 2].max(axis=0) < 0.3).all()
    assert (scores[end : end + 3] < [0.7, 0.55, 0.46, 0.42]).all()
    silent = scores[end + 2 : end + 70]
    assert (np.diff(silent, axis=0) >= 0).all()
    assert (np.diff(silent[:30], axis=0) > 0).all()
    assert (silent[-1] > 0.8).all()
    assert (np.diff(silent, axis=1) <= 0).all(), "a longer horizon is never surer"


def test_a_reset_begins_the_pauses_and_the_steps_again() -> None:
    segmenter = Segmenter(LevelRecogniser())
    before = run_whole(segmenter, say([10]))
    segmenter.reset()
    assert run_whole(segmenter, say([10])) == before


def test_who_asks_for_nothing_gets_words_and_steps_alone() -> None:
    events = run_whole(Segmenter(LevelRecogniser()), say([10, 20]), pause(2.0))
    assert {type(event) for event in events} == {Word, EndWord, Step}
    assert all(event.confidence is None for event in events if isinstance(event, Word))


def test_extras_come_to_who_asked() -> None:
    audio = np.concatenate([pause(0.5), say([10, 20, 30]), pause(2.0), say([40]), pause(2.0)])
    plain = run(Segmenter(LevelRecogniser()), audio)
    events = run(Segmenter(LevelRecogniser(), options=EXTRAS), audio)
    assert texts(events) == texts(plain)
    silences = [event.silence for event in events if isinstance(event, Pause)]
    assert silences[:7] == [math.inf] * 7
    assert 0.0 in silences
    assert max(silence for silence in silences if silence < math.inf) == pytest.approx(2.1, abs=0.1)
    assert all(event.confidence is not None and 0.5 < event.confidence <= 1 for event in events if isinstance(event, Word))


def test_interims_show_what_is_not_settled_and_end_empty() -> None:
    segmenter = Segmenter(Changing(spoken("a b c", -0.6)), RULES, EXTRAS)
    events = run(segmenter, STEADY[: SAMPLE_RATE * 2], pause(2.0))
    interims = [event.text for event in events if isinstance(event, Interim)]
    assert (interims[0], interims[-1]) == ("a b c", "")
    words = [index for index, event in enumerate(events) if isinstance(event, Word)]
    assert events.index(Interim("a b c", 0.0)) < words[0]


# ---- another language --------------------------------------------------------------------------------------------------


def warnings_of(events: list[AnyEvent]) -> list[str]:
    return [event.code for event in events if isinstance(event, Warning)]


@pytest.mark.parametrize("guess", [[], spoken("je ne sais pas", -3.0), None], ids=["nothing", "unlikely", "loop"])
def test_clear_speech_of_which_nothing_is_understood_gives_one_warning(guess: list[Spoken] | None) -> None:
    segmenter = Segmenter(Changing(guess), options=EXTRAS)
    events = run(segmenter, np.tile(STEADY, 8), pause(2.0))
    assert warnings_of(events) == ["language"]
    assert segmenter.language.alarmed
    segmenter.reset()
    assert warnings_of(run(segmenter, np.tile(STEADY, 8))) == [], "once a stream, not once a reset"


def test_who_did_not_ask_gets_no_warning_but_it_is_known() -> None:
    segmenter = Segmenter(Changing([]))
    assert run(segmenter, np.tile(STEADY, 8)) == []
    assert segmenter.language.alarmed


def test_speech_that_is_understood_gives_no_warning() -> None:
    assert warnings_of(run(Segmenter(LevelRecogniser(), options=EXTRAS), say([5 + index % 90 for index in range(80)]))) == []


def test_a_short_stretch_and_doubtful_sound_give_no_warning() -> None:
    """It takes some seconds to tell; noise is no language."""
    assert warnings_of(run(Segmenter(Changing([]), options=EXTRAS), STEADY, pause(2.0))) == []
    assert warnings_of(run(Segmenter(Unsure(0.7, []), options=EXTRAS), np.tile(STEADY, 8))) == []
