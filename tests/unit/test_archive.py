"""Whole archives: mirrored, resumed, never two results in one place, and each result whole or not there."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tests.support.media import encode
from tests.support.written import Reader, written

from moshi_stt import engines
from moshi_stt.audio.decode_pool import is_supported
from moshi_stt.cli import main, transcribers
from moshi_stt.cli.archive import Manifest, plan, read_list, write_whole
from moshi_stt.errors import ConfigError

ROOT = Path(__file__).parents[2]
TIMES = [(0.2, 0.5), (0.7, 1.0)]


def sound(times: list[tuple[float, float]] = TIMES) -> bytes:
    return encode(written(times, 1.2), 24_000, "wav-float")


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """Nested folders with doubled names and files that are no audio."""
    folder = tmp_path / "in"
    for name in ("talk.wav", "talk.flac", "a/talk.wav", "a/b/Talk.wav", "a/b/talk.wav", ".hidden.wav", "sound-without-suffix"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(sound())
    (folder / "a" / "notes.txt").write_text("not a sound")
    (folder / "cover.jpg").write_bytes(b"\xff\xd8\xff" + bytes(100))
    return folder


def files(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in sorted(folder.rglob("*")) if path.is_file()}


def lines(out: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]


def test_folders_are_mirrored(readers: list[Reader], archive: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["transcribe", "-r", str(archive), "-o", str(out), "-f", "text,words"]) == 0
    results = files(out)
    manifest = results.pop("manifest.jsonl").splitlines()
    assert sorted(results) == sorted(
        f"{stem}{suffix}"
        for stem in ("talk", "talk.wav", "a/talk", "a/b/Talk", "a/b/talk.wav", "sound-without-suffix")
        for suffix in (".txt", ".tsv")
    )
    assert set(results.values()) == {"w0 w1\n", "0.200\t0.500\tw0\n0.700\t1.000\tw1\n"}
    assert len(manifest) == 6
    first = json.loads(manifest[0])
    assert (first["status"], first["seconds"], first["reason"]) == ("done", 1.2, "")
    assert first["size"] == (archive / "talk.wav").stat().st_size
    out_text, err = capsys.readouterr()
    assert out_text == ""
    assert err == "6 of 6 recordings done, 0.00 h of audio; 2 other files left out\n"


def test_a_second_run_does_what_is_left(
    readers: list[Reader], archive: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = ["transcribe", "-r", str(archive), "-o", str(out)]
    assert main(command) == 0
    assert main(command) == 0
    assert readers[-1].streams == 0
    assert "6 there already" in capsys.readouterr().err
    (archive / "talk.wav").write_bytes(encode(written(TIMES[:1], 1.0), 24_000, "wav-float"))  # another recording by now
    (out / "a" / "talk.txt").unlink()
    (archive / "new.wav").write_bytes(sound())
    assert main(command) == 0
    assert readers[-1].streams == 3
    assert files(out)["talk.wav.txt"] == "w0\n"
    assert main([*command, "--overwrite"]) == 0
    assert readers[-1].streams == 7
    (archive / "talk.flac").write_bytes(encode(written(TIMES[:1], 1.1), 24_000, "wav-float"))
    assert main([*command, "--skip-existing"]) == 0
    assert readers[-1].streams == 0


def test_names_stay_when_others_come(readers: list[Reader], tmp_path: Path) -> None:
    """A recording that comes later takes no other's place, though its name comes first."""
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    (folder / "talk.wav").write_bytes(sound())
    assert main(["transcribe", "-r", str(folder), "-o", str(out)]) == 0
    (folder / "talk.aiff").write_bytes(encode(written(TIMES[:1], 1.0), 24_000, "wav-float"))
    assert main(["transcribe", "-r", str(folder), "-o", str(out)]) == 0
    results = files(out)
    assert (results["talk.txt"], results["talk.aiff.txt"]) == ("w0 w1\n", "w0\n")


@pytest.mark.parametrize("manifest", [True, False])
def test_another_folder_into_the_same_output_takes_no_place(readers: list[Reader], tmp_path: Path, manifest: bool) -> None:
    """A recording of the same name used to count as done, with the transcript of the other one for its own."""
    one, two, out = tmp_path / "2024", tmp_path / "2025", tmp_path / "out"
    for folder, data in ((one, sound()), (two, encode(written(TIMES[:1], 1.0), 24_000, "wav-float"))):
        folder.mkdir()
        (folder / "talk.wav").write_bytes(data)
    assert main(["transcribe", "-r", str(one), "-o", str(out)]) == 0
    if not manifest:
        (out / "manifest.jsonl").unlink()
    for _ in range(2):
        assert main(["transcribe", "-r", str(two), "-o", str(out)]) == 0
        results = files(out)
        assert (results["talk.txt"], results["talk.wav.txt"]) == ("w0 w1\n", "w0\n")


def test_what_fails_and_what_is_damaged_is_listed_and_gives_status_1(
    readers: list[Reader], archive: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    data = (archive / "talk.wav").read_bytes()
    (archive / "talk.wav").write_bytes(data[: len(data) * 6 // 10])
    (archive / "broken.mp3").write_text("no sound")
    for again in (False, True):
        assert main(["transcribe", "-r", str(archive), "-o", str(out)]) == 1
        err = capsys.readouterr().err
        assert f"Error: {archive / 'broken.mp3'}: not an audio format" in err
        assert f"Error: {archive / 'talk.wav'}: the file is cut short" in err
        assert ("in an earlier run" in err) == again
        assert "2 failed or damaged" in err
    status = {line["path"]: line["status"] for line in lines(out)}
    assert status[str(archive / "broken.mp3")] == "failed"
    assert status[str(archive / "talk.wav")] == "damaged"
    assert readers[-1].streams == 0


def test_several_folders_and_lists(readers: list[Reader], archive: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "talk.wav").write_bytes(sound())
    out = tmp_path / "out"
    assert main(["transcribe", "-r", str(archive), str(other), "-o", str(out)]) == 0
    assert {"in/talk.txt", "other/talk.txt"} <= set(files(out))
    again = tmp_path / "again"
    assert main(["transcribe", "-r", "--manifest", str(out / "manifest.jsonl"), "-o", str(again)]) == 0
    assert set(files(again)) == set(files(out))
    listed = tmp_path / "list.txt"
    listed.write_text(f"{other / 'talk.wav'}\n\n{archive / 'a' / 'talk.wav'}\n")
    assert main(["transcribe", "--manifest", str(listed), "-r", "-o", str(tmp_path / "third")]) == 0
    assert set(files(tmp_path / "third")) == {"other/talk.txt", "in/a/talk.txt", "manifest.jsonl"}


def test_the_output_folder_inside_the_archive_is_no_part_of_it(readers: list[Reader], archive: Path) -> None:
    for _ in range(2):
        assert main(["transcribe", "-r", str(archive), "-o", str(archive / "out"), "-f", "json"]) == 0
    assert len([name for name in files(archive / "out") if name.endswith(".json")]) == 6


def test_lists_of_every_kind(tmp_path: Path) -> None:
    path = tmp_path / "list"
    path.write_bytes(b"a b.wav\ncaf\xe9.wav\n\na b.wav\n")
    assert read_list(path) == ["a b.wav", os.fsdecode(b"caf\xe9.wav")]
    path.write_bytes(b"one\ntwo.wav\0three.wav\0")
    assert read_list(path) == ["one\ntwo.wav", "three.wav"]
    path.write_text('{"path": "x.wav", "status": "done"}\n{"path": "\\udce9.wav"}\n')
    assert read_list(path) == ["x.wav", os.fsdecode(b"\xe9.wav")]
    path.write_text('{"name": "x.wav"}\n')
    with pytest.raises(ConfigError, match='line 1 has no "path"'):
        read_list(path)


def test_no_two_recordings_share_a_result(tmp_path: Path) -> None:
    names = [
        "talk",
        "talk.wav",
        "TALK.mp3",
        "talk.wav.mp3",
        "talk.mp3",
        "manifest.wav",
        "manifest",
        "x/talk.wav",
        "talk.txt.wav",
    ]
    items = plan(names, [Path()], tmp_path, ("text", "json"), Manifest(tmp_path))
    outputs = [str(path).casefold() for item in items for path in item.outputs.values()]
    assert len(set(outputs)) == len(outputs) == 2 * len(names)


def test_a_cut_line_of_the_manifest_counts_as_not_there(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "manifest.jsonl").write_text('{"path": "a.wav", "size": 1, "status": "done", "output": "a"}\n{"path": "b.wav", "si')
    manifest = Manifest(out)
    assert list(manifest.lines) == ["a.wav"]
    (item,) = plan(["c.wav"], [Path()], out, ("text",), manifest)
    manifest.add(item, "failed", 0.0, "gone")
    assert list(Manifest(out).lines) == ["a.wav", "c.wav"]


def test_a_result_that_cannot_be_written_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_whole(tmp_path / "a.txt", "words")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(sys.platform == "darwin" or os.name != "posix", reason="file names are Unicode here")
def test_names_that_are_not_utf8(readers: list[Reader], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In folders, results, JSON, the manifest and complaints."""
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / os.fsdecode(b"caf\xe9.wav")).write_bytes(sound())
    (folder / os.fsdecode(b"bad\xe9.mp3")).write_text("no sound")
    out = tmp_path / "out"
    for _ in range(2):
        assert main(["transcribe", "-r", str(folder), "-o", str(out), "-f", "json,srt"]) == 1
    assert sorted(os.fsencode(path.name) for path in out.iterdir()) == [b"caf\xe9.json", b"caf\xe9.srt", b"manifest.jsonl"]
    document = json.loads((out / os.fsdecode(b"caf\xe9.json")).read_text(encoding="utf-8"))
    assert Path(document["file"]).name == os.fsdecode(b"caf\xe9.wav")
    assert readers[-1].streams == 0
    assert "bad\\xe9.mp3: not an audio format" in capsys.readouterr().err.replace("\\udce9", "\\xe9")
    assert main(["transcribe", str(folder / os.fsdecode(b"caf\xe9.wav")), "-f", "json", "-o", f"{tmp_path}/one/"]) == 0
    json.loads((tmp_path / "one" / os.fsdecode(b"caf\xe9.json")).read_text(encoding="utf-8"))


# ---- channels ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def two_people(tmp_path: Path) -> Path:
    """Words w0, w1 on the first channel, w4, w5 on the second, in turns."""
    second = np.zeros(round(1.6 * 24_000), np.float32)
    for value, start in ((0.005, 0.5), (0.006, 1.2)):
        second[round(start * 24_000) : round((start + 0.2) * 24_000)] = value
    path = tmp_path / "two.wav"
    path.write_bytes(encode(np.stack([written([(0.2, 0.4), (0.9, 1.1)], 1.6), second], axis=1), 24_000, "wav-float"))
    return path


def test_each_channel_is_recognised_as_if_alone_and_labelled(
    readers: list[Reader], two_people: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def printed(*flags: str) -> str:
        assert main(["transcribe", str(two_people), *flags]) == 0
        return capsys.readouterr().out

    alone = [json.loads(printed("-f", "json", "--channels", channel))["words"] for channel in ("1", "2")]
    document = json.loads(printed("-f", "json", "--channels", "split"))
    for number in (1, 2):
        labelled = [word for word in document["words"] if word["channel"] == number]
        assert [word | {"channel": number, "speaker": f"Channel {number}"} for word in alone[number - 1]] == labelled
    assert [word["text"] for word in document["words"]] == ["w0", "w4", "w1", "w5"]
    assert {segment["speaker"] for segment in document["segments"]} == {"Channel 1", "Channel 2"}
    assert "<v Channel 1>w0 w1\n" in printed("-f", "vtt", "--channels", "split")
    assert "Channel 2: w4 w5\n" in printed("-f", "srt", "--channels", "split")
    assert printed("--channels", "split") == "Channel 1: w0 w1\nChannel 2: w4 w5\n"
    assert printed("-f", "words", "--channels", "split").splitlines()[1] == "0.500\t0.700\tw4\t2"


def test_one_channel_needs_no_label(readers: list[Reader], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "one.wav"
    path.write_bytes(sound())
    assert main(["transcribe", str(path), "--channels", "split"]) == 0
    assert capsys.readouterr() == ("w0 w1\n", "")
    assert main(["transcribe", str(path), "--channels", "2"]) == 1
    assert "there is no channel 2: the audio track has 1" in capsys.readouterr().err
    assert main(["transcribe", str(path), "--track", "2"]) == 1
    assert "there is no audio track 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("pcm", "reason"),
    [
        (np.zeros(48_000, np.float32), "no words: every sample is zero"),
        (np.full(48_000, 0.3, np.float32) * 0 + np.float32(0.00004), "no words: it is too faint"),
    ],
)
def test_why_there_are_no_words_is_said(
    readers: list[Reader], tmp_path: Path, capsys: pytest.CaptureFixture[str], pcm: np.ndarray, reason: str
) -> None:
    path = tmp_path / "quiet.wav"
    path.write_bytes(encode(pcm, 24_000, "wav-float"))
    assert main(["transcribe", str(path)]) == 0
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"Warning: {path}: {reason}")


# ---- killed in the middle ------------------------------------------------------------------------------------------------

PROGRAM = """
import asyncio, sys
from moshi_stt import engines
from moshi_stt.cli import main
from tests.support.written import Reader

class Slow(Reader):
    async def open_when_free(self, *args, **more):
        await asyncio.sleep(0.02)
        return await super().open_when_free(*args, **more)

engines.build_engine = lambda *args, **more: Slow(slots=3)
sys.exit(main(["transcribe", *sys.argv[1:]]))
"""


def start(*args: str) -> "subprocess.Popen[bytes]":
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, "-c", PROGRAM, *args], stderr=subprocess.PIPE, cwd=ROOT, env=environment)


def until(condition: Callable[[], bool], seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_two_hundred_files_and_a_kill_in_the_middle(tmp_path: Path) -> None:
    """The second run does only what is left, and every result is whole."""
    folder, out = tmp_path / "in", tmp_path / "out"
    data = sound()
    for number in range(200):
        path = folder / f"day{number % 5}" / f"call{number // 10}.{'wav' if number % 2 else 'flac'}"
        while path.exists():
            path = path.parent / "more" / path.name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    manifest = out / "manifest.jsonl"
    first = start("-r", str(folder), "-o", str(out), "-f", "text,json")
    until(lambda: manifest.exists() and manifest.read_bytes().count(b"\n") >= 40)
    first.send_signal(signal.SIGKILL)
    first.communicate(timeout=60)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.txt")}
    settled = manifest.read_bytes().count(b"\n")
    assert 40 <= settled < 200
    second = start("-r", str(folder), "-o", str(out), "-f", "text,json")
    _, err = second.communicate(timeout=200)
    assert second.returncode == 0, err
    results = files(out)
    assert len([name for name in results if name.endswith(".txt")]) == 200
    assert {text for name, text in results.items() if name.endswith(".txt")} == {"w0 w1\n"}
    assert all(json.loads(text)["text"] == "w0 w1" for name, text in results.items() if name.endswith(".json"))
    assert not list(out.rglob(".*"))
    redone = [path for path, time_ns in before.items() if path.stat().st_mtime_ns != time_ns]
    assert len(redone) <= len(before) - settled + 3  # none that the manifest has
    assert f"{settled} there already".encode() in err or b"there already" in err
    assert len(lines(out)) == 200


def test_with_many_slots_other_processes_decode(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Long recordings in pieces, a cut one, one that is no sound, and two channels: as without those processes."""
    if not is_supported():
        pytest.skip("descriptors cannot be handed to a process here")
    monkeypatch.setattr(transcribers, "usable_cores", lambda: 3)
    folder = tmp_path / "in"
    folder.mkdir()
    times = [(n * 0.4 + 0.1, n * 0.4 + 0.4) for n in range(200)]
    data = encode(written(times, 81.0), 24_000, "wav-float")
    (folder / "long.wav").write_bytes(data)
    (folder / "cut.wav").write_bytes(data[: len(data) // 2])
    (folder / "text.mp3").write_text("no sound")
    (folder / "faint.wav").write_bytes(encode(np.zeros(24_000, np.float32), 24_000))
    (folder / "two.wav").write_bytes(encode(np.stack([written(TIMES, 1.2), written(TIMES, 1.2)], axis=1), 24_000, "wav-float"))
    said: list[str] = []
    results: list[dict[str, str]] = []
    for slots in (20, 3):
        monkeypatch.setattr(engines, "build_engine", lambda *_, slots=slots, **more: Reader(slots=slots))
        out = tmp_path / str(slots)
        assert main(["transcribe", "-r", str(folder), "-o", str(out), "--channels", "split"]) == 1
        said.append("\n".join(sorted(capsys.readouterr().err.splitlines())))
        results.append({name: text for name, text in files(out).items() if name != "manifest.jsonl"})
    assert said[0] == said[1]
    assert "cut.wav: the file is cut short" in said[0]
    assert "faint.wav: no words: every sample is zero" in said[0]
    assert results[0] == results[1]
    assert results[0]["long.txt"].split() == [f"w{number}" for number in range(200)]
    assert results[0]["two.txt"] == "Channel 1: w0 w1\nChannel 2: w0 w1\n"
