"""An hour of mixed load on the real server: memory, slots, descriptors and threads are at its end what they were.

MOSHI_STT_FULL=1 runs it; MOSHI_STT_SOAK_SECONDS sets another length, of which the first sixth is to warm up.
"""

import asyncio
import contextlib
import io
import os
import random
import time
import wave
from pathlib import Path

import aiohttp
import numpy as np
import pytest
from tests.support.worker_process import embedded_worker

from moshi_stt.client import Client
from moshi_stt.errors import ServerError
from moshi_stt.events import Marker
from moshi_stt.sample import sample_path

SECONDS = float(os.environ.get("MOSHI_STT_SOAK_SECONDS", "3600"))
MOST_GROWN_MB = 5.0
FRAME = 1_920

pytestmark = [
    pytest.mark.skipif("MOSHI_STT_FULL" not in os.environ, reason="takes an hour: MOSHI_STT_FULL=1 runs it"),
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory and descriptors are read from /proc"),
    pytest.mark.timeout(SECONDS * 2 + 300),
]


def speech() -> np.ndarray:
    """The packaged sample, float32 at 24 kHz."""
    with wave.open(str(sample_path())) as file:
        rate = file.getframerate()
        pcm = np.frombuffer(file.readframes(file.getnframes()), "<i2").astype(np.float32) / 32_768
    places = np.arange(0, len(pcm) - 1, rate / 24_000)
    return np.interp(places, np.arange(len(pcm)), pcm).astype(np.float32)


def measured(pid: int) -> dict[str, float]:
    """Resident megabytes, threads and descriptors of a process."""
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line)
    return {
        "mb": int(fields["VmRSS"].split()[0]) / 1_000,
        "threads": int(fields["Threads"]),
        "descriptors": len(os.listdir(f"/proc/{pid}/fd")),  # noqa: PTH208
    }


class Load:
    """Clients of every kind, one after another, until it is over."""

    def __init__(self, port: int, pcm: np.ndarray, end: float) -> None:
        self.url = f"ws://127.0.0.1:{port}"
        self.http = f"http://127.0.0.1:{port}/api/asr-streaming"
        self.pcm = pcm
        self.end = end
        self.counts: dict[str, int] = {}

    async def run(self, seed: int) -> None:
        rng = random.Random(seed)
        kinds = [self.paced, self.at_once, self.cut, self.upload, self.resets]
        while time.monotonic() < self.end:
            kind = rng.choice(kinds)
            with contextlib.suppress(ServerError, aiohttp.ClientError):
                await kind(rng)
            self.counts[kind.__name__] = self.counts.get(kind.__name__, 0) + 1

    async def paced(self, rng: random.Random) -> None:
        async with Client(self.url, resume=rng.random() < 0.5) as client:
            for start in range(0, rng.randrange(24_000, len(self.pcm)), FRAME):
                await client.send_audio(self.pcm[start : start + FRAME])
                await asyncio.sleep(0.08)
            await client.mark(1)
            await marked(client)

    async def at_once(self, rng: random.Random) -> None:
        async with Client(self.url) as client:
            await client.send_audio(self.pcm)
            await client.mark(1)
            await marked(client)

    async def cut(self, rng: random.Random) -> None:
        async with Client(self.url) as client:
            await client.send_audio(self.pcm[: rng.randrange(len(self.pcm))])

    async def resets(self, rng: random.Random) -> None:
        async with Client(self.url) as client:
            for _ in range(3):
                await client.send_audio(self.pcm[:48_000])
                await client.init()
            await client.mark(1)
            await marked(client)

    async def upload(self, rng: random.Random) -> None:
        buffer = io.BytesIO()
        with wave.open(buffer, "wb") as file:
            file.setparams((1, 2, 24_000, 0, "NONE", ""))
            file.writeframes((self.pcm * 32_767).astype("<i2").tobytes())
        headers = {"kyutai-api-key": "public_token"}
        async with aiohttp.ClientSession() as http, http.post(self.http, data=buffer.getvalue(), headers=headers) as answer:
            assert answer.status in (200, 503)
            await answer.read()


async def marked(client: Client) -> None:
    async for event in client:
        if isinstance(event, Marker):
            return


async def test_an_hour_of_mixed_load_leaves_nothing_behind() -> None:
    async with embedded_worker() as (port, pid):
        begin = time.monotonic()
        load = Load(port, speech(), begin + SECONDS)
        running = [asyncio.create_task(load.run(seed)) for seed in range(4)]
        await asyncio.sleep(SECONDS / 6)
        samples = [measured(pid)]
        while time.monotonic() < begin + SECONDS:
            await asyncio.sleep(min(60.0, SECONDS / 20))
            samples.append(measured(pid))
        await asyncio.gather(*running)
        await asyncio.sleep(20)  # what waits for clients that do not come back is given up
        last = measured(pid)
        async with aiohttp.ClientSession() as http, http.get(f"http://127.0.0.1:{port}/api/modules_info") as answer:
            used = (await answer.json())[0]["used_slots"]
    quarter = max(1, len(samples) // 4)
    early = float(np.median([sample["mb"] for sample in samples[:quarter]]))
    late = float(np.median([sample["mb"] for sample in samples[-quarter:]]))
    print(f"{load.counts}; {early:.1f} MB, then {late:.1f} MB; at the end {last}")
    assert used == "0"
    assert late - early <= MOST_GROWN_MB
    assert last["threads"] <= max(sample["threads"] for sample in samples[:quarter])
    assert last["descriptors"] <= min(sample["descriptors"] for sample in samples)
