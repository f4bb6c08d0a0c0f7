"""Many streams at once: order kept, nothing lost, nobody starved, and memory given back."""

import asyncio
import gc
import tracemalloc
from typing import Any

import numpy as np
from tests.support.raw_ws import RawClient, frame
from tests.support.scripted_engine import ScriptedEngine, counting
from tests.support.serving import serving, until

from moshi_stt import protocol
from moshi_stt.engine.stream import StreamLimits

STREAMS = 50


async def test_fifty_streams_each_get_all_of_theirs_in_order() -> None:
    """Each with small messages of its own size, all at once."""
    engine = ScriptedEngine(counting(20), slots=STREAMS)
    async with serving(engine) as running:

        async def one(index: int) -> None:
            async with await RawClient.connect(running.port) as client:
                total = 0
                size = 240 + index
                while total < 40 * 1920:
                    client.silence(size)
                    total += size
                    await client.drain()
                client.marker(index)
                events = await client.events_until("Marker")
                assert events[-1]["id"] == index
                assert [e["text"] for e in events if e["type"] == "Word"] == [f"w{i}" for i in range(20)]
                steps = [e["step_idx"] for e in events if e["type"] == "Step"]
                assert steps == sorted(steps)
                client.close()
                assert (await client.rest())[1] == 1000

        await asyncio.gather(*(one(index) for index in range(STREAMS)))
        await until(lambda: engine.used_slots == 0)


async def test_fast_writers_do_not_starve_a_live_stream() -> None:
    """Ten clients that send as fast as they can, without end, and a live one whose markers keep coming."""
    engine = ScriptedEngine(slots=11, limits=StreamLimits(inbox_samples=20 * 1920))
    message = frame(2, protocol.encode_audio(np.zeros(24_000, np.float32)))
    bounds: Any = {"spool_bytes": 0, "ahead_bytes": 1}  # else their audio would go on to the disk
    async with serving(engine, **bounds) as running, await RawClient.connect(running.port) as live:
        engine.hold()

        async def upload() -> None:
            async with await RawClient.connect(running.port) as client:
                reading = asyncio.create_task(client.rest())
                try:
                    while True:
                        client.write(message)
                        await client.writer.drain()
                finally:
                    reading.cancel()

        uploads = [asyncio.create_task(upload()) for _ in range(10)]
        try:
            await until(lambda: engine.queued_samples > 150 * 1920, "the uploads at their bound")
            engine.release()
            for number in range(10):
                live.silence(1920)
                live.marker(number)
                assert (await live.events_until("Marker"))[-1]["id"] == number
            assert engine.queued_samples <= 11 * 20 * 1920
        finally:
            for each in uploads:
                each.cancel()
            await asyncio.wait(uploads)


async def test_long_session_holds_no_more_at_its_end_than_at_its_start() -> None:
    """Memory that grows with the length of a session is what comparable servers suffer from."""
    engine = ScriptedEngine(counting(3_000, 1))
    message = frame(2, protocol.encode_audio(np.zeros(1920, np.float32)))
    async with serving(engine) as running, await RawClient.connect(running.port) as client:

        async def part(number: int) -> None:
            for _ in range(200):
                client.write(message)
            client.marker(number)
            await client.events_until("Marker")

        await part(0)
        gc.collect()
        tracemalloc.start()
        try:
            await part(1)
            gc.collect()
            before = tracemalloc.get_traced_memory()[0]
            for number in range(2, 6):
                await part(number)
            gc.collect()
            grown = tracemalloc.get_traced_memory()[0] - before
        finally:
            tracemalloc.stop()
    assert grown < 100_000, f"{grown} bytes more after four times as much audio"
