"""Fixtures of the model tests. Without PyTorch only those are collected that can do without it."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

if importlib.util.find_spec("torch") is None or importlib.util.find_spec("safetensors") is None:
    shared_by_both = ("test_independence.py", "test_recorded_tokens.py")
    collect_ignore = [
        path.name
        for path in Path(__file__).parent.glob("test_*.py")
        if path.name not in shared_by_both and not path.name.startswith("test_mlx")
    ]


@pytest.fixture(scope="session")
def speech(shared: Path) -> NDArray[np.float32]:
    """The recorded sessions' input, cut to whole frames: float32 (137 * 1920,)."""
    import wave

    with wave.open(str(shared / "goldens/recorded/speech_24k.wav")) as file:
        pcm = np.frombuffer(file.readframes(file.getnframes()), "<i2")
    return pcm[: len(pcm) // 1_920 * 1_920].astype(np.float32) / 32_768
