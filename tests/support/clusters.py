"""A cluster as its users start it, by the command line, and streams through its address."""

import asyncio
import contextlib
import itertools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import numpy as np
from numpy.typing import NDArray
from tests.support.ports import free_port

from moshi_stt.client import Client
from moshi_stt.cluster import own_ray
from moshi_stt.cluster.front import State, tell
from moshi_stt.cluster.spec import Paths, Report
from moshi_stt.constants import FRAME_SAMPLES
from moshi_stt.errors import MoshiSttError, ServerError
from moshi_stt.events import EndWord, Marker, Ready, Word

DEADLINE = 300.0
"""Seconds for anything that takes some seconds on a machine of its own."""


class Cluster:
    """One cluster, in a folder of its own with a Ray of its own. `down` leaves nothing."""

    def __init__(self, config: str, *flags: str) -> None:
        # Its sockets need a short path, which pytest's folders are not.
        self.folder = Path(tempfile.mkdtemp(prefix="mstt-", dir="/tmp"))
        self.paths = Paths(self.folder)
        self.port = free_port()
        self.config, self.flags = config, flags
        self.path = "/api/asr-streaming"
        self.replicas = 0

    @property
    def url(self) -> str:
        return f"ws://127.0.0.1:{self.port}{self.path}"

    def up(self, *counts: str) -> str:
        """Start it, with `--replicas N` or the like."""
        self.replicas = int(counts[1])
        return self.run("up", self.config, "--port", str(self.port), *self.flags, *counts)

    def run(self, deed: str, *arguments: str) -> str:
        """What one command printed. It must succeed."""
        done = subprocess.run(self.command(deed, *arguments), capture_output=True, text=True, timeout=2 * DEADLINE, check=False)
        assert done.returncode == 0, f"cluster {deed}: {done.stdout}{done.stderr}{self.logs()}"
        return done.stdout

    def command(self, deed: str, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "moshi_stt", "cluster", deed, "--state-dir", str(self.folder), *arguments]

    def logs(self) -> str:
        return "".join(f"\n== {path.name}\n{path.read_text()[-2000:]}" for path in sorted(self.folder.glob("*.log")))

    async def state(self) -> State:
        return await tell(self.paths, "GET")

    async def reports(self) -> dict[str, Report]:
        fleet = (await self.state()).fleet
        return {report.name: report for report in fleet.reports} if fleet is not None else {}

    async def until(self, what: str, holds: Callable[[State], bool], deadline: float = DEADLINE) -> float:
        """Seconds until something holds."""
        began = time.monotonic()
        state: State | str = "nothing"
        while time.monotonic() - began < deadline:
            try:
                state = await self.state()
                if holds(state):
                    return time.monotonic() - began
            except MoshiSttError as error:
                state = str(error)
            await asyncio.sleep(0.1)
        raise AssertionError(f"{what}: not within {deadline:.0f} s: {state}{self.logs()}")

    async def answers(self) -> None:
        """Wait until the address says that streams are taken."""
        async with asyncio.timeout(DEADLINE), aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=5.0)) as session:
            while True:
                with contextlib.suppress(aiohttp.ClientError, TimeoutError):
                    async with session.get(f"http://127.0.0.1:{self.port}/ready") as answer:
                        if answer.status == 200:
                            return
                await asyncio.sleep(0.02)

    async def resumed(self) -> int:
        """How many clients have come back to their streams, on all replicas."""
        async with asyncio.timeout(DEADLINE), aiohttp.ClientSession() as session:
            while True:
                async with session.get(f"http://127.0.0.1:{self.port}/metrics") as answer:
                    series = [line.rsplit(" ", 1) for line in (await answer.text()).splitlines()]
                if sum(name.startswith("moshi_stt_websockets{") for name, _ in series) == self.replicas:  # none was too busy
                    found = [value for name, value in series if "moshi_stt_resumed{" in name and 'found="yes"' in name]
                    return round(sum(map(float, found)))
                await asyncio.sleep(0.1)

    def down(self) -> None:
        """End it, by force where the command fails."""
        own = own_ray.find(self.paths)
        try:
            if self.folder.exists():
                self.run("down", "--now")
        finally:
            if own is not None:
                own_ray.end(own)
            shutil.rmtree(self.folder, ignore_errors=True)


def kill(pid: int) -> float:
    """kill -9. When that was, as `time.monotonic` says."""
    os.kill(pid, signal.SIGKILL)
    return time.monotonic()


def all_ready(count: int) -> Callable[[State], bool]:
    """Whether so many replicas are there, all of them ready and none leaving."""

    def holds(state: State) -> bool:
        fleet = state.fleet
        return (
            fleet is not None
            and not state.why
            and not fleet.note
            and fleet.target == count
            and [report.phase for report in fleet.reports] == ["ready"] * count
        )

    return holds


@dataclass
class Outcome:
    """What one client heard. events: words, their times and markers, in order. replica: `r1`, from its token."""

    replica: str = ""
    events: list[Any] = field(default_factory=list)
    error: str = ""

    @property
    def is_whole(self) -> bool:
        return bool(self.events) and isinstance(self.events[-1], Marker) and not self.error


class Caller:
    """A client that sends a recording at a pace and hears it out."""

    def __init__(
        self,
        url: str,
        pcm: NDArray[np.float32],
        pace: float = 1.0,
        resume: bool = True,
        stops: tuple[float, ...] = (),
    ) -> None:
        """pace: seconds of audio a second; 0 as fast as the server takes it. stops: seconds of the recording before which it
        waits for `go_on`, in order.
        """
        self._pcm, self._pace = pcm, pace
        self._stops = [round(seconds * 24_000) for seconds in stops]
        self._may_go_on = asyncio.Semaphore(0)
        self._url, self._resume = url, resume
        self.outcome = Outcome()
        self.greeted = asyncio.Event()
        self.has_heard = asyncio.Event()
        """Set with the first event of its audio."""
        self.is_held = asyncio.Event()
        """Set at its last stop."""
        self.done: asyncio.Task[Outcome] = asyncio.create_task(self._run())

    async def _run(self) -> Outcome:
        try:
            async with asyncio.timeout(DEADLINE), Client(self._url, resume=self._resume, open_timeout_seconds=60.0) as client:
                sending = asyncio.create_task(self._send(client))
                try:
                    await self._hear(client)
                finally:
                    sending.cancel()
                    await asyncio.gather(sending, return_exceptions=True)
        except (ServerError, TimeoutError) as error:
            self.outcome.error = str(error) or "too late"
        finally:
            for each in (self.greeted, self.has_heard, self.is_held):
                each.set()
        return self.outcome

    async def _hear(self, client: Client) -> None:
        async for event in client:
            if isinstance(event, Ready) and not self.greeted.is_set():
                token = msgspec.to_builtins(event).get("token") or ""
                self.outcome.replica = token.partition(".")[0]
                self.greeted.set()
                continue
            self.has_heard.set()
            if isinstance(event, Word | EndWord | Marker):
                self.outcome.events.append(event)
                if isinstance(event, Marker):
                    return

    def go_on(self) -> None:
        """Speak to the next stop, or to the end."""
        self._may_go_on.release()

    async def _send(self, client: Client) -> None:
        for start, end in itertools.pairwise([0, *self._stops, len(self._pcm)]):
            await self._speak(client, self._pcm[start:end])
            if end in self._stops:
                if end == self._stops[-1]:
                    self.is_held.set()
                await self._may_go_on.acquire()
        await client.mark(1)

    async def _speak(self, client: Client, pcm: NDArray[np.float32]) -> None:
        began = time.monotonic()
        for start in range(0, len(pcm), FRAME_SAMPLES):
            if self._pace:
                due = began + start / 24_000 / self._pace
                await asyncio.sleep(max(0.0, due - time.monotonic()))
            await client.send_audio(pcm[start : start + FRAME_SAMPLES])


async def alone(url: str, pcm: NDArray[np.float32]) -> list[Any]:
    """What a server hears in a recording when it has nothing else to do."""
    outcome = await Caller(url, pcm, pace=0.0, resume=False).done
    assert outcome.is_whole, outcome.error
    return outcome.events
