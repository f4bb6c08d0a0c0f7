"""`moshi-stt validate`: what it says of good files, absent ones, and ones that do not fit. Weights are headers over holes."""

import json
import math
import struct
from pathlib import Path

import pytest

from moshi_stt.cli import main
from moshi_stt.config import KyutaiModule
from moshi_stt.config_load import load_config, shipped_text
from moshi_stt.models.spec_tables import spec_from_module
from moshi_stt.models.weights import lm_table, mimi_table

HIDDEN = 32


def write_header(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """A safetensors file of zeros: a header, and a hole in the disk for the numbers."""
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a configuration of a small model and all its files."""
    monkeypatch.setenv("WEIGHTS", str(tmp_path))
    text = shipped_text("stt-1b-en_fr").replace("hf://kyutai/stt-1b-en_fr-candle", "$WEIGHTS")
    for old, new in (
        ("d_model = 2048", "d_model = 16"),
        ("num_heads = 16", "num_heads = 2"),
        ("num_layers = 16", "num_layers = 2"),
    ):
        text = text.replace(old, new)
    config = tmp_path / "small.toml"
    config.write_text(text)
    (module,) = load_config(str(config)).config.modules
    assert isinstance(module, KyutaiModule)
    spec = spec_from_module(module)
    write_header(tmp_path / "model.safetensors", {p.name: p.shape for p in lm_table(spec.lm, HIDDEN)})
    write_header(Path(module.audio_tokenizer_file), {p.name: p.shape for p in mimi_table(spec.mimi)})
    return tmp_path


def validate(folder: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    status = main(["validate", str(folder / "small.toml")])
    return status, *capsys.readouterr()


def test_the_shipped_embedded_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", "embedded"]) == 0
    assert capsys.readouterr() == (
        "embedded (shipped): [modules.asr] /api/asr-streaming, as many streams as keep up: comes with the package\n"
        "embedded (shipped): loaded successfully\n",
        "",
    )


def test_weights_that_are_not_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    assert main(["validate", "embedded", "stt-2.6b-en"]) == 1
    out, error = capsys.readouterr()
    assert "embedded (shipped): loaded successfully\n" in out
    assert error == (
        "Error: stt-2.6b-en (shipped): [modules.asr] not on this machine:\n"
        "  lm_model_file = hf://kyutai/stt-2.6b-en-candle/model.safetensors\n"
        "  audio_tokenizer_file = hf://kyutai/stt-2.6b-en-candle/mimi-pytorch-e351c8d8@125.safetensors\n"
        "  text_tokenizer_file = hf://kyutai/stt-2.6b-en-candle/tokenizer_en_audio_4000.model\n"
        "  Fetch them: moshi-stt download stt-2.6b-en\n"
    )


def test_a_path_that_is_not_there(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, error = validate(folder, capsys)
    assert status == 1
    assert error == (
        f"Error: {folder}/small.toml: [modules.asr] not on this machine:\n"
        f"  text_tokenizer_file = {folder}/tokenizer_en_fr_audio_8000.model\n"
        "  Check the paths.\n"
    )


def test_files_that_fit(folder: Path, shared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = (shared / "goldens" / "tokenizer-1b.model").read_bytes()
    (folder / "tokenizer_en_fr_audio_8000.model").write_bytes(tokenizer)
    status, out, error = validate(folder, capsys)
    assert (status, error) == (0, "")
    assert "64 streams: lm_model_file, audio_tokenizer_file, text_tokenizer_file\n" in out
    assert out.endswith("small.toml: loaded successfully\n")


def test_a_vocabulary_of_another_model(folder: Path, shared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sentencepiece", reason="sentencepiece comes with the model extras")
    tokenizer = (shared / "goldens" / "tokenizer-tiny.model").read_bytes()
    (folder / "tokenizer_en_fr_audio_8000.model").write_bytes(tokenizer)
    status, _, error = validate(folder, capsys)
    assert status == 1
    assert "64 pieces" in error
    assert "8000" in error


def test_weights_of_another_shape(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = folder / "small.toml"
    config.write_text(config.read_text().replace("d_model = 16", "d_model = 32"))
    status, _, error = validate(folder, capsys)
    assert status == 1
    assert str(folder / "model.safetensors") in error


def test_warnings_go_to_stderr(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = folder / "small.toml"
    config.write_text("colour = 1\n" + config.read_text())
    _, _, error = validate(folder, capsys)
    assert error.startswith(f"Warning: {config}: colour: unknown key, ignored\nError: ")
