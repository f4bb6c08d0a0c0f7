"""The openai package, unchanged, against this server."""

import asyncio
import base64
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tests.clients.conftest import DEADLINE, SAID, bare

openai = pytest.importorskip("openai", reason="the package openai is not installed: pip install -e '.[clients]'")


@pytest.fixture
async def client(http: str) -> Any:
    async with openai.AsyncOpenAI(base_url=f"{http}/v1", api_key="local", max_retries=0, timeout=DEADLINE) as made:
        yield made


async def test_every_format(client: Any, recording: bytes) -> None:
    file = ("a.wav", recording, "audio/wav")
    create = client.audio.transcriptions.create
    plain = await create(file=file, model="whisper-1", include=["logprobs"])
    assert bare(plain.text) == SAID
    assert "".join(each.token for each in plain.logprobs) == plain.text
    text = await create(file=file, model="whisper-1", response_format="text")
    assert text == f"{plain.text}\n"
    verbose = await create(
        file=file, model="whisper-1", response_format="verbose_json", timestamp_granularities=["word", "segment"]
    )
    assert verbose.language == "english"
    assert " ".join(word.word for word in verbose.words) == plain.text
    assert all(word.start < word.end <= verbose.duration for word in verbose.words)
    assert "".join(segment.text for segment in verbose.segments).strip() == plain.text
    bare_verbose = await create(file=file, model="whisper-1", response_format="verbose_json")
    assert bare_verbose.segments
    assert bare_verbose.words is None
    srt = await create(file=file, model="whisper-1", response_format="srt")
    assert srt.startswith("1\n00:00:0")
    vtt = await create(file=file, model="whisper-1", response_format="vtt")
    assert vtt.startswith("WEBVTT\n\n00:00:0")


async def test_streamed(client: Any, recording: bytes) -> None:
    file = ("a.wav", recording, "audio/wav")
    stream = await client.audio.transcriptions.create(file=file, model="gpt-4o-transcribe", stream=True)
    events = [event async for event in stream]
    assert [event.type for event in events].count("transcript.text.done") == 1
    assert events[-1].type == "transcript.text.done"
    assert "".join(event.delta for event in events[:-1]) == events[-1].text
    assert bare(events[-1].text) == SAID


async def test_models_and_errors(client: Any, recording: bytes) -> None:
    assert "whisper-1" in [model.id async for model in client.models.list()]
    assert (await client.models.retrieve("whisper-1")).id == "whisper-1"
    file = ("a.wav", recording, "audio/wav")
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        await client.models.retrieve("nope")
    with pytest.raises(openai.NotFoundError) as missing:
        await client.audio.transcriptions.create(file=file, model="nope")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as bad:
        await client.audio.transcriptions.create(file=("a.wav", b"no audio", "audio/wav"), model="whisper-1")
    assert bad.value.param == "file"
    with pytest.raises(openai.BadRequestError) as language:
        await client.audio.transcriptions.create(file=file, model="whisper-1", language="de")
    assert language.value.param == "language"
    with pytest.raises(openai.BadRequestError) as translation:
        await client.audio.translations.create(file=file, model="whisper-1")
    assert translation.value.code == "unsupported_operation"


@pytest.mark.parametrize("detection", [None, {"type": "server_vad", "silence_duration_ms": 800}, {"type": "semantic_vad"}])
async def test_realtime(client: Any, pcm24: NDArray[np.int16], detection: dict[str, Any] | None) -> None:
    audio = {
        "format": {"type": "audio/pcm", "rate": 24_000},
        "transcription": {"model": "whisper-1"},
        "turn_detection": detection,
    }
    async with asyncio.timeout(DEADLINE), client.realtime.connect(extra_query={"intent": "transcription"}) as connection:
        await connection.session.update(session={"type": "transcription", "audio": {"input": audio}})
        samples = np.concatenate([pcm24, np.zeros(72_000, np.int16)])
        for start in range(0, len(samples), 2_400):
            piece = base64.b64encode(samples[start : start + 2_400].tobytes()).decode()
            await connection.input_audio_buffer.append(audio=piece)
        if detection is None:
            await connection.input_audio_buffer.commit()
        deltas: dict[str, str] = {}
        finals: list[str] = []
        async for event in connection:
            assert event.type != "error", event
            if event.type.endswith("transcription.delta"):
                deltas[event.item_id] = deltas.get(event.item_id, "") + event.delta
            elif event.type.endswith("transcription.completed"):
                assert deltas.get(event.item_id, "") == event.transcript
                finals.append(event.transcript)
                if len(bare(" ".join(finals)).split()) >= len(SAID.split()):
                    break
    assert bare(" ".join(finals)) == SAID
