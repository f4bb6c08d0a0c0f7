#!/usr/bin/env python3
"""Paced live streams through the whole engine: how long a step takes, and how late its tokens are.

    bench_engine.py [--shape 1b|2.6b|tiny] [--streams 1024] [--seconds 60] [--kv auto|bf16|fp8] [--mimi f16] [--device auto]
                    [--processes 8] [--lifetime 20] [--old] [--out FILE]

Streams send a frame of noise every 80 ms, in groups at as many moments, live for a random time (mean `lifetime` seconds),
finish, and are replaced at once. They live in `processes` processes beside that of the model, as the server's do (0: in that of
the model). Lag is from the moment a frame was complete to the reading of its `Step`, in the event loop that also feeds the
stream; without `Step`s, to the delivery of what the model said, the last words after the stream's end included. A frame is
late when its lag exceeds 80 ms: the next one was complete before. --old: every stream begins with a full context (of anything),
so that attention always reads all of every ring.

Prints a table and, as its last line, one JSON document. Random weights say nothing about accuracy.
"""

import argparse
import asyncio
import base64
import pickle
import random
import socket
import sys
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import report
from numpy.typing import NDArray

from moshi_stt.constants import FRAME_SAMPLES, FRAME_SECONDS
from moshi_stt.engine.batch import BatchEngine
from moshi_stt.engine.commands import Audio, Finish
from moshi_stt.engine.engine import EngineInfo, SilentObserver
from moshi_stt.engine.loaded import LoadedModel
from moshi_stt.engine.remote import RemoteEngine
from moshi_stt.engine.sharing import BackendLink, WorkerConfig
from moshi_stt.engine.slots import spare_slots
from moshi_stt.engine.stream import Stream
from moshi_stt.errors import NoFreeSlot
from moshi_stt.events import Error, Step
from moshi_stt.server.runtime import tune_interpreter
from moshi_stt.text.words import WordAssembler

JOIN_SECONDS = 3.0
"""In which all have joined."""

WARM_SECONDS = JOIN_SECONDS + 2.0
"""After which their lags count."""


class Counter(SilentObserver):
    """Keeps every time it is told."""

    def __init__(self) -> None:
        self.steps: list[tuple[float, float, int]] = []
        """When it ended, seconds, rows."""
        self.lags: list[float] = []
        self.refusals = 0

    def stepped(self, seconds: float, rows: int) -> None:
        self.steps.append((time.monotonic(), seconds, rows))

    def lagged(self, seconds: float) -> None:
        self.lags.append(seconds)

    def refused(self) -> None:
        self.refusals += 1


class Speaker:
    """One stream: what it sent, and what came back."""

    __slots__ = ("_due", "_lags", "_reading", "errors", "finishing", "frames_left", "heard", "number", "over", "sent", "stream")

    def __init__(self, stream: Stream, number: int, frames: int, lags: list[float] | None) -> None:
        """lags: where those of its steps go, if it has any."""
        self.stream = stream
        self.number = number
        self.frames_left = frames
        self.sent = 0
        self.heard = 0
        self.finishing = False
        self.errors = 0
        self.over = asyncio.Event()
        """Whether all has come."""
        self._lags = lags
        self._due: deque[float] = deque()
        self._reading = False
        stream.listen(self._has_events, lambda: None)

    def send(self, pcm: NDArray[np.float32], due: float) -> None:
        """A frame that was complete at `due`."""
        self.stream.offer(Audio(pcm, due))
        self._due.append(due)
        self.sent += 1

    def _has_events(self) -> None:
        if not self._reading:
            self._reading = True
            asyncio.get_running_loop().call_soon(self.read)

    def read(self) -> None:
        """Take what has come."""
        self._reading = False
        for event in self.stream.take():
            if type(event) is Step:
                self.heard += 1
                if self._due and self._lags is not None:
                    self._lags.append(time.monotonic() - self._due.popleft())
            elif type(event) is Error:
                self.errors += 1
        if self.stream.ended:
            self.over.set()


class Crowd:
    """Keeps `count` streams speaking. Those of a group send at the same moments, the groups one after the other."""

    def __init__(
        self, engine: BatchEngine, count: int, lifetime: float, steps_a_frame: int, seed: int, groups: int = 32
    ) -> None:
        self.engine = engine
        self.lags: list[float] = []
        self.lifetime = lifetime
        self.steps_a_frame = steps_a_frame
        self.random = random.Random(seed)
        self.sounds = (np.random.default_rng(0).standard_normal((64, FRAME_SAMPLES)) * 0.2).astype(np.float32)
        self.joined = self.sent = self.lost = self.errors = 0
        self.worst_feeding = 0.0
        self.groups: list[list[Speaker]] = [[] for _ in range(min(groups, count))]
        self.waiting = [self.groups[i % len(self.groups)] for i in range(count)]
        """Groups that have a place, once for each."""
        self.joins_a_turn = -(-count // int(JOIN_SECONDS / FRAME_SECONDS * len(self.groups)))

    def join(self, group: list[Speaker]) -> None:
        """Put somebody into the group, as soon as the slot of who left is free."""
        if isinstance(self.engine, Fixed) and not self.engine.has_slot:
            self.waiting.append(group)
            return
        try:
            stream = self.engine.open()
        except NoFreeSlot:  # counted by the observer
            return
        self.joined += 1
        frames = 1 + int(self.random.expovariate(1 / self.lifetime) / FRAME_SECONDS)
        group.append(Speaker(stream, self.joined, frames, self.lags if self.steps_a_frame else None))

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
        joining, self.waiting = self.waiting[: self.joins_a_turn], self.waiting[self.joins_a_turn :]
        for place in joining:
            self.join(place)
        for speaker in list(group):
            if speaker.sent < speaker.frames_left:
                speaker.send(sounds[(speaker.number + speaker.sent) & 63], due)
            elif not speaker.finishing:
                speaker.finishing = True
                await speaker.stream.send(Finish())
            elif speaker.stream.ended:
                group.remove(speaker)
                self.leave(speaker)
                self.waiting.append(group)

    def leave(self, speaker: Speaker) -> None:
        speaker.read()
        speaker.stream.close()
        self.sent += speaker.sent
        self.errors += speaker.errors
        self.lost += max(0, speaker.sent * self.steps_a_frame - speaker.heard)

    async def end(self) -> None:
        """Let everybody finish, and count what came."""
        speakers = [speaker for group in self.groups for speaker in group]
        for speaker in speakers:
            await speaker.stream.send(Finish())
        async with asyncio.timeout(30):
            for speaker in speakers:
                await speaker.over.wait()
                self.leave(speaker)


class Heard(NamedTuple):
    """What a crowd was told."""

    lags: list[float]
    joined: int
    refused: int
    lost: int
    errors: int
    worst_feeding: float


async def hear(
    engine: BatchEngine,
    observer: Counter,
    count: int,
    lifetime: float,
    seconds: float,
    seed: int,
    meet: Callable[[], Awaitable[None]],
) -> Heard:
    """Let a crowd speak: some seconds to warm up, then `seconds` that count. meet: wait for the other crowds, twice."""
    await meet()
    crowd = Crowd(engine, count, lifetime, 1 if engine.pause_heads else 0, seed)
    await crowd.speak(WARM_SECONDS)
    lags = crowd.lags if engine.pause_heads else observer.lags
    lags.clear()
    await crowd.speak(seconds)
    lags, refused = list(lags), observer.refusals
    worst = crowd.worst_feeding
    await meet()
    await crowd.end()
    return Heard(lags, crowd.joined, refused, crowd.lost, crowd.errors, worst)


# ---- another process: `bench_engine.py --child`, its job on stdin ----------------------------------------------------------


class Job(NamedTuple):
    config: WorkerConfig
    memory: int
    signal: int
    slots: range
    lifetime: float
    seconds: float


class Fixed(RemoteEngine):
    """An engine with slots of its own, lent for good."""

    def __init__(self, job: Job, observer: Counter) -> None:
        link = BackendLink(job.memory, socket.socket(fileno=job.signal))
        super().__init__(job.config, link, on_freed=self.grant, observer=observer)
        for slot in job.slots:
            self.grant(slot)

    @property
    def has_slot(self) -> bool:
        slot = self.withdraw()
        if slot is not None:
            self.grant(slot)
        return slot is not None


async def child(job: Job) -> Heard:
    observer = Counter()
    engine = Fixed(job, observer)
    await engine.start()

    async def meet() -> None:
        print("here", flush=True)
        await asyncio.to_thread(sys.stdin.readline)

    heard = await hear(engine, observer, len(job.slots), job.lifetime, job.seconds, job.slots.start, meet)
    await engine.stop()
    return heard


async def run_child(
    engine: BatchEngine, number: int, slots: range, args: argparse.Namespace, meetings: Sequence[Callable[[], Awaitable[None]]]
) -> Heard:
    """A process with so many of the streams, which meets the others so many times."""
    line = engine.connect(lambda: None)  # its slots are lent for good
    job = Job(engine.share(number), line.memory, line.signal.fileno(), slots, args.lifetime, args.seconds)
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        sys.executable, __file__, "--child", stdin=pipe, stdout=pipe, limit=1 << 28, pass_fds=[job.memory, job.signal]
    )
    line.close()
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(base64.b64encode(pickle.dumps(job)) + b"\n")
    for meet in meetings:
        if not await process.stdout.readline():
            raise SystemExit(f"process {number} ended with {await process.wait()}")
        await meet()
        process.stdin.write(b"go\n")
    heard: Heard = pickle.loads(base64.b64decode(await process.stdout.readline()))
    await process.wait()
    return heard


# ---- the process of the model ----------------------------------------------------------------------------------------------


def word(ids: Sequence[int]) -> str:
    """The text of any word."""
    return "word"


def begin_old(backend: Any) -> None:
    """Let streams begin at full context: what a slot holds goes on instead of being started anew."""
    import torch

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


async def measure(args: argparse.Namespace, device: Any) -> dict[str, Any]:
    """Start an engine, let everybody speak, and sum up."""
    import torch
    from bench_step import build, fill
    from random_weights import model_spec

    spec = model_spec(args.shape)
    streams, processes = args.streams, args.processes
    observer = Counter()
    begun = time.perf_counter()

    def load() -> LoadedModel:
        backend = build(args.shape, device, streams + spare_slots(streams, processes), kv=args.kv, mimi=args.mimi)
        with torch.inference_mode():
            fill(backend)
        info = EngineInfo("batched_asr", args.shape, "", (), str(device), args.kv, streams)
        if args.old:
            begin_old(backend)
        new_words = partial(WordAssembler, word, spec.delay_frames)
        return LoadedModel(backend, new_words, info, streams, spec.delay_frames, processes=processes)

    engine = BatchEngine(load, observer=observer)
    await engine.start()
    started = time.perf_counter() - begun
    moments: list[float] = []
    if processes:
        edges = [streams * i // processes for i in range(processes + 1)]
        shares = [range(edges[i], edges[i + 1]) for i in range(processes)]
        barrier = asyncio.Barrier(processes)

        async def meet() -> None:
            await barrier.wait()
            moments.append(time.monotonic())

        parts = await asyncio.gather(*(run_child(engine, i, slots, args, [meet, meet]) for i, slots in enumerate(shares)))
    else:

        async def note() -> None:
            moments.append(time.monotonic())

        parts = [await hear(engine, observer, streams, args.lifetime, args.seconds, 0, note)]
    counted = min(moments) + WARM_SECONDS, max(moments)
    steps = [(seconds, rows) for ended, seconds, rows in observer.steps if counted[0] < ended < counted[1]]
    details = engine.info.details
    await engine.stop()
    asked = {name: getattr(args, name) for name in ("shape", "kv", "mimi", "streams", "processes", "seconds")}
    context = "full" if args.old else "growing"
    rest = {"context": context, "start_seconds": round(started, 1), "details": details}
    return asked | summary(parts, steps, counted[1] - counted[0]) | rest


def summary(parts: list[Heard], steps: list[tuple[float, int]], seconds: float) -> dict[str, Any]:
    """What all processes heard. steps: seconds and rows of those that count."""
    lags = [lag for part in parts for lag in part.lags]
    return {
        "joined": sum(part.joined for part in parts),
        "frames": len(lags),
        "steps": len(steps),
        "rows_a_step": round(float(np.mean([rows for _, rows in steps])), 1) if steps else 0,
        "busy": round(sum(taken for taken, _ in steps) / seconds, 3),
        "step_ms": percentiles([seconds for seconds, _ in steps]),
        "lag_ms": percentiles(lags),
        "late": sum(lag > FRAME_SECONDS for lag in lags),
        "worst_feeding_ms": round(1e3 * max(part.worst_feeding for part in parts), 1),
        "refused": sum(part.refused for part in parts),
        "lost": sum(part.lost for part in parts),
        "errors": sum(part.errors for part in parts),
    }


def main() -> None:
    if sys.argv[1:] == ["--child"]:
        tune_interpreter()
        job = pickle.loads(base64.b64decode(sys.stdin.readline()))
        print(base64.b64encode(pickle.dumps(asyncio.run(child(job)))).decode())
        return
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=("1b", "2.6b", "tiny"), default="1b")
    parser.add_argument("--streams", type=int, default=1024)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--kv", default="auto")
    parser.add_argument("--mimi", default="f16")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--lifetime", type=float, default=20.0)
    parser.add_argument("--old", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    from bench_step import measured_on

    from moshi_stt.models.torch_impl.device import choose_device

    device, _ = choose_device(args.device)
    tune_interpreter()
    result = {**measured_on(device), **asyncio.run(measure(args, device))}
    print(f"{args.streams} live streams of {args.shape}, {args.kv} K/V, {args.seconds:g} s on {result['device']}")
    print(
        f"{result['frames']} frames in {result['steps']} steps of {result['rows_a_step']} rows; model busy {result['busy']:.0%}"
    )
    for name in ("step_ms", "lag_ms"):
        print(f"{name:8} " + "  ".join(f"{key} {value:.2f}" for key, value in result[name].items()))
    print(f"late {result['late']}, lost {result['lost']}, refused {result['refused']}, errors {result['errors']}")
    report.finish("engine", result, args.out)


if __name__ == "__main__":
    main()
