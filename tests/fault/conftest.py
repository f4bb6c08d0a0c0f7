"""Socket tests run on both event loops that the server may run on."""

import pytest
from tests.support.loops import Loops, loops_of


def pytest_asyncio_loop_factories(config: pytest.Config, item: pytest.Item) -> Loops:
    return loops_of(item)
