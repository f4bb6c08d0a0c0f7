"""Socket tests run on both event loops that the server may run on."""

import asyncio
from collections.abc import Callable, Mapping

import pytest

try:
    import uvloop
except ImportError:  # Windows
    uvloop = None

LOOPS: Mapping[str, Callable[[], asyncio.AbstractEventLoop]] = {"asyncio": asyncio.new_event_loop} | (
    {"uvloop": uvloop.new_event_loop} if uvloop is not None else {}
)


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Both for the tests of WebSockets, the default one for the rest."""
    return LOOPS if "test_ws" in item.nodeid else {"asyncio": asyncio.new_event_loop}
