"""Socket tests run on both event loops that the server may run on; those of all doors, at each of them on every engine."""

import pytest
from tests.support.callers import CALLERS, Caller
from tests.support.engines import BatchKind, Kind, SegmentKind
from tests.support.loops import Loops, loops_of


def pytest_asyncio_loop_factories(config: pytest.Config, item: pytest.Item) -> Loops:
    return loops_of(item)


@pytest.fixture(params=list(CALLERS))
def caller(request: pytest.FixtureRequest) -> Caller:
    return CALLERS[request.param]


@pytest.fixture(params=[BatchKind, SegmentKind], ids=["batch", "segment"])
def kind(request: pytest.FixtureRequest) -> Kind:
    made: Kind = request.param()
    return made
