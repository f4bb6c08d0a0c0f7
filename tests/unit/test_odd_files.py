"""Odd files, kind by kind: what is whole comes out whole, what is cut is said to be cut, and what is refused is named."""

import errno
import io
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import soxr
from numpy.typing import NDArray
from tests.support.media import Pipe, noise, shift_of

from moshi_stt.audio.decode import decode_file, probe, read_file
from moshi_stt.audio.level import LevelMeter
from moshi_stt.audio.ogg import OggReader, encode_page
from moshi_stt.audio.selection import Selection
from moshi_stt.cli import main
from moshi_stt.engines import EMBEDDED_PACKAGES, missing_packages
from moshi_stt.errors import AudioError
from moshi_stt.signatures import name_of, name_of_message

SECONDS = 3.0

MUXERS = {
    "wav": ("wav", "pcm_s16le", "s16", "wav"),
    "rf64": ("wav", "pcm_s16le", "s16", "wav"),
    "w64": ("w64", "pcm_s16le", "s16", "w64"),
    "aiff": ("aiff", "pcm_s16be", "s16", "aiff"),
    "au": ("au", "pcm_s16be", "s16", "au"),
    "caf": ("caf", "pcm_s16le", "s16", "caf"),
    "flac": ("flac", "flac", "s16", "flac"),
    "wv": ("wv", "wavpack", "s16p", "wv"),
    "tta": ("tta", "tta", "s16", "tta"),
    "mp3": ("mp3", "libmp3lame", "fltp", "mp3"),
    "opus": ("ogg", "libopus", "flt", "opus"),
    "m4a": ("ipod", "aac", "fltp", "m4a"),
    "m4a-front": ("ipod", "aac", "fltp", "m4a"),
    "m4a-pieces": ("mp4", "aac", "fltp", "m4a"),
    "mov": ("mov", "pcm_s16le", "s16", "mov"),
    "webm": ("webm", "libopus", "flt", "webm"),
    "mka": ("matroska", "flac", "s16", "mka"),
    "avi": ("avi", "pcm_s16le", "s16", "avi"),
    "wma": ("asf", "wmav2", "fltp", "wma"),
}
"""Name -> container, codec, sample format, suffix."""


def shift_in(name: str) -> int:
    """MP4 in fragments does not tell the encoder's delay: 1,024 samples at 48 kHz; of WMA the encoder here gets it wrong."""
    return {"m4a-pieces": 536, "wma": 1_100}.get(name, 24)


OPTIONS = {
    "rf64": {"rf64": "always"},
    "m4a-front": {"movflags": "faststart"},
    "m4a-pieces": {"movflags": "frag_keyframe+empty_moov", "frag_duration": "300000"},
}
RATE = 48_000


def make(name: str, pcm: NDArray[np.float32] | None = None, *, path: Path, tags: dict[str, str] | None = None) -> bytes:
    """A file of this kind, of float32 (S,) or (S, C) at 48 kHz."""
    container_name, codec, sample_format, suffix = MUXERS[name]
    samples = noise(SECONDS, RATE) if pcm is None else pcm
    layout = {1: "mono", 2: "stereo", 8: "7.1"}[1 if samples.ndim == 1 else samples.shape[1]]
    target = path / f"made.{suffix}"
    with av.open(str(target), "w", format=container_name, options=OPTIONS.get(name, {})) as container:
        container.metadata.update(tags or {})
        stream = container.add_stream(codec, rate=RATE, layout=layout)
        stream.codec_context.format = sample_format
        if codec == "wmav2":
            stream.bit_rate = 96_000
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples.reshape(1, -1)), format="flt", layout=layout)
        frame.sample_rate, frame.pts, frame.time_base = RATE, 0, Fraction(1, RATE)
        resampler = av.AudioResampler(sample_format, layout, RATE)
        for converted in [*resampler.resample(frame), *resampler.resample(None)]:
            container.mux(stream.encode(converted))
        container.mux(stream.encode(None))
    return target.read_bytes()


def heard(
    data: bytes, selection: Selection | None = None, source: Callable[[bytes], Any] = io.BytesIO
) -> tuple[NDArray[np.float32], str, list[str]]:
    """The sound, the fault after it, and the remarks."""
    pieces: list[NDArray[np.float32]] = []
    remarks: list[str] = []
    fault = ""
    try:
        pieces.extend(decode_file(source(data), selection, remarks))
    except AudioError as error:
        fault = str(error)
    return np.concatenate([np.zeros(0, np.float32), *pieces]), fault, remarks


def whole(data: bytes, shift: int = 24, source: Callable[[bytes], Any] = io.BytesIO) -> None:
    """Checks that all of the sound is there, and nothing is said. shift: samples by which it may come late."""
    pcm, fault, _ = heard(data, source=source)
    assert not fault
    assert abs(len(pcm) - SECONDS * 24_000) < 2_400
    assert abs(shift_of(pcm, noise(SECONDS))) <= shift


SOURCES = pytest.mark.parametrize("source", [io.BytesIO, Pipe], ids=["file", "pipe"])


@SOURCES
@pytest.mark.parametrize("name", MUXERS)
def test_a_whole_file_is_whole(name: str, source: Callable[[bytes], Any], tmp_path: Path) -> None:
    """Of every container here; the tests of cut files would mean nothing without."""
    whole(make(name, path=tmp_path), shift_in(name), source)


# ---- the given cases -----------------------------------------------------------------------------------------------------

CASES = {
    "latin1-title.m4a": (9.97, ""),  # the padding at its end is played by FFmpeg 8 and not by FFmpeg 9
    "empty.mp3": (0.0, "the file is empty (0 bytes)"),
    "cut-xing.mp3": (1.85, "cut short"),
    "cut.webm": (1.79, "cut short"),
    "cut.opus": (0.99, "cut short"),
    "riff-size-plus-9.wav": (3.40, ""),
    "antiphase-stereo.wav": (1.90, ""),
    "empty-last-packet.spx": (15.46, ""),
    "rifx.wav": (0.0, "a big-endian WAV file (RIFX)"),
}


@pytest.mark.parametrize("name", CASES)
def test_files_that_once_failed(name: str, shared: Path) -> None:
    seconds, fault = CASES[name]
    pcm, said, _ = heard((shared / "cases" / name).read_bytes())
    assert len(pcm) / 24_000 == pytest.approx(seconds, abs=0.02)
    assert fault in said
    assert bool(fault) == bool(said)
    if name == "antiphase-stereo.wav":
        assert np.sqrt(np.mean(pcm**2)) > 0.01


@pytest.mark.slow
def test_files_that_once_failed_give_their_words(shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With the embedded model, through `transcribe`: the words, the complaint, and the status."""
    if missing_packages(EMBEDDED_PACKAGES):
        pytest.skip("the packages of the embedded model are not here")
    paths = [str(shared / "cases" / name) for name in CASES]
    assert main(["transcribe", *paths, "-o", f"{tmp_path}/"]) == 1
    said = capsys.readouterr().err
    for name, (seconds, fault) in CASES.items():
        result = tmp_path / f"{name if name.startswith('cut.') else Path(name).stem}.txt"
        assert result.exists() == bool(seconds)
        complaints = [line for line in said.splitlines() if f"/{name}: " in line]
        assert [line.startswith("Error: ") and fault in line for line in complaints] == [True] * bool(fault)
        if name == "latin1-title.m4a":
            assert result.read_text().lower().startswith("ever tried")
            assert "fail better" in result.read_text().lower()
        elif name.endswith(".spx"):
            assert len(result.read_text().split()) > 5  # another voice
        elif seconds >= 1.5:
            assert "fail" in result.read_text().lower()


# ---- tags ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["m4a", "m4a-front", "mov", "mp3", "flac", "mka", "webm", "wav", "aiff", "caf", "wv", "wma"])
def test_tags_that_are_not_utf8_do_not_matter(name: str, tmp_path: Path) -> None:
    """A title in Latin-1 where UTF-8 belongs."""
    data = make(name, path=tmp_path, tags={"title": "Réunion", "artist": "Réunion"})
    title = {"wma": "Réunion".encode("utf-16-le"), "mp3": "Réunion".encode("utf-16")}.get(name, "Réunion".encode())
    assert title in data or "Réunion".encode() in data
    broken = data.replace("Réunion".encode(), b"R\xe9\xe8union").replace(
        "Réunion".encode("utf-16-le"), b"R\0\0\xd8\0\xd8n\0i\0o\0n\0"
    )
    assert broken != data
    whole(broken, shift_in(name))


# ---- reading that fails --------------------------------------------------------------------------------------------------


class Broken(io.BytesIO):
    """Fails at every read beyond a position."""

    def __init__(self, data: bytes, limit: int, error: Exception) -> None:
        super().__init__(data)
        self._limit, self._error = limit, error

    def read(self, size: int | None = -1, /) -> bytes:
        if self.tell() >= self._limit:
            raise self._error
        return super().read(size)


@pytest.mark.parametrize("name", ["wav", "flac", "mp3", "opus", "m4a-front", "webm"])
def test_a_disk_that_fails_is_named_and_what_was_read_is_delivered(name: str, tmp_path: Path) -> None:
    data = make(name, noise(20.0, RATE), path=tmp_path)
    pieces = []
    with pytest.raises(AudioError, match=r"cannot be read.*Input/output error"):
        pieces.extend(decode_file(Broken(data, len(data) // 2, OSError(errno.EIO, "Input/output error"))))
    assert 5 * 24_000 < sum(map(len, pieces)) < 15 * 24_000


@pytest.mark.parametrize(
    "error", [OSError(errno.EIO, "Input/output error"), RuntimeError("the network is down"), ValueError("no")]
)
def test_an_exception_of_the_file_never_comes_through_as_it_is(error: Exception, tmp_path: Path) -> None:
    data = make("m4a", noise(20.0, RATE), path=tmp_path)  # its index is at its end, so that opening seeks there
    assert len(data) > 100_000
    for limit in (0, 40, 50_000):
        with pytest.raises(AudioError, match=f"it cannot be read: {getattr(error, 'strerror', None) or error}"):
            read_file(Broken(data, limit, error))


# ---- cut, or only mislabelled --------------------------------------------------------------------------------------------

CUT = [name for name in MUXERS if name not in ("m4a", "mov", "avi", "wma", "tta")]
"""Those with their length in front; MP4 and MOV without their index are refused, AVI and WMA say nothing exact."""


@SOURCES
@pytest.mark.parametrize("name", CUT)
@pytest.mark.parametrize("share", [0.4, 0.9])
def test_a_cut_file_is_delivered_and_said_to_be_cut(
    name: str, share: float, source: Callable[[bytes], Any], tmp_path: Path
) -> None:
    data = make(name, noise(10.0, RATE), path=tmp_path)
    pcm, fault, _ = heard(data[: int(share * len(data))], source=source)
    assert "cut short" in fault or "damaged" in fault
    assert abs(shift_of(pcm, noise(10.0))) <= shift_in(name)
    assert len(pcm) > (share - 0.35) * 10 * 24_000


def vbri(data: bytes) -> bytes:
    """An MP3 file whose Xing frame is one of VBRI's instead."""
    at = data.index(b"Info") if b"Info" in data else data.index(b"Xing")
    frames = data[at + 8 : at + 12]
    sync = data.rindex(b"\xff\xfb", 0, at)
    header = b"VBRI" + bytes(6) + bytes(4) + frames
    return data[: sync + 36] + header + data[sync + 36 + len(header) :]


def test_vbri_counts_as_xing_does(tmp_path: Path) -> None:
    data = vbri(make("mp3", noise(10.0, RATE), path=tmp_path))
    for source in (io.BytesIO, Pipe):
        assert "cut short" in heard(data[: len(data) // 2], source=source)[1]
        assert heard(data, source=source)[1] == ""


def test_a_picture_in_front_does_not_hide_the_length(tmp_path: Path) -> None:
    """It is longer than what is read of a file at first, and the first thing that comes through a pipe."""
    data = make("mp3", noise(10.0, RATE), path=tmp_path)
    size = 300_000
    digits = bytes(size >> shift & 127 for shift in (21, 14, 7, 0))
    tagged = b"ID3\x04\0\0" + digits + b"APIC" + bytes(size - 4) + data
    for source in (io.BytesIO, Pipe):
        assert "cut short" in heard(tagged[: size + len(data) // 2], source=source)[1]
        assert heard(tagged, source=source)[1] == ""


def patched(data: bytes, at: int, value: bytes) -> bytes:
    return data[:at] + value + data[at + len(value) :]


def data_size(data: bytes) -> int:
    return data.index(b"data") + 4


MISLABELLED: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "RIFF size too large": ("wav", lambda d: patched(d, 4, (len(d) + 1).to_bytes(4, "little"))),
    "RIFF size far too large": ("wav", lambda d: patched(d, 4, (len(d) + 100_000).to_bytes(4, "little"))),
    "RIFF size too small": ("wav", lambda d: patched(d, 4, (len(d) - 5_000).to_bytes(4, "little"))),
    "RIFF size 0": ("wav", lambda d: patched(d, 4, bytes(4))),
    "data size too large by a few samples": (
        "wav",
        lambda d: patched(d, data_size(d), (len(d) - data_size(d) - 4 + 100).to_bytes(4, "little")),
    ),
    "data size unknown": ("wav", lambda d: patched(d, data_size(d), b"\xff" * 4)),
    "data size 0": ("wav", lambda d: patched(d, data_size(d), bytes(4))),
    "FORM size too large": ("aiff", lambda d: patched(d, 4, (len(d) + 90).to_bytes(4, "big"))),
    "AU size unknown": ("au", lambda d: patched(d, 8, b"\xff" * 4)),
    "AU size a little too large": ("au", lambda d: patched(d, 8, (len(d) - 24 + 10).to_bytes(4, "big"))),
    "Wave64 outer size too large": ("w64", lambda d: patched(d, 16, (len(d) + 64).to_bytes(8, "little"))),
    "CAF size unknown": ("caf", lambda d: patched(d, data_size(d), b"\xff" * 8)),
    "Xing says fewer frames": ("mp3", lambda d: patched(d, xing(d) + 8, (20).to_bytes(4, "big"))),
    "WebM duration too long": ("webm", lambda d: patched(d, d.index(b"\x44\x89\x88") + 3, bytes.fromhex("40f3880000000000"))),
    "bytes after the end": ("mp3", lambda d: d + b"TAG" + bytes(125)),
    "rubbish before the start": ("mp3", lambda d: bytes(300) + d),
    "zeros after the end": ("wav", lambda d: d + bytes(4_000)),
}


def xing(data: bytes) -> int:
    return data.index(b"Info") if b"Info" in data else data.index(b"Xing")


@SOURCES
@pytest.mark.parametrize("what", MISLABELLED)
def test_a_whole_file_whose_header_is_off_is_whole(what: str, source: Callable[[bytes], Any], tmp_path: Path) -> None:
    name, change = MISLABELLED[what]
    data = make(name, path=tmp_path)
    changed = change(data)
    assert changed != data
    whole(changed, 1_200 if what.startswith("rubbish") else 24, source)  # players too then know nothing of the delay


def test_an_ogg_file_without_an_end_gets_a_remark(tmp_path: Path) -> None:
    """A recorder that was switched off: every page is whole, and no header says how many there should be."""
    data = make("opus", noise(10.0, RATE), path=tmp_path)
    for source in (io.BytesIO, Pipe):
        pcm, fault, remarks = heard(data[: data.rindex(b"OggS")], source=source)
        assert not fault
        assert len(remarks) == 1
        assert "may be cut short" in remarks[0]
        assert len(pcm) > 8 * 24_000
        assert heard(data, source=source)[2] == []


# ---- packets of no bytes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", [5, 40, -1])
@pytest.mark.parametrize("count", [1, 3])
def test_packets_of_no_bytes_are_no_damage(where: int, count: int, tmp_path: Path) -> None:
    reader = OggReader()
    packets = list(reader.packets(make("opus", path=tmp_path)))
    position = where % len(packets)
    data, granule, sequence = b"", 0, 0
    for index, packet in enumerate(packets):
        empties = count if index == position else 0
        granule = 0 if index < 2 else granule + 960
        for bytes_ in [packet.data, *[b""] * empties]:
            last = index == len(packets) - 1
            data += encode_page(bytes_, 7, sequence, granule, first=sequence == 0, last=last)
            sequence += 1
    pcm, fault, _ = heard(data)
    assert not fault
    assert abs(len(pcm) - SECONDS * 24_000) < 2_000


# ---- channels ------------------------------------------------------------------------------------------------------------

VOICES: dict[str, Callable[[NDArray[np.float32]], list[NDArray[np.float32]]]] = {
    "opposite": lambda v: [v, -v],
    "opposite and fainter": lambda v: [v, -0.8 * v],
    "opposite with noise": lambda v: [v + 0.002 * noise(SECONDS, RATE, seed=9), -v],
    "opposite with offsets": lambda v: [v + 0.1, -v + 0.1],
    "one of eight": lambda v: [0 * v] * 2 + [v] + [0 * v] * 5,
    "the last of eight": lambda v: [0 * v] * 7 + [v],
    "one of two": lambda v: [v, 0 * v],
    "opposite among silent ones": lambda v: [v, -v] + [0 * v] * 6,
}


@pytest.mark.parametrize("name", ["wav", "flac", "m4a"])
@pytest.mark.parametrize("what", VOICES)
def test_mixing_loses_no_voice(what: str, name: str, tmp_path: Path) -> None:
    voice = noise(SECONDS, RATE)
    pcm, fault, _ = heard(make(name, np.stack(VOICES[what](voice), axis=1).astype(np.float32), path=tmp_path))
    expected = noise(SECONDS)
    assert not fault
    moving = pcm - pcm.mean()
    assert np.sqrt(np.mean(moving**2)) > 0.6 * np.sqrt(np.mean(expected**2))
    size = min(len(moving), len(expected))
    assert abs(np.corrcoef(moving[:size], expected[:size])[0, 1]) > 0.95


def test_two_voices_are_mixed_as_they_are(tmp_path: Path) -> None:
    """Voices that have nothing to do with each other are neither turned nor left out, and their mean is smooth."""
    one, two = noise(SECONDS, RATE), 0.3 * noise(SECONDS, RATE, seed=1)
    pcm, _, _ = heard(make("wav", np.stack([one, two], axis=1), path=tmp_path))
    np.testing.assert_allclose(pcm, soxr.resample((one + two) / 2, RATE, 24_000), atol=1e-3)


@pytest.mark.parametrize("name", ["wav", "flac", "opus"])
def test_channels_are_split_and_picked(name: str, tmp_path: Path) -> None:
    voices = [noise(SECONDS, RATE, seed=seed) for seed in (1, 2)]
    data = make(name, np.stack(voices, axis=1), path=tmp_path)
    split = read_file(io.BytesIO(data), Selection(channels="split"))
    assert split.shape == (len(split), 2)
    for number, seed in ((1, 1), (2, 2)):
        alone = read_file(io.BytesIO(data), Selection(channels=number))
        np.testing.assert_array_equal(alone, split[:, number - 1])
        assert shift_of(alone, noise(SECONDS, seed=seed)) == 0
    with pytest.raises(AudioError, match="no channel 3: the audio track has 2"):
        read_file(io.BytesIO(data), Selection(channels=3))


# ---- tracks --------------------------------------------------------------------------------------------------------------


def two_tracks(container_name: str, path: Path) -> bytes:
    with av.open(str(path / "two"), "w", format=container_name) as container:
        streams = []
        for title, language in (("Room", "eng"), ("Interpreter", "fre")):
            stream = container.add_stream("aac", rate=RATE, layout="mono")
            stream.metadata["title"] = stream.metadata["handler_name"] = title
            stream.metadata["language"] = language
            streams.append(stream)
        for number, stream in enumerate(streams, 1):
            frame = av.AudioFrame.from_ndarray(noise(SECONDS, RATE, seed=number)[None], format="fltp", layout="mono")
            frame.sample_rate, frame.pts, frame.time_base = RATE, 0, Fraction(1, RATE)
            container.mux(stream.encode(frame))
        for stream in streams:
            container.mux(stream.encode(None))
    return (path / "two").read_bytes()


@pytest.mark.parametrize("container", ["matroska", "mp4", "mov"])
def test_of_several_tracks_one_is_taken_and_all_are_named(container: str, tmp_path: Path) -> None:
    data = two_tracks(container, tmp_path)
    for track in (None, 1, 2):
        pcm, fault, remarks = heard(data, Selection(track=track))
        assert not fault
        assert abs(shift_of(pcm, noise(SECONDS, seed=track or 1))) <= 24
        assert bool(remarks) == (track is None)
    assert "it has 2 audio tracks: 1 (" in heard(data)[2][0]
    if container == "matroska":
        assert "2 (Interpreter, fre, aac)" in heard(data)[2][0]
    assert len(probe(io.BytesIO(data)).tracks) == 2
    with pytest.raises(AudioError, match="no audio track 3: the file has 1 "):
        read_file(io.BytesIO(data), Selection(track=3))


def test_a_title_that_is_not_utf8_is_printable_in_the_remark(tmp_path: Path) -> None:
    data = two_tracks("matroska", tmp_path)
    (remark,) = heard(data.replace(b"Interpreter", "Interprèter".encode("latin-1")))[2]
    assert "2 (Interpr\N{REPLACEMENT CHARACTER}ter, fre, aac)" in remark
    assert remark.encode()


# ---- pipes ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MUXERS)
def test_every_format_comes_through_a_pipe(name: str, tmp_path: Path) -> None:
    """Those that need seeking, too."""
    data = make(name, path=tmp_path)
    whole_file, piped = read_file(io.BytesIO(data)), read_file(Pipe(data))
    assert 0 <= len(piped) - len(whole_file) <= 1_500  # of an MP3 file's end, a pipe does not tell how much is padding
    np.testing.assert_allclose(piped[: len(whole_file) - 100], whole_file[:-100], atol=1e-6)


# ---- names and reasons ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "part"),
    [
        (b"RIFX" + bytes(100), "a big-endian WAV file"),
        (b"%PDF-1.7" + bytes(100), "a PDF document, not a recording"),
        (b"PK\x03\x04" + bytes(100), "a ZIP archive, not a recording"),
        (b"fLaC" + bytes(100), "a FLAC file that is damaged or cut short"),
        (b"\0\0\0\x1cftypM4A " + bytes(100), "no index"),
        (b"hello " * 100, "not an audio format that is known here"),
    ],
)
def test_a_refusal_names_the_file_and_keeps_the_codec_librarys_reason(data: bytes, part: str) -> None:
    with pytest.raises(AudioError) as raised:
        read_file(io.BytesIO(data))
    assert part in str(raised.value)
    assert any(words in str(raised.value) for words in ("Invalid data", "patches welcome", "End of file"))


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (b'{"type": "Audio", "pcm": [0.1, 0.2]}', "JSON"),
        (b"RIFF\x24\0\0\0WAVEfmt " + bytes(40), "a WAV file"),
        (b"OggS" + bytes(60), "an Ogg file"),
        (np.round(8_000 * np.sin(np.arange(1_920) / 9)).astype("<i2").tobytes(), "bare 16-bit samples"),
        (np.random.default_rng(0).bytes(3_840), None),
        (b"\x82\xa4type\xa5Audio", None),
        (b"", None),
    ],
)
def test_what_was_sent_instead_of_a_message(data: bytes, name: str | None) -> None:
    assert name_of_message(data) == name


@pytest.mark.parametrize("name", MUXERS)
def test_every_container_is_known_by_its_start(name: str, tmp_path: Path) -> None:
    assert name_of(make(name, path=tmp_path)[:16]) is not None


@pytest.mark.parametrize(
    ("pcm", "part"),
    [
        (np.zeros(48_000, np.float32), "every sample is zero"),
        (noise(2.0) * 1e-4, "too faint"),
        (np.full(48_000, 0.25, np.float32), "a constant offset of 0.25"),
        (noise(0.1), "only 0.10 s long"),
        (noise(2.0), ""),
        (noise(2.0) + np.float32(0.25), ""),
    ],
)
def test_the_reason_for_no_words(pcm: NDArray[np.float32], part: str) -> None:
    meter = LevelMeter()
    for start in range(0, len(pcm), 1_000):
        meter.hear(pcm[start : start + 1_000])
    reason = meter.reason()
    assert part in reason
    assert bool(part) == bool(reason)
