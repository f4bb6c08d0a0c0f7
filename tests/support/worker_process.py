"""`moshi-stt worker` in a process of its own, as users start it."""

import asyncio
import contextlib
import socket
import sys
from collections.abc import AsyncIterator

import aiohttp


@contextlib.asynccontextmanager
async def embedded_worker() -> AsyncIterator[tuple[int, int]]:
    """A server of the embedded model on a free port, ready: its port and process id. It ends with the block."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    command = (sys.executable, "-m", "moshi_stt", "worker", "--config", "embedded", "--addr", "127.0.0.1", "--port", str(port))
    quiet = asyncio.subprocess.DEVNULL
    process = await asyncio.create_subprocess_exec(*command, stdout=quiet, stderr=quiet)
    try:
        async with asyncio.timeout(120), aiohttp.ClientSession() as http:
            for _ in range(1_000):
                with contextlib.suppress(aiohttp.ClientError):
                    async with http.get(f"http://127.0.0.1:{port}/ready") as answer:
                        if answer.status == 200:
                            break
                await asyncio.sleep(0.1)
        yield port, process.pid
    finally:
        process.terminate()
        await process.wait()
