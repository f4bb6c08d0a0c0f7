"""How a client of each door speaks, for the tests that every door must pass: all of them by a line in CALLERS."""

import base64
import json
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from tests.support.plain_door import PlainDoor
from tests.support.raw_ws import BINARY, CLOSE, PING, TEXT, RawClient, frame
from tests.support.serving import KEY

from moshi_stt import protocol
from moshi_stt.constants import DEFAULT_PATH
from moshi_stt.server.doors import DOORS
from moshi_stt.server.doors.door import AnyDoor
from moshi_stt.session import Message

ALL_DOORS: Final[tuple[AnyDoor, ...]] = (*DOORS, PlainDoor())


@dataclass(frozen=True)
class Caller:
    """A client of one door.

    headers: of a request with a good key, besides the native one. first: what it sends before all else. audio: the messages
    that carry samples, 24 kHz. mark: asks that all before it be transcribed; marked: the answer to the mark of this number.
    words: in a message of the server. is_error: whether a message tells of an error. garbage: messages that a client must not
    send.
    """

    path: str
    headers: str
    audio: Callable[[NDArray[np.float32]], Sequence[Message]]
    mark: Callable[[int], Message]
    marked: Callable[[Message, int], bool]
    words: Callable[[Message], list[str]]
    is_error: Callable[[Message], bool]
    garbage: tuple[Message, ...]
    first: tuple[Message, ...] = ()

    async def connect(self, port: int, *, receive_buffer: int | None = None) -> "Call":
        client = await RawClient.connect(port, self.path, extra=self.headers, receive_buffer=receive_buffer)
        call = Call(client, self)
        for message in self.first:
            call.send(message)
        return call


class Call:
    """One connection of a caller."""

    def __init__(self, client: RawClient, caller: Caller) -> None:
        self.client, self.caller = client, caller

    async def __aenter__(self) -> "Call":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.client.__aexit__()

    def send(self, message: Message) -> None:
        self.client.write(as_frame(message))

    def say(self, pcm: NDArray[np.float32]) -> None:
        for message in self.caller.audio(pcm):
            self.send(message)

    async def receive(self) -> Message | int | None:
        """The next message; the status of the server's Close (None: it has none); -1 at the end of the socket."""
        while True:
            try:
                opcode, payload = await self.client.receive()
            except (EOFError, ConnectionError):
                return -1
            if opcode == TEXT:
                return payload.decode()
            if opcode == BINARY:
                return payload
            if opcode == CLOSE:
                return struct.unpack("!H", payload[:2])[0] if payload else None
            assert opcode == PING

    async def until_marked(self, number: int) -> list[Message]:
        """Every message up to the answer to the mark of this number."""
        messages: list[Message] = []
        while True:
            message = await self.receive()
            assert isinstance(message, str | bytes), f"closed with {message} after {messages[-3:]}"
            messages.append(message)
            if self.caller.marked(message, number):
                return messages

    async def words_until_marked(self, number: int) -> list[str]:
        return [word for message in await self.until_marked(number) for word in self.caller.words(message)]

    async def rest(self) -> tuple[list[Message], int | None]:
        """Every message up to the server's Close, and its status."""
        messages: list[Message] = []
        while isinstance(message := await self.receive(), str | bytes):
            messages.append(message)
        return messages, message


def _native(message: Message) -> Any:
    return protocol.decode_event(message) if isinstance(message, bytes) else None


NATIVE = Caller(
    path=DEFAULT_PATH,
    headers="",
    audio=lambda pcm: [protocol.encode_audio(pcm[start : start + 1920]) for start in range(0, len(pcm), 1920)],
    mark=protocol.encode_marker,
    marked=lambda message, number: _native(message) == protocol.decode_event(protocol.encode_marker(number)),
    words=lambda message: [event.text] if type(event := _native(message)).__name__ == "Word" else [],
    is_error=lambda message: type(_native(message)).__name__ == "Error",
    garbage=(b"", b"\xc1", b"\xc0", b"\x91" * 5000, b"\x81\xa4type\xa3Foo", b"Audio", b"\xdf\xff\xff\xff\xff"),
)

PLAIN = Caller(
    path="/v0/plain?greeting=hi",
    headers=f"x-plain-key: {KEY}\r\nSec-WebSocket-Protocol: plain\r\n",
    audio=lambda pcm: ["audio " + pcm[start : start + 1920].tobytes().hex() for start in range(0, len(pcm), 1920)],
    mark=lambda number: f"mark {number}",
    marked=lambda message, number: message == f"Marker {number}",
    words=lambda message: [message[5:]] if isinstance(message, str) and message.startswith("Word ") else [],
    is_error=lambda message: isinstance(message, str) and message.lower().startswith("error"),
    garbage=("", "nonsense", b"", b"\x00" * 1000, "audio nothex", "mark", "mark x", "bye"),
)


def _pcm16(pcm: NDArray[np.float32]) -> list[bytes]:
    samples = np.rint(np.clip(pcm, -1, 1) * 32_767).astype("<i2")
    return [samples[start : start + 1920].tobytes() for start in range(0, len(samples), 1920)]


def _base64(kind: str, pcm: NDArray[np.float32]) -> list[str]:
    return [json.dumps({"type": kind, "audio": base64.b64encode(chunk).decode()}) for chunk in _pcm16(pcm)]


def _event(message: Message) -> dict[str, Any]:
    return json.loads(message) if isinstance(message, str) else {}


def _json(**message: object) -> str:
    return json.dumps(message)


_AUTHORIZATION = f"Authorization: Bearer {KEY}\r\n"
_NO_JSON = ("{", "[]", "nonsense", '"x"', '{"type": 5}', '{"type": "nonsense"}', "[" * 5_000)

OPENAI_REALTIME = Caller(
    path="/v1/realtime?intent=transcription",
    headers=_AUTHORIZATION,
    first=(_json(type="session.update", session={"audio": {"input": {"turn_detection": None}}}),),
    audio=lambda pcm: _base64("input_audio_buffer.append", pcm),
    mark=lambda number: _json(type="input_audio_buffer.commit"),
    marked=lambda message, number: _event(message).get("type", "").endswith("transcription.completed"),
    words=lambda message: _event(message).get("delta", "").split(),
    is_error=lambda message: _event(message).get("type") == "error",
    garbage=(
        *_NO_JSON, b"\x00", '{"type": "response.create"}', '{"type": "input_audio_buffer.append", "audio": "%"}',
        '{"type": "session.update", "session": 5}', '{"type": "input_audio_buffer.commit"}',
    ),
)  # fmt: skip


def _deepgram_words(message: Message) -> list[str]:
    event = _event(message)
    return event["channel"]["alternatives"][0]["transcript"].split() if event.get("is_final") else []


DEEPGRAM = Caller(
    path="/v1/listen?encoding=linear16&sample_rate=24000&smart_format=true",
    headers=_AUTHORIZATION,
    audio=_pcm16,
    mark=lambda number: _json(type="Finalize"),
    marked=lambda message, number: bool(_event(message).get("from_finalize")),
    words=_deepgram_words,
    is_error=lambda message: _event(message).get("type") == "Error",
    garbage=_NO_JSON,
)
DEEPGRAM_FLUX = Caller(
    path="/v2/listen?encoding=linear16&sample_rate=24000&eot_threshold=1.0&eot_timeout_ms=60000",
    headers=_AUTHORIZATION,
    audio=_pcm16,
    mark=lambda number: _json(type="ForceEndTurn"),
    marked=lambda message, number: _event(message).get("event") == "EndOfTurn",
    words=lambda message: _event(message)["transcript"].split() if _event(message).get("event") == "EndOfTurn" else [],
    is_error=lambda message: _event(message).get("type") == "Error",
    garbage=_NO_JSON,
)
GRADIUM = Caller(
    path="/api/speech/asr",
    headers=f"x-api-key: {KEY}\r\n",
    first=(_json(type="setup", input_format="pcm"),),
    audio=lambda pcm: _base64("audio", pcm),
    mark=lambda number: _json(type="flush", flush_id=number),
    marked=lambda message, number: _event(message) == {"type": "flushed", "flush_id": number},
    words=lambda message: [_event(message)["text"]] if _event(message).get("type") == "text" else [],
    is_error=lambda message: _event(message).get("type") == "error",
    garbage=(*_NO_JSON, b"\x00", '{"type": "setup"}', '{"type": "audio", "audio": "%"}', '{"type": "audio", "audio": 5}'),
)

CALLERS: Final[dict[str, Caller]] = {
    "native": NATIVE,
    "plain": PLAIN,
    "openai-realtime": OPENAI_REALTIME,
    "deepgram": DEEPGRAM,
    "deepgram-flux": DEEPGRAM_FLUX,
    "gradium": GRADIUM,
}


def as_frame(message: Message) -> bytes:
    """A client's frame with a whole message."""
    return frame(TEXT, message.encode()) if isinstance(message, str) else frame(BINARY, message)
