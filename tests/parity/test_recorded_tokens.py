"""What the model was fed at each step by moshi-server itself, from its own token logs: `tokens.npz`, equal in every place.

Row 0 is pads and the start token; row n + 1 holds frame n's codes and the token produced at step n. Batched moshi-server starts
the downsampling from zeros (contract F13), hence `zero_start`.
"""

import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tests.support.checkpoints import module, shared_checkpoint
from tests.support.stepping import Outputs, drive

from moshi_stt.models.spec import MimiSpec, ModelSpec, lm_spec_from_json
from moshi_stt.models.torch_impl.build import load_backend


def run(checkpoint: Path, pcm: NDArray[np.float32], *, zero_start: bool) -> Outputs:
    lm = lm_spec_from_json(json.loads((checkpoint / "config.json").read_text()))
    spec = ModelSpec(lm, MimiSpec(codebooks=lm.codebooks), delay_frames=6)
    files = checkpoint / "model.safetensors", checkpoint / "mimi.safetensors"
    backend = load_backend(module(), *files, spec, 2, zero_start=zero_start)
    output = drive(backend, pcm)
    backend.close()
    return output


def check(name: str, checkpoint: Path, shared: Path, speech: NDArray[np.float32], *, zero_start: bool) -> Outputs:
    recorded = np.load(shared / "goldens/recorded/tokens.npz")
    audio, text = recorded[f"{name}_audio_in"], recorded[f"{name}_text_in"]
    silence = np.zeros(len(text) * 1_920 - len(speech), np.float32)
    ours = run(checkpoint, np.concatenate([speech, silence]), zero_start=zero_start)
    np.testing.assert_array_equal(ours.codes[:-1], audio[1:])
    np.testing.assert_array_equal(ours.tokens[:-1], text[1:])
    return ours


def test_unbatched(tiny: Path, shared: Path, speech: NDArray[np.float32]) -> None:
    check("tiny_asr", tiny, shared, speech, zero_start=False)


def test_batched(tiny: Path, shared: Path, speech: NDArray[np.float32]) -> None:
    """With the zero start, every place; the default start differs from it in the codes of frame 0 alone."""
    zero = check("tiny_batched", tiny, shared, speech, zero_start=True)
    ours = run(tiny, speech[: 10 * 1_920], zero_start=False)
    differing = np.flatnonzero((ours.codes != zero.codes[:10]).any(axis=1))
    assert differing.tolist() == [0]


def test_1b_shape(shared: Path, speech: NDArray[np.float32]) -> None:
    """The 1B shape, 157 steps. Only where its checkpoint (2.4 GB) is ready."""
    check("1b_batched", shared_checkpoint("1b", shared), shared, speech, zero_start=True)
