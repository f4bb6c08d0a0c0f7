"""What the model was fed at each step by moshi-server itself, from its own token logs: `tokens.npz`, equal in every place.

Row 0 is pads and the start token; row n + 1 holds frame n's codes and the token produced at step n. Batched moshi-server starts
the downsampling from zeros (contract F13), hence `zero_start`.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from tests.support.checkpoints import shared_checkpoint
from tests.support.frameworks import FRAMEWORKS, loader
from tests.support.stepping import Outputs, drive

from moshi_stt.models.spec import MimiSpec, ModelSpec
from moshi_stt.models.spec_tables import lm_spec_from_json

both = pytest.mark.parametrize("framework", FRAMEWORKS)


def run(framework: str, checkpoint: Path, pcm: NDArray[np.float32], *, zero_start: bool) -> Outputs:
    lm = lm_spec_from_json(json.loads((checkpoint / "config.json").read_text()))
    spec = ModelSpec(lm, MimiSpec(codebooks=lm.codebooks), delay_frames=6)
    files = checkpoint / "model.safetensors", checkpoint / "mimi.safetensors"
    backend = loader(framework)(*files, spec, 2, zero_start=zero_start)
    output = drive(backend, pcm)
    backend.close()
    return output


def check(
    framework: str, name: str, checkpoint: Path, shared: Path, speech: NDArray[np.float32], *, zero_start: bool
) -> Outputs:
    with np.load(shared / "goldens/recorded/tokens.npz") as recorded:
        audio, text = recorded[f"{name}_audio_in"], recorded[f"{name}_text_in"]
    silence = np.zeros(len(text) * 1_920 - len(speech), np.float32)
    ours = run(framework, checkpoint, np.concatenate([speech, silence]), zero_start=zero_start)
    np.testing.assert_array_equal(ours.codes[:-1], audio[1:])
    np.testing.assert_array_equal(ours.tokens[:-1], text[1:])
    return ours


@both
def test_unbatched(framework: str, tiny: Path, shared: Path, speech: NDArray[np.float32]) -> None:
    check(framework, "tiny_asr", tiny, shared, speech, zero_start=False)


@both
def test_batched(framework: str, tiny: Path, shared: Path, speech: NDArray[np.float32]) -> None:
    """With the zero start, every place; the default start differs from it in the codes of frame 0 alone."""
    zero = check(framework, "tiny_batched", tiny, shared, speech, zero_start=True)
    ours = run(framework, tiny, speech[: 10 * 1_920], zero_start=False)
    differing = np.flatnonzero((ours.codes != zero.codes[:10]).any(axis=1))
    assert differing.tolist() == [0]


@both
def test_1b_shape(framework: str, shared: Path, speech: NDArray[np.float32]) -> None:
    """The 1B shape, 157 steps. Only where its checkpoint (2.4 GB) is ready."""
    check(framework, "1b_batched", shared_checkpoint("1b", shared), shared, speech, zero_start=True)
