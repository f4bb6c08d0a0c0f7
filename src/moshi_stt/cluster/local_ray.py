"""A Ray on this host alone that lives as long as this process needs it."""

import contextlib
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from typing import IO, Final

from moshi_stt.cluster.ray_command import PATIENCE, free_ports, start_arguments
from moshi_stt.errors import MoshiSttError

START_SECONDS: Final = 240.0
"""As on a busy machine. On a quiet one it takes 5 s."""

END_SECONDS: Final = 5.0
POLL_SECONDS: Final = 0.05
ATTEMPTS: Final = 3
"""On a busy machine Ray gives up on parts of its own that are only slow."""

_STARTED: Final = "Ray runtime started"
_COLOURS: Final = re.compile(r"\x1b\[[0-9;]*m")

_LAUNCH: Final = """
import os, sys
if sys.platform == "linux":
    import ctypes
    ctypes.CDLL(None).prctl(1, 15)  # PR_SET_PDEATHSIG: SIGTERM when this process's parent dies, whatever ends it
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


@contextlib.contextmanager
def local_ray(cpus: int) -> Iterator[str]:
    """Its address. It takes this process for one that has not imported Ray yet. Raises MoshiSttError.

    Ray listens on every address of this host, and who may talk to it may run programs: it asks for a token.
    """
    token = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    os.environ.update(PATIENCE | token)
    for attempt in range(ATTEMPTS):
        folder = tempfile.mkdtemp(prefix="mstt-")  # short: Ray's sockets lie in it
        (port,) = free_ports(1)
        process = _start(folder, port, cpus)
        try:
            try:
                _wait_started(process)
            except MoshiSttError:
                if attempt == ATTEMPTS - 1:
                    raise
                continue
            yield f"127.0.0.1:{port}"
            return
        finally:
            _end(process)
            shutil.rmtree(folder, ignore_errors=True)


def _start(folder: str, port: int, cpus: int) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", _LAUNCH, *start_arguments(port, folder), "--block", "--num-cpus", str(cpus)]
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        process_group=0,  # Ctrl-C is this process's business
    )


def _end(process: "subprocess.Popen[str]") -> None:
    """End it and all of its group, whose last writes would otherwise bring the folder back."""
    process.terminate()  # its processes end with it
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(END_SECONDS)
    deadline = time.monotonic() + END_SECONDS
    with contextlib.suppress(ProcessLookupError, PermissionError):  # nobody of the group is left
        while time.monotonic() < deadline:
            os.killpg(process.pid, signal.SIGKILL)  # nothing of it is kept
            process.poll()
            time.sleep(POLL_SECONDS)
    process.wait()


def _wait_started(process: "subprocess.Popen[str]") -> None:
    assert process.stdout is not None
    started, said = threading.Event(), list[str]()

    def read(lines: IO[str]) -> None:
        """All that it says, to the end: a full pipe would stop it."""
        for line in lines:
            said.append(line)
            del said[:-20]
            if _STARTED in line:
                started.set()
        started.set()

    threading.Thread(target=read, args=(process.stdout,), daemon=True).start()
    if not started.wait(START_SECONDS):
        raise MoshiSttError(
            f"Ray did not start on this host within {START_SECONDS:.0f} s: try again when the machine is less busy"
        )
    if process.poll() is not None or not any(_STARTED in line for line in said):
        last = next((line.strip() for line in reversed(said) if line.strip()), "it said nothing")
        raise MoshiSttError(f"Ray did not start on this host: {_COLOURS.sub('', last)}")
