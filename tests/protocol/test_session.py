"""One connection without a socket: order, markers, Opus among PCM, bad samples, recorded conversations."""

import itertools
import json
import wave
from collections.abc import Iterable
from pathlib import Path

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from moshi_stt.audio.opus import OpusEncoder
from moshi_stt.engine.commands import Audio, Mark, Reset
from moshi_stt.errors import ProtocolError
from moshi_stt.events import EndWord, Error, Marker, Ready, Step, Word
from moshi_stt.protocol import decode_event, encode, encode_audio, encode_init, encode_marker, encode_opus
from moshi_stt.server.doors.kyutai import LOUDEST, KyutaiSession
from moshi_stt.session import Action, Session


def fed(actions: Iterable[Action]) -> NDArray[np.float32]:
    """All audio among the actions, (S,)."""
    return np.concatenate([np.empty(0, np.float32), *(action.samples for action in actions if isinstance(action, Audio))])


def run(session: KyutaiSession, messages: Iterable[bytes]) -> list[Action]:
    """Everything the messages ask for, and the end of input."""
    actions = [action for message in messages for action in session.receive(message)]
    return [*actions, *session.end_of_input()]


def outline(actions: Iterable[Action]) -> list[object]:
    """Actions with neighbouring audio joined: comparable whatever the cuts."""
    lines: list[object] = []
    for is_audio, group in itertools.groupby(actions, lambda action: isinstance(action, Audio)):
        if is_audio:
            samples = fed(group).tolist()
            lines += [samples] if samples else []
        else:
            lines += group
    return lines


def ogg_opus(seconds: float) -> tuple[bytes, NDArray[np.float32]]:
    """An Ogg stream, and what it says when it is decoded in one piece."""
    time = np.arange(round(seconds * 24_000)) / 24_000
    encoder = OpusEncoder()
    data = encoder.feed((0.3 * np.sin(2 * np.pi * 330 * time)).astype(np.float32)) + encoder.finish()
    return data, fed(run(KyutaiSession(), [encode_opus(data)]))


@pytest.fixture(scope="module")
def speech() -> tuple[bytes, NDArray[np.float32]]:
    data, pcm = ogg_opus(1.5)
    assert 1.5 * 24_000 <= len(pcm) < 1.6 * 24_000
    return data, pcm


def test_each_message_becomes_its_action() -> None:
    session = KyutaiSession()
    (feed,) = session.receive(encode_audio([0.5, -0.25]))
    assert isinstance(feed, Audio)
    assert feed.samples.tolist() == [0.5, -0.25]
    assert list(session.receive(encode_marker(-7))) == [Mark(-7)]
    assert list(session.receive(encode_init())) == [Reset()]
    assert list(session.end_of_input()) == []
    assert session.warnings(0) == []


def test_session_is_a_protocol_and_sends_the_wire() -> None:
    session: Session = KyutaiSession()
    for event in (Ready(), Step(3, (0.5,), 0), Word("a", 0.0), EndWord(1.0), Marker(1), Error("x")):
        assert list(session.send(event)) == [encode(event)]


def test_empty_audio_is_an_action_too() -> None:
    (feed,) = KyutaiSession().receive(encode_audio([]))
    assert isinstance(feed, Audio)
    assert len(feed.samples) == 0


@given(st.lists(st.integers(0, 3_000), max_size=12), st.booleans())
def test_any_chunking_is_the_same_audio(cuts: list[int], as_bin: bool) -> None:
    pcm = np.random.default_rng(1).standard_normal(3_000).astype(np.float32)
    borders = [0, *sorted(cuts), len(pcm)]
    messages = [encode_audio(pcm[start:end], as_bin) for start, end in itertools.pairwise(borders)]
    np.testing.assert_array_equal(fed(run(KyutaiSession(), messages)), pcm)


@pytest.mark.parametrize("form", ["float32", "float64", "bin", "array", "mixed"])
def test_any_form_is_the_same_audio(form: str) -> None:
    pcm = np.random.default_rng(2).standard_normal(2_000).astype(np.float32)
    pcm[::5] = 0
    numbers = pcm.tolist()
    message = {
        "float32": encode_audio(pcm),
        "float64": msgpack.packb({"type": "Audio", "pcm": numbers}),
        "bin": encode_audio(pcm, as_bin=True),
        "array": msgpack.packb(["Audio", numbers]),
        "mixed": msgpack.packb({"pcm": [int(x) if x == int(x) else x for x in numbers], "type": "Audio"}),
    }[form]
    np.testing.assert_array_equal(fed(run(KyutaiSession(), [message])), pcm)


@given(st.lists(st.one_of(st.integers(0, 50), st.sampled_from(["mark", "init"])), max_size=30))
def test_order_is_kept(plan: list[int | str]) -> None:
    """Audio of n samples, markers and resets, numbered in the order they were sent."""
    messages, expected = [], []
    for number, step in enumerate(plan):
        if step == "mark":
            messages.append(encode_marker(number))
            expected.append(Mark(number))
        elif step == "init":
            messages.append(encode_init())
            expected.append(Reset())
        else:
            messages.append(encode_audio([number] * int(step)))
            expected.append(Audio(np.full(int(step), number, np.float32)))
    assert outline(run(KyutaiSession(), messages)) == outline(expected)


@settings(deadline=None, max_examples=25)
@given(cuts=st.lists(st.integers(0, 20_000), max_size=10), as_bin=st.booleans())
def test_opus_in_any_pieces_is_the_same_audio(speech: tuple[bytes, NDArray[np.float32]], cuts: list[int], as_bin: bool) -> None:
    data, pcm = speech
    borders = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    messages = [encode_opus(data[start:end], as_bin) for start, end in itertools.pairwise(borders)]
    np.testing.assert_array_equal(fed(run(KyutaiSession(), messages)), pcm)


def test_opus_and_pcm_keep_their_order(speech: tuple[bytes, NDArray[np.float32]]) -> None:
    """moshi-server lets Opus overtake PCM (contract F7)."""
    data, pcm = speech
    plain = np.full(1_000, 0.25, np.float32)
    messages = [encode_audio(plain), encode_opus(data), encode_marker(1), encode_audio(plain), encode_marker(2)]
    actions = run(KyutaiSession(), messages)
    assert outline(actions) == [[*plain.tolist(), *pcm.tolist()], Mark(1), plain.tolist(), Mark(2)]


def test_opus_decoder_outlives_a_reset(speech: tuple[bytes, NDArray[np.float32]]) -> None:
    data, pcm = speech
    half = len(data) // 2
    actions = run(KyutaiSession(), [encode_opus(data[:half]), encode_init(), encode_opus(data[half:])])
    np.testing.assert_array_equal(fed(actions), pcm)
    assert actions.count(Reset()) == 1


def test_bad_opus_is_refused_behind_what_was_good(speech: tuple[bytes, NDArray[np.float32]]) -> None:
    """Contract F6 and F7: on moshi-server a bad stream is never told to the client, and can take the module down."""
    data, pcm = speech
    good: list[Action] = []
    session = KyutaiSession()
    with pytest.raises(ProtocolError, match="OggOpus: ") as caught:
        good.extend(session.receive(encode_opus(data + b"no page follows a page like this" * 3_000)))
    assert caught.value.close_code == 1007
    np.testing.assert_array_equal(fed(good), pcm)


def test_opus_that_never_began_is_told_at_the_end() -> None:
    session = KyutaiSession()
    assert list(session.receive(encode_opus(b"Og"))) == []
    with pytest.raises(ProtocolError, match="OggOpus: "):
        list(session.end_of_input())


def test_bad_message_raises_at_once_and_leaves_the_session_usable() -> None:
    session = KyutaiSession()
    with pytest.raises(ProtocolError):
        session.receive(b"\xc1")
    assert list(session.receive(encode_marker(1))) == [Mark(1)]


def test_what_is_no_sample_becomes_silence_and_is_said_once() -> None:
    session = KyutaiSession()
    pcm = np.array([0.5, np.nan, np.inf, -np.inf, 3e38, -3e38, LOUDEST, -0.5], np.float32)
    for _ in range(3):
        (feed,) = session.receive(encode_audio(pcm))
        assert isinstance(feed, Audio)
        assert feed.samples.tolist() == [0.5, 0, 0, 0, 0, 0, LOUDEST, -0.5]
    assert session.silenced_samples == 15
    news = session.warnings(0)
    assert sum("5 of 8 samples are NaN" in line for line in news) == 1
    assert session.warnings(0) == []


@given(st.lists(st.floats(width=32), max_size=40))
def test_fed_audio_is_always_finite(values: list[float]) -> None:
    (feed,) = KyutaiSession().receive(encode_audio(values))
    assert isinstance(feed, Audio)
    assert np.isfinite(feed.samples).all()
    kept = np.abs(np.array(values, np.float32)) <= LOUDEST
    np.testing.assert_array_equal(feed.samples[kept], np.array(values, np.float32)[kept])


def test_integer_samples_sent_as_they_are_get_a_warning() -> None:
    session = KyutaiSession()
    tone = (20_000 * np.sin(np.arange(4_800) / 10)).astype(np.float32)
    for _ in range(4):
        (feed,) = session.receive(encode_audio(tone))
        assert isinstance(feed, Audio)
        np.testing.assert_array_equal(feed.samples, tone)
    news = session.warnings(0)
    assert len([line for line in news if "32768" in line]) == 1


def test_silence_from_a_dead_microphone_gets_a_warning() -> None:
    session = KyutaiSession()
    for _ in range(30):
        list(session.receive(encode_audio(np.zeros(24_000, np.float32))))
    assert any("zeros" in line for line in session.warnings(0))


def voice(seconds: float, hz: float = 160.0) -> NDArray[np.float32]:
    """A buzz with the pitch of a voice, (S,)."""
    phase = (np.arange(round(seconds * 24_000)) * hz / 24_000) % 1
    return (0.3 * (phase - 0.5)).astype(np.float32)


def test_voice_without_words_gets_a_warning_when_all_of_it_has_been_transcribed() -> None:
    """Audio at 48 kHz sent as 24 kHz gives nothing but `Step`s; an unfinished upload has no words yet either."""
    session = KyutaiSession()
    list(session.receive(encode_audio(voice(15))))
    assert session.warnings(15 * 24_000) == []
    (line,) = [line for line in session.warnings(100) if "not one word" in line]
    assert "24 kHz" in line
    assert session.warnings(0) == []


def test_voice_with_words_gets_no_warning() -> None:
    session = KyutaiSession()
    list(session.receive(encode_audio(voice(15))))
    session.send(Word("hello", 0.0))
    assert not any("not one word" in line for line in session.warnings(0))


RECORDED = ["words", "one_message", "two_streams", "marker_partial", "marker_first", "init_midway", "small_chunks", "unbatched"]


@pytest.mark.parametrize("name", RECORDED)
def test_recorded_conversation_is_replayed(shared: Path, name: str) -> None:
    """Each connection of a recording in its own session: what was sent becomes its actions, what was received its bytes."""
    folder = shared / "goldens" / "recorded"
    with wave.open(str(folder / "speech_24k.wav")) as file:
        speech = np.frombuffer(file.readframes(file.getnframes()), "<i2").astype(np.float32) / 32_768
    sessions: dict[str, KyutaiSession] = {}
    for connection, what, *details in json.loads((folder / f"{name}.json").read_text())["log"]:
        session = sessions.setdefault(connection, KyutaiSession())
        if what == "recv":
            message = bytes.fromhex(details[0])
            assert list(session.send(decode_event(message))) == [message]
        elif what == "send":
            kind, *numbers = details
            if kind == "marker":
                assert list(session.receive(encode_marker(*numbers))) == [Mark(*numbers)]
            elif kind == "init":
                assert list(session.receive(encode_init())) == [Reset()]
            else:
                pcm = np.zeros(*numbers, np.float32) if kind == "zeros" else speech[numbers[0] :][: numbers[1]]
                np.testing.assert_array_equal(fed(session.receive(encode_audio(pcm))), pcm)


def test_recorded_bad_message_is_refused(shared: Path) -> None:
    log = json.loads((shared / "goldens" / "recorded" / "malformed.json").read_text())["log"]
    (sent,) = [entry for entry in log if entry[1:3] == ["send", "hex"]]
    with pytest.raises(ProtocolError) as caught:
        KyutaiSession().receive(bytes.fromhex(sent[3]))
    assert caught.value.close_code == 1007


def test_recorded_opus_file_in_pieces_that_broke_moshi_server(shared: Path) -> None:
    """400 bytes a message panicked its module, the whole file at once yielded nothing, ever (recordings' README)."""
    data = (shared / "goldens" / "recorded" / "speech_24k.opus").read_bytes()
    pieces = [encode_opus(data[start : start + 400]) for start in range(0, len(data), 400)]
    in_pieces = fed(run(KyutaiSession(), pieces))
    whole = fed(run(KyutaiSession(), [encode_opus(data, as_bin=True)]))
    np.testing.assert_array_equal(in_pieces, whole)
    assert abs(len(whole) - 264_000) <= 960
