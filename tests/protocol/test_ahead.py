"""A client may send as fast as it likes: its pings are answered while its audio waits, in memory and then on disk."""

import asyncio
import os
import threading
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pytest
from tests.support.raw_ws import BINARY, PING, PONG, RawClient, frame
from tests.support.scripted_engine import ScriptedEngine, counting
from tests.support.serving import DEADLINE, KEY, serving, until
from websockets.asyncio.client import connect
from websockets.sync.client import connect as sync_connect

from moshi_stt import protocol
from moshi_stt.engine.stream import StreamLimits
from moshi_stt.server import spool as spool_module
from moshi_stt.server import timers

MESSAGE = frame(BINARY, protocol.encode_audio(np.zeros(24_000, np.float32)))


@pytest.fixture(autouse=True)
def on_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool_module, "file_system", lambda folder: "ext4")


async def test_pings_are_answered_behind_minutes_of_audio(tmp_path: Path) -> None:
    """Ten minutes come while the model does nothing: a ping after them is answered, memory is bounded, nothing is lost."""
    engine = ScriptedEngine(counting(100), limits=StreamLimits(inbox_samples=48_000))
    async with serving(engine, spool_dir=str(tmp_path)) as running, await RawClient.connect(running.port) as client:
        assert (await client.receive_event())["type"] == "Ready"
        engine.hold()
        for _ in range(600):  # 72 MB
            client.write(MESSAGE)
            await client.drain()
        client.send(b"still there?", PING)
        while await client.receive() != (PONG, b"still there?"):
            pass
        (held,) = running.server.service.connections
        await until(lambda: held.held_bytes < 12_000_000, "what is held in memory")
        assert running.server.service.metrics.spooled_bytes > 50_000_000
        assert os.listdir(tmp_path) == []  # noqa: PTH208
        engine.release()
        client.marker(4)
        events = await client.events_until("Marker")
        assert [event["text"] for event in events if event["type"] == "Word"] == [f"w{i}" for i in range(100)]
        assert running.server.service.metrics.spooled_bytes == 0
    assert engine.samples == [600 * 24_000]


async def test_a_client_beyond_the_spool_is_told_the_setting(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its stream ends with an Error and 1008; another one, and the room that all share, are as before."""
    monkeypatch.setattr(timers, "FULL_SECONDS", 0.1)
    engine = ScriptedEngine(counting(3), limits=StreamLimits(inbox_samples=48_000))
    async with (
        serving(engine, spool_dir=str(tmp_path), spool_bytes=2_000_000, ping_seconds=0.2) as running,
        await RawClient.connect(running.port) as client,
        await RawClient.connect(running.port) as neighbour,
    ):
        for each in (client, neighbour):
            assert (await each.receive_event())["type"] == "Ready"
        engine.hold()
        for _ in range(100):
            client.write(MESSAGE)
        events, code = await client.rest()
        assert events[-1]["type"] == "Error"
        assert "spool_bytes" in events[-1]["message"]
        assert code == 1008
        client.reset()
        engine.release()
        neighbour.silence(20 * 1920)
        neighbour.marker(1)
        words = [event["text"] for event in await neighbour.events_until("Marker") if event["type"] == "Word"]
        assert words == ["w0", "w1", "w2"]
        await until(lambda: running.server.service.metrics.spooled_bytes == 0, "an empty spool")


async def test_disk_that_fails_ends_that_stream_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(spool_module.os, "pwrite", full)
    engine = ScriptedEngine(counting(3), limits=StreamLimits(inbox_samples=48_000))
    async with (
        serving(engine, spool_dir=str(tmp_path)) as running,
        await RawClient.connect(running.port) as client,
        await RawClient.connect(running.port) as neighbour,
    ):
        for each in (client, neighbour):
            assert (await each.receive_event())["type"] == "Ready"
        engine.hold()
        for _ in range(60):
            client.write(MESSAGE)
        events, code = await client.rest()
        assert "No space left on device" in events[-1]["message"]
        assert code == 1011
        client.reset()
        engine.release()
        neighbour.silence(20 * 1920)
        neighbour.marker(1)
        assert len([event for event in await neighbour.events_until("Marker") if event["type"] == "Word"]) == 3


async def test_a_client_with_a_heartbeat_survives_a_slow_model(tmp_path: Path) -> None:
    """aiohttp closes a socket whose ping is not answered in half of its heartbeat: here it never has to."""
    engine = ScriptedEngine(counting(5), limits=StreamLimits(inbox_samples=48_000))
    async with serving(engine, spool_dir=str(tmp_path)) as running, aiohttp.ClientSession() as http:
        engine.hold()
        async with http.ws_connect(running.ws, headers={"kyutai-api-key": KEY}, heartbeat=0.5, max_msg_size=0) as socket:
            reading = asyncio.create_task(words_until_marker(socket))
            for _ in range(200):
                await socket.send_bytes(protocol.encode_audio(np.zeros(24_000, np.float32)))
            await socket.send_bytes(protocol.encode_marker(1))
            await asyncio.wait((reading,), timeout=2.0)
            assert not reading.done(), "the connection was lost while the model did nothing"
            engine.release()
            assert await asyncio.wait_for(reading, DEADLINE) == 5


async def test_the_websockets_library_survives_a_slow_model(tmp_path: Path) -> None:
    """It cuts a connection whose ping is not answered in time (20 s by default, here 1 s): the answer never has to wait."""
    engine = ScriptedEngine(counting(5), limits=StreamLimits(inbox_samples=48_000))
    async with serving(engine, spool_dir=str(tmp_path)) as running:
        engine.hold()
        keepalive: Any = {"ping_interval": 0.3, "ping_timeout": 10.0, "max_size": None}
        async with connect(running.ws, additional_headers={"kyutai-api-key": KEY}, **keepalive) as client:
            for _ in range(300):  # five minutes
                await client.send(protocol.encode_audio(np.zeros(24_000, np.float32)))
            await client.send(protocol.encode_marker(1))
            latencies = [await asyncio.wait_for(await client.ping(), DEADLINE) for _ in range(3)]
            assert len(latencies) == 3
            engine.release()
            words = 0
            async for message in client:
                event = protocol.decode_event(bytes(message))
                words += type(event).__name__ == "Word"
                if type(event).__name__ == "Marker":
                    break
            assert words == 5


def in_thread(url: str, sent: threading.Event) -> int:
    """The same by the synchronous client."""
    with sync_connect(url, additional_headers={"kyutai-api-key": KEY}, ping_interval=0.3, ping_timeout=10.0) as client:
        for _ in range(300):
            client.send(protocol.encode_audio(np.zeros(24_000, np.float32)))
        client.send(protocol.encode_marker(1))
        assert client.ping().wait(DEADLINE)
        sent.set()
        words = 0
        for message in client:
            event = protocol.decode_event(bytes(message))
            words += type(event).__name__ == "Word"
            if type(event).__name__ == "Marker":
                return words
    return -1


async def test_the_synchronous_websockets_client_survives_a_slow_model(tmp_path: Path) -> None:
    engine = ScriptedEngine(counting(5), limits=StreamLimits(inbox_samples=48_000))
    async with serving(engine, spool_dir=str(tmp_path)) as running:
        engine.hold()
        sent = threading.Event()
        transcribing = asyncio.create_task(asyncio.to_thread(in_thread, running.ws, sent))
        await until(sent.is_set, "five minutes sent and a ping answered")
        engine.release()
        assert await asyncio.wait_for(transcribing, DEADLINE) == 5


async def words_until_marker(socket: aiohttp.ClientWebSocketResponse) -> int:
    words = 0
    async for message in socket:
        event = protocol.decode_event(message.data)
        words += type(event).__name__ == "Word"
        if type(event).__name__ == "Marker":
            return words
    return -1
