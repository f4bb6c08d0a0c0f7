"""One trial of `find_most`: a fresh server or engine, full contexts, the load, and what came of it.

Two arms. `sockets`: the whole server in a process of its own, the load's WebSockets in others. `engine`: the engine in a
process of its own together with its load, without sockets or protocol; one interpreter then does everything.
"""

import argparse
import asyncio
import json
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from find_most import Search, Trial, load
from live_load import Job, Load, Speaker, Told

FRAME_MS = 80.0


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """What must be the same in all trials of a search."""
    names = ("arm", "shape", "kv", "mimi", "device", "packet_ms", "processes", "clients", "speech")
    return {name: str(getattr(args, name) or "") for name in names}


def find_most(args: argparse.Namespace, folder: Path) -> Search:
    """Make one trial, the next of the search in `args.state` or the one that `args.trial` names, and keep what came of it."""
    search = load(args.state, args.start, settings_of(args))
    if args.trial:
        following: tuple[int, int] | None = tuple(int(part) for part in args.trial.split(","))  # type: ignore[assignment]
    else:
        following = search.next()
    if following is not None:
        streams, seconds = following
        print(f"trial: {streams} streams, {seconds} s", flush=True)
        search.trials.append(make_trial(args, folder, streams, seconds))
        search.save(args.state)
    return search


def make_trial(args: argparse.Namespace, folder: Path, streams: int, seconds: int) -> Trial:
    """In fresh processes. The seed is the search's start plus the streams."""
    seed = args.start + streams
    busy = gpu_processes()
    if args.arm == "sockets":
        told, more = over_sockets(args, folder, streams, seconds, seed)
    else:
        told, more = in_process(args, folder, streams, seconds, seed)
    lags = np.array([lag for part in told for lag in part.lags] or [0.0])
    final = np.array([value for part in told for value in part.final] or [0.0])
    aborted = next((part.aborted for part in told if part.aborted), "")
    unfinished = sum(part.unfinished for part in told)
    if unfinished and not aborted:
        aborted = f"{unfinished} streams had no last word"
    lag_ms = {f"p{q}": round(float(np.percentile(lags, q)), 2) for q in (50, 95, 99)} | {"max": float(lags.max())}
    return Trial(
        streams,
        seconds,
        seed,
        aborted=aborted,
        late=int((lags > FRAME_MS).sum()),
        chunks=sum(part.chunks for part in told),
        final_ms={f"p{q}": round(float(np.percentile(final, q)), 1) for q in (50, 95)},
        more=more
        | {
            "steps": sum(part.steps for part in told),
            "words": sum(part.words for part in told),
            "lag_ms": lag_ms,
            "worst_send_ms": max(part.worst_send_ms for part in told),
            "other_gpu_processes": {"before": busy, "after": gpu_processes()},
        },
    )


def over_sockets(
    args: argparse.Namespace, folder: Path, streams: int, seconds: int, seed: int
) -> tuple[list[Told], dict[str, Any]]:
    from bench_server import Server
    from random_weights import write_toml

    engine = {"device": args.device, "kv_dtype": args.kv, "mimi_dtype": args.mimi}
    config = write_toml(args.shape, folder, slots=streams, engine=engine)
    begun = time.monotonic()
    server = Server(config, folder / "worker.out", args.processes, "import trials; sys.exit(trials.old_worker())")
    try:
        server.wait_ready()
        ready = time.monotonic() - begun
        before, began = server.usage(), time.monotonic()
        told = run_load(args, server.port, streams, seconds, seed)
        used, took = server.usage(), time.monotonic() - began
        gpu = nvidia_smi("--query-gpu=memory.used,memory.total,utilization.gpu")
        metrics = server.get("/metrics") if server.process.poll() is None else ""
    finally:
        server.stop()
    log = server.log.read_text().splitlines()
    return told, {
        "ready_seconds": round(ready, 1),
        "server_cores": [round((b[0] - a[0]) / took, 2) for a, b in zip(before, used, strict=False)],
        "server_gb": [round(resident, 2) for _, resident in used],
        "gpu_at_the_end": gpu,
        "metrics": [line for line in metrics.splitlines() if "step" in line and "bucket" not in line and line[0] != "#"],
        "log": [line for line in log if any(part in line for part in ("start:", "turn of the", "step of", "room for"))][:40],
    }


def run_load(args: argparse.Namespace, port: int, streams: int, seconds: int, seed: int) -> list[Told]:
    """All processes of the load at once."""
    share = [streams // args.clients + (i < streams % args.clients) for i in range(args.clients)]
    begin = time.monotonic() + 4.0
    jobs = [Job(port, n, seconds, 1_000 * seed + i, args.packet_ms, begin, args.speech or "") for i, n in enumerate(share) if n]
    program = str(Path(__file__).with_name("live_load.py"))
    processes = [subprocess.Popen([sys.executable, program, json.dumps(job._asdict())], stdout=subprocess.PIPE) for job in jobs]
    return [Told(**json.loads(process.communicate()[0])) for process in processes]


def in_process(
    args: argparse.Namespace, folder: Path, streams: int, seconds: int, seed: int
) -> tuple[list[Told], dict[str, Any]]:
    """The engine and its load in a fresh process: this program with `engine`."""
    job = Job(0, streams, seconds, 1_000 * seed, args.packet_ms, 0.0, args.speech or "")
    names = ("shape", "kv", "mimi", "device")
    command = [sys.executable, str(Path(__file__)), json.dumps({name: getattr(args, name) for name in names} | job._asdict())]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    document = json.loads(done.stdout.splitlines()[-1])
    return [Told(**document["told"])], document["more"]


class EngineLoad(Load):
    """The streams of one process, over an engine of the same process."""

    def __init__(self, job: Job, engine: Any) -> None:
        super().__init__(job)
        self.engine = engine

    async def run(self) -> Told:
        await self.live()
        return self.told()

    async def connect(self) -> Any:
        return Spoken(self.engine.open())

    async def deliver(self, speaker: Speaker, packet: Any, due: float) -> None:
        from moshi_stt.engine.commands import Audio

        if speaker.ws.stream.offer(Audio(packet, due)) is not None:
            self.abort("a stream's inbox is full")

    async def mark(self, speaker: Speaker) -> None:
        from moshi_stt.engine.commands import Mark

        speaker.ws.stream.offer(Mark(1))

    async def listen(self, speaker: Speaker) -> None:
        async for event in speaker.ws.stream:
            self.heard(speaker, type(event).__name__, getattr(event, "message", ""))


class Spoken:
    """A stream of the engine where `Load` has a socket."""

    closed = False

    def __init__(self, stream: Any) -> None:
        self.stream = stream


async def run_engine(given: dict[str, Any]) -> dict[str, Any]:
    """A warm engine, and its load."""
    import torch
    from bench_engine import Counter, begin_old, percentiles, word
    from bench_step import build, fill
    from random_weights import model_spec

    from moshi_stt.engine.batch import BatchEngine, LoadedModel
    from moshi_stt.engine.engine import EngineInfo
    from moshi_stt.engine.slots import spare_slots
    from moshi_stt.models.torch_impl.device import choose_device
    from moshi_stt.text.words import WordAssembler

    settings = {name: given.pop(name) for name in ("shape", "kv", "mimi", "device")}
    job = Job(**given)
    device, _ = choose_device(settings["device"])
    slots, delay = job.streams + spare_slots(job.streams), model_spec(settings["shape"]).delay_frames

    def load_model() -> LoadedModel:
        backend = build(settings["shape"], device, slots, kv=settings["kv"], mimi=settings["mimi"])
        with torch.inference_mode():
            fill(backend)
        begin_old(backend)
        info = EngineInfo("batched_asr", settings["shape"], "", (), str(device), settings["kv"], job.streams)
        return LoadedModel(backend, partial(WordAssembler, word, delay), info, job.streams, delay)

    observer = Counter()
    engine = BatchEngine(load_model, observer=observer)
    begun = time.monotonic()
    await engine.start()
    ready = time.monotonic() - begun
    observer.steps.clear()
    told = await EngineLoad(job._replace(begin=time.monotonic() + 0.5), engine).run()
    details = engine.info.details
    await engine.stop()
    steps = [seconds for _, seconds, _ in observer.steps]
    return {
        "told": told.__dict__,
        "more": {
            "ready_seconds": round(ready, 1),
            "step_ms": percentiles(steps),
            "rows_a_step": round(float(np.mean([rows for _, _, rows in observer.steps] or [0])), 1),
            "log": [f"{name}: {value}" for name, value in details.items()],
        },
    }


def old_worker() -> int:
    """`moshi-stt worker` whose streams begin with full contexts, of anything."""
    import torch
    from bench_engine import begin_old
    from bench_step import fill

    from moshi_stt.cli import main
    from moshi_stt.models.torch_impl import build

    plain = build.load_backend

    def load_old(*args: Any, **more: Any) -> Any:
        backend = plain(*args, **more)
        with torch.inference_mode():
            fill(backend)
        begin_old(backend)
        return backend

    build.load_backend = load_old
    return main()


def gpu_processes() -> list[str]:
    """What else is on the GPU."""
    return nvidia_smi("--query-compute-apps=pid,process_name,used_memory")


def nvidia_smi(query: str) -> list[str]:
    """Lines of its answer; none where there is no such program."""
    command = ["nvidia-smi", query, "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=30).stdout.splitlines()
    except OSError:
        return []


if __name__ == "__main__":
    from moshi_stt.server.runtime import tune_interpreter

    tune_interpreter()
    print(json.dumps(asyncio.run(run_engine(json.loads(sys.argv[1])))))
