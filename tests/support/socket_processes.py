"""A server whose WebSockets are carried by further processes. For tests of those."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import aiohttp
import numpy as np
import pytest
from tests.support.level_speech import pause, say
from tests.support.scripted_backend import FakeBackend, LevelModel, loader, spell_level
from tests.support.serving import Running, serving

from moshi_stt.engine.batch import BatchEngine
from moshi_stt.server.doors import DOORS
from moshi_stt.server.doors.door import AnyDoor
from moshi_stt.server.workers import supervisor
from moshi_stt.server.workers.pool import WorkerPool

PROCESSES = 2
GAP = 0.24


class Model:
    """The engine's backend, once it is loaded."""

    backend: FakeBackend


@asynccontextmanager
async def served(
    monkeypatch: pytest.MonkeyPatch, streams: int = 8, doors: Sequence[AnyDoor] = DOORS
) -> AsyncIterator[tuple[Running, WorkerPool, Model]]:
    """A server whose sockets are elsewhere."""
    monkeypatch.setattr(supervisor, "FIRST_PAUSE_SECONDS", 0.01)
    model = Model()

    def make(slots: int) -> FakeBackend:
        model.backend = LevelModel(slots)
        return model.backend

    engine = BatchEngine(loader(make, streams, spell_level, PROCESSES), marker_wait_seconds=0.05)
    async with serving(engine, doors=doors) as running:
        processes = running.server.service.workers
        assert processes is not None
        yield running, processes, model
    for worker in processes._workers:
        assert worker.process is not None
        assert worker.process.returncode == 0


def speech(numbers: list[int]) -> np.ndarray:
    return np.concatenate([say(numbers, gap=GAP), pause(0.5)])


def lent(processes: WorkerPool) -> list[int]:
    """How many streams each process carries."""
    return [len(worker.lent) for worker in processes._workers]


async def counts(running: Running) -> dict[str, float]:
    """The samples of /metrics."""
    async with aiohttp.ClientSession() as http, http.get(running.http + "/metrics") as answer:
        lines = (await answer.text()).splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))}
