"""The whole thing as users run it: `moshi-stt worker` in a process of its own, the embedded model, real speech, a signal."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from moshi_stt.sample import sample_path

ROOT = Path(__file__).parents[2]
DEADLINE = 60.0
COMMAND = [sys.executable, "-c", "import sys; from moshi_stt.cli import main; sys.exit(main())"]
SAID = "ever tried ever failed no matter try again fail again fail better"
"""What the sample says."""


class Worker:
    """A worker process. Its log is read to the end by a thread, so that it never blocks."""

    def __init__(self, *args: str, **env: str) -> None:
        self.process = subprocess.Popen(
            [*COMMAND, "worker", "--addr", "127.0.0.1", "--port", "0", *args],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | env,
        )
        self.lines: list[str] = []
        self.url = ""
        self._known = threading.Event()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)
            if found := re.search(r"http://127\.0\.0\.1:\d+", line):
                self.url = found[0]
                self._known.set()
        self._known.set()

    def wait_until_ready(self) -> str:
        assert self._known.wait(DEADLINE), self.lines
        assert self.url, (self.lines, self.process.communicate()[1])
        return self.url

    def end(self, number: int) -> tuple[int, str]:
        """Send a signal; the exit status and what was on stderr."""
        self.process.send_signal(number)
        status = self.process.wait(DEADLINE)
        self._reader.join(DEADLINE)
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        complaints = self.process.stderr.read()
        self.process.stdout.close()
        self.process.stderr.close()
        return status, complaints


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    """One worker for this file's tests, ended by SIGTERM: it must go in good order."""
    running = Worker("--batch-size", "4")
    try:
        running.wait_until_ready()
        yield running
    finally:
        status, complaints = running.end(signal.SIGTERM)
    assert (status, complaints) == (0, "")


def bare(text: str) -> str:
    return " ".join(re.sub(r"[^a-z' ]", " ", text.lower()).split())


def matches(text: str) -> bool:
    """At most two of the twelve words otherwise: the model is small."""
    words, wanted = bare(text).split(), SAID.split()
    return len(words) == len(wanted) and sum(a != b for a, b in zip(words, wanted, strict=True)) <= 2


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_log_says_what_runs_where(worker: Worker) -> None:
    log = "".join(worker.lines)
    assert "asr: moonshine tiny-en on cpu" in log
    assert "4 slots" in log
    assert "real-time streams:" in log
    assert re.search(r"English only.*stt-1b-en_fr", log)
    assert f"page, metrics and health at {worker.url}/" in log
    assert "WARN" not in log


def test_transcribe_through_the_websocket(worker: Worker) -> None:
    assert matches(run(*COMMAND, "transcribe", "--url", worker.url, str(sample_path())))


@pytest.mark.parametrize("example", ["transcribe_file.py", "live_words.py", "utterances.py"])
def test_the_examples(worker: Worker, example: str) -> None:
    text = run(sys.executable, f"examples/{example}", str(sample_path()), worker.url.replace("http", "ws"))
    assert matches(re.sub(r"\d+\.\d+( to)?", "", text))


def test_the_example_with_curl(worker: Worker) -> None:
    events = json.loads(run("sh", "examples/post.sh", str(sample_path()), worker.url))
    assert matches(" ".join(event["text"] for event in events if event["type"] == "Word"))


def test_the_readme_program(worker: Worker, tmp_path: Path) -> None:
    code, *_ = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    program = tmp_path / "program.py"
    program.write_text(code.replace("ws://127.0.0.1:8080", worker.url).replace("interview.m4a", str(sample_path())))
    assert matches(re.sub(r"\d+\.\d+", "", run(sys.executable, str(program))))


def test_status(worker: Worker) -> None:
    text = run(*COMMAND, "status", "--url", worker.url, "--pid", str(worker.process.pid))
    assert f"{worker.url}: ready" in text
    assert "/api/asr-streaming: embedded, moonshine tiny-en, 0 of 4 streams" in text
    report = json.loads(run(*COMMAND, "status", "--url", worker.url, "--json", "--wait", "5"))
    assert (report["ready"], report["healthy"]) == (True, True)
    assert "process" not in report


def test_the_page_comes_along(worker: Worker) -> None:
    with urllib.request.urlopen(worker.url, timeout=DEADLINE) as answer:
        assert answer.status == 200
        assert b"<html" in answer.read().lower()


def test_a_port_in_use_is_said_before_anything_is_loaded(worker: Worker) -> None:
    port = worker.url.rsplit(":", 1)[1]
    command = [*COMMAND, "worker", "--addr", "127.0.0.1", "--port", port, "--log", "error"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"Error: port {port} on 127.0.0.1 is in use")
    assert "Traceback" not in done.stderr


def test_an_interrupt_ends_a_worker_cleanly_and_the_file_has_its_log(tmp_path: Path) -> None:
    config = tmp_path / "x.toml"
    text = run(*COMMAND, "configs", "embedded").replace('log_dir = ""', 'log_dir = "$LOGS/deep"')
    config.write_text(text.replace('"public_token"', '"a key of my own"'))
    worker = Worker("--config", str(config), "--cpu", LOGS=str(tmp_path))
    worker.wait_until_ready()
    assert worker.end(signal.SIGINT) == (0, "")
    (log,) = (tmp_path / "deep").iterdir()
    assert re.fullmatch(r"log\.moshi-stt\.\d{4}-\d\d-\d\d", log.name)
    assert log.read_text() == "".join(worker.lines)
    assert "a key of my own" not in log.read_text()
