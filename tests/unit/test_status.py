"""`moshi-stt status` and `doctor`: how what they find is read and told."""

import argparse
import importlib.metadata
import os
import shutil
import socket
import subprocess
import sys

import pytest

from moshi_stt.cli import doctor, status
from moshi_stt.cli.doctor import Finding
from moshi_stt.errors import MoshiSttError
from moshi_stt.install import install_command

METRICS = """\
# HELP asr_connect Number of connections to the asr.
# TYPE asr_connect counter
asr_connect{handler="all"} 3
asr_model_step_duration_bucket{le="0.02"} 1
asr_model_step_duration_sum 0.5
asr_model_step_duration_count 4
moshi_stt_errors{kind="stream"} 1
moshi_stt_errors{kind="protocol"} 2
"""


def test_metrics_are_summed_over_their_labels() -> None:
    sums = status.parse_metrics(METRICS)
    assert (sums["asr_connect"], sums["moshi_stt_errors"]) == (3.0, 3.0)
    assert sums["asr_model_step_duration_sum"] == 0.5


def test_a_report_for_a_person() -> None:
    report = {
        "url": "http://x",
        "ready": False,
        "healthy": True,
        "why": "the model is loading",
        "modules": [{"path": "/a", "type": "batched_asr", "lm": "m", "used_slots": "1", "total_slots": "4"}],
        "connections": 3,
        "mean_step_ms": 125.0,
        "process": {"pid": 7, "memory_mb": 250, "cpu_percent": "1.5", "uptime": "01:02"},
    }
    assert status.lines(report) == [
        "http://x: alive, not ready (the model is loading)",
        "  /a: batched_asr, m, 1 of 4 streams",
        "  connections since start: 3, mean step 125.0 ms",
        "  process 7: 250 MB, 1.5 % CPU, up 01:02 (days-hours:minutes:seconds)",
    ]


def test_nobody_there() -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{s.getsockname()[1]}"
    with pytest.raises(MoshiSttError, match=f"no server answers at {url}: .* Start one: moshi-stt worker"):
        status.get(url)


def test_waiting_ends_when_the_process_has_ended() -> None:
    """The time is not waited out: a server that cannot start is told at once."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    assert not status.wait_until_ready("http://127.0.0.1:1", 3600, ended.pid)


def test_processes() -> None:
    assert status.alive(os.getpid())
    assert int(status.ps(os.getpid(), "rss")) > 1_000
    sleeping = subprocess.Popen([sys.executable, "-c", ""], stdout=subprocess.DEVNULL)
    os.waitid(os.P_PID, sleeping.pid, os.WEXITED | os.WNOWAIT)  # ended and not yet fetched: a zombie
    assert not status.alive(sleeping.pid)
    sleeping.wait()
    assert status.ps(sleeping.pid, "rss") == ""


# ---- doctor ----------------------------------------------------------------------------------------------------------


def test_the_doctor_finds_this_machine_well(capsys: pytest.CaptureFixture[str]) -> None:
    """The tests run where the base install is, so nothing of it is missing."""
    assert doctor.run(argparse.Namespace(port=0)) == 0
    out = capsys.readouterr().out
    for what in ("Python", "packages", "embedded English model", "weights of stt-1b-en_fr", "microphone", "port 0"):
        assert f" {what}: " in out
    assert "MISSING" not in out


def test_the_doctor_names_what_is_missing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    version = importlib.metadata.version

    def without_soxr(name: str) -> str:
        if name == "soxr":
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(importlib.metadata, "version", without_soxr)
    monkeypatch.setattr("moshi_stt.engines.missing_packages", lambda names: ["onnxruntime"])
    assert doctor.run(argparse.Namespace(port=0)) == 1
    out = capsys.readouterr().out
    assert f"MISSING packages: not installed: soxr\n        {install_command()}\n" in out
    assert f"MISSING embedded English model: not installed: onnxruntime\n        {install_command()}" in out


def test_the_packages_of_an_extra() -> None:
    assert "aiohttp" in set(doctor.distributions(""))
    assert set(doctor.distributions("mic")) == {"sounddevice"}
    assert "torch" in set(doctor.distributions("torch"))


def test_a_gpu_that_its_driver_does_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(shutil, "which", lambda name: sys.executable)  # `python --query-gpu=…` fails
    (finding,) = doctor.gpu()
    assert finding.what == "GPU"
    assert finding.text.startswith("nvidia-smi fails: ")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert list(doctor.gpu()) == [Finding("note", "GPU", "no NVIDIA driver here; the models run on the CPU")]
