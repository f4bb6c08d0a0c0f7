"""Whole recordings sent at once by the libraries that people use, with their own keepalive: all of them is transcribed.

Here the engines are as fast as they can be. MOSHI_STT_FULL=1 runs them at 2.5 times real time, so that every keepalive comes
due many times while audio waits, and an hour of audio (MOSHI_STT_HOUR_SECONDS of it) at real time and by the embedded model.
With MOSHI_STT_NODE_MODULES, a folder in which `npm install ws` was run, Node's `ws` is one of the clients.
"""

import asyncio
import contextlib
import os
import random
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from tests.support.engines import DELAY, speech
from tests.support.fast_clients import FastClient, by_websockets, fast_clients
from tests.support.level_speech import LevelRecogniser
from tests.support.raw_ws import RawClient
from tests.support.scripted_backend import FakeBackend, LevelModel, loader, spell_level
from tests.support.serving import Running, serving
from tests.support.socket_processes import served
from tests.support.worker_process import embedded_worker

from moshi_stt import protocol
from moshi_stt.audio.decode import read_file
from moshi_stt.client import Client
from moshi_stt.constants import DEFAULT_PATH, FRAME_SECONDS, SAMPLE_RATE
from moshi_stt.engine.batch import BatchEngine
from moshi_stt.engine.engine import Engine
from moshi_stt.engine.segment import SegmentEngine
from moshi_stt.events import AnyEvent, Marker, Word
from moshi_stt.sample import sample_path

FULL = "MOSHI_STT_FULL" in os.environ
PACE = 2.5 if FULL else None
"""Times real time at which an engine transcribes; None for no bound."""
SECONDS = 300
HOUR_SECONDS = int(os.environ.get("MOSHI_STT_HOUR_SECONDS", "3600"))
MOST_HELD_BYTES = 12_000_000
"""Of one connection, in memory: five minutes of its audio are 29 MB, and an hour is 346 MB."""
MOST_RESIDENT_BYTES = 22_000_000
"""The same where only the size of its process is known: while the disk is slow, what is being written is there twice."""
MOST_GROWN_BYTES = 120_000_000
"""Of a process that has just started: its recognisers take their memory with their first long segments."""
SLOTS = 8
NEIGHBOUR_SAYS = [3, 9, 5]

full = pytest.mark.skipif(not FULL, reason="takes an hour: MOSHI_STT_FULL=1 runs it")


def recording(seconds: int, seed: int = 1) -> tuple[NDArray[np.float32], list[str]]:
    """Speech of at least so long, and what is said in it."""
    rng = random.Random(seed)
    numbers: list[int] = []
    pieces: list[NDArray[np.float32]] = []
    while sum(map(len, pieces)) < seconds * SAMPLE_RATE:
        said = [rng.randrange(1, 40) for _ in range(10)]
        numbers += said
        pieces.append(speech(said))
    return np.concatenate(pieces), [f"w{number}." for number in numbers]


def messages_of(pcm: NDArray[np.float32]) -> list[bytes]:
    """A message for each second."""
    return [protocol.encode_audio(pcm[start : start + SAMPLE_RATE]) for start in range(0, len(pcm), SAMPLE_RATE)]


def texts(events: Sequence[AnyEvent]) -> list[str]:
    return [event.text for event in events if isinstance(event, Word)]


def bare(words: Sequence[str]) -> list[str]:
    """Without what depends on the sentence before: capitals and punctuation."""
    return [word.strip(".,!?").lower() for word in words]


class SlowRecogniser(LevelRecogniser):
    """Takes its time for each frame of 32 ms."""

    def speech_probability(self, frame: NDArray[np.float32], state: int) -> tuple[float, int]:
        if PACE is not None:
            time.sleep(0.032 / (PACE * SLOTS / 2))  # two threads share all streams
        return super().speech_probability(frame, state)


def batch_engine(pace: float | None) -> Engine:
    def model(slots: int) -> FakeBackend:
        made = LevelModel(slots)
        made.step_seconds = 0.0 if pace is None else FRAME_SECONDS / pace
        return made

    return BatchEngine(loader(model, SLOTS, spell_level, delay=DELAY), marker_wait_seconds=0.05)


@contextlib.asynccontextmanager
async def in_one_process(engine: Engine) -> AsyncIterator[tuple[Running, Callable[[], int]]]:
    async with serving(engine) as running:
        yield running, lambda: max((each.held_bytes for each in running.server.service.connections), default=0)


@contextlib.asynccontextmanager
async def in_socket_processes(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[tuple[Running, Callable[[], int]]]:
    async with served(monkeypatch, streams=SLOTS) as (running, pool, model):
        model.backend.step_seconds = 0.0 if PACE is None else FRAME_SECONDS / PACE
        processes = [worker.process.pid for worker in pool._workers if worker.process is not None]
        before = {pid: resident_bytes(pid) for pid in processes}
        in_each = len(fast_clients()) // 2 + 1  # with the neighbour, shared out evenly
        yield running, lambda: max(resident_bytes(pid) - before[pid] for pid in processes) // in_each


def resident_bytes(pid: int) -> int:
    """Of a process; 0 where the system does not tell."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except FileNotFoundError:
        return 0


Served = contextlib.AbstractAsyncContextManager[tuple[Running, Callable[[], int]]]


def servers(kind: str, monkeypatch: pytest.MonkeyPatch) -> Served:
    """A server, and the bytes that the fullest connection holds in memory."""
    if kind == "processes":
        return in_socket_processes(monkeypatch)
    if kind == "batch":
        return in_one_process(batch_engine(PACE))
    return in_one_process(SegmentEngine(SlowRecogniser, slots=SLOTS, threads=2))


class Beside:
    """What goes on while the clients are served: a neighbour that must hear its own words, and a look at the memory."""

    def __init__(self, running: Running, held: Callable[[], int]) -> None:
        self._running, self._held = running, held
        self.rounds = 0
        self.most_held = 0

    async def talk(self, over: asyncio.Event) -> None:
        async with await RawClient.connect(self._running.port) as client:
            while not over.is_set() or not self.rounds:
                client.audio(speech(NEIGHBOUR_SAYS))
                client.marker(self.rounds)
                events = await client.events_until("Marker")
                assert [event["text"] for event in events if event["type"] == "Word"] == ["w3.", "w9.", "w5."]
                self.rounds += 1

    async def look(self, over: asyncio.Event) -> None:
        while not over.is_set():
            self.most_held = max(self.most_held, self._held())
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(over.wait(), 0.05)


@contextlib.asynccontextmanager
async def beside(running: Running, held: Callable[[], int]) -> AsyncIterator[Beside]:
    over = asyncio.Event()
    made = Beside(running, held)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(made.talk(over))
        tasks.create_task(made.look(over))
        try:
            yield made
        finally:
            over.set()


@pytest.mark.timeout(3_600 if FULL else 600)
@pytest.mark.parametrize("kind", ["batch", "segment", "processes"])
async def test_five_minutes_at_once_by_every_client(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All clients together, and a neighbour: everyone gets the words of its own recording, and memory is bounded."""
    clients = fast_clients()
    async with servers(kind, monkeypatch) as (running, held), beside(running, held) as neighbour:

        async def one(seed: int, client: FastClient) -> None:
            pcm, said = recording(SECONDS, seed)
            assert texts(await client(running.ws, messages_of(pcm))) == said

        began = time.monotonic()
        ends = await asyncio.gather(*(one(*each) for each in enumerate(clients.values())), return_exceptions=True)
        took = time.monotonic() - began
    print(
        f"{kind}: {', '.join(clients)} in {took:.0f} s; at most {neighbour.most_held} bytes; {neighbour.rounds} rounds beside"
    )
    assert dict(zip(clients, ends, strict=True)) == dict.fromkeys(clients)
    assert neighbour.most_held < (MOST_RESIDENT_BYTES if kind == "processes" else MOST_HELD_BYTES)


@full
@pytest.mark.timeout(3 * HOUR_SECONDS)
async def test_an_hour_at_once_at_real_time() -> None:
    pcm, said = recording(60)
    times = -(-HOUR_SECONDS * SAMPLE_RATE // len(pcm))
    async with in_one_process(batch_engine(1.0)) as (running, held), beside(running, held) as neighbour:
        began = time.monotonic()
        events = await by_websockets(running.ws, messages_of(pcm) * times)
        took = time.monotonic() - began
    print(f"{took:.0f} s; at most {neighbour.most_held} bytes; {neighbour.rounds} rounds beside")
    assert texts(events) == said * times
    assert neighbour.most_held < MOST_HELD_BYTES


@full
@pytest.mark.timeout(4 * HOUR_SECONDS)
async def test_an_hour_at_once_by_the_embedded_model() -> None:
    """The packaged sample again and again, and a neighbour that speaks it at the pace of speech."""
    pcm = np.concatenate([read_file(sample_path()), np.zeros(2 * SAMPLE_RATE, np.float32)])
    times = -(-HOUR_SECONDS * SAMPLE_RATE // len(pcm))
    async with embedded_worker() as (port, pid):
        url = f"ws://127.0.0.1:{port}{DEFAULT_PATH}"
        alone = await spoken(url, pcm)
        assert len(alone) > 5
        before, most = resident_bytes(pid), 0
        began = time.monotonic()
        hour = asyncio.create_task(by_websockets(url, messages_of(pcm) * times))
        rounds = 0
        while not hour.done():
            assert await spoken(url, pcm) == alone
            rounds += 1
            most = max(most, resident_bytes(pid) - before)
        took = time.monotonic() - began
        heard = texts(await hour)
    print(f"{took:.0f} s, {len(heard)} words; at most {most} bytes more; {rounds} rounds beside")
    assert bare(heard) == bare(alone) * times
    assert most < MOST_GROWN_BYTES


async def spoken(url: str, pcm: NDArray[np.float32]) -> list[str]:
    """Words of a stream in real time."""
    words: list[str] = []
    async with Client(url) as client:
        for start in range(0, len(pcm), 1_920):
            await client.send_audio(pcm[start : start + 1_920])
            await asyncio.sleep(FRAME_SECONDS)
        await client.mark(1)
        async for event in client:
            if isinstance(event, Marker):
                break
            words += texts([event])
    return words
