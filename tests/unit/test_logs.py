"""Log lines: their form, their files, and that no key is ever in them."""

import logging
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from moshi_stt.cli.logs import OFF, TRACE, DailyFileHandler, LineFormatter, parse_level, set_up_logging
from moshi_stt.errors import ConfigError

LINE = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z +(TRACE|DEBUG|INFO|WARN|ERROR) \S+\.py:\d+: (.*)\n?")


@pytest.fixture(autouse=True)
def root_logger() -> Iterator[None]:
    """Put the root logger back as pytest had it."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    for handler in root.handlers:
        if handler not in handlers:
            handler.close()
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.captureWarnings(False)


@pytest.mark.parametrize(
    ("text", "level"),
    [
        ("off", OFF),
        ("error", 40),
        ("warn", 30),
        ("INFO", 20),
        ("debug", 10),
        ("trace", TRACE),
        ("0", OFF),
        ("3", 20),
        ("5", TRACE),
    ],
)
def test_levels(text: str, level: int) -> None:
    assert parse_level(text) == level


@pytest.mark.parametrize("text", ["", "6", "-1", "warning", "verbose"])
def test_what_is_no_level(text: str) -> None:
    with pytest.raises(ConfigError, match="expected one of off, error, warn"):
        parse_level(text)


def test_a_line_goes_to_stdout_and_to_the_days_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    set_up_logging(logging.INFO, log_dir=str(tmp_path / "a" / "b"), instance_name="tts", silent=False)
    logging.getLogger("moshi_stt.x").warning("hello %s", "there")
    logging.getLogger("moshi_stt.x").debug("not this")
    out = capsys.readouterr().out
    match = LINE.fullmatch(out)
    assert match is not None, out
    assert match.groups() == ("WARN", "hello there")
    assert "unit/test_logs.py:" in out
    (file,) = (tmp_path / "a" / "b").iterdir()
    assert re.fullmatch(r"log\.tts\.\d{4}-\d\d-\d\d", file.name)
    assert file.read_text() == out


def test_silent_leaves_the_file_alone_with_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    set_up_logging(logging.INFO, log_dir=str(tmp_path), instance_name="tts", silent=True)
    logging.getLogger("x").info("quiet")
    assert capsys.readouterr().out == ""
    assert "quiet" in next(tmp_path.iterdir()).read_text()


def test_off_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    set_up_logging(OFF, log_dir=None, instance_name="tts", silent=False)
    logging.getLogger("x").critical("not even this")
    assert capsys.readouterr().out == ""


def record(text: str, created: float = 0.0) -> logging.LogRecord:
    made = logging.LogRecord("x", logging.INFO, "/somewhere/moshi_stt/server/app.py", 7, text, None, None)
    made.created = created
    return made


def test_place_is_within_the_package() -> None:
    assert LineFormatter().format(record("hi")) == "1970-01-01T00:00:00.000000Z  INFO moshi_stt/server/app.py:7: hi"


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("GET /api/asr-streaming?auth_id=hunter2&x=1", "GET /api/asr-streaming?auth_id=***&x=1"),
        ("headers {'kyutai-api-key': 'hunter2', 'a': 'b'}", "headers {'kyutai-api-key': '***', 'a': 'b'}"),
        ("Kyutai-API-Key: hunter2", "Kyutai-API-Key: ***"),
        ("client sent long-secret-key.", "client sent ***."),
        ("the key is public_token", "the key is public_token"),
        ("a word", "a word"),
    ],
)
def test_keys_are_never_written(text: str, written: str) -> None:
    formatter = LineFormatter({"long-secret-key", "public_token", "a"})
    assert formatter.format(record(text)).endswith(f": {written}")


def test_keys_in_a_traceback_are_not_written_either() -> None:
    try:
        raise ValueError("bad key long-secret-key")
    except ValueError:
        made = record("failed")
        made.exc_info = sys.exc_info()
    text = LineFormatter({"long-secret-key"}).format(made)
    assert "ValueError: bad key ***" in text
    assert "long-secret-key" not in text.splitlines()[-1]


def test_a_new_day_opens_a_new_file(tmp_path: Path) -> None:
    handler = DailyFileHandler(tmp_path, "tts")
    handler.setFormatter(LineFormatter())
    for created in (86_399.9, 86_400.0, 86_401.0):
        handler.emit(record(f"at {created}", created))
    handler.close()
    files = {path.name: path.read_text().count("\n") for path in tmp_path.iterdir()}
    assert files["log.tts.1970-01-01"] == 1
    assert files["log.tts.1970-01-02"] == 2


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_said_once_and_again_after_it_had_room(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for day in (1, 3):
        (tmp_path / f"log.tts.1970-01-0{day}").symlink_to("/dev/full")
    handler = DailyFileHandler(tmp_path, "tts")
    handler.setFormatter(LineFormatter())
    said = []
    for day in range(3):
        for line in range(3):
            handler.emit(record(f"line {line}", 86_400.0 * day + line))
        said.append(capsys.readouterr().err)
    handler.close()
    assert said == [f"log lines are lost: {tmp_path}: No space left on device\n", "", said[0]]
    assert (tmp_path / "log.tts.1970-01-02").read_text().count("\n") == 3


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot write a log file there: Not a directory\. Name a folder"):
        DailyFileHandler(tmp_path / "file" / "logs", "tts")
