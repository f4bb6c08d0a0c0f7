"""The crowd of `bench_neighbours.py`: it must notice a backend whose rows hear each other, and one that mixes slots up."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest


def load_crowd() -> ModuleType:
    spec = importlib.util.spec_from_file_location("crowd", Path(__file__).parents[2] / "benchmarks" / "crowd.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["crowd"] = module
    spec.loader.exec_module(module)
    return module


crowd = load_crowd()


class Codes:
    """State's codes, as a tensor on the host."""

    def __init__(self, slots: int) -> None:
        self.array = np.zeros((slots, 2), np.int64)

    def cpu(self) -> "Codes":
        return self

    def numpy(self) -> np.ndarray:
        return self.array


class Backend:
    """A stream's hash of what it heard; `fault` is what is wrong with it."""

    def __init__(self, slots: int, fault: str = "") -> None:
        self.fault = fault
        self.heard = np.zeros(slots, np.int64)
        self.state = SimpleNamespace(codes=Codes(slots))

    def step(self, pcm: np.ndarray, slots: np.ndarray, fresh: np.ndarray) -> Any:
        if self.fault != "not fresh":
            self.heard[slots[fresh]] = 0
        sums = np.frombuffer(pcm.tobytes(), np.uint32).reshape(len(slots), -1).sum(1, dtype=np.int64)
        self.heard[slots] = (self.heard[slots] * 31 + sums) % 1_000_003
        rows = len(slots) if self.fault == "rows" else 0
        self.state.codes.array[slots] = self.heard[slots, None] % 7
        return SimpleNamespace(text_token=self.heard[slots] % 50, logprob=(self.heard[slots] + rows) / 1_000_003)


def differing(fault: str) -> dict[str, int]:
    one, other = (crowd.Crowd(Backend(6, fault), 6, seconds=1.0) for _ in range(2))
    first, told = one.run(600, seed=1)
    second, _ = other.run(600, seed=2)
    assert told["joins"] > 12, "streams end, and others join in their slots"
    found: dict[str, int] = crowd.compare(first, second)
    assert found["frames"] > 300
    return found


def test_streams_that_depend_on_themselves_alone_differ_nowhere() -> None:
    found = differing("")
    assert [found[name] for name in ("tokens", "logprobs", "codes", "streams_changed")] == [0, 0, 0, 0]


@pytest.mark.parametrize(("fault", "what"), [("rows", "logprobs"), ("not fresh", "tokens")])
def test_a_fault_is_noticed(fault: str, what: str) -> None:
    assert differing(fault)[what] > 0
