"""Protocols on TCP ports of their own: clients that come before the model, that break the framing, and that say nothing."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator

import numpy as np
import pytest
from msgspec.structs import replace
from tests.support.engines import Kind, SegmentKind
from tests.support.level_speech import pause, say
from tests.support.serving import DEADLINE, Running, server_config, serving, until

from moshi_stt.config import LimitsConfig, WyomingConfig
from moshi_stt.server import descriptors
from moshi_stt.server.app import Server

CONFIG = replace(server_config(), wyoming=WyomingConfig(uri="tcp://127.0.0.1:0"))
DESCRIBE = b'{"type": "describe"}\n'


async def read_event(reader: asyncio.StreamReader) -> tuple[str, dict[str, object]]:
    head = json.loads(await asyncio.wait_for(reader.readline(), DEADLINE))
    data = json.loads(await reader.readexactly(head["data_length"])) if head.get("data_length") else {}
    return head["type"], data


def chunk(samples: "np.ndarray[tuple[int], np.dtype[np.float32]]") -> bytes:
    data = json.dumps({"rate": 24_000, "width": 2, "channels": 1}).encode()
    payload = (samples * 32_767).astype("<i2").tobytes()
    return (
        json.dumps({"type": "audio-chunk", "data_length": len(data), "payload_length": len(payload)}).encode()
        + b"\n"
        + data
        + payload
    )


@pytest.fixture(params=[SegmentKind], ids=["segment"])
def kind(request: pytest.FixtureRequest) -> Kind:
    made: Kind = request.param()
    return made


@pytest.fixture
async def running(kind: Kind) -> AsyncIterator[Running]:
    async with serving(kind.make(), CONFIG) as there:
        yield there


def port(running: Running) -> int:
    return running.server.listeners.ports["wyoming"]


async def test_a_client_that_comes_before_the_model_is_answered_when_it_is_there(
    kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, go = kind.make(), asyncio.Event()
    start = engine.start

    async def start_late() -> None:
        await go.wait()
        await start()

    monkeypatch.setattr(engine, "start", start_late)
    server = Server(CONFIG, {"asr": engine}, "127.0.0.1", 0)
    starting = asyncio.create_task(server.start())
    try:
        await until(lambda: "wyoming" in server.listeners.ports, "the port")
        reader, writer = await asyncio.open_connection("127.0.0.1", server.listeners.ports["wyoming"])
        writer.write(DESCRIBE)
        await writer.drain()
        await until(lambda: server.service.metrics.connects._value.get() == 1, "the connection")
        go.set()
        await starting
        name, data = await read_event(reader)
        assert name == "info"
        assert data["asr"][0]["models"][0]["languages"] == ["en"]  # type: ignore[index]
        writer.close()
        await writer.wait_closed()
    finally:
        go.set()
        await server.stop()


async def test_a_broken_event_is_told_and_the_others_go_on(running: Running) -> None:
    good_reader, good = await asyncio.open_connection("127.0.0.1", port(running))
    for data in (
        b"nonsense\n",
        b'{"type": "audio-chunk", "data_length": 99999999}\n',
        b'{"type": "audio-chunk"}\n',
        b"\x00" * 2_000_000,
    ):
        reader, writer = await asyncio.open_connection("127.0.0.1", port(running))
        writer.write(chunk(say([3])) + data)
        events = []
        with contextlib.suppress(ConnectionResetError):  # what is not read any more resets the connection
            while line := await asyncio.wait_for(reader.readline(), DEADLINE):
                head = json.loads(line)
                await reader.readexactly(head.get("data_length", 0))
                events.append(head["type"])
        assert events[-1:] == ["error"] or len(data) > 1_000_000, data[:40]
        writer.close()
    good.write(chunk(np.concatenate([say([3, 9]), pause(0.5)])) + b'{"type": "audio-stop"}\n')
    while (event := await read_event(good_reader))[0] != "transcript":
        pass
    assert event[1]["text"] == "w3. w9."
    good.close()
    await until(lambda: running.connections() == 0, "every connection gone")
    assert running.server.service.served[0].engine.used_slots == 0


async def test_clients_that_vanish_leave_no_slot_behind(running: Running) -> None:
    for ending in ("reset", "close", "half"):
        reader, writer = await asyncio.open_connection("127.0.0.1", port(running))
        writer.write(chunk(say([3, 9])))
        await writer.drain()
        if ending == "reset":
            writer.transport.abort()
        elif ending == "half":
            writer.write_eof()
            await asyncio.wait_for(reader.read(), DEADLINE)
        writer.close()
    engine = running.server.service.served[0].engine
    await until(lambda: running.connections() == 0 and engine.used_slots == 0, "every connection gone and every slot free")


async def error_of(running: Running) -> str:
    """What a new client is told at once, before the server closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port(running))
    name, data = await read_event(reader)
    assert name == "error"
    assert await asyncio.wait_for(reader.read(), DEADLINE) == b""
    writer.close()
    await writer.wait_closed()
    return str(data["text"])


async def test_what_is_limited_at_other_doors_is_limited_here(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    """Connections of an address, descriptors, and new streams in the middle of a shutdown."""
    config = replace(CONFIG, limits=LimitsConfig(connections_per_address=1))
    async with serving(kind.make(), config) as running:
        reader, writer = await asyncio.open_connection("127.0.0.1", port(running))
        writer.write(DESCRIBE)
        assert (await read_event(reader))[0] == "info"
        assert "connections_per_address" in await error_of(running)
        writer.close()
        await writer.wait_closed()
        await until(lambda: running.connections() == 0, "every connection gone")
        monkeypatch.setattr(descriptors, "soft_limit", lambda: 0)
        assert "files and sockets" in await error_of(running)
        monkeypatch.setattr(descriptors, "soft_limit", lambda: None)
        running.server.service.stopping = True
        assert "shutting down" in await error_of(running)


async def test_a_stream_that_has_lasted_long_enough_is_told(kind: Kind) -> None:
    async with serving(kind.make(), replace(CONFIG, limits=LimitsConfig(stream_seconds=1_000.0))) as running:
        reader, writer = await asyncio.open_connection("127.0.0.1", port(running))
        writer.write(chunk(say([3, 9])))
        await until(lambda: any(each.tally.samples for each in running.server.service.connections), "the audio")
        (connection,) = running.server.service.connections
        connection.tick(asyncio.get_running_loop().time() + 1_001)
        events = []
        while not events or events[-1][0] != "error":
            events.append(await read_event(reader))
        assert "stream_seconds" in str(events[-1][1]["text"])
        writer.close()
        await writer.wait_closed()
