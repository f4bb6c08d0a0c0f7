"""The recipe from end to end in about a minute, with espeak-ng's voices alone: from clips to files that the server loads."""

import random
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from tests.support.stepping import drive

pytest.importorskip("soundfile", reason="soundfile, which the recipe needs, is not installed")
pytest.importorskip("torch", reason="torch not installed")

import torch
from training import emulate, encode, export, finetune, language, report, train
from training.clips import read_shards, write_shard
from training.synthesise import espeak_clips
from training.tokenizer import train_tokenizer
from training.voices import espeak_library

from moshi_stt.config import KyutaiModule
from moshi_stt.config_load import parse_config
from moshi_stt.models.spec_tables import spec_from_module
from moshi_stt.models.torch_impl.build import load_backend

STEPS = 4

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hundred clips of some voices, one of them held out."""
    try:
        espeak_library()
    except OSError:
        pytest.skip("espeak-ng, whose voices the recipe needs, is not installed")
    folder = tmp_path_factory.mktemp("clips")
    write_shard(folder / "espeak" / "0000", list(islice(espeak_clips(random.Random(1), 0.02), 96)))
    return folder


def test_clips_survive_the_disk(clips: Path) -> None:
    found = list(read_shards(clips))
    assert len(found) == 96
    assert {clip.language for clip in found} == {"en", "fr"}
    for clip in found:
        assert " ".join(word.text for word in clip.words) == clip.text
        assert all(0 <= word.start <= word.end <= len(clip.samples) / 24_000 + 0.01 for word in clip.words)


def test_from_voices_to_a_model_that_is_served(clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train_tokenizer(tmp_path / "tokenizer.model")
    common = ["--clips", str(clips), "--tokenizer", str(tmp_path / "tokenizer.model"), "--rows", "2", "--frames", "50"]
    common += ["--test-rows", "1"]
    train.main([str(tmp_path / "run"), *common, "--steps", str(STEPS), "--show", "1"])
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("step") and "token" in line]
    losses = [float(line[line.index("token") + 1]) for line in lines]
    assert len(losses) == STEPS
    assert losses[-1] < losses[0]
    more = ["--steps", "2", "--sample-batches", "8"]
    finetune.main([str(tmp_path / "run" / "average.pt"), str(tmp_path / "final.pt"), *common, *more])
    pieces = ["--tokenizer", str(tmp_path / "tokenizer.model"), "--clips", str(clips)]
    stored = str(tmp_path / "codes")
    encode.main([str(tmp_path / "final.pt"), stored, *pieces, "--rows", "2", "--frames", "50", "--hours", "0.001"])
    taught = ["--codes", stored, "--rows", "2", "--test-rows", "1", "--steps", "3"]
    language.main([str(tmp_path / "final.pt"), str(tmp_path / "taught"), *taught, *pieces])
    assert "step 3" in capsys.readouterr().out
    final = str(tmp_path / "taught" / "final.pt")
    export.main([final, str(tmp_path / "out"), "--tokenizer", str(tmp_path / "tokenizer.model")])
    text = (tmp_path / "out" / "phrases.toml").read_text().replace("package:data/phrases", str(tmp_path / "out"))
    (module,) = parse_config(text, "phrases.toml").config.modules
    assert isinstance(module, KyutaiModule)
    files = Path(module.lm_model_file), Path(module.audio_tokenizer_file)
    backend = load_backend(module, *files, spec_from_module(module), 2)
    served = drive(backend, np.zeros(1_920 * 4, np.float32))
    backend.close()
    assert served.tokens.shape == (4,)
    assert np.isfinite(served.logits).all()


def test_a_table_of_the_card_is_replaced_and_nothing_else(tmp_path: Path) -> None:
    card = tmp_path / "card.md"
    card.write_text("# Card\n\n<!-- a -->\n\n| old | |\n|---|---|\n| 1 | 2 |\n\n## More\n\n<!-- b -->\n")
    report.write_card(card, "<!-- a -->", [("measured", ""), ("words", "5 %")])
    report.write_card(card, "<!-- b -->", [("", "x", "y"), ("int8", "1", "2")])
    tables = "<!-- a -->\n\n| measured |  |\n|---|---|\n| words | 5 % |\n\n## More\n\n<!-- b -->\n\n"
    assert card.read_text() == f"# Card\n\n{tables}|  | x | y |\n|---|---|---|\n| int8 | 1 | 2 |\n"
    with pytest.raises(SystemExit, match="no line"):
        report.write_card(card, "<!-- c -->", [("a",)])


@pytest.mark.parametrize("value", [1.0, -2.5, 3.14159, 1e-20, 65_504.0])
def test_tf32_has_ten_bits_of_mantissa(value: float) -> None:
    rounded = emulate.tf32(torch.tensor([value, -value]))
    assert rounded.view(torch.int32).bitwise_and(0x1FFF).tolist() == [0, 0]
    torch.testing.assert_close(rounded, torch.tensor([value, -value]), rtol=2**-11, atol=0)
