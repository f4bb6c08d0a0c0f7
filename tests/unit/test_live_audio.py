"""Live audio of any format: any pieces give what the whole gives, headers may lie about their length, G.711 by its tables."""

import io
import wave

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from moshi_stt.audio import g711
from moshi_stt.audio.live import ContainerInput, LiveInput, PcmFormat, PcmInput, WavInput
from moshi_stt.errors import AudioError

TONE = (0.5 * np.sin(np.arange(16_000) * 2 * np.pi * 440 / 16_000)).astype(np.float32)
LINEAR = (TONE * 32_767).astype("<i2")


def everything(source: LiveInput, data: bytes, cuts: list[int]) -> NDArray[np.float32]:
    """What comes of one channel, the bytes cut into pieces of these sizes, over and over."""
    out, start, index = [], 0, 0
    while start < len(data):
        size = cuts[index % len(cuts)]
        out += [pieces[0] for pieces in source.feed(data[start : start + size])]
        start, index = start + size, index + 1
    return np.concatenate([*out, source.flush()[0]])


def wav(width: int, channels: int = 1, rate: int = 16_000) -> bytes:
    samples = np.repeat(TONE[:, None], channels, axis=1)
    scaled = {
        1: (samples * 127 + 128).astype(np.uint8),
        2: (samples * 32_767).astype("<i2"),
        4: (samples * (2**31 - 1)).astype("<i4"),
    }
    raw = scaled[4].reshape(-1).view(np.uint8).reshape(-1, 4)[:, 1:].tobytes() if width == 3 else scaled[width].tobytes()
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(raw)
    return buffer.getvalue()


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 5_000), min_size=1, max_size=5))
def test_any_pieces_give_what_the_whole_gives(cuts: list[int]) -> None:
    whole = everything(PcmInput(PcmFormat("linear16", 16_000)), LINEAR.tobytes(), [1 << 20])
    assert len(whole) == 24_000
    assert np.array_equal(everything(PcmInput(PcmFormat("linear16", 16_000)), LINEAR.tobytes(), cuts), whole)
    assert np.array_equal(everything(ContainerInput(), wav(2), cuts), whole)


@pytest.mark.parametrize("width", [1, 2, 3, 4])
@pytest.mark.parametrize("channels", [1, 2])
def test_wav_of_every_width(width: int, channels: int) -> None:
    heard = everything(WavInput(), wav(width, channels), [777])
    whole = everything(PcmInput(PcmFormat("linear16", 16_000)), LINEAR.tobytes(), [1 << 20])
    assert np.abs(heard - whole).max() < (0.02 if width == 1 else 1e-3)


@pytest.mark.parametrize("size", [0, 0xFFFF_FFFF, 1_000])
def test_wav_that_announces_another_length(size: int) -> None:
    data = bytearray(wav(2))
    at = data.index(b"data") + 4
    data[at : at + 4] = size.to_bytes(4, "little")
    heard = everything(ContainerInput(), bytes(data), [333])
    assert len(heard) == 24_000 if size != 1_000 else len(heard) >= 750


def test_wav_with_other_chunks_before_and_after_the_samples() -> None:
    data = wav(2)
    at = data.index(b"data")
    data = (
        data[:at]
        + b"LIST"
        + (5).to_bytes(4, "little")
        + b"hello\x00"
        + data[at:]
        + b"LIST"
        + (4).to_bytes(4, "little")
        + b"abcd"
    )
    assert len(everything(WavInput(), data, [7])) == 24_000


def test_channels_apart_and_mixed() -> None:
    both = np.stack([LINEAR, np.zeros_like(LINEAR)], axis=1).tobytes()
    apart = PcmInput(PcmFormat("linear16", 16_000, 2), mix=False)
    pieces = [*apart.feed(both), apart.flush()]
    left, right = (np.concatenate([piece[index] for piece in pieces]) for index in (0, 1))
    mixed = everything(PcmInput(PcmFormat("linear16", 16_000, 2)), both, [999])
    assert np.abs(right).max() == 0
    assert np.abs(mixed - left / 2).max() < 1e-4


def test_a_flush_in_the_middle_loses_no_time() -> None:
    source = PcmInput(PcmFormat("linear16", 16_000))
    total = 0
    for start in range(0, len(LINEAR), 3_000):
        total += sum(len(piece[0]) for piece in source.feed(LINEAR[start : start + 3_000].tobytes())) + len(source.flush()[0])
    assert abs(total - 24_000) <= 6


def test_g711_by_known_values() -> None:
    """ITU-T G.711: μ-law 0xFF and 0x7F are ±0, 0x80 is the loudest; A-law 0xD5 is the smallest step above 0."""
    mulaw, alaw = g711.MULAW * 32_768, g711.ALAW * 32_768
    assert (mulaw[0xFF], mulaw[0x80], mulaw[0x00]) == (0, 32_124, -32_124)
    assert (alaw[0xD5], alaw[0x55], alaw[0xAA], alaw[0x2A]) == (8, -8, 32_256, -32_256)
    assert len(set(alaw.tolist())) == 256
    assert np.array_equal(g711.decode(bytes(range(256)), g711.MULAW), g711.MULAW)


def test_samples_that_are_no_numbers_count_as_silence() -> None:
    bad = np.array([np.nan, np.inf, -np.inf, 0.5], "<f4").repeat(1_000)
    assert np.isfinite(everything(PcmInput(PcmFormat("linear32", 24_000)), bad.tobytes(), [100])).all()


@pytest.mark.parametrize(
    "data", [b"nonsense", b"RIFF\x00\x00\x00\x00AVI ", b"RIFF\x00\x00\x00\x00WAVEdata\x04\x00\x00\x00abcd"]
)
def test_what_is_no_container(data: bytes) -> None:
    with pytest.raises(AudioError):
        everything(ContainerInput(), data, [100])


@pytest.mark.parametrize(("rate", "channels"), [(7_999, 1), (48_001, 1), (16_000, 0), (16_000, 17)])
def test_formats_out_of_bounds(rate: int, channels: int) -> None:
    with pytest.raises(AudioError):
        PcmFormat("linear16", rate, channels)
