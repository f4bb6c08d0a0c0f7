"""Waiting for worker threads: to end, and to come back from a call."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterable, Sequence

LOOKS = 8
"""How often a deadline is looked at within its time."""


async def join_threads(threads: Sequence[threading.Thread], within_seconds: float) -> list[threading.Thread]:
    """Wait for all to end, up to one deadline for all of them; those that did not."""

    def join() -> None:
        deadline = time.monotonic() + within_seconds
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    await asyncio.to_thread(join)
    return [thread for thread in threads if thread.is_alive()]


async def overdue(begun: Callable[[], Iterable[float | None]], limit_seconds: float) -> None:
    """Return when a call has not come back for so long.

    begun: of each call that may be under way, time.monotonic() when it began, None while there is none.
    """
    while True:
        await asyncio.sleep(limit_seconds / LOOKS)
        now = time.monotonic()
        if any(each is not None and now - each > limit_seconds for each in begun()):
            return
