"""The event loops that the server may run on. For the `conftest.py` of folders whose socket tests run on each of them."""

import asyncio
from collections.abc import Callable, Mapping

import pytest

try:
    import uvloop
except ImportError:  # Windows
    uvloop = None

Loops = Mapping[str, Callable[[], asyncio.AbstractEventLoop]]

BOTH: Loops = {"asyncio": asyncio.new_event_loop} | ({"uvloop": uvloop.new_event_loop} if uvloop is not None else {})


def loops_of(item: pytest.Item) -> Loops:
    """Both for the tests of sockets, the default one for the rest."""
    return BOTH if "test_ws" in item.nodeid or "test_tcp" in item.nodeid else {"asyncio": asyncio.new_event_loop}
