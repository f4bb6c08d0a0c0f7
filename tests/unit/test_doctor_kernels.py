"""What `moshi-stt doctor` says of the kernels."""

from pathlib import Path

import pytest

from moshi_stt.cli import doctor


def test_a_missing_c_compiler_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor, "version_of", lambda name: "3.6.0")
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    (finding,) = doctor.kernels()
    assert (finding.state, finding.what) == ("note", "GPU kernels")
    assert "C compiler" in finding.text
    assert "slower" in finding.text
    assert "gcc" in finding.remedy
    compiler = tmp_path / "gcc"
    compiler.write_text("#!/bin/sh\n")
    compiler.chmod(0o755)
    (finding,) = doctor.kernels()
    assert (finding.state, finding.text) == ("ok", f"Triton builds them with {compiler}")


def test_a_missing_triton_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "version_of", lambda name: None)
    (finding,) = doctor.kernels()
    assert finding.state == "note"
    assert "Triton is not installed" in finding.text
