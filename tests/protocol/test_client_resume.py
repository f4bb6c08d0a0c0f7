"""The package's own client on connections that break: `resume=True` loses no word and repeats none."""

import asyncio
import random

import numpy as np
import pytest
from tests.support.scripted_engine import ScriptedEngine, counting
from tests.support.serving import DEADLINE, Running, serving

from moshi_stt.client import Client
from moshi_stt.errors import ServerError
from moshi_stt.events import Marker, Word


async def spoken(running: Running, breaks: int, seed: int = 1) -> list[str]:
    """Words up to the marker, while the server's side of the socket is cut now and then."""
    rng = random.Random(seed)
    words: list[str] = []
    async with asyncio.timeout(DEADLINE), Client(running.ws, resume=True) as client:

        async def send() -> None:
            for i in range(60):
                await client.send_audio(np.zeros(1920 * 2, np.float32))
                if i % 10 == 5 and i // 10 < breaks:
                    await asyncio.sleep(rng.choice([0.0, 0.05, 0.3]))
                    for connection in running.server.service.connections:
                        if connection._socket is not None:
                            connection._socket.abort()
            await client.mark(5)

        sending = asyncio.create_task(send())
        async for event in client:
            if isinstance(event, Word):
                words.append(event.text)
            elif isinstance(event, Marker):
                break
        await sending
    return words


@pytest.mark.parametrize("seed", range(4))
async def test_words_are_those_of_a_whole_connection(seed: int) -> None:
    async with serving(ScriptedEngine(counting(50), delay_frames=6), ping_seconds=0.4) as running:
        alone = await spoken(running, 0)
        assert alone == [f"w{i}" for i in range(50)]
        assert await spoken(running, 5, seed) == alone


async def test_a_stream_that_is_gone_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moshi_stt.client.RETRY_SECONDS", (0.0, 0.01))
    async with serving(ScriptedEngine(), resume_seconds=0.0) as running, Client(running.ws, resume=True) as client:
        events = aiter(client)
        await anext(events)
        for connection in running.server.service.connections:
            connection.abort()
        with pytest.raises(ServerError, match="the connection was lost"):
            await anext(events)


async def test_opus_cannot_be_resumed() -> None:
    async with serving(ScriptedEngine()) as running, Client(running.ws, resume=True) as client:
        with pytest.raises(ServerError, match="send_audio"):
            await client.send_opus(b"OggS")
