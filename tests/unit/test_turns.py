"""Turns from pauses and words, and silence from pause heads and from the detector."""

import itertools
import math

import numpy as np
import pytest

from moshi_stt.constants import FRAME_SECONDS
from moshi_stt.engine.turns import (
    WARM_UP_STEPS,
    HeadPauses,
    SpeechDetector,
    TurnDetector,
    is_number,
    silence_score,
)
from moshi_stt.events import AnyEvent, EndOfTurn, EndWord, Pause, SpeechStarted, TurnResumed, Word


def test_score_rises_without_a_plateau() -> None:
    grid = np.arange(0, 6, 0.02)
    scores = [silence_score(float(seconds)) for seconds in grid]
    assert all(left < right for left, right in itertools.pairwise(scores))
    assert silence_score(0.6) >= 0.5
    assert silence_score(1.0) > 0.9
    assert silence_score(0.0) == 0.0
    assert silence_score(math.inf) == 1.0


_NUMBERS = {"five": True, "twenty-one,": True, "42": True, "sept": True, "word": False, "": False, "-": False}


@pytest.mark.parametrize(("text", "number"), _NUMBERS.items())
def test_numbers(text: str, number: bool) -> None:
    assert is_number(text) is number


def test_heads_warm_up_then_speech_then_silence() -> None:
    heads = HeadPauses()
    assert all(math.isinf(heads.push((0.0, 0, 0, 0))) for _ in range(WARM_UP_STEPS))
    for _ in range(6):
        silence = heads.push((0.05, 0, 0, 0))
    assert silence == 0.0
    assert heads.push((0.6, 0, 0, 0)) == 0.0  # one high step is no pause
    silences = [heads.push((0.98, 0, 0, 0)) for _ in range(10)]
    assert silences[-1] == pytest.approx(10 * FRAME_SECONDS, abs=2 * FRAME_SECONDS)


def run(speech: list[tuple[float, float]], words: list[tuple[str, float, float]], seconds: float) -> list[AnyEvent]:
    """A detector that hears speech at once, and words when they end."""
    detector, out, said = TurnDetector(), [], list(words)
    for step in range(1, round(seconds / FRAME_SECONDS) + 1):
        time = step * FRAME_SECONDS
        while said and said[0][2] <= time:
            text, start, end = said.pop(0)
            out += detector.take(Word(text, start))
            out += detector.take(EndWord(end))
        heard = [min(end, time) for start, end in speech if start < time]
        silence = math.inf if not heard else max(0.0, time - max(heard))
        out += detector.take(Pause(time, min(time, said[0][1]) if said else time, silence))
    return out


def test_a_turn_begins_and_ends_once() -> None:
    events = run([(0.4, 1.4)], [("Hello", 0.4, 0.8), ("there.", 0.9, 1.4)], 6.0)
    assert [type(event) for event in events] == [SpeechStarted, EndOfTurn]
    assert events[0].time == pytest.approx(0.4, abs=FRAME_SECONDS)
    assert events[1].time == pytest.approx(1.4 + 0.8, abs=2 * FRAME_SECONDS)
    assert 0.7 <= events[1].confidence <= 1.0


def test_speech_soon_after_the_end_resumes_the_turn() -> None:
    events = run([(0.4, 1.4), (2.6, 3.4)], [("Hello", 0.4, 1.4), ("there.", 2.6, 3.4)], 8.0)
    assert [type(event) for event in events] == [SpeechStarted, EndOfTurn, TurnResumed, EndOfTurn]


def test_speech_long_after_the_end_is_another_turn() -> None:
    events = run([(0.4, 1.4), (5.0, 6.0)], [("Hello", 0.4, 1.4), ("there.", 5.0, 6.0)], 9.0)
    assert [type(event) for event in events] == [SpeechStarted, EndOfTurn, SpeechStarted, EndOfTurn]


def test_a_pause_after_a_number_counts_for_less() -> None:
    pause = (1.4, 2.4)  # one second
    for text, ends in (("word", 2), ("four", 1)):
        events = run([(0.4, pause[0]), (pause[1], 3.0)], [(text, 0.4, 1.4), ("end.", 2.4, 3.0)], 8.0)
        assert sum(type(event) is EndOfTurn for event in events) == ends, text


def test_no_turn_ends_before_its_words_are_out() -> None:
    detector = TurnDetector()
    detector.take(Pause(0.48, 0.0, 0.0))
    assert not detector.take(Pause(2.0, 0.3, 1.5))
    (end,) = detector.take(Pause(2.08, 0.48, 1.58))
    assert type(end) is EndOfTurn


def test_detector_hears_no_speech_in_noise() -> None:
    detector = SpeechDetector()
    noise = np.random.default_rng(1).normal(0, 0.01, 48_000).astype(np.float32)
    assert all(math.isinf(detector.push(noise[start : start + 1_920])) for start in range(0, 48_000, 1_920))
