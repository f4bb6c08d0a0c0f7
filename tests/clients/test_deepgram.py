"""The deepgram-sdk package, unchanged, against this server."""

import asyncio
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tests.clients.conftest import DEADLINE, SAID, bare

deepgram = pytest.importorskip("deepgram", reason="deepgram-sdk is not installed: pip install -e '.[clients]'")
httpx = pytest.importorskip("httpx")
events = pytest.importorskip("deepgram.core.events")
environments = pytest.importorskip("deepgram.environment")


@pytest.fixture
async def client(http: str, ws: str) -> Any:
    environment = environments.DeepgramClientEnvironment(
        base=http, production=ws, agent="ws://unused", agent_rest="http://unused"
    )
    async with httpx.AsyncClient(timeout=DEADLINE) as connections:  # the package closes none of its own
        yield deepgram.AsyncDeepgramClient(api_key="local", environment=environment, httpx_client=connections)


async def send(connection: Any, pcm24: NDArray[np.int16], silence_seconds: float) -> None:
    samples = np.concatenate([pcm24, np.zeros(round(24_000 * silence_seconds), np.int16)])
    for start in range(0, len(samples), 2_400):
        await connection.send_media(samples[start : start + 2_400].tobytes())


async def test_recorded(client: Any, recording: bytes) -> None:
    answer = await client.listen.v1.media.transcribe_file(request=recording, model="nova-3", smart_format=True, utterances=True)
    (alternative,) = answer.results.channels[0].alternatives
    assert bare(alternative.transcript) == SAID
    assert " ".join(word.word for word in alternative.words) == SAID
    assert len(answer.results.utterances) >= 2
    assert answer.metadata.duration == pytest.approx(9.96, abs=0.1)


async def test_live(client: Any, pcm24: NDArray[np.int16]) -> None:
    got: list[Any] = []
    async with (
        asyncio.timeout(DEADLINE),
        client.listen.v1.connect(
            model="nova-3",
            encoding="linear16",
            sample_rate=24_000,
            interim_results="true",
            smart_format="true",
            vad_events="true",
            utterance_end_ms="1000",
        ) as connection,
    ):
        connection.on(events.EventType.MESSAGE, got.append)
        listening = asyncio.create_task(connection.start_listening())
        await send(connection, pcm24, 2.0)
        await connection.send_keep_alive()
        await connection.send_finalize()
        await connection.send_close_stream()
        await listening
    results = [message for message in got if message.type == "Results"]
    finals = [message for message in results if message.is_final]
    text = " ".join(filter(None, (message.channel.alternatives[0].transcript for message in finals)))
    assert bare(text) == SAID
    assert any(not message.is_final for message in results)
    assert any(message.speech_final for message in finals)
    assert [message.from_finalize for message in finals].count(True) == 1
    assert {"SpeechStarted", "UtteranceEnd"} <= {message.type for message in got}
    assert got[-1].type == "Metadata"


async def test_turns(client: Any, pcm24: NDArray[np.int16]) -> None:
    got: list[Any] = []
    async with (
        asyncio.timeout(DEADLINE),
        client.listen.v2.connect(model="flux-general-en", encoding="linear16", sample_rate="24000") as connection,
    ):
        connection.on(events.EventType.MESSAGE, got.append)
        listening = asyncio.create_task(connection.start_listening())
        await send(connection, pcm24, 2.0)
        await connection.send_close_stream()
        await listening
    assert got[0].type == "Connected"
    turns = [message for message in got[1:] if message.event == "EndOfTurn"]
    assert bare(" ".join(message.transcript for message in turns)) == SAID
    assert [message.turn_index for message in turns] == list(range(len(turns)))


async def test_refused(client: Any, recording: bytes) -> None:
    with pytest.raises(deepgram.core.api_error.ApiError) as refused:
        await client.listen.v1.media.transcribe_file(request=recording, model="nova-3", redact="pci")
    assert refused.value.status_code == 400
