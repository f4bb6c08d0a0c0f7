"""Fixtures of the unit tests."""

import pytest
from tests.support.written import Reader

from moshi_stt import engines
from moshi_stt.config import LimitsConfig, Module
from moshi_stt.engine.engine import Engine


@pytest.fixture
def readers(monkeypatch: pytest.MonkeyPatch) -> list[Reader]:
    """Every engine is a `Reader`; they are collected here."""
    made: list[Reader] = []

    def build(module: Module, limits: LimitsConfig, observer: object = None, force_cpu: bool = False) -> Engine:
        made.append(Reader(slots=3))
        return made[-1]

    monkeypatch.setattr(engines, "build_engine", build)
    return made
