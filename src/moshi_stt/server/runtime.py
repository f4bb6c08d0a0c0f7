"""What each process of the server sets up for itself: the interpreter, memory, the limit on open files, the event loop."""

import asyncio
import ctypes
import gc
import sys
import threading
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

from moshi_stt.cores import usable_cores

M_ARENA_MAX = -8
"""Of glibc's mallopt."""

ARENAS = 2
"""Heaps that all threads share. With one each, as glibc gives them, every thread would keep what its largest file took."""


def tune_interpreter(switch_seconds: float = 0.0005) -> None:
    """Set Python up for an event loop and a model thread that make many short-lived objects.

    switch_seconds: how long one thread has the interpreter while another wants it.

    The model thread wants the interpreter back several times a step; with Python's 5 ms it would wait as long each time that
    the event loop is busy. The garbage collector, which looks for cycles among all objects every few thousand new ones, took
    half of the model thread's time with a thousand streams; hardly anything here has cycles.
    """
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):  # another C library
            ctypes.CDLL(None).mallopt(M_ARENA_MAX, ARENAS)
    sys.setswitchinterval(switch_seconds)
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 50, 1_000)


def raise_file_limit() -> None:
    """Let this process hold as many sockets as its user may: the default is 256 on macOS, 1,024 on many a Linux."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for wanted in (65_536, 10_240):  # macOS refuses more than the second, whatever its hard limit says
        limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        if soft == resource.RLIM_INFINITY or limit <= soft:
            return
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
            return


def run(main: Coroutine[Any, Any, int]) -> int:
    """Run on uvloop where it is installed, with all threads for what would block the loop."""
    try:
        import uvloop
    except ImportError:
        return asyncio.run(_with_helpers(main))
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_with_helpers(main))


async def _with_helpers(main: Coroutine[Any, Any, int]) -> int:
    """The loop's own pool starts a thread now and then, for days: here all are there from the start."""
    count = min(32, usable_cores() + 4)
    pool = ThreadPoolExecutor(count, thread_name_prefix="helper")
    together = threading.Barrier(count)
    for _ in range(count):
        pool.submit(together.wait)
    asyncio.get_running_loop().set_default_executor(pool)
    return await main
