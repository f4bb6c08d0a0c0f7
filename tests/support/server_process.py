"""A server in a process of its own, over an engine without a model: for what is done to a whole process.

    python -m tests.support.server_process KIND LIMITS DESCRIPTORS

KIND: batch, segment, or processes (batch, with socket processes). LIMITS: those of `server_config`, as JSON. DESCRIPTORS: how
many files and sockets it may have open; 0 for as many as it likes.
"""

import asyncio
import contextlib
import json
import logging
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from tests.support.level_speech import LevelRecogniser
from tests.support.scripted_backend import FakeBackend, LevelModel, loader, spell_level
from tests.support.serving import DEADLINE, server_config

from moshi_stt.engine.batch import BatchEngine
from moshi_stt.engine.engine import Engine
from moshi_stt.engine.segment import SegmentEngine
from moshi_stt.server import app

ROOT = Path(__file__).parents[2]
KINDS = ("batch", "segment", "processes")
SLOTS = 64
PROCESSES = 2
STEP_SECONDS = 0.002
"""So that audio waits, whatever the machine."""


def engine_of(kind: str) -> Engine:
    if kind == "segment":
        return SegmentEngine(LevelRecogniser, slots=SLOTS, threads=2)

    def model(slots: int) -> FakeBackend:
        made = LevelModel(slots)
        made.step_seconds = STEP_SECONDS
        return made

    processes = PROCESSES if kind == "processes" else 0
    return BatchEngine(loader(model, SLOTS, spell_level, processes), marker_wait_seconds=0.05)


class ServerProcess:
    """What a test needs of it."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.port = 0
        self.log: list[str] = []
        self._serving = asyncio.Event()
        self._reading = asyncio.create_task(self._read())

    async def _read(self) -> None:
        assert self.process.stdout is not None
        async for line in self.process.stdout:
            text = line.decode().rstrip()
            self.log.append(text)
            if "http://" in text and not self._serving.is_set():
                self.port = int(text.partition("http://")[2].split("/")[0].rpartition(":")[2])
                self._serving.set()
        self._serving.set()

    async def started(self) -> None:
        async with asyncio.timeout(DEADLINE):
            await self._serving.wait()
        assert self.port, "\n".join(self.log)

    async def ended(self) -> int:
        """Its exit status; `log` is whole then."""
        async with asyncio.timeout(DEADLINE):
            await self.process.wait()
            await self._reading
        assert self.process.returncode is not None
        return self.process.returncode


@contextlib.asynccontextmanager
async def server_process(kind: str, *, descriptors: int = 0, **limits: Any) -> AsyncIterator[ServerProcess]:
    """One that serves; killed at the end if it has not ended."""
    command = (sys.executable, "-m", "tests.support.server_process", kind, json.dumps(limits), str(descriptors))
    process = await asyncio.create_subprocess_exec(
        *command,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        cwd=ROOT,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    made = ServerProcess(process)
    try:
        await made.started()
        yield made
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await made.ended()


def main(kind: str, limits: str, descriptors: str) -> int:
    if int(descriptors):
        import resource

        resource.setrlimit(resource.RLIMIT_NOFILE, (int(descriptors), int(descriptors)))
    logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(levelname)s %(message)s")
    return app.serve(server_config(**json.loads(limits)), {"asr": engine_of(kind)}, "127.0.0.1", 0)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
