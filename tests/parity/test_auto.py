"""`batch_size = "auto"` on real backends: as many slots as were found to be right, over weights that are loaded once."""

from typing import Any

import numpy as np
import pytest
from tests.support.checkpoints import Checkpoint
from tests.support.frameworks import FRAMEWORKS, loader
from tests.support.stepping import drive, noise

from moshi_stt import engines
from moshi_stt.engine.slots import spare_slots

both = pytest.mark.parametrize("framework", FRAMEWORKS)


def load(framework: str, small: Checkpoint, slots: int) -> Any:
    return loader(framework)(small.lm_file, small.mimi_file, small.spec, slots)


def slots_for(streams: int) -> int:
    return streams + spare_slots(streams)


@both
@pytest.mark.parametrize(("room", "time", "streams"), [(20, 5, 5), (20, 20, 20), (0, 1, 1)])
def test_streams_are_what_memory_and_time_allow(
    framework: str, room: int, time: int, streams: int, small: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The measured backend is the one that serves, and steps as one that was loaded with so many slots."""
    backend = load(framework, small, slots_for(1))
    weights = backend.lm, backend.mimi
    measured: list[tuple[int, int]] = []

    def sustained(measured_backend: Any, most: int) -> int:
        measured.append((measured_backend.slots, most))
        return min(most, time)

    monkeypatch.setattr("moshi_stt.models.autosize.sustained_streams", sustained)
    monkeypatch.setattr(engines, "free_bytes", lambda backend: int(room * backend.report.slot_bytes / 0.8 + 1))
    assert engines.fit_streams(backend, slots_for) == streams
    most = max(1, room)
    assert measured == [(slots_for(most), most)]
    assert (backend.lm, backend.mimi) == weights
    assert backend.slots == slots_for(streams)
    other = load(framework, small, slots_for(streams))
    ours, theirs = (drive(each, noise(20, seed=5)) for each in (backend, other))
    np.testing.assert_array_equal(ours.tokens, theirs.tokens)
    np.testing.assert_array_equal(ours.codes, theirs.codes)


@both
def test_measured_for_real(framework: str, small: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """With nothing pretended but the memory: some number from one on, and every slot of it steps."""
    monkeypatch.setattr(engines, "free_bytes", lambda backend: 5 * backend.report.slot_bytes)
    backend = load(framework, small, slots_for(1))
    streams = engines.fit_streams(backend, slots_for)
    assert 1 <= streams <= 4
    rows = backend.slots
    output = backend.step(np.zeros((rows, 1_920), np.float32), np.arange(rows), np.ones(rows, bool))
    assert output.text_token.shape == (rows,)
