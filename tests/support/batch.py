"""A `BatchEngine` over a backend without a model, and streams driven through it. Knows no socket."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager

import numpy as np
from numpy.typing import NDArray
from tests.support.scripted_backend import FakeBackend, PseudoModel, loader
from tests.support.streams import some

from moshi_stt.constants import FRAME_SAMPLES
from moshi_stt.engine.batch import BatchEngine
from moshi_stt.engine.commands import Audio, Finish
from moshi_stt.engine.engine import EngineObserver
from moshi_stt.engine.mute import MuteSettings
from moshi_stt.engine.stream import Stream, StreamLimits
from moshi_stt.events import AnyEvent, EndWord, Step, Word

DEADLINE = 120.0
"""Seconds after which waiting for an event counts as a hang."""


class Started(BatchEngine):
    """An engine with its backend at hand."""

    fake: FakeBackend


@asynccontextmanager
async def engine(
    make: Callable[[int], FakeBackend] = PseudoModel,
    streams: int = 4,
    *,
    delay: int = 6,
    limits: StreamLimits | None = None,
    observer: EngineObserver | None = None,
    marker_wait: float = 0.02,
    hang: float = 30.0,
    processes: int = 0,
    mute: MuteSettings | None = None,
) -> AsyncIterator[Started]:
    made: list[FakeBackend] = []

    def keep(slots: int) -> FakeBackend:
        made.append(make(slots))
        return made[0]

    started = Started(
        loader(keep, streams, processes=processes, delay=delay),
        limits=limits,
        observer=observer,
        marker_wait_seconds=marker_wait,
        hang_seconds=hang,
        mute=mute,
    )
    await started.start()
    started.fake = made[0]
    try:
        yield started
    finally:
        made[0].hang_next = False
        made[0].resume.set()
        await started.stop()


def noise(frames: float, seed: int = 0) -> NDArray[np.float32]:
    """float32 (frames * 1920,)."""
    generator = np.random.default_rng(seed)
    return generator.standard_normal(int(frames * FRAME_SAMPLES)).astype(np.float32)


async def feed_in_pieces(stream: Stream, pcm: NDArray[np.float32], sizes: Iterable[int]) -> None:
    """Feed pcm in pieces of these sizes; what is left over comes last."""
    start = 0
    for size in sizes:
        await stream.send(Audio(pcm[start : start + size]))
        start += size
    await stream.send(Audio(pcm[start:]))


async def until(stream: Stream, last: Callable[[list[AnyEvent]], bool]) -> list[AnyEvent]:
    """Events up to the first `take` after which `last` says that it is enough."""
    events: list[AnyEvent] = []
    while not last(events):
        async with asyncio.timeout(DEADLINE):  # for an event, not for all of them
            taken = await some(stream)
        assert taken, f"the stream ended at {events[-3:]}"
        events += taken
    return events


async def rest(stream: Stream) -> list[AnyEvent]:
    """Every event up to the end."""
    events: list[AnyEvent] = []
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(DEADLINE) as limit:
        async for event in stream:
            events.append(event)
            limit.reschedule(loop.time() + DEADLINE)
    return events


async def transcribe(started: BatchEngine, pcm: NDArray[np.float32], *, live: bool = True) -> list[AnyEvent]:
    """All events of one stream with this audio."""
    stream = started.open(live=live)
    await stream.send(Audio(pcm))
    await stream.send(Finish())
    events = await rest(stream)
    stream.close()
    return events


def words_of(events: Iterable[AnyEvent]) -> list[AnyEvent]:
    return [event for event in events if isinstance(event, Word | EndWord)]


def without_timing(events: Iterable[AnyEvent]) -> list[AnyEvent]:
    """Events less what is the whole engine's or the moment's: `step_idx` and `buffered_pcm`."""
    return [Step(0, event.prs, 0) if isinstance(event, Step) else event for event in events]


def steps_of(events: Iterable[AnyEvent]) -> int:
    return sum(isinstance(event, Step) for event in events)
