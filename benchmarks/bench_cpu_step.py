#!/usr/bin/env python3
"""One step of one stream on this machine's CPU: ours, PyPI `moshi` and `moshi-server --cpu`, same weights, in one run.

    bench_cpu_step.py CHECKPOINT [--reference-python PYTHON] [--server moshi-server] [--frames 60] [--rounds 3] [--rows 1,2,4,8]

CHECKPOINT is a folder with model.safetensors, mimi.safetensors, tokenizer.model, config.json and moshi-server.toml, as
shared/goldens/make_checkpoint.py writes them. PYTHON is an interpreter with moshi 0.2.13 (left out: no such column); the
server is left out where it is not on the PATH.

Every contender is a process of its own that stays loaded; they take turns of `frames` frames, `rounds` times, so that
what else the machine does meets all of them. A frame is 80 ms of sound. The server's time is that of a round trip on the
loopback. Prints a table and, as its last line, one JSON document. Random weights say nothing about accuracy.
"""

import argparse
import asyncio
import json
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Protocol

import numpy as np

FRAME_SAMPLES = 1_920
LOAD_SECONDS = 900
TURN_SECONDS = 900


# ---- inside a contender's process: `bench_cpu_step.py --child KIND CHECKPOINT DTYPE ROWS THREADS` --------------------------


def child(kind: str, checkpoint: Path, dtype: str, rows: int, threads: int) -> None:
    """Say `ready`, then for each number of frames read from stdin step so many and print their times as JSON."""
    loaded = time.perf_counter()
    step = {"ours": ours, "moshi": reference}[kind](checkpoint, dtype, rows, threads)
    report: dict[str, Any] = {"load_s": time.perf_counter() - loaded, "rss_gb": resident_gb()}
    print(json.dumps(report), flush=True)
    rng, count = np.random.default_rng(0), 0
    for line in sys.stdin:
        times = []
        for _ in range(int(line)):
            pcm = rng.uniform(-0.3, 0.3, (rows, FRAME_SAMPLES)).astype(np.float32)
            times.append(step(pcm, count == 0))
            count += 1
        print(json.dumps(times), flush=True)


def ours(checkpoint: Path, dtype: str, rows: int, threads: int) -> Any:
    """Times (whole step, language model, Mimi) in seconds of one step of `TorchBackend`; the last two run side by side."""
    import msgspec

    from moshi_stt.config import EngineConfig, KyutaiModule
    from moshi_stt.models.spec import MimiSpec, ModelSpec, lm_spec_from_json
    from moshi_stt.models.torch_impl.build import load_backend

    lm = lm_spec_from_json(msgspec.json.decode((checkpoint / "config.json").read_bytes()))
    module = KyutaiModule(
        name="asr",
        path="/",
        type="BatchedAsr",
        batch_size=rows,
        lm_model_file="",
        text_tokenizer_file="",
        audio_tokenizer_file="",
        asr_delay_in_tokens=6,
        model=None,
        dtype_override=dtype,  # type: ignore[arg-type]
        engine=EngineConfig(device="cpu", threads=threads),
    )
    files = checkpoint / "model.safetensors", checkpoint / "mimi.safetensors"
    backend = load_backend(module, *files, ModelSpec(lm, MimiSpec(codebooks=lm.codebooks), 6), rows)
    parts: dict[str, float] = {}
    timed(backend, "step_lm", parts, "lm")
    timed(backend.mimi, "step", parts, "mimi")
    slots = np.arange(rows)

    def step(pcm: np.ndarray, fresh: bool) -> tuple[float, float, float]:
        start = time.perf_counter()
        backend.step(pcm, slots, np.full(rows, fresh))
        return time.perf_counter() - start, parts["lm"], parts["mimi"]

    return step


def timed(owner: Any, name: str, into: dict[str, float], key: str) -> None:
    """Make a method write down how long it took."""
    inner = getattr(owner, name)

    def outer(*args: Any) -> Any:
        start = time.perf_counter()
        result = inner(*args)
        into[key] = time.perf_counter() - start
        return result

    setattr(owner, name, outer)


def reference(checkpoint: Path, dtype: str, rows: int, threads: int) -> Any:
    """Times of one step of PyPI `moshi` as its scripts run it: Mimi, then `LMGen`."""
    import torch
    from moshi.models import LMGen, loaders

    if threads:
        torch.set_num_threads(threads)
    info = loaders.CheckpointInfo.from_hf_repo(
        "local",
        moshi_weights=checkpoint / "model.safetensors",
        mimi_weights=checkpoint / "mimi.safetensors",
        tokenizer=checkpoint / "tokenizer.model",
        config_path=checkpoint / "config.json",
    )
    mimi = info.get_mimi(device="cpu")
    lm = LMGen(info.get_moshi(device="cpu", dtype={"f32": torch.float32, "bf16": torch.bfloat16}[dtype]), use_sampling=False)
    mimi.streaming_forever(rows)
    lm.streaming_forever(rows)

    @torch.no_grad()
    def step(pcm: np.ndarray, fresh: bool) -> tuple[float, float, float]:
        start = time.perf_counter()
        codes = mimi.encode(torch.from_numpy(pcm)[:, None])
        middle = time.perf_counter()
        if fresh:
            lm.step_with_extra_heads(codes)
        middle = middle if not fresh else time.perf_counter()
        lm.step_with_extra_heads(codes)
        end = time.perf_counter()
        return end - start, end - middle, middle - start

    return step


def resident_gb(process: str = "self") -> float:
    """Memory a process holds, in GB; 0 where the system does not say."""
    try:
        pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    except OSError:
        return 0.0
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e9


# ---- the contenders, seen from outside -------------------------------------------------------------------------------------


class Contender(Protocol):
    name: str
    rows: int
    report: dict[str, Any]

    async def turn(self, frames: int) -> list[list[float]]:
        """Step so many frames: seconds of each, whole and, where they are known, language model and Mimi."""
        ...

    async def close(self) -> None: ...


class Child:
    """A Python process of this same file."""

    def __init__(self, name: str, python: str, kind: str, checkpoint: Path, dtype: str, rows: int, threads: int) -> None:
        self.name = name
        self.rows = rows
        self.report: dict[str, Any] = {}
        self._command = [python, __file__, "--child", kind, str(checkpoint), dtype, str(rows), str(threads)]

    async def open(self) -> "Child":
        pipe = asyncio.subprocess.PIPE
        self._process = await asyncio.create_subprocess_exec(*self._command, stdin=pipe, stdout=pipe, limit=1 << 24)
        self.report = await self._read(LOAD_SECONDS)
        return self

    async def turn(self, frames: int) -> list[list[float]]:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{frames}\n".encode())
        times: list[list[float]] = await self._read(TURN_SECONDS)
        return times

    async def _read(self, seconds: float) -> Any:
        assert self._process.stdout is not None
        line = await asyncio.wait_for(self._process.stdout.readline(), seconds)
        if not line:
            raise SystemExit(f"{self.name} ended with {await self._process.wait()}")
        return json.loads(line)

    async def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        await self._process.wait()


class RustServer:
    """`moshi-server worker --cpu` with one slot, and a client that sends a frame and waits for its `Step`."""

    rows = 1

    def __init__(self, program: str, checkpoint: Path) -> None:
        self.name = "moshi-server f32"
        self.report: dict[str, Any] = {}
        self._program = program
        self._checkpoint = checkpoint

    async def open(self) -> "RustServer":
        import aiohttp

        self._folder = tempfile.TemporaryDirectory()
        folder = Path(self._folder.name)
        text = (self._checkpoint / "moshi-server.toml").read_text()
        text = re.sub(r"(?m)^batch_size = .*", "batch_size = 1", text)
        text = re.sub(r"(?m)^(static_dir|log_dir) = .*", rf'\1 = "{folder}"', text)
        (folder / "server.toml").write_text(text)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command = [
            self._program,
            "worker",
            "--cpu",
            "--config",
            str(folder / "server.toml"),
            "-a",
            "127.0.0.1",
            "-p",
            str(port),
        ]
        start = time.perf_counter()
        quiet = asyncio.subprocess.DEVNULL
        self._process = await asyncio.create_subprocess_exec(*command, stdout=quiet, stderr=quiet)
        self._session = aiohttp.ClientSession()
        self._url = f"http://127.0.0.1:{port}/api/asr-streaming?auth_id=public_token"
        while True:
            try:
                await (await self._session.ws_connect(self._url)).close()
                break
            except aiohttp.ClientError:
                if self._process.returncode is not None or time.perf_counter() - start > LOAD_SECONDS:
                    raise SystemExit(f"{self._program} did not come up: {' '.join(command)}") from None
                await asyncio.sleep(0.2)
        self.report = {"load_s": time.perf_counter() - start, "rss_gb": resident_gb(str(self._process.pid))}
        return self

    async def turn(self, frames: int) -> list[list[float]]:
        import msgpack

        rng, times = np.random.default_rng(0), []
        connection = await self._session.ws_connect(self._url, max_msg_size=0)  # it drops one that is idle
        for _ in range(frames):
            pcm = rng.uniform(-0.3, 0.3, FRAME_SAMPLES).astype(np.float32)
            message = msgpack.packb({"type": "Audio", "pcm": pcm.tolist()}, use_single_float=True)
            start = time.perf_counter()
            await connection.send_bytes(message)
            while True:
                answer = await asyncio.wait_for(connection.receive_bytes(), TURN_SECONDS)
                if msgpack.unpackb(answer)["type"] == "Step":
                    break
            times.append([time.perf_counter() - start])
        await connection.close()
        return times

    async def close(self) -> None:
        await self._session.close()
        self._process.terminate()
        await self._process.wait()
        self._folder.cleanup()


# ---- the run ---------------------------------------------------------------------------------------------------------------


async def compete(contenders: list[Any], frames: int, rounds: int) -> list[dict[str, Any]]:
    """Load all, let them take turns, and return a row of results for each. The first turn warms up and does not count."""
    opened: list[Contender] = []
    try:
        for contender in contenders:
            opened.append(await contender.open())
            print(f"loaded {contender.name} in {contender.report['load_s']:.1f} s", file=sys.stderr)
        times: dict[str, list[list[float]]] = {contender.name: [] for contender in opened}
        for number in range(rounds + 1):
            for contender in opened:
                turn = await contender.turn(frames if number else min(10, frames))
                times[contender.name] += turn if number else []
        return [summary(contender, times[contender.name]) for contender in opened]
    finally:
        for contender in opened:
            await contender.close()


def summary(contender: Contender, times: list[list[float]]) -> dict[str, Any]:
    columns = dict(zip(("step", "lm", "mimi"), np.array(times).T * 1e3, strict=False))
    row: dict[str, Any] = {"name": contender.name, "rows": contender.rows, "frames": len(times), **contender.report}
    for key, values in columns.items():
        row |= {f"{key}_ms": float(np.median(values))}
    whole = columns["step"]
    return row | {"p10_ms": float(np.percentile(whole, 10)), "p90_ms": float(np.percentile(whole, 90))}


def read_bandwidth() -> float:
    """GB/s at which one core reads memory that is in no cache: the floor of a step is bytes of weights by this."""
    block = np.ones(1 << 28, np.uint8).view(np.uint64)
    best = min(_seconds(block) for _ in range(5))
    return float(block.nbytes / best / 1e9)


def _seconds(block: np.ndarray) -> float:
    start = time.perf_counter()
    block.max()
    return time.perf_counter() - start


def table(results: list[dict[str, Any]]) -> str:
    lines = [f"{'':24}{'rows':>5}{'step ms':>9}{'p10':>7}{'p90':>7}{'LM':>7}{'Mimi':>7}{'GB':>6}{'load s':>8}"]
    for r in results:
        parts = "".join(f"{r[key]:7.1f}" if key in r else f"{'':>7}" for key in ("lm_ms", "mimi_ms"))
        step = f"{r['step_ms']:9.1f}{r['p10_ms']:7.1f}{r['p90_ms']:7.1f}"
        lines.append(f"{r['name']:24}{r['rows']:5}{step}{parts}{r['rss_gb']:6.1f}{r['load_s']:8.1f}")
    return "\n".join(lines)


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        kind, checkpoint, dtype, rows, threads = sys.argv[2:]
        child(kind, Path(checkpoint), dtype, int(rows), int(threads))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--reference-python", help="an interpreter that has moshi 0.2.13")
    parser.add_argument("--server", default="moshi-server", help="the Rust server's program")
    parser.add_argument("--frames", type=int, default=60, help="of a turn")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", default="1", help="of ours; more than one need several processes and their memory")
    parser.add_argument("--dtypes", default="f32,bf16")
    parser.add_argument("--threads", type=int, default=0, help="of ours and of moshi; 0 is each one's own default")
    args = parser.parse_args()
    results: list[dict[str, Any]] = []
    for dtype in args.dtypes.split(","):  # one precision after the other, for the memory's sake
        contenders: list[Any] = [
            Child(f"moshi-stt {dtype}", sys.executable, "ours", args.checkpoint, dtype, int(rows), args.threads)
            for rows in args.rows.split(",")
        ]
        for contender in contenders[1:]:
            contender.name += f" x {contender.rows}"
        if args.reference_python:
            python = args.reference_python
            contenders.append(Child(f"moshi 0.2.13 {dtype}", python, "moshi", args.checkpoint, dtype, 1, args.threads))
        program = shutil.which(args.server)
        if program and dtype == "f32":
            contenders.append(RustServer(program, args.checkpoint))
        results += asyncio.run(compete(contenders, args.frames, args.rounds))
    bandwidth = read_bandwidth()
    print(table(results))
    print(f"one core reads {bandwidth:.1f} GB/s of memory")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    document = {
        "benchmark": "cpu_step",
        "machine": f"{platform.machine()} {platform.system()}, {os.cpu_count()} cores",
        "device": "cpu",
        "weights": "random",
        "checkpoint": args.checkpoint.name,
        "commit": commit.stdout.strip(),
        "read_gb_per_s": bandwidth,
        "results": results,
    }
    print(json.dumps(document))


if __name__ == "__main__":
    main()
