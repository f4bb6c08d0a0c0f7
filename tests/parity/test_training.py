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
from training import compose, emulate, encode, export, finetune, foresight, language, planning, report, train
from training.clips import read_shards, write_shard
from training.model import Shape
from training.quantise import Quantizer, fit_books
from training.synthesise import espeak_clips
from training.tokenizer import pieces_of, train_tokenizer
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
    common += ["--long", "2", "--planners", "2"]
    schedule = ["--steps", str(STEPS), "--show", "1", "--quantize-from", "0.5"]
    train.main([str(tmp_path / "run"), *common, *schedule])
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("step") and "token" in line]
    losses = [float(line[line.index("token") + 1]) for line in lines]
    assert len(losses) == STEPS
    assert losses[-1] < losses[0]
    resumed = ["--steps", "1", "--show", "1", "--resume", str(tmp_path / "run" / "last.pt"), "--until", "1.01"]
    train.main([str(tmp_path / "run"), *common, *resumed])
    assert f"resumed at step {STEPS}, 100% done" in capsys.readouterr().out
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


def test_plans_are_the_same_again_and_of_the_sizes_in_turn(clips: Path, tmp_path: Path) -> None:
    train_tokenizer(tmp_path / "tokenizer.model")
    bank = compose.Bank(train.load_clips(clips), torch.device("cpu"))
    pieces = pieces_of(tmp_path / "tokenizer.model")

    def some() -> list[compose.Plan]:
        return list(islice(planning.plans(bank, pieces, 6, compose.TRAINING, [(2, 50), (1, 100)], 3, 2), 5))

    first, again = some(), some()
    assert [plan.tokens.shape for plan in first] == [(2, 50), (1, 100), (2, 50), (1, 100), (2, 50)]
    for one, other in zip(first, again, strict=True):
        assert one.pieces == other.pieces
        np.testing.assert_array_equal(one.tokens, other.tokens)
        np.testing.assert_array_equal(one.pauses, other.pauses)
    assert first[0].pieces != first[2].pieces


def test_babble_is_heard_and_not_to_be_written(clips: Path, tmp_path: Path) -> None:
    """Rows of nothing else, and what is between turns of somebody who speaks."""
    train_tokenizer(tmp_path / "tokenizer.model")
    bank = compose.Bank(train.load_clips(clips), torch.device("cpu"))
    pieces = pieces_of(tmp_path / "tokenizer.model")
    mix = compose.Mix(empty=0.0, babble=1.0, turns=0.5)
    plan = compose.Planner(bank, pieces, 6, mix, 1).plan(2, 200)
    sound = compose.render(plan, bank, 2, 200, torch.Generator().manual_seed(1), change=False)
    assert (sound.square().mean(1) > 1e-5).all()
    assert (plan.tokens == compose.PAD).all()
    assert plan.pauses.all()
    mix = compose.Mix(empty=0.0, babble=1e-9, turns=1.0, digits=0.0001, french=0.5)
    plan = compose.Planner(bank, pieces, 6, mix, 1).plan(4, 1_000)
    said = sum(len(pieces[text]) for row in plan.said for text, _, _ in row)
    assert abs(int(((plan.tokens != compose.PAD) & (plan.tokens != compose.BOUNDARY)).sum()) - said) <= 8
    assert len(plan.pieces) > sum(map(len, plan.said))  # a piece of what is said has a word at least


def test_clips_of_one_kind_alone_fill_every_row(clips: Path, tmp_path: Path) -> None:
    """Now and then another kind is drawn, of which there may be none."""
    train_tokenizer(tmp_path / "tokenizer.model")
    french = [clip for clip in train.load_clips(clips) if clip.language == "fr"]
    bank = compose.Bank(french, torch.device("cpu"))
    plan = compose.Planner(bank, pieces_of(tmp_path / "tokenizer.model"), 6, compose.Mix(digits=0.5, french=0.1), 1).plan(
        4, 200
    )
    assert sum(map(len, plan.said)) > 10


def test_formants_move_and_pitch_stays() -> None:
    """A vowel at 120 Hz: nothing comes between its harmonics, and the second formant is elsewhere in every second row."""
    times = torch.arange(24_000 * 2) / 24_000
    harmonics = torch.arange(1, 95)[:, None] * 120.0
    loud = 0.01 + sum((1 + ((harmonics - at) / width) ** 2) ** -0.5 for at, width in ((500, 90), (1_500, 120), (2_600, 160)))
    vowel = (0.02 * loud * torch.sin(2 * torch.pi * harmonics * times)).sum(0)
    rows = torch.stack([vowel] * 16 + [torch.zeros_like(vowel)] * 2)
    moved = compose.other_timbres(rows, torch.Generator().manual_seed(4))
    assert torch.equal(moved[16:], rows[16:])
    spectra = torch.fft.rfft(moved[:16, 12_000:36_000]).abs()  # 1 Hz a bin
    power = spectra[:, 1_080:2_040:120].square()
    second = (power * torch.arange(1_080, 2_040, 120)).sum(1) / power.sum(1)
    other = [row for row in range(16) if not torch.equal(moved[row], rows[row])]
    assert 6 <= len(other) <= 9
    assert float(second[other].max() - second[other].min()) > 80
    spectra[:, ::120] = 0
    assert float(spectra.max()) < 0.2 * float(torch.fft.rfft(vowel[12_000:36_000]).abs().max())


def test_a_listener_knows_what_was_said_until_now_and_nothing_more() -> None:
    """A word that is still to come changes no feature; silence and the kind of the last word are known."""
    said = [("turn", 1.0, 1.2), ("left", 1.2, 1.6), ("five", 3.0, 3.4)]
    whole, part = foresight.known(said, 60), foresight.known(said[:2], 60)
    now = (np.arange(60) + 1 - train.DELAY_FRAMES + foresight.HEARD_FRAMES) / 12.5
    before = now < 3.0
    np.testing.assert_array_equal(whole[before], part[before])
    assert (whole[~before] != part[~before]).any(1).all()
    between = (now > 1.6) & before
    np.testing.assert_allclose(whole[between, 0], now[between] - 1.6, atol=1e-5)
    kinds = [set(whole[some, 2:6].argmax(1)) for some in (now < 1.0, (now > 1.0) & (now < 1.2), between, now > 3.0)]
    assert kinds == [{3}, {1}, {2}, {0}]  # nothing yet; inside a phrase; its end; a digit


def test_a_listener_learns_from_the_silence_so_far() -> None:
    """Where every pause lasts one second or four, the first second says nothing of which, and what follows it says all."""
    rng = np.random.default_rng(1)
    silence = rng.uniform(0.0, 2.0, 20_000).astype(np.float32)
    long = np.where(silence > 1.0, True, rng.random(20_000) < 0.5)
    listener = foresight.Listener(silence[:, None], long[:, None])
    scores = listener.scores(np.array([[0.2], [0.8], [1.2], [1.8]], np.float32))[:, 0]
    assert scores[:2].max() + 2 < scores[2:].min()
    drawn = silence < 1.0
    assert abs(report.roc_area(listener.scores(silence[drawn, None])[:, 0], long[drawn]) - 0.5) < 0.05


def test_codebooks_follow_latents_that_move() -> None:
    generator = torch.Generator().manual_seed(1)
    centres = torch.randn(40, 8, generator=generator)

    def batch(shift: float) -> torch.Tensor:
        chosen = torch.randint(40, (4, 256), generator=generator)
        return centres[chosen] + shift + 0.02 * torch.randn(4, 256, 8, generator=generator)

    shape = Shape(codebooks=3, codebook_size=64, codebook_dim=8)
    quantizer = Quantizer(fit_books(batch(0.0).flatten(0, 1), shape, generator), keep=0.9)

    def off(shift: float) -> float:
        latents = batch(shift)
        return float((quantizer(latents) - latents).square().mean() / latents.var())

    assert off(0.0) < 0.01
    far = off(3.0)
    assert far > 0.1
    for _ in range(60):
        off(3.0)
    assert off(3.0) < min(0.01, far / 10)


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
