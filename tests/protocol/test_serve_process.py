"""The process as a whole: signals, exit status, and limits; in processes of their own."""

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DEADLINE = 120
"""Seconds that a process may take to start or to end."""
WORKER = """
    import asyncio, logging, sys
    from moshi_stt.server import app
    from moshi_stt.errors import MoshiSttError
    from tests.support.scripted_engine import ScriptedEngine, counting
    from tests.support.serving import server_config

    class Engine(ScriptedEngine):
        async def start(self):
            await super().start()
            SCRIPT

    logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")
    try:
        sys.exit(app.serve(server_config(), {"asr": Engine(counting(5))}, "127.0.0.1", PORT))
    except MoshiSttError as error:
        sys.exit(f"Error: {error}")
"""


@contextmanager
def worker(script: str = "pass", port: int = 0, *, nohup: bool = False) -> Iterator[subprocess.Popen[str]]:
    """`serve` in a process of its own; killed at the end if it has not ended."""
    code = textwrap.dedent(WORKER).replace("SCRIPT", script).replace("PORT", str(port))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    command = [*(["nohup"] if nohup else []), sys.executable, "-c", code]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=ROOT)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def address(process: subprocess.Popen[str]) -> str:
    """Where it serves, from its log."""
    assert process.stdout is not None
    for line in process.stdout:
        if "http://" in line:
            return "http://" + line.partition("http://")[2].split("/")[0].strip()
    raise AssertionError(f"it did not start: {process.stderr.read() if process.stderr else ''}")


@pytest.mark.skipif(sys.platform == "win32", reason="no signals to handle")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP"])
def test_signal_ends_it_with_status_0(name: str) -> None:
    with worker() as process:
        url = address(process)
        assert json.load(urllib.request.urlopen(f"{url}/health", timeout=DEADLINE)) == {"status": "ok"}
        process.send_signal(signal.Signals[name])
        _, errors = process.communicate(timeout=DEADLINE)
        assert process.returncode == 0
        assert errors == ""


@pytest.mark.skipif(shutil.which("nohup") is None, reason="there is no nohup here")
def test_under_nohup_it_outlives_its_terminal() -> None:
    with worker(nohup=True) as process:
        url = address(process)
        process.send_signal(signal.SIGHUP)
        for _ in range(3):
            assert json.load(urllib.request.urlopen(f"{url}/health", timeout=DEADLINE)) == {"status": "ok"}
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=DEADLINE)
        assert process.returncode == 0
        assert "SIGTERM: shutting down" in output


def test_engine_failure_ends_it_with_status_1() -> None:
    """The reason is in the log; nothing hangs."""
    with worker('asyncio.get_running_loop().call_later(0.2, self.fail_next, "the device is gone")') as process:
        address(process)
        output, errors = process.communicate(timeout=DEADLINE)
        assert process.returncode == 1, errors
        assert "module asr failed: a model step failed: RuntimeError: the device is gone" in output


def test_engine_that_cannot_start_is_said_in_plain_words() -> None:
    with worker('from moshi_stt.errors import CheckpointError; raise CheckpointError("no such weights")') as process:
        _, errors = process.communicate(timeout=DEADLINE)
        assert (process.returncode, errors.strip()) == (1, "Error: no such weights")


def test_second_server_on_a_port_is_told_so() -> None:
    with worker() as first:
        port = int(address(first).rpartition(":")[2])
        with worker(port=port) as second:
            _, errors = second.communicate(timeout=DEADLINE)
        assert second.returncode == 1
        assert errors.startswith(f"Error: port {port} on 127.0.0.1 is in use.")
        assert "Traceback" not in errors


@pytest.mark.skipif(sys.platform == "win32", reason="no such limit")
def test_soft_limit_of_files_is_raised() -> None:
    import resource

    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if hard != resource.RLIM_INFINITY and hard < 300:
        pytest.skip("the hard limit is too low to raise anything")
    code = """
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, (256, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
from moshi_stt.server.runtime import raise_file_limit
raise_file_limit()
print(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert int(done.stdout) > 256
