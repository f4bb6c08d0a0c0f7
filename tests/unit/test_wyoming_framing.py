"""Wyoming's bytes: events cut anywhere, data in the line or after it, and what is malformed."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moshi_stt.server.doors.wyoming_framing import MOST_LINE_BYTES, WyomingFraming
from moshi_stt.server.framing import Violation


def event(kind: str, data: dict[str, object] | None = None, payload: bytes = b"", **inline: object) -> bytes:
    body = json.dumps(data).encode() if data is not None else b""
    head = {"type": kind, "data": inline, "data_length": len(body) or None, "payload_length": len(payload), "version": "1"}
    return json.dumps(head).encode() + b"\n" + body + payload


EVENTS = (
    event("ping") + event("audio-chunk", {"rate": 16_000}, b"\n{}\n\x00", width=2) + event("audio-stop", {"timestamp": None})
)


def shown(framing: WyomingFraming, data: bytes, size: int) -> list[tuple[str, dict[str, object], bytes]]:
    frames = [frame for start in range(0, len(data), size) for frame in framing.feed(data[start : start + size])]
    out = []
    for frame in frames:
        assert isinstance(frame, bytes), frame
        head, _, payload = frame.partition(b"\n")
        decoded = json.loads(head)
        out.append((decoded["type"], decoded["data"], payload))
    return out


@settings(max_examples=50, deadline=None)
@given(st.integers(1, len(EVENTS)))
def test_events_cut_anywhere(size: int) -> None:
    framing = WyomingFraming()
    assert shown(framing, EVENTS, size) == [
        ("ping", {}, b""),
        ("audio-chunk", {"width": 2, "rate": 16_000}, b"\n{}\n\x00"),
        ("audio-stop", {"timestamp": None}, b""),
    ]
    assert framing.pending_bytes == 0


def test_an_answer_reads_as_it_was_written() -> None:
    framing = WyomingFraming()
    wire = framing.encode(json.dumps({"type": "transcript", "data": {"text": "été"}}))
    assert shown(WyomingFraming(), wire, 3) == [("transcript", {"text": "été"}, b"")]
    assert b"data_length" not in framing.encode('{"type": "transcript-stop", "data": {}}')


@pytest.mark.parametrize(
    "data",
    [
        b"nonsense\n", b"[]\n", b'{"type": 5}\n', b'{"type": "x", "data": 5}\n', b'{"type": "x", "data_length": -1}\n',
        b'{"type": "x", "data_length": "1"}\n', b'{"type": "x", "payload_length": 99999999}\n',
        b'{"type": "x", "data_length": 2}\n[]',
        b'{"type": "x", "data_length": 1}\n{', b"[" * 5_000 + b"\n", b"x" * (MOST_LINE_BYTES + 1),
    ],
)  # fmt: skip
def test_what_is_malformed_ends_it(data: bytes) -> None:
    framing = WyomingFraming()
    (frame,) = framing.feed(data)
    assert isinstance(frame, Violation)
    assert framing.feed(EVENTS) == ()
    assert framing.pending_bytes == 0
