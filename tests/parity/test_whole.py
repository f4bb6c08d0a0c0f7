"""Streaming equals whole: frame by frame, with slots and rings, gives what the plain text of the contract gives at once."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tests.support import whole
from tests.support.checkpoints import Checkpoint, module
from tests.support.stepping import drive, noise

from moshi_stt.models.torch_impl.backend import TorchBackend
from moshi_stt.models.torch_impl.build import load_backend

FRAMES = 60
"""Past both rings: 13 positions of the language model's, 20 of Mimi's."""


def load(small: Checkpoint, **engine: object) -> TorchBackend:
    return load_backend(module(**engine), small.lm_file, small.mimi_file, small.spec, slots=4)


def params(path: object) -> dict[str, torch.Tensor]:
    return {name: tensor.double() for name, tensor in load_file(path).items()}


def test_streaming_equals_whole(small: Checkpoint) -> None:
    """Codes of every frame, logits and pauses of every step, both rings overflown several times."""
    pcm = noise(FRAMES, seed=1)
    ours = drive(load(small), pcm)
    spec = small.spec
    latents = whole.mimi_latents(params(small.mimi_file), spec.mimi, torch.from_numpy(pcm).double())
    codes, margins = whole.quantize(params(small.mimi_file), spec.mimi, latents)
    assert margins.min() > 1e-5, "this seed has a near tie, in which rounding decides"
    np.testing.assert_array_equal(ours.codes, codes.numpy())
    logits, pause = whole.lm_outputs(params(small.lm_file), spec.lm, codes, torch.from_numpy(ours.tokens))
    np.testing.assert_allclose(ours.logits, logits.numpy(), atol=1e-4)
    np.testing.assert_allclose(ours.pause, pause.numpy(), atol=1e-5)
    np.testing.assert_array_equal(ours.tokens, logits.argmax(-1).numpy())
    chosen = logits.log_softmax(-1)[torch.arange(FRAMES), torch.from_numpy(ours.tokens)]
    np.testing.assert_allclose(ours.logprob, chosen.numpy(), atol=1e-4)


@pytest.mark.parametrize("dtype", ["f64", "bf16", "f16"])
def test_other_precisions_follow(small: Checkpoint, dtype: str) -> None:
    """`dtype_override` changes the language model's precision and nothing else: same codes, logits as near as it allows."""
    pcm = noise(FRAMES, seed=1)
    spec = small.spec
    ours = drive(load(small, dtype_override=dtype), pcm)
    np.testing.assert_array_equal(ours.codes, drive(load(small), pcm).codes)
    logits, _ = whole.lm_outputs(params(small.lm_file), spec.lm, torch.from_numpy(ours.codes), torch.from_numpy(ours.tokens))
    tolerance = {"f64": 1e-5, "bf16": 0.5, "f16": 0.05}[dtype]
    assert np.abs(ours.logits - logits.numpy()).max() < tolerance
