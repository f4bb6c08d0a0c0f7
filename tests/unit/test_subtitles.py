"""Subtitles: goldens of every format, and what must hold for any words."""

import json
import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moshi_stt.events import EndWord, Marker, Ready, Step, Word
from moshi_stt.text import subtitles
from moshi_stt.text.subtitles import TimedWord, cut_cues, pair_words, timestamp


def spoken(text: str, start: float = 0.0, seconds: float = 0.3, gap: float = 0.1) -> list[TimedWord]:
    """Each word of `text`, one after the other."""
    words = []
    for word in text.split():
        words.append(TimedWord(word, round(start, 3), round(start + seconds, 3)))
        start += seconds + gap
    return words


BECKETT = spoken("Ever tried. Ever failed. No matter.", 0.5) + spoken("Try again, fail <again> & fail better!", 4.25)

SRT = """\
1
00:00:00,500 --> 00:00:02,000
Ever tried. Ever failed.

2
00:00:02,100 --> 00:00:03,100
No matter.

3
00:00:04,250 --> 00:00:06,950
Try again, fail <again> & fail better!
"""

VTT = """\
WEBVTT

00:00:00.500 --> 00:00:02.000
Ever tried. Ever failed.

00:00:02.100 --> 00:00:03.100
No matter.

00:00:04.250 --> 00:00:06.950
Try again, fail &lt;again&gt; &amp; fail better!
"""


def test_srt_golden() -> None:
    assert subtitles.format_srt(BECKETT) == SRT


def test_vtt_golden() -> None:
    assert subtitles.format_vtt(BECKETT) == VTT


def test_text_and_words_goldens() -> None:
    later = [*BECKETT, TimedWord("Later.", 9.0, 9.25)]
    assert (
        subtitles.format_text(later) == "Ever tried. Ever failed. No matter. Try again, fail <again> & fail better!\nLater.\n"
    )
    assert subtitles.format_words(BECKETT[:2]) == "0.500\t0.800\tEver\n0.900\t1.200\ttried.\n"


def test_json_golden() -> None:
    words = [TimedWord("Où", 0.1234, 0.5, -0.25), TimedWord("ça ?", 0.5, 0.75)]
    assert json.loads(subtitles.format_json(words, file="a.wav", duration=1.5)) == {
        "file": "a.wav",
        "duration": 1.5,
        "text": "Où ça ?",
        "words": [{"text": "Où", "start": 0.123, "end": 0.5, "logprob": -0.25}, {"text": "ça ?", "start": 0.5, "end": 0.75}],
        "segments": [{"start": 0.123, "end": 1.123, "text": "Où ça ?"}],
    }
    assert "Où" in subtitles.format_json(words)


@pytest.mark.parametrize("format", sorted(subtitles.FORMATS))
def test_no_words_give_a_valid_empty_document(format: str) -> None:
    document = subtitles.FORMATS[format]([])
    if format == "json":
        assert json.loads(document) == {"text": "", "words": [], "segments": []}
    else:
        assert document == {"vtt": "WEBVTT\n"}.get(format, "")


def test_an_arrow_in_a_word_cannot_end_a_cue() -> None:
    words = [TimedWord("a-->b", 0, 1)]
    assert subtitles.format_srt(words).count("-->") == 1
    assert subtitles.format_vtt(words).count("-->") == 1


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (0, "00:00:00,000"),
        (59.9996, "00:01:00,000"),
        (3_599.999, "00:59:59,999"),
        (360_000, "100:00:00,000"),
        (-1, "00:00:00,000"),
    ],
)
def test_timestamps_carry_over(seconds: float, expected: str) -> None:
    assert timestamp(seconds, ",") == expected


def test_a_word_ends_with_its_end_word() -> None:
    events = [Ready(), Word("one", 0.5, 0.5), Step(3, (0.1,), 0), EndWord(0.9), Word("two", 1.0), EndWord(1.2), Marker(0)]
    assert pair_words(events) == [TimedWord("one", 0.5, 0.9, math.log(0.5)), TimedWord("two", 1.0, 1.2)]


def test_a_word_without_an_end_ends_at_the_next_one_or_soon() -> None:
    events = [EndWord(0.1), Word("one", 0.5), Word("two", 0.75), Word("three", 5.0)]
    assert pair_words(events) == [
        TimedWord("one", 0.5, 0.75),
        TimedWord("two", 0.75, 1.05),
        TimedWord("three", 5.0, 5.3),
    ]


def test_an_end_word_twice_counts_once() -> None:
    assert pair_words([Word("one", 0.5), EndWord(0.9), EndWord(1.9)]) == [TimedWord("one", 0.5, 0.9)]


def test_a_pause_ends_a_cue() -> None:
    words = spoken("one two") + spoken("three four", 2.0)
    assert [cue.text for cue in cut_cues(words)] == ["one two", "three four"]


def test_a_long_sentence_is_cut_behind_a_comma() -> None:
    text = "When in the course of human events it becomes necessary, for one people to dissolve the political bands"
    assert [cue.text for cue in cut_cues(spoken(text, seconds=0.2, gap=0.02))] == [
        "When in the course of human events it becomes necessary,",
        "for one people to dissolve the political bands",
    ]


def test_two_lines_are_balanced() -> None:
    document = subtitles.format_srt(spoken("When in the course of human events it becomes necessary", seconds=0.2, gap=0.0))
    assert document.splitlines()[2:] == ["When in the course of human", "events it becomes necessary"]


timed_words = st.lists(
    st.builds(
        lambda text, start, seconds: TimedWord(text, start, start + seconds),
        st.text(st.characters(codec="utf-8"), min_size=1, max_size=60),
        st.floats(0, 40),
        st.floats(0, 9),
    ),
    max_size=40,
).map(lambda words: sorted(words, key=lambda word: word.start))


@given(timed_words)
def test_cues_keep_every_word_in_order_and_do_not_overlap(words: list[TimedWord]) -> None:
    cues = cut_cues(words)
    assert [word for cue in cues for word in cue.words] == [word for word in words if word.text.split()]
    assert all(cue.start < cue.end for cue in cues)
    assert all(earlier.end <= later.start for earlier, later in pairwise(cues))


@given(timed_words)
def test_every_srt_block_has_its_number_times_and_text(words: list[TimedWord]) -> None:
    blocks = subtitles.format_srt(words).split("\n\n") if words else []
    for block in (block for block in blocks if block.strip()):
        lines = block.strip("\n").split("\n")
        assert lines[0].isdigit()
        assert lines[1].count(" --> ") == 1
        assert 1 <= len(lines) - 2 <= 2
