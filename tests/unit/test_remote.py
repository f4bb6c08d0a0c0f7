"""Engines over another's backend: what several of them say beside each other is what each would say alone."""

import asyncio
import os
import random
import struct

import pytest
from tests.support.batch import engine, feed_in_pieces, noise, rest, steps_of, transcribe, until, without_timing
from tests.support.remote import remotes
from tests.support.scripted_backend import PseudoModel, Scripted
from tests.support.serving import until as becomes

from moshi_stt.constants import FRAME_SAMPLES
from moshi_stt.engine.batch import BatchEngine
from moshi_stt.engine.commands import Audio, Finish, Mark
from moshi_stt.engine.engine import SilentObserver
from moshi_stt.engine.shared_backend import BackendServer, RowBlock, SocketWakeup, shared_file
from moshi_stt.engine.slots import spare_share, spare_slots
from moshi_stt.errors import EngineFailed, NoFreeSlot
from moshi_stt.events import AnyEvent, Error, Marker

STREAMS = 12


async def marked(started: BatchEngine, pcm_frames: float, seed: int) -> list[AnyEvent]:
    """A stream that sends in pieces, with a marker behind the first half, and another with nothing behind it for a while."""
    draw = random.Random(seed)
    pcm = noise(pcm_frames, seed)
    half = len(pcm) // 2
    stream = started.open()
    await feed_in_pieces(stream, pcm[:half], [draw.choice([480, 1_920, 5_000]) for _ in range(8)])
    await stream.send(Mark(1))
    events = await until(stream, lambda e: Marker(1) in e)
    await stream.send(Audio(pcm[half:]))
    await stream.send(Mark(2))
    await stream.send(Finish())
    events += await rest(stream)
    stream.close()
    return [event for event in without_timing(events) if not isinstance(event, Marker)]


async def test_streams_of_several_engines_are_as_if_alone() -> None:
    async with engine(PseudoModel, STREAMS) as alone:
        expected = [without_timing(await transcribe(alone, noise(20 + seed, seed))) for seed in range(STREAMS)]
    async with engine(PseudoModel, STREAMS, processes=3) as owner, remotes(owner, 3) as others:
        engines: list[BatchEngine] = [owner, *others]

        async def one(seed: int) -> None:
            got = without_timing(await transcribe(engines[seed % 4], noise(20 + seed, seed)))
            assert got == expected[seed]

        for _ in range(3):  # the slots are used again
            await asyncio.gather(*(one(seed) for seed in range(STREAMS)))
            await becomes(lambda: owner.used_slots == 0, "giving back")
        assert max(owner.fake.rows) > 1


async def test_markers_are_answered_on_each_engines_own_copies() -> None:
    """More at once than there are copies: each is answered, and the stream goes on as if there had been no marker."""
    async with engine(PseudoModel, STREAMS) as alone:
        expected = [await marked(alone, 11.5 + seed, seed) for seed in range(STREAMS)]
    async with engine(PseudoModel, STREAMS, processes=2) as owner, remotes(owner, 2) as others:
        engines: list[BatchEngine] = [owner, *others]
        got = await asyncio.gather(*(marked(engines[seed % 3], 11.5 + seed, seed) for seed in range(STREAMS)))
        assert list(got) == expected


async def test_no_more_slots_than_there_are() -> None:
    """A slot is lent again only when no row of its last stream is under way."""
    async with engine(PseudoModel, 2, processes=2) as owner, remotes(owner, 2) as (first, second):
        streams = [first.open(), second.open()]
        for each in (owner, first, second):
            with pytest.raises(NoFreeSlot):
                each.open()
        for stream in streams:
            await stream.send(Audio(noise(50)))
            stream.close()
        await becomes(lambda: owner.used_slots == 0, "giving back")
        assert len(await transcribe(second, noise(3))) >= 4


class Rows(SilentObserver):
    def __init__(self) -> None:
        self.rows = 0

    def stepped(self, seconds: float, rows: int) -> None:
        self.rows += rows


async def test_the_owner_counts_everybodys_steps() -> None:
    counted, uncounted = Rows(), Rows()
    async with (
        engine(lambda slots: Scripted(slots, []), 4, observer=counted, processes=1) as owner,
        remotes(owner, 1) as (other,),
    ):
        counted.rows = 0
        other.observer = uncounted
        await transcribe(other, noise(10))
        await transcribe(owner, noise(10))
    assert counted.rows >= 20
    assert uncounted.rows == 0


async def test_a_failed_step_ends_the_streams_of_all() -> None:
    async with engine(PseudoModel, 4, processes=2) as owner, remotes(owner, 2) as others:
        streams = [each.open() for each in (owner, *others)]
        owner.fake.raise_next = True
        for stream in streams:
            await stream.send(Audio(noise(2)))
        for stream in streams:
            last = (await rest(stream))[-1]
            assert isinstance(last, Error)
            assert last.close_code == 1011
            stream.close()
        for each in (owner, *others):
            with pytest.raises(EngineFailed):
                each.open()


async def test_an_engine_that_goes_takes_nobody_along() -> None:
    async with engine(PseudoModel, 4, processes=2) as owner, remotes(owner, 2) as (first, second):
        stream = first.open()
        await stream.send(Audio(noise(30)))
        await first.stop()
        assert isinstance((await rest(stream))[-1], Error)
        stream.close()
        assert len(await transcribe(second, noise(5))) > 5
        assert len(await transcribe(owner, noise(5))) > 5


def test_every_process_has_copies() -> None:
    for streams in (1, 8, 64, 1_024):
        for processes in (0, 1, 3, 8, 16):
            assert spare_share(streams, processes) >= 1
            assert spare_slots(streams, processes) == (processes + 1) * spare_share(streams, processes)
    assert [spare_slots(streams) for streams in (1, 64, 256, 1_024)] == [1, 8, 8, 32]
    assert spare_slots(2_200, 8) == 72, "200 streams that end in one second want some 50 copies at once"


def test_a_frame_is_what_the_rows_hold() -> None:
    """The shared block has room for every stream of the engine at once."""
    memory = shared_file(RowBlock.size(5, 4, FRAME_SAMPLES))
    block = RowBlock(memory, 5, 4, FRAME_SAMPLES)
    os.close(memory)
    assert block.inputs.pcm.shape == (5, FRAME_SAMPLES)
    block.inputs.pcm[:] = 1
    block.output.pause[:] = 2
    assert not block.inputs.slots.any()
    assert not block.output.text_token.any()


def test_a_wake_up_that_comes_late_is_over_after_one_turn() -> None:
    """`set` by another thread may write its byte after the `clear` that forgets it: the thread must not stay awake for ever."""
    wakeup = SocketWakeup()
    wakeup._out.send(b"w")
    wakeup.wait(10)
    wakeup.clear()
    assert wakeup.readable() == []
    assert not wakeup._selector.select(0)
    wakeup.close()


def test_who_comes_to_a_closed_server_is_told_so() -> None:
    server = BackendServer(1, 4, FRAME_SAMPLES)
    server.close()
    gone: list[bool] = []
    memory, signal = server.connect(lambda: gone.append(True))
    os.close(memory)
    assert signal.recv(1) == b""
    assert gone == [True]
    signal.close()


async def test_the_slots_of_a_process_that_died_rest_until_its_rows_are_done() -> None:
    """However long that step takes: a row of its last request must not meet the slot's next stream in one step."""
    async with engine(PseudoModel, 2, processes=1) as owner:
        memory, signal = owner.connect((gone := asyncio.Event()).set)
        block = RowBlock(memory, 2, 4, FRAME_SAMPLES)
        os.close(memory)
        owner.fake.hang_next = True
        stream = owner.open()
        await stream.send(Audio(noise(1)))
        await becomes(lambda: owner.fake.is_hanging, "the long step")
        slot = owner.lend()
        block.inputs.slots[0] = slot.index
        signal.sendall(struct.pack("<BII", 1, 1, 0))
        signal.close()  # it dies, with a step asked for
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(gone.wait(), 0.05)
        owner.fake.hang_next = False
        owner.fake.resume.set()
        await asyncio.wait_for(gone.wait(), 10)
        owner.take_back(slot)
        again = owner.open()
        await again.send(Audio(noise(3)))
        await until(again, lambda e: steps_of(e) == 3)
        for each in (stream, again):
            each.close()
