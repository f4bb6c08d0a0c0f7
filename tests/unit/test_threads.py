"""Waiting for worker threads: one deadline for all, and calls that do not come back."""

import asyncio
import threading
import time

import pytest

from moshi_stt.engine.threads import join_threads, overdue

DEADLINE = 120.0


class Stuck(threading.Thread):
    """Never ends; waiting for it takes as long as it may."""

    def __init__(self) -> None:
        super().__init__()
        self.waited: list[float] = []

    def join(self, timeout: float | None = None) -> None:
        assert timeout is not None
        self.waited.append(timeout)
        time.sleep(timeout)

    def is_alive(self) -> bool:
        return True


async def test_all_threads_share_one_deadline() -> None:
    """Joined one after another with ten seconds each, two stuck threads held a shutdown for twenty."""
    stuck = [Stuck() for _ in range(3)]
    ended = threading.Thread(target=lambda: None)
    ended.start()
    assert await join_threads([*stuck, ended], 0.05) == stuck
    assert sum(waited for thread in stuck for waited in thread.waited) <= 0.06


async def test_a_call_is_overdue_when_it_has_not_come_back_for_so_long(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    looks = [0]

    def begun() -> list[float | None]:
        looks[0] += 1
        now[0] += 0.04  # of a limit of 0.1 s
        return [None, 100.0 if looks[0] < 3 else 100.12, None]

    class Clock:
        monotonic = staticmethod(lambda: now[0])

    monkeypatch.setattr("moshi_stt.engine.threads.time", Clock)
    async with asyncio.timeout(DEADLINE):
        await overdue(begun, 0.1)
    assert looks[0] == 7, "at 0.24 s: the first call came back at 0.08 s, the second was 0.12 s old"
