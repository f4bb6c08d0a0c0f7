"""A Ray of our own, on this host alone, where none is running: with its own folder and port, ended by its own processes."""

import hashlib
import logging
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import msgspec

from moshi_stt.cluster import process
from moshi_stt.cluster.ray_command import PATIENCE, free_ports, start_arguments
from moshi_stt.cluster.spec import NAMESPACE, Paths, write_json
from moshi_stt.errors import MoshiSttError

START_SECONDS = 240.0
END_SECONDS = 10.0
ATTEMPTS = 5
TOKEN = "token"


class OwnRay(msgspec.Struct, frozen=True):
    """A Ray that `cluster up` started. processes: ids and starts of those without which it is none; empty while it starts."""

    address: str
    folder: str
    processes: dict[int, str] = {}


def find(paths: Paths) -> OwnRay | None:
    """The one that was started before, whether it runs or not."""
    try:
        return msgspec.json.decode(paths.ray.read_bytes(), type=OwnRay)
    except (OSError, msgspec.MsgspecError):
        return None


def is_running(own: OwnRay) -> bool:
    return bool(own.processes) and all(process.is_alive(pid, started) for pid, started in own.processes.items())


def start(paths: Paths) -> OwnRay:
    """Start one and wait until it answers. Raises MoshiSttError."""
    before = find(paths)
    if before is not None:
        if is_running(before):
            return before
        end(before)  # what is left of it
    for attempt in range(ATTEMPTS):
        own = _prepared(paths)
        try:
            return _start(own, paths)
        except (OSError, subprocess.SubprocessError) as error:
            end(own)
            paths.ray.unlink(missing_ok=True)
            if attempt == ATTEMPTS - 1:
                raise MoshiSttError(f"Ray did not start: {process.tail(paths.log('ray'), 2) or error}") from None
    raise AssertionError


def _prepared(paths: Paths) -> OwnRay:
    digest = hashlib.sha256(os.fsencode(paths.folder.absolute())).hexdigest()[:8]
    # Ray's sockets lie in it: the path must be short.
    folder = Path(tempfile.gettempdir()) / f"mstt-{digest}-{secrets.token_hex(2)}"
    folder.mkdir(mode=0o700)
    (port,) = free_ports(1)
    own = OwnRay(f"127.0.0.1:{port}", str(folder))
    (folder / TOKEN).write_text(secrets.token_hex(32), encoding="ascii")
    (folder / TOKEN).chmod(0o600)
    write_json(paths.ray, own)
    return own


def _start(own: OwnRay, paths: Paths) -> OwnRay:
    command = [sys.executable, *start_arguments(int(own.address.rpartition(":")[2]), own.folder)]
    with paths.log("ray").open("ab") as log:
        subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={**os.environ, **PATIENCE, **_authorized(own)},
            cwd=paths.folder,
            start_new_session=True,
            timeout=START_SECONDS,
            check=True,
        )
    core = [pid for pid, command in _processes(own) if "/gcs_server " in command or "/raylet/raylet " in command]
    starts = {pid: started for pid in core if (started := process.started_at(pid)) is not None}
    if len(starts) < 2:
        raise OSError("its processes ended at once")
    running = msgspec.structs.replace(own, processes=starts)
    write_json(paths.ray, running)
    return running


def end(own: OwnRay) -> None:
    """End all processes of one, and remove its folder."""
    found = with_descendants(own)
    for number, seconds in ((signal.SIGTERM, END_SECONDS), (signal.SIGKILL, END_SECONDS)):
        for pid, started in found.items():
            process.send(pid, started, number)
        deadline = time.monotonic() + seconds
        while any(process.is_alive(pid, started) for pid, started in found.items()) and time.monotonic() < deadline:
            time.sleep(process.POLL_SECONDS)
        found |= with_descendants(own)
    _remove(Path(own.folder))


def _authorized(own: OwnRay) -> dict[str, str]:
    """Ray listens on all of this host's addresses, and who may talk to it may run programs: it asks for a token."""
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(Path(own.folder) / TOKEN), "RAY_USAGE_STATS_ENABLED": "0"}


def connect(address: str, own: OwnRay | None = None) -> None:
    """Connect this process, which has not imported Ray yet. own: set where it is ours. Raises MoshiSttError."""
    if own is not None:
        os.environ.update(_authorized(own))
    import ray

    try:
        ray.init(address=address, namespace=NAMESPACE, configure_logging=True, logging_level=logging.ERROR, log_to_driver=False)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        raise MoshiSttError(f"Ray does not answer at {address}: {error}") from None


def disconnect() -> None:
    """Undo `connect`."""
    import ray

    ray.shutdown()


def _processes(own: OwnRay) -> list[tuple[int, str]]:
    """Those that name its folder in their command line, or, as the server of Ray's clients, its port."""
    port = f":{own.address.rpartition(':')[2]} "
    done = subprocess.run(["ps", "-A", "-ww", "-o", "pid=,args="], capture_output=True, text=True, check=False)
    found = []
    for line in done.stdout.splitlines():
        pid, _, command = line.strip().partition(" ")
        is_ours = own.folder in command or ("ray.util.client.server" in command and port in command)
        if is_ours and int(pid) != os.getpid():
            found.append((int(pid), command))
    return found


def with_descendants(own: OwnRay) -> dict[int, str]:
    """Ids and starts of a Ray's processes: Ray's workers do not name the folder, but descend from one that does."""
    done = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=False)
    parents = {int(pid): int(parent) for pid, parent in (line.split() for line in done.stdout.splitlines())}
    ours = {pid for pid, _ in _processes(own)}
    while more := {pid for pid, parent in parents.items() if parent in ours} - ours:
        ours |= more
    return {pid: started for pid in ours if (started := process.started_at(pid)) is not None}


def _remove(folder: Path) -> None:
    import shutil

    shutil.rmtree(folder, ignore_errors=True)
