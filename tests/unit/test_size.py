"""`moshi-stt size`: streams, memory and cost are worked out from what was measured, and energy from the counters."""

import json
import os
from pathlib import Path

import pytest

from moshi_stt.cli import main, size
from moshi_stt.engine import segment
from moshi_stt.models import estimate


@pytest.fixture(autouse=True)
def two_cores(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine with two cores and no energy counter, on which nothing is measured for real."""
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(size, "usable_cores", lambda: 2)
    monkeypatch.setattr(size, "RAPL", tmp_path)
    monkeypatch.setattr(segment, "measure", lambda *_: 0.25)
    monkeypatch.setattr(estimate, "step_seconds", {"int8": 0.1, "int4": 0.02}.__getitem__)
    return tmp_path


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["size", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["cores"] == 2
    embedded, int8, int4 = printed["models"]
    assert (embedded["model"], embedded["streams"], embedded["core_seconds"], embedded["joules"]) == (
        "embedded",
        8,
        900.0,
        None,
    )
    assert embedded["bytes"] > 100e6, "the model is in memory"
    assert (int8["streams"], int8["core_seconds"]) == (0, 9_000.0)
    assert (int4["streams"], int4["core_seconds"]) == (4, 1_800.0)


def test_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["size"]) == 0
    out = capsys.readouterr().out
    assert "embedded" in out
    assert "900 s of a core" in out
    assert "none: too slow" in out
    assert "no counter" in out


def test_a_busy_machine_is_said(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for load, busy in ((0.4, False), (7.0, True)):
        monkeypatch.setattr("os.getloadavg", lambda load=load: (load, 0.0, 0.0))
        assert main(["size"]) == 0
        assert ("The machine was busy (load 7.0)" in capsys.readouterr().out) == busy


def test_a_configured_model_is_loaded_and_measured(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch", reason="runs a model of Kyutai's architecture: torch")
    pytest.importorskip("sentencepiece")
    monkeypatch.setattr(size, "STEPPING_SECONDS", 0.1)
    assert main(["size", "--config", "phrases", "--json"]) == 0
    (model,) = json.loads(capsys.readouterr().out)["models"]
    assert (model["model"], model["gpu_seconds"], model["joules"]) == ("phrases", None, None)
    assert model["core_seconds"] > 0
    assert model["bytes"] > 5e6, "the weights"
    assert " on cpu (" in model["note"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_the_power_of_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program, watts, told = tmp_path / "nvidia-smi", tmp_path / "watts", tmp_path / "told"
    os.mkfifo(told)
    program.write_text(f"#!/bin/sh\necho $(cat {watts})\necho > {told}\nexec sleep 600\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")

    def work() -> float:
        told.read_bytes()  # returns once the power has been told
        return 7.0

    watts.write_text("300.0")
    assert size.with_watts(work) == (300.0, 7.0)
    watts.write_text("[N/A]")
    assert size.with_watts(work) == (None, 7.0)
    program.unlink()
    assert size.with_energy(lambda: 7.0, nvidia=True) == (7.0, None)


def test_energy_is_what_the_idle_machine_does_not_take(two_cores: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(size, "IDLE_SECONDS", 0.01)
    counter = two_cores / "intel-rapl:0" / "energy_uj"
    counter.parent.mkdir()
    counter.write_text("1000000")

    def work() -> float:
        counter.write_text(str(int(counter.read_text()) + 5_000_000))
        return 7.0

    assert size.with_energy(work) == (7.0, 5.0)
    counter.write_text("no number")
    assert size.with_energy(lambda: 7.0) == (7.0, None)
