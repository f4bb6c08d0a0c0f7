"""Real servers, ours and moshi-server, as processes; and what they answer to a recording sent over a WebSocket frame by
frame.
"""

import asyncio
import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import msgpack
import numpy as np
from numpy.typing import NDArray

from moshi_stt.protocol import encode_audio

RATE = 24_000
FRAME = 1_920
FRAME_RATE = 12.5
READY_SECONDS = 300
"""How long a model may load."""
TAIL_SECONDS = 2.0
"""Silence after a recording, so that its last word comes out."""


@dataclass
class Session:
    """What a server answered. words: (text, start, end or None). pauses: one row of pause values for each step."""

    words: list[tuple[str, float, float | None]] = field(default_factory=list)
    pauses: list[list[float]] = field(default_factory=list)
    arrived: list[float] = field(default_factory=list)
    """When each step's message came, by the monotonic clock."""
    last_word: float = 0.0
    """When the last word came."""
    said_at: list[list[tuple[str, float, float | None]]] = field(default_factory=list)
    """What came with each step: words that began, with no end, and words that ended."""
    sent: list[float] = field(default_factory=list)
    """When each chunk was sent; of live sound, when it was due."""

    @property
    def text(self) -> list[str]:
        return [text for text, _, _ in self.words]


@contextlib.contextmanager
def serving(command: Sequence[str], port: int, log: Path, env: dict[str, str] | None = None) -> Iterator[str]:
    """Run a server until the block ends; gives its address once it accepts connections.

    Raises RuntimeError when it does not.
    """
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env={**os.environ, **(env or {})})
    try:
        deadline = time.monotonic() + 180
        while True:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{command[0]} does not answer: {log.read_text(errors='replace')[-2_000:]}")
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            time.sleep(0.1)
        yield f"ws://127.0.0.1:{port}/api/asr-streaming"
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def our_server(config: str, folder: Path, *, options: Sequence[str] = (), emulated: str = "") -> Iterator[str]:
    """`moshi-stt worker` with a configuration. emulated: a precision that `training.emulate` has."""
    port = free_port()
    command = [
        sys.executable,
        "-m",
        *(("training.emulate", emulated) if emulated else ("moshi_stt",)),
        "worker",
        "--addr",
        "127.0.0.1",
        "--port",
        str(port),
        "--config",
        config,
        *options,
    ]
    log = folder / "moshi-stt.log"
    with serving(command, port, log) as url:
        wait = [sys.executable, "-m", "moshi_stt", "status", "--url", f"http://127.0.0.1:{port}", "--wait", str(READY_SECONDS)]
        if subprocess.run([*wait, "--quiet"], timeout=READY_SECONDS + 60).returncode:  # it accepts connections while it loads
            raise RuntimeError(f"the server is not ready after {READY_SECONDS} s: {log.read_text(errors='replace')[-2_000:]}")
        yield url


@contextlib.contextmanager
def moshi_server(config: Path, folder: Path) -> Iterator[str]:
    """moshi-server on the CPU. Raises FileNotFoundError where it is not installed."""
    program = shutil.which("moshi-server-rust") or _rust_server()
    port = free_port()
    command = [program, "worker", "--addr", "127.0.0.1", "--port", str(port), "--cpu", "--config", str(config)]
    with serving(command, port, folder / "moshi-server.log") as url:
        yield url


def _rust_server() -> str:
    """Kyutai's program; this package installs a command of the same name."""
    for folder in [*os.environ.get("PATH", "").split(os.pathsep), str(Path.home() / ".cargo" / "bin")]:
        path = Path(folder) / "moshi-server"
        if path.is_file() and path.read_bytes()[:4] == b"\x7fELF":
            return str(path)
    raise FileNotFoundError("moshi-server (the program in Rust) is not on PATH: cargo install moshi-server")


async def send(
    url: str,
    samples: NDArray[np.float32],
    *,
    chunk: int = FRAME,
    live: bool = False,
    key: str = "public_token",
    headroom: int = 25,
) -> Session:
    """Stream a recording and some silence; returns once every frame was answered.

    live: one chunk at its time. Otherwise as fast as the server steps, `headroom` frames ahead at most.
    Raises RuntimeError where the server ends the stream before that.
    """
    padded = np.concatenate([samples, np.zeros(int(TAIL_SECONDS * RATE), np.float32)])
    frames = -(-len(padded) // FRAME)
    padded = np.pad(padded, (0, frames * FRAME - len(padded)))
    session = Session()
    answered = asyncio.Condition()
    timeout = aiohttp.ClientWSTimeout(ws_close=5)
    async with (
        aiohttp.ClientSession() as http,
        http.ws_connect(url, headers={"kyutai-api-key": key}, timeout=timeout) as socket_,
    ):

        async def receive() -> None:
            try:
                async for message in socket_:
                    _take(session, msgpack.unpackb(message.data))
                    async with answered:
                        answered.notify_all()
                    if len(session.pauses) >= frames:
                        return
                raise RuntimeError(f"the server closed the stream after {len(session.pauses)} of {frames} steps")
            finally:
                async with answered:
                    answered.notify_all()

        receiving = asyncio.create_task(receive())
        start = time.monotonic()
        for at in range(0, len(padded), chunk):
            if live:
                await asyncio.sleep(max(0.0, start + (at + chunk) / RATE - time.monotonic()))
            else:
                async with answered:
                    await answered.wait_for(lambda at=at: receiving.done() or at // FRAME - len(session.pauses) < headroom)
            if receiving.done():
                break
            pcm = padded[at : at + chunk]
            session.sent.append(start + (at + chunk) / RATE if live else time.monotonic())
            await socket_.send_bytes(encode_audio(pcm))
        await asyncio.wait_for(receiving, 120)
    return session


def _take(session: Session, message: dict[str, Any]) -> None:
    match message["type"]:
        case "Step":
            session.pauses.append(list(message["prs"]))
            session.said_at.append([])
            session.arrived.append(time.monotonic())
        case "Word":
            session.words.append((message["text"], message["start_time"], None))
            session.said_at[-1].append(session.words[-1])
            session.last_word = time.monotonic()
        case "EndWord" if session.words:
            text, start, _ = session.words[-1]
            session.words[-1] = (text, start, message["stop_time"])
            session.said_at[-1].append(session.words[-1])
        case "Error":
            raise RuntimeError(message["message"])


def ask(url: str, recordings: Sequence[NDArray[np.float32]], together: int = 4) -> list[Session]:
    """The sessions of several recordings, some at a time."""

    async def all_of_them() -> list[Session]:
        room = asyncio.Semaphore(together)

        async def one(samples: NDArray[np.float32]) -> Session:
            async with room:
                return await send(url, samples)

        return await asyncio.gather(*(one(samples) for samples in recordings))

    return asyncio.run(all_of_them())
