"""moshi-stt: a streaming speech-to-text server. Importing it loads nothing else; what it exports is loaded when it is used.

from moshi_stt import Client, Server, read_file, stream_utterances, stream_words, transcribe, transcribe_bytes
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moshi_stt.audio.decode import read_file
    from moshi_stt.client import Client
    from moshi_stt.serving import Server
    from moshi_stt.sync import stream_utterances, stream_words, transcribe, transcribe_bytes

__version__ = "0.1.0"

__all__ = [
    "Client",
    "Server",
    "__version__",
    "read_file",
    "stream_utterances",
    "stream_words",
    "transcribe",
    "transcribe_bytes",
]

_HOMES = {
    "Client": "moshi_stt.client",
    "Server": "moshi_stt.serving",
    "read_file": "moshi_stt.audio.decode",
    "stream_utterances": "moshi_stt.sync",
    "stream_words": "moshi_stt.sync",
    "transcribe": "moshi_stt.sync",
    "transcribe_bytes": "moshi_stt.sync",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
