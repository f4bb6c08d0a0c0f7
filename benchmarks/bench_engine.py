#!/usr/bin/env python3
"""Paced live streams through the whole engine: how long a step takes, and how late its tokens are.

    bench_engine.py [--shape 1b|2.6b|tiny] [--streams 1024] [--seconds 60] [--kv auto|bf16|fp8] [--mimi tf32] [--device auto]
                    [--lifetime 20] [--old] [--out FILE]

Streams send a frame of noise every 80 ms, in 32 groups at as many moments, live for a random time (mean `lifetime` seconds),
finish, and are replaced at once. Lag is from the moment a frame was complete to the delivery of what the model said of it, in
this process's event loop, which also feeds all streams. A frame is late when its lag exceeds 80 ms: the next one was complete
before. --old: every stream begins with a full context (of anything), so that attention always reads all of every ring.

Prints a table and, as its last line, one JSON document. Random weights say nothing about accuracy.
"""

import argparse
import asyncio
import json
import random
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_step import build, fill, machine
from random_weights import SHAPES, model_spec

from moshi_stt.cli.worker import tune_interpreter
from moshi_stt.constants import FRAME_SAMPLES, FRAME_SECONDS
from moshi_stt.engine.batch import BatchEngine, LoadedModel
from moshi_stt.engine.engine import EngineInfo, SilentObserver
from moshi_stt.engine.slots import spare_slots
from moshi_stt.engine.stream import Stream
from moshi_stt.errors import NoFreeSlot
from moshi_stt.events import AnyEvent, Error, Step
from moshi_stt.models.torch_impl.device import choose_device


class Counter(SilentObserver):
    """Keeps every time it is told."""

    def __init__(self) -> None:
        self.steps: list[tuple[float, int]] = []
        self.lags: list[float] = []
        self.refusals = 0

    def stepped(self, seconds: float, rows: int) -> None:
        self.steps.append((seconds, rows))

    def lagged(self, seconds: float) -> None:
        self.lags.append(seconds)

    def refused(self) -> None:
        self.refusals += 1

    def clear(self) -> None:
        self.steps.clear()
        self.lags.clear()
        self.refusals = 0


class Speaker:
    """One stream: what it sent, and what came back."""

    __slots__ = ("errors", "finishing", "frames_left", "heard", "number", "sent", "stream")

    def __init__(self, stream: Stream, number: int, frames: int) -> None:
        self.stream = stream
        self.number = number
        self.frames_left = frames
        self.sent = 0
        self.heard = 0
        self.finishing = False
        self.errors = 0

    def count(self, events: Iterable[AnyEvent]) -> None:
        for event in events:
            if type(event) is Step:
                self.heard += 1
            elif type(event) is Error:
                self.errors += 1


class Crowd:
    """Keeps `count` streams speaking. Those of a group send at the same moments, the groups one after the other."""

    def __init__(self, engine: BatchEngine, count: int, lifetime: float, steps_a_frame: int, groups: int = 32) -> None:
        self.engine = engine
        self.lifetime = lifetime
        self.steps_a_frame = steps_a_frame
        self.random = random.Random(0)
        self.sounds = (np.random.default_rng(0).standard_normal((64, FRAME_SAMPLES)) * 0.2).astype(np.float32)
        self.joined = self.sent = self.lost = self.errors = 0
        self.worst_feeding = 0.0
        self.groups: list[list[Speaker]] = [[] for _ in range(min(groups, count))]
        for i in range(count):
            self.join(self.groups[i % len(self.groups)])

    def join(self, group: list[Speaker]) -> None:
        try:
            stream = self.engine.open()
        except NoFreeSlot:  # counted by the observer
            return
        self.joined += 1
        group.append(Speaker(stream, self.joined, 1 + int(self.random.expovariate(1 / self.lifetime) / FRAME_SECONDS)))

    async def speak(self, seconds: float) -> None:
        """Feed every group at its moments."""
        count = len(self.groups)
        begun, turns = time.monotonic(), int(seconds / FRAME_SECONDS * len(self.groups))
        self.worst_feeding = 0.0
        for turn in range(turns):
            due = begun + turn * FRAME_SECONDS / count
            if (wait := due - time.monotonic()) > 0:
                await asyncio.sleep(wait)
            else:
                self.worst_feeding = max(self.worst_feeding, -wait)
                await asyncio.sleep(0)
            await self.turn(self.groups[turn % count], due)

    async def turn(self, group: list[Speaker], due: float) -> None:
        """A frame of every stream of a group, or its end."""
        sounds = self.sounds
        for speaker in list(group):
            speaker.count(speaker.stream.take_now())
            if speaker.sent < speaker.frames_left:
                speaker.stream.offer(sounds[(speaker.number + speaker.sent) & 63], due)
                speaker.sent += 1
            elif not speaker.finishing:
                speaker.finishing = True
                await speaker.stream.finish()
            elif speaker.stream.ended:
                group.remove(speaker)
                self.leave(speaker)
                self.join(group)

    def leave(self, speaker: Speaker) -> None:
        speaker.count(speaker.stream.take_now())
        speaker.stream.close()
        self.sent += speaker.sent
        self.errors += speaker.errors
        self.lost += max(0, speaker.sent * self.steps_a_frame - speaker.heard)

    async def end(self) -> None:
        """Let everybody finish, and count what came."""
        speakers = [speaker for group in self.groups for speaker in group]
        for speaker in speakers:
            await speaker.stream.finish()
        async with asyncio.timeout(30):
            for speaker in speakers:
                while events := await speaker.stream.take():
                    speaker.count(events)
                self.leave(speaker)


def begin_old(backend: Any) -> None:
    """Let streams begin at full context: what a slot holds goes on instead of being started anew."""
    step = backend.step
    age = max(backend.spec.lm.context, backend.spec.mimi.context)

    def step_old(pcm: np.ndarray, slots: np.ndarray, fresh: np.ndarray) -> Any:
        if fresh.any():
            with torch.inference_mode():
                backend.state.frames[torch.from_numpy(slots[fresh]).to(backend.device)] = age
            if backend.device.type == "cuda":
                torch.cuda.synchronize(backend.device)
        return step(pcm, slots, np.zeros_like(fresh))

    backend.step = step_old


def percentiles(values: list[float]) -> dict[str, float]:
    """p50, p95, p99 and the largest, in milliseconds."""
    if not values:
        return {}
    array = 1e3 * np.array(values)
    found = {f"p{share}": round(float(np.percentile(array, share)), 3) for share in (50, 95, 99)}
    return found | {"max": round(float(array.max()), 3)}


async def measure(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Start an engine, warm it with a few seconds of everybody, and measure."""
    spec = model_spec(args.shape)
    streams = args.streams
    observer = Counter()
    begun = time.perf_counter()

    def load() -> LoadedModel:
        backend = build(args.shape, device, streams + spare_slots(streams), kv=args.kv, mimi=args.mimi)
        with torch.inference_mode():
            fill(backend)
        info = EngineInfo("batched_asr", args.shape, "", (), str(device), args.kv, streams)
        if args.old:
            begin_old(backend)
        return LoadedModel(backend, lambda ids: "word", info, streams)

    engine = BatchEngine(load, delay_frames=spec.delay_frames, observer=observer)
    await engine.start()
    started = time.perf_counter() - begun
    crowd = Crowd(engine, streams, args.lifetime, steps_a_frame=1 if spec.lm.extra_heads else 0)
    await crowd.speak(3.0)
    observer.clear()
    await crowd.speak(args.seconds)
    steps, lags, refused = list(observer.steps), list(observer.lags), observer.refusals
    worst_feeding = crowd.worst_feeding
    await crowd.end()
    details = engine.info.details
    await engine.stop()
    return {
        "shape": args.shape,
        "kv": args.kv,
        "mimi": args.mimi,
        "streams": streams,
        "seconds": args.seconds,
        "start_seconds": round(started, 1),
        "joined": crowd.joined,
        "frames": len(lags),
        "steps": len(steps),
        "rows_a_step": round(float(np.mean([rows for _, rows in steps])), 1) if steps else 0,
        "busy": round(sum(seconds for seconds, _ in steps) / args.seconds, 3),
        "step_ms": percentiles([seconds for seconds, _ in steps]),
        "lag_ms": percentiles(lags),
        "late": sum(lag > FRAME_SECONDS for lag in lags),
        "worst_feeding_ms": round(1e3 * worst_feeding, 1),
        "refused": refused,
        "lost": crowd.lost,
        "errors": crowd.errors,
        "details": details,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=tuple(SHAPES), default="1b")
    parser.add_argument("--streams", type=int, default=1024)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--kv", default="auto")
    parser.add_argument("--mimi", default="tf32")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--lifetime", type=float, default=20.0)
    parser.add_argument("--old", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    device, _ = choose_device(args.device)
    tune_interpreter()
    result = {"benchmark": "engine", **machine(device), **asyncio.run(measure(args, device))}
    print(f"{args.streams} live streams of {args.shape}, {args.kv} K/V, {args.seconds:g} s on {result['device']}")
    print(
        f"{result['frames']} frames in {result['steps']} steps of {result['rows_a_step']} rows; model busy {result['busy']:.0%}"
    )
    for name in ("step_ms", "lag_ms"):
        print(f"{name:8} " + "  ".join(f"{key} {value:.2f}" for key, value in result[name].items()))
    print(f"late {result['late']}, lost {result['lost']}, refused {result['refused']}, errors {result['errors']}")
    document = json.dumps(result)
    if args.out:
        args.out.write_text(document + "\n")
    print(document)


if __name__ == "__main__":
    main()
