"""A server admits as many streams of the embedded model as it measured, and `/ready` follows."""

import aiohttp
import pytest
from tests.support.level_speech import LevelRecogniser
from tests.support.serving import serving, until

from moshi_stt.client import Client
from moshi_stt.engine import segment
from moshi_stt.engine.segment import SegmentEngine
from moshi_stt.errors import ServerError


async def test_ready_says_how_many_streams_were_measured_and_turns_red_when_they_are_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(segment, "measure", lambda *_: 0.3)
    engine = SegmentEngine(LevelRecogniser, slots=None, threads=1)
    async with serving(engine) as running, aiohttp.ClientSession() as http:
        async with http.get(f"{running.http}/ready") as answer:
            assert answer.status == 200
            assert (await answer.json())["modules"]["asr"] == {"used_slots": 0, "total_slots": 3}
        clients = [await Client.connect(running.ws) for _ in range(3)]
        await until(lambda: engine.used_slots == 3)
        async with http.get(f"{running.http}/ready") as answer:
            assert answer.status == 503
        async with Client(running.ws) as another:
            with pytest.raises(ServerError, match="no free channels"):
                async for _ in another:
                    pass
        for client in clients:
            await client.close()
        await until(lambda: engine.used_slots == 0)
        async with http.get(f"{running.http}/ready") as answer:
            assert answer.status == 200
