#!/usr/bin/env python3
"""From `moshi-stt worker` to `/ready`, with the kernels' cache empty and then warm, and where each second goes.

    bench_start.py [--shape 1b] [--slots 1024] [--kv auto] [--device auto] [--checkpoint FOLDER] [--out FILE]

The weights lie on disk (and, the second time, in the system's cache). Each line of the server's log about its start is shown
with the time since the process began; the last one, about the graphs of all sizes, comes while the server serves. Prints a
table and, as its last line, one JSON document.
"""

import argparse
import os
import re
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import report
from bench_server import Server, prepare
from bench_step import measured_on


def start(config: Path, folder: Path, cache: str, on_gpu: bool) -> dict[str, Any]:
    """One start: seconds to `/ready`, the log's lines about it, and when each came."""
    os.environ["TRITON_CACHE_DIR"] = cache
    began, at = time.monotonic(), datetime.now(UTC)
    server = Server(config, folder / "start.out", "auto")
    try:
        server.wait_ready()
        ready = time.monotonic() - began
        deadline = time.monotonic() + 90
        whole = "the graphs of all sizes"
        while on_gpu and time.monotonic() < deadline and whole not in server.log.read_text():
            time.sleep(0.2)
    finally:
        server.stop()
    lines = []
    for line in server.log.read_text().splitlines():
        found = re.match(r"(\S+Z)\s+\S+ \S+: (.*)", line)
        if found and ("start:" in found[2] or "configuration:" in found[2] or "turn of the" in found[2]):
            lines.append([round((datetime.fromisoformat(found[1]) - at).total_seconds(), 2), found[2]])
    return {"ready_seconds": round(ready, 1), "lines": lines}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", default="1b")
    parser.add_argument("--slots", type=int, default=1_024)
    parser.add_argument("--kv", default="auto")
    parser.add_argument("--mimi", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    from random_weights import write_toml

    from moshi_stt.models.torch_impl.device import choose_device

    prepare(args, args.checkpoint)
    engine = {"device": args.device, "kv_dtype": args.kv, "mimi_dtype": args.mimi}
    config = write_toml(args.shape, args.checkpoint, slots=args.slots, engine=engine)
    device, _ = choose_device(args.device)
    found = {}
    with tempfile.TemporaryDirectory() as cache:
        for name in ("cold", "warm"):
            found[name] = start(config, args.checkpoint, cache, device.type == "cuda")
            print(f"{name}: ready after {found[name]['ready_seconds']} s")
            for seconds, line in found[name]["lines"]:
                print(f"   {seconds:6.2f} s  {line}")
    result = {**measured_on(device), "shape": args.shape, "slots": args.slots, "starts": found}
    report.finish("start", result, args.out)


if __name__ == "__main__":
    main()
