"""A whole server on a free port of this machine, and raw sockets to it. Knows engines only by their interface."""

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import pytest

from moshi_stt.config import EmbeddedModule, LimitsConfig, ServerConfig
from moshi_stt.constants import DEFAULT_PATH
from moshi_stt.engine.engine import Engine
from moshi_stt.server.app import Server
from moshi_stt.server.connection import Connection
from moshi_stt.server.connections import Connections
from moshi_stt.server.devices.pool import DevicePool
from moshi_stt.server.doors import DOORS
from moshi_stt.server.doors.door import AnyDoor

KEY = "public_token"
DEADLINE = 90.0
"""Seconds that any wait in a test may take before the test fails."""

PATIENCE = {"silent_seconds": 10 * DEADLINE, "idle_seconds": 10 * DEADLINE, "stuck_seconds": 10 * DEADLINE}


def server_config(path: str = DEFAULT_PATH, *, static_dir: str | None = None, **limits: Any) -> ServerConfig:
    """One module named `asr`, one key. Where a test says nothing of it, clients may be silent for as long as a busy machine
    makes them: most of those in tests answer no ping.
    """
    return ServerConfig(
        static_dir=static_dir,
        log_dir=None,
        instance_name="test",
        authorized_ids=frozenset({KEY}),
        modules=(EmbeddedModule(name="asr", path=path),),
        limits=LimitsConfig(**(PATIENCE | limits)),
    )


@dataclass(frozen=True)
class Running:
    """A server that serves."""

    server: Server
    port: int

    @property
    def http(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def ws(self) -> str:
        return f"ws://127.0.0.1:{self.port}{self.server.service.served[0].module.path}"

    def connections(self) -> int:
        return len(self.server.service.connections)


@contextlib.asynccontextmanager
async def serving(
    engine: Engine | Mapping[str, Engine],
    config: ServerConfig | None = None,
    *,
    doors: Sequence[AnyDoor] = DOORS,
    devices: DevicePool | None = None,
    **limits: Any,
) -> AsyncIterator[Running]:
    """Start a server over this engine; stop it at the end. limits: of `server_config`, where no config is given.

    devices: the model processes whose engines are given.
    """
    config = config or server_config(**limits)
    engines = {"asr": engine} if isinstance(engine, Engine) else engine
    server = Server(config, engines, "127.0.0.1", 0, doors=doors, devices=devices)
    await server.start()
    try:
        yield Running(server, server.port)
    finally:
        await server.stop()


class HandClock:
    """The time by which connections look at their timers: it stands still unless a test moves it. Made before the server.

    A connection begins at the real time. So limits are thousands of seconds here, against which the test's own time is nothing.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._ahead = 0.0

        async def tick(_: Connections) -> None:
            await asyncio.Event().wait()

        monkeypatch.setattr(Connections, "tick", tick)

    def advance(self, running: Running, seconds: float, only: Connection | None = None) -> None:
        """Move it, and let the connections, or this one alone, look at it."""
        self._ahead += seconds
        now = asyncio.get_running_loop().time() + self._ahead
        for connection in running.server.service.connections if only is None else (only,):
            connection.tick(now)


async def until(condition: Callable[[], object], what: str = "the condition", deadline: float = DEADLINE) -> None:
    """Wait until `condition()` is true. For what has no event to wait on."""
    end = asyncio.get_running_loop().time() + deadline
    for pause in itertools.chain((0, 0.001, 0.002), itertools.repeat(0.005)):
        if condition():
            return
        assert asyncio.get_running_loop().time() < end, f"{what} did not come true in {deadline:g} s"
        await asyncio.sleep(pause)


@dataclass(frozen=True)
class Answer:
    """An HTTP answer as it came."""

    status: int
    reason: str
    headers: Mapping[str, str]
    body: bytes


async def raw_request(port: int, request: bytes) -> Answer:
    """Send bytes, read one answer. The body ends where Content-Length says, or at end-of-file."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        async with asyncio.timeout(DEADLINE):
            writer.write(request)
            await writer.drain()
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            first, *lines = head.rstrip("\r\n").split("\r\n")
            headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
            _, status, reason = first.split(" ", 2)
            body = b""
            if status not in ("101", "304") and not request.startswith(b"HEAD "):
                size = headers.get("content-length")
                body = await (reader.read() if size is None else reader.readexactly(int(size)))
            return Answer(int(status), reason, headers, body)
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


def event_of(message: bytes) -> dict[str, Any]:
    """A message of the server as a plain map."""
    decoded: dict[str, Any] = msgspec.msgpack.decode(message)
    return decoded
