"""Finds the files that ship with the package: the embedded English model and recordings of speech."""

from pathlib import Path

from moshi_stt.errors import CheckpointError

MODEL = "moonshine-tiny-en"
"""Folder of the embedded model's files."""

VAD = "silero-vad/silero_vad.onnx"
"""Silero's speech detector."""

SAMPLE = "speech/beckett.wav"
"""English speech, 10 s, 16 kHz mono."""


def data_file(name: str) -> Path:
    """Path of a shipped file, for instance `speech/beckett.wav`. Raises CheckpointError where the installation lacks it."""
    path = Path(__file__).parent / name
    if not path.is_file():
        raise CheckpointError(f"{path} is missing: this installation of moshi-stt is incomplete. Install it again.")
    return path
