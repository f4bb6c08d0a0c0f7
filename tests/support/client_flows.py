"""What known clients do, on any server of this protocol, by URL. Knows nothing of the server's inside.

`dsm` is the flow of Kyutai's `stt_from_file_rust_server.py`, `mac` that of the Mac installer's `test_client.py` (contract
section 7.5); `marker_then_nothing` is a client that believes what the protocol says of markers.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import numpy as np
from numpy.typing import NDArray

from moshi_stt import protocol
from moshi_stt.constants import API_KEY_HEADER, FRAME_SAMPLES, FRAME_SECONDS, SAMPLE_RATE
from moshi_stt.events import AnyEvent, EndWord, Error, Marker, Ready, Word

SECOND = np.zeros(SAMPLE_RATE, np.float32)
DEADLINE = 120.0


@dataclass
class Transcript:
    """What a client got. events: in order, without `Step`."""

    events: list[AnyEvent] = field(default_factory=list)
    steps: int = 0
    close_code: int | None = None

    @property
    def text(self) -> str:
        return " ".join(event.text for event in self.events if isinstance(event, Word))

    @property
    def words(self) -> list[tuple[str, float, float | None]]:
        """(word, start, end), seconds; the end comes from the next `EndWord`, as in Kyutai's client."""
        words: list[tuple[str, float, float | None]] = []
        for event in self.events:
            if isinstance(event, Word):
                words.append((event.text, event.start_time, None))
            elif isinstance(event, EndWord) and words:
                words[-1] = (words[-1][0], words[-1][1], event.stop_time)
        return words

    @property
    def markers(self) -> list[int]:
        return [event.id for event in self.events if isinstance(event, Marker)]


class _Talk:
    """One connection; what comes is read while the flow sends."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self.socket = socket
        self.transcript = Transcript()
        self.marker = asyncio.Event()

    async def read(self) -> None:
        async for message in self.socket:
            event = protocol.decode_event(message.data)
            if type(event).__name__ == "Step":
                self.transcript.steps += 1
                continue
            self.transcript.events.append(event)
            assert len(self.transcript.events) > 1 or isinstance(event, Ready | Error), f"the first message is {event}"
            if isinstance(event, Marker):
                self.marker.set()
        self.marker.set()

    async def audio(self, pcm: NDArray[np.float32]) -> None:
        await self.socket.send_bytes(protocol.encode_audio(pcm))

    async def mark(self, id: int) -> None:
        await self.socket.send_bytes(protocol.encode_marker(id))


@asynccontextmanager
async def talking(url: str, key: str) -> AsyncIterator[_Talk]:
    """A connection whose messages are read; closed with a whole handshake at the end."""
    async with (
        asyncio.timeout(DEADLINE),
        aiohttp.ClientSession() as http,
        http.ws_connect(url, headers={API_KEY_HEADER: key}, max_msg_size=0) as socket,
    ):
        talk = _Talk(socket)
        reading = asyncio.create_task(talk.read())
        try:
            yield talk
        finally:
            if not reading.done():
                await socket.close()
            await reading
            talk.transcript.close_code = socket.close_code


async def _paced(talk: _Talk, pcm: NDArray[np.float32], rtf: float) -> None:
    """Messages of 1,920 samples, each sent when real time divided by rtf has come to it."""
    loop = asyncio.get_running_loop()
    began = loop.time()
    for index, start in enumerate(range(0, len(pcm), FRAME_SAMPLES)):
        await talk.audio(pcm[start : start + FRAME_SAMPLES])
        ahead = began + (index + 1) * FRAME_SECONDS / rtf - loop.time()
        if ahead > 0:
            await asyncio.sleep(ahead)


async def dsm(url: str, pcm: NDArray[np.float32], *, key: str = "public_token", rtf: float = 1.01) -> Transcript:
    """One second of silence, paced messages, five seconds of silence, a marker, 35 seconds of silence; read until the marker.

    pcm: float32 (S,), 24 kHz. Times in the transcript include the first second. Raises TimeoutError without the marker.
    """
    async with talking(url, key) as talk:
        await talk.audio(SECOND)
        await _paced(talk, pcm, rtf)
        for _ in range(5):
            await talk.audio(SECOND)
        await talk.mark(0)
        for _ in range(35):
            if talk.marker.is_set():
                break  # the script stops everything when its reader has seen the marker
            await talk.audio(SECOND)
        await talk.marker.wait()
        return talk.transcript


async def mac(url: str, pcm: NDArray[np.float32], *, key: str = "public_token", rtf: float = 1000) -> Transcript:
    """The same with its pace a thousand times real time and 35 messages of one frame behind the marker."""
    async with talking(url, key) as talk:
        await talk.audio(SECOND)
        await _paced(talk, pcm, rtf)
        await talk.mark(0)
        for _ in range(35):
            await talk.audio(SECOND[:FRAME_SAMPLES])
        await talk.marker.wait()
        return talk.transcript


async def marker_then_nothing(
    url: str, pcm: NDArray[np.float32], *, key: str = "public_token", chunk: int = FRAME_SAMPLES
) -> Transcript:
    """All the audio, in messages of `chunk` samples, and a marker; then only read, until the marker."""
    async with talking(url, key) as talk:
        for start in range(0, len(pcm), chunk):
            await talk.audio(pcm[start : start + chunk])
        await talk.mark(0)
        await talk.marker.wait()
        return talk.transcript


Flow = Callable[..., Coroutine[Any, Any, Transcript]]
FLOWS: dict[str, Flow] = {"dsm": dsm, "mac": mac, "marker_then_nothing": marker_then_nothing}
