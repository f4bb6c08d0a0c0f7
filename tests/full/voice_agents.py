"""LiveKit Agents, Pipecat and OpenAI Agents, unchanged, against a server: each hears real speech, ends its turn, closes.

    python tests/full/voice_agents.py http://127.0.0.1:PORT SPEECH.wav [NAME …]

Runs in an environment of its own, without this project. Prints a line for each client; exit status 1 where one fails.
"""

import asyncio
import os
import sys
import traceback
import wave
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp
import numpy as np

SAID = "ever tried ever failed no matter try again fail again fail better"
KEY = "local"
DEADLINE = 120.0
FRAME_SECONDS = 0.02


def speech(path: str, rate: int, silence_seconds: float = 3.0) -> np.ndarray:
    """int16 (S,) at this rate, and silence after it."""
    with wave.open(path) as file:
        samples = np.frombuffer(file.readframes(file.getnframes()), "<i2")
        own = file.getframerate()
    if own != rate:
        times = np.arange(round(len(samples) * rate / own)) / rate
        samples = np.interp(times, np.arange(len(samples)) / own, samples).astype(np.int16)
    return np.concatenate([samples, np.zeros(round(silence_seconds * rate), np.int16)])


def bare(text: str) -> str:
    return " ".join("".join(letter for letter in text.casefold() if letter.isalnum() or letter == " ").split())


# ---- LiveKit -------------------------------------------------------------------------------------------------------------


async def livekit_stream(stt: Any, path: str, rate: int) -> str:
    """The finals of a stream, in real time, up to the last word."""
    from livekit import rtc
    from livekit.agents.stt import SpeechEventType

    stream = stt.stream()
    samples = speech(path, rate)
    size = round(FRAME_SECONDS * rate)

    async def send() -> None:
        for start in range(0, len(samples) - size, size):
            stream.push_frame(rtc.AudioFrame(samples[start : start + size].tobytes(), rate, 1, size))
            await asyncio.sleep(FRAME_SECONDS / 2)
        if not ends_by_silence(stt):
            stream.flush()

    sending = asyncio.create_task(send())
    finals: list[str] = []
    kinds = set()
    try:
        async for event in stream:
            kinds.add(event.type)
            if event.type == SpeechEventType.FINAL_TRANSCRIPT:
                finals.append(event.alternatives[0].text)
                if len(bare(" ".join(finals)).split()) >= len(SAID.split()):
                    break
    finally:
        sending.cancel()
        await stream.aclose()
    return " ".join(finals)


def ends_by_silence(stt: Any) -> bool:
    return "openai" in type(stt).__module__ or "gradium" in type(stt).__module__


async def livekit_recognize(stt: Any, path: str) -> str:
    from livekit import rtc

    samples = speech(path, 16_000)
    event = await stt.recognize([rtc.AudioFrame(samples.tobytes(), 16_000, 1, len(samples))])
    return event.alternatives[0].text


async def livekit_openai(base: str, path: str) -> str:
    from livekit.plugins import openai

    return await livekit_recognize(openai.STT(base_url=f"{base}/v1", api_key=KEY, use_realtime=False, model="whisper-1"), path)


async def livekit_openai_realtime(base: str, path: str) -> str:
    from livekit.agents.utils import http_context
    from livekit.plugins import openai

    async with http_context.open():
        return await livekit_stream(openai.STT(base_url=f"{base}/v1", api_key=KEY, use_realtime=True), path, 24_000)


async def livekit_deepgram(base: str, path: str) -> str:
    from livekit.plugins import deepgram

    async with aiohttp.ClientSession() as http:
        stt = deepgram.STT(base_url=f"{base}/v1/listen", api_key=KEY, http_session=http)
        live = await livekit_stream(stt, path, 16_000)
        assert bare(await livekit_recognize(stt, path)) == SAID
        return live


async def livekit_deepgram_turns(base: str, path: str) -> str:
    from livekit.plugins import deepgram

    async with aiohttp.ClientSession() as http:
        stt = deepgram.STTv2(base_url=f"{base.replace('http', 'ws')}/v2/listen", api_key=KEY, http_session=http)
        return await livekit_stream(stt, path, 16_000)


async def livekit_gradium(base: str, path: str) -> str:
    from livekit.plugins import gradium

    async with aiohttp.ClientSession() as http:
        endpoint = f"{base.replace('http', 'ws')}/api/speech/asr"
        return await livekit_stream(gradium.STT(model_endpoint=endpoint, api_key=KEY, http_session=http), path, 24_000)


# ---- Pipecat -------------------------------------------------------------------------------------------------------------


async def pipecat_run(service: Any, path: str, rate: int, *, with_vad: bool) -> str:
    """with_vad: tell the service when the user starts and stops, as a local detector does."""
    from pipecat.frames.frames import (
        InputAudioRawFrame,
        TranscriptionFrame,
        VADUserStartedSpeakingFrame,
        VADUserStoppedSpeakingFrame,
    )
    from pipecat.pipeline.worker import PipelineParams
    from pipecat.tests.utils import SleepFrame, run_test

    samples = speech(path, rate)
    size = round(FRAME_SECONDS * rate)
    frames: list[Any] = [SleepFrame(1.0)]
    if with_vad:
        frames.append(VADUserStartedSpeakingFrame())
    for start in range(0, len(samples) - size, size):
        frames.append(InputAudioRawFrame(samples[start : start + size].tobytes(), rate, 1))
        if start % (25 * size) == 0:
            frames.append(SleepFrame(0.2))
    if with_vad:
        frames.append(VADUserStoppedSpeakingFrame())
    frames.append(SleepFrame(20.0))
    down, _ = await run_test(
        service, frames_to_send=frames, start_timeout=20, pipeline_params=PipelineParams(audio_in_sample_rate=rate)
    )
    return " ".join(frame.text for frame in down if isinstance(frame, TranscriptionFrame))


async def pipecat_openai(base: str, path: str) -> str:
    from pipecat.services.openai.stt import OpenAISTTService

    return await pipecat_run(OpenAISTTService(base_url=f"{base}/v1", api_key=KEY), path, 16_000, with_vad=True)


async def pipecat_openai_realtime(base: str, path: str) -> str:
    from pipecat.services.openai.stt import OpenAIRealtimeSTTService

    service = OpenAIRealtimeSTTService(base_url=f"{base.replace('http', 'ws')}/v1/realtime", api_key=KEY)
    return await pipecat_run(service, path, 24_000, with_vad=True)


async def pipecat_deepgram(base: str, path: str) -> str:
    from pipecat.services.deepgram.stt import DeepgramSTTService

    service = DeepgramSTTService(base_url=base.replace("http", "ws"), api_key=KEY)
    return await pipecat_run(service, path, 16_000, with_vad=True)


async def pipecat_flux(base: str, path: str) -> str:
    from pipecat.services.deepgram.flux.stt import DeepgramFluxSTTService

    service = DeepgramFluxSTTService(url=f"{base.replace('http', 'ws')}/v2/listen", api_key=KEY)
    return await pipecat_run(service, path, 16_000, with_vad=False)


async def pipecat_gradium(base: str, path: str) -> str:
    from pipecat.services.gradium.stt import GradiumSTTService

    service = GradiumSTTService(api_endpoint_base_url=f"{base.replace('http', 'ws')}/api/speech/asr", api_key=KEY)
    return await pipecat_run(service, path, 24_000, with_vad=True)


# ---- OpenAI Agents -------------------------------------------------------------------------------------------------------


async def openai_agents(base: str, path: str) -> str:
    from agents.voice import StreamedAudioInput, STTModelSettings
    from agents.voice.models.openai_stt import OpenAISTTModel
    from openai import AsyncOpenAI

    client = AsyncOpenAI(base_url=f"{base}/v1", websocket_base_url=f"{base.replace('http', 'ws')}/v1", api_key=KEY)
    model = OpenAISTTModel("gpt-4o-transcribe", client)
    given = StreamedAudioInput()
    session = await model.create_session(given, STTModelSettings(), False, False)
    for chunk in np.array_split(speech(path, 24_000), 100):
        await given.add_audio(chunk)
    await given.add_audio(None)
    finals = []
    try:
        async for text in session.transcribe_turns():
            finals.append(text)
            if len(bare(" ".join(finals)).split()) >= len(SAID.split()):
                break
    finally:
        await session.close()
    return " ".join(finals)


CLIENTS: dict[str, Callable[[str, str], Awaitable[str]]] = {
    "livekit-openai": livekit_openai,
    "livekit-openai-realtime": livekit_openai_realtime,
    "livekit-deepgram": livekit_deepgram,
    "livekit-deepgram-turns": livekit_deepgram_turns,
    "livekit-gradium": livekit_gradium,
    "pipecat-openai": pipecat_openai,
    "pipecat-openai-realtime": pipecat_openai_realtime,
    "pipecat-deepgram": pipecat_deepgram,
    "pipecat-flux": pipecat_flux,
    "pipecat-gradium": pipecat_gradium,
    "openai-agents": openai_agents,
}


async def main(base: str, path: str, names: list[str]) -> int:
    failed = 0
    for name in names or CLIENTS:
        try:
            text = await asyncio.wait_for(CLIENTS[name](base, path), DEADLINE)
            ok = bare(text) == SAID
            print(f"{'ok  ' if ok else 'FAIL'} {name}: {text}", flush=True)
        except Exception:
            ok = False
            print(f"FAIL {name}", flush=True)
            traceback.print_exc()
        failed += not ok
    return failed


if __name__ == "__main__":
    os.environ.setdefault("OPENAI_API_KEY", KEY)
    os._exit(1 if asyncio.run(main(sys.argv[1], sys.argv[2], sys.argv[3:])) else 0)  # some clients leave threads running
