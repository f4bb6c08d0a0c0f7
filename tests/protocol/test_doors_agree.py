"""One recording through every protocol, on every engine: the same words at the same times."""

import asyncio
import io
import wave

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray
from tests.support.door_clients import FILES, LIVE, Said, Sound
from tests.support.engines import Kind, speech
from tests.support.serving import Running, server_config, serving, until

from moshi_stt.audio.live import PcmFormat, PcmInput
from moshi_stt.audio.resample import StreamingResampler
from moshi_stt.client import Client
from moshi_stt.config import WyomingConfig
from moshi_stt.engine.recording import RecordingOptions, transcribe_recording
from moshi_stt.text.word_lists import plain

RATE = 16_000


def recording() -> NDArray[np.int16]:
    """Words with pauses, 16 kHz, int16 (S,)."""
    resampler = StreamingResampler(24_000, RATE)
    pcm = np.concatenate([resampler.feed(speech([3, 9, 20, 7])), resampler.finish()])
    return (np.clip(pcm, -1, 1) * 32_767).astype(np.int16)


def at_24_khz(samples: NDArray[np.int16]) -> NDArray[np.float32]:
    """What every door makes of them."""
    conversion = PcmInput(PcmFormat("linear16", RATE))
    pieces = [piece for (piece,) in conversion.feed(samples.tobytes())]
    return np.concatenate([*pieces, *conversion.flush()])


def wav(samples: NDArray[np.int16]) -> bytes:
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes(samples.tobytes())
    return buffer.getvalue()


def agree(mine: list[Said], expected: list[Said], *, loose: int = 0) -> None:
    """loose: words at the end that may differ: random weights babble on, and a marker does not wait for it as the end does."""
    mine, expected = parts(mine), parts(expected)
    shared = min(len(mine), len(expected))
    assert [word.text for word in mine[:shared]] == [word.text for word in expected[:shared]]
    assert abs(len(mine) - len(expected)) <= loose
    for word, other in zip(mine, expected, strict=False):
        assert word.start is None or word.start == pytest.approx(other.start, abs=0.0011), word
        assert word.end is None or word.end == pytest.approx(other.end, abs=0.0021), word


def parts(words: list[Said]) -> list[Said]:
    """Without blanks, case and punctuation: random weights make words of several parts, which some protocols split."""
    return [Said(plain(part), word.start, word.end) for word in words for part in word.text.split()]


async def whole(running: Running, pcm: NDArray[np.float32]) -> list[Said]:
    """As one stream, without any protocol."""
    engine = running.server.service.served[0].engine
    words = await transcribe_recording(engine, [pcm], RecordingOptions(cut=None))
    return [Said(word.text, word.start, word.end) for word in words]


def serve(kind: Kind) -> object:
    config = msgspec.structs.replace(server_config(), wyoming=WyomingConfig(uri="tcp://127.0.0.1:0"))
    return serving(kind.make(), config)


async def test_live(kind: Kind) -> None:
    samples = recording()
    async with serve(kind) as running:  # type: ignore[attr-defined]
        expected = await whole(running, at_24_khz(samples))
        assert len(expected) >= 2
        async with Client(running.ws) as client:
            native = await client.transcribe(at_24_khz(samples))
        agree([Said(word.text) for word in native], expected, loose=3 if kind.exact else 0)
        for name, say in LIVE.items():
            loose = 3 if kind.exact and name == "openai-realtime" else 0
            try:
                agree(await say(running, Sound(samples.tobytes(), RATE)), expected, loose=loose)
            except AssertionError as error:
                raise AssertionError(f"{name}: {error}") from error
        engine = running.server.service.served[0].engine
        await until(lambda: engine.used_slots == 0 and running.connections() == 0, "every slot and connection free")


async def test_recorded(kind: Kind) -> None:
    samples = recording()
    async with serve(kind) as running:  # type: ignore[attr-defined]
        expected = await whole(running, at_24_khz(samples))
        answers = await asyncio.gather(*(client(running, wav(samples)) for client in FILES.values()))
        for name, answer in zip(FILES, answers, strict=True):
            try:
                agree(answer, expected)
            except AssertionError as error:
                raise AssertionError(f"{name}: {error}") from error
