"""WebSocket framing without a socket: whatever the cut, the same messages; whatever the bytes, no exception, bounded memory."""

import itertools
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.raw_ws import BINARY, CLOSE, CONTINUATION, PING, TEXT, frame

from moshi_stt.server.framing import Closed, Frame, Ping, Pong, Violation
from moshi_stt.server.websocket import WebSocketFraming

LIMIT = 1_000_000


def all_of(framing: WebSocketFraming, data: bytes, cuts: list[int]) -> list[Frame]:
    """What data completes, fed in pieces that end at these places."""
    places = sorted({min(cut, len(data)) for cut in cuts} | {0, len(data)})
    frames: list[Frame] = []
    for start, end in itertools.pairwise(places):
        frames += framing.feed(data[start:end])
    return frames


messages = st.lists(
    st.one_of(
        st.tuples(st.just(BINARY), st.binary(max_size=300), st.lists(st.integers(0, 300), max_size=3)),
        st.tuples(st.just(TEXT), st.text(max_size=100), st.lists(st.integers(0, 300), max_size=3)),
        st.tuples(st.just(PING), st.binary(max_size=125), st.just([])),
    ),
    max_size=6,
)


@given(messages, st.lists(st.integers(0, 2000), max_size=30))
def test_cut_of_the_bytes_and_of_the_frames_does_not_matter(
    sent: list[tuple[int, bytes | str, list[int]]], cuts: list[int]
) -> None:
    """Fragments are joined, also within a character; control frames come whole between them."""
    data = b""
    expected: list[Frame] = []
    for opcode, content, fragments in sent:
        payload = content.encode() if isinstance(content, str) else content
        places = [0, *sorted(min(place, len(payload)) for place in fragments), len(payload)]
        pieces = [payload[a:b] for a, b in itertools.pairwise(places)]
        for index, piece in enumerate(pieces):
            data += frame(opcode if index == 0 else CONTINUATION, piece, fin=index == len(pieces) - 1)
        expected.append(Ping(payload) if opcode == PING else content)
    framing = WebSocketFraming(LIMIT)
    assert all_of(framing, data, cuts) == expected
    assert framing.pending_bytes == 0


@given(st.binary(max_size=2000), st.lists(st.integers(0, 2000), max_size=10))
def test_any_bytes_give_the_same_frames_however_cut(data: bytes, cuts: list[int]) -> None:
    assert all_of(WebSocketFraming(500), data, cuts) == list(WebSocketFraming(500).feed(data))


@pytest.mark.parametrize("size", [0, 1, 125, 126, 127, 65_535, 65_536, 70_000])
@pytest.mark.parametrize("kind", [TEXT, BINARY])
def test_messages_of_every_length_form(size: int, kind: int) -> None:
    """As RFC 6455 section 5.2 has them, the shortest form each, both ways."""
    payload = b"x" * size
    message = payload.decode() if kind == TEXT else payload
    if size < 126:
        head = bytes((0x80 | kind, size))
    elif size < 65_536:
        head = bytes((0x80 | kind, 126)) + struct.pack("!H", size)
    else:
        head = bytes((0x80 | kind, 127)) + struct.pack("!Q", size)
    framing = WebSocketFraming(LIMIT)
    assert framing.encode(message) == head + payload
    assert framing.feed(frame(kind, payload)) == [message]


def test_message_of_exactly_the_limit_is_taken_and_one_more_byte_is_not() -> None:
    framing = WebSocketFraming(1000)
    assert framing.feed(frame(BINARY, bytes(1000))) == [bytes(1000)]
    (violation,) = framing.feed(frame(BINARY, bytes(1001)))
    assert isinstance(violation, Violation)
    assert violation.code == 1009
    assert "1000" in violation.sentence


def test_too_large_message_is_refused_at_its_header_and_nothing_is_kept() -> None:
    """A claim of 2^40 bytes costs nothing. What follows is thrown away, a Close too (RFC 6455 section 7.1.7)."""
    framing = WebSocketFraming(1000)
    (violation,) = framing.feed(b"\x82\xff" + struct.pack("!Q", 1 << 40))
    assert isinstance(violation, Violation)
    assert framing.broken
    for _ in range(10):
        assert framing.feed(bytes(100_000) + frame(CLOSE, b"\x03\xe8")) == ()
    assert framing.pending_bytes < 1000


def test_tiny_fragments_cost_their_bytes_alone() -> None:
    """A list of a million one-byte fragments would be fifty times the message."""
    framing = WebSocketFraming(LIMIT)
    framing.feed(frame(BINARY, b"", fin=False))
    for _ in range(1000):
        framing.feed(frame(CONTINUATION, b"", fin=False) + frame(CONTINUATION, b"x", fin=False))
    assert framing.pending_bytes == 1000
    assert framing.feed(frame(CONTINUATION, b"y")) == [b"x" * 1000 + b"y"]


@pytest.mark.parametrize(
    ("payload", "expected"),
    [(b"", Closed(1005)), (b"\x03\xe8", Closed(1000)), (b"\x03\xe8bye", Closed(1000)), (b"\x0f\xa1", Closed(4001))],
)
def test_close_is_read(payload: bytes, expected: Closed) -> None:
    framing = WebSocketFraming(LIMIT)
    assert framing.feed(frame(CLOSE, payload) + frame(BINARY, b"after")) == [expected]
    assert not framing.broken


@pytest.mark.parametrize("payload", [b"\x03", b"\x03\xed", b"\x03\xe7", b"\x13\x88"])
def test_close_with_an_impossible_status_is_a_violation(payload: bytes) -> None:
    (violation,) = WebSocketFraming(LIMIT).feed(frame(CLOSE, payload))
    assert isinstance(violation, Violation)
    assert violation.code == 1002


def test_close_amid_a_fragmented_message_is_a_close() -> None:
    framing = WebSocketFraming(LIMIT)
    assert framing.feed(frame(BINARY, b"x", fin=False) + frame(CLOSE, b"\x03\xe8")) == [Closed(1000)]


def test_text_that_is_not_utf8_is_a_violation() -> None:
    """RFC 6455 section 8.1; what came before it in the same read is still there."""
    framing = WebSocketFraming(LIMIT)
    good, violation = framing.feed(frame(TEXT, b"good") + frame(TEXT, b"\xff\xfe") + frame(TEXT, b"after"))
    assert good == "good"
    assert isinstance(violation, Violation)
    assert violation.code == 1007
    assert framing.broken


def test_pongs_are_heard_and_nothing_is_answered_by_the_library() -> None:
    framing = WebSocketFraming(LIMIT)
    assert framing.feed(frame(10, b"p") + frame(PING, b"q") * 100) == [Pong(b"p")] + [Ping(b"q")] * 100
    assert framing._protocol.data_to_send() == []
    assert framing.ping() == b"\x89\x00"
    assert framing.pong(b"x") == b"\x8a\x01x"


@pytest.mark.parametrize("reason", ["", "short", "x" * 200, "é" * 100, "🎤" * 50, "\udcff"])
def test_close_reason_fits_and_is_whole_characters(reason: str) -> None:
    written = WebSocketFraming(LIMIT).close(1011, reason)
    assert written[:1] == b"\x88"
    assert written[1] == len(written) - 2 <= 125
    text = written[4:].decode()
    assert reason.startswith(text) or text == "?"
