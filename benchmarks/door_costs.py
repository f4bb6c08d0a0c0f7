"""What 80 ms of a stream cost each protocol: taking a message apart, its samples converted, and telling of the events it makes.

Without a socket and without an engine: framing and session alone, the same for the native protocol. For each frame a stream
has a `Step` and, where turns were asked for, a `Pause`; every third frame has a word.
"""

import base64
import json
import os
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from moshi_stt import protocol
from moshi_stt.audio.live import PcmFormat
from moshi_stt.constants import FRAME_SAMPLES, FRAME_SECONDS
from moshi_stt.engine.engine import EngineInfo
from moshi_stt.events import AnyEvent, EndWord, Pause, Ready, Step, Word
from moshi_stt.server.doors.deepgram_flux import FluxOptions, FluxSession
from moshi_stt.server.doors.deepgram_live import DeepgramSession
from moshi_stt.server.doors.deepgram_options import DeepgramOptions
from moshi_stt.server.doors.gradium_session import GradiumSession
from moshi_stt.server.doors.kyutai import KyutaiSession
from moshi_stt.server.doors.openai_realtime import RealtimeSession
from moshi_stt.server.doors.wyoming_framing import WyomingFraming
from moshi_stt.server.doors.wyoming_session import WyomingOptions, WyomingSession
from moshi_stt.server.framing import Framing
from moshi_stt.server.websocket import WebSocketFraming
from moshi_stt.session import Session
from moshi_stt.text.word_lists import NO_LISTS

FRAMES = 3_000
WORD_EVERY = 3
RATE = 16_000


@dataclass(frozen=True)
class Contender:
    """make: a session that is ready for audio. message: a client's bytes with 80 ms of it."""

    make: Callable[[], Session]
    framing: Callable[[], Framing]
    message: bytes
    turns: bool = True


def websocket_frame(payload: bytes | str) -> bytes:
    """A client's: masked."""
    data, opcode = (payload.encode(), 0x81) if isinstance(payload, str) else (payload, 0x82)
    key = os.urandom(4)
    masked = np.frombuffer(data, np.uint8) ^ np.frombuffer((key * (len(data) // 4 + 1))[: len(data)], np.uint8)
    return bytes((opcode, 0xFE)) + struct.pack("!H", len(data)) + key + masked.tobytes()


def contenders() -> dict[str, Contender]:
    samples = 0.1 * np.random.default_rng(0).standard_normal(FRAME_SAMPLES).astype(np.float32)
    pcm = (samples[: RATE * 8 // 100] * 32_767).astype("<i2").tobytes()
    encoded = base64.b64encode(pcm).decode()
    modules = {"asr": EngineInfo("embedded", "model", "", ("en",), "cpu", "f32", 64)}
    request_id = "11111111-2222-4333-8444-555555555555"
    linear = PcmFormat("linear16", RATE)

    def websocket() -> Framing:
        return WebSocketFraming(1 << 26)

    def realtime() -> Session:
        session = RealtimeSession("whisper-1", modules)
        audio = {"input": {"format": {"type": "audio/pcm", "rate": RATE}}}
        list(session.receive(json.dumps({"type": "session.update", "session": {"audio": audio}})))
        return session

    def gradium() -> Session:
        session = GradiumSession(modules, delay_frames=6, lists=NO_LISTS)
        list(session.receive(json.dumps({"type": "setup", "input_format": f"pcm_{RATE}"})))
        return session

    chunk = json.dumps({"rate": RATE, "width": 2, "channels": 1}).encode()
    head = json.dumps({"type": "audio-chunk", "data_length": len(chunk), "payload_length": len(pcm)}).encode()
    append = websocket_frame(json.dumps({"type": "input_audio_buffer.append", "audio": encoded}))
    return {
        "native": Contender(KyutaiSession, websocket, websocket_frame(protocol.encode_audio(samples)), turns=False),
        "openai-realtime": Contender(realtime, websocket, append),
        "deepgram": Contender(
            lambda: DeepgramSession(DeepgramOptions(request_id, linear, interim=True)), websocket, websocket_frame(pcm)
        ),
        "deepgram-flux": Contender(lambda: FluxSession(FluxOptions(request_id, linear)), websocket, websocket_frame(pcm)),
        "gradium": Contender(gradium, websocket, websocket_frame(json.dumps({"type": "audio", "audio": encoded}))),
        "wyoming": Contender(
            lambda: WyomingSession(WyomingOptions(modules, NO_LISTS)),
            WyomingFraming,
            head + b"\n" + chunk + pcm,
            turns=False,
        ),
    }


def events_of(number: int, *, turns: bool) -> list[AnyEvent]:
    time_ = round((number + 1) * FRAME_SECONDS, 3)
    events: list[AnyEvent] = [Step(number, (0.1, 0.1, 0.1, 0.1), 0)]
    if number % WORD_EVERY == WORD_EVERY - 1:
        events += [Word("word", time_ - 0.24, 0.9), EndWord(time_ - 0.02)]
    if turns:
        silence = 0.0 if number % 100 < 80 else (number % 100 - 79) * FRAME_SECONDS
        events.append(Pause(time_, time_, silence, (0.1, 0.1, 0.1, 0.1)))
    return events


def cost(contender: Contender) -> float:
    """CPU microseconds for 80 ms of one stream, both ways."""
    session, framing = contender.make(), contender.framing()
    session.send(Ready())
    frames = [events_of(number, turns=contender.turns) for number in range(FRAMES)]
    begun = time.process_time()
    for events in frames:
        for message in framing.feed(contender.message):
            assert isinstance(message, str | bytes)
            for _ in session.receive(message):
                pass
        for event in events:
            for message in session.send(event):
                framing.encode(message)
    return (time.process_time() - begun) / FRAMES * 1e6


def table() -> dict[str, dict[str, float]]:
    """By protocol, the best of three: microseconds, and messages a second for each core."""
    shown = {}
    for name, contender in contenders().items():
        microseconds = min(cost(contender) for _ in range(3))
        shown[name] = {"us_per_message": round(microseconds, 1), "messages_per_second": round(1e6 / microseconds)}
    return shown


if __name__ == "__main__":
    print(json.dumps(table()))
