"""The one line that the log has of a stream: counts and the reason of the end, and no word of what was said."""

import asyncio

import aiohttp
import pytest
from tests.support.raw_ws import RawClient
from tests.support.scripted_engine import ScriptedEngine, counting
from tests.support.serving import KEY, serving, until


async def test_one_line_for_each_stream(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    async with serving(ScriptedEngine(counting(7), delay_frames=2)) as running:
        extra = "X-Request-ID: call-4711\r\n"
        async with await RawClient.connect(running.port, extra=extra) as client:
            client.silence(25 * 1920)
            client.marker(1)
            await client.events_until("Marker")
            client.close()
            await client.rest()
        async with await RawClient.connect(running.port) as client:
            await client.receive_event()
            client.send(b"\xc1")
            await client.rest()
            client.close(1007)
        async with await RawClient.connect(running.port) as client:
            await client.receive_event()
            client.reset()
        await until(lambda: running.connections() == 0)
    lines = [record.getMessage() for record in caplog.records if ": ended: " in record.getMessage()]
    assert len(lines) == 3
    (said,) = [line for line in lines if "call-4711" in line]
    for part in ("door=kyutai", "audio_seconds=2.0", "words=7", "markers=1", "code=1000"):
        assert part in said
    assert any("code=1007" in line for line in lines)
    assert any("code=lost" in line for line in lines)
    assert not [record for record in caplog.records if any(f"w{i}" in record.getMessage().split() for i in range(7))]


async def test_a_post_answers_with_the_id_that_it_was_given() -> None:
    async with serving(ScriptedEngine()) as running, aiohttp.ClientSession() as http:
        for given, answered in (("job-1", "job-1"), ("no spaces please", None)):
            headers = {"kyutai-api-key": KEY, "X-Request-ID": given}
            async with http.post(running.http + "/api/asr-streaming", data=b"abc", headers=headers) as answer:
                assert answer.status == 400
                assert answered is None or answer.headers["X-Request-ID"] == answered
        await asyncio.sleep(0)
