#!/usr/bin/env python3
"""What the batch engine itself costs: microseconds per row and step with a backend that computes nothing.

    bench_engine_overhead.py [--rows 1,8,64,256,1024] [--seconds 2]

Two owners of the time, each measured alone on one thread: the model thread (drain, gather, scatter: what a step takes longer
than its backend) and the event loop (feed of one frame, delivery, take). Prints a table, then one line of JSON.
"""

import argparse
import asyncio
import sys
import time
from functools import partial
from typing import Any

import numpy as np
import report
from numpy.typing import NDArray

from moshi_stt.constants import FRAME_SAMPLES
from moshi_stt.engine.backend import StepOutput
from moshi_stt.engine.batch import BatchEngine
from moshi_stt.engine.commands import Audio
from moshi_stt.engine.engine import EngineInfo
from moshi_stt.engine.loaded import LoadedModel
from moshi_stt.engine.model_loop import LoopEvents, ModelLoop
from moshi_stt.engine.scheduler import Outcome
from moshi_stt.engine.slots import SlotPool, spare_slots
from moshi_stt.text.words import WordAssembler

HEADS = 4
TOKENS_A_SECOND = 3.5 * 2.5
"""Speech: about 3.5 words a second, a boundary and one or two pieces each; the rest of 12.5 is padding."""


class NullBackend:
    """Answers with tokens drawn beforehand; counts the time spent in it."""

    pause_heads = HEADS

    def __init__(self, slots: int) -> None:
        random = np.random.default_rng(0)
        self.slots = slots
        speech = random.random((64, slots)) < TOKENS_A_SECOND / 12.5
        self.tokens = np.where(speech, np.where(random.random((64, slots)) < 0.4, 0, 500), 3).astype(np.int64)
        self.logprob = np.full(slots, -0.5, np.float32)
        self.pause = random.random((slots, HEADS)).astype(np.float32)
        self.seconds = 0.0
        self.turn = 0

    def step(self, pcm: NDArray[np.float32], slots: NDArray[np.int64], fresh: NDArray[np.bool_]) -> StepOutput:
        begun = time.thread_time()
        rows = len(slots)
        self.turn = (self.turn + 1) % 64
        output = StepOutput(self.tokens[self.turn, :rows], self.logprob[:rows], self.pause[:rows])
        self.seconds += time.thread_time() - begun
        return output

    def copy(self, source: int, target: int) -> None: ...

    def warm_up(self) -> None: ...

    def close(self) -> None: ...


def model_of(backend: NullBackend, streams: int) -> LoadedModel:
    info = EngineInfo("batched_asr", "null", "", (), "none", "none", streams)
    return LoadedModel(backend, partial(WordAssembler, lambda ids: "word", 6), info, streams, 6)


class InlineEngine(BatchEngine):
    """The engine on one thread: its turns are taken by hand, and what comes of them is kept until it is delivered."""

    def __init__(self, model: ModelLoop) -> None:
        super().__init__(lambda: model.loaded)
        self._loop = asyncio.get_running_loop()
        self._model, self._slots, self._ready = model, SlotPool(model.loaded.streams), True

    def deliver(self, outcome: Outcome) -> None:
        self._deliver(outcome)


async def measure(rows: int, seconds: float) -> dict[str, float]:
    """Microseconds per row and step of the model thread and of the event loop."""
    backend = NullBackend(rows + spare_slots(rows))
    kept: list[Outcome] = []
    loop_events = LoopEvents(deliver=kept.append, stepped=lambda seconds, rows: None)
    model = ModelLoop(model_of(backend, rows), loop_events, marker_wait_seconds=0.25)
    engine = InlineEngine(model)
    streams = [engine.open() for _ in range(rows)]
    frame = np.zeros(FRAME_SAMPLES, np.float32)
    model_seconds = loop_seconds = 0.0
    stepped = 0
    begun = time.thread_time()
    while time.thread_time() - begun < seconds:
        start = time.thread_time()
        for stream in streams:
            await stream.send(Audio(frame))
        fed = time.thread_time()
        backend.seconds = 0.0
        stepped += model.turn(time.monotonic())
        turned = time.thread_time()
        for outcome in kept:
            engine.deliver(outcome)
        kept.clear()
        for stream in streams:
            stream.take()
        model_seconds += turned - fed - backend.seconds
        loop_seconds += fed - start + time.thread_time() - turned
    return {
        "rows": rows,
        "model_thread_us": 1e6 * model_seconds / stepped,
        "event_loop_us": 1e6 * loop_seconds / stepped,
        "steps": stepped,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", default="1,8,64,256,1024", help="row counts, comma between them")
    parser.add_argument("--seconds", type=float, default=2.0, help="how long each is measured")
    args = parser.parse_args()
    results: list[dict[str, Any]] = []
    print(f"{'rows':>6} {'model thread, µs/row':>22} {'event loop, µs/row':>20} {'of an 80 ms frame':>18}")
    for rows in map(int, args.rows.split(",")):
        result = asyncio.run(measure(rows, args.seconds))
        results.append(result)
        share = rows * (result["model_thread_us"] + result["event_loop_us"]) / 80_000
        print(f"{rows:>6} {result['model_thread_us']:>22.2f} {result['event_loop_us']:>20.2f} {share:>18.1%}")
    report.finish("engine_overhead", {"device": "none", "results": results})


if __name__ == "__main__":
    sys.exit(main())
