"""Against Kyutai's own `moshi` package, stepped twice on the first frame (contract section 7.3), on a shared checkpoint.

It runs in a process of its own: this interpreter's, where `moshi` is installed, or the one that
MOSHI_STT_REFERENCE_PYTHON names.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from tests.support.checkpoints import module
from tests.support.stepping import drive

from moshi_stt.models.spec import MimiSpec, ModelSpec
from moshi_stt.models.spec_tables import lm_spec_from_json
from moshi_stt.models.torch_impl.build import load_backend

FRAMES = 320
"""Past Mimi's ring of 250 positions (125 frames) and six times round the language model's of 50."""


@pytest.fixture(scope="module")
def reference_python() -> str:
    if named := os.environ.get("MOSHI_STT_REFERENCE_PYTHON"):
        return named
    if importlib.util.find_spec("moshi") is None:
        pytest.skip("no reference: install `moshi` or name an interpreter that has it in MOSHI_STT_REFERENCE_PYTHON")
    return sys.executable


def test_320_frames(reference_python: str, tiny: Path, speech: NDArray[np.float32], tmp_path: Path) -> None:
    """Codes and tokens equal in every place, logits and pauses within 1e-4."""
    pcm = np.concatenate([speech, speech[::-1] / 2, speech * 0.7, np.zeros(20 * 1_920, np.float32)])[-FRAMES * 1_920 :]
    np.save(tmp_path / "pcm.npy", pcm)
    oracle = Path(__file__).with_name("oracle_moshi.py")
    command = [reference_python, str(oracle), str(tiny), str(tmp_path / "pcm.npy"), str(tmp_path / "out.npz"), "float32"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-2_000:]
    expected = np.load(tmp_path / "out.npz")
    lm = lm_spec_from_json(json.loads((tiny / "config.json").read_text()))
    spec = ModelSpec(lm, MimiSpec(codebooks=lm.codebooks), delay_frames=6)
    backend = load_backend(module(), tiny / "model.safetensors", tiny / "mimi.safetensors", spec, 2)
    ours = drive(backend, pcm)
    backend.close()
    np.testing.assert_array_equal(ours.codes, expected["codes"])
    np.testing.assert_array_equal(ours.tokens, expected["tokens"])
    np.testing.assert_allclose(ours.logits, expected["logits"], atol=1e-4)
    np.testing.assert_allclose(ours.pause, expected["pause"], atol=1e-4)
