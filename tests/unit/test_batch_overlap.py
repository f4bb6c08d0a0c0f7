"""`BatchEngine` over a backend that takes a step while another is under way, against one that does not."""

import asyncio
import threading
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray
from tests.support.batch import DEADLINE, engine, feed_in_pieces, noise, rest, transcribe, until, without_timing
from tests.support.scripted_backend import PseudoModel

from moshi_stt.constants import FRAME_SAMPLES
from moshi_stt.engine.engine import StepInputs, StepOutput
from moshi_stt.errors import EngineFailed
from moshi_stt.events import AnyEvent, Error, Marker, Ready, Step


class Overlapping(PseudoModel):
    """Two sets of inputs, poisoned after use; steps happen when they are waited for, in order, as a device's would."""

    def __init__(self, slots: int) -> None:
        super().__init__(slots)
        self._sets = [
            StepInputs(
                np.full((slots, FRAME_SAMPLES), np.nan, np.float32), np.full(slots, -1, np.int64), np.ones(slots, np.bool_)
            )
            for _ in range(2)
        ]
        self._turn = 0
        self.under_way: list[set[int]] = []
        self.most_under_way = 0
        self.submitted = threading.Event()

    @property
    def inputs(self) -> StepInputs:
        return self._sets[self._turn]

    def submit(self, pcm: NDArray[np.float32], slots: NDArray[np.int64], fresh: NDArray[np.bool_]) -> Callable[[], StepOutput]:
        assert pcm.ctypes.data == self.inputs.pcm.ctypes.data, "the engine writes into the inputs of the moment"
        given = [pcm.copy(), slots.copy(), fresh.copy()]
        pcm[:] = np.nan
        mine = set(slots.tolist())
        assert not any(mine & others for others in self.under_way), "a slot has one row under way at most"
        self.under_way.append(mine)
        self.most_under_way = max(self.most_under_way, len(self.under_way))
        assert len(self.under_way) <= 2
        self._turn ^= 1
        self.submitted.set()

        def result() -> StepOutput:
            assert self.under_way.pop(0) is mine
            return self.step(*given)

        return result

    def copy(self, source: int, target: int) -> None:
        assert not any({source, target} & slots for slots in self.under_way), "no copy of a slot that is being stepped"
        super().copy(source, target)


async def visit(started: object, seed: int) -> list[AnyEvent]:
    """A stream with marks, a reset in the middle, and pieces of any size; everything that it heard."""
    random = np.random.default_rng(seed)
    stream = started.open()  # type: ignore[attr-defined]
    for part in range(2):
        pcm = noise(float(random.uniform(3, 12)), seed=seed + part)
        await feed_in_pieces(stream, pcm, random.integers(100, 5_000, 4).tolist())
        await stream.mark(part)
        if random.random() < 0.5:
            await stream.reset()
    await stream.feed(noise(2.5, seed=seed + 7))
    await stream.finish()
    events = await rest(stream)
    stream.close()
    return without_timing(events)


@pytest.mark.parametrize("streams", [1, 6])
async def test_streams_hear_the_same_as_without_overlap(streams: int) -> None:
    """More visitors than slots, so that slots change hands while steps are under way."""
    heard: list[list[list[AnyEvent]]] = []
    for make in (PseudoModel, Overlapping):
        async with engine(make, streams=streams, marker_wait=5.0) as started:
            free = asyncio.Semaphore(streams)

            async def guest(seed: int, started: object = started, free: asyncio.Semaphore = free) -> list[AnyEvent]:
                async with free:
                    return await visit(started, 100 * seed)

            async with asyncio.timeout(DEADLINE):
                heard.append(list(await asyncio.gather(*(guest(seed) for seed in range(3 * streams)))))
    assert heard[0] == heard[1]
    assert all(any(isinstance(event, Marker) for event in events) for events in heard[1])


class Slow(Overlapping):
    """Steps long enough that the engine prepares the next one meanwhile."""

    def __init__(self, slots: int) -> None:
        super().__init__(slots)
        self.step_seconds = 0.05


async def test_rows_that_come_during_a_step_are_under_way_before_it_ends() -> None:
    async with engine(Slow, streams=2) as started:
        assert isinstance(started.fake, Slow)
        first, second = started.open(), started.open()
        started.fake.most_under_way = 0
        started.fake.submitted.clear()
        async with asyncio.timeout(DEADLINE):
            while started.fake.most_under_way < 2:
                await first.feed(noise(1))
                await asyncio.to_thread(started.fake.submitted.wait, DEADLINE)
                started.fake.submitted.clear()
                await second.feed(noise(1))
                await until(first, lambda events: any(isinstance(event, Step) for event in events))
                await until(second, lambda events: any(isinstance(event, Step) for event in events))
        first.close()
        second.close()


async def test_reset_behind_a_step_under_way_waits_for_it() -> None:
    """Absorbed at once, it would clear the words that the step's token belongs to."""
    async with engine(Overlapping, streams=2) as started:
        expected = without_timing(await transcribe(started, noise(9, seed=3)))
        started.fake.hang_next = True
        stream = started.open()
        other = started.open()
        await stream.feed(noise(4, seed=1))
        await other.feed(noise(4, seed=2))
        await stream.reset()
        await stream.feed(noise(9, seed=3))
        await stream.finish()
        started.fake.hang_next = False
        started.fake.resume.set()
        events = await rest(stream)
        again = max(i for i, event in enumerate(events) if isinstance(event, Ready))
        assert without_timing(events)[again:] == expected
        stream.close()
        other.close()


async def test_close_under_way_gives_the_next_owner_a_clean_slot() -> None:
    async with engine(Overlapping, streams=1) as started:
        expected = without_timing(await transcribe(started, noise(6, seed=5)))
        for _ in range(5):
            stream = started.open()
            await stream.feed(noise(20, seed=6))
            await until(stream, lambda events: len(events) > 2)
            stream.close()
            assert without_timing(await transcribe(started, noise(6, seed=5))) == expected


async def test_marker_on_a_copy_while_others_speak() -> None:
    async with engine(Overlapping, streams=3) as started:
        talking = [started.open() for _ in range(2)]
        quiet = started.open()
        await quiet.feed(noise(3, seed=9))
        await quiet.mark(7)
        for _ in range(40):
            for stream in talking:
                await stream.feed(noise(1, seed=4))
        events = await until(quiet, lambda events: any(isinstance(event, Marker) for event in events))
        assert Marker(7) in events
        for stream in (*talking, quiet):
            stream.close()


async def test_a_step_that_raises_ends_every_stream() -> None:
    async with engine(Overlapping, streams=2) as started:
        streams = [started.open() for _ in range(2)]
        started.fake.raise_next = True
        for stream in streams:
            await stream.feed(noise(3))
        for stream in streams:
            events = await rest(stream)
            assert isinstance(events[-1], Error)
        assert isinstance(started.failure, EngineFailed)
        for stream in streams:
            stream.close()
