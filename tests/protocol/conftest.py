"""Socket tests run on both event loops that the server may run on; what is true of every engine, on every engine."""

import pytest
from tests.support import engines
from tests.support.engines import Kind
from tests.support.frameworks import need
from tests.support.loops import Loops, loops_of

from moshi_stt.server import gate


def pytest_asyncio_loop_factories(config: pytest.Config, item: pytest.Item) -> Loops:
    return loops_of(item)


@pytest.fixture(autouse=True)
def quick_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer to a wrong key does not take a second."""
    monkeypatch.setattr(gate, "WRONG_KEY_SECONDS", 0.01)


@pytest.fixture(params=["batch", "segment", "torch", "mlx"], scope="session")
def kind(request: pytest.FixtureRequest) -> Kind:
    """A kind of engine. Those of real models are skipped where the framework, or the checkpoint, is not at hand."""
    if request.param == "batch":
        return engines.BatchKind()
    if request.param == "segment":
        return engines.SegmentKind()
    need(request.param)
    if request.param == "torch":
        return engines.torch_kind(request.getfixturevalue("tiny"))
    return engines.mlx_kind(request.getfixturevalue("small"))
