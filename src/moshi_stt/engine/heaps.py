"""Memory that the C library keeps after it was freed."""

import asyncio
import ctypes
import sys
from typing import Final

TRIM_SECONDS: Final = 300.0
"""A trim holds the heaps' locks for some ten milliseconds: not for an engine whose steps have a deadline."""


async def trim_heaps() -> None:
    """Give the free pages of glibc's heaps back to the system now and then, until cancelled: else the largest moment of each
    heap stays. Returns at once where there is no glibc.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    while trim is not None:
        await asyncio.sleep(TRIM_SECONDS)
        await asyncio.to_thread(trim, 0)
