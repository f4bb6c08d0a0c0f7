#!/usr/bin/env python3
"""Live paced WebSocket streams against the real server, `moshi-stt worker`, in a process of its own.

    bench_server.py [--shape 1b|tiny] [--streams 1024] [--seconds 60] [--kv auto|bf16|fp8] [--device auto] [--clients 8]
                    [--processes auto] [--devices all --slots N] [--bin] [--checkpoint FOLDER] [--out FILE]
    bench_server.py --find-most --state FILE [--arm sockets|engine] [--packet-ms 80|20] [--start 64] [--trial N,SECONDS]
                    [--speech WAV] [--shape 1b|tiny] [--kv …] [--device …] [--clients …] [--checkpoint FOLDER]

Every stream sends 80 ms of noise as an `Audio` message every 80 ms, each at its own moment, and a `Marker` every 5 s; `clients`
processes hold the sockets. Lag is from the sending of a frame to the arrival of its `Step` at the client (of its `Marker`, less
the model's delay, where a model has no `Step`s). Nothing is lost when every frame has its step and every marker came back.
Lags count from 3 s after the last stream has joined.

The second form makes one trial of the search for the most streams (`find_most.py` has the rule, `trials.py` the two arms),
keeps it in FILE, and prints the table so far and what is next; called again and again it comes to an end. `--trial` makes a
trial of so many streams instead of the search's next.

FOLDER keeps the random checkpoint that the server reads; without one it is made and removed. Prints a table and, as its
last line, one JSON document. Random weights say nothing about accuracy.
"""

import argparse
import asyncio
import heapq
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import report

FRAME_SECONDS = 0.08
FRAME_SAMPLES = 1_920
MARKER_SECONDS = 5.0
RAMP_SECONDS = 8.0
SETTLE_SECONDS = 3.0
START_SECONDS = 300.0


# ---- a client process: `bench_server.py --client PORT STREAMS SECONDS SEED BIN` ----------------------------------------------


class Speaker:
    """One socket."""

    def __init__(self, ws: Any, due: float) -> None:
        self.ws = ws
        self.due = due
        self.sent: list[float] = []
        self.steps = 0
        self.words = 0
        self.markers_sent: dict[int, float] = {}
        self.markers = 0
        self.next_marker = due + MARKER_SECONDS
        self.error = ""
        self.answered = asyncio.Event()
        """Set when the last marker came back, or the stream failed."""


async def client(port: int, streams: int, seconds: float, seed: int, as_bin: bool) -> dict[str, Any]:
    """Speak on `streams` sockets for `seconds`, all joined within RAMP_SECONDS."""
    import aiohttp

    from moshi_stt.protocol import encode_audio, encode_marker

    rng = np.random.default_rng(seed)
    messages = [encode_audio((rng.standard_normal(FRAME_SAMPLES) * 0.2).astype(np.float32), as_bin) for _ in range(16)]
    draw = random.Random(seed)
    begun = time.monotonic()
    counted_from = begun + RAMP_SECONDS + SETTLE_SECONDS
    lags: list[float] = []
    speakers: list[Speaker] = []
    queue: list[tuple[float, int]] = []
    url = f"ws://127.0.0.1:{port}/api/asr-streaming"
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, headers={"kyutai-api-key": "public_token"}) as session:
        listeners = []

        async def join() -> None:
            ws = await session.ws_connect(url, max_msg_size=0, autoping=True)
            due = time.monotonic() + draw.random() * FRAME_SECONDS
            speakers.append(Speaker(ws, due))
            heapq.heappush(queue, (due, len(speakers) - 1))
            listeners.append(asyncio.create_task(listen(speakers[-1], lags, counted_from)))

        async def ramp() -> None:
            for i in range(streams):
                await asyncio.sleep(max(0.0, begun + RAMP_SECONDS * i / streams - time.monotonic()))
                await join()

        ramping = asyncio.create_task(ramp())
        worst_late = 0.0
        until = counted_from + seconds
        while (now := time.monotonic()) < until:
            while queue and queue[0][0] <= now:
                due, number = heapq.heappop(queue)
                speaker = speakers[number]
                worst_late = max(worst_late, now - due if now > counted_from else 0.0)
                if not speaker.ws.closed and not speaker.error:
                    await speaker.ws.send_bytes(messages[(number + len(speaker.sent)) % len(messages)])
                    speaker.sent.append(time.monotonic())
                    if now > speaker.next_marker:
                        await mark(speaker, encode_marker)
                heapq.heappush(queue, (due + FRAME_SECONDS, number))
            await asyncio.sleep(max(0.001, min(0.01, (queue[0][0] if queue else until) - time.monotonic())))
        await ramping
        for speaker in speakers:
            if speaker.ws.closed:
                speaker.answered.set()
            else:
                speaker.answered.clear()
                await mark(speaker, encode_marker)
        await asyncio.wait([asyncio.create_task(speaker.answered.wait()) for speaker in speakers], timeout=20)
        for speaker in speakers:
            await speaker.ws.close()
        for task in listeners:
            task.cancel()
    return counts(speakers, lags) | {"worst_send_delay_ms": round(1e3 * worst_late, 1)}


def counts(speakers: list[Speaker], lags: list[float]) -> dict[str, Any]:
    """What one process of the load has seen."""
    return {
        "lags": [round(1e3 * lag, 2) for lag in lags],
        "streams": len(speakers),
        "frames": sum(len(s.sent) for s in speakers),
        "steps": sum(s.steps for s in speakers),
        "short": sum(max(0, len(s.sent) - s.steps) for s in speakers),
        "markers_sent": sum(len(s.markers_sent) for s in speakers),
        "markers": sum(s.markers for s in speakers),
        "words": sum(s.words for s in speakers),
        "errors": [s.error for s in speakers if s.error][:3],
        "failed": sum(bool(s.error) for s in speakers),
    }


async def mark(speaker: Speaker, encode: Any) -> None:
    number = len(speaker.markers_sent)
    speaker.markers_sent[number] = time.monotonic()
    speaker.next_marker = time.monotonic() + MARKER_SECONDS
    await speaker.ws.send_bytes(encode(number))


async def listen(speaker: Speaker, lags: list[float], counted_from: float) -> None:
    """Count what comes on one socket."""
    import msgpack

    async for message in speaker.ws:
        now = time.monotonic()
        event = msgpack.unpackb(message.data)
        kind = event["type"]
        if kind == "Step":
            if speaker.steps < len(speaker.sent):
                sent = speaker.sent[speaker.steps]
                if sent > counted_from:
                    lags.append(now - sent)
            speaker.steps += 1
        elif kind == "Marker":
            speaker.markers += 1
            if speaker.markers == len(speaker.markers_sent):
                speaker.answered.set()
        elif kind == "Word":
            speaker.words += 1
        elif kind == "Error":
            speaker.error = event["message"]
            speaker.answered.set()


# ---- the server and its measurement --------------------------------------------------------------------------------------


class Server:
    """A worker of our own."""

    def __init__(self, config: Path, log: Path, processes: str, program: str = "", devices: str = "") -> None:
        """program: run in the place of `moshi-stt`, with its arguments; modules of this folder can be imported."""
        self.log = log
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        program = program or "from moshi_stt.cli import main; sys.exit(main())"
        command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); {program}"]
        command += ["worker", "--config", str(config), "--addr", "127.0.0.1", "--port", str(self.port)]
        command += ["--socket-processes", processes, *(["--devices", devices] if devices else [])]
        with log.open("wb") as file:
            self.process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)

    def wait_ready(self) -> None:
        """Raises RuntimeError with the end of its log when it does not get ready."""
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                if self.get("/ready"):
                    return
            except (urllib.error.URLError, OSError):
                pass
            time.sleep(0.25)
        raise RuntimeError("the server did not get ready:\n" + "\n".join(self.log.read_text().splitlines()[-30:]))

    def get(self, path: str) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=10) as answer:
            return str(answer.read().decode())

    def usage(self) -> list[tuple[float, float]]:
        """CPU seconds and resident GB so far, of the worker and of each of its processes; empty where there is no /proc."""
        try:
            children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
            return [usage_of(pid) for pid in (str(self.process.pid), *children)]
        except OSError:
            return []

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            self.process.wait(60)


def usage_of(pid: str) -> tuple[float, float]:
    """CPU seconds and resident GB of a process. Raises OSError."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    status = Path(f"/proc/{pid}/status").read_text()
    resident = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS"))
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK"), resident / 1e6


def run_clients(args: argparse.Namespace, port: int) -> list[dict[str, Any]]:
    """All client processes at once; what each says at its end."""
    share = [args.streams // args.clients + (i < args.streams % args.clients) for i in range(args.clients)]
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, "--client", f"{port},{count},{args.seconds},{seed},{int(args.bin)}"],
            stdout=subprocess.PIPE,
        )
        for seed, count in enumerate(share)
        if count
    ]
    return [json.loads(process.communicate()[0]) for process in processes]


def prepare(args: argparse.Namespace, folder: Path) -> None:
    """Write the checkpoint, unless it is there."""
    if (folder / "tokenizer.model").exists():
        return
    from random_weights import write_checkpoint

    from moshi_stt.models.torch_impl.device import choose_device

    device, _ = choose_device(args.device)
    write_checkpoint(args.shape, folder, device)
    if device.type == "cuda":
        import torch

        torch.cuda.empty_cache()


def search(args: argparse.Namespace, folder: Path) -> None:
    """One trial of `--find-most`."""
    import trials

    prepare(args, folder)
    if args.state is None:
        raise SystemExit("--find-most keeps its trials in a file: --state FILE")
    found = trials.find_most(args, folder)
    print(found.table())
    if found.trials:
        more = found.trials[-1].more
        print(f"lag ms {more.get('lag_ms')}; the load was up to {more.get('worst_send_ms')} ms late")
        print(f"cores of the server's processes: {more.get('server_cores')}")
        for line in more.get("log", []):
            print("  " + line)


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    from bench_step import measured_on
    from random_weights import write_toml

    from moshi_stt.models.torch_impl.device import choose_device

    device, _ = choose_device(args.device)
    prepare(args, folder)
    engine = {"device": args.device, "kv_dtype": args.kv, "mimi_dtype": args.mimi}
    config = write_toml(args.shape, folder, slots=args.slots or args.streams, engine=engine)
    begun = time.monotonic()
    server = Server(config, folder / "worker.out", args.processes, devices=args.devices)
    try:
        server.wait_ready()
        ready = time.monotonic() - begun
        before, began = server.usage(), time.monotonic()
        found = run_clients(args, server.port)
        used = server.usage()
        seconds = time.monotonic() - began
        cores = [(after[0] - start[0]) / seconds for start, after in zip(before, used, strict=True)]
        metrics = server.get("/metrics")
    finally:
        server.stop()
    lags = np.array([lag for part in found for lag in part["lags"]] or [0.0])
    total = {key: sum(part[key] for part in found) for key in found[0] if key not in ("lags", "errors", "worst_send_delay_ms")}
    return {
        "benchmark": "server",
        **measured_on(device),
        "shape": args.shape,
        "kv": args.kv,
        "seconds": args.seconds,
        "clients": args.clients,
        "bin": args.bin,
        **total,
        "errors": [error for part in found for error in part["errors"]][:3],
        "worst_send_delay_ms": max(part["worst_send_delay_ms"] for part in found),
        "lag_ms": {f"p{q}": round(float(np.percentile(lags, q)), 2) for q in (50, 95, 99)} | {"max": float(lags.max())},
        "late": int((lags > 1e3 * FRAME_SECONDS).sum()),
        "counted": len(lags),
        "ready_seconds": round(ready, 1),
        "processes": max(0, len(cores) - 1),
        "server_cores": [round(share, 2) for share in cores],
        "server_gb": [round(resident, 2) for _, resident in used],
        "metrics": [line for line in metrics.splitlines() if "step" in line and "bucket" not in line and line[0] != "#"],
        "log": [
            line for line in server.log.read_text().splitlines() if "step of" in line or "streams" in line or "carried" in line
        ][:9],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", default="1b")
    parser.add_argument("--streams", type=int, default=1024)
    parser.add_argument("--slots", type=int, help="slots of the server; as many as streams unless given")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--kv", default="auto")
    parser.add_argument("--mimi", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--devices", default="", help="`--devices` of the worker; --slots is then the number on each")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--processes", default="auto", help="`--socket-processes` of the worker")
    parser.add_argument("--bin", action="store_true", help="send samples as raw float32, which moshi-server does not take")
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--find-most", action="store_true", help="one trial of the search for the most streams")
    parser.add_argument("--state", type=Path, help="where the search is kept")
    parser.add_argument("--arm", choices=("sockets", "engine"), default="sockets")
    parser.add_argument("--packet-ms", type=int, default=80, choices=(20, 40, 80))
    parser.add_argument("--start", type=int, default=64, help="streams of the first trial")
    parser.add_argument("--trial", help="streams and seconds, as in 1100,120: instead of the search's next")
    parser.add_argument("--speech", help="a long recording, WAV of 24 kHz, mono, 16 bits; noise unless given")
    parser.add_argument("--client", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.client:
        port, streams, seconds, seed, as_bin = args.client.split(",")
        print(json.dumps(asyncio.run(client(int(port), int(streams), float(seconds), int(seed), as_bin == "1"))))
        return
    if args.find_most:
        if args.checkpoint:
            search(args, args.checkpoint)
        else:
            with tempfile.TemporaryDirectory() as folder:
                search(args, Path(folder))
        return
    if args.checkpoint:
        result = measure(args, args.checkpoint)
    else:
        with tempfile.TemporaryDirectory() as folder:
            result = measure(args, Path(folder))
    print(f"{result['streams']} live sockets of {args.shape}, {args.kv} K/V, {args.seconds:g} s on {result['device']}")
    print(f"frames {result['frames']}, steps {result['steps']}, short by {result['short']}, failed streams {result['failed']}")
    print(f"markers sent {result['markers_sent']}, back {result['markers']}; words {result['words']}")
    print("lag ms   " + "  ".join(f"{key} {value:.1f}" for key, value in result["lag_ms"].items()) + f"; late {result['late']}")
    print(f"cores: worker, {result['processes']} further processes: {result['server_cores']}; GB: {result['server_gb']}")
    print(f"ready in {result['ready_seconds']} s")
    report.finish("server", result, args.out)


if __name__ == "__main__":
    main()
