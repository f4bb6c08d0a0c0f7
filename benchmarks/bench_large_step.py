#!/usr/bin/env python3
"""What a step of many rows is made of on a GPU.

    bench_large_step.py FOLDER [--parts NAME,...] [--seconds 240] [--rows 1024]

Parts, in the order of their worth. Each runs in a process of its own with a time limit; FOLDER/large-step.json gets what they
found:
  steps       Mimi, language model and the whole step by rows, Mimi in float16 and TF32, keys and values in fp8 and bf16
  profile     a replayed step as CUPTI sees it, and where the host's time goes
  quantiser   Mimi's quantiser at other tiles, and with books that are split on the way
  attention   both attentions at the blocks that are chosen and at others, few rows and many
  neighbours  1 to `rows` rows a step, joins and leaves; another schedule; one row a step: what differs
  agreement   codes and tokens of Mimi's precisions against float32
  kernels     every kernel of a step with fp8 keys and values, one after the other: microseconds, launches
  tilings     all tilings of both attentions
  convs       the tiles of Mimi's products in float16

No part begins after `seconds`. The 1B's shape, random weights, full contexts.
"""

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent

PARTS = {
    "steps": 150,
    "profile": 60,
    "quantiser": 60,
    "attention": 60,
    "neighbours": 90,
    "agreement": 120,
    "kernels": 60,
    "tilings": 60,
    "convs": 60,
}
"""Seconds that each may take."""

SHAPE = "1b"


# ---- the parts' processes --------------------------------------------------------------------------------------------------


def command(part: str, out: Path, rows: int) -> list[str]:
    to = ["--out", str(out)]
    if part == "steps":
        counts = ",".join(str(n) for n in (1, 8, 64, 256, 512) if n < rows)
        given = ["--no-reference", "--rows", f"{counts},{rows}", "--kv", "fp8,auto", "--mimi", "f16,tf32", "--steps", "15"]
        return ["bench_step.py", *given, *to]
    if part == "agreement":
        names = "float32,tf32 Mimi,f16 Mimi,bf16 Mimi"
        return ["bench_step.py", "--no-times", "--no-reference", "--agreement", names, *to]
    if part == "neighbours":
        given = ["--shape", SHAPE, "--rows", str(rows), "--kv", "auto,fp8", "--frames", "20000", "--seconds", "40"]
        return ["bench_neighbours.py", *given, "--device", "cuda", *to]
    return [Path(__file__).name, str(out), "--part", part, "--rows", str(rows)]


def run_part(part: str, rows: int, seconds: float) -> dict[str, Any]:
    """A part's JSON and how it ended; what it printed is printed, shortened where it failed."""
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "part.json"
        try:
            done = subprocess.run(
                [sys.executable, *command(part, out, rows)],
                cwd=HERE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                timeout=min(PARTS[part], seconds),
                check=False,
            )
            said, how = done.stdout, "done" if done.returncode == 0 else f"failed with status {done.returncode}"
        except subprocess.TimeoutExpired as error:
            said, how = error.stdout or b"", "stopped at its time limit"
        found = json.loads(out.read_text()) if out.exists() else {}
    how += f" after {time.monotonic() - begun:.0f} s"
    print(f"== {part}: {how}", flush=True)
    lines = [line[:200] for line in said.decode(errors="replace").splitlines() if not line.startswith("{")]
    print("\n".join(lines if found else lines[-15:])[:6_000], flush=True)
    return {"how": how, **found}


def run_all(args: argparse.Namespace) -> int:
    args.folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {}
    until = time.monotonic() + args.seconds
    for part in args.parts.split(",") if args.parts else PARTS:
        left = until - time.monotonic()
        found[part] = run_part(part, args.rows, left) if left > 8 else {"how": "not begun: the time was up"}
        (args.folder / "large-step.json").write_text(json.dumps(found) + "\n")
    return int(any("done" not in part["how"] for part in found.values()))


# ---- parts of this file ----------------------------------------------------------------------------------------------------


def built(rows: int, mimi: str = "f16") -> Any:
    """A backend with fp8 keys and values and one bucket, its contexts full."""
    import torch
    from bench_step import build, fill

    backend = build(SHAPE, torch.device("cuda"), rows, kv="fp8", mimi=mimi, buckets=(rows,))
    with torch.inference_mode():
        fill(backend)
    return backend


@contextlib.contextmanager
def timed_launches(found: list[tuple[str, Any, Any]]) -> Iterator[None]:
    """Launch as ever, with an event before and after each; the GPU is kept waiting meanwhile, so that no launch is late."""
    import torch

    from moshi_stt.models.torch_impl.cuda.launch import Launch, instead

    def note(launch: Launch) -> None:
        before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        before.record()
        launch.kernel[launch.grid](*launch.arguments, **launch.options)
        after.record()
        named = launch.kernel.__name__ if hasattr(launch.kernel, "__name__") else str(launch.kernel)
        shown = {k: v for k, v in launch.options.items() if k in ("BM", "BN", "BK", "C", "T", "D", "STAGES", "PARTS", "SAVE")}
        text = " ".join(f"{k}={v}" for k, v in shown.items())
        kinds = {str(a.dtype).removeprefix("torch.") for a in launch.arguments[:1] if hasattr(a, "dtype")}
        found.append((f"{named} {'/'.join(kinds)} grid {launch.grid} {text}", before, after))

    with instead(note):
        yield


def kernels(rows: int) -> dict[str, Any]:
    """Every kernel of a step by itself."""
    import torch

    result: dict[str, Any] = {}
    for mimi in ("f16", "tf32"):
        backend = built(rows, mimi)
        state, device = backend.state, backend.device
        slots = torch.arange(rows, device=device)
        frames = torch.full_like(slots, 800)
        pcm = torch.randn(rows, 1_920, device=device) * 0.2
        for side in ("mimi", "lm") if mimi == "f16" else ("mimi",):
            turns: list[dict[str, list[float]]] = []
            with torch.inference_mode():
                for _ in range(4):
                    found: list[tuple[str, Any, Any]] = []
                    torch.cuda.synchronize()
                    torch.cuda._sleep(150_000_000)
                    with timed_launches(found):
                        if side == "mimi":
                            backend.mimi.step(state.mimi, pcm, frames, slots, state.codes)
                        else:
                            x = backend.lm.embed(frames, slots, state.text, state.codes)
                            backend.lm.step(state.lm, x, frames, slots, state.text)
                    torch.cuda.synchronize()
                    taken: dict[str, list[float]] = defaultdict(list)
                    for name, before, after in found:
                        taken[name].append(1e3 * before.elapsed_time(after))
                    turns.append(taken)
            last = turns[-1]
            table = [{"kernel": name, "launches": len(us), "us": round(sum(us), 1)} for name, us in last.items()]
            table.sort(key=lambda line: -line["us"])
            total = sum(line["us"] for line in table)
            result[f"{side}, mimi {mimi}" if side == "mimi" else side] = {"us": round(total, 1), "kernels": table}
            print(f"\n{side} (mimi {mimi}), {rows} rows: {total / 1e3:.2f} ms in {sum(x['launches'] for x in table)} launches")
            for line in table[:28]:
                print(f"{line['us']:9.1f} us {line['launches']:4} x  {line['kernel']}")
        backend.close()
        del backend, state
        torch.cuda.empty_cache()
    return result


def on_the_host(backend: Any, pcm: Any, slots: Any, fresh: Any) -> dict[str, float]:
    """Milliseconds of a step: all, the copy into pinned memory, the launch, the device between its events."""
    import numpy as np
    import torch

    from moshi_stt.engine.backend import StepInputs

    runner, taken = backend.runner, defaultdict(list)
    given, replay = StepInputs(pcm, slots, fresh), runner._bucket(len(slots)).replay
    with torch.inference_mode():
        for _ in range(15):
            started = time.perf_counter()
            runner._put(given)
            copied = time.perf_counter()
            replay.begin()
            launched = time.perf_counter()
            replay.wait()
            ended = time.perf_counter()
            backend.step(pcm, slots, fresh)
            for name, seconds in (
                ("copy", copied - started),
                ("launch", launched - copied),
                ("wait", ended - launched),
                ("device", runner.device_seconds),
                ("step", time.perf_counter() - ended),
            ):
                taken[name].append(1e3 * seconds)
            started = time.perf_counter()
            runner.inputs.put(given)
            taken["copy by one thread"].append(1e3 * (time.perf_counter() - started))
    return {name: round(float(np.median(times)), 3) for name, times in taken.items()}


def profile(rows: int) -> dict[str, Any]:
    """Kernels of one replayed step by CUPTI: how long each, and for how long at least one ran."""
    import numpy as np
    import torch
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    backend = built(rows)
    pcm = (np.random.default_rng(0).standard_normal((rows, 1_920)) * 0.2).astype(np.float32)
    slots, fresh = np.arange(rows, dtype=np.int64), np.zeros(rows, np.bool_)
    for _ in range(3):
        backend.step(pcm, slots, fresh)
    host = on_the_host(backend, pcm, slots, fresh)
    print("ms: " + ", ".join(f"{name} {ms}" for name, ms in host.items()), flush=True)
    with profiler(activities=[ProfilerActivity.CUDA]) as seen:
        backend.step(pcm, slots, fresh)
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        seen.export_chrome_trace(str(trace))
        events = [e for e in json.loads(trace.read_text())["traceEvents"]
                  if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset") and "dur" in e]  # fmt: skip
    spans = sorted((e["ts"], e["ts"] + e["dur"]) for e in events)
    busy, end = 0.0, float("-inf")
    for begin, stop in spans:
        busy += max(0.0, stop - max(begin, end))
        end = max(end, stop)
    taken: dict[str, list[float]] = defaultdict(list)
    for e in events:
        taken[str(e["name"])[:60]].append(e["dur"])
    largest = sorted(taken.items(), key=lambda item: -sum(item[1]))
    table = [{"kernel": k, "launches": len(us), "us": round(sum(us), 1)} for k, us in largest]
    whole, total = end - spans[0][0] if spans else 0.0, sum(e["dur"] for e in events)
    print(f"{whole / 1e3:.2f} ms from first to last, {busy / 1e3:.2f} busy, {total / 1e3:.2f} in all kernels")
    for line in table[:14]:
        print(f"{line['us']:9.1f} us {line['launches']:4} x  {line['kernel']}")
    return {"host_ms": host, "from_first_to_last_us": whole, "busy_us": busy, "sum_us": total, "kernels": table}


OWN: dict[str, Callable[[int], dict[str, Any]]] = {"kernels": kernels, "profile": profile}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--parts", help="names, comma between; all")
    parser.add_argument("--seconds", type=float, default=240.0)
    parser.add_argument("--rows", type=int, default=1_024)
    parser.add_argument("--part", choices=tuple(PARTS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not args.part:
        return run_all(args)
    import large_step_tiles
    import report
    import torch
    from bench_step import measured_on

    run = OWN[args.part] if args.part in OWN else getattr(large_step_tiles, args.part)
    with torch.inference_mode():
        found = run(args.rows)
    measured = {"rows": args.rows, **measured_on(torch.device("cuda")), "found": found}
    report.finish(f"large-step-{args.part}", measured, args.folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
