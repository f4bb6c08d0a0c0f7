#!/usr/bin/env python3
"""An archive through `moshi-stt transcribe --ray` and without, on the same cores; an actor is killed.

    bench_ray_files.py [--recordings 300] [--seconds 4] [--actors 3] [--rounds 2] [--out FILE]

Short recordings are made from the sample that comes with the package, and transcribed with the embedded model: without Ray;
with one actor that has all cores; and with several actors on the same cores, of which one is killed when a third is done.
Rates and CPU times are those between the first and the last result, so that starting Ray and loading the model do not count.
The CPU time is that of all processes that the command started. Rounds of the first two alternate; ratios are their medians.

Every result of every run is compared with that of the run without Ray. Needs the extra `ray`, and Linux (/proc). Prints a table
and, as its last line, one JSON document. Status 1 where a result is missing, there twice, or another.
"""

import argparse
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moshi_stt.audio.decode import read_file
from moshi_stt.constants import SAMPLE_RATE
from moshi_stt.cores import usable_cores
from moshi_stt.sample import sample_path

ACTOR = "ray::MapWorker"
POLL_SECONDS = 0.05


class Run(NamedTuple):
    """wall_s, cpu_s: between the first and the last result, of `recordings`."""

    recordings: int
    wall_s: float
    cpu_s: float
    total_s: float


def make_archive(folder: Path, count: int, seconds: float) -> None:
    """WAV files, each of another stretch of speech, in nested folders."""
    import wave

    speech = read_file(sample_path())
    samples = round(seconds * SAMPLE_RATE)
    speech = np.tile(speech, 1 + 2 * samples // len(speech))
    for number in range(count):
        first = int(number / count * (len(speech) - samples))
        path = folder / f"year{number % 7}" / f"box{number // 7 % 11}" / f"{number:05}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        with wave.open(str(path), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(SAMPLE_RATE)
            file.writeframes((np.clip(speech[first : first + samples], -1, 1) * 32_767).astype("<i2").tobytes())


def processes(pid: int) -> dict[int, tuple[str, float]]:
    """Name and CPU seconds, those of its dead children included, of a process and all below it."""
    parents: dict[int, int] = {}
    found: dict[int, tuple[str, float]] = {}
    for folder in Path("/proc").iterdir():
        if not folder.name.isdecimal():
            continue
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            name = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        parents[int(folder.name)] = int(fields[1])
        found[int(folder.name)] = (name, sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK"))
    ours = {pid}
    while more := {child for child, parent in parents.items() if parent in ours} - ours:
        ours |= more
    return {each: found[each] for each in ours if each in found}


def cpu(pid: int) -> float:
    return sum(seconds for _, seconds in processes(pid).values())


def transcribe(folder: Path, out: Path, total: int, flags: list[str], on_third: Callable[[int], None] | None = None) -> Run:
    """One run of the command. on_third: called with its id when a third of the results are there."""
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "moshi_stt", "transcribe", "--quiet", "-r", str(folder), "-o", str(out), "-f", "json"]
    begun = time.monotonic()
    first: tuple[int, float, float] | None = None
    last = (0.0, 0.0)
    with subprocess.Popen([*command, *flags]) as process:
        while process.poll() is None:
            done = count_lines(out / "manifest.jsonl")
            if done and first is None:
                first = (done, time.monotonic(), cpu(process.pid))
            if on_third is not None and done >= total // 3:
                on_third(process.pid)
                on_third = None
            if done >= total and not last[0]:
                last = (time.monotonic(), cpu(process.pid))
            time.sleep(POLL_SECONDS)
    if process.returncode or first is None or not last[0]:
        raise SystemExit(f"{' '.join([*command, *flags])} ended with status {process.returncode}")
    return Run(total - first[0], last[0] - first[1], last[1] - first[2], time.monotonic() - begun)


def count_lines(manifest: Path) -> int:
    try:
        return manifest.read_bytes().count(b"\n")
    except OSError:
        return 0


def kill_an_actor(pid: int) -> None:
    actors = [each for each, (name, _) in processes(pid).items() if name.startswith(ACTOR)]
    print(f"killing one of {len(actors)} actors", flush=True)
    os.kill(actors[0], signal.SIGKILL)


def differences(out: Path, plain: Path) -> list[str]:
    """Every recording whose result is missing, there twice, or not that of the run without Ray."""
    wrong = []
    results, expected = ({path.relative_to(each): path.read_bytes() for path in each.rglob("*.json")} for each in (out, plain))
    wrong += [f"{path}: another result" for path in results.keys() | expected.keys() if results.get(path) != expected.get(path)]
    lines, wanted = ([json.loads(line)["path"] for line in (each / "manifest.jsonl").open()] for each in (out, plain))
    if sorted(lines) != sorted(wanted):
        wrong.append("manifest.jsonl: not one line for each recording")
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recordings", type=int, default=300)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--actors", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path, metavar="FILE")
    args = parser.parse_args()
    cores, total = usable_cores(), args.recordings
    result: dict[str, Any] = {"benchmark": "ray-files", "machine": platform.platform(), "cores": cores, "recordings": total}
    wrong: list[str] = []
    with tempfile.TemporaryDirectory() as made:
        folder, plain, out = (Path(made) / name for name in ("in", "plain", "ray"))
        make_archive(folder, total, args.seconds)
        rounds = []
        for _ in range(args.rounds):
            without = transcribe(folder, plain, total, [])
            one = transcribe(folder, out, total, ["--ray", "--ray-actors", "1", "--cpus-per-actor", str(cores)])
            wrong += differences(out, plain)
            rounds.append((without, one))
            print(f"without Ray {without}\none actor   {one}", flush=True)
        result |= {
            "audio_s_a_s_plain": float(np.median([args.seconds * run.recordings / run.wall_s for run, _ in rounds])),
            "audio_s_a_s_one_actor": float(np.median([args.seconds * run.recordings / run.wall_s for _, run in rounds])),
            "ratio_wall": float(np.median([ratio(a, b, "wall_s") for a, b in rounds])),
            "ratio_cpu": float(np.median([ratio(a, b, "cpu_s") for a, b in rounds])),
            "total_s_plain": float(np.median([run.total_s for run, _ in rounds])),
            "total_s_one_actor": float(np.median([run.total_s for _, run in rounds])),
        }
        flags = ["--ray", "--ray-actors", str(args.actors), "--cpus-per-actor", f"{cores / args.actors:.3f}"]
        several = transcribe(folder, out, total, flags, kill_an_actor)
        found = differences(out, plain)
        wrong += found
        result |= {"actors": args.actors, "killed_total_s": several.total_s, "killed_wrong": len(found)}
        result["results"] = sum(1 for _ in out.rglob("*.json"))
    result["wrong"] = len(wrong)
    for key, value in result.items():
        print(f"{key:<24}{value:.4g}" if isinstance(value, float) else f"{key:<24}{value}")
    for line in wrong[:10]:
        print(line)
    if args.out:
        args.out.write_text(json.dumps(result) + "\n")
    print(json.dumps(result))
    raise SystemExit(1 if wrong else 0)


def ratio(plain: Run, ray: Run, what: str) -> float:
    """Recordings with Ray for each without, in the same time of this kind."""
    without, with_ray = getattr(plain, what) / plain.recordings, getattr(ray, what) / ray.recordings
    return float(without / with_ray)


if __name__ == "__main__":
    main()
