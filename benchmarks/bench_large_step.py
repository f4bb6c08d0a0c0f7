#!/usr/bin/env python3
"""What a step of many rows is made of on a GPU, and what could make it shorter.

    bench_large_step.py FOLDER [--parts NAME,...] [--gpus 1] [--seconds 240] [--rows 1024]

Parts, in the order of their worth; each runs in a process of its own with a time limit and leaves FOLDER/NAME.json:
  steps       Mimi, language model and the whole step by rows, Mimi in each precision, keys and values in bf16 and fp8
  kernels     every kernel of a step with fp8 keys and values, one after the other: microseconds, launches
  overlap     the same step with its halves next to each other, and with priorities: milliseconds, and whether a bit differs
  agreement   codes and tokens of Mimi's precisions against float32
  neighbours  Mimi in f16, halves next to each other: 1 to `rows` rows a step, joins and leaves; another schedule; one row
  attention   the tilings of both attentions
  convs       the tiles of Mimi's products in f16
  slices      the language model's sliced products, in parts and by one program
  profile     a replayed step as CUPTI sees it, the overlap included

No part begins after `seconds`. With several GPUs the parts are shared out. The 1B's shape, random weights, full contexts.
"""

import argparse
import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent

PARTS = {
    "steps": 150,
    "kernels": 60,
    "overlap": 70,
    "agreement": 120,
    "neighbours": 90,
    "attention": 60,
    "convs": 60,
    "slices": 40,
    "profile": 50,
}
"""Seconds that each may take."""

SHAPE = "1b"


# ---- the parts' processes --------------------------------------------------------------------------------------------------


def command(part: str, folder: Path, rows: int) -> list[str]:
    out = ["--out", str(folder / f"{part}.json")]
    if part == "steps":
        counts = ",".join(str(n) for n in (1, 8, 64, 256) if n < rows)
        given = ["--no-reference", "--rows", f"{counts},{rows}", "--kv", "fp8,auto", "--mimi", "tf32,f16,bf16", "--steps", "20"]
        return ["bench_step.py", *given, *out]
    if part == "agreement":
        names = "float32,tf32 Mimi,f16 Mimi,bf16 Mimi"
        return ["bench_step.py", "--no-times", "--no-reference", "--agreement", names, *out]
    if part == "neighbours":
        given = ["--shape", SHAPE, "--rows", str(rows), "--kv", "fp8", "--mimi", "f16", "--halves-from", str(rows // 2)]
        return ["bench_neighbours.py", *given, "--frames", "30000", "--seconds", "40", "--device", "cuda", *out]
    return [Path(__file__).name, str(folder), "--part", part, "--rows", str(rows)]


def work(folder: Path, left: "queue.Queue[str]", gpu: int | None, until: float, rows: int, said: dict[str, str]) -> None:
    """Run parts until none is left or the time is up."""
    environment = dict(os.environ) | ({} if gpu is None else {"CUDA_VISIBLE_DEVICES": str(gpu)})
    while True:
        try:
            part = left.get_nowait()
        except queue.Empty:
            return
        spare = until - time.monotonic()
        if spare < 15:
            said[part] = "not begun: the time was up"
            continue
        begun = time.monotonic()
        with (folder / f"{part}.log").open("w", encoding="utf-8") as log:
            try:
                done = subprocess.run(
                    [sys.executable, *command(part, folder, rows)],
                    cwd=HERE,
                    env=environment,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    timeout=min(PARTS[part], spare),
                    check=False,
                )
                how = "done" if done.returncode == 0 else f"failed with status {done.returncode}"
            except subprocess.TimeoutExpired:
                how = "stopped at its time limit"
        said[part] = f"{how} after {time.monotonic() - begun:.0f} s"


def run_all(args: argparse.Namespace) -> int:
    folder = args.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    parts = args.parts.split(",") if args.parts else list(PARTS)
    left: queue.Queue[str] = queue.Queue()
    for part in parts:
        left.put(part)
    said: dict[str, str] = {}
    until = time.monotonic() + args.seconds
    threads = [
        threading.Thread(target=work, args=(folder, left, None if args.gpus == 1 else gpu, until, args.rows, said))
        for gpu in range(args.gpus)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (folder / "parts.json").write_text(json.dumps(said) + "\n")
    for part in parts:
        print(f"== {part}: {said.get(part, 'not run')}", flush=True)
        log = (folder / f"{part}.log").read_text(errors="replace").splitlines() if (folder / f"{part}.log").exists() else []
        shown = [line[:200] for line in log if not line.startswith("{")]
        print("\n".join(shown if "done" in said.get(part, "") else shown[-15:])[:6_000], flush=True)
    return int(any("done" not in how for how in said.values()))


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


def overlap(rows: int) -> dict[str, Any]:
    """A step under each way of sharing the GPU."""
    import numpy as np

    from moshi_stt.models.torch_impl.cuda.overlap import Overlap, Streams

    backend = built(rows)
    result: dict[str, Any] = {}
    first: dict[int, Any] = {}
    counts = [n for n in (rows, rows // 2, rows // 4) if n >= 2]
    ways = {
        "as it is": Overlap(),
        "Mimi first": Overlap(mimi_priority=-1),
        "halves": Overlap(halves_from=2, product_priority=0),
        "halves, products first": Overlap(halves_from=2, product_priority=-1),
        "halves, products and Mimi first": Overlap(halves_from=2, product_priority=-1, mimi_priority=-1),
        "halves, products first, Mimi before": Overlap(halves_from=2, product_priority=-1, mimi_priority=-2),
    }
    for name, way in ways.items():
        try:
            backend._streams = Streams(backend.device, way)
        except Exception as error:  # a priority that this PyTorch has not
            print(f"{name}: {error}", flush=True)
            continue
        backend._buckets = tuple(sorted(counts))
        del backend.runner
        backend.runner = backend._make_runner()
        backend.warm_up()
        line: dict[str, Any] = {"overlap": way._asdict()}
        for count in counts:
            pcm = (np.random.default_rng(count).standard_normal((count, 1_920)) * 0.2).astype(np.float32)
            slots = np.arange(count, dtype=np.int64)
            heard = []
            for n in range(3):
                output = backend.step(pcm, slots, np.full(count, n == 0))
                heard.append((output.text_token, output.logprob, backend.state.codes[:count].cpu().numpy()))
            backend.fill_context()
            for _ in range(3):
                backend.step(pcm, slots, np.zeros(count, np.bool_))
            taken = []
            for _ in range(15):
                begun = time.perf_counter()
                backend.step(pcm, slots, np.zeros(count, np.bool_))
                taken.append(1e3 * (time.perf_counter() - begun))
            first.setdefault(count, heard)
            differ = sum(int((a != b).any()) for one, other in zip(first[count], heard, strict=True)
                         for a, b in zip(one, other, strict=True))  # fmt: skip
            line[str(count)] = {"ms": round(float(np.median(taken)), 3), "least": round(min(taken), 3), "differ": differ}
        result[name] = line
        said = "   ".join(
            f"{n} rows {line[str(n)]['ms']:6.2f} ms" + (" BITS DIFFER" if line[str(n)]["differ"] else "") for n in counts
        )
        print(f"{name:36} {said}", flush=True)
    return result


def profile(rows: int) -> dict[str, Any]:
    """Kernels of one replayed step by CUPTI: how long each, and for how long at least one ran."""
    import numpy as np
    import torch
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    from moshi_stt.models.torch_impl.cuda.overlap import Overlap, Streams

    backend = built(rows)
    pcm = (np.random.default_rng(0).standard_normal((rows, 1_920)) * 0.2).astype(np.float32)
    slots, fresh = np.arange(rows, dtype=np.int64), np.zeros(rows, np.bool_)
    result: dict[str, Any] = {}
    for name, way in {"as it is": Overlap(), "halves": Overlap(halves_from=2, product_priority=-1)}.items():
        backend._streams = Streams(backend.device, way)
        del backend.runner
        backend.runner = backend._make_runner()
        backend.warm_up()
        for _ in range(3):
            backend.step(pcm, slots, fresh)
        with profiler(activities=[ProfilerActivity.CUDA]) as seen:
            backend.step(pcm, slots, fresh)
            torch.cuda.synchronize()
        seen.export_chrome_trace("/tmp/large_step_trace.json")
        events = [e for e in json.loads(Path("/tmp/large_step_trace.json").read_text())["traceEvents"]
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
        result[name] = {"from_first_to_last_us": whole, "busy_us": busy, "sum_us": total, "kernels": table}
        print(f"\n{name}: {whole / 1e3:.2f} ms from first to last, {busy / 1e3:.2f} busy, {total / 1e3:.2f} in all kernels")
        for line in table[:16]:
            print(f"{line['us']:9.1f} us {line['launches']:4} x  {line['kernel']}")
    return result


OWN: dict[str, Callable[[int], dict[str, Any]]] = {"kernels": kernels, "overlap": overlap, "profile": profile}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--parts", help="names, comma between; all")
    parser.add_argument("--gpus", type=int, default=1)
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
    document = {"rows": args.rows, **measured_on(torch.device("cuda")), args.part: found}
    report.finish(f"large-step-{args.part}", document, args.folder / f"{args.part}.json")
    return 0


if __name__ == "__main__":
    sys.exit(main())
