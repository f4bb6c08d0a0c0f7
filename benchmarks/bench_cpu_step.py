#!/usr/bin/env python3
"""One step of one stream on this machine's CPU: ours, PyPI `moshi` and `moshi-server --cpu`, same weights, in one run.

    bench_cpu_step.py CHECKPOINT [--reference-python PYTHON] [--server moshi-server] [--frames 60] [--rounds 3] [--rows 1,2,4,8]
                      [--dtypes f32,bf16,int8,int4] [--slots 64] [--full-context] [--threads 2] [--phrases]

CHECKPOINT is a folder with model.safetensors, mimi.safetensors, tokenizer.model, config.json and moshi-server.toml, as
shared/goldens/make_checkpoint.py writes them. PYTHON is an interpreter with moshi 0.2.13 (left out: no such column); the
server is left out where it is not on the PATH.

Every contender is a process of its own that stays loaded; they take turns of `frames` frames, `rounds` times, so that
what else the machine does meets all of them. A frame is 80 ms of sound. The server's time is that of a round trip on the
loopback. `CPU` is the processor time of all threads, which says most on a machine that is busy otherwise. `floor` is the time
that one core takes to read the language model's products once; memory is that of the weights, of the process at rest, and of
the process with its streams under way. Ours of 8 and of 4 bits take turns with each other, the server and PyPI `moshi` in bf16.
With --phrases the small model that ships takes turns with the last group, with one row and with 64. Prints a table and, as its
last line, one JSON document. Random weights say nothing about accuracy.
"""

import argparse
import asyncio
import itertools
import json
import math
import os
import re
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import report

FRAME_SAMPLES = 1_920
LOAD_SECONDS = 900
TURN_SECONDS = 900

PACKED_BYTES = {"int8": 1 + 4 / 64, "int4": 0.5 + 4 / 32}
"""Bytes of a weight that a step reads, its share of a scale included."""

Step = Callable[[np.ndarray, bool], tuple[float, ...]]
"""Sound (rows, 1920), and whether streams begin: seconds of the whole step, of the language model, of Mimi, and of processor
time, of all the process's threads together."""


# ---- inside a contender's process: `bench_cpu_step.py --child JOB` ---------------------------------------------------------


class Job(NamedTuple):
    """What a contender's process is told, as a JSON list."""

    kind: str
    """ours, phrases or moshi."""
    checkpoint: str
    dtype: str
    """f32, bf16, int8 or int4."""
    rows: int
    threads: int
    slots: int
    full_context: bool


def child(job: Job) -> None:
    """Say `ready`, then for each number of frames read from stdin step so many and print their times as JSON."""
    loaded = time.perf_counter()
    rows = job.rows
    step, report = (reference if job.kind == "moshi" else ours)(job)
    report |= {"load_s": time.perf_counter() - loaded, "rss_gb": resident_gb()}
    print(json.dumps(report), flush=True)
    rng, count = np.random.default_rng(0), 0
    for line in sys.stdin:
        times = []
        for _ in range(int(line)):
            pcm = rng.uniform(-0.3, 0.3, (rows, FRAME_SAMPLES)).astype(np.float32)
            times.append(step(pcm, count == 0))
            count += 1
        print(json.dumps({"times": times, "rss_gb": resident_gb()}), flush=True)


def ours(job: Job) -> tuple[Step, dict[str, Any]]:
    """Times (whole step, language model, Mimi) in seconds of one step of `TorchBackend`; the last two run side by side."""
    from moshi_stt.models.torch_impl.build import load_backend
    from moshi_stt.models.weights import plan_lm

    rows = job.rows
    module, spec, lm_file, mimi_file = (shipped if job.kind == "phrases" else random_checkpoint)(job)
    backend = load_backend(module, lm_file, mimi_file, spec, max(rows, job.slots))
    assert backend.report is not None
    plan, _ = plan_lm(lm_file, spec.lm)
    products = sum(
        math.prod(source.param.shape)
        for source in plan.sources
        if len(source.param.shape) == 2 and source.param.name.startswith(("transformer.", "text_linear."))
    )
    report = {
        "weights_gb": backend.report.weight_bytes / 1e9,
        "streamed_gb": products * (PACKED_BYTES | {"f32": 4, "bf16": 2})[job.dtype] / 1e9,
    }
    parts: dict[str, float] = {}
    timed(backend, "step_lm", parts, "lm")
    timed(backend.mimi, "step", parts, "mimi")
    slots = np.arange(rows)

    def step(pcm: np.ndarray, fresh: bool) -> tuple[float, ...]:
        if fresh and job.full_context:
            for tensor in backend.state.named.values():
                tensor.zero_()  # so that what the rings hold is read from memory
            backend.fill_context()
        start, used = time.perf_counter(), time.process_time()
        backend.step(pcm, slots, np.full(rows, fresh and not job.full_context))
        return time.perf_counter() - start, parts["lm"], parts["mimi"], time.process_time() - used

    return step, report


def random_checkpoint(job: Job) -> tuple[Any, Any, Path, Path]:
    """Module, spec, language model's file and Mimi's of a job's checkpoint."""
    import msgspec

    from moshi_stt.config import EngineConfig, KyutaiModule
    from moshi_stt.models.spec import MimiSpec, ModelSpec
    from moshi_stt.models.spec_tables import lm_spec_from_json

    checkpoint, is_packed = Path(job.checkpoint), job.dtype in PACKED_BYTES
    lm = lm_spec_from_json(msgspec.json.decode((checkpoint / "config.json").read_bytes()))
    module = KyutaiModule(
        name="asr",
        path="/",
        type="BatchedAsr",
        batch_size=job.rows,
        lm_model_file="",
        text_tokenizer_file="",
        audio_tokenizer_file="",
        asr_delay_in_tokens=6,
        model=None,
        dtype_override=None if is_packed else job.dtype,  # type: ignore[arg-type]
        engine=EngineConfig(device="cpu", threads=job.threads, quantize=job.dtype if is_packed else "none"),  # type: ignore[arg-type]
    )
    spec = ModelSpec(lm, MimiSpec(codebooks=lm.codebooks), 6)
    return module, spec, checkpoint / "model.safetensors", checkpoint / "mimi.safetensors"


def shipped(job: Job) -> tuple[Any, Any, Path, Path]:
    """The same of the small model that ships."""
    import msgspec

    from moshi_stt.config import KyutaiModule
    from moshi_stt.config_load import load_config
    from moshi_stt.models.spec_tables import spec_from_module

    (module,) = load_config("phrases").config.modules
    assert isinstance(module, KyutaiModule)
    engine = msgspec.structs.replace(module.engine, device="cpu", threads=job.threads)
    module = msgspec.structs.replace(module, engine=engine)
    return module, spec_from_module(module), Path(module.lm_model_file), Path(module.audio_tokenizer_file)


def timed(owner: Any, name: str, into: dict[str, float], key: str) -> None:
    """Make a method write down how long it took."""
    inner = getattr(owner, name)

    def outer(*args: Any) -> Any:
        start = time.perf_counter()
        result = inner(*args)
        into[key] = time.perf_counter() - start
        return result

    setattr(owner, name, outer)


def reference(job: Job) -> tuple[Step, dict[str, Any]]:
    """Times of one step of PyPI `moshi` as its scripts run it: Mimi, then `LMGen`."""
    import torch
    from moshi.models import LMGen, loaders

    checkpoint, rows = Path(job.checkpoint), job.rows
    dtype = {"f32": torch.float32, "bf16": torch.bfloat16}[job.dtype]
    if job.threads:
        torch.set_num_threads(job.threads)
    info = loaders.CheckpointInfo.from_hf_repo(
        "local",
        moshi_weights=checkpoint / "model.safetensors",
        mimi_weights=checkpoint / "mimi.safetensors",
        tokenizer=checkpoint / "tokenizer.model",
        config_path=checkpoint / "config.json",
    )
    mimi = info.get_mimi(device="cpu")
    lm = LMGen(info.get_moshi(device="cpu", dtype=dtype), use_sampling=False)
    mimi.streaming_forever(rows)
    lm.streaming_forever(rows)

    @torch.no_grad()
    def step(pcm: np.ndarray, fresh: bool) -> tuple[float, ...]:
        start, used = time.perf_counter(), time.process_time()
        codes = mimi.encode(torch.from_numpy(pcm)[:, None])
        middle = time.perf_counter()
        if fresh:
            lm.step_with_extra_heads(codes)
        middle = middle if not fresh else time.perf_counter()
        lm.step_with_extra_heads(codes)
        end = time.perf_counter()
        return end - start, end - middle, middle - start, time.process_time() - used

    return step, {}


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

    def __init__(self, name: str, python: str, job: Job) -> None:
        self.name = name
        self.rows = job.rows
        self.report: dict[str, Any] = {}
        self._command = [python, __file__, "--child", json.dumps(job)]

    async def open(self) -> "Child":
        pipe = asyncio.subprocess.PIPE
        self._process = await asyncio.create_subprocess_exec(*self._command, stdin=pipe, stdout=pipe, limit=1 << 24)
        self.report = await self._read(LOAD_SECONDS)
        return self

    async def turn(self, frames: int) -> list[list[float]]:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{frames}\n".encode())
        turn = await self._read(TURN_SECONDS)
        self.report["streaming_gb"] = turn["rss_gb"]
        times: list[list[float]] = turn["times"]
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
        self.report["streaming_gb"] = resident_gb(str(self._process.pid))
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
    columns = dict(zip(("step", "lm", "mimi", "cpu"), np.array(times).T * 1e3, strict=False))
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


def table(results: list[dict[str, Any]], bandwidth: float) -> str:
    """A line for each contender. floor: the time that reading the language model's products once takes."""
    columns = (("weights_gb", "weights"), ("rss_gb", "rest"), ("streaming_gb", "stream"))
    head = "".join(f"{title:>9}" for _, title in columns)
    lines = [
        f"{'':24}{'rows':>5}{'step ms':>9}{'p10':>7}{'p90':>7}{'LM':>7}{'Mimi':>7}{'CPU':>8}{'floor':>7}{head}{'load s':>8}"
    ]
    for r in results:
        parts = "".join(f"{r[key]:7.1f}" if key in r else f"{'':>7}" for key in ("lm_ms", "mimi_ms"))
        parts += f"{r['cpu_ms']:8.1f}" if "cpu_ms" in r else f"{'':>8}"
        parts += f"{1e3 * r['streamed_gb'] / bandwidth:7.1f}" if "streamed_gb" in r else f"{'':>7}"
        memory = "".join(f"{r[key]:6.2f} GB" if key in r else f"{'':>9}" for key, _ in columns)
        step = f"{r['step_ms']:9.1f}{r['p10_ms']:7.1f}{r['p90_ms']:7.1f}"
        lines.append(f"{r['name']:24}{r['rows']:5}{step}{parts}{memory}{r['load_s']:8.1f}")
    return "\n".join(lines)


def groups(args: argparse.Namespace) -> list[list[Any]]:
    """Who takes turns with whom: one precision after the other, for the memory's sake, and all quantised ones together."""
    dtypes = args.dtypes.split(",")
    packed = [dtype for dtype in dtypes if dtype in PACKED_BYTES]
    together = [[dtype] for dtype in dtypes if dtype not in PACKED_BYTES] + ([packed] if packed else [])
    program = shutil.which(args.server)
    found: list[list[Any]] = []
    for group in together:
        contenders: list[Any] = []
        for dtype, rows in itertools.product(group, map(int, args.rows.split(","))):
            name = f"moshi-stt {dtype}" + (f" x {rows}" if rows > 1 else "")
            job = Job("ours", str(args.checkpoint), dtype, rows, args.threads, args.slots, args.full_context)
            contenders.append(Child(name, sys.executable, job))
        theirs = group[0] if group[0] not in PACKED_BYTES else "bf16"
        if args.reference_python:
            job = Job("moshi", str(args.checkpoint), theirs, 1, args.threads, 1, False)
            contenders.append(Child(f"moshi 0.2.13 {theirs}", args.reference_python, job))
        if program and group[0] != "bf16":
            contenders.append(RustServer(program, args.checkpoint))
        if args.phrases and group is together[-1]:
            for rows in (1, PHRASES_ROWS):
                job = Job("phrases", "", "f32", rows, args.threads, PHRASES_ROWS, args.full_context)
                contenders.append(Child(f"{PHRASES} x {rows}", sys.executable, job))
        found.append(contenders)
    return found


PHRASES, PHRASES_ROWS = "phrases f32", 64


def phrases_lines(results: list[dict[str, Any]]) -> list[str]:
    """What the small model's steps are to those of the models in the same turns, and what a step of many rows takes."""
    found = {r["name"]: r for r in results}
    one, many = (found[f"{PHRASES} x {rows}"] for rows in (1, PHRASES_ROWS))
    lines = [
        f"phrases, one stream: {one['step_ms'] / other['step_ms']:.3f} of the step of {name}, "
        f"{one['cpu_ms'] / other['cpu_ms']:.3f} of its processor time"
        for name, other in found.items()
        if name == "moshi-stt int4"
    ]
    times = f"{many['step_ms']:.1f} ms a step, {many['cpu_ms']:.1f} ms of processor time"
    return [*lines, f"phrases, {PHRASES_ROWS} streams: {times}"]


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        child(Job(*json.loads(sys.argv[2])))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--reference-python", help="an interpreter that has moshi 0.2.13")
    parser.add_argument("--server", default="moshi-server", help="the Rust server's program")
    parser.add_argument("--frames", type=int, default=60, help="of a turn")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", default="1", help="of ours; more than one need several processes and their memory")
    parser.add_argument("--slots", type=int, default=1, help="that ours is loaded with; those without a stream are empty")
    parser.add_argument("--dtypes", default="f32,bf16,int8,int4", help="of ours")
    parser.add_argument("--full-context", action="store_true", help="ours begins with a context that is full")
    parser.add_argument("--threads", type=int, default=0, help="of ours and of moshi; 0 is each one's own default")
    parser.add_argument("--phrases", action="store_true", help="the small model that ships, too, in turns with the last group")
    args = parser.parse_args()
    results: list[dict[str, Any]] = []
    for contenders in groups(args):
        results += asyncio.run(compete(contenders, args.frames, args.rounds))
    bandwidth = read_bandwidth()
    print(table(results, bandwidth))
    if args.phrases:
        print("\n".join(phrases_lines(results)))
    print(f"one core reads {bandwidth:.1f} GB/s of memory")
    result = {
        "device": "cpu",
        "weights": "random",
        "checkpoint": args.checkpoint.name,
        "threads": args.threads,
        "slots": args.slots,
        "full_context": args.full_context,
        "read_gb_per_s": bandwidth,
        "results": results,
    }
    report.finish("cpu_step", result)


if __name__ == "__main__":
    main()
