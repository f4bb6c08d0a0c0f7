"""Processes that outlive whoever started them: starting, finding again, ending. For POSIX systems."""

import asyncio
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from moshi_stt.errors import MoshiSttError

POLL_SECONDS = 0.1
START_SECONDS = 30.0

MOST_LOG_BYTES = 16 << 20
"""A log beyond it is set aside as `NAME.1` when its process is started again."""

_LAUNCH = '"$@" </dev/null >>"$MOSHI_STT_LOG" 2>&1 & echo $!'


def start_detached(command: Sequence[str], log: Path, env: Mapping[str, str], folder: Path) -> int:
    """Start a process in a session of its own, whose parent is gone: whatever ends this process does not end that one.

    Returns its id. Raises MoshiSttError where it cannot be started.
    """
    with suppress(OSError):
        if log.stat().st_size > MOST_LOG_BYTES:
            log.replace(log.with_name(f"{log.name}.1"))
    try:
        done = subprocess.run(
            ["/bin/sh", "-c", _LAUNCH, "sh", *command],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            env={**env, "MOSHI_STT_LOG": str(log)},
            cwd=folder,
            start_new_session=True,
            timeout=START_SECONDS,
            text=True,
            check=True,
        )
        return int(done.stdout)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        raise MoshiSttError(f"{command[0]} could not be started: {error}") from None


def started_at(pid: int) -> str | None:
    """When a process started, as the system tells it; None for one that is gone or has ended."""
    try:
        # The name of the process is in brackets and may have spaces and brackets.
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        return None if fields[0] in "ZX" else fields[19]
    except FileNotFoundError:
        if Path("/proc/self/stat").exists():
            return None
    except (OSError, IndexError):
        return None
    done = subprocess.run(["ps", "-p", str(pid), "-o", "stat=,lstart="], capture_output=True, text=True, check=False)
    state, _, started = done.stdout.strip().partition(" ")
    return started.strip() if state and not state.startswith("Z") else None


def is_alive(pid: int, started: str) -> bool:
    """Whether the process is there, and is the one that started then."""
    return pid > 0 and started_at(pid) == started


def send(pid: int, started: str, number: signal.Signals) -> None:
    """Send a signal, if the process is still that one."""
    if is_alive(pid, started):
        with suppress(ProcessLookupError):
            os.kill(pid, number)


async def wait_gone(pid: int, started: str, seconds: float) -> bool:
    """Whether the process has ended within this time."""
    deadline = time.monotonic() + seconds
    while is_alive(pid, started):
        if time.monotonic() >= deadline:
            return False
        await asyncio.sleep(POLL_SECONDS)
    return True


async def end(pid: int, started: str, seconds: float, number: signal.Signals = signal.SIGTERM) -> None:
    """Ask a process to end, by this signal, and end it by force when it has not done so in time."""
    send(pid, started, number)
    if not await wait_gone(pid, started, seconds):
        send(pid, started, signal.SIGKILL)
        await wait_gone(pid, started, START_SECONDS)


def tail(log: Path, lines: int = 3) -> str:
    """The last lines of a log, for a message."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - 4_096))
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return ""
    return " | ".join(line.strip() for line in text.splitlines()[-lines:] if line.strip())
