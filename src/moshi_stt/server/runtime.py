"""What each process of the server sets up for itself: the interpreter, the limit on open files, the event loop."""

import asyncio
import gc
import sys
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any


def tune_interpreter() -> None:
    """Set Python up for an event loop and a model thread that make many short-lived objects.

    The model thread wants the interpreter back several times a step; with Python's 5 ms it would wait as long each time that
    the event loop is busy. The garbage collector, which looks for cycles among all objects every few thousand new ones, took
    half of the model thread's time with a thousand streams; hardly anything here has cycles.
    """
    sys.setswitchinterval(0.0005)
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
    """Run on uvloop where it is installed."""
    try:
        import uvloop
    except ImportError:
        return asyncio.run(main)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(main)
