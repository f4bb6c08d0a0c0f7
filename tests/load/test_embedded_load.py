"""Thirty-two streams at once on two threads: nothing lost, nobody starved, the same words as alone."""

import asyncio
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from tests.support.level_speech import LevelRecogniser, pause, say

from moshi_stt.audio.decode import read_file
from moshi_stt.constants import SAMPLE_RATE
from moshi_stt.engine.commands import Audio, Mark
from moshi_stt.engine.segment import SegmentEngine
from moshi_stt.engine.stream import StreamLimits
from moshi_stt.events import AnyEvent, EndWord, Marker, Ready, Step, Word
from moshi_stt.models.embedded import load_embedded

STREAMS = 32
DEADLINE = 240.0
"""Seconds in which the next event of a stream must come."""

pytestmark = pytest.mark.timeout(1_800)


async def send(engine: SegmentEngine, audio: NDArray[np.float32]) -> list[AnyEvent]:
    """Audio in packets of 20 ms and a marker, then nothing: what came but steps, up to the marker."""
    stream = engine.open()
    events: list[AnyEvent] = []

    async def read() -> None:
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(DEADLINE) as limit:
            async for event in stream:
                limit.reschedule(loop.time() + DEADLINE)
                if not isinstance(event, Step):
                    events.append(event)
                if isinstance(event, Marker):
                    return

    reading = asyncio.create_task(read())
    for start in range(0, len(audio), 480):
        await stream.send(Audio(audio[start : start + 480]))
    await stream.send(Mark(1))
    await reading
    stream.close()
    return events


def check(events: list[AnyEvent]) -> None:
    assert events[0] == Ready()
    assert events[-1] == Marker(1)
    last = 0.0
    for word, end in zip(events[1:-1:2], events[2:-1:2], strict=True):
        assert isinstance(word, Word)
        assert isinstance(end, EndWord)
        assert last <= word.start_time <= end.stop_time
        last = end.stop_time


async def test_thirty_two_streams_of_speech_on_two_threads() -> None:
    """More than two cores carry in real time, each begun elsewhere in real speech."""
    recording = read_file(Path(__file__).parents[1] / "data" / "two_cities.flac")
    audios = [recording[(1 + index) * SAMPLE_RATE :][: 2 * SAMPLE_RATE] for index in range(STREAMS)]
    engine = SegmentEngine(partial(load_embedded, 2), slots=STREAMS, threads=2)
    await engine.start()
    try:
        together = await asyncio.gather(*(send(engine, audio) for audio in audios))
        for events in together:
            check(events)
        assert sum(isinstance(event, Word) for events in together for event in events) > 3 * STREAMS
        for index in range(0, STREAMS, 8):
            assert await send(engine, audios[index]) == together[index]
    finally:
        await engine.stop()


async def test_every_stream_advances_while_all_wait_for_two_threads() -> None:
    """All audio is there before the first call comes back. When the first stream ends, every other is past its half."""
    recogniser = LevelRecogniser()
    limits = StreamLimits(inbox_samples=60 * SAMPLE_RATE)
    engine = SegmentEngine(lambda: recogniser, slots=STREAMS, threads=2, limits=limits)
    await engine.start()
    try:
        recogniser.gate.clear()
        audio = np.concatenate([say(range(10, 40)), pause(2.0)])
        streams = [engine.open() for _ in range(STREAMS)]
        for stream in streams:
            await stream.send(Audio(audio))
            await stream.send(Mark(1))
        left: list[int] = []

        async def read(index: int) -> int:
            words = 0
            async for event in streams[index]:
                words += isinstance(event, Word)
                if isinstance(event, Marker):
                    break
            left.append(max(stream.pending_samples for stream in streams))
            return words

        reading = [asyncio.create_task(read(index)) for index in range(STREAMS)]
        recogniser.gate.set()
        async with asyncio.timeout(DEADLINE):
            assert await asyncio.gather(*reading) == [30] * STREAMS
        assert left[0] < len(audio) / 2
        assert engine.queued_samples == 0
        for stream in streams:
            stream.close()
    finally:
        recogniser.gate.set()
        await engine.stop()
