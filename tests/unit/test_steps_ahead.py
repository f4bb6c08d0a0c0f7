"""Files on a backend that steps some rows while others are gathered: the same words as without, whatever else goes on."""

import asyncio
import threading
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray
from tests.support.batch import DEADLINE, engine, noise, rest, transcribe, until, without_timing
from tests.support.remote import remotes
from tests.support.scripted_backend import PseudoModel

from moshi_stt.constants import FRAME_SAMPLES
from moshi_stt.engine.backend import StepInputs, StepOutput
from moshi_stt.engine.batch import BatchEngine
from moshi_stt.engine.commands import Audio, Finish, Mark
from moshi_stt.engine.scheduler import AHEAD_ROWS
from moshi_stt.events import AnyEvent, Error, Marker

STREAMS = 2 * AHEAD_ROWS


class AheadModel(PseudoModel):
    """Steps when the output is asked for, of what it was given at the beginning. Nothing may come in between."""

    def __init__(self, slots: int) -> None:
        super().__init__(slots)
        self.is_under_way = False
        self.has_begun = threading.Event()
        self.ahead: list[int] = []
        """Rows of each step that was begun."""

    @property
    def has_read_inputs(self) -> bool:
        return True

    def begin(self, pcm: NDArray[np.float32], slots: NDArray[np.int64], fresh: NDArray[np.bool_]) -> Callable[[], StepOutput]:
        assert not self.is_under_way
        self.is_under_way = True
        self.ahead.append(len(slots))
        self.has_begun.set()
        given = StepInputs(pcm.copy(), slots.copy(), fresh.copy())

        def finish() -> StepOutput:
            self.is_under_way = False
            return super(AheadModel, self).step(*given)

        return finish

    def step(self, pcm: NDArray[np.float32], slots: NDArray[np.int64], fresh: NDArray[np.bool_]) -> StepOutput:
        assert not self.is_under_way
        return super().step(pcm, slots, fresh)

    def copy(self, source: int, target: int) -> None:
        assert not self.is_under_way
        super().copy(source, target)

    def close(self) -> None:
        assert not self.is_under_way
        super().close()


class LateReader(AheadModel):
    """Has arrays of its own, which it reads some time after a step was begun, at the latest when the output is asked for."""

    def __init__(self, slots: int) -> None:
        super().__init__(slots)
        self.inputs = StepInputs(
            np.zeros((slots, FRAME_SAMPLES), np.float32), np.zeros(slots, np.int64), np.zeros(slots, np.bool_)
        )
        self.unread: StepInputs | None = None
        self.asked = 0
        self.in_place = 0
        """Steps whose rows were written into the backend's arrays, not copied."""

    @property
    def has_read_inputs(self) -> bool:
        self.asked += 1
        if self.unread is not None and self.asked % 3 == 0:
            self._read()
        return self.unread is None

    def _read(self) -> None:
        assert self.unread is not None
        self.read = StepInputs(*(part.copy() for part in self.unread))
        self.unread = None

    def begin(self, pcm: NDArray[np.float32], slots: NDArray[np.int64], fresh: NDArray[np.bool_]) -> Callable[[], StepOutput]:
        assert not self.is_under_way
        self.is_under_way = True
        self.ahead.append(len(slots))
        self.has_begun.set()
        self.in_place += pcm.ctypes.data == self.inputs.pcm.ctypes.data
        self.inputs.put(StepInputs(pcm, slots, fresh))
        self.unread = self.inputs.rows(0, len(slots))

        def finish() -> StepOutput:
            if self.unread is not None:
                self._read()
            self.is_under_way = False
            return super(AheadModel, self).step(*self.read)

        return finish


def recordings(count: int) -> list[NDArray[np.float32]]:
    draw = np.random.default_rng(1)
    return [noise(draw.uniform(0.3, 24), seed) for seed in range(count)]


@pytest.mark.parametrize(("model", "processes"), [(AheadModel, 0), (AheadModel, 2), (LateReader, 0)])
async def test_many_files_say_what_each_says_alone(model: type[AheadModel], processes: int) -> None:
    """Also on a model that is ready for other processes, of which none is there."""
    pcms = recordings(2 * STREAMS)
    async with engine(streams=STREAMS) as plain:
        alone = [without_timing(await transcribe(plain, pcm, live=False)) for pcm in pcms]
    async with engine(model, STREAMS, processes=processes) as ahead:
        free = asyncio.Semaphore(STREAMS)

        async def one(pcm: NDArray[np.float32]) -> list[object]:
            async with free:
                return list(without_timing(await transcribe(ahead, pcm, live=False)))

        together = await asyncio.gather(*map(one, pcms))
        begun = ahead.fake.ahead  # type: ignore[attr-defined]
        in_place = getattr(ahead.fake, "in_place", None)
    assert together == alone
    assert in_place is None or 0 < in_place < len(begun), "both ways were gone"
    assert max(begun) <= STREAMS // 2, "one half is stepped while the other is gathered"
    assert max(begun) >= AHEAD_ROWS // 2


async def test_files_that_are_closed_take_nobody_along() -> None:
    """Their slots go to others while rows of them are being stepped."""
    pcms = recordings(2 * STREAMS)
    async with engine(streams=STREAMS) as plain:
        alone = [without_timing(await transcribe(plain, pcm, live=False)) for pcm in pcms[:STREAMS]]
    async with engine(AheadModel, STREAMS) as ahead:
        free = asyncio.Semaphore(STREAMS)

        async def one(number: int) -> list[object]:
            async with free:
                if number < STREAMS:
                    return list(without_timing(await transcribe(ahead, pcms[number], live=False)))
                stream = ahead.open(live=False)
                await stream.send(Audio(pcms[number]))
                await anext(stream)
                await asyncio.sleep(0)
                stream.close()
                return []

        order = [number for pair in zip(range(STREAMS), range(STREAMS, 2 * STREAMS), strict=True) for number in pair]
        found = dict(zip(order, await asyncio.gather(*map(one, order)), strict=True))
        assert ahead.used_slots == 0
    assert [found[number] for number in range(STREAMS)] == alone


async def test_a_live_stream_next_to_files_is_as_alone() -> None:
    """With a marker, whose copy may not be made while a step is under way."""
    pcms = [noise(200 + seed % 7, seed) for seed in range(STREAMS // 2)]
    live = noise(30, 99)

    async def talk(to: BatchEngine) -> list[object]:
        stream = to.open()
        events: list[AnyEvent] = []
        for start in range(0, len(live), 1_920):
            await stream.send(Audio(live[start : start + 1_920]))
            if start == 10 * 1_920:
                await stream.send(Mark(1))
                events += await until(stream, lambda events: any(isinstance(event, Marker) for event in events))
        await stream.send(Finish())
        events += await rest(stream)
        stream.close()
        return list(without_timing(events))

    async with engine(streams=STREAMS) as plain:
        expected = await talk(plain)
        alone = [without_timing(await transcribe(plain, pcm, live=False)) for pcm in pcms[:-1]]
    async with engine(AheadModel, STREAMS) as ahead:
        files = [asyncio.create_task(transcribe(ahead, pcm, live=False)) for pcm in pcms[:-1]]
        assert await asyncio.to_thread(ahead.fake.has_begun.wait, DEADLINE)  # type: ignore[attr-defined]
        heard = await talk(ahead)
        before = len(ahead.fake.ahead)  # type: ignore[attr-defined]
        together = [without_timing(await file) for file in files]
        assert len(ahead.fake.ahead) > before, "and ahead again, when it has gone"  # type: ignore[attr-defined]
    assert together == alone
    assert heard == expected


async def test_rows_of_other_processes_end_it() -> None:
    pcms = recordings(8)
    async with engine(streams=STREAMS) as plain:
        alone = [without_timing(await transcribe(plain, pcm, live=False)) for pcm in pcms]
    async with engine(AheadModel, STREAMS, processes=1) as owner:
        first = [asyncio.create_task(transcribe(owner, noise(300, seed), live=False)) for seed in range(3)]
        assert await asyncio.to_thread(owner.fake.has_begun.wait, DEADLINE)  # type: ignore[attr-defined]
        async with remotes(owner, 1) as (remote,):
            there = [without_timing(await transcribe(remote, pcm, live=False)) for pcm in pcms]
        await asyncio.gather(*first)
    assert there == alone


@pytest.mark.parametrize("how", ["raises", "stopped"])
async def test_a_step_under_way_ends_with_the_engine(how: str) -> None:
    async with engine(AheadModel, 4) as ahead:
        stream = ahead.open(live=False)
        if how == "raises":
            ahead.fake.raise_next = True
        await stream.send(Audio(noise(100)))
        if how == "raises":
            assert isinstance((await rest(stream))[-1], Error)
            assert ahead.failure is not None
        else:
            await anext(stream)
        stream.close()
