"""Archives on Ray Data: an actor that is killed, a driver that is killed, and archives in a store."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support.media import encode
from tests.support.processes import below, started_at

from moshi_stt.audio.decode import read_file
from moshi_stt.cli import main
from moshi_stt.sample import sample_path

pytest.importorskip("ray.data")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc"),
]

ROOT = Path(__file__).parents[2]
RECORDINGS = 48
ACTOR = "ray::MapWorker"


def make(folder: Path, count: int) -> None:
    """Short recordings, each of another stretch of speech, in nested folders with doubled names."""
    speech = read_file(sample_path())
    for number in range(count):
        start = int(number / count * (len(speech) - 36_000))
        path = folder / f"year{number % 3}" / f"box{number // 3 % 4}" / f"talk{number // 12}.{('wav', 'flac')[number % 2]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(speech[start : start + 36_000].astype(np.float32), 24_000, path.suffix[1:]))


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An archive, and its results by a run without Ray."""
    root = tmp_path_factory.mktemp("archive")
    make(root / "in", RECORDINGS)
    assert main(["transcribe", "--quiet", "-r", str(root / "in"), "-o", str(root / "plain"), "-f", "json,srt"]) == 0
    return root / "in", root / "plain"


def start(folder: Path, out: Path, *flags: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "moshi_stt", "transcribe", "--ray", "--ray-actors", "3", "--cpus-per-actor", "0.5"]
    command += ["-r", str(folder), "-o", str(out), "-f", "json,srt", *flags]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_lines(out: Path, count: int, process: "subprocess.Popen[str]") -> None:
    """Until so many recordings are settled. The wait for the next is short: it looks at a file that another process writes."""
    deadline = time.monotonic() + 600
    while lines(out) < count:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        threading.Event().wait(0.05)


def lines(out: Path) -> int:
    manifest = out / "manifest.jsonl"
    return manifest.read_bytes().count(b"\n") if manifest.exists() else 0


def results(out: Path) -> dict[str, str]:
    """All but the manifest."""
    return {
        str(path.relative_to(out)): path.read_text()
        for path in sorted(out.rglob("*"))
        if path.is_file() and path.name != "manifest.jsonl"
    }


def settled(out: Path) -> list[str]:
    return sorted(json.loads(line)["path"] for line in (out / "manifest.jsonl").read_text().splitlines())


def test_an_actor_that_is_killed_loses_nothing_and_doubles_nothing(archive: tuple[Path, Path], tmp_path: Path) -> None:
    folder, plain = archive
    process = start(folder, tmp_path / "out")
    wait_for_lines(tmp_path / "out", 4, process)
    actors = [pid for pid, command in below(process.pid).items() if command.startswith(ACTOR)]
    assert len(actors) == 3
    os.kill(actors[0], signal.SIGKILL)
    out, said = process.communicate(timeout=600)
    assert (process.returncode, out) == (0, ""), said
    assert f"{RECORDINGS} of {RECORDINGS} recordings done" in said
    assert results(tmp_path / "out") == results(plain)
    assert settled(tmp_path / "out") == settled(plain)


def test_what_ends_every_actor_costs_no_other_job(tmp_path: Path) -> None:
    """A recording that brings the decoder down would otherwise take its batch with it, or be tried for ever."""
    command = [sys.executable, "-m", "tests.support.ray_jobs", "24", "5"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)  # nothing of Ray's stands there
    assert sorted(results) == [[number, None if number == 5 else f"JOB {number}"] for number in range(24)]


def test_a_driver_that_is_killed_leaves_no_process_and_is_taken_up(archive: tuple[Path, Path], tmp_path: Path) -> None:
    folder, plain = archive
    process = start(folder, tmp_path / "out")
    wait_for_lines(tmp_path / "out", 4, process)
    children = {pid: started_at(pid) for pid in below(process.pid)}
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 120
    while alive := [pid for pid, started in children.items() if started is not None and started_at(pid) == started]:
        assert time.monotonic() < deadline, alive
        threading.Event().wait(0.1)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.json")}
    assert len(before) >= 4
    assert main(["transcribe", "--quiet", "-r", str(folder), "-o", str(tmp_path / "out"), "-f", "json,srt"]) == 0
    whole = {path for path in before if path.with_suffix(".srt").exists()}
    assert all(path.stat().st_mtime_ns == before[path] for path in whole)
    assert results(tmp_path / "out") == results(plain)


# ---- a store -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """An empty bucket of a server on this machine that speaks S3."""
    server_module = pytest.importorskip("moto.server")
    s3fs = pytest.importorskip("s3fs")
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    system = s3fs.S3FileSystem()
    system.mkdir("bucket")
    yield system
    system.rm("bucket", recursive=True)
    s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


def stored(system: Any, prefix: str) -> dict[str, bytes]:
    system.invalidate_cache()
    return {key.removeprefix(f"{prefix}/"): system.cat_file(key) for key in system.find(prefix)}


@pytest.mark.parametrize("ray", [False, True], ids=["plain", "ray"])
def test_archives_in_a_store(bucket: Any, archive: tuple[Path, Path], tmp_path: Path, ray: bool) -> None:
    """The same words under the same names, whole Parquet files, and a second run that does only what is left."""
    import pyarrow.dataset

    folder, plain = archive
    paths = sorted(path for path in folder.rglob("*") if path.is_file())[:6]
    for path in paths:
        bucket.put_file(str(path), f"bucket/calls/{path.relative_to(folder)}")
    bucket.pipe_file("bucket/calls/junk.wav", b"no sound")
    bucket.pipe_file("bucket/calls/.hidden.wav", b"")
    command = [sys.executable, "-m", "moshi_stt", "transcribe", "-r", "s3://bucket/calls", "-o", "s3://bucket/text"]
    command += ["-f", "json,parquet", *(["--ray", "--ray-actors", "1", "--cpus-per-actor", "1"] if ray else [])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=850)
    assert (done.returncode, "Error: s3://bucket/calls/junk.wav: not an audio format" in done.stderr) == (1, True), done.stderr
    found = stored(bucket, "bucket/text")
    names = [str(path.relative_to(folder).with_suffix("")) for path in paths]
    assert sorted(found) == sorted(["manifest.jsonl", *(f"{name}{end}" for name in names for end in (".json", ".parquet"))])
    for path, name in zip(paths, names, strict=True):
        words = json.loads(found[f"{name}.json"])
        assert words["file"] == f"s3://bucket/calls/{path.relative_to(folder)}"
        assert words["words"] == json.loads((plain / f"{name}.json").read_text())["words"]
        (tmp_path / f"{name}.parquet").parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / f"{name}.parquet").write_bytes(found[f"{name}.parquet"])
    table = pyarrow.dataset.dataset(tmp_path, format="parquet").to_table().to_pylist()
    expected = [word["text"] for name in names for word in json.loads(found[f"{name}.json"])["words"]]
    assert sorted(row["text"] for row in table) == sorted(expected)
    times = {key: bucket.info(key)["LastModified"] for key in bucket.find("bucket/text") if not key.endswith(".jsonl")}
    again = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert "6 there already" in again.stderr, again.stderr
    bucket.invalidate_cache()
    assert times == {key: bucket.info(key)["LastModified"] for key in times}
