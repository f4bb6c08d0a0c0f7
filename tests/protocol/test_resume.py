"""Streams that outlive their socket: no word is lost or said twice, whatever breaks, in the main process and in workers."""

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest
from tests.support.level_speech import pause, say
from tests.support.raw_ws import BINARY, RawClient
from tests.support.scripted_engine import ScriptedEngine, counting
from tests.support.serving import DEADLINE, raw_request, serving, until
from tests.support.socket_processes import GAP, served

from moshi_stt.constants import DEFAULT_PATH
from moshi_stt.server.resume import REFUSED, Resumption

CHUNK = 1_000


class Resuming:
    """A client that comes back: it keeps what it sent, counts what came, and knows what was acknowledged."""

    def __init__(self, port: int, pcm: np.ndarray) -> None:
        self.port = port
        self.pcm = pcm.astype(np.float32)
        self.token: str | None = None
        self.acked = 0
        self.at = 0
        self.events: list[dict[str, Any]] = []
        self.client: RawClient
        self.marked = False

    async def connect(self) -> None:
        query = "resume=1"
        if self.token is not None:
            query = f"resume={self.token}&samples={self.acked}&events={len(self.events)}"
        self.client = await RawClient.connect(self.port, path=f"{DEFAULT_PATH}?{query}")
        ready = await self.client.receive_event()
        assert ready["type"] == "Ready", ready
        assert self.token in (None, ready["token"])
        self.token = ready["token"]
        self.at = self.acked
        self.marked = False

    def send(self, samples: int) -> None:
        end = min(len(self.pcm), self.at + samples)
        for start in range(self.at, end, CHUNK):
            self.client.audio(self.pcm[start : min(end, start + CHUNK)])
        self.at = end

    def mark(self) -> None:
        self.client.marker(7)
        self.marked = True

    def note(self, event: dict[str, Any]) -> None:
        if event["type"] == "Ack":
            self.acked = event["samples"]
        else:
            self.events.append(event)

    async def read_some(self, seconds: float) -> None:
        """Whatever comes in a while."""
        try:
            async with asyncio.timeout(seconds):
                while True:
                    self.note(await self.client.receive_event())
        except (TimeoutError, asyncio.IncompleteReadError, ConnectionError):
            pass

    async def read_to_marker(self) -> None:
        while not self.events or self.events[-1]["type"] != "Marker":
            self.note(await self.client.receive_event())


def words(events: list[dict[str, Any]]) -> list[str]:
    return [event["text"] for event in events if event["type"] == "Word"]


@asynccontextmanager
async def ports(kind: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[int]:
    """A server of levels, or of a count."""
    if kind == "workers":
        async with served(monkeypatch) as (running, _, _):
            yield running.port
    else:
        async with serving(ScriptedEngine(counting(60), delay_frames=6), ping_seconds=0.2) as running:
            yield running.port


@pytest.mark.parametrize("kind", ["main", "workers"])
@pytest.mark.parametrize("seed", range(6))
async def test_broken_sockets_cost_no_word(kind: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The socket is cut at any moment, by reset or by end-of-file, before and after acknowledgements: as a run alone."""
    rng = random.Random(seed)
    pcm = np.concatenate([say([3, 1, 2, 5, 4], gap=GAP), pause(0.5)]) if kind == "workers" else np.zeros(130 * 1920)
    async with ports(kind, monkeypatch) as port:
        alone = Resuming(port, pcm)
        await alone.connect()
        alone.send(len(pcm))
        alone.mark()
        await alone.read_to_marker()
        await alone.client.__aexit__()

        broken = Resuming(port, pcm)
        await broken.connect()
        for _ in range(6):
            broken.send(rng.randrange(0, len(pcm) // 4))
            if rng.random() < 0.5 and broken.at == len(pcm):
                broken.mark()
            await broken.client.drain()
            await broken.read_some(rng.choice([0.0, 0.02, 0.3]))
            if rng.random() < 0.5:
                broken.client.reset()
            else:
                broken.client.half_close()
                await broken.client.end_of_file()
                broken.client.writer.close()
            await broken.connect()
        broken.send(len(pcm))
        broken.mark()
        await broken.read_to_marker()
        await broken.client.__aexit__()
    assert words(broken.events) == words(alone.events)
    timed = [event for event in broken.events if event["type"] in ("Word", "EndWord")]
    assert timed == [event for event in alone.events if event["type"] in ("Word", "EndWord")]
    assert [event["id"] for event in broken.events if event["type"] == "Marker"] == [7]


async def test_client_that_comes_back_before_its_old_socket_is_known_dead() -> None:
    engine = ScriptedEngine(counting(20), delay_frames=6)
    async with serving(engine) as running:
        client = Resuming(running.port, np.zeros(60 * 1920))
        await client.connect()
        client.send(20 * 1920)
        await client.client.drain()
        old = client.client
        await client.connect()
        client.send(len(client.pcm))
        client.mark()
        await client.read_to_marker()
        assert words(client.events) == [f"w{i}" for i in range(20)]
        await old.end_of_file()
        assert engine.used_slots == 1
        await old.__aexit__()
        client.client.close()
        await client.client.rest()
        await client.client.__aexit__()


async def test_stream_whose_client_does_not_come_back_is_freed() -> None:
    """After `resume_seconds` its slot is free; who comes then is told to start anew, by a code of its own."""
    engine = ScriptedEngine(slots=1)
    async with serving(engine, resume_seconds=0.1, ping_seconds=0.2) as running:
        client = Resuming(running.port, np.zeros(1920))
        await client.connect()
        client.client.reset()
        await until(lambda: engine.used_slots == 0 and running.connections() == 0)
        path = f"{DEFAULT_PATH}?resume={client.token}&samples=0&events=0"
        async with await RawClient.connect(running.port, path=path) as late:
            events, code = await late.rest()
            assert (events[0]["type"], code) == ("Error", REFUSED)
        async with await RawClient.connect(running.port) as fresh:
            assert await fresh.receive_event() == {"type": "Ready"}


async def test_a_kept_stream_holds_its_slot_and_a_closed_one_does_not() -> None:
    engine = ScriptedEngine(slots=1)
    async with serving(engine, resume_seconds=DEADLINE) as running:
        client = Resuming(running.port, np.zeros(1920))
        await client.connect()
        client.client.reset()
        await until(lambda: running.server.service.connections.parked == 1)
        async with await RawClient.connect(running.port) as other:
            events, code = await other.rest()
            assert (events[-1]["message"], code) == ("no free channels", 1013)
        await client.connect()
        client.client.close()
        await client.client.rest()
        await until(lambda: engine.used_slots == 0)
        await client.client.__aexit__()


async def test_shutdown_does_not_wait_for_lost_clients() -> None:
    engine = ScriptedEngine(slots=1)
    async with serving(engine, resume_seconds=1_000.0) as running:
        client = Resuming(running.port, np.zeros(1920))
        await client.connect()
        client.client.reset()
        await until(lambda: running.server.service.connections.parked == 1)
        async with asyncio.timeout(DEADLINE):
            await running.server.drain(1_000.0)
    assert engine.used_slots == 0


async def test_bad_requests_are_said() -> None:
    async with serving(ScriptedEngine()) as running:
        request = (
            f"GET {DEFAULT_PATH}?resume=0-abc&samples=x HTTP/1.1\r\nHost: h\r\nConnection: upgrade\r\nUpgrade: websocket\r\n"
            "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nkyutai-api-key: public_token\r\n\r\n"
        )
        answer = await raw_request(running.port, request.encode())
        assert answer.status == 400
        assert b"samples=N and events=N" in answer.body
        client = Resuming(running.port, np.zeros(1920))
        await client.connect()
        client.client.reset()
        await until(lambda: running.server.service.connections.parked == 1)
        path = f"{DEFAULT_PATH}?resume={client.token}&samples=5000&events=0"
        async with await RawClient.connect(running.port, path=path) as ahead:
            events, code = await ahead.rest()
            assert "some would be missing" in events[-1]["message"]
            assert code == 1008


async def test_who_does_not_ask_sees_nothing_new() -> None:
    async with serving(ScriptedEngine(counting(2))) as running, await RawClient.connect(running.port) as client:
        assert await client.receive() == (BINARY, READY)
        client.silence(10 * 1920)
        client.marker(1)
        kinds = {event["type"] for event in await client.events_until("Marker")}
        assert "Ack" not in kinds


READY = bytes.fromhex("81a474797065a55265616479")


def test_messages_beyond_the_log_cannot_be_resumed() -> None:
    resumption = Resumption("0-x")
    resumption.sent([b"%d" % i for i in range(5_000)])
    assert resumption.missed(5_000) == []
    assert resumption.missed(4_998) == [b"4998", b"4999"]
    assert resumption.missed(10) is None
    assert resumption.missed(5_001) is None
