#!/usr/bin/env python3
"""Many streams of speech at once through the embedded model's engine: what is lost, who waits, what it costs.

    bench_embedded_load.py [--streams 32] [--seconds 60] [--paced] [--threads 0]

Every stream is the recording that comes with the model, repeated and begun at another place. Without --paced all send as fast
as they are taken. Each stream's words and times are compared with those of the same audio alone (a sample of the streams).
Prints a table and, as its last line, one JSON document.
"""

import argparse
import asyncio
import resource
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import report
from numpy.typing import NDArray
from report import EMBEDDED

from moshi_stt.audio.decode import read_file
from moshi_stt.constants import FRAME_SAMPLES, FRAME_SECONDS, SAMPLE_RATE
from moshi_stt.cores import usable_cores
from moshi_stt.engine.commands import Audio, Mark
from moshi_stt.engine.segment import SegmentEngine
from moshi_stt.events import AnyEvent, EndWord, Marker, Ready, Step, Word
from moshi_stt.models.embedded import load_embedded

COMPARED = 4
"""Streams that are run again alone."""


class Outcome(NamedTuple):
    events: list[AnyEvent]
    """Without the steps."""
    lags: list[float]
    """Seconds from each word's end to its event, less those that the marker brought; they mean something where it was paced."""
    first_word: float
    """Seconds from the start to the first word."""
    done: float
    """Seconds from the start to the marker."""


async def one(engine: SegmentEngine, audio: NDArray[np.float32], begun: float, paced: bool) -> Outcome:
    stream = engine.open()
    events: list[AnyEvent] = []
    lags: list[float] = []
    first = 0.0
    seconds = len(audio) / SAMPLE_RATE

    async def read() -> None:
        nonlocal first
        async for event in stream:
            if not isinstance(event, Step):
                events.append(event)
            if isinstance(event, EndWord) and (now := time.monotonic() - begun) < seconds:
                lags.append(now - event.stop_time)
            if isinstance(event, Word) and not first:
                first = time.monotonic() - begun
            if isinstance(event, Marker):
                return

    reading = asyncio.create_task(read())
    for index, start in enumerate(range(0, len(audio), FRAME_SAMPLES)):
        if paced:
            await asyncio.sleep(max(0.0, begun + (index + 1) * FRAME_SECONDS - time.monotonic()))
        await stream.send(Audio(audio[start : start + FRAME_SAMPLES]))
    await stream.send(Mark(1))
    await reading
    stream.close()
    return Outcome(events, lags, first, time.monotonic() - begun)


def wrong_order(events: list[AnyEvent]) -> bool:
    """Whether anything but Ready, pairs of Word and EndWord with times that never go back, and the marker came."""
    if events[0] != Ready() or events[-1] != Marker(1):
        return True
    last = 0.0
    for word, end in zip(events[1:-1:2], events[2:-1:2], strict=True):
        if not (isinstance(word, Word) and isinstance(end, EndWord) and last <= word.start_time <= end.stop_time):
            return True
        last = end.stop_time
    return False


def memory_mb() -> float:
    """Resident memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e6


async def watch_memory(samples: list[float]) -> None:
    while True:
        samples.append(memory_mb())
        await asyncio.sleep(1.0)


async def bench(args: argparse.Namespace) -> None:
    recording = read_file(Path(__file__).parents[1] / "tests" / "data" / "two_cities.flac")
    threads = args.threads or usable_cores()
    engine = SegmentEngine(partial(load_embedded, threads), slots=args.streams, threads=threads)
    await engine.start()
    count = round(args.seconds * SAMPLE_RATE)
    audios = [
        np.resize(np.roll(recording, -index * len(recording) // args.streams), count).astype(np.float32)
        for index in range(args.streams)
    ]
    memory: list[float] = []
    watching = asyncio.create_task(watch_memory(memory))
    cpu, begun = time.process_time(), time.monotonic()
    outcomes = await asyncio.gather(*(one(engine, audio, begun, args.paced) for audio in audios))
    wall, cpu = time.monotonic() - begun, time.process_time() - cpu
    watching.cancel()
    different = 0
    for index in range(0, args.streams, max(1, args.streams // COMPARED)):
        alone = await one(engine, audios[index], time.monotonic(), False)
        different += alone.events != outcomes[index].events
    await engine.stop()
    show(args, engine, outcomes, memory, wall, cpu, different)


def show(
    args: argparse.Namespace,
    engine: SegmentEngine,
    outcomes: list[Outcome],
    memory: list[float],
    wall: float,
    cpu: float,
    different: int,
) -> None:
    done = np.array([outcome.done for outcome in outcomes])
    first = np.array([outcome.first_word for outcome in outcomes])
    audio_seconds = args.streams * args.seconds
    lags = [lag for outcome in outcomes for lag in outcome.lags] if args.paced else []
    half = len(memory) // 2 or 1
    result = {
        **EMBEDDED,
        "streams": args.streams,
        "seconds_each": args.seconds,
        "paced": args.paced,
        "threads": engine.info.details["recogniser threads"],
        "audio_s_per_s": round(audio_seconds / wall, 2),
        "cores_per_stream_second": round(cpu / audio_seconds, 4),
        "words": sum(isinstance(event, Word) for outcome in outcomes for event in outcome.events),
        "streams_out_of_order": sum(wrong_order(outcome.events) for outcome in outcomes),
        "streams_unlike_alone": different,
        "first_word_s": [round(float(first.min()), 2), round(float(first.max()), 2)],
        "done_s": [round(float(done.min()), 2), round(float(done.max()), 2)],
        "lag_p50_s": round(float(np.percentile(lags, 50)), 3) if lags else None,
        "lag_p95_s": round(float(np.percentile(lags, 95)), 3) if lags else None,
        "memory_mb_middle_end": [round(memory[half - 1]), round(memory[-1])],
    }
    for key, value in result.items():
        print(f"{key:<26}{value}")
    report.finish("embedded_load", result)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=32, metavar="N")
    parser.add_argument("--seconds", type=float, default=60.0, metavar="S", help="audio of each stream (default 60)")
    parser.add_argument("--paced", action="store_true", help="send in real time")
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="recogniser threads; 0: one for each core")
    asyncio.run(bench(parser.parse_args()))


if __name__ == "__main__":
    main()
