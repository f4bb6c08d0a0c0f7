"""Which weights are advised for which machine."""

import pytest

from moshi_stt.cli import advise, main
from moshi_stt.models import estimate


@pytest.mark.parametrize(
    ("int8_ms", "int4_ms", "expected"), [(40, 30, "int8"), (60, 45, "int8"), (70, 50, "int4"), (150, 90, "no")]
)
def test_the_most_exact_weights_that_fit(
    int8_ms: int, int4_ms: int, expected: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(advise, "gpu_bytes", lambda: 0)
    monkeypatch.setattr("moshi_stt.engines.on_apple_silicon", lambda: False)
    monkeypatch.setattr(estimate, "step_seconds", lambda quantize: {"int8": int8_ms, "int4": int4_ms}[quantize] / 1000)
    assert main(["advise", "--plain"]) == (1 if expected == "no" else 0)
    assert capsys.readouterr().out == f"{expected}\n"
    main(["advise"])
    told = capsys.readouterr().out
    assert told.startswith("stt-1b-en_fr: would not keep up" if expected == "no" else "stt-1b-en_fr: would keep up with")


def test_a_gpu_takes_the_weights_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(advise, "gpu_bytes", lambda: 24 << 30)
    assert advise.advise() == ("none", "would keep up on the GPU (24 GB)")


def test_the_step_is_measured_without_pytorch() -> None:
    seconds = {quantize: estimate.step_seconds(quantize) for quantize in ("int8", "int4")}
    assert all(0.0001 < each < 60 for each in seconds.values())
