"""The small model's recipe: what is trained is what is served, and what moshi-server computes of it is the same."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.support.checkpoints import module
from tests.support.stepping import drive, noise
from training.compose import HORIZONS, targets
from training.export import FULL, full_size, load_checkpoint, write_small
from training.model import Shape, SmallModel
from training.quantise import Codes
from training.score import greedy
from training.tokenizer import train_tokenizer

from moshi_stt.constants import FRAME_RATE
from moshi_stt.events import EndWord, Word
from moshi_stt.models.spec import LMSpec, MimiSpec, ModelSpec
from moshi_stt.models.torch_impl.build import load_backend
from moshi_stt.text.words import WordAssembler

SHAPE = Shape(
    channels=(4, 6, 8, 12, 16),
    width=128,
    encoder_layers=2,
    feedforward=96,
    codebooks=4,
    codebook_size=32,
    codebook_dim=16,
    dim=64,
    heads=2,
    layers=2,
    hidden=176,
    context=20,
    text_card=40,
)
FRAMES = 60
"""Three times round the language model's window; Mimi's needs 125 frames."""


def random_checkpoint(path: Path) -> tuple[SmallModel, Codes]:
    """A model of random weights, rounded as they are shipped, and its codes, saved as `finetune` saves them."""
    generator = torch.Generator().manual_seed(3)
    torch.manual_seed(3)
    model = SmallModel(SHAPE, word_classes=4)
    with torch.no_grad():
        for name, weight in model.named_weights():
            if name.endswith("bias"):
                weight.normal_(0, 0.05)
            half = name.startswith(("encoder", "downsample", "quantizer"))
            weight.copy_((weight.half() if half else weight.bfloat16()).float())
        model["text_linear.weight"].mul_(4)
        books = torch.randn(SHAPE.codebooks, SHAPE.codebook_size, SHAPE.codebook_dim, generator=generator).half().float()
        tables = torch.randn(SHAPE.codebooks, SHAPE.codebook_size, SHAPE.dim, generator=generator).bfloat16().float()
    codes = Codes(model["quantizer.rvq_rest.input_proj.weight"][:, :, 0].detach(), books, tables)
    weights = {name: weight.detach() for name, weight in model.named_weights()}
    torch.save({"weights": weights, "codes": {"books": books, "tables": tables}, "shape": SHAPE.as_dict()}, path)
    return model, codes


def spec(shape: Shape, mimi: Shape) -> ModelSpec:
    lm = LMSpec(
        dim=shape.dim,
        heads=shape.heads,
        layers=shape.layers,
        context=shape.context,
        max_period=100_000.0,
        text_card=shape.text_card,
        codebooks=shape.codebooks,
        audio_card=shape.codebook_size,
        extra_heads=shape.pause_heads,
    )
    encoder = MimiSpec(
        codebooks=shape.codebooks,
        codebook_size=mimi.codebook_size,
        codebook_dim=mimi.codebook_dim,
        dim=mimi.width,
        heads=mimi.encoder_heads,
        layers=mimi.encoder_layers,
        feedforward=mimi.feedforward,
        channels=mimi.channels,
    )
    return ModelSpec(lm, encoder, delay_frames=shape.delay_frames)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, SmallModel, Codes]:
    folder = tmp_path_factory.mktemp("small")
    train_tokenizer(folder / "tokenizer.model")
    model, codes = random_checkpoint(folder / "final.pt")
    shape, lm, encoder = load_checkpoint(folder / "final.pt")
    write_small(folder, shape, lm, encoder, folder / "tokenizer.model")
    return folder, model, codes


def test_trained_offline_is_served_streaming(exported: tuple[Path, SmallModel, Codes]) -> None:
    """Codes, tokens and pauses of whole sequences, as training computes them, equal those of the server's steps."""
    folder, model, codes = exported
    pcm = noise(FRAMES, seed=5)
    backend = load_backend(module(), folder / "model.safetensors", folder / "mimi.safetensors", spec(SHAPE, SHAPE), 2)
    served = drive(backend, pcm)
    backend.close()
    with torch.no_grad():
        found = codes.encode(model.latents(torch.from_numpy(pcm)[None]))
        inputs = model.shifted(codes.embed(found))
        tokens = greedy(model, inputs)
        text = torch.cat([torch.tensor([[SHAPE.text_card]]), tokens[:, :-1]], 1)
        logits, pause = model.language(inputs, text)
    np.testing.assert_array_equal(served.codes, found[0].numpy())
    np.testing.assert_array_equal(served.tokens, tokens[0].numpy())
    assert len(set(served.tokens.tolist())) > 5, "random weights said one thing all the time: nothing was compared"
    np.testing.assert_allclose(served.logits, logits[0].numpy(), atol=2e-3)  # the pad's share of each table is rounded
    np.testing.assert_allclose(served.pause, pause[0].softmax(-1)[..., 0].numpy(), atol=1e-3)


def test_full_size_encoder_has_the_same_codes(exported: tuple[Path, SmallModel, Codes], tmp_path: Path) -> None:
    """The encoder at Mimi's full size, as moshi-server loads it, gives the small encoder's codes."""
    from safetensors.numpy import load_file, save_file

    folder = exported[0]
    small = {name: array.astype(np.float32) for name, array in load_file(folder / "mimi.safetensors").items()}
    full = {name: np.ascontiguousarray(array, np.float32) for name, array in full_size(small, SHAPE).items()}
    assert len(full) == 318
    save_file(full, tmp_path / "mimi.safetensors")
    pcm = noise(12, seed=6)
    lm = folder / "model.safetensors"
    seen = []
    for file, shape in ((folder / "mimi.safetensors", SHAPE), (tmp_path / "mimi.safetensors", FULL)):
        backend = load_backend(module(), lm, file, spec(SHAPE, shape), 2)
        seen.append(drive(backend, pcm))
        backend.close()
    np.testing.assert_array_equal(seen[0].codes, seen[1].codes)
    np.testing.assert_array_equal(seen[0].tokens, seen[1].tokens)


def test_targets_tell_the_words_and_their_times() -> None:
    """The server's word assembler reads the training targets as the words that were said, to within half a frame."""
    said = [("turn", 0.31, 0.52), ("on", 0.52, 0.66), ("radio", 0.66, 1.20), ("yes", 2.05, 2.40), ("no", 2.42, 2.70)]
    pieces = {"turn": [10], "on": [11], "radio": [12, 13], "yes": [14], "no": [15]}
    texts = {tuple(ids): word for word, ids in pieces.items()}
    tokens, _ = targets(said, 60, pieces, delay=6)
    assembler = WordAssembler(lambda ids: texts[tuple(ids)], 6)
    events = [event for token in tokens.tolist() for event in assembler.push(token)]
    words = [event for event in events if isinstance(event, Word)]
    ends = [event for event in events if isinstance(event, EndWord)]
    assert [word.text for word in words] == [text for text, _, _ in said]
    for word, end, (_, start, stop) in zip(words, ends, said, strict=True):
        assert abs(word.start_time - start) <= 1.01 / FRAME_RATE
        assert abs(end.stop_time - stop) <= 1.01 / FRAME_RATE


def test_pause_targets_look_ahead() -> None:
    """A head's target at a position: whether nobody speaks between the moment that the position tells of and its horizon."""
    _, pauses = targets([("yes", 1.0, 1.5), ("no", 2.6, 3.0)], 75, {"yes": [4], "no": [5]}, delay=6)
    for position in range(75):
        moment = (position + 1 - 6) / FRAME_RATE
        for head, horizon in enumerate(HORIZONS):
            speaks = any(moment < end and moment + horizon > start for start, end in ((1.0, 1.5), (2.6, 3.0)))
            assert pauses[position, head] == (not speaks)


def test_shapes_that_cannot_be_exported_are_not_made() -> None:
    """Widths repeat to Mimi's 512, heads are of 64: what `full_size` relies on holds of the shape that ships."""
    shape = Shape()
    assert FULL.width % shape.width == 0
    assert shape.width == 64 * shape.encoder_heads
    assert all(small <= full for small, full in zip(shape.channels, FULL.channels, strict=True))
    assert dataclasses.replace(shape).as_dict() == shape.as_dict()
