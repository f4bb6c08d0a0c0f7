"""Whom the server serves: origins of pages, wrong keys, and limits of keys and addresses."""

import asyncio
import logging
import os

import aiohttp
import pytest
from tests.support.raw_ws import RawClient
from tests.support.scripted_engine import ScriptedEngine
from tests.support.serving import DEADLINE, KEY, Running, raw_request, serving, until

from moshi_stt.server import descriptors, gate

UPGRADE = (
    "GET /api/asr-streaming HTTP/1.1\r\nHost: localhost\r\nConnection: upgrade\r\nUpgrade: websocket\r\n"
    "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nkyutai-api-key: {key}\r\n{extra}\r\n"
)
POST = "POST /api/asr-streaming HTTP/1.1\r\nHost: localhost\r\nkyutai-api-key: {key}\r\nContent-Length: 3\r\n{extra}\r\nabc"


async def status(running: Running, request: str, key: str = KEY, extra: str = "") -> int:
    return (await raw_request(running.port, request.format(key=key, extra=extra).encode())).status


def refused(running: Running, reason: str) -> float:
    value = running.server.service.metrics.registry.get_sample_value("moshi_stt_refused_total", {"reason": reason})
    return value or 0.0


@pytest.mark.parametrize("request_", [UPGRADE, POST], ids=["websocket", "post"])
async def test_foreign_page_is_refused_whatever_its_key(request_: str, caplog: pytest.LogCaptureFixture) -> None:
    """403, counted, and the log names the setting and the value to add, once a minute for each page."""
    async with serving(ScriptedEngine()) as running:
        for _ in range(3):
            assert await status(running, request_, extra="Origin: https://evil.example\r\n") == 403
        assert refused(running, "origin") == 3
        assert await status(running, request_, extra="Origin: http://localhost:3000\r\n") != 403
        assert await status(running, request_) != 403
    lines = [record.getMessage() for record in caplog.records if "evil.example" in record.getMessage()]
    assert len(lines) == 1
    assert 'allowed_origins = ["https://evil.example"]' in lines[0]


async def test_listed_page_gets_cors_headers_and_others_none() -> None:
    async with (
        serving(ScriptedEngine(), allowed_origins=("https://captions.example.org",)) as running,
        aiohttp.ClientSession() as http,
    ):
        url = running.http + "/api/asr-streaming"
        listed = {"Origin": "https://captions.example.org", "Access-Control-Request-Method": "POST"}
        async with http.options(url, headers=listed) as answer:
            assert answer.status == 204
            assert answer.headers["Access-Control-Allow-Origin"] == "https://captions.example.org"
            assert "kyutai-api-key" in answer.headers["Access-Control-Allow-Headers"].lower()
        async with http.get(running.http + "/api/modules_info", headers=listed) as answer:
            assert answer.headers["Access-Control-Allow-Origin"] == "https://captions.example.org"
            assert "Origin" in answer.headers["Vary"]
        other = listed | {"Origin": "http://localhost:3000"}
        async with http.options(url, headers=other) as answer:
            assert answer.status == 405
            assert "Access-Control-Allow-Origin" not in answer.headers
        async with http.get(running.http + "/api/modules_info", headers=other) as answer:
            assert "Access-Control-Allow-Origin" not in answer.headers


async def test_wrong_keys_are_slowed_and_logged_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """While many wrong keys of an address wait for their answer, further requests of it are 429; a right key passes at once."""
    monkeypatch.setattr(gate, "WRONG_KEYS_AT_ONCE", 4)
    waiting = asyncio.Event()

    async def hold(seconds: float) -> None:
        assert seconds == gate.WRONG_KEY_SECONDS
        await waiting.wait()

    async with serving(ScriptedEngine()) as running:
        monkeypatch.setattr(running.server.service.gate, "_pause", hold)
        guesses = [asyncio.create_task(status(running, UPGRADE, key=f"guess{i}")) for i in range(3)]
        async with asyncio.timeout(DEADLINE), await RawClient.connect(running.port) as client:
            assert (await client.receive_event())["type"] == "Ready"
            await until(lambda: refused(running, "key") == 3)
            guesses.append(asyncio.create_task(status(running, UPGRADE, key="guess3")))
            await until(lambda: refused(running, "key") == 4)
            assert await status(running, UPGRADE, key="guess4") == 429
            waiting.set()
            assert await asyncio.gather(*guesses) == [401] * 4
    lines = [record for record in caplog.records if "wrong or missing API key" in record.getMessage()]
    assert len(lines) == 1
    assert lines[0].levelno == logging.WARNING
    assert not any("guess" in record.getMessage() for record in caplog.records)


async def test_streams_of_one_key_and_connections_of_one_address_are_limited() -> None:
    """429 beyond the limit; a place is free again when its connection is gone."""
    for limits, reason in (({"streams_per_key": 2}, "key_limit"), ({"connections_per_address": 2}, "address_limit")):
        async with serving(ScriptedEngine(slots=8), **limits) as running:
            clients = [await RawClient.connect(running.port) for _ in range(2)]
            for client in clients:
                assert (await client.receive_event())["type"] == "Ready"
            assert await status(running, UPGRADE) == 429
            assert refused(running, reason) == 1
            clients[0].close()
            await clients[0].rest()
            await clients[0].end_of_file()
            await until(lambda: running.connections() == 1)
            assert await status(running, UPGRADE) == 101
            for client in clients:
                await client.__aexit__()


async def test_without_free_descriptors_clients_are_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """They get 503 and a line is logged, while the connections that are open go on; afterwards all is as before."""
    async with serving(ScriptedEngine()) as running, await RawClient.connect(running.port) as client:
        assert (await client.receive_event())["type"] == "Ready"
        held = [os.open(os.devnull, os.O_RDONLY) for _ in range(50)]
        monkeypatch.setattr(descriptors, "soft_limit", lambda: min(held) + descriptors.RESERVE)
        try:
            for _ in range(5):
                assert await status(running, UPGRADE) == 503
            client.marker(3)
            assert (await client.events_until("Marker"))[-1]["id"] == 3
        finally:
            for each in held:
                os.close(each)
        monkeypatch.setattr(descriptors, "soft_limit", lambda: 1 << 20)
        assert await status(running, UPGRADE) == 101
        assert refused(running, "descriptors") == 5
    assert len([record for record in caplog.records if "file descriptors are used up" in record.getMessage()]) == 1
