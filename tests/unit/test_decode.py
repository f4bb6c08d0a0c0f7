"""Files: every format at every rate to the same sound at the same time; damage is named behind what could be decoded."""

import io
import tracemalloc
from pathlib import Path

import av
import numpy as np
import pytest
import soxr
from tests.support.media import FORMATS, Pipe, encode, noise, shift_of

from moshi_stt.audio.decode import decode_file, probe, read_file
from moshi_stt.errors import AudioError

LOSSLESS = {"wav", "wav-float", "wav-double", "wav-24bit", "aiff", "flac"}


def cases() -> list[tuple[str, int, int]]:
    found = []
    for name in FORMATS:
        for rate in (8_000, 16_000, 24_000, 44_100, 48_000):
            for channels in (1, 2):
                if "opus" in FORMATS[name][1] and rate == 44_100:
                    continue
                if name == "vorbis" and (channels == 1 or rate in (16_000, 48_000)):
                    continue  # FFmpeg's own encoder has stereo alone, and not these rates
                found.append((name, rate, channels))
    return found


def decoded(data: bytes) -> tuple[np.ndarray, str]:
    """What comes of damaged bytes, and what is said of them."""
    heard: list[np.ndarray] = []
    try:
        heard.extend(decode_file(io.BytesIO(data)))
    except AudioError as error:
        return np.concatenate(heard), str(error)
    return np.concatenate(heard), ""


@pytest.mark.parametrize(("format", "rate", "channels"), cases())
def test_every_format_gives_the_same_sound_at_the_same_time(format: str, rate: int, channels: int) -> None:
    pcm = noise(1.5, rate)
    data = encode(pcm if channels == 1 else np.stack([pcm, pcm / 2], axis=1), rate, format)
    expected = soxr.resample(pcm * (1 if channels == 1 else 0.75), rate, 24_000)
    for source in (io.BytesIO(data), Pipe(data)):
        got = read_file(source)
        assert got.dtype == np.float32
        assert shift_of(got, expected) == 0
        # Only encoders' padding may follow, and only where the file does not say how much there is.
        assert 0 <= len(got) - len(expected) <= (0 if format in LOSSLESS or "opus" in format else 1_500)
        if format in LOSSLESS:
            np.testing.assert_allclose(got, expected, atol=1e-4)


def test_a_file_is_read_by_name_and_probed(tmp_path: Path) -> None:
    path = tmp_path / "speech.flac"
    path.write_bytes(encode(noise(1.25, 44_100), 44_100, "flac"))
    assert len(read_file(path)) == len(read_file(str(path))) == 30_000
    info = probe(path)
    assert (info.codec, info.sample_rate, info.channels, info.duration_seconds) == ("flac", 44_100, 1, 1.25)


def test_probing_leaves_a_file_object_where_it_was() -> None:
    file = io.BytesIO(encode(noise(1.0), 24_000))
    assert probe(file).duration_seconds == 1.0
    assert len(read_file(file)) == 24_000


@pytest.mark.parametrize(
    ("format", "channels"),
    [("wav-float", 6), ("flac", 8), ("m4a", 6), ("m4a", 8), ("opus", 8), ("webm", 8), ("wav", 16)],
)
def test_of_many_channels_those_with_sound_are_averaged(format: str, channels: int) -> None:
    """Eight planes and more: PyAV itself reads past their end there, which ended the process."""
    pcm = np.stack([noise(0.5, 48_000) * gain for gain in [0.6, 0.9, *[0] * (channels - 2)]], axis=1)
    got = read_file(io.BytesIO(encode(pcm, 48_000, format)))
    expected = noise(0.5) * 1.5 / 2
    assert abs(shift_of(got, expected)) <= (0 if format in LOSSLESS else 2)  # by the encoder, which differs with PyAV's version
    loudness = np.sqrt(np.mean(got**2)) / np.sqrt(np.mean(expected**2))
    assert abs(loudness - 1) < (0.02 if format in LOSSLESS else 0.3)


@pytest.mark.parametrize("value", [np.nan, np.inf, -1e35])
def test_a_sample_that_is_none_is_taken_for_silence(value: float) -> None:
    pcm = noise(1.0, 48_000)
    pcm[24_000] = value
    got = read_file(io.BytesIO(encode(pcm, 48_000, "wav-float")))
    np.testing.assert_allclose(got, soxr.resample(np.where(np.abs(pcm) < 9, pcm, 0), 48_000, 24_000), atol=1e-4)


def test_decoding_is_lazy_and_memory_bounded() -> None:
    data = encode(np.zeros(240 * 48_000, np.float32), 48_000, "flac")
    tracemalloc.start()
    total = 0
    for piece in decode_file(io.BytesIO(data)):
        assert len(piece) <= 2 * 24_000
        total += len(piece)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert total == 240 * 24_000
    assert peak < 4 << 20  # the whole would be 23 MB


def test_silence_stands_where_the_files_clock_skips() -> None:
    """A recorder that leaves pauses out: words after them have to keep their times."""
    target = io.BytesIO()
    with av.open(target, "w", format="webm") as container:
        stream = container.add_stream("libopus", rate=48_000, layout="mono")
        for start in (0, 48_000 * 3):
            frame = av.AudioFrame.from_ndarray(noise(1.0, 48_000)[None], format="flt", layout="mono")
            frame.sample_rate, frame.pts = 48_000, start
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    got = read_file(io.BytesIO(target.getvalue()))
    assert abs(len(got) - 4 * 24_000) < 1_000
    assert shift_of(got[2 * 24_000 :], np.concatenate([np.zeros(24_000), noise(1.0, 24_000)])) <= 24
    assert not np.any(got[30_000:70_000])


def test_an_audio_track_that_begins_late_keeps_its_times() -> None:
    target = io.BytesIO()
    with av.open(target, "w", format="matroska") as container:
        video = container.add_stream("mpeg4", rate=10, width=64, height=64, pix_fmt="yuv420p")
        audio = container.add_stream("flac", rate=24_000, layout="mono")
        for index in range(20):
            picture = av.VideoFrame(64, 64, "yuv420p")
            picture.pts = index
            container.mux(video.encode(picture))
        frame = av.AudioFrame.from_ndarray((noise(1.0)[None] * 32_767).astype(np.int16), format="s16", layout="mono")
        frame.sample_rate, frame.pts = 24_000, 12_000
        container.mux(audio.encode(frame))
        container.mux(video.encode(None))
        container.mux(audio.encode(None))
    got = read_file(io.BytesIO(target.getvalue()))
    assert abs(shift_of(got, noise(1.0)) - 12_000) <= 24


@pytest.mark.parametrize("start", [b"", b"hello, I am a text file\n" * 50, bytes(5_000), b"\x7fELF\x02\x01\x01" + bytes(900)])
def test_what_is_no_audio_is_refused_in_plain_words(start: bytes) -> None:
    with pytest.raises(AudioError, match="empty" if not start else "not an audio format that is known here"):
        read_file(io.BytesIO(start))


def test_a_video_without_sound_is_refused() -> None:
    target = io.BytesIO()
    with av.open(target, "w", format="matroska") as container:
        video = container.add_stream("mpeg4", rate=10, width=64, height=64, pix_fmt="yuv420p")
        container.mux(video.encode(av.VideoFrame(64, 64, "yuv420p")))
        container.mux(video.encode(None))
    with pytest.raises(AudioError, match="no audio track, only video"):
        read_file(io.BytesIO(target.getvalue()))


def test_a_file_that_names_other_files_is_refused(tmp_path: Path) -> None:
    """A playlist would make the server read what its sender may not."""
    secret = tmp_path / "secret.wav"
    secret.write_bytes(encode(noise(0.5), 24_000))
    for text in (
        f"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\nfile://{secret}\n#EXT-X-ENDLIST\n",
        f"ffconcat version 1.0\nfile '{secret}'\n",
        f"v=0\no=- 0 0 IN IP4 127.0.0.1\nc=IN IP4 127.0.0.1\nm=audio 5004 RTP/AVP 0\na=x:{secret}\n",
    ):
        playlist = tmp_path / "list"
        playlist.write_text(text)
        for source in (playlist, io.BytesIO(text.encode())):
            with pytest.raises(AudioError):
                read_file(source)


@pytest.mark.parametrize("format", ["wav", "flac", "m4a", "aiff"])
def test_a_file_that_was_cut_short_is_delivered_and_then_said(format: str) -> None:
    data = encode(noise(6.0), 24_000, format, options={"movflags": "faststart"} if format == "m4a" else None)
    heard, error = decoded(data[: len(data) // 2])
    assert "cut short" in error
    assert shift_of(heard, noise(6.0)) == 0
    assert 1.5 < len(heard) / 24_000 < 4.5


def test_an_mp4_without_its_index_says_so() -> None:
    data = encode(noise(6.0), 24_000, "m4a")
    with pytest.raises(AudioError, match="no index"):
        read_file(io.BytesIO(data[: len(data) // 2]))


@pytest.mark.parametrize("name", ["webm", "opus"])
def test_damage_inside_keeps_the_times_behind_it(name: str) -> None:
    data = bytearray(encode(noise(20.0, 48_000), 48_000, name))
    data[len(data) // 2 : len(data) // 2 + 5_000] = b"U" * 5_000
    heard, _ = decoded(bytes(data))
    assert shift_of(heard[-48_000:], noise(20.0)[-48_000:]) == 0
    assert abs(len(heard) - 20 * 24_000) < 500


@pytest.mark.parametrize("name", ["flac", "mp3", "m4a"])
def test_damage_inside_is_said(name: str) -> None:
    data = bytearray(encode(noise(20.0, 48_000), 48_000, name))
    data[len(data) // 2 : len(data) // 2 + 5_000] = b"U" * 5_000
    heard, error = decoded(bytes(data))
    assert "damaged" in error
    assert 18 * 24_000 < len(heard) <= 20.1 * 24_000


def test_mutated_files_raise_nothing_but_audio_errors() -> None:
    rng = np.random.default_rng(0)
    for name in ("wav", "flac", "mp3", "opus", "m4a", "webm"):
        data = encode(noise(0.5), 24_000, name)
        for _ in range(25):
            broken = bytearray(data)
            reach = min(len(data), 400) if rng.random() < 0.5 else len(data)
            for _ in range(int(rng.integers(1, 30))):
                broken[int(rng.integers(0, reach))] = int(rng.integers(256))
            try:
                total = sum(len(piece) for piece in decode_file(io.BytesIO(bytes(broken))))
                assert total <= 3_700 * 24_000
            except AudioError:
                pass


def test_the_recordings_of_the_audio_folder(shared: Path) -> None:
    rows = [line.split("\t") for line in (shared / "audio" / "MANIFEST.tsv").read_text().splitlines()[1:]]
    for row in rows:
        path = shared / "audio" / row[0]
        if path.suffix == ".raw":
            with pytest.raises(AudioError, match="not an audio format"):
                probe(path)
            continue
        assert abs(sum(map(len, decode_file(path))) / 24_000 - float(row[1])) < 0.06, row[0]
