"""moshi-stt: a streaming speech-to-text server. Importing it loads nothing else."""

__version__ = "0.1.0"
