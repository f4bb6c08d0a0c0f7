"""`transcribe --ray` with this process for the actors: results and manifest are those of a run without.

tests/cluster/test_archives.py has it with Ray.
"""

import argparse
import asyncio
import contextlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
from tests.support.media import encode
from tests.support.written import Reader, written

from moshi_stt.cli import archive_ray, main, places
from moshi_stt.cli.archive import Item, Manifest, plan
from moshi_stt.cluster import archive as ray_archive
from moshi_stt.errors import EngineFailed

TIMES = [(0.2, 0.5), (0.7, 1.0)]


class _Actors:
    """In the place of Ray: jobs go through a worker in this process. lost: numbers of jobs that nobody answers."""

    def __init__(self, lost: Sequence[int] = (), after: int = 10**6) -> None:
        """after: so many results come, then the driver is interrupted."""
        self.lost, self.after = lost, after
        self.jobs: list[str] = []

    def run(
        self, make: ray_archive.MakeWorker, jobs: Sequence[str], pool: ray_archive.Pool
    ) -> Iterator[tuple[int, str | None]]:
        self.jobs += jobs

        async def work() -> list[str]:
            async with make() as worker:
                return await asyncio.gather(*(worker.work(job) for job in jobs))

        results = dict(enumerate(asyncio.run(work())))
        for count, number in enumerate(sorted(results, reverse=True)):  # in another order
            if count == self.after:
                raise KeyboardInterrupt
            yield number, None if number in self.lost else results[number]


@pytest.fixture
def actors(monkeypatch: pytest.MonkeyPatch) -> _Actors:
    made = _Actors()
    monkeypatch.setattr(ray_archive, "connected", lambda pool: contextlib.nullcontext())
    monkeypatch.setattr(ray_archive, "run", lambda *arguments: made.run(*arguments))
    monkeypatch.setattr(archive_ray, "has_ray", lambda: True)
    return made


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "in"
    data = encode(written(TIMES, 1.2), 24_000, "wav-float")
    for name in ("talk.wav", "talk.flac", "a/talk.wav", "b/other.wav", "b/sound-without-suffix"):
        (made / name).parent.mkdir(parents=True, exist_ok=True)
        (made / name).write_bytes(data)
    (made / "cut.wav").write_bytes(data[: len(data) * 3 // 5])
    (made / "junk.wav").write_text("no sound")
    (made / "notes.txt").write_text("no sound")
    return made


def files(out: Path) -> dict[str, str]:
    """Results, and the manifest in order of path."""
    found = {str(path.relative_to(out)): path.read_text() for path in sorted(out.rglob("*")) if path.is_file()}
    found["manifest.jsonl"] = "\n".join(sorted(found["manifest.jsonl"].splitlines()))
    return found


def test_results_and_manifest_are_those_of_a_run_without(
    readers: list[Reader], actors: _Actors, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["-f", "json,srt", str(folder)]
    assert main(["transcribe", "-r", "-o", str(tmp_path / "plain"), *flags]) == 1
    plain = capsys.readouterr().err.splitlines()
    assert main(["transcribe", "--ray", "-r", "-o", str(tmp_path / "ray"), *flags]) == 1
    said = capsys.readouterr().err.splitlines()
    assert files(tmp_path / "ray") == files(tmp_path / "plain")
    assert len(actors.jobs) == 7
    assert sorted(said[:-1]) == sorted(plain[:-1])
    assert "5 of 7 recordings done" in said[-1]
    assert "h of audio an hour" in said[-1]


def test_a_second_run_does_what_is_left_and_so_does_one_without(
    readers: list[Reader], actors: _Actors, folder: Path, tmp_path: Path
) -> None:
    flags = ["-r", str(folder), "-o", str(tmp_path / "out")]
    actors.after = 3
    assert main(["transcribe", "--ray", *flags]) == 130
    assert len(Manifest(tmp_path / "out").lines) == 3
    actors.jobs, actors.after = [], 10**6
    assert main(["transcribe", "--ray", *flags]) == 1
    # cut.wav counts as done, junk.wav is tried again; the others had results already
    assert {Path(json.loads(job)["path"]).name for job in actors.jobs} <= {"junk.wav", "cut.wav"}
    whole = files(tmp_path / "out")
    assert main(["transcribe", "-r", str(folder), "-o", str(tmp_path / "out")]) == 1
    assert {name: text for name, text in files(tmp_path / "out").items() if name != "manifest.jsonl"} == {
        name: text for name, text in whole.items() if name != "manifest.jsonl"
    }


def test_results_of_a_run_that_was_killed_before_its_first_line_keep_their_names(
    readers: list[Reader], actors: _Actors, folder: Path, tmp_path: Path
) -> None:
    """Actors write a batch of results before the driver hears of one."""
    out = tmp_path / "out"
    actors.after = 0
    assert main(["transcribe", "--ray", str(folder), "-o", str(out)]) == 130
    assert (out / "a" / "talk.txt").exists()
    before = {path for path in out.rglob("*") if path.is_file()}
    actors.after = 10**6
    main(["transcribe", "--ray", str(folder), "-o", str(out)])
    assert {path for path in out.rglob("*") if path.is_file()} == before


def test_progress_is_told_in_hours_an_hour(
    readers: list[Reader],
    actors: _Actors,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(archive_ray, "LINE_SECONDS", 0.0)
    main(["transcribe", "--ray", str(folder), "-o", str(tmp_path / "out")])
    told = re.findall(r"^(\d+) of 7 recordings, [0-9.]+ h of audio, \d+ h an hour$", capsys.readouterr().err, re.M)
    assert told == [str(number) for number in range(1, 8)]
    main(["transcribe", "--ray", "--quiet", "--overwrite", str(folder), "-o", str(tmp_path / "out")])
    assert "an hour" not in capsys.readouterr().err


def test_what_ends_its_actor_every_time_has_failed(
    readers: list[Reader], actors: _Actors, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    actors.lost = [0]
    assert main(["transcribe", "--ray", "-r", str(folder), "-o", str(tmp_path / "out")]) == 1
    path = json.loads(actors.jobs[0])["path"]
    assert f"Error: {path}: the process that transcribed it ended every time it was tried" in capsys.readouterr().err
    assert Manifest(tmp_path / "out").lines[path]["status"] == "failed"


def test_an_actor_whose_model_is_broken_ends(readers: list[Reader], folder: Path, tmp_path: Path) -> None:
    """Its recordings are then done by another one, and have not failed."""
    ended: list[int] = []
    settings = dict.fromkeys(("config", "batch_size", "quantize", "prefix_seconds", "track")) | {
        "cpu": False,
        "channels": "mix",
    }

    async def broken() -> None:
        async with archive_ray.recordings(settings) as worker:
            worker._end = ended.append
            readers[0].failure = EngineFailed("a step failed")
            await worker.work(archive_ray._job(Item(str(folder / "talk.wav"), {"text": tmp_path / "talk.txt"})))

    asyncio.run(broken())
    assert ended == [70]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--ray", "a"], "add --output"),
        (["--ray", "a", "-o", "b", "--url", "ws://x"], "leave out --url"),
        (["--ray", "a", "-o", "b", "--jobs", "2"], "--ray-actors"),
        (["-r", "a", "-o", "b", "--ray-actors", "2"], "add --ray"),
        (["-r", "a", "-o", "b", "--gpus-per-actor", "1"], "add --ray"),
        (["--ray", "a", "-o", "b", "--cpus-per-actor", "0"], "more than 0"),
        (["s3://bucket/a.wav"], "with -r alone"),
        (["a.wav", "-f", "parquet"], "add --output"),
    ],
)
def test_wrong_usage_is_said(flags: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["transcribe", *flags])
    assert caught.value.code == 2
    assert said in capsys.readouterr().err


def test_without_the_extra_the_command_says_how_to_add_it(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(archive_ray, "has_ray", lambda: False)
    assert main(["transcribe", "--ray", str(folder), "-o", str(tmp_path / "out")]) == 1
    assert "scripts/install.sh --with ray" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "upath", None)
    assert main(["transcribe", "-r", "s3://bucket/calls", "-o", str(tmp_path / "out")]) == 1
    assert "scripts/install.sh --with ray" in capsys.readouterr().err


def test_nothing_of_it_is_imported_unless_asked_for() -> None:
    code = "import sys, moshi_stt.cli.transcribe; print([n for n in ('ray', 'pyarrow', 'upath', 'fsspec') if n in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_cores_and_gpus_of_an_actor() -> None:
    def pool(**given: Any) -> ray_archive.Pool:
        names = ("ray_address", "ray_actors", "cpus_per_actor", "gpus_per_actor")
        return archive_ray.pool_of(argparse.Namespace(**(dict.fromkeys(names) | given)))

    assert pool(ray_address="x") == ray_archive.Pool("x", None, 2.0, 0.0)
    assert pool(ray_address="x", gpus_per_actor=0.5, ray_actors=4) == ray_archive.Pool("x", 4, 1.0, 0.5)
    assert pool(cpus_per_actor=3.0) == ray_archive.Pool(None, None, 3.0, 0.0)
    assert pool().cpus_per_actor <= 2.0


# ---- places --------------------------------------------------------------------------------------------------------------


def test_what_lies_below_what() -> None:
    assert places.below("s3://bucket/calls/a/b.wav", "s3://bucket/calls/") == PurePosixPath("a/b.wav")
    assert places.below("s3://bucket/calls2/b.wav", "s3://bucket/calls") is None
    assert places.below("gs://bucket/calls/b.wav", "s3://bucket/calls") is None
    assert places.below("/bucket/calls/b.wav", "s3://bucket/calls") is None
    assert places.below("a/b.wav", ".") == Path("a/b.wav")
    assert places.common_folder(["s3://b/x/1.wav", "s3://b/y/2.wav"]) == "s3://b"
    assert places.common_folder(["s3://b/x/1.wav", "s3://b/x/y/2.wav"]) == "s3://b/x"
    assert places.common_folder(["s3://b/x/1.wav", "/x/2.wav"]) is None
    assert places.common_folder(["/x/y/1.wav", "/x/2.wav"]) == "/x"


def test_urls_are_mirrored_as_folders_are(tmp_path: Path) -> None:
    names = ["s3://b/calls/a/talk.wav", "s3://b/calls/talk.wav", "s3://b/calls/talk.flac", "s3://c/x/talk.wav"]
    items = plan(names, ["s3://b/calls", "s3://c/x"], tmp_path, ["text"], Manifest(tmp_path))
    assert [str(item.outputs["text"].relative_to(tmp_path)) for item in items] == [
        "calls/a/talk.txt",
        "calls/talk.wav.txt",
        "calls/talk.txt",
        "x/talk.txt",
    ]
