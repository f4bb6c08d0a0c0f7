"""The wyoming package, unchanged, against this server."""

import asyncio
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tests.clients.conftest import DEADLINE, SAID, bare

from moshi_stt.server.app import Server

asr = pytest.importorskip("wyoming.asr", reason="the package wyoming is not installed: pip install -e '.[clients]'")
audio = pytest.importorskip("wyoming.audio")
clients = pytest.importorskip("wyoming.client")
info = pytest.importorskip("wyoming.info")
ping = pytest.importorskip("wyoming.ping")


async def utterance(client: Any, pcm24: NDArray[np.int16]) -> str:
    """Say something, and read up to the end of its transcript."""
    await client.write_event(asr.Transcribe(language="en").event())
    await client.write_event(audio.AudioStart(24_000, 2, 1).event())
    for start in range(0, len(pcm24), 1_024):
        await client.write_event(audio.AudioChunk(24_000, 2, 1, pcm24[start : start + 1_024].tobytes()).event())
    await client.write_event(audio.AudioStop().event())
    pieces, final = [], None
    while True:
        event = await client.read_event()
        if asr.TranscriptChunk.is_type(event.type):
            pieces.append(asr.TranscriptChunk.from_event(event).text)
        elif asr.Transcript.is_type(event.type):
            final = asr.Transcript.from_event(event).text
        elif asr.TranscriptStop.is_type(event.type):
            assert "".join(pieces) == final
            return str(final)


async def test_describe_and_several_utterances(server: Server, pcm24: NDArray[np.int16]) -> None:
    uri = f"tcp://127.0.0.1:{server.listeners.ports['wyoming']}"
    async with asyncio.timeout(DEADLINE):
        for _ in range(2):
            async with clients.AsyncClient.from_uri(uri) as client:
                await client.write_event(info.Describe().event())
                described = info.Info.from_event(await client.read_event())
                assert described.asr[0].models[0].languages == ["en"]
                await client.write_event(ping.Ping("hello").event())
                assert ping.Pong.from_event(await client.read_event()).text == "hello"
                for _ in range(2):
                    assert bare(await utterance(client, pcm24)) == SAID
    assert server.service.served[0].engine.used_slots == 0
