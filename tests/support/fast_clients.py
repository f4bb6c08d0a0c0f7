"""Clients that send a whole recording at once, by the libraries that people use, each with its own default keepalive."""

import asyncio
import os
import shutil
import tempfile
import threading
from collections.abc import Awaitable, Callable, Iterable, Sequence
from pathlib import Path

import aiohttp
from tests.support.serving import KEY
from websockets.asyncio.client import connect
from websockets.sync.client import connect as sync_connect

from moshi_stt import protocol
from moshi_stt.events import AnyEvent, Marker

LAST = protocol.encode_marker(77)
"""Sent after the recording; the server answers with the same bytes."""

HEADERS = {"kyutai-api-key": KEY}
NODE_MODULES = "MOSHI_STT_NODE_MODULES"
"""Environment variable: a folder in which `npm install ws` was run."""


class LostConnection(AssertionError):
    """The connection ended before the marker came back."""


def _events(messages: Iterable[bytes]) -> list[AnyEvent]:
    events = [protocol.decode_event(message) for message in messages]
    if not events or not isinstance(events[-1], Marker):
        raise LostConnection(f"the connection ended after {events[-3:]}")
    return events


async def by_websockets(url: str, messages: Sequence[bytes]) -> list[AnyEvent]:
    async with connect(url, additional_headers=HEADERS) as socket:

        async def send() -> None:
            for message in (*messages, LAST):
                await socket.send(message)

        sending = asyncio.create_task(send())
        answers: list[bytes] = []
        while not answers or answers[-1] != LAST:
            answers.append(bytes(await socket.recv()))  # type: ignore[arg-type]
        await sending
    return _events(answers)


async def by_synchronous_websockets(url: str, messages: Sequence[bytes]) -> list[AnyEvent]:
    def talk() -> list[bytes]:
        with sync_connect(url, additional_headers=HEADERS) as socket:
            sending = threading.Thread(target=lambda: [socket.send(message) for message in (*messages, LAST)])
            sending.start()
            answers: list[bytes] = []
            while not answers or answers[-1] != LAST:
                answers.append(bytes(socket.recv()))  # type: ignore[arg-type]
            sending.join()
        return answers

    return _events(await asyncio.to_thread(talk))


async def _by_aiohttp(url: str, messages: Sequence[bytes], heartbeat: float | None) -> list[AnyEvent]:
    async with (
        aiohttp.ClientSession() as http,
        http.ws_connect(url, headers=HEADERS, heartbeat=heartbeat, max_msg_size=0) as socket,
    ):

        async def send() -> None:
            for message in (*messages, LAST):
                await socket.send_bytes(message)

        sending = asyncio.create_task(send())
        answers: list[bytes] = []
        async for message in socket:
            answers.append(message.data)
            if message.data == LAST:
                break
        await sending
    return _events(answers)


async def by_aiohttp(url: str, messages: Sequence[bytes]) -> list[AnyEvent]:
    return await _by_aiohttp(url, messages, None)


async def by_aiohttp_with_heartbeat(url: str, messages: Sequence[bytes]) -> list[AnyEvent]:
    """It closes the socket where a ping is not answered in half of this."""
    return await _by_aiohttp(url, messages, 20.0)


async def by_node(url: str, messages: Sequence[bytes]) -> list[AnyEvent]:
    with tempfile.NamedTemporaryFile(suffix=".messages") as file:
        for message in (*messages, LAST):
            file.write(len(message).to_bytes(4, "little") + message)
        file.flush()
        script = Path(__file__).with_name("fast_client.mjs")
        command = ("node", str(script), os.environ[NODE_MODULES], url, KEY, file.name, LAST.hex())
        process = await asyncio.create_subprocess_exec(
            *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, limit=1 << 24
        )
        output, errors = await process.communicate()
    if process.returncode:
        raise LostConnection(f"Node's client: {errors.decode()}")
    return _events(map(bytes.fromhex, output.decode().split()))


FastClient = Callable[[str, Sequence[bytes]], Awaitable[list[AnyEvent]]]
"""Sends these messages and LAST to a URL as fast as it can; what the server said. Raises where the connection ends early."""


def fast_clients() -> dict[str, FastClient]:
    """By name; Node's where Node and `ws` are there."""
    clients: dict[str, FastClient] = {
        "websockets": by_websockets,
        "websockets, synchronous": by_synchronous_websockets,
        "aiohttp": by_aiohttp,
        "aiohttp with heartbeat": by_aiohttp_with_heartbeat,
    }
    if NODE_MODULES in os.environ and shutil.which("node"):
        clients["ws of Node"] = by_node
    return clients
