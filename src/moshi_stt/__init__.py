"""moshi-stt: a streaming speech-to-text server. Importing it loads nothing else; what it exports is loaded when it is used.

from moshi_stt import Client, Server, read_file, transcribe
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moshi_stt.audio.decode import read_file
    from moshi_stt.client import Client, transcribe
    from moshi_stt.serving import Server

__version__ = "0.1.0"

__all__ = ["Client", "Server", "__version__", "read_file", "transcribe"]

_HOMES = {
    "Client": "moshi_stt.client",
    "Server": "moshi_stt.serving",
    "read_file": "moshi_stt.audio.decode",
    "transcribe": "moshi_stt.client",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
