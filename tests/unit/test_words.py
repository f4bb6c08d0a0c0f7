"""Words and times out of token lists: the contract's rule, the recorded sessions, and the two flaws that are mended."""

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support import recorded
from tests.support.scripted_backend import spell

from moshi_stt.events import EndWord, Word
from moshi_stt.text.tokenizer import TextTokenizer
from moshi_stt.text.words import MOST_PIECES, WordAssembler

Events = list[Word | EndWord]

TOKENS = st.lists(st.sampled_from([0, 0, 3, 3, 3, 1, 2, 4, 5, 6, 7]), max_size=120)
DELAYS = st.integers(0, 15)


def assemble(tokens: Sequence[int], delay: int = 6) -> Events:
    words = WordAssembler(spell, delay)
    return [event for token in tokens for event in words.push(token)]


def contract(tokens: Sequence[int], delay: int) -> Events:
    """Section 5.6 to the letter, F11 and F12 included."""
    events: Events = []
    buffer: list[int] = []
    last_stop, unended = 0.0, False
    for s, token in enumerate(tokens, 1):
        if s < delay:
            continue
        if token in (0, 3):
            if buffer:
                events.append(Word(spell(buffer), last_stop))
                buffer, unended = [], True
        else:
            buffer.append(token)
        if token == 0:
            t = (s - delay) / 12.5
            if unended:
                events.append(EndWord(t))
                unended = False
            last_stop = t
    return events


def test_worked_example() -> None:
    """The table of contract section 5.6."""
    words = WordAssembler(spell, 6)
    emitted = {s: list(words.push(token)) for s, token in enumerate([9, 9, 9, 9, 9, 0, 531, 17, 3, 3, 0, 42, 0], 1)}
    assert {s: events for s, events in emitted.items() if events} == {
        9: [Word("531.17", 0.0)],
        11: [EndWord(0.4)],
        13: [Word("42", 0.4), EndWord(0.56)],
    }


@pytest.mark.parametrize(
    ("session", "checkpoint", "tokens", "delay"),
    [("words", "tiny", "tiny_batched", 6), ("unbatched", "tiny", "tiny_asr", 6), ("words_1b", "1b", "1b_batched", 6)],
)
def test_recorded_sessions(shared: Path, session: str, checkpoint: str, tokens: str, delay: int) -> None:
    """Every word of the server, in order, at its time where F12 is not at work, each ended once, by the recorded end."""
    pytest.importorskip("sentencepiece", reason="sentencepiece comes with the model extras")
    folder = shared / "goldens" / "recorded"
    tokenizer = TextTokenizer(shared / "goldens" / f"tokenizer-{checkpoint}.model")
    words = WordAssembler(tokenizer.decode, delay)
    ours = [event for token in recorded.tokens(folder, tokens) for event in words.push(token)]
    theirs = recorded.load(folder, session).words()
    assert len([e for e in theirs if isinstance(e, Word)]) > 10
    recorded.assert_same_words(theirs, ours)


def test_a_word_behind_a_word_without_a_boundary() -> None:
    """F12: the boundary is put where it would have been, one position before the second word's first piece."""
    assert assemble([0, 40, 3, 3, 41, 42, 3, 0], delay=1) == [
        Word("40", 0.0),
        EndWord(3 / 12.5),
        Word("41.42", 3 / 12.5),
        EndWord(7 / 12.5),
    ]


def test_a_model_that_babbles_fills_no_memory() -> None:
    """Pieces without a pause for ever: words of bounded length, which join on to each other."""
    words = WordAssembler(lambda ids: str(len(ids)), 6)
    events = [event for token in [0] * 6 + [7] * (2 * MOST_PIECES + 1) for event in words.push(token)]
    assert [event.text for event in events if isinstance(event, Word)] == [str(MOST_PIECES)] * 2
    _, end, second, _ = events
    assert isinstance(second, Word)
    assert end == EndWord(second.start_time)
    assert second.start_time == MOST_PIECES / 12.5
    assert words.in_word


def test_a_word_at_the_end_is_flushed() -> None:
    """F11: nothing follows the last piece, and the word comes out; at the end of the stream it also ends."""
    words = WordAssembler(spell, 1)
    for token in [0, 40, 41]:
        assert not words.push(token)
    assert words.in_word
    assert words.flush() == [Word("40.41", 0.0)]
    assert not words.in_word
    assert words.flush() == []
    assert words.finish(5.0) == [EndWord(1.0)]
    assert words.finish(5.0) == []


@pytest.mark.parametrize(("audio_seconds", "stop"), [(0.5, 0.5), (0.9, 0.9), (5.0, 1.0)])
def test_the_last_word_ends_within_the_audio(audio_seconds: float, stop: float) -> None:
    """And no later than a second after its start, however long the silence behind it."""
    words = WordAssembler(spell, 1)
    events = [e for token in [0, 40, *[3] * 40] for e in words.push(token)]
    assert [*events, *words.finish(audio_seconds)] == [Word("40", 0.0), EndWord(stop)]


def test_log_probabilities_add_up() -> None:
    words = WordAssembler(spell, 1, confidence=True)
    pairs = [(0, -9.0), (40, -0.5), (41, -0.25), (3, -9.0), (42, -1.0), (0, -9.0)]
    events = [e for token, logprob in pairs for e in words.push(token, logprob)]
    assert [e.confidence for e in events if isinstance(e, Word)] == [math.exp(-0.75), math.exp(-1.0)]


@given(TOKENS, DELAYS)
def test_texts_are_the_contracts(tokens: list[int], delay: int) -> None:
    """Only times differ from the contract's rule, and those only behind a word that no boundary ended."""
    ours, theirs = assemble(tokens, delay), contract(tokens, delay)
    recorded.assert_same_words(theirs, ours)


@given(TOKENS, DELAYS)
def test_words_and_ends_take_turns_in_order_of_time(tokens: list[int], delay: int) -> None:
    words = WordAssembler(spell, delay)
    events = [e for token in tokens for e in words.push(token)]
    events += words.finish(len(tokens) / 12.5)
    assert [type(e) for e in events] == [Word, EndWord] * (len(events) // 2)
    times = [e.start_time if isinstance(e, Word) else e.stop_time for e in events]
    assert all(b >= a for a, b in pairwise(times))
    pieces = [token for token in tokens[max(0, delay - 1) :] if token not in (0, 3)]
    assert ".".join(e.text for e in events if isinstance(e, Word)) == spell(pieces)


@given(TOKENS, DELAYS, st.integers(0, 120), st.integers(0, 15))
def test_a_fork_into_the_same_future_changes_nothing(tokens: list[int], delay: int, at: int, length: int) -> None:
    """What a fork emitted does not come again: silence that the client sends after a marker gives each word once."""
    main = WordAssembler(spell, delay)
    events = [e for token in tokens[:at] for e in main.push(token)]
    fork = main.fork()
    for token in tokens[at : at + length]:
        events += fork.push(token)
    main.join(fork)
    events += [e for token in tokens[at:] for e in main.push(token)]
    assert events == assemble(tokens, delay)


@given(TOKENS, TOKENS, TOKENS, DELAYS)
def test_a_fork_into_another_future_loses_no_word(past: list[int], silence: list[int], future: list[int], delay: int) -> None:
    """Every word of the stream itself comes out, by the fork or by the stream, and no more than the fork adds."""
    main = WordAssembler(spell, delay)
    events = [e for token in past for e in main.push(token)]
    fork = main.fork()
    ahead = [e for token in silence[:15] for e in fork.push(token)] + list(fork.flush())
    main.join(fork)
    later = [e for token in future for e in main.push(token)]
    count = sum(isinstance(e, Word) for e in events + ahead + later)
    expected = sum(isinstance(e, Word) for e in assemble(past + future, delay))
    assert expected <= count <= expected + sum(isinstance(e, Word) for e in ahead)


@given(TOKENS, st.integers(0, 60), st.integers(0, 10))
def test_two_forks_in_a_row_say_each_word_once(tokens: list[int], at: int, gap: int) -> None:
    main = WordAssembler(spell, 6)
    events = [e for token in tokens[:at] for e in main.push(token)]
    for start, end in [(at, at + gap), (at + gap, len(tokens))]:
        fork = main.fork()
        for token in tokens[start : start + 12]:
            events += fork.push(token)
        main.join(fork)
        for token in tokens[start:end]:
            events += main.push(token)
    assert events == assemble(tokens, 6)
