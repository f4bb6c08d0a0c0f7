#!/usr/bin/env python3
"""One stream for hours, fed without pacing: step time and memory from start to end.

    bench_long_stream.py CHECKPOINT [--hours 2] [--dtype f32]

CHECKPOINT as shared/goldens/make_checkpoint.py writes it (`tiny` will do). Prints a line for each tenth of the stream and, as
its last line, one JSON document; exits 1 when the last tenth's memory is above the second's by 16 MB or more.
"""

import argparse
import os
import sys
import time
from pathlib import Path

import numpy as np
import report
from bench_neighbours import load

from moshi_stt.constants import FRAME_RATE, FRAME_SAMPLES


def resident_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--hours", type=float, default=2.0)
    parser.add_argument("--dtype", default="f32")
    args = parser.parse_args()
    backend = load(args.checkpoint, 2, args.dtype)
    backend.warm_up()
    rng = np.random.default_rng(0)
    sound = rng.uniform(-0.3, 0.3, (100, FRAME_SAMPLES)).astype(np.float32)
    part = round(args.hours * 3_600 * FRAME_RATE / 10)
    print(f"{'stream h':>9}{'step ms':>9}{'p99 ms':>9}{'memory MB':>11}")
    parts = []
    for tenth in range(10):
        times = np.empty(part)
        for n in range(part):
            level = np.float32(rng.uniform(0, 1))
            start = time.perf_counter()
            backend.step(sound[n % 100][None] * level, np.array([0]), np.array([tenth == n == 0]))
            times[n] = time.perf_counter() - start
        median, p99 = np.percentile(times, [50, 99]) * 1e3
        parts.append({"hours": (tenth + 1) * args.hours / 10, "step_ms": median, "p99_ms": p99, "resident_mb": resident_mb()})
        print(f"{parts[-1]['hours']:9.2f}{median:9.2f}{p99:9.2f}{parts[-1]['resident_mb']:11.1f}", flush=True)
    grown = parts[-1]["resident_mb"] - parts[1]["resident_mb"]
    result = {
        "device": "cpu",
        "weights": "random",
        "checkpoint": args.checkpoint.name,
        "dtype": args.dtype,
        "frames": 10 * part,
        "grown_mb": grown,
        "parts": parts,
    }
    report.finish("long_stream", result)
    return 1 if grown > 16 else 0


if __name__ == "__main__":
    sys.exit(main())
