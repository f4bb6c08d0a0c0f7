"""moshi-stt: a streaming speech-to-text server. Importing it loads nothing else."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("moshi-stt")
except PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0.0.0"
