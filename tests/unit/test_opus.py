"""Ogg-Opus: any packets, any pieces, exact length and place in time; damage is named, and nothing grows without bound."""

import io
import random
import sys
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.media import encode, noise, shift_of

from moshi_stt.audio.ogg import MAX_PACKET_BYTES, OggReader, checksum, encode_page
from moshi_stt.audio.opus import OpusEncoder, OpusStream, packet_samples
from moshi_stt.audio.opus_av import OpusStreamReader
from moshi_stt.errors import AudioError


@pytest.fixture(params=["sphn", "av"], autouse=True)
def binding(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each way to reach libopus."""
    if request.param == "sphn":
        pytest.importorskip("sphn", reason="sphn has no wheel for this machine")
    else:
        monkeypatch.setitem(sys.modules, "sphn", None)
    return str(request.param)


SPEECH = noise(2.0, 48_000)
MONO = encode(SPEECH, 48_000, "opus")
SERIAL = 7


def head(channels: int = 1, pre_skip: int = 312, gain: int = 0, mapping: int = 0) -> bytes:
    data = b"OpusHead\x01" + bytes([channels]) + pre_skip.to_bytes(2, "little") + (48_000).to_bytes(4, "little")
    return encode_page(data + gain.to_bytes(2, "little", signed=True) + bytes([mapping]), SERIAL, 0, 0, first=True)


TAGS = encode_page(b"OpusTags" + bytes(8), SERIAL, 1, 0)


def continuing(page: bytes) -> bytes:
    """The page, its first packet marked as going on from the page before."""
    page = page[:5] + b"\x01" + page[6:22] + bytes(4) + page[26:]
    return page[:22] + checksum(page).to_bytes(4, "little") + page[26:]


def long_page(body: bytes, sequence: int, continued: bool) -> bytes:
    """A full page of a packet that goes on in the next one: 255 segments of 255 bytes."""
    page = encode_page(body[:-1], SERIAL, sequence, -1)
    page = page[:27] + b"\xff" * 255 + page[27 + 255 :] + body[-1:]
    page = page[:5] + bytes([continued]) + page[6:22] + bytes(4) + page[26:]
    return page[:22] + checksum(page).to_bytes(4, "little") + page[26:]


def feed(stream: OpusStream, data: bytes) -> np.ndarray:
    """All that these bytes decode to."""
    return np.concatenate([np.zeros(0, np.float32), *stream.pieces(data)])


def decode(data: bytes, size: int | None = None) -> np.ndarray:
    stream = OpusStream()
    pieces = [feed(stream, data[start : start + (size or len(data))]) for start in range(0, len(data), size or len(data))]
    return np.concatenate([*pieces, stream.finish()])


@pytest.mark.parametrize("frame_ms", ["2.5", "5", "10", "20", "40", "60", "120"])
@pytest.mark.parametrize("page_us", ["20000", "1000000", "30000000"])
def test_any_packet_and_page_length_gives_every_sample_in_its_place(frame_ms: str, page_us: str) -> None:
    """Pages of up to 30 s: sphn alone fails beyond 5 s in one call."""
    data = encode(noise(6.0, 48_000), 48_000, "opus", options={"page_duration": page_us}, frame_duration=frame_ms)
    pcm = decode(data)
    assert len(pcm) == 144_000
    assert shift_of(pcm, noise(6.0, 48_000)[::2]) == 0


@pytest.mark.parametrize("size", [1, 7, 240, 4_096])
def test_the_output_does_not_depend_on_the_pieces(size: int) -> None:
    np.testing.assert_array_equal(decode(MONO, size), decode(MONO))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 3_000), max_size=40))
def test_the_output_does_not_depend_on_any_pieces(sizes: list[int]) -> None:
    stream, start, pieces = OpusStream(), 0, []
    for size in [*sizes, len(MONO)]:
        pieces += list(stream.pieces(MONO[start : start + size]))
        start += size
    np.testing.assert_array_equal(np.concatenate(pieces), decode(MONO))


def test_pieces_are_lazy_and_about_a_second() -> None:
    data = encode(noise(10.0, 48_000), 48_000, "opus", options={"page_duration": "30000000"})
    lengths = [len(piece) for piece in OpusStream().pieces(data)]
    assert sum(lengths) == 240_000
    assert max(lengths) <= 26_880


def test_stereo_is_mixed_by_the_average() -> None:
    left = np.stack([SPEECH, np.zeros_like(SPEECH)], axis=1)
    pcm = decode(encode(left, 48_000, "opus", b="256k"))
    expected = SPEECH[::2] / 2
    assert np.sqrt(np.mean((pcm - expected) ** 2)) < 0.3 * np.sqrt(np.mean(expected**2))


def test_pre_skip_is_trimmed_and_gain_applied() -> None:
    reader = OggReader()
    packets = [packet.data for packet in reader.packets(MONO)][2:]
    body = b"".join(encode_page(packet, SERIAL, 2 + index, -1) for index, packet in enumerate(packets))
    plain = decode(head(pre_skip=0) + TAGS + body)
    skipped = decode(head(pre_skip=4_001) + TAGS + body)
    np.testing.assert_array_equal(skipped, plain[2_000:])
    louder = decode(head(pre_skip=0, gain=round(6.0206 * 256)) + TAGS + body)
    np.testing.assert_allclose(louder, plain * 2, rtol=1e-3)


def test_chained_streams_follow_each_other() -> None:
    np.testing.assert_array_equal(decode(MONO + MONO, 999), np.concatenate([decode(MONO), decode(MONO)]))


def test_another_logical_stream_beside_it_is_passed_over() -> None:
    other = encode_page(b"fishead\0" + bytes(56), 99, 0, 0, first=True)
    first_page = len(head())
    data = MONO[:first_page] + other + MONO[first_page:]
    np.testing.assert_array_equal(decode(data), decode(MONO))


def test_a_long_comment_header_over_many_pages_is_passed_over() -> None:
    pages = [long_page(b"OpusTags" + bytes(255 * 255 - 8), 1, continued=False)]
    pages += [long_page(bytes(255 * 255), 2 + index, continued=True) for index in range(2)]
    pages.append(continuing(encode_page(bytes(99), SERIAL, 4, 0)))
    packets = [packet.data for packet in OggReader().packets(MONO)][2:]
    body = b"".join(encode_page(packet, SERIAL, 9 + index, -1) for index, packet in enumerate(packets))
    np.testing.assert_array_equal(decode(head() + b"".join(pages) + body), decode(head() + TAGS + body))


@pytest.mark.parametrize(
    ("start", "named"),
    [
        (b"RIFF\x24\x08\0\0WAVEfmt ", "WAV"),
        (b"\x1aE\xdf\xa3\x01\0\0\0", "MediaRecorder"),
        (b"ID3\x04\0\0", "MP3"),
        (b"fLaC\0\0\0\x22", "FLAC"),
        (b"\0\0\0\x20ftypM4A ", "MP4"),
        (b"\xfc\xff\xfe\x01", "fc ff fe 01"),
    ],
)
def test_what_is_no_ogg_is_named(start: bytes, named: str) -> None:
    with pytest.raises(AudioError, match=named):
        feed(OpusStream(), start)


def test_another_codec_in_ogg_is_named() -> None:
    vorbis = encode(np.stack([noise(0.2), noise(0.2)], axis=1), 24_000, "vorbis")
    with pytest.raises(AudioError, match="carries Vorbis"):
        decode(vorbis)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (head()[:40], None),
        (head(channels=6, mapping=1), "6 channels"),
        (head(channels=0), "0 channels"),
        (encode_page(b"OpusHead\x01\x01", SERIAL, 0, 0, first=True), "10 bytes"),
        (head() + encode_page(b"\xf8\xff\xfe", SERIAL, 1, 0), "expected OpusTags"),
        (head() + TAGS + encode_page(b"\xfb", SERIAL, 2, 0), "one byte"),
        (head() + TAGS + encode_page(b"\xfb\x3f" + bytes(99), SERIAL, 2, 0), "at most 120 ms"),
        (head() + TAGS + encode_page(b"\xf9" + bytes(3), SERIAL, 2, 0), "cannot be decoded"),
        (head() + TAGS + encode_page(b"\xf8" + bytes(MAX_PACKET_BYTES - 2), SERIAL, 2, 0), "cannot be decoded"),
        (TAGS, "does not start with OpusHead"),
        (MONO[:300] + b"garbage" + MONO[300:], "checksum|expected"),
        (MONO[:150] + bytes([MONO[150] ^ 1]) + MONO[151:], "checksum"),
        (MONO[:4] + b"\x07" + MONO[5:], "version 7"),
    ],
)
def test_damage_is_named_and_stays(data: bytes, message: str | None) -> None:
    stream = OpusStream()
    if message is None:
        feed(stream, data)
        with pytest.raises(AudioError, match="before its header"):
            stream.finish()
        return
    with suppress(AudioError):
        feed(stream, data)
    for call in (lambda: feed(stream, b""), stream.finish, lambda: feed(stream, MONO)):
        with pytest.raises(AudioError, match=message):
            call()


def test_what_came_before_the_damage_is_delivered() -> None:
    pages = encode(SPEECH, 48_000, "opus", options={"page_duration": "20000"})
    cut = pages.index(b"OggS", 2 * len(pages) // 3)
    stream = OpusStream()
    pieces: list[np.ndarray] = []
    with pytest.raises(AudioError, match="where an Ogg page"):
        pieces.extend(stream.pieces(pages[:cut] + b"garbage"))
    heard = np.concatenate(pieces)
    np.testing.assert_array_equal(heard, decode(pages)[: len(heard)])
    assert len(heard) > 24_000
    with pytest.raises(AudioError, match="where an Ogg page"):
        feed(stream, b"")


def test_one_message_decodes_to_pieces_of_a_bounded_length(binding: str) -> None:
    """Two bytes can stand for 120 ms of silence: a megabyte would be 17 hours."""
    silence = bytes([11 << 3 | 1])  # two frames of 60 ms, both empty
    body = b"".join(encode_page(silence, SERIAL, 2 + index, -1) for index in range(100))
    lengths = [len(piece) for piece in OpusStream().pieces(head() + TAGS + body)]
    assert max(lengths) <= 26_880
    late = OpusStreamReader.delay if binding == "av" else 0  # a stream that goes on: its last samples are still to come
    assert sum(lengths) == 100 * 2_880 - 156 - late


def test_an_empty_message_is_nothing() -> None:
    stream = OpusStream()
    assert len(feed(stream, b"")) == 0
    assert len(stream.finish()) == 0


def test_random_packets_raise_nothing_but_audio_errors() -> None:
    rng = random.Random(0)
    for _ in range(2_000):
        stream = OpusStream()
        try:
            feed(stream, head() + TAGS)
            for index in range(3):
                feed(stream, encode_page(rng.randbytes(rng.randrange(80)), SERIAL, 2 + index, rng.randrange(-1, 9_999)))
        except AudioError:
            pass


def test_mutated_files_raise_nothing_but_audio_errors() -> None:
    rng = random.Random(1)
    for _ in range(300):
        data = bytearray(MONO)
        for _ in range(rng.randrange(1, 4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        stream = OpusStream()
        try:
            for start in range(0, len(data), 700):
                feed(stream, bytes(data[start : start + 700]))
        except AudioError:
            pass


@pytest.mark.parametrize(
    ("packet", "milliseconds"),
    [(b"", 0), (b"\x00", 10), (b"\x18", 60), (b"\x19" + bytes(2), 120), (b"\x80", 2.5), (b"\xfb\x06", 120), (b"\x6b\x02", 40)],
)
def test_packet_length_is_known_before_decoding(packet: bytes, milliseconds: float) -> None:
    assert packet_samples(packet) == milliseconds * 24


def test_checksum_is_that_of_other_programs() -> None:
    assert checksum(MONO[:22] + bytes(4) + MONO[26 : 28 + MONO[27]]) == int.from_bytes(MONO[22:26], "little")


@pytest.mark.parametrize("size", [7, 240, 1_920, 48_000])
def test_the_encoder_keeps_every_sample_in_its_place(size: int) -> None:
    pcm = noise(1.99)
    encoder = OpusEncoder()
    data = b"".join(encoder.feed(pcm[start : start + size]) for start in range(0, len(pcm), size)) + encoder.finish()
    back = decode(data)
    assert len(pcm) <= len(back) <= len(pcm) + 960
    assert abs(shift_of(back, pcm)) <= 1


def test_the_encoders_stream_is_one_that_other_programs_read() -> None:
    import av

    encoder = OpusEncoder()
    data = encoder.feed(noise(1.0)) + encoder.finish()
    with av.open(io.BytesIO(data)) as container:
        assert sum(frame.samples for frame in container.decode(audio=0)) >= 48_000
