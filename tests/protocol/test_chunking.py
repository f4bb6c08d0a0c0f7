"""The same speech in any chunks and any encoding is the same words, through the whole server and the embedded model."""

import asyncio
from collections.abc import Iterator

import aiohttp
import msgpack
import numpy as np
import pytest
from tests.support.serving import Running, serving

from moshi_stt import protocol
from moshi_stt.audio.decode import read_file
from moshi_stt.audio.opus import OpusEncoder
from moshi_stt.config_load import embedded_config
from moshi_stt.engines import EMBEDDED_PACKAGES, build_engine, missing_packages
from moshi_stt.events import AnyEvent, EndWord, Marker, Step, Word
from moshi_stt.sample import sample_path
from moshi_stt.text.subtitles import TimedWord, pair_words

pytestmark = pytest.mark.skipif(
    bool(missing_packages(EMBEDDED_PACKAGES)), reason=f"the embedded model needs {', '.join(EMBEDDED_PACKAGES)}"
)

SIZES = (7, 240, 1_920, 24_000, None)
SECONDS = 240.0


def beginning() -> np.ndarray:
    """`Ever tried. Ever failed. No matter,` and the pause behind it."""
    return read_file(sample_path())[: round(4.5 * 24_000)]


def packed(value: object, single: bool = False) -> bytes:
    data: bytes = msgpack.packb({"type": "Audio", "pcm": value}, use_single_float=single)
    return data


def whole_numbers(pcm: np.ndarray) -> list[float | int]:
    """As a client that packs what it has: whole numbers as integers, the rest as float64."""
    return [int(sample) if sample == int(sample) else sample for sample in pcm.tolist()]


ENCODINGS = {
    "float32": lambda pcm: packed(pcm.tolist(), single=True),
    "float64": lambda pcm: packed(pcm.tolist()),
    "integers": lambda pcm: packed(whole_numbers(pcm)),
    "bin": lambda pcm: protocol.encode_audio(pcm, as_bin=True),
}


def chunks(whole: np.ndarray | bytes, size: int | None) -> Iterator[np.ndarray | bytes]:
    step = size or len(whole)
    for start in range(0, len(whole), step):
        yield whole[start : start + step]


async def words_of(running: Running, messages: list[bytes]) -> list[TimedWord]:
    """Send, mark, read until the marker, while sending goes on."""
    headers = {"kyutai-api-key": "public_token"}
    async with aiohttp.ClientSession() as session, session.ws_connect(running.ws, headers=headers) as socket:

        async def send() -> None:
            for message in [*messages, protocol.encode_marker(0)]:
                await socket.send_bytes(message)

        sending = asyncio.create_task(send())
        events: list[AnyEvent] = []
        async for message in socket:
            event = protocol.decode_event(message.data)
            events.append(event)
            if isinstance(event, Marker):
                break
        await sending
    assert isinstance(events[-1], Marker)
    assert all(isinstance(event, Word | EndWord | Step) for event in events[1:-1])
    return pair_words(events)


def spoken(words: list[TimedWord]) -> list[str]:
    """The words without case and punctuation."""
    return [word.text.lower().strip(".,?") for word in words]


async def test_any_chunks_and_any_encoding_give_the_same_words() -> None:
    pcm = beginning()
    pcm[:2_400] = 0  # whole numbers, for the encoding that packs them as such
    config = embedded_config()
    engine = build_engine(config.modules[0], config.limits)
    async with serving(engine) as running, asyncio.timeout(SECONDS):
        expected = await words_of(running, [ENCODINGS["float32"](pcm)])
        assert spoken(expected)[:4] == ["ever", "tried", "ever", "failed"]
        runs = {
            (name, size): words_of(running, [encode(chunk) for chunk in chunks(pcm, size)])
            for name, encode in ENCODINGS.items()
            for size in {"float32": SIZES, "bin": (7, None)}.get(name, (1_920,))
        }
        for case, words in zip(runs, await asyncio.gather(*runs.values()), strict=True):
            assert words == expected, case


async def test_opus_in_any_pieces_gives_the_words_of_the_pcm() -> None:
    pcm = beginning()
    encoder = OpusEncoder()
    data = encoder.feed(pcm) + encoder.finish()
    config = embedded_config()
    engine = build_engine(config.modules[0], config.limits)
    async with serving(engine) as running, asyncio.timeout(SECONDS):
        expected = await words_of(running, [protocol.encode_audio(pcm)])
        runs = [
            words_of(running, [protocol.encode_opus(bytes(piece), as_bin=as_bin) for piece in chunks(data, size)])
            for size, as_bin in ((1, True), (100, False), (4_096, True), (None, False))
        ]
        first, *others = await asyncio.gather(*runs)
        assert all(words == first for words in others)
        assert spoken(first) == spoken(expected)  # Opus is lossy, and a comma may turn into a full stop
