#!/usr/bin/env python3
"""What several streams of a quantized model cost on a CPU, and which part of the step it is: 1, 2, 4, … rows of one step.

    bench_cpu_rows.py CHECKPOINT [--quantize int4] [--kv auto|bf16] [--rows 1,2,4,8] [--steps 12] [--threads 2] [--out FILE]

CHECKPOINT as `bench_server.py --checkpoint` writes it. Contexts are full. `products` is the language model's matrices alone,
`attention` its rings alone; Mimi runs at the same time on a thread of its own where there are two. Row counts take turns.
Prints a table and, as its last line, one JSON document.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import report
import torch
from bench_neighbours import load
from bench_step import fill, measured_on

FRAME_SAMPLES = 1_920


def timed(backend: Any, rows: int, part: str) -> float:
    """Milliseconds of one step, or of one part of it."""
    slots, fresh = np.arange(rows), np.zeros(rows, bool)
    pcm = (np.random.default_rng(rows).standard_normal((rows, FRAME_SAMPLES)) * 0.2).astype(np.float32)
    state, index = backend.state, torch.from_numpy(slots)
    frames = state.frames[index]
    lm = backend.lm
    begun = time.perf_counter()
    if part == "step":
        backend.step(pcm, slots, fresh)
        return 1e3 * (time.perf_counter() - begun)
    with torch.inference_mode():
        x = torch.randn(rows, backend.spec.lm.dim)
        qkv = torch.randn(rows, 1, 3, backend.spec.lm.heads, backend.spec.lm.head_dim)
        begun = time.perf_counter()
        if part == "language model":
            backend.step_lm(frames, index)
        elif part == "mimi":
            backend.mimi.step(state.mimi, torch.from_numpy(pcm), frames, index)
        elif part == "attention":
            q, k, v = qkv.unbind(2)
            for ring in state.lm.rings:
                lm.attention(q, k, v, ring, frames, index)
        else:
            for layer in lm.layers:
                layer.in_proj(x)
                layer.out_proj(x)
                gate, up = layer.linear_in(x).chunk(2, dim=-1)
                layer.linear_out(gate * up)
            lm.text_linear(x)
    return 1e3 * (time.perf_counter() - begun)


PARTS = ("step", "language model", "products", "attention", "mimi")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--quantize", default="int4")
    parser.add_argument("--kv", default="auto")
    parser.add_argument("--rows", default="1,2,4,8")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows = [int(part) for part in args.rows.split(",")]
    backend = load(args.checkpoint, max(rows), quantize=args.quantize, threads=args.threads, kv=args.kv)
    with torch.inference_mode():
        fill(backend)
    taken: dict[str, dict[int, list[float]]] = {part: {count: [] for count in rows} for part in PARTS}
    for _ in range(args.steps):
        for part in PARTS:
            for count in rows:
                backend.fill_context()
                taken[part][count].append(timed(backend, count, part))
    table = {part: {str(n): round(float(np.median(v)), 2) for n, v in counts.items()} for part, counts in taken.items()}
    print(f"{'ms of a step':16}" + "".join(f"{n:>9} rows" for n in rows) + "   times one row")
    for part, counts in table.items():
        values = list(counts.values())
        ratios = ", ".join(f"{value / values[0]:.2f}" for value in values)
        print(f"{part:16}" + "".join(f"{value:14.1f}" for value in values) + f"   {ratios}")
    result = {
        **measured_on(torch.device("cpu")),
        "quantize": args.quantize,
        "kv": args.kv,
        "threads": backend.report.device,
        "ms": table,
    }
    report.finish("cpu rows", result, args.out)


if __name__ == "__main__":
    main()
