"""The SentencePiece wrapper: what it decodes, and what it says of files that are none."""

import sys
from pathlib import Path

import pytest

from moshi_stt.errors import CheckpointError
from moshi_stt.text.tokenizer import TextTokenizer


@pytest.fixture
def tiny(shared: Path) -> Path:
    pytest.importorskip("sentencepiece", reason="sentencepiece comes with the model extras")
    return shared / "goldens" / "tokenizer-tiny.model"


def test_decodes_a_word_without_a_leading_space(tiny: Path) -> None:
    tokenizer = TextTokenizer(tiny)
    assert tokenizer.pieces == 64
    assert tokenizer.decode([30, 21, 48]) == "ru daif"


def test_the_vocabulary_must_be_the_models(tiny: Path) -> None:
    tokenizer = TextTokenizer(tiny)
    tokenizer.check(64)
    with pytest.raises(CheckpointError, match=r"64 pieces and the model has text_out_vocab_size = 8000"):
        tokenizer.check(8000)


def test_no_file(tmp_path: Path) -> None:
    pytest.importorskip("sentencepiece", reason="sentencepiece comes with the model extras")
    with pytest.raises(CheckpointError, match="no text tokenizer at"):
        TextTokenizer(tmp_path / "none.model")


@pytest.mark.parametrize("content", [b"", b"<html>not found</html>", b"\x00" * 64])
def test_something_else(tmp_path: Path, content: bytes) -> None:
    pytest.importorskip("sentencepiece", reason="sentencepiece comes with the model extras")
    path = tmp_path / "tokenizer.model"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="not a readable SentencePiece model"):
        TextTokenizer(path)


def test_cut_short(tmp_path: Path, tiny: Path) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(tiny.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="not a readable SentencePiece model"):
        TextTokenizer(path)


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(CheckpointError, match=r"scripts/install\.sh --with torch"):
        TextTokenizer(tmp_path / "any.model")
