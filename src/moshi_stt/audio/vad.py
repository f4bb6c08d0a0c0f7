"""The small speech detector that comes with the package (Silero's, MIT), and how its kind of model is loaded."""

from collections.abc import Mapping
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from moshi_stt.data import VAD, data_file
from moshi_stt.errors import CheckpointError

VAD_RATE: Final = 16_000
"""Samples a second of what the detector hears (mono float32)."""


def one_thread_session(path: Path, settings: Mapping[str, str] | None = None) -> onnxruntime.InferenceSession:
    """A session that computes on the calling thread alone, so that the engine's thread pool bounds the cores in use.

    settings: onnxruntime's own for a session, by name. Raises CheckpointError.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.enable_mem_pattern = False
    options.enable_cpu_mem_arena = False  # lengths vary: an arena would keep the largest of each thread for ever
    for name, value in (settings or {}).items():
        options.add_session_config_entry(name, value)
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise CheckpointError(f"onnxruntime {onnxruntime.__version__} cannot load {path}: {error}") from error


class SileroState(NamedTuple):
    """hidden: float32 (2, 1, 128). context: float32 (64,), the end of the frame before."""

    hidden: NDArray[np.float32]
    context: NDArray[np.float32]


class SileroVad:
    """Silero's detector (MIT), 0.08 ms a frame. Thread-safe: the state is the caller's."""

    def __init__(self, path: Path) -> None:
        self._session = one_thread_session(path)
        self._rate = np.array(VAD_RATE, np.int64)

    def start(self) -> SileroState:
        return SileroState(np.zeros((2, 1, 128), np.float32), np.zeros(64, np.float32))

    def __call__(self, frame: NDArray[np.float32], state: SileroState) -> tuple[float, SileroState]:
        window = np.concatenate([state.context, frame])[None]  # (1, 576)
        probability, hidden = self._session.run(None, {"input": window, "state": state.hidden, "sr": self._rate})
        return float(probability[0, 0]), SileroState(hidden, frame[-64:].copy())


def load_vad() -> SileroVad:
    """The speech detector alone. Raises CheckpointError."""
    return SileroVad(data_file(VAD))
