"""Shutdown in the middle of calls: what was sent is recognised and given before the connection closes."""

import asyncio
from typing import Any

import aiohttp
import numpy as np
import pytest
from tests.support.level_speech import pause, say
from tests.support.raw_ws import RawClient
from tests.support.scripted_engine import ScriptedEngine, counting
from tests.support.serving import DEADLINE, serving, until
from tests.support.socket_processes import GAP, served, speech

from moshi_stt.server import connections


async def test_live_stream_goes_on_and_new_ones_are_refused() -> None:
    """`/ready` is red at once; a stream that goes on sending gets its marker, then closes by itself: nothing is lost."""
    engine = ScriptedEngine(counting(40), delay_frames=6)
    async with serving(engine) as running, await RawClient.connect(running.port) as client:
        assert (await client.receive_event())["type"] == "Ready"
        client.silence(20 * 1920)
        draining = asyncio.create_task(running.server.drain(DEADLINE))
        await until(lambda: running.server.service.stopping)
        async with aiohttp.ClientSession() as http:
            async with http.get(running.http + "/ready") as answer:
                assert answer.status == 503
            async with http.get(running.http + "/api/asr-streaming", headers=UPGRADE) as answer:
                assert (answer.status, await answer.text()) == (503, "the server is shutting down")
        client.silence(60 * 1920)
        client.marker(1)
        events = await client.events_until("Marker")
        assert [event["text"] for event in events if event["type"] == "Word"] == [f"w{i}" for i in range(40)]
        assert not draining.done()
        client.close()
        assert await client.rest() == ([], 1000)
        await asyncio.wait_for(draining, DEADLINE)


UPGRADE = {
    "Connection": "upgrade",
    "Upgrade": "websocket",
    "Sec-WebSocket-Version": "13",
    "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
    "kyutai-api-key": "public_token",
}


@pytest.mark.parametrize("drain_seconds", [0.0, 0.3])
async def test_what_was_sent_is_given_before_the_close(drain_seconds: float) -> None:
    """Without a marker, too: the words of what was sent come, then Error and 1001. The words of a run alone, none twice."""
    engine = ScriptedEngine(counting(30), delay_frames=6)
    async with serving(engine) as running:
        clients = [await RawClient.connect(running.port) for _ in range(2)]
        for client in clients:
            assert (await client.receive_event())["type"] == "Ready"
        engine.hold()
        for client in clients:
            client.silence(60 * 1920)
        await until(lambda: engine.queued_samples == 2 * 60 * 1920)
        draining = asyncio.create_task(running.server.drain(drain_seconds))
        await until(lambda: running.server.service.stopping)
        engine.release()
        for client in clients:
            events, code = await client.rest()
            assert [event["text"] for event in events if event["type"] == "Word"] == [f"w{i}" for i in range(30)]
            assert events[-1] == {"type": "Error", "message": "the server is shutting down: connect again"}
            assert code == 1001
            client.close(1001)
        await asyncio.wait_for(draining, DEADLINE)
        for client in clients:
            await client.__aexit__()
    assert engine.used_slots == 0


async def test_a_still_stream_does_not_hold_the_drain(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that has stopped sending is closed without waiting for `drain_seconds`."""
    monkeypatch.setattr(connections, "STILL_SECONDS", 0.05)
    async with serving(ScriptedEngine()) as running, await RawClient.connect(running.port) as client:
        assert (await client.receive_event())["type"] == "Ready"
        draining = asyncio.create_task(running.server.drain(1_000.0))
        events, code = await client.rest()
        assert (events[-1]["type"], code) == ("Error", 1001)
        client.close(1001)
        await asyncio.wait_for(draining, DEADLINE)


async def test_socket_processes_drain_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    async with served(monkeypatch) as (running, _, model):
        alone = await transcript(running.port, [3, 1, 2])
        clients = [await RawClient.connect(running.port) for _ in range(4)]
        for client in clients:
            assert (await client.receive_event())["type"] == "Ready"
            client.audio(speech([3, 1, 2]))
            await client.drain()
            while (await client.receive_event())["type"] != "Word":
                pass  # its audio has arrived
        draining = asyncio.create_task(running.server.drain(0.0))
        for client in clients:
            events, code = await client.rest()
            assert [event["text"] for event in events if event["type"] == "Word"] == alone[1:]
            assert (events[-1]["type"], code) == ("Error", 1001)
            client.close(1001)
        await asyncio.wait_for(draining, DEADLINE)
        for client in clients:
            await client.__aexit__()
        assert model.backend is not None


async def transcript(port: int, numbers: list[int]) -> list[Any]:
    """Words of a run alone."""
    async with await RawClient.connect(port) as client:
        client.audio(np.concatenate([say(numbers, gap=GAP), pause(0.5)]))
        client.marker(1)
        return [event["text"] for event in await client.events_until("Marker") if event["type"] == "Word"]
