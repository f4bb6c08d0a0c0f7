"""Framing without a socket: whatever the cut, the same messages; whatever the bytes, no exception and bounded memory."""

import itertools
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.raw_ws import frame

from moshi_stt.server import frames
from moshi_stt.server.frames import BINARY, CLOSE, PING, TEXT, VIOLATION, FrameParser, Message, close_frame, header

LIMIT = 1_000_000


def all_of(parser: FrameParser, data: bytes, cuts: list[int]) -> list[Message]:
    """The messages of data, fed in pieces that end at these places."""
    places = sorted({min(cut, len(data)) for cut in cuts} | {0, len(data)})
    messages: list[Message] = []
    for start, end in itertools.pairwise(places):
        messages += parser.feed(data[start:end])
    return messages


messages = st.lists(
    st.tuples(st.sampled_from([BINARY, TEXT, PING]), st.binary(max_size=300), st.lists(st.integers(0, 300), max_size=3)),
    max_size=6,
)


@given(messages, st.lists(st.integers(0, 2000), max_size=30))
def test_cut_of_the_bytes_and_of_the_frames_does_not_matter(sent: list[tuple[int, bytes, list[int]]], cuts: list[int]) -> None:
    """Fragments are joined; control frames come whole between them."""
    data, expected = b"", []
    for opcode, payload, fragments in sent:
        payload = payload[:125] if opcode == PING else payload
        places = [0, *sorted(min(place, len(payload)) for place in fragments), len(payload)]
        pieces = [payload] if opcode == PING else [payload[a:b] for a, b in itertools.pairwise(places)]
        for index, piece in enumerate(pieces):
            data += frame(opcode if index == 0 else 0, piece, fin=index == len(pieces) - 1)
        expected.append((opcode, payload))
    parser = FrameParser(LIMIT)
    got = all_of(parser, data, cuts)
    assert [(message.opcode, message.payload) for message in got] == expected
    assert parser.pending_bytes == 0


@given(st.binary(max_size=2000), st.lists(st.integers(0, 2000), max_size=10))
def test_any_bytes_give_the_same_messages_however_cut(data: bytes, cuts: list[int]) -> None:
    """No exception, and a violation is one whatever came in which read."""
    assert all_of(FrameParser(500), data, cuts) == FrameParser(500).feed(data)


@given(st.binary(min_size=0, max_size=40), st.binary(min_size=4, max_size=4), st.integers(4, 9))
def test_unmask_is_exclusive_or_with_the_repeated_key(payload: bytes, key: bytes, start: int) -> None:
    data = bytes(start - 4) + key + payload
    assert frames.unmask(data, start, len(payload)) == bytes(byte ^ key[i % 4] for i, byte in enumerate(payload))


@pytest.mark.parametrize("size", [0, 1, 125, 126, 127, 65_535, 65_536, 70_000])
def test_header_of_every_length_form(size: int) -> None:
    """As RFC 6455 section 5.2 has them, the shortest form each."""
    written = header(BINARY, size)
    assert written[0] == 0x82
    if size < 126:
        assert written[1:] == bytes((size,))
    elif size < 65_536:
        assert written[1:] == b"\x7e" + struct.pack("!H", size)
    else:
        assert written[1:] == b"\x7f" + struct.pack("!Q", size)


@pytest.mark.parametrize("size", [125, 126, 65_535, 65_536])
def test_client_frames_of_every_length_form(size: int) -> None:
    payload = bytes(range(256)) * (size // 256 + 1)
    assert FrameParser(LIMIT).feed(frame(BINARY, payload[:size])) == [Message(BINARY, payload[:size])]


def test_message_of_exactly_the_limit_is_taken_and_one_more_byte_is_not() -> None:
    parser = FrameParser(1000)
    assert parser.feed(frame(BINARY, bytes(1000)))[0].opcode == BINARY
    (violation,) = parser.feed(frame(BINARY, bytes(1001)))
    assert (violation.opcode, violation.code) == (VIOLATION, 1009)


def test_too_large_message_is_refused_at_its_header_and_not_kept() -> None:
    """A claim of 2^40 bytes costs nothing; a Close behind a skipped message is still seen."""
    parser = FrameParser(1000)
    assert parser.feed(b"\x82\xff" + struct.pack("!Q", 1 << 40))[0].code == 1009
    assert parser.feed(bytes(100_000)) == []
    assert parser.pending_bytes == 0
    parser = FrameParser(1000)
    data = frame(BINARY, bytes(5000)) + frame(CLOSE, struct.pack("!H", 1000))
    assert [message.opcode for message in all_of(parser, data, list(range(0, len(data), 700)))] == [VIOLATION, CLOSE]


def test_tiny_fragments_cost_their_bytes_alone() -> None:
    """A list of a million one-byte fragments would be fifty times the message."""
    parser = FrameParser(LIMIT)
    parser.feed(frame(BINARY, b"", fin=False))
    for _ in range(1000):
        parser.feed(frame(0, b"", fin=False) + frame(0, b"x", fin=False))
    assert parser.pending_bytes == 1000
    assert parser.feed(frame(0, b"y")) == [Message(BINARY, b"x" * 1000 + b"y")]


@pytest.mark.parametrize(
    ("payload", "code", "reason"),
    [
        (b"", 1005, b""),
        (b"\x03\xe8", 1000, b""),
        (b"\x03\xe8bye", 1000, b"bye"),
        (b"\x03", 1002, b""),
        (b"\x03\xed", 1002, b""),
    ],
)
def test_close_is_read(payload: bytes, code: int, reason: bytes) -> None:
    assert FrameParser(LIMIT).feed(frame(CLOSE, payload)) == [Message(CLOSE, reason, code)]


@pytest.mark.parametrize("reason", ["", "short", "x" * 200, "é" * 100, "🎤" * 50, "\udcff"])
def test_close_reason_fits_and_is_whole_characters(reason: str) -> None:
    written = close_frame(1011, reason)
    assert written[0] == 0x88
    assert written[1] == len(written) - 2 <= 125
    text = written[4:].decode()
    assert reason.startswith(text) or text == "?"
