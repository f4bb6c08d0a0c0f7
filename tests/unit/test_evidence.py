"""Words that were spoken, and words that a recogniser makes of noise."""

import pytest

from moshi_stt.engine.evidence import Evidence, EvidenceSettings, Plausibility, repeats
from moshi_stt.engine.language import LanguageSettings, LanguageWatch
from moshi_stt.engine.recogniser import Spoken
from moshi_stt.engine.settling import LoopSettings, Standing, chance, follow, loop_start
from moshi_stt.models.embedded import loops

SETTINGS = EvidenceSettings()


def spoken(text: str, logprob: float) -> list[Spoken]:
    return [Spoken(word, (1,), logprob) for word in text.split()]


def heard(*probabilities: float) -> Evidence:
    evidence = Evidence()
    for probability in probabilities:
        evidence.hear(probability)
    return evidence


def test_the_best_stretch_counts_wherever_it_lies() -> None:
    assert heard(*[0.1] * 9, *[0.9] * 6, *[0.2] * 9).best == pytest.approx(0.9)
    assert heard(0.9, 0.9, 0.9).best == pytest.approx(0.45), "three frames are half a stretch"


@pytest.mark.parametrize(
    ("probability", "text", "logprob", "supported"),
    [
        (0.95, "Yes.", -0.6, True),
        (0.56, "You", -0.34, False),
        (0.53, "One.", -0.35, True),
        (0.49, "Uh?", -0.48, False),
        (0.99, "You", -0.3, True),
        (0.99, "你好", -0.1, False),
        (0.99, "", -0.1, False),
    ],
)
def test_what_supports_words(probability: float, text: str, logprob: float, supported: bool) -> None:
    """Values of segments of music and breath, and of lone digits."""
    assert heard(*[probability] * 6).supports(spoken(text, logprob), SETTINGS) is supported


def judge_all(plausibility: Plausibility, words: list[Spoken], start: float = 0.0) -> list[tuple[float, bool]]:
    times = [start + index / 2 for index in range(len(words))]
    judged = [plausibility.judge(words[index:], time, time + 0.4) for index, time in enumerate(times)]
    return [(judgement.confidence, judgement.left_out) for judgement in judged]


def test_what_repeats_is_left_out_where_words_are_doubtful() -> None:
    """A decoder is sure of what it repeats; people repeat themselves, too, and are heard well."""
    said = "we have to get used to you"
    doubtful = judge_all(Plausibility(SETTINGS), [*spoken(said, -0.8), *spoken(said, -0.01)])
    assert [left_out for _, left_out in doubtful[9:13]] == [True] * 4
    clear = judge_all(Plausibility(SETTINGS), spoken(f"{said} {said}", -0.05))
    assert not any(left_out for _, left_out in clear)


def test_likely_words_are_trusted_and_unlikely_ones_left_out() -> None:
    likely = judge_all(Plausibility(SETTINGS), spoken("so my fellow americans ask not", -0.05))
    assert all(confidence > 0.95 and not left_out for confidence, left_out in likely)
    unlikely = judge_all(Plausibility(SETTINGS), spoken("in the name of the father", -1.2))
    assert all(confidence < 0.3 for confidence, _ in unlikely[3:])
    assert all(left_out for _, left_out in unlikely[3:])


def test_one_doubtful_word_among_good_ones_and_a_lone_one_stay() -> None:
    words = spoken("the season of", -0.05) + spoken("light", -1.0) + spoken("and of darkness", -0.05)
    assert not any(left_out for _, left_out in judge_all(Plausibility(SETTINGS), words))
    assert not Plausibility(SETTINGS).judge(spoken("five", -1.5), 0.0, 0.3).left_out


def test_a_bad_passage_is_forgotten_after_a_silence() -> None:
    plausibility = Plausibility(SETTINGS)
    judge_all(plausibility, spoken("a b c d e f g h i j k l", -1.5))
    confidence, left_out = plausibility.judge(spoken("yes of course", -0.2), 60.0, 60.4)
    assert confidence > 0.8
    assert not left_out


def test_repetitions_prove_nothing() -> None:
    """A decoder is sure of what it repeats. The first round is unlikely, so the second is believed less than new words."""
    first, second = spoken("i am not just a person", -1.2), spoken("i am not just a person", -0.2)
    judged = judge_all(Plausibility(SETTINGS), [*first, *second])
    fresh = judge_all(Plausibility(SETTINGS), [*first, *spoken("we will go there quite soon", -0.2)])
    assert judged[-1][0] < fresh[-1][0]


def test_repeats() -> None:
    assert repeats(["a", "b", "c", "a", "b", "c"])
    assert not repeats(["a", "b", "c", "a", "b"])
    assert not repeats(["it", "was", "the", "best", "of", "times", "it", "was"])
    assert not repeats([])


@pytest.mark.parametrize(
    ("text", "start"),
    [
        ("so we go " * 3, 0),
        ("now then so we go so we go so we go", 2),
        ("so we go so we go", None),
        ("no no no no", None),
        ("no no no no no", 0),
        ("bye bye bye bye", None),
        ("tick tock " * 4, 0),
        ("", None),
    ],
)
def test_where_a_loop_starts(text: str, start: int | None) -> None:
    assert loop_start(text.split(), LoopSettings()) == start


def test_a_decoder_in_a_loop_is_noticed() -> None:
    assert loops([9, *[1, 2, 3, 4] * 3])
    assert not loops([9, *[1, 2, 3, 4] * 2, 1, 2, 3])
    assert loops([5] * 8)
    assert not loops([5] * 7)
    assert not loops([])


def test_the_chance_of_a_word_grows_with_agreement_and_falls_with_doubt() -> None:
    words = spoken("a b", -0.3)
    once = follow([], words, 0)
    later = follow(follow(once, words, 8_000), words, 16_000)
    assert [standing.count for standing in later] == [3, 3]
    assert later[0].since == 0
    assert chance(later, 0, 16_000, pause=False) > chance(once, 0, 0, pause=False)
    assert chance(once, 0, 0, pause=True) > chance(once, 0, 0, pause=False)
    unsure = [Standing(Spoken("a", (1,), -2.0), 0), *once[1:]]
    assert chance(unsure, 0, 0, pause=False) < chance(once, 0, 0, pause=False)
    assert follow(once, spoken("c b", -0.3), 8_000)[1].count == 1


def listen(watch: LanguageWatch, seconds: float, understood: float, probability: float = 0.95) -> bool:
    for _ in range(round(seconds / 0.032)):
        watch.hear(probability)
    watch.understand(1.0, understood)
    return watch.end_segment()


def test_another_language_is_told_once_and_by_clear_speech_alone() -> None:
    watch = LanguageWatch(LanguageSettings())
    assert not listen(watch, 3.0, 0.0)
    assert listen(watch, 4.0, 0.5)
    assert not listen(watch, 20.0, 0.0)
    assert not listen(LanguageWatch(LanguageSettings()), 30.0, 0.0, probability=0.7)
    assert not listen(LanguageWatch(LanguageSettings()), 30.0, 20.0)


def test_english_after_an_odd_sentence_gives_no_alarm() -> None:
    watch = LanguageWatch(LanguageSettings())
    assert not listen(watch, 5.0, 0.2)
    assert not any(listen(watch, 5.0, 4.0) for _ in range(10))
