"""Many streams over a backend without a model: nothing lost, memory bounded, the batch full."""

import asyncio
import tracemalloc

from tests.support.batch import engine, noise, rest
from tests.support.scripted_backend import Scripted

from moshi_stt.constants import FRAME_SAMPLES
from moshi_stt.engine.commands import Audio, Finish
from moshi_stt.engine.stream import StreamLimits
from moshi_stt.events import Step, Word

STREAMS = 1_024
FRAMES = 16
SCRIPT = [3, 3, 3, 3, 3, 3, *[0, 9, 3] * 20]


async def test_1024_streams_at_once() -> None:
    """20 ms packets of 1,024 streams, more than the machine takes at once: every word of every stream, in bounded memory."""
    limits = StreamLimits(inbox_samples=4 * FRAME_SAMPLES, outbox_events=64)
    packets = [noise(0.25, seed) for seed in range(4)]

    async def one(number: int) -> tuple[int, int]:
        stream = started.open()
        task = asyncio.create_task(rest(stream))
        for packet in range(FRAMES * 4):
            await stream.send(Audio(packets[packet % 4].copy()))
            if packet % 8 == number % 8:
                await asyncio.sleep(0)
        await stream.send(Finish())
        events = await task
        stream.close()
        return sum(isinstance(e, Step) for e in events), [e.text for e in events if isinstance(e, Word)].count("9")

    async with engine(lambda slots: Scripted(slots, SCRIPT), streams=STREAMS, limits=limits) as started:
        tracemalloc.start()
        results = await asyncio.gather(*(one(number) for number in range(STREAMS)))
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert results == [(FRAMES, 6)] * STREAMS
        assert max(started.fake.rows) > STREAMS // 2
        assert started.used_slots == 0
        assert started.queued_samples == 0
    whole = STREAMS * FRAMES * FRAME_SAMPLES * 4
    assert peak < whole / 2, f"{peak / 1e6:.0f} MB for {whole / 1e6:.0f} MB of audio"
