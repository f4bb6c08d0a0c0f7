"""What a transcript can be written as: the text formats, and Parquet."""

import io
from collections.abc import Sequence

from moshi_stt.text import subtitles
from moshi_stt.text.subtitles import TimedWord, format_json

FORMATS = (*subtitles.FORMATS, "parquet")
SUFFIXES = {**subtitles.SUFFIXES, "parquet": ".parquet"}


def document(name: str, file: str, seconds: float, words: Sequence[TimedWord]) -> str | bytes:
    """A transcript in a format. file: the recording's name. seconds: its length."""
    if name == "parquet":
        return _parquet(file, words)
    if name == "json":
        return format_json(words, file=file, duration=round(seconds, 3))
    return subtitles.FORMATS[name](words)


def has_parquet() -> bool:
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError:
        return False
    return True


def _parquet(file: str, words: Sequence[TimedWord]) -> bytes:
    """A row for each word: file, channel (null where they were mixed), start and end in seconds, text, logprob (or null)."""
    import pyarrow
    import pyarrow.parquet

    name = file.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    columns = {
        "file": pyarrow.array([name] * len(words), pyarrow.string()),
        "channel": pyarrow.array([word.channel for word in words], pyarrow.int32()),
        "start": pyarrow.array([round(word.start, 3) for word in words], pyarrow.float64()),
        "end": pyarrow.array([round(word.end, 3) for word in words], pyarrow.float64()),
        "text": pyarrow.array([word.text for word in words], pyarrow.string()),
        "logprob": pyarrow.array([word.logprob for word in words], pyarrow.float32()),
    }
    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), sink)
    return sink.getvalue()
