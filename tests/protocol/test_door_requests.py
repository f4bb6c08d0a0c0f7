"""Requests at the doors of other protocols: keys wherever clients put them, errors in each protocol's shape, options named."""

import asyncio
import base64
import io
import json
import wave
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import numpy as np
import pytest
from msgspec.structs import replace
from numpy.typing import NDArray
from tests.support.engines import SegmentKind
from tests.support.level_speech import pause, say
from tests.support.serving import KEY, Running, server_config, serving

from moshi_stt.constants import SAMPLE_RATE

DEADLINE = 60.0
SAMPLES = (np.concatenate([say([3, 9, 20]), pause(1.5)]) * 32_767).astype("<i2")
TEXT = "w3. w9. w20."


def wav(samples: NDArray[Any]) -> bytes:
    """samples: (S,) or (S, C)."""
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1 if samples.ndim == 1 else samples.shape[1])
        file.setsampwidth(2)
        file.setframerate(SAMPLE_RATE)
        file.writeframes(samples.astype("<i2").tobytes())
    return buffer.getvalue()


@pytest.fixture
async def keyed() -> AsyncIterator[Running]:
    """A server with a key of its own."""
    async with serving(SegmentKind().make(), replace(server_config(), authorized_ids=frozenset({"secret", KEY}))) as running:
        yield running


@pytest.fixture
async def private() -> AsyncIterator[Running]:
    """A server on this machine alone, with nothing but the public key."""
    async with serving(SegmentKind().make()) as running:
        yield running


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    async with asyncio.timeout(DEADLINE), aiohttp.ClientSession() as session:
        yield session


WAYS = (
    {"Authorization": "Bearer secret"},
    {"Authorization": "Token secret"},
    {"x-api-key": "secret"},
    {"kyutai-api-key": "secret"},
)
POSTS = ("/v1/listen", "/api/post/speech/asr")
SOCKETS = (
    "/v1/realtime",
    "/v1/listen?encoding=linear16&sample_rate=24000",
    "/v2/listen?encoding=linear16&sample_rate=24000",
    "/api/speech/asr",
)


async def test_a_key_counts_wherever_a_client_puts_it(keyed: Running, http: aiohttp.ClientSession) -> None:
    for headers in WAYS:
        assert (await http.get(f"{keyed.http}/v1/models", headers=headers)).status == 200
        for path in POSTS:
            assert (await http.post(f"{keyed.http}{path}", headers=headers, data=wav(SAMPLES))).status == 200
        for path in SOCKETS:
            async with http.ws_connect(f"ws://127.0.0.1:{keyed.port}{path}", headers=headers):
                pass
    for path, protocols, chosen in (
        ("/v1/realtime", ("realtime", "openai-insecure-api-key.secret"), "realtime"),
        ("/v1/listen", ("token", "secret"), "token"),
        ("/v2/listen", ("bearer", "secret"), "bearer"),
    ):
        async with http.ws_connect(f"ws://127.0.0.1:{keyed.port}{path}", protocols=protocols) as socket:
            assert socket.protocol == chosen
    async with http.ws_connect(f"ws://127.0.0.1:{keyed.port}/api/speech/asr?token=secret"):
        pass


async def test_a_wrong_key_is_refused_in_each_protocols_shape(keyed: Running, http: aiohttp.ClientSession) -> None:
    for headers in ({}, {"Authorization": "Bearer wrong"}):
        answer = await http.get(f"{keyed.http}/v1/models", headers=headers)
        assert answer.status == 401
        assert answer.headers["WWW-Authenticate"] == "Bearer"
        assert (await answer.json())["error"]["code"] == "invalid_api_key"
        answer = await http.post(f"{keyed.http}/v1/listen", headers=headers, data=wav(SAMPLES))
        assert answer.status == 401
        assert (await answer.json())["err_code"] == "INVALID_AUTH"
        answer = await http.post(f"{keyed.http}/api/post/speech/asr", headers=headers, data=wav(SAMPLES))
        assert answer.status == 401
        assert (await answer.text()).startswith("error from server 1008:")
        for path in SOCKETS:
            with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
                await http.ws_connect(f"ws://127.0.0.1:{keyed.port}{path}", headers=headers)
            assert refused.value.status == 401


async def test_any_key_or_none_on_this_machine_alone(private: Running, http: aiohttp.ClientSession) -> None:
    for headers in ({}, {"Authorization": "Bearer anything"}):
        assert (await http.get(f"{private.http}/v1/models", headers=headers)).status == 200
        assert (await http.post(f"{private.http}/v1/listen", headers=headers, data=wav(SAMPLES))).status == 200
    with pytest.raises(aiohttp.WSServerHandshakeError) as refused:  # but for the native door
        await http.ws_connect(private.ws)
    assert refused.value.status == 401


@pytest.mark.parametrize("path", SOCKETS)
async def test_pages_of_other_sites_are_turned_away(private: Running, http: aiohttp.ClientSession, path: str) -> None:
    with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
        await http.ws_connect(f"ws://127.0.0.1:{private.port}{path}", headers={"Origin": "https://example.com"})
    assert refused.value.status == 403


def form(**fields: str) -> aiohttp.FormData:
    made = aiohttp.FormData()
    for name, value in fields.items():
        made.add_field(name, value)
    made.add_field("file", wav(SAMPLES), filename="a.wav", content_type="audio/wav")
    return made


async def test_openai_errors(private: Running, http: aiohttp.ClientSession) -> None:
    url = f"{private.http}/v1/audio/transcriptions"
    for body, status, code, param in (
        (b"no form", 400, "invalid_value", None),
        (form(), 400, "missing_required_parameter", "model"),
        (form(model="nope"), 404, "model_not_found", "model"),
        (form(model="whisper-1", language="de"), 400, "invalid_value", "language"),
        (form(model="whisper-1", response_format="diarized_json"), 400, "invalid_value", "response_format"),
        (aiohttp.FormData({"model": "whisper-1"}, default_to_multipart=True), 400, "missing_required_parameter", "file"),
    ):
        answer = await http.post(url, data=body)
        error = (await answer.json())["error"]
        assert (answer.status, error["code"], error["param"]) == (status, code, param)
        assert set(error) == {"message", "type", "param", "code"}
    translation = await http.post(f"{private.http}/v1/audio/translations", data=form(model="whisper-1"))
    assert translation.status == 400
    assert (await translation.json())["error"]["code"] == "unsupported_operation"


async def test_options_that_do_nothing_are_named_and_counted(private: Running, http: aiohttp.ClientSession) -> None:
    openai = await http.post(
        f"{private.http}/v1/audio/transcriptions", data=form(model="whisper-1", prompt="x", temperature="0")
    )
    assert openai.headers["x-moshi-ignored"] == "prompt"
    deepgram = await http.post(f"{private.http}/v1/listen?diarize=true&keyterm=a&numerals=false", data=wav(SAMPLES))
    assert deepgram.headers["x-moshi-ignored"] == "diarize, keyterm"
    assert (await deepgram.json())["metadata"]["ignored_options"] == ["diarize", "keyterm"]
    counted = await (await http.get(f"{private.http}/metrics")).text()
    assert 'moshi_stt_ignored_options{door="deepgram-files",option="diarize"} 1' in counted
    assert (await http.post(f"{private.http}/v1/listen?redact=pci", data=wav(SAMPLES))).status == 400


async def test_unsupported_options_are_let_pass_where_configured(http: aiohttp.ClientSession) -> None:
    async with serving(SegmentKind().make(), ignore_unsupported=True) as running:
        answer = await http.post(f"{running.http}/v1/listen?redact=pci", data=wav(SAMPLES))
        assert answer.status == 200
        assert answer.headers["x-moshi-ignored"] == "redact"


async def test_deepgram_channels_and_bare_samples(private: Running, http: aiohttp.ClientSession) -> None:
    both = np.stack([SAMPLES, np.roll(SAMPLES, SAMPLE_RATE // 2)], axis=1)
    url = f"{private.http}/v1/listen?smart_format=true&utterances=true"
    for query, body in (
        ("&multichannel=true", wav(both)),
        (f"&multichannel=true&channels=2&encoding=linear16&sample_rate={SAMPLE_RATE}", both.tobytes()),
    ):
        shown = await (await http.post(url + query, data=body)).json()
        assert [channel["alternatives"][0]["transcript"] for channel in shown["results"]["channels"]] == [TEXT, TEXT]
        assert {utterance["channel"] for utterance in shown["results"]["utterances"]} == {0, 1}
        assert shown["metadata"]["channels"] == 2
    shown = await (await http.post(f"{url}&encoding=linear16&sample_rate={SAMPLE_RATE}", data=SAMPLES.tobytes())).json()
    assert shown["results"]["channels"][0]["alternatives"][0]["transcript"] == TEXT
    assert len(shown["metadata"]["sha256"]) == 64


async def test_gradium_bare_samples(private: Running, http: aiohttp.ClientSession) -> None:
    answer = await http.post(
        f"{private.http}/api/post/speech/asr", data=SAMPLES.tobytes(), headers={"Content-Type": "audio/pcm"}
    )
    lines = [json.loads(line) for line in (await answer.text()).splitlines()]
    assert " ".join(line["text"] for line in lines if line["type"] == "text") == TEXT


async def test_live_channels_need_a_slot_each(http: aiohttp.ClientSession) -> None:
    async with serving(SegmentKind().make()) as running:
        slots = running.server.service.served[0].engine.total_slots
        query = f"encoding=linear16&sample_rate=24000&multichannel=true&channels={slots + 1}"
        with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
            await http.ws_connect(f"ws://127.0.0.1:{running.port}/v1/listen?{query}")
        assert refused.value.status == 503


async def test_realtime_word_lists(private: Running, http: aiohttp.ClientSession) -> None:
    async with http.ws_connect(f"ws://127.0.0.1:{private.port}/v1/realtime?replace=w9:nine") as socket:
        await socket.send_json({"type": "session.update", "session": {"audio": {"input": {"turn_detection": None}}}})
        audio = base64.b64encode(SAMPLES.tobytes()).decode()
        await socket.send_json({"type": "input_audio_buffer.append", "audio": audio})
        await socket.send_json({"type": "input_audio_buffer.commit"})
        async for message in socket:
            event = json.loads(message.data)
            if event["type"].endswith("completed"):
                assert event["transcript"] == "w3. nine. w20."
                break
