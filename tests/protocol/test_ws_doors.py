"""A protocol is a file and a line: one that exists in these tests alone is served like the native one, in every process."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable
from typing import Any

import aiohttp
import pytest
from tests.support.plain_door import PlainDoor
from tests.support.scripted_engine import ScriptedEngine, counting
from tests.support.serving import DEADLINE, KEY, Running, serving, until
from tests.support.socket_processes import lent, served

from moshi_stt.server.doors import DOORS

ALL = (*DOORS, PlainDoor())
"""With its registration."""

PATH = "/v0/plain?greeting=hi"
HEADERS = {"x-plain-key": KEY}


@pytest.fixture(params=["main process", pytest.param("socket processes", marks=pytest.mark.slow)])
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Any]:
    """A server whose WebSockets are carried there."""

    @contextlib.asynccontextmanager
    async def in_main() -> AsyncIterator[Running]:
        async with serving(ScriptedEngine(counting(1000), slots=3), doors=ALL) as running:
            yield running

    @contextlib.asynccontextmanager
    async def in_processes() -> AsyncIterator[Running]:
        async with served(monkeypatch, streams=3, doors=ALL) as (running, processes, _):
            yield running
            await until(lambda: lent(processes) == [0, 0], "giving back")

    if request.param == "main process":
        return in_main
    if not hasattr(socket, "send_fds"):
        pytest.skip("this system cannot hand sockets over")
    return in_processes


@contextlib.asynccontextmanager
async def plain(running: Running) -> AsyncIterator[aiohttp.ClientWebSocketResponse]:
    async with (
        asyncio.timeout(DEADLINE),
        aiohttp.ClientSession() as http,
        http.ws_connect(running.http + PATH, headers=HEADERS, protocols=["other", "plain"]) as client,
    ):
        assert await client.receive_str() == "hi"
        yield client


async def test_text_replies_errors_and_close_code(place: Callable[[], Any]) -> None:
    """Text frames, an answer at once, an error that leaves the connection open, and a close code of its own."""
    async with place() as running, plain(running) as client:
        assert client.protocol == "plain"
        assert client._response.headers["x-plain"] == "1"
        await client.send_str("say hello")
        assert await client.receive_str() == "hello"
        await client.send_str("nonsense")
        assert await client.receive_str() == "error: 'nonsense'"
        await client.send_bytes(b"x")
        assert await client.receive_str() == "error: b'x'"
        await client.send_str("bye now")
        message = await client.receive()
        assert (message.type, client.close_code, message.extra) == (aiohttp.WSMsgType.CLOSE, 4001, "now")


async def test_audio_marks_and_finish(place: Callable[[], Any]) -> None:
    """Commands reach the stream, its events the session; after `Finish` come the last words and Close."""
    async with place() as running, plain(running) as client:
        await client.send_str("audio " + bytes(4 * 19_200).hex())
        await client.send_str("mark 7")
        await client.send_str("finish")
        await client.send_str("say hello")  # after Finish: dropped
        lines = [message.data async for message in client]
    assert lines[-1] == "Marker 7"
    assert all(line.startswith("Word ") for line in lines[:-1])
    assert client.close_code == 4000


async def test_no_key_no_subprotocol_no_slot(place: Callable[[], Any]) -> None:
    """Each is told as the door says it, and so are clients of the native door."""
    async with place() as running, aiohttp.ClientSession() as http:
        for headers, protocols, status in (({}, ["plain"], 401), ({"kyutai-api-key": KEY}, ["plain"], 401), (HEADERS, [], 400)):
            with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
                await http.ws_connect(running.http + PATH, headers=headers, protocols=protocols)
            assert refused.value.status == status
        async with contextlib.AsyncExitStack() as stack:
            for _ in range(3):
                await stack.enter_async_context(plain(running))
            full = await stack.enter_async_context(http.ws_connect(running.http + PATH, headers=HEADERS, protocols=["plain"]))
            assert await full.receive_str() == "Error no free channels"
            assert (await full.receive()).data == 4011
            native = await stack.enter_async_context(http.ws_connect(running.ws, headers={"kyutai-api-key": KEY}))
            assert b"no free channels" in await native.receive_bytes()


async def test_a_failed_model_is_told_in_the_protocols_own_shape() -> None:
    engine = ScriptedEngine(counting(5))
    async with serving(engine, doors=ALL) as running, plain(running) as client:
        engine.fail_next("the device is gone")
        await client.send_str("audio " + bytes(4 * 1920).hex())
        lines = [message.data async for message in client]
    assert lines[-1].startswith("Error ")
    assert "the device is gone" in lines[-1]
    assert client.close_code == 4011
