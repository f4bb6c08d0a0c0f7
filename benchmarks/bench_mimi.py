#!/usr/bin/env python3
"""One frame of one stream through Mimi's encoder alone on this machine's CPU: ours, PyPI `moshi`'s and `rustymimi`'s.

    bench_mimi.py CHECKPOINT [--reference-python PYTHON] [--rustymimi-python PYTHON] [--threads 1,0] [--codebooks 32]
                  [--frames 20] [--rounds 10] [--speech FOLDER]

CHECKPOINT is a folder with mimi.safetensors, or that file. The two PYTHONs are interpreters with moshi 0.2.13 and with
rustymimi (left out: no such column). A frame is 80 ms of sound, the same of every contender: noise, or FOLDER's recordings.
--threads: 0 is each one's own default; beside a language model, ours has one thread.

Every contender is a process of its own that stays loaded; they take turns of `frames` frames, `rounds` times, so that what else
the machine does meets all of them. Their codes are compared with each other's: `same` is the share of the first contender's
codes that another has too. Prints a table and, as its last line, one JSON document. Random weights say nothing about accuracy.
"""

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import report
from numpy.typing import NDArray

FRAME_SAMPLES = 1_920
RING_FRAMES = 125
"""Frames that Mimi's transformer looks back: a run should go past them."""

Pcm = NDArray[np.float32]
Encode = Callable[[Pcm, bool], NDArray[np.int64]]
"""Sound (1920,), and whether the stream begins, to codes (K,)."""


# ---- inside a contender's process: `bench_mimi.py --child JOB` -------------------------------------------------------------


class Job(NamedTuple):
    """What a contender's process is told, as a JSON list."""

    kind: str
    weights: str
    codebooks: int
    threads: int
    pcm: str
    """A .npy file (T, 1920)."""


def child(job: Job) -> None:
    """Print the threads and the seconds of loading, then for each number of frames on stdin encode so many and print them."""
    start = time.perf_counter()
    encode, threads = {"ours": ours, "moshi": reference, "rustymimi": rustymimi}[job.kind](job)
    version = importlib.metadata.version({"ours": "moshi-stt"}.get(job.kind, job.kind))
    print(json.dumps({"version": version, "threads": threads, "load_s": time.perf_counter() - start}), flush=True)
    pcm, count = np.load(job.pcm), 0
    for line in sys.stdin:
        times, codes = [], []
        for frame in pcm[count : count + int(line)]:
            start = time.perf_counter()
            found = encode(frame, count == 0)
            times.append(time.perf_counter() - start)
            codes.append(found.tolist())
            count += 1
        print(json.dumps({"times": times, "codes": codes}), flush=True)


def ours(job: Job) -> tuple[Encode, int]:
    """The encoder of `TorchBackend`, with its state."""
    import torch

    from moshi_stt.models.spec import MimiSpec
    from moshi_stt.models.torch_impl.attention import ring_attention_rows
    from moshi_stt.models.torch_impl.loader import load_mimi_params
    from moshi_stt.models.torch_impl.mimi import MimiEncoder, MimiState
    from moshi_stt.models.weights import plan_mimi

    if job.threads:
        torch.set_num_threads(job.threads)
    spec, cpu = MimiSpec(codebooks=job.codebooks), torch.device("cpu")
    slots = torch.zeros(1, dtype=torch.int64)
    frames = torch.zeros(1, dtype=torch.int64)
    with torch.inference_mode():
        mimi = MimiEncoder(spec, load_mimi_params(plan_mimi(Path(job.weights), spec), cpu), ring_attention_rows)
        state = MimiState(spec, 1, cpu)

    @torch.inference_mode()
    def encode(pcm: Pcm, fresh: bool) -> NDArray[np.int64]:
        frames.copy_(torch.where(torch.tensor([fresh]), 0, frames + 1))
        return mimi.step(state, torch.from_numpy(pcm)[None], frames, slots)[0].numpy()

    return encode, torch.get_num_threads()


def reference(job: Job) -> tuple[Encode, int]:
    """PyPI `moshi`'s, streaming as its scripts do it."""
    import torch
    from moshi.models import loaders

    if job.threads:
        torch.set_num_threads(job.threads)
    mimi = loaders.get_mimi(job.weights, device="cpu", num_codebooks=job.codebooks)
    mimi.streaming_forever(1)

    @torch.no_grad()
    def encode(pcm: Pcm, fresh: bool) -> NDArray[np.int64]:
        return mimi.encode(torch.from_numpy(pcm)[None, None])[0, :, 0].numpy()

    return encode, torch.get_num_threads()


def rustymimi(job: Job) -> tuple[Encode, int]:
    """Kyutai's Rust encoder with Python bindings; its threads were set by the parent in the environment."""
    from rustymimi import Tokenizer

    mimi = Tokenizer(job.weights, num_codebooks=job.codebooks)

    def encode(pcm: Pcm, fresh: bool) -> NDArray[np.int64]:
        codes = mimi.encode_step(pcm[None, None])
        return np.asarray(codes, np.int64)[0, :, 0]

    return encode, job.threads or os.cpu_count() or 1


# ---- the run ---------------------------------------------------------------------------------------------------------------


class Contender:
    """A process of this same file."""

    def __init__(self, name: str, python: str, job: Job) -> None:
        environment = dict(os.environ)
        if job.kind == "rustymimi" and job.threads:
            environment["RAYON_NUM_THREADS"] = str(job.threads)
        command = [python, __file__, "--child", json.dumps(job)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
        self.report = self._read()
        self.name = f"{name} {self.report['version']}, {self.report['threads']} thread{'s' * (self.report['threads'] > 1)}"
        self.times: list[float] = []
        self.codes: list[list[int]] = []

    def turn(self, frames: int, *, counts: bool) -> None:
        """Encode so many frames; those of a turn that warms up do not count."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{frames}\n")
        self._process.stdin.flush()
        turn = self._read()
        self.codes += turn["codes"]
        self.times += turn["times"] if counts else []

    def _read(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self._process.args} ended with {self._process.wait()}")
        return json.loads(line)

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


def sound(folder: Path | None, frames: int) -> Pcm:
    """float32 (T, 1920): the recordings one behind the other, or noise."""
    rng = np.random.default_rng(0)
    if folder is None:
        return rng.standard_normal((frames, FRAME_SAMPLES), np.float32) * rng.uniform(0, 0.3, (frames, 1)).astype(np.float32)
    from bench_wer import read_pcm

    files = sorted(path for path in folder.iterdir() if path.suffix in {".wav", ".flac", ".mp3", ".ogg", ".opus", ".raw"})
    if not files:
        raise SystemExit(f"{folder} holds no recordings")
    return np.resize(np.concatenate([read_pcm(path) for path in files]), (frames, FRAME_SAMPLES))


def compete(contenders: list[Contender], frames: int, rounds: int) -> list[dict[str, Any]]:
    """Let them take turns, and return a row of results for each. The first turn warms up: its times do not count."""
    for number in range(rounds + 1):
        for contender in contenders:
            contender.turn(frames, counts=number > 0)
    codes = [np.array(contender.codes) for contender in contenders]
    return [
        {
            "name": contender.name,
            **contender.report,
            "frames": len(contender.times),
            "ms": float(np.median(contender.times) * 1e3),
            "p10_ms": float(np.percentile(contender.times, 10) * 1e3),
            "p90_ms": float(np.percentile(contender.times, 90) * 1e3),
            "same": float((found == codes[0]).mean()),
            "same_frames": float((found == codes[0]).all(-1).mean()),
            "first_difference": next(iter(np.flatnonzero((found != codes[0]).any(-1)).tolist()), None),
        }
        for contender, found in zip(contenders, codes, strict=True)
    ]


def table(results: list[dict[str, Any]]) -> str:
    """A line for each contender. same, frames: its codes and frames of codes that are the first one's; first: frame that is
    not; x: its time by ours."""
    ours = [result for result in results if result["name"].startswith("moshi-stt")]
    heads = "".join(f"{'x ours, ' + str(result['threads']):>11}" for result in ours)
    lines = [f"{'':28}{'ms':>7}{'p10':>7}{'p90':>7}{'same':>10}{'frames':>10}{'first':>7}{heads}"]
    for result in results:
        times = f"{result['ms']:7.1f}{result['p10_ms']:7.1f}{result['p90_ms']:7.1f}"
        first = "-" if result["first_difference"] is None else result["first_difference"]
        ratios = "".join(f"{result['ms'] / one['ms']:11.2f}" for one in ours)
        lines.append(f"{result['name']:28}{times}{result['same']:10.3%}{result['same_frames']:10.2%}{first:>7}{ratios}")
    return "\n".join(lines)


def run(args: argparse.Namespace, weights: Path) -> list[dict[str, Any]]:
    total = args.frames * (args.rounds + 1)
    if total <= RING_FRAMES:
        print(f"{total} frames do not fill Mimi's ring of {RING_FRAMES}", file=sys.stderr, flush=True)
    kinds = [("moshi-stt", "ours", sys.executable), ("moshi", "moshi", args.reference_python)]
    kinds += [("rustymimi", "rustymimi", args.rustymimi_python)]
    contenders: list[Contender] = []
    with tempfile.TemporaryDirectory() as folder:
        pcm = Path(folder) / "pcm.npy"
        np.save(pcm, sound(args.speech, total))
        try:
            for name, kind, python in kinds:
                for threads in map(int, args.threads.split(",")) if python else ():
                    job = Job(kind, str(weights), args.codebooks, threads, str(pcm))
                    contenders.append(Contender(name, python, job))
            return compete(contenders, args.frames, args.rounds)
        finally:
            for contender in contenders:
                contender.close()


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        child(Job(*json.loads(sys.argv[2])))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--reference-python", help="an interpreter that has moshi 0.2.13")
    parser.add_argument("--rustymimi-python", help="an interpreter that has rustymimi")
    parser.add_argument("--threads", default="1,0", help="of every contender; 0 is each one's own default")
    parser.add_argument("--codebooks", type=int, default=32)
    parser.add_argument("--frames", type=int, default=20, help="of a turn")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--speech", type=Path, help="a folder of recordings")
    args = parser.parse_args()
    weights = args.checkpoint / "mimi.safetensors" if args.checkpoint.is_dir() else args.checkpoint
    results = run(args, weights)
    print(table(results))
    result = {
        "device": "cpu",
        "weights": f"{weights.parent.name}/{weights.name}",
        "codebooks": args.codebooks,
        "sound": "noise" if args.speech is None else "speech",
        "results": results,
    }
    report.finish("mimi", result)


if __name__ == "__main__":
    main()
