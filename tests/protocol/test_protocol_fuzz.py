"""Random and mutated messages: nothing but ProtocolError ever comes out, and no message takes more memory than it should."""

import math
import random
import tracemalloc
from collections import Counter
from typing import Any

import msgpack
import numpy as np
import pytest

from moshi_stt.audio.opus import OpusEncoder
from moshi_stt.engine.commands import Audio, Mark, Reset
from moshi_stt.errors import ProtocolError
from moshi_stt.events import Marker, Ready, Step, Word
from moshi_stt.protocol import decode, decode_event, encode, encode_audio, encode_init, encode_marker, encode_opus
from moshi_stt.server.doors.kyutai import KyutaiSession

MESSAGES = 120_000

GIANT = [
    b"\xdd\xff\xff\xff\xff",
    b"\xdf\xff\xff\xff\xff",
    b"\xc6\xff\xff\xff\xff",
    b"\xdb\xff\xff\xff\xff",
    b"\xc9\xff\xff\xff\xff\x01",
]
GIANT += [b"\xdd\x00\xff\xff\xff", b"\xdc\xff\xff", b"\xde\xff\xff", b"\xc5\xff\xff", b"\xda\xff\xff", b"\xdd\x7f\xff\xff\xff"]

CORPUS = [
    *(encode_audio(np.linspace(-1, 1, count)) for count in (0, 1, 7, 15, 16, 40)),
    encode_audio(np.linspace(-1, 1, 20), as_bin=True),
    msgpack.packb({"pcm": [0.5, 1, -3, 1 << 40, 0.25], "type": "Audio", "extra": {"a": [None, True, b"x"]}}),
    msgpack.packb({"type": "Audio", "pcm": [math.pi] * 20}),
    msgpack.packb(["Audio", [0.5, 1]]),
    msgpack.packb({b"type": 3, 0: [79, 103, 255, 0]}),
    *(encode_marker(number) for number in (0, -1, 70_000, (1 << 63) - 1)),
    encode_init(),
    encode_opus(bytes(range(0, 250, 9))),
    encode_opus(b"OggS" + bytes(30), as_bin=True),
    *(encode(event) for event in (Ready(), Step(3, (0.5, 0.25), 0), Word("hé", 1.0), Marker(5))),
]


def random_value(rng: random.Random, depth: int = 0) -> Any:
    choice = rng.randrange(12 if depth < 3 else 9)
    if choice == 9:
        return [random_value(rng, depth + 1) for _ in range(rng.randrange(6))]
    if choice == 10:
        return {rng.choice(["type", "pcm", "id", "data", 0, 1, b"type", None]): random_value(rng, depth + 1) for _ in range(4)}
    if choice == 11:
        return [rng.choice([0.5, 1, -1, 255, 256, True, math.nan])] * rng.randrange(40)
    plain = (
        None,
        True,
        rng.randrange(-(1 << 63), 1 << 64),
        rng.random(),
        rng.randbytes(rng.randrange(9)),
        "Audio",
        "Marker",
        2,
        "OggOpus",
    )
    return plain[choice]


def random_message(rng: random.Random) -> bytes:
    """Bytes, a document, or a mutated message."""
    kind = rng.random()
    if kind < 0.1:
        return rng.randbytes(rng.randrange(60))
    if kind < 0.3:
        fields = {rng.choice(["type", "pcm", "id", "data", "x"]): random_value(rng) for _ in range(3)}
        fields["type"] = rng.choice(["Audio", "Marker", "OggOpus", "Init", 0, 1, 2, 3, random_value(rng)])
        message: bytes = msgpack.packb(fields)
        return message
    data = bytearray(rng.choice(CORPUS))
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        at = rng.randrange(len(data) + 1)
        match rng.randrange(7):
            case 0:
                del data[at:]
            case 1 if at < len(data):
                data[at] ^= 1 << rng.randrange(8)
            case 2:
                data[at : at + rng.randrange(3)] = rng.randbytes(rng.randrange(4))
            case 3:
                data[at:at] = rng.choice(GIANT)
            case 4:
                data[at:at] = bytes((rng.choice((0x91, 0x81, 0x90, 0x80, 0xC1, 0xC0)),)) * rng.choice((1, 8, 2_000))
            case 5:
                other = rng.choice(CORPUS)
                data[at:] = other[rng.randrange(len(other)) :]
            case _ if at < len(data):
                data[at] = rng.choice((0xC0, 0xC1, 0xC2, 0xC4, 0xCA, 0xCB, 0xCC, 0xD4, 0xD9, 0xDC, 0xDE, 0x00, 0x7F, 0xFF))
    return bytes(data)


def test_random_messages_raise_nothing_but_protocol_errors() -> None:
    """One session takes them all: a bad message must leave it able to read the next."""
    rng = random.Random(20_240_601)
    session = KyutaiSession()
    outcomes: Counter[object] = Counter()
    for _ in range(MESSAGES):
        message = random_message(rng)
        try:
            for action in session.receive(message):
                outcomes[type(action)] += 1
                if isinstance(action, Audio):
                    assert action.samples.dtype == np.float32
                    assert len(action.samples) <= max(len(message), 24_000)
                    assert np.isfinite(action.samples).all()
        except ProtocolError as error:
            outcomes[error.close_code] += 1
            assert str(error).isprintable()  # noqa: PT017 - what was raised is random
            assert len(str(error)) < 250  # noqa: PT017
    marker = encode_marker(7)
    assert list(session.receive(marker)) == [Mark(7)]
    reached = {outcome for outcome, count in outcomes.items() if count >= 20}
    assert reached == {Audio, Mark, Reset, 1003, 1007, 1008}, outcomes


def test_random_events_raise_nothing_but_protocol_errors() -> None:
    rng = random.Random(20_240_602)
    outcomes: Counter[object] = Counter()
    for _ in range(20_000):
        try:
            outcomes[type(decode_event(random_message(rng)))] += 1
        except ProtocolError:
            outcomes[ProtocolError] += 1
    assert outcomes[ProtocolError] > 1_000
    assert outcomes[Marker] > 100


def test_mutated_opus_raises_nothing_but_protocol_errors() -> None:
    """A damaged Ogg stream in any pieces (on moshi-server one such client takes the module down, contract F6)."""
    encoder = OpusEncoder()
    time = np.arange(24_000) / 24_000
    whole = encoder.feed((0.3 * np.sin(2 * np.pi * 220 * time)).astype(np.float32)) + encoder.finish()
    rng = random.Random(20_240_603)
    refused = 0
    for _ in range(400):
        data = bytearray(whole)
        for _ in range(rng.choice((1, 3, 30))):
            at = rng.randrange(len(data))
            match rng.randrange(4):
                case 0:
                    data[at] ^= 1 << rng.randrange(8)
                case 1:
                    del data[at : at + rng.randrange(40)]
                case 2:
                    data[at:at] = rng.randbytes(rng.randrange(40))
                case _:
                    data[at : at + 4] = b"OggS"
        session = KyutaiSession()
        step = rng.choice((50, 400, 5_000))
        try:
            for start in range(0, len(data), step):
                for action in session.receive(encode_opus(bytes(data[start : start + step]))):
                    assert isinstance(action, Audio)
                    assert np.isfinite(action.samples).all()
            list(session.end_of_input())
        except ProtocolError:
            refused += 1
    assert 0 < refused < 400


SIZE = 4 << 20

GREEDY = {
    "empty arrays as samples": b"\x82\xa4type\xa5Audio\xa3pcm\xdd" + SIZE.to_bytes(4, "big") + b"\x90" * SIZE,
    "empty maps as samples": b"\x82\xa4type\xa5Audio\xa3pcm\xdd" + SIZE.to_bytes(4, "big") + b"\x80" * SIZE,
    "small integers as samples": b"\x82\xa4type\xa5Audio\xa3pcm\xdd" + SIZE.to_bytes(4, "big") + b"\x05" * SIZE,
    "late bad sample": b"\x82\xa4type\xa5Audio\xa3pcm\xdd" + SIZE.to_bytes(4, "big") + b"\x05" * (SIZE - 1) + b"\xc3",
    "bytes as data": b"\x82\xa4type\xa7OggOpus\xa4data\xdd" + SIZE.to_bytes(4, "big") + b"\x05" * SIZE,
    "arrays in an unknown key": b"\x82\xa1x\xdd" + SIZE.to_bytes(4, "big") + b"\x90" * SIZE + b"\xa4type\xa4Init",
    "a giant unknown key": b"\x82\xc6" + SIZE.to_bytes(4, "big") + bytes(SIZE) + b"\x01\xa4type\xa4Init",
    "a giant tag": b"\x81\xa4type\xdb" + SIZE.to_bytes(4, "big") + b"A" * SIZE,
    "a giant string": b"\xdb" + SIZE.to_bytes(4, "big") + b"A" * SIZE,
    "deep": b"\x81\xa1x" + b"\x91" * SIZE,
    "more announced than there is": b"\x82\xa4type\xa5Audio\xa3pcm\xdd\xff\xff\xff\xff" + b"\xca\x00\x00\x00\x00" * (SIZE // 5),
    "more bin announced than there is": b"\x82\xa4type\xa5Audio\xa3pcm\xc6\xff\xff\xff\xff" + bytes(SIZE),
    "more keys announced than there are": b"\xdf\xff\xff\xff\xff" + b"\x01\x02" * (SIZE // 2),
}


@pytest.mark.parametrize("name", GREEDY)
def test_no_message_takes_many_times_its_size(name: str) -> None:
    """Naively unpacked, 4 MiB of empty arrays are 270 MiB of Python lists."""
    message = GREEDY[name]
    tracemalloc.start()
    try:
        session = KyutaiSession()
        for action in session.receive(message):
            assert isinstance(action, Audio | Mark | Reset)
    except ProtocolError:
        pass
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 8 * len(message) + (4 << 20)


@pytest.mark.parametrize("giant", GIANT, ids=bytes.hex)
@pytest.mark.parametrize(
    "place", [b"", b"\x82\xa4type", b"\x82\xa4type\xa5Audio\xa3pcm", b"\x92\xa5Audio", b"\x82\xa1x", b"\x82"]
)
def test_giant_announced_length_costs_nothing(giant: bytes, place: bytes) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(ProtocolError):
            decode(place + giant + bytes(20))
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
