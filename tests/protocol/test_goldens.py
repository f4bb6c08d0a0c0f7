"""The golden bytes of the contract, and every message that moshi-server was recorded sending."""

import json
from pathlib import Path

import numpy as np
import pytest

from moshi_stt.engine.commands import Audio, Mark
from moshi_stt.events import AnyEvent, EndWord, Error, Marker, Ready, Step, Word
from moshi_stt.protocol import (
    OggOpus,
    decode,
    decode_event,
    encode,
    encode_audio,
    encode_marker,
    encode_opus,
)

MARKER = "82 a474797065 a64d61726b6572 a26964"

OUTBOUND: list[tuple[AnyEvent, str]] = [
    (Ready(), "81 a474797065 a55265616479"),
    (
        Error("no free channels"),
        "82 a474797065 a54572726f72 a76d657373616765 b06e6f2066726565206368616e6e656c73",
    ),
    (Word("hé", 1.04), "83 a474797065 a4576f7264 a474657874 a368c3a9 aa73746172745f74696d65 cb3ff0a3d70a3d70a4"),
    (Word("a", 0.0), "83 a474797065 a4576f7264 a474657874 a161 aa73746172745f74696d65 cb0000000000000000"),
    (EndWord(2.0), "82 a474797065 a7456e64576f7264 a973746f705f74696d65 cb4000000000000000"),
    (Marker(0), MARKER + "00"),
    (Marker(127), MARKER + "7f"),
    (Marker(128), MARKER + "cc80"),
    (Marker(-1), MARKER + "ff"),
    (Marker(-33), MARKER + "d0df"),
    (Marker(70_000), MARKER + "ce00011170"),
    (Marker(-(1 << 63)), MARKER + "d38000000000000000"),
    (Marker((1 << 63) - 1), MARKER + "cf7fffffffffffffff"),
    (
        Step(3, (0.5, 0.25, 1e-5, 1.0), 22_080),
        "84 a474797065 a453746570 a8737465705f696478 03 a3707273 94 ca3f000000 ca3e800000 ca3727c5ac ca3f800000 "
        "ac62756666657265645f70636d cd5640",
    ),
]


@pytest.mark.parametrize(("event", "golden"), OUTBOUND, ids=lambda value: repr(value)[:40])
def test_event_is_encoded_to_the_golden_bytes(event: AnyEvent, golden: str) -> None:
    assert encode(event) == bytes.fromhex(golden)


def test_nan_pause_is_the_golden_nan() -> None:
    message = encode(Step(0, (float("nan"), 0.0, 0.0, 0.0), 0))
    assert bytes.fromhex("94 ca7fc00000 ca00000000") in message
    assert bytes.fromhex("91 ca7fc00000") in encode(Step(0, (float("nan"),), 0))


def test_what_is_not_on_this_wire_is_left_out() -> None:
    assert encode(Error("x", close_code=1008)) == encode(Error("x"))


AUDIO_FIELD = "92 ca3f000000 cabe800000"


@pytest.mark.parametrize("golden", ["82 a474797065 a5417564696f a370636d" + AUDIO_FIELD, "92 a5417564696f" + AUDIO_FIELD])
def test_golden_audio_is_read(golden: str) -> None:
    inbound = decode(bytes.fromhex(golden))
    assert isinstance(inbound, Audio)
    assert inbound.samples.dtype == np.float32
    assert inbound.samples.tolist() == [0.5, -0.25]


def test_golden_marker_and_opus_are_read() -> None:
    assert decode(bytes.fromhex(MARKER + "05")) == Mark(5)
    golden_opus = "82 a474797065 a74f67674f707573 a464617461 93 4f 67 ccff"
    assert decode(bytes.fromhex(golden_opus)) == OggOpus(bytes([79, 103, 255]))


def test_client_sends_the_golden_bytes() -> None:
    assert encode_audio([0.5, -0.25]) == bytes.fromhex("82 a474797065 a5417564696f a370636d" + AUDIO_FIELD)
    assert encode_marker(5) == bytes.fromhex(MARKER + "05")
    assert encode_opus(bytes([79, 103, 255])) == bytes.fromhex("82 a474797065 a74f67674f707573 a464617461 93 4f 67 ccff")


RECORDINGS = [
    *(
        "conditioning_delay",
        "delay_15",
        "init_midway",
        "malformed",
        "marker_alone",
        "marker_first",
        "marker_partial",
        "no_heads",
    ),
    *("no_slot", "one_message", "slot_reused", "small_chunks", "text_frame", "two_streams", "unbatched", "words", "words_1b"),
]


@pytest.mark.parametrize("name", RECORDINGS)
def test_recorded_message_survives_decoding_and_encoding(shared: Path, name: str) -> None:
    log = json.loads((shared / "goldens" / "recorded" / f"{name}.json").read_text())["log"]
    messages = [bytes.fromhex(entry[2]) for entry in log if entry[1] == "recv"]
    assert messages
    for message in messages:
        assert encode(decode_event(message)) == message


def test_no_recording_is_left_out(shared: Path) -> None:
    there = {path.stem for path in (shared / "goldens" / "recorded").glob("*.json")}
    assert there == {*RECORDINGS, "http"}
