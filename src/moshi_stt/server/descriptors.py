"""File descriptors kept in reserve, so that a client that finds none free is told so instead of being cut."""

import os
from contextlib import suppress

RESERVE = 64
"""Descriptors that only answers of 503 may use."""


def nearly_exhausted() -> bool:
    """Whether fewer than RESERVE descriptors are free. The lowest free number tells: the system gives that out first."""
    limit = soft_limit()
    if limit is None:
        return False
    try:
        lowest = os.open(os.devnull, os.O_RDONLY)
    except OSError:
        return True
    os.close(lowest)
    return lowest >= limit - RESERVE


def soft_limit() -> int | None:
    """How many descriptors this process may have; None for no limit, and where the system has none (Windows)."""
    with suppress(ImportError):
        import resource

        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        return None if soft == resource.RLIM_INFINITY else soft
    return None
