"""Who speaks another language than the model's is told so once, with the command that gets French."""

import asyncio
from pathlib import Path

import numpy as np
import pytest
from tests.support.level_speech import LevelRecogniser
from tests.support.media import encode
from tests.support.serving import serving

from moshi_stt.cli import main
from moshi_stt.constants import SAMPLE_RATE
from moshi_stt.engine.language import foreign_message
from moshi_stt.engine.segment import SegmentEngine
from moshi_stt.models import embedded

SPEECH = np.full(12 * SAMPLE_RATE, 0.001, np.float32)
"""The recogniser below takes it for speech and makes no word of it."""


class Puzzled(LevelRecogniser):
    """Hears speech everywhere."""

    languages = ("en",)

    def speech_probability(self, frame: np.ndarray, state: object) -> tuple[float, object]:  # type: ignore[override]
        return 1.0, state


def recording(folder: Path, name: str) -> str:
    path = folder / name
    path.write_bytes(encode(SPEECH, SAMPLE_RATE))
    return str(path)


def test_in_this_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(embedded, "load_embedded", lambda threads: Puzzled())
    assert main(["transcribe", recording(tmp_path, "a.wav"), recording(tmp_path, "b.wav")]) == 0
    err = capfd.readouterr().err
    assert err.count("does not sound like English") == 1
    assert "For French: moshi-stt transcribe --config stt-1b-en_fr" in err


async def test_by_a_server(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    engine = SegmentEngine(Puzzled, slots=2, threads=1)
    async with serving({"asr": engine}) as running:
        assert await asyncio.to_thread(main, ["transcribe", "--url", running.ws, recording(tmp_path, "a.wav")]) == 0
    assert capfd.readouterr().err.count("For French: moshi-stt worker --config stt-1b-en_fr") == 1


def test_the_message_knows_what_the_model_knows() -> None:
    assert foreign_message(("en",), "COMMAND") == (
        "this does not sound like English, and this model knows English only. For French: COMMAND"
    )
    assert foreign_message(("en", "fr")) == (
        "this does not sound like English or French, and this model knows English and French"
    )
