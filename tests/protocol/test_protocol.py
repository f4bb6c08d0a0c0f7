"""Every inbound form of contract section 2.3, accepted or refused as its table says, and what the errors say."""

import contextlib
import math
import struct
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from moshi_stt import events, packed
from moshi_stt.engine.commands import Audio, Mark, Reset
from moshi_stt.errors import ProtocolError
from moshi_stt.events import (
    Ack,
    AnyEvent,
    EndOfTurn,
    EndWord,
    Error,
    Interim,
    Marker,
    Ready,
    SpeechStarted,
    Step,
    TurnResumed,
    Word,
)
from moshi_stt.protocol import (
    MAX_KEYS,
    Inbound,
    OggOpus,
    decode,
    decode_event,
    encode,
    encode_audio,
    encode_init,
    encode_marker,
    encode_opus,
)

INT64 = st.integers(-(1 << 63), (1 << 63) - 1)
UINT64 = st.integers(0, (1 << 64) - 1)


def pack(value: Any) -> bytes:
    data: bytes = msgpack.packb(value)
    return data


def raw_map(*pairs: tuple[bytes, bytes]) -> bytes:
    """A map of already packed keys and values: may repeat keys."""
    return bytes((0x80 | len(pairs),)) + b"".join(key + value for key, value in pairs)


def plain(inbound: Inbound) -> tuple[str, object]:
    """Comparable, samples as a list of float32 values."""
    if isinstance(inbound, Audio):
        assert inbound.samples.dtype == np.float32
        assert inbound.samples.ndim == 1
        assert inbound.samples.flags.writeable
        return "Audio", inbound.samples.tolist()
    if isinstance(inbound, OggOpus):
        return "OggOpus", inbound.data
    return ("Marker", inbound.id) if isinstance(inbound, Mark) else ("Init", None)


TYPE, AUDIO, PCM, HALF = pack("type"), pack("Audio"), pack("pcm"), pack([0.5])
NOT_UTF8 = b"\xa3\xff\xfe\xfd"
HALF_F32 = b"\x91\xca\x3f\x00\x00\x00"

ACCEPTED: dict[str, tuple[bytes, tuple[str, object]]] = {
    "type last": (pack({"pcm": [0.5], "type": "Audio"}), ("Audio", [0.5])),
    "type in the middle": (pack({"x": 1, "type": "Marker", "id": 3}), ("Marker", 3)),
    "float32": (raw_map((TYPE, AUDIO), (PCM, HALF_F32)), ("Audio", [0.5])),
    "extra keys": (pack({"type": "Audio", "a": {"b": [None, 1]}, "pcm": [0.5], "z": b"\xff"}), ("Audio", [0.5])),
    "extra ext and timestamp": (
        pack({"type": "Init", "a": msgpack.ExtType(5, b"abc"), "b": msgpack.Timestamp(1, 2)}),
        ("Init", None),
    ),
    "extra nil key": (pack({None: 1, "type": "Audio", "pcm": [0.5]}), ("Audio", [0.5])),
    "extra integer keys": (pack({7: 1, -3: 2, 1 << 40: 3, "type": "Audio", "pcm": [0.5]}), ("Audio", [0.5])),
    "extra float, bool and ext keys": (
        pack({1.5: 1, True: 2, msgpack.ExtType(1, b"x"): 3, "type": "Marker", "id": 5}),
        ("Marker", 5),
    ),
    "extra map and array as keys": (raw_map((pack({}), pack(1)), (pack([1]), pack(1)), (TYPE, pack("Init"))), ("Init", None)),
    "extra key that is not UTF-8": (raw_map((NOT_UTF8, NOT_UTF8), (TYPE, AUDIO), (PCM, HALF)), ("Audio", [0.5])),
    "extra key twice": (raw_map((pack("x"), pack(1)), (pack("x"), pack(2)), (TYPE, pack("Init"))), ("Init", None)),
    "another type's field twice": (
        raw_map((pack("id"), pack(1)), (pack("id"), pack(2)), (TYPE, AUDIO), (PCM, HALF)),
        ("Audio", [0.5]),
    ),
    "keys and tag as bin": (pack({b"type": b"Audio", b"pcm": [0.5]}), ("Audio", [0.5])),
    "tag as index 0": (pack({"type": 0}), ("Init", None)),
    "tag as index 1": (pack({"type": 1, "id": 9}), ("Marker", 9)),
    "tag as index 2": (pack({"type": 2, "pcm": [0.5]}), ("Audio", [0.5])),
    "tag as index 3": (pack({"type": 3, "data": [1]}), ("OggOpus", b"\x01")),
    "tag as wide index": (raw_map((TYPE, b"\xcd\x00\x01"), (pack("id"), pack(1))), ("Marker", 1)),
    "field key as index": (pack({"type": "Audio", 0: [0.5]}), ("Audio", [0.5])),
    "array": (pack(["Audio", [0.5]]), ("Audio", [0.5])),
    "array with bin tag": (pack([b"Marker", 7]), ("Marker", 7)),
    "array with index": (pack([1, 7]), ("Marker", 7)),
    "array Init": (pack(["Init"]), ("Init", None)),
    "array OggOpus": (pack(["OggOpus", [0, 255]]), ("OggOpus", b"\x00\xff")),
    "wide map header": (b"\xdf\x00\x00\x00\x01" + TYPE + pack("Init"), ("Init", None)),
    "wide array header": (b"\xdd\x00\x00\x00\x01" + pack("Init"), ("Init", None)),
    "wide str": (raw_map((b"\xda\x00\x04type", b"\xdb\x00\x00\x00\x04Init")), ("Init", None)),
    "no samples": (pack({"type": "Audio", "pcm": []}), ("Audio", [])),
    "no samples, wide header": (raw_map((TYPE, AUDIO), (PCM, b"\xdc\x00\x00")), ("Audio", [])),
    "integers": (pack({"type": "Audio", "pcm": [0, 1, -1, 127, -128, 70_000]}), ("Audio", [0, 1, -1, 127, -128, 70_000])),
    "2^63 and 2^64 - 1": (pack({"type": "Audio", "pcm": [1 << 63, (1 << 64) - 1]}), ("Audio", [2.0**63, 2.0**64])),
    "mixed": (pack({"type": "Audio", "pcm": [0, 0.5, -1, 0.25]}), ("Audio", [0, 0.5, -1, 0.25])),
    "mixed widths": (raw_map((TYPE, AUDIO), (PCM, b"\x92\xca\x3f\x00\x00\x00" + pack(0.25))), ("Audio", [0.5, 0.25])),
    "1e300 becomes inf": (pack({"type": "Audio", "pcm": [1e300, -1e300]}), ("Audio", [math.inf, -math.inf])),
    "1e300 among integers": (pack({"type": "Audio", "pcm": [1e300, 0]}), ("Audio", [math.inf, 0])),
    "infinity": (pack({"type": "Audio", "pcm": [math.inf, 1]}), ("Audio", [math.inf, 1])),
    "pcm as bin": (pack({"type": "Audio", "pcm": struct.pack("<3f", 0.5, -1, 0.25)}), ("Audio", [0.5, -1, 0.25])),
    "pcm as empty bin": (pack({"type": "Audio", "pcm": b""}), ("Audio", [])),
    "pcm as bin in an array": (pack(["Audio", struct.pack("<f", 0.5)]), ("Audio", [0.5])),
    "id lowest": (pack({"type": "Marker", "id": -(1 << 63)}), ("Marker", -(1 << 63))),
    "id highest": (pack({"type": "Marker", "id": (1 << 63) - 1}), ("Marker", (1 << 63) - 1)),
    "id in a wide form": (raw_map((TYPE, pack("Marker")), (pack("id"), b"\xd3" + bytes(7) + b"\x05")), ("Marker", 5)),
    "data as bin": (pack({"type": "OggOpus", "data": b"OggS\xff"}), ("OggOpus", b"OggS\xff")),
    "no data": (pack({"type": "OggOpus", "data": []}), ("OggOpus", b"")),
    "data as empty bin": (pack({"type": "OggOpus", "data": b""}), ("OggOpus", b"")),
    "trailing bytes": (pack({"type": "Audio", "pcm": [0.5]}) + b"\xc1rest", ("Audio", [0.5])),
    "trailing bytes behind float32": (raw_map((TYPE, AUDIO), (PCM, HALF_F32)) + b"\xca", ("Audio", [0.5])),
    "second document": (pack({"type": "Init"}) + pack({"type": "Nonsense"}), ("Init", None)),
}


@pytest.mark.parametrize("form", ACCEPTED)
def test_form_is_accepted(form: str) -> None:
    message, expected = ACCEPTED[form]
    assert plain(decode(message)) == expected


NAN_PCM = pack({"type": "Audio", "pcm": [math.nan, 1]})


def test_nan_is_passed_on() -> None:
    inbound = decode(NAN_PCM)
    assert isinstance(inbound, Audio)
    assert np.isnan(inbound.samples[0])


REFUSED: dict[str, tuple[bytes, int, str]] = {
    "empty": (b"", 1007, "empty message"),
    "no document": (b"\xc1", 1007, "not MessagePack"),
    "bad byte inside": (raw_map((TYPE, AUDIO), (PCM, b"\x91\xc1")), 1007, "not MessagePack"),
    "externally tagged": (pack({"Audio": {"pcm": [0.5]}}), 1007, "no `type`.*its keys are 'Audio'"),
    "bare string": (pack("Init"), 1003, "must be a map with a `type`, got str 'Init'"),
    "nil": (pack(None), 1003, "got nil"),
    "number": (pack(5), 1003, "got integer 5"),
    "missing tag": (pack({"pcm": [0.5]}), 1007, "no `type`.*its keys are 'pcm'"),
    "empty map": (pack({}), 1007, "no `type`"),
    "empty array": (pack([]), 1007, "an empty one"),
    "nil tag": (pack({"type": None, "pcm": [0.5]}), 1007, "one of Init, Marker, Audio, OggOpus, got nil"),
    "bool tag": (pack({"type": True}), 1007, "got bool True"),
    "float tag": (pack({"type": 2.0, "pcm": [0.5]}), 1007, "got float 2.0"),
    "array tag": (pack({"type": ["Audio"]}), 1007, "got array"),
    "unknown tag": (pack({"type": "Video"}), 1003, "unknown `type` str 'Video': expected one of Init"),
    "lower-case tag": (pack({"type": "audio", "pcm": [0.5]}), 1003, "unknown `type` str 'audio'"),
    "tag that is not UTF-8": (raw_map((TYPE, NOT_UTF8)), 1003, "unknown `type`"),
    "capital key": (pack({"Type": "Audio", "pcm": [0.5]}), 1007, "no `type`"),
    "index 4": (pack({"type": 4}), 1003, "unknown `type` integer 4"),
    "index -1": (pack({"type": -1}), 1003, "unknown `type` integer -1"),
    "two types": (raw_map((TYPE, AUDIO), (TYPE, AUDIO), (PCM, HALF)), 1007, "two `type` keys"),
    "a type as str and as bin": (raw_map((TYPE, AUDIO), (pack(b"type"), AUDIO), (PCM, HALF)), 1007, "two `type` keys"),
    "two pcm": (raw_map((TYPE, AUDIO), (PCM, HALF), (PCM, HALF)), 1007, "two `pcm`"),
    "pcm by name and index": (raw_map((TYPE, AUDIO), (PCM, HALF), (pack(0), HALF)), 1007, "two `pcm`"),
    "array too short": (pack(["Audio"]), 1007, "Audio as an array has 2 elements, got 1"),
    "array too long": (pack(["Audio", [0.5], 1]), 1007, "got 3"),
    "array Init too long": (pack(["Init", 1]), 1007, "Init as an array has 1 elements, got 2"),
    "pcm missing": (pack({"type": "Audio", "data": [1]}), 1007, "Audio has no `pcm`; its keys are 'data'"),
    "pcm nil": (pack({"type": "Audio", "pcm": None}), 1007, "Audio.pcm must be an array of numbers, got nil"),
    "pcm str": (pack({"type": "Audio", "pcm": "abcd"}), 1007, "got str 'abcd'"),
    "pcm number": (pack({"type": "Audio", "pcm": 0.5}), 1007, "got float 0.5"),
    "pcm map": (pack({"type": "Audio", "pcm": {}}), 1007, "got map"),
    "pcm bin of 5 bytes": (pack({"type": "Audio", "pcm": b"abcde"}), 1007, "4 bytes a sample, got 5 bytes"),
    "bool sample": (pack({"type": "Audio", "pcm": [0.5, True]}), 1007, r"pcm\[1\] must be a number, got bool True"),
    "nil sample": (pack({"type": "Audio", "pcm": [None]}), 1007, r"pcm\[0\].*got nil"),
    "str sample": (pack({"type": "Audio", "pcm": [0.5, 1, "0.5"]}), 1007, r"pcm\[2\].*got str '0.5'"),
    "long str sample": (pack({"type": "Audio", "pcm": [1, "x" * 5_000]}), 1007, r"pcm\[1\].*got str 'xxx"),
    "array sample": (pack({"type": "Audio", "pcm": [0.5, [1]]}), 1007, r"pcm\[1\].*got array"),
    "map sample": (pack({"type": "Audio", "pcm": [{"a": 1}]}), 1007, r"pcm\[0\].*got map"),
    "map sample with a map as key": (raw_map((TYPE, AUDIO), (PCM, b"\x91\x81\x80\x01")), 1007, r"pcm\[0\].*got map"),
    "ext sample": (pack({"type": "Audio", "pcm": [msgpack.ExtType(1, b"abcd")]}), 1007, r"pcm\[0\].*got ext"),
    "bad timestamp sample": (pack({"type": "Audio", "pcm": [msgpack.ExtType(-1 & 127, b"a")]}), 1007, r"pcm\[0\].*got ext"),
    "timestamp sample": (raw_map((TYPE, AUDIO), (PCM, b"\x91\xd4\xff\x00")), 1007, r"pcm\[0\].*got ext"),
    "late bool sample": (pack({"type": "Audio", "pcm": [0] * 9_000 + [False]}), 1007, r"pcm\[9000\].*got bool"),
    "late long sample": (pack({"type": "Audio", "pcm": [0] * 9_000 + ["y" * 90_000]}), 1007, r"pcm\[9000\].*got str"),
    "id missing": (pack({"type": "Marker"}), 1007, "Marker has no `id`$"),
    "id nil": (pack({"type": "Marker", "id": None}), 1007, "Marker.id must be an integer.*got nil"),
    "id float": (pack({"type": "Marker", "id": 5.0}), 1007, "got float 5.0"),
    "id bool": (pack({"type": "Marker", "id": True}), 1007, "got bool"),
    "id str": (pack({"type": "Marker", "id": "5"}), 1007, "got str '5'"),
    "id bin": (pack({"type": "Marker", "id": b"5"}), 1007, "got bin"),
    "id above int64": (pack({"type": "Marker", "id": 1 << 63}), 1007, "got integer 9223372036854775808"),
    "two ids": (raw_map((TYPE, pack("Marker")), (pack("id"), pack(1)), (pack("id"), pack(2))), 1007, "two `id`"),
    "data missing": (pack({"type": "OggOpus"}), 1007, "OggOpus has no `data`"),
    "data str": (pack({"type": "OggOpus", "data": "OggS"}), 1007, "OggOpus.data must be bin or an array of bytes, got str"),
    "data 256": (pack({"type": "OggOpus", "data": [1, 256]}), 1007, r"data\[1\] must be an integer in 0..255, got integer 256"),
    "data -1": (pack({"type": "OggOpus", "data": [-1]}), 1007, r"data\[0\].*got integer -1"),
    "data float": (pack({"type": "OggOpus", "data": [1.0]}), 1007, r"data\[0\].*got float 1.0"),
    "data bool": (pack({"type": "OggOpus", "data": [True]}), 1007, r"data\[0\].*got bool"),
    "data late": (pack({"type": "OggOpus", "data": [200] * 9_000 + [None]}), 1007, r"data\[9000\].*got nil"),
    "truncated samples": (encode_audio([0.5] * 40)[:-1], 1007, "ends too early"),
    "truncated bin": (encode_audio([0.5] * 40, as_bin=True)[:-1], 1007, "ends too early"),
    "truncated header": (b"\x82\xa4type\xa5Audio\xa3pcm\xdc\x00", 1007, "ends too early"),
    "nothing behind the key": (b"\x82\xa4type\xa5Audio\xa3pcm", 1007, "ends too early"),
    "truncated extra key": (pack({"type": "Init", "x": 1})[:-1], 1007, "ends too early"),
    "4 GiB announced": (b"\x82\xa4type\xa5Audio\xa3pcm\xdd\xff\xff\xff\xff\xca\x00\x00\x00\x00", 1007, "ends too early"),
    "4 GiB of bin announced": (b"\x82\xa4type\xa5Audio\xa3pcm\xc6\xff\xff\xff\xff", 1007, "ends too early|not MessagePack"),
    "4 G keys announced": (b"\xdf\xff\xff\xff\xff" + TYPE + AUDIO, 1008, "4,294,967,295 keys"),
    "too many keys": (pack({f"k{n}": n for n in range(MAX_KEYS)} | {"type": "Init"}), 1008, "1,025 keys"),
    "nested too deeply": (raw_map((TYPE, pack("Init")), (pack("x"), b"\x91" * 5_000 + b"\x00")), 1008, "nested too deeply"),
}


@pytest.mark.parametrize("form", REFUSED)
def test_form_is_refused(form: str) -> None:
    message, close_code, pattern = REFUSED[form]
    with pytest.raises(ProtocolError, match=pattern) as caught:
        decode(message)
    assert caught.value.close_code == close_code


@pytest.mark.parametrize("message", [message for message, _ in ACCEPTED.values()], ids=list(ACCEPTED))
def test_truncation_anywhere_is_an_error(message: bytes) -> None:
    """A prefix is refused unless it is a whole document, and then it says the same."""
    whole = plain(decode(message))
    for length in range(len(message)):
        try:
            assert plain(decode(message[:length])) == whole
        except ProtocolError:
            continue


@pytest.mark.parametrize("content", ["é\x00\x1b[31m" * 20, "💥" * 200, "\\" * 300, '"' * 300])
def test_errors_echo_little_and_only_printable_ascii(content: str) -> None:
    """Error texts go to logs and to the client: neither a terminal escape nor a megabyte must get there."""
    for value in (content, content.encode()):
        for message in (
            pack({"type": value}),
            pack(value),
            pack({value: 1}),
            pack({f"{index}{content}": 1 for index in range(20)}),
            pack({"type": "Audio", "pcm": [1, value]}),
            pack({"type": "Marker", "id": value}),
        ):
            with pytest.raises(ProtocolError) as caught:
                decode(message)
            text = str(caught.value)
            assert text.isascii()
            assert text.isprintable()
            assert len(text) < 200


def test_largest_key_count_is_accepted() -> None:
    message = pack({f"k{n}": n for n in range(MAX_KEYS - 1)} | {"type": "Init"})
    assert decode(message) == Reset()


@pytest.mark.parametrize("count", [0, 1, 15, 16, 1_920, 65_535, 65_536, 70_000])
@pytest.mark.parametrize("as_bin", [False, True])
def test_audio_of_any_length_survives(count: int, as_bin: bool) -> None:
    pcm = np.random.default_rng(count).standard_normal(count).astype(np.float32)
    inbound = decode(encode_audio(pcm, as_bin))
    assert isinstance(inbound, Audio)
    np.testing.assert_array_equal(inbound.samples, pcm)


@pytest.mark.parametrize("count", [0, 1, 255, 256, 65_535, 65_536])
@pytest.mark.parametrize("as_bin", [False, True])
def test_opus_of_any_length_survives(count: int, as_bin: bool) -> None:
    data = np.random.default_rng(count).bytes(count)
    assert decode(encode_opus(data, as_bin)) == OggOpus(data)


def test_long_mixed_arrays_are_read_in_pieces() -> None:
    """Runs of floats, runs of integers and mixtures across the borders of the pieces."""
    chunk = packed.CHUNK
    pcm = [0.5] * chunk + [0] * (chunk + 7) + [0.25, 1] * chunk + [-0.125] * chunk
    inbound = decode(pack({"type": "Audio", "pcm": pcm}))
    assert isinstance(inbound, Audio)
    assert inbound.samples.tolist() == pcm


def test_samples_are_not_aliased_to_the_message() -> None:
    message = encode_audio([0.5, 0.25], as_bin=True)
    inbound = decode(message)
    assert isinstance(inbound, Audio)
    inbound.samples[:] = 9
    assert message == encode_audio([0.5, 0.25], as_bin=True)


@given(arrays.arrays(np.float32, st.integers(0, 300), elements=st.floats(width=32)), st.booleans())
def test_any_samples_survive(pcm: np.ndarray, as_bin: bool) -> None:
    inbound = decode(encode_audio(pcm, as_bin))
    assert isinstance(inbound, Audio)
    np.testing.assert_array_equal(inbound.samples, pcm)


@given(
    st.lists(st.one_of(st.floats(), st.floats(width=32), st.integers(-(1 << 63), (1 << 64) - 1)), max_size=60), st.booleans()
)
def test_any_numbers_are_read_as_float32(numbers: list[float], single: bool) -> None:
    inbound = decode(msgpack.packb({"pcm": numbers, "type": "Audio"}, use_single_float=False))
    assert isinstance(inbound, Audio)
    with np.errstate(over="ignore"):
        expected = np.array([float(number) for number in numbers], np.float64).astype(np.float32)
    np.testing.assert_array_equal(inbound.samples, expected)


@given(INT64)
def test_any_marker_survives_both_ways(id: int) -> None:
    assert decode(encode_marker(id)) == Mark(id)
    assert encode(Marker(id)) == encode_marker(id) == pack({"type": "Marker", "id": id})
    assert decode_event(encode(Marker(id))) == Marker(id)


def test_client_refuses_what_cannot_be_sent() -> None:
    with pytest.raises(ValueError, match="from -2"):
        encode_marker(1 << 63)
    with pytest.raises(ValueError, match="one channel"):
        encode_audio(np.zeros((2, 2), np.float32))
    with pytest.raises(ValueError, match="beyond 64 bits"):
        encode(Step(1 << 64, (), 0))
    assert decode(encode_init()) == Reset()


FLOAT32 = st.floats(width=32, allow_nan=False)
EVENTS = st.one_of(
    st.just(Ready()),
    st.builds(Step, UINT64, st.lists(FLOAT32, max_size=20).map(tuple), UINT64),
    st.builds(Word, st.text(max_size=400), st.floats(allow_nan=False)),
    st.builds(EndWord, st.floats(allow_nan=False)),
    st.builds(Marker, INT64),
    st.builds(Error, st.text(max_size=70_000)),
)


@given(EVENTS)
def test_any_event_survives(event: AnyEvent) -> None:
    assert decode_event(encode(event)) == event


@given(st.builds(Word, st.text(), st.floats(allow_nan=False)))
def test_words_are_packed_as_a_general_packer_does(event: Word) -> None:
    assert encode(event) == pack({"type": "Word", "text": event.text, "start_time": event.start_time})


@pytest.mark.parametrize(
    ("event", "expected"),
    [
        (Ready("t"), {"type": "Ready", "token": "t"}),
        (Word("a", 1.0, 0.5), {"type": "Word", "text": "a", "start_time": 1.0, "confidence": 0.5}),
        (Interim("a b", 2.0), {"type": "Interim", "text": "a b", "start_time": 2.0}),
        (SpeechStarted(0.5), {"type": "SpeechStarted", "time": 0.5}),
        (EndOfTurn(1.5, 0.25), {"type": "EndOfTurn", "time": 1.5, "confidence": 0.25}),
        (TurnResumed(2.0), {"type": "TurnResumed", "time": 2.0}),
        (Ack(24_000), {"type": "Ack", "samples": 24_000}),
        (events.Warning("code", "text"), {"type": "Warning", "code": "code", "message": "text"}),
        (Error("gone", 1011), {"type": "Error", "message": "gone"}),
    ],
)
def test_keys_and_order_of_what_comes_on_request(event: AnyEvent, expected: dict[str, object]) -> None:
    """As the table in docs/protocol.md has them. The close code of an Error is not sent."""
    assert encode(event) == pack(expected)


@pytest.mark.parametrize("size", [0, 31, 32, 255, 256, 65_535, 65_536])
def test_text_of_any_length_is_packed_shortest(size: int) -> None:
    assert encode(Error("x" * size)) == pack({"type": "Error", "message": "x" * size})


def test_text_that_utf8_cannot_say_is_still_sent() -> None:
    event = decode_event(encode(Word("a\ud800b", 0.0)))
    assert event == Word("a?b", 0.0)


@given(st.integers(-(1 << 63), (1 << 64) - 1))
def test_integers_are_packed_shortest(value: int) -> None:
    assert encode(Marker(value)) == pack({"type": "Marker", "id": value})


@pytest.mark.parametrize(
    "message",
    [b"", b"\xc1", pack({"type": "Nobody"}), pack([1]), pack({"type": "Word"}), b"\x91" * 9_000, encode(Ready()) + b"x"],
)
def test_client_refuses_what_is_no_event(message: bytes) -> None:
    with pytest.raises(ProtocolError, match="no message of this protocol"):
        decode_event(message)


def test_client_ignores_keys_it_does_not_know() -> None:
    assert decode_event(pack({"type": "Marker", "id": 1, "confidence": 0.5})) == Marker(1)


@given(st.binary(max_size=200))
def test_arbitrary_bytes_raise_nothing_else(message: bytes) -> None:
    for read in (decode, decode_event):
        with contextlib.suppress(ProtocolError):
            read(message)


@pytest.mark.parametrize(
    ("message", "kind"),
    [
        (b'{"type": "Audio", "pcm": [0.0, 0.1]}', "JSON"),
        (b"RIFF\x24\x00\x00\x00WAVEfmt " + bytes(40), "a WAV file"),
        (b"OggS" + bytes(100), "an Ogg file"),
        (np.round(9_000 * np.cos(np.arange(1_920) / 7)).astype("<i2").tobytes(), "bare 16-bit samples"),
    ],
)
def test_what_is_sent_in_place_of_a_document_is_named(message: bytes, kind: str) -> None:
    with pytest.raises(ProtocolError, match=f"^the message is {kind}: expected a MessagePack map") as raised:
        decode(message)
    assert raised.value.close_code == 1007
