"""Checkpoints to test models with: small ones made here from the name table, and the shared ones where they can be had.

Random weights say nothing about accuracy; they are for parity, format and speed.
"""

import hashlib
import math
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moshi_stt.config import EngineConfig, KyutaiModule
from moshi_stt.models.spec import LMSpec, MimiSpec, ModelSpec
from moshi_stt.models.tensors import write_tensors
from moshi_stt.models.weights import Param, lm_table, mimi_table

Tensors = dict[str, NDArray[np.float32]]

HIDDEN = 40
"""Of the small model's gate."""


@dataclass(frozen=True)
class Checkpoint:
    """Files of one model, and what they are."""

    folder: Path
    spec: ModelSpec

    @property
    def lm_file(self) -> Path:
        return self.folder / "model.safetensors"

    @property
    def mimi_file(self) -> Path:
        return self.folder / "mimi.safetensors"


def small_spec(**lm: int | float) -> ModelSpec:
    """A model of under a million numbers that has everything the real ones have, its windows short enough to overflow soon."""
    mimi = MimiSpec(
        codebooks=5,
        codebook_size=64,
        codebook_dim=16,
        dim=32,
        heads=2,
        layers=2,
        feedforward=64,
        context=20,
        channels=(4, 8, 16, 24, 32),
    )
    fields: dict[str, int | float] = {"dim": 48, "heads": 2, "layers": 3, "context": 13, "text_card": 40, "extra_heads": 4} | lm
    spec = LMSpec(max_period=10_000.0, codebooks=mimi.codebooks, audio_card=mimi.codebook_size, **fields)  # type: ignore[arg-type]
    return ModelSpec(spec, mimi, delay_frames=6)


def module(**fields: object) -> KyutaiModule:
    """A configured module; `engine` fields may be given as `engine_NAME`."""
    engine = {key.removeprefix("engine_"): fields.pop(key) for key in list(fields) if key.startswith("engine_")}
    base: dict[str, object] = {
        "name": "asr",
        "path": "/api/asr-streaming",
        "type": "BatchedAsr",
        "batch_size": 4,
        "lm_model_file": "model.safetensors",
        "text_tokenizer_file": "tokenizer.model",
        "audio_tokenizer_file": "mimi.safetensors",
        "asr_delay_in_tokens": 6,
        "model": None,
        "engine": EngineConfig(**{"device": "cpu"} | engine),  # type: ignore[arg-type]
    }
    return KyutaiModule(**(base | fields))  # type: ignore[arg-type]


def small_tensors(spec: ModelSpec, seed: int = 0, hidden: int = HIDDEN) -> tuple[Tensors, Tensors]:
    """Random language model and Mimi tensors in the published naming."""
    rng = np.random.default_rng(seed)
    lm = {param.name: _random(param, rng) for param in lm_table(spec.lm, hidden)}
    lm["text_linear.weight"] *= 3  # a clear winner among the tokens at most steps
    return lm, {param.name: _random(param, rng) for param in mimi_table(spec.mimi)}


def _random(param: Param, rng: np.random.Generator) -> NDArray[np.float32]:
    name, shape = param.name, param.shape
    if "norm" in name and not name.endswith("bias"):
        values = rng.uniform(0.9, 1.1, shape)
    elif "layer_scale" in name:
        values = rng.uniform(0.2, 0.4, shape)
    elif name.endswith("cluster_usage"):
        values = rng.uniform(0.5, 1.5, shape)
    elif name.endswith("bias"):
        values = rng.uniform(-0.05, 0.05, shape)
    elif name.endswith("embedding_sum") or len(shape) < 2:
        values = rng.uniform(-0.6, 0.6, shape)
    else:
        gain = 4.0 if name.endswith("input_proj.weight") else 1.6 if name.startswith("encoder.model") else 1.0
        fan_in = 4 if "emb" in name else math.prod(shape[1:])
        values = rng.uniform(-1, 1, shape) * gain * math.sqrt(3 / fan_in)
    return values.astype(np.float32)


def save(folder: Path, spec: ModelSpec, lm: Tensors, mimi: Tensors) -> Checkpoint:
    """Write both files."""
    for name, tensors in (("model", lm), ("mimi", mimi)):
        shapes = {key: ("I32" if values.dtype == np.int32 else "F32", values.shape) for key, values in tensors.items()}
        write_tensors(folder / f"{name}.safetensors", shapes, tensors.items(), {})
    return Checkpoint(folder, spec)


def shared_checkpoint(name: str, shared: Path) -> Path:
    """Folder of `shared/goldens/make_checkpoint.py`'s checkpoint `tiny` or `1b`, whole; skips where it cannot be had.

    `MOSHI_STT_CHECKPOINTS` names a folder that holds ready ones. `tiny` is otherwise made once, in a cache (415 MB).
    """
    import pytest

    ready = os.environ.get("MOSHI_STT_CHECKPOINTS")
    if ready and (Path(ready) / name / "config.json").is_file():
        return Path(ready) / name
    if name != "tiny":
        pytest.skip(f"no checkpoint {name}: set MOSHI_STT_CHECKPOINTS to a folder with one of make_checkpoint.py")
    script = shared / "goldens" / "make_checkpoint.py"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moshi-stt-tests"
    folder = cache / f"{name}-{hashlib.sha256(script.read_bytes()).hexdigest()[:12]}"
    if not (folder / "config.json").is_file():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            made = Path(scratch) / name
            subprocess.run([sys.executable, str(script), name, str(made)], check=True, capture_output=True)
            toml = made / "moshi-server.toml"  # names its files by their whole path
            toml.write_text(toml.read_text().replace(str(made.resolve()), str(folder.resolve())))
            if not (folder / "config.json").is_file():
                made.rename(folder)
    return folder
