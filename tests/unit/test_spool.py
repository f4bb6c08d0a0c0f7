"""Messages that wait: order, bounds, what the file holds, and a disk that fails."""

import asyncio
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.support.serving import until

from moshi_stt.config import LimitsConfig
from moshi_stt.errors import SpoolError
from moshi_stt.server import spool as spool_module
from moshi_stt.server.metrics import Metrics
from moshi_stt.server.spool import Backlog, Spool, SpoolBudget

OPEN: list[Backlog[object]] = []


class Held:
    """A backlog over a spool in a folder, and what it called back."""

    def __init__(self, folder: Path, memory_bytes: int = 1_000, **limits: Any) -> None:
        self.metrics = Metrics()
        self.budget = SpoolBudget(LimitsConfig(spool_dir=str(folder), **limits), self.metrics)
        self.again = 0
        self.failures: list[BaseException] = []
        self.spool = Spool(self.budget, self._again, self.failures.append)
        self.backlog: Backlog[object] = Backlog(memory_bytes, self.spool)
        OPEN.append(self.backlog)

    def _again(self) -> None:
        self.again += 1

    async def drain(self) -> list[object]:
        """All items, waiting for those that are fetched."""
        items: list[object] = []
        while self.backlog:
            item = self.backlog.pop()
            if item is None:
                seen = self.again
                await until(lambda seen=seen: self.again > seen or self.failures, "the next message")  # type: ignore[misc]
                if self.failures:
                    break
            else:
                items.append(item)
        return items


@pytest.fixture(autouse=True)
def on_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(spool_module, "file_system", lambda folder: "ext4")
    yield
    for backlog in OPEN:
        backlog.clear()
    OPEN.clear()


@pytest.mark.parametrize("seed", range(8))
async def test_everything_comes_back_in_order(tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Messages of every size, text among them, and other items; taken out while more come in."""
    monkeypatch.setattr(spool_module, "BLOCK_BYTES", 700)
    rng = random.Random(seed)
    held = Held(tmp_path)
    given: list[object] = []
    got: list[object] = []
    for i in range(600):
        kind = rng.random()
        item: Any = (
            i if kind < 0.05 else "é" * rng.randrange(30) if kind < 0.2 else rng.randbytes(rng.choice([0, 1, 50, 3_000]))
        )
        given.append(item)
        held.backlog.put(item)
        if rng.random() < 0.4 and (out := held.backlog.pop()) is not None:
            got.append(out)
        if rng.random() < 0.1:
            await asyncio.sleep(0)
    got += await held.drain()
    assert got == given
    assert held.failures == []
    assert held.metrics.spooled_bytes == 0
    assert held.backlog.memory_bytes == 0
    held.backlog.clear()


async def test_memory_is_bounded_and_the_file_is_nameless(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """20 MB wait in a file that no folder shows and only its owner may read; closing frees it."""
    held = Held(tmp_path, memory_bytes=100_000)
    for i in range(2_000):
        held.backlog.put(bytes([i % 256]) * 10_000)
        if i % 50 == 0:
            await asyncio.sleep(0.001)
    await until(lambda: held.backlog.memory_bytes < 100_000 + 2 * spool_module.BLOCK_BYTES + 20_000, "writing")
    assert os.listdir(tmp_path) == []  # noqa: PTH208
    assert held.spool._file is not None
    status = os.fstat(held.spool._file.fileno())
    assert (status.st_mode & 0o777, status.st_nlink) == (0o600, 0)
    assert held.metrics.spooled_bytes > 19_000_000
    held.backlog.clear()
    await until(lambda: held.spool._file is None, "closing")
    assert held.metrics.spooled_bytes == 0


async def test_the_bound_of_a_stream_and_of_all(tmp_path: Path) -> None:
    """What finds no room is still held, and reading is to pause; the order stays."""
    held = Held(tmp_path, memory_bytes=10, spool_bytes=300, spool_total_bytes=10_000)
    messages = [bytes([i]) * 50 for i in range(10)]
    for message in messages:
        held.backlog.put(message)
    assert held.backlog.is_full
    assert held.backlog.wants_pause
    assert await held.drain() == messages
    assert not held.backlog.wants_pause

    other = Held(tmp_path, memory_bytes=10, spool_total_bytes=100)
    for message in messages[:5]:
        other.backlog.put(message)
    assert other.backlog.is_full
    assert await other.drain() == messages[:5]


async def test_a_disk_that_fails_is_this_streams_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    held, neighbour = Held(tmp_path, memory_bytes=10), Held(tmp_path, memory_bytes=10)
    monkeypatch.setattr(spool_module, "BLOCK_BYTES", 100)
    neighbour.backlog.put(b"n" * 20)
    monkeypatch.setattr(spool_module.os, "pwrite", full)
    for _ in range(20):
        held.backlog.put(b"x" * 50)
    await until(lambda: held.failures, "the failure")
    assert isinstance(held.failures[0], SpoolError)
    assert "No space left on device" in str(held.failures[0])
    assert neighbour.failures == []
    assert await neighbour.drain() == [b"n" * 20]


def test_no_spool_where_there_is_no_disk_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def budget(**limits: Any) -> SpoolBudget:
        return SpoolBudget(LimitsConfig(**limits), Metrics())

    missing = budget(spool_dir=str(tmp_path / "none"))
    assert (missing.total, "cannot be written" in str(missing.why_off)) == (0, True)
    assert "switched off" in str(budget(spool_bytes=0).why_off)
    monkeypatch.setattr(spool_module, "file_system", lambda folder: "tmpfs")
    assert "is a tmpfs" in str(budget(spool_dir=str(tmp_path)).why_off)


def test_processes_share_the_room(tmp_path: Path) -> None:
    limits = LimitsConfig(spool_dir=str(tmp_path), spool_total_bytes=9_000)
    assert SpoolBudget(limits, Metrics(), processes=3).total == 3_000
