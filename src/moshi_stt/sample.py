"""A recording of real speech, on every machine that has the embedded model. Knows where it lies, not what it is for."""

import importlib.util
from pathlib import Path

from moshi_stt.errors import ConfigError

SAMPLE_FILE = "beckett.wav"
"""In the assets of moonshine-voice: a sentence of Samuel Beckett's, 10 s."""


def sample_path() -> Path:
    """Path of the sample, a WAV file. Raises ConfigError where the package that carries it is not installed."""
    spec = importlib.util.find_spec("moonshine_voice")
    if spec is not None and spec.origin is not None:
        path = Path(spec.origin).parent / "assets" / SAMPLE_FILE
        if path.is_file():
            return path
    raise ConfigError(
        "the sample recording comes with moonshine-voice, which is not installed here. "
        "Use any recording of English speech instead, or install it: pip install 'moonshine-voice==0.0.73'"
    )
