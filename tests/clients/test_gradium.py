"""The gradium package, unchanged, against this server."""

import asyncio
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tests.clients.conftest import DEADLINE, SAID, bare

gradium = pytest.importorskip("gradium", reason="the package gradium is not installed: pip install -e '.[clients]'")


@pytest.fixture
def client(http: str) -> Any:
    return gradium.GradiumClient(base_url=f"{http}/api", api_key="local")


async def test_a_file_and_samples(client: Any, recording: bytes, pcm24: NDArray[np.int16]) -> None:
    async with asyncio.timeout(DEADLINE):
        from_file = await client.stt({"model_name": "default"}, recording)
        from_samples = await client.stt({"model_name": "default", "input_format": "pcm"}, pcm24, sample_rate=24_000)
    assert bare(from_file.text) == SAID
    assert bare(from_samples.text) == SAID


async def test_live(client: Any, pcm24: NDArray[np.int16]) -> None:
    async with asyncio.timeout(DEADLINE), client.stt_realtime(model_name="default", input_format="pcm") as stream:
        for start in range(0, len(pcm24), 1_920):
            await stream.send_audio(pcm24[start : start + 1_920])
        await stream.send_flush(7)
        await stream.send_eos()
        messages = [message async for message in stream]
    assert messages[0]["type"] == "ready"
    assert bare(" ".join(message["text"] for message in messages if message["type"] == "text")) == SAID
    steps = [message for message in messages if message["type"] == "step"]
    assert [message["step_idx"] for message in steps] == list(range(len(pcm24) // 1_920))
    assert [message["flush_id"] for message in messages if message["type"] == "flushed"] == [7]
    assert messages[-1]["type"] == "end_of_stream"


async def test_errors(client: Any, pcm24: NDArray[np.int16]) -> None:
    setup = {"model_name": "default", "input_format": "pcm", "json_config": {"language": "de"}}
    with pytest.raises(Exception, match="language 'de'"):
        await asyncio.wait_for(client.stt(setup, pcm24, sample_rate=24_000), DEADLINE)
