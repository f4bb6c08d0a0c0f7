"""Small clients of every protocol: a recording in, its words out, with times where the protocol has them."""

import asyncio
import base64
import json
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple

import aiohttp
from tests.support.serving import KEY, Running

CHUNK_SECONDS = 0.1
DEADLINE = 60.0


class Said(NamedTuple):
    """A word as a client saw it; None for a time that the protocol does not tell."""

    text: str
    start: float | None = None
    end: float | None = None


class Sound(NamedTuple):
    """Raw samples. encoding: linear16, mulaw or alaw."""

    data: bytes
    rate: int
    encoding: str = "linear16"

    def chunks(self) -> list[bytes]:
        size = round(CHUNK_SECONDS * self.rate) * (2 if self.encoding == "linear16" else 1)
        return [self.data[start : start + size] for start in range(0, len(self.data), size)]


def _words(text: str) -> list[Said]:
    return [Said(word) for word in text.split()]


async def openai_realtime(running: Running, sound: Sound) -> list[Said]:
    """One item, committed at the end."""
    kinds = {
        "linear16": {"type": "audio/pcm", "rate": sound.rate},
        "mulaw": {"type": "audio/pcmu"},
        "alaw": {"type": "audio/pcma"},
    }
    audio = {"format": kinds[sound.encoding], "turn_detection": None}
    async with _socket(running, "/v1/realtime?intent=transcription", Authorization=f"Bearer {KEY}") as socket:
        await socket.send_json({"type": "session.update", "session": {"type": "transcription", "audio": {"input": audio}}})

        async def send() -> None:
            for chunk in sound.chunks():
                await socket.send_json({"type": "input_audio_buffer.append", "audio": base64.b64encode(chunk).decode()})
            await socket.send_json({"type": "input_audio_buffer.commit"})

        sending = asyncio.create_task(send())
        text = ""
        async for message in socket:
            event = json.loads(message.data)
            assert event["type"] != "error", event
            if event["type"].endswith("transcription.delta"):
                text += event["delta"]
            elif event["type"].endswith("transcription.completed"):
                assert event["transcript"] == text
                break
        await sending
    return _words(text)


async def deepgram_live(running: Running, sound: Sound) -> list[Said]:
    query = f"encoding={sound.encoding}&sample_rate={sound.rate}&smart_format=true&endpointing=false&interim_results=true"
    async with _socket(running, f"/v1/listen?{query}", Authorization=f"Token {KEY}") as socket:
        messages = await _send_and_read(socket, sound, json.dumps({"type": "CloseStream"}))
        assert socket.close_code == 1000
    assert messages[-1]["type"] == "Metadata"
    finals = [m["channel"]["alternatives"][0]["words"] for m in messages if m["type"] == "Results" and m["is_final"]]
    return [Said(word["punctuated_word"], word["start"], word["end"]) for words in finals for word in words]


async def deepgram_turns(running: Running, sound: Sound) -> list[Said]:
    """One turn, ended by the end of the audio."""
    query = f"encoding={sound.encoding}&sample_rate={sound.rate}&eot_threshold=1.0&eot_timeout_ms=60000"
    async with _socket(running, f"/v2/listen?{query}", Authorization=f"Token {KEY}") as socket:
        messages = await _send_and_read(socket, sound, json.dumps({"type": "CloseStream"}))
        assert socket.close_code == 1000
    turns = [m["words"] for m in messages if m.get("event") == "EndOfTurn"]
    return [Said(word["word"], word["start"], word["end"]) for words in turns for word in words]


async def gradium_live(running: Running, sound: Sound) -> list[Said]:
    names = {"linear16": "pcm", "mulaw": "ulaw", "alaw": "alaw"}
    words: list[Said] = []
    async with _socket(running, "/api/speech/asr", **{"x-api-key": KEY}) as socket:
        await socket.send_json({"type": "setup", "input_format": f"{names[sound.encoding]}_{sound.rate}"})

        async def send() -> None:
            for chunk in sound.chunks():
                await socket.send_json({"type": "audio", "audio": base64.b64encode(chunk).decode()})
            await socket.send_json({"type": "end_of_stream"})

        sending = asyncio.create_task(send())
        async for message in socket:
            event = json.loads(message.data)
            assert event["type"] != "error", event
            if event["type"] == "text":
                words.append(Said(event["text"], event["start_s"]))
            elif event["type"] == "end_text":
                words[-1] = words[-1]._replace(end=event["stop_s"])
        await sending
        assert socket.close_code == 1000
    return words


async def wyoming_live(running: Running, sound: Sound) -> list[Said]:
    assert sound.encoding == "linear16"
    reader, writer = await asyncio.open_connection("127.0.0.1", running.server.listeners.ports["wyoming"])
    form = {"rate": sound.rate, "width": 2, "channels": 1}

    def event(kind: str, data: dict[str, Any], payload: bytes = b"") -> bytes:
        body = json.dumps(data).encode()
        head = {"type": kind, "data_length": len(body), "payload_length": len(payload)}
        return json.dumps(head).encode() + b"\n" + body + payload

    writer.write(event("audio-start", form))
    for chunk in sound.chunks():
        writer.write(event("audio-chunk", form, chunk))
        await writer.drain()
    writer.write(event("audio-stop", {}))
    text = ""
    async with asyncio.timeout(DEADLINE):
        while True:
            head = json.loads(await reader.readline())
            data = json.loads(await reader.readexactly(head["data_length"])) if head.get("data_length") else {}
            if head["type"] == "transcript-chunk":
                text += data["text"]
            elif head["type"] == "transcript":
                assert data["text"] == text
                break
    writer.close()
    await writer.wait_closed()
    return _words(text)


LIVE: dict[str, Callable[[Running, Sound], Awaitable[list[Said]]]] = {
    "openai-realtime": openai_realtime,
    "deepgram": deepgram_live,
    "deepgram-turns": deepgram_turns,
    "gradium": gradium_live,
    "wyoming": wyoming_live,
}
"""By the protocol's name."""


async def openai_file(running: Running, file: bytes) -> list[Said]:
    form = aiohttp.FormData()
    for name, value in (("model", "whisper-1"), ("response_format", "verbose_json"), ("timestamp_granularities[]", "word")):
        form.add_field(name, value)
    form.add_field("file", file, filename="a.wav", content_type="audio/wav")
    async with (
        aiohttp.ClientSession() as http,
        http.post(f"{running.http}/v1/audio/transcriptions", data=form, headers={"Authorization": f"Bearer {KEY}"}) as answer,
    ):
        shown = await answer.json()
    assert answer.status == 200, shown
    assert " ".join(word["word"] for word in shown["words"]) == shown["text"]
    return [Said(word["word"], word["start"], word["end"]) for word in shown["words"]]


async def openai_streamed_file(running: Running, file: bytes) -> list[Said]:
    form = aiohttp.FormData({"model": "whisper-1", "stream": "true"})
    form.add_field("file", file, filename="a.wav", content_type="audio/wav")
    async with (
        aiohttp.ClientSession() as http,
        http.post(f"{running.http}/v1/audio/transcriptions", data=form, headers={"Authorization": f"Bearer {KEY}"}) as answer,
    ):
        assert answer.content_type == "text/event-stream"
        lines = [line.removeprefix("data: ") for line in (await answer.text()).split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    events = [json.loads(line) for line in lines[:-1]]
    assert [event["type"] for event in events].count("transcript.text.done") == 1
    text = "".join(event["delta"] for event in events[:-1])
    assert text == events[-1]["text"]
    return _words(text)


async def deepgram_file(running: Running, file: bytes) -> list[Said]:
    async with (
        aiohttp.ClientSession() as http,
        http.post(
            f"{running.http}/v1/listen?smart_format=true", data=file, headers={"Authorization": f"Token {KEY}"}
        ) as answer,
    ):
        shown = await answer.json()
    assert answer.status == 200, shown
    words = shown["results"]["channels"][0]["alternatives"][0]["words"]
    return [Said(word["punctuated_word"], word["start"], word["end"]) for word in words]


async def gradium_file(running: Running, file: bytes) -> list[Said]:
    words: list[Said] = []
    async with (
        aiohttp.ClientSession() as http,
        http.post(
            f"{running.http}/api/post/speech/asr", data=file, headers={"x-api-key": KEY, "Content-Type": "audio/wav"}
        ) as answer,
    ):
        assert answer.content_type == "application/x-ndjson"
        for line in (await answer.text()).splitlines():
            event = json.loads(line)
            if event["type"] == "text":
                words.append(Said(event["text"], event["start_s"]))
            else:
                words[-1] = words[-1]._replace(end=event["stop_s"])
    return words


FILES: dict[str, Callable[[Running, bytes], Awaitable[list[Said]]]] = {
    "openai": openai_file,
    "openai-streamed": openai_streamed_file,
    "deepgram": deepgram_file,
    "gradium": gradium_file,
}


class _socket:
    """A WebSocket, within the deadline."""

    def __init__(self, running: Running, path: str, **headers: str) -> None:
        self._url = f"ws://127.0.0.1:{running.port}{path}"
        self._headers = headers

    async def __aenter__(self) -> aiohttp.ClientWebSocketResponse:
        self._deadline = asyncio.timeout(DEADLINE)
        await self._deadline.__aenter__()
        self._http = aiohttp.ClientSession()
        self._socket = await self._http.ws_connect(self._url, headers=self._headers)
        return self._socket

    async def __aexit__(self, *error: Any) -> None:
        await self._socket.close()
        await self._http.close()
        await self._deadline.__aexit__(*error)


async def _send_and_read(socket: aiohttp.ClientWebSocketResponse, sound: Sound, last: str) -> list[dict[str, Any]]:
    """Binary audio and a last text message, while everything up to Close is read."""

    async def send() -> None:
        for chunk in sound.chunks():
            await socket.send_bytes(chunk)
        await socket.send_str(last)

    sending = asyncio.create_task(send())
    messages = [json.loads(message.data) async for message in socket]
    await sending
    return messages
