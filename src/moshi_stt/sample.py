"""Path of the shipped recording of real speech."""

from pathlib import Path

from moshi_stt.data import SAMPLE, data_file


def sample_path() -> Path:
    """A WAV file: a sentence of Samuel Beckett's, 10 s. Raises CheckpointError where the installation lacks it."""
    return data_file(SAMPLE)
