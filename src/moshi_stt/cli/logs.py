"""Where log lines go: stdout, a file that changes with the UTC day, or both. Knows nothing of who logs.

No line carries a key: a client's key in a URL or a header, and every key of the configuration but the well-known one, is
replaced before the line is written.
"""

import io
import logging
import re
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from moshi_stt.constants import API_KEY_HEADER, API_KEY_QUERY, PUBLIC_KEY
from moshi_stt.errors import ConfigError

TRACE = 5
OFF = logging.CRITICAL + 10
LEVELS = {
    "off": OFF,
    "error": logging.ERROR,
    "warn": logging.WARNING,
    "info": logging.INFO,
    "debug": logging.DEBUG,
    "trace": TRACE,
}
SHORTEST_SECRET = 6
"""Keys shorter than this are not searched for in text: they would blank ordinary words."""

logging.addLevelName(TRACE, "TRACE")
logging.addLevelName(logging.WARNING, "WARN")


def parse_level(text: str) -> int:
    """`info`, `warn` … or 0 to 5, as moshi-server takes them. Raises ConfigError."""
    names = list(LEVELS)
    name = names[int(text)] if text in ("0", "1", "2", "3", "4", "5") else text.lower()
    if name not in LEVELS:
        raise ConfigError(f"--log {text}: expected one of {', '.join(names)}, or 0 to 5")
    return LEVELS[name]


def set_up_logging(level: int, *, log_dir: str | None, instance_name: str, silent: bool, keys: Iterable[str] = ()) -> None:
    """Send every logger's lines to stdout (unless silent) and to `<log_dir>/log.<instance_name>.<date>` (unless None).

    Raises ConfigError where the folder or the file cannot be made.
    """
    handlers: list[logging.Handler] = []
    if not silent:
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(line_buffering=True)
        handlers.append(logging.StreamHandler(sys.stdout))
    if log_dir is not None:
        handlers.append(DailyFileHandler(Path(log_dir), instance_name))
    formatter = LineFormatter(keys)
    for handler in handlers:
        handler.setFormatter(formatter)
    root = logging.getLogger()
    for old in list(root.handlers):
        root.removeHandler(old)
    for handler in handlers or [logging.NullHandler()]:
        root.addHandler(handler)
    root.setLevel(level)
    logging.captureWarnings(True)


class LineFormatter(logging.Formatter):
    """`2026-01-31T12:00:00.123456Z  INFO moshi_stt/cli/worker.py:42: message`, with keys replaced by `***`."""

    def __init__(self, keys: Iterable[str] = ()) -> None:
        super().__init__("%(asctime)s %(levelname)5s %(place)s: %(message)s")
        self.converter = time.gmtime
        secrets = [re.escape(k) for k in keys if len(k) >= SHORTEST_SECRET and k != PUBLIC_KEY]
        self._secrets = re.compile("|".join(sorted(secrets, key=len, reverse=True))) if secrets else None
        self._named = re.compile(rf"({API_KEY_QUERY}=|{API_KEY_HEADER}['\"]?\s*[:=]\s*['\"]?)[^&\s'\",)]+", re.IGNORECASE)

    def format(self, record: logging.LogRecord) -> str:
        path = Path(record.pathname)
        parts = path.parts
        start = parts.index("moshi_stt") if "moshi_stt" in parts[:-1] else len(parts) - 2
        record.place = f"{'/'.join(parts[max(start, 0) :])}:{record.lineno}"
        line = self._named.sub(r"\1***", super().format(record))
        return self._secrets.sub("***", line) if self._secrets else line

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:
        return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.created % 1 * 1e6):06d}Z"


class DailyFileHandler(logging.Handler):
    """Appends to `log.<name>.<YYYY-MM-DD>`; the first line of a new UTC day opens that day's file."""

    def __init__(self, folder: Path, name: str) -> None:
        super().__init__()
        self._folder = folder
        self._name = name
        self._date = ""
        self._file: io.TextIOWrapper | None = None
        self._failed = False
        """Whether the last line could not be written."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._open(time.time())
        except OSError as e:
            raise ConfigError(
                f"log_dir = {str(folder)!r}: cannot write a log file there: {e.strerror}. "
                "Name a folder that this user may write to in the configuration."
            ) from None

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._open(record.created)
            assert self._file is not None
            self._file.write(self.format(record) + "\n")
            self._file.flush()
            self._failed = False
        except OSError as error:  # a full disk must neither end the server nor fill another file with the same sentence
            if not self._failed and sys.stderr is not None:
                print(f"log lines are lost: {self._folder}: {error.strerror or error}", file=sys.stderr)
            self._failed = True
        except Exception:
            self.handleError(record)

    def close(self) -> None:
        self._replace(None)
        super().close()

    def _open(self, now: float) -> None:
        date = time.strftime("%Y-%m-%d", time.gmtime(now))
        if date != self._date or self._file is None:
            self._replace((self._folder / f"log.{self._name}.{date}").open("a", encoding="utf-8"))
            self._date = date

    def _replace(self, file: io.TextIOWrapper | None) -> None:
        old, self._file = self._file, file
        if old is not None:
            with suppress(OSError):  # what a full disk did not take
                old.close()
