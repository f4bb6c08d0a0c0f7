"""Whole sessions over a live socket: the flows of known clients, and the order and bytes of what was recorded."""

import os
import socket
from pathlib import Path

import numpy as np
import pytest
from tests.support import client_flows, recorded
from tests.support.client_flows import FLOWS
from tests.support.raw_ws import BINARY, TEXT, RawClient, frame
from tests.support.scripted_engine import ScriptedEngine, ScriptedWord, counting
from tests.support.serving import serving
from tests.support.written import Reader

from moshi_stt import protocol
from moshi_stt.constants import FRAME_SAMPLES, SAMPLE_RATE
from moshi_stt.engine.commands import Audio
from moshi_stt.engine.stream import Stream
from moshi_stt.events import AnyEvent, EndWord, Marker, Ready, Step, Word

SPEECH = np.zeros(4 * SAMPLE_RATE, np.float32)


@pytest.mark.parametrize("flow", list(FLOWS))
@pytest.mark.parametrize("steps", [True, False], ids=["with steps", "without"])
async def test_known_client_gets_every_word_and_its_marker(flow: str, steps: bool) -> None:
    """The delay makes the last words come only through the silence that the engine, or the client, adds."""
    engine = ScriptedEngine(counting(20), delay_frames=6, steps=steps)
    async with serving(engine) as running:
        options = {"rtf": 100} if flow == "dsm" else {}
        transcript = await FLOWS[flow](running.ws, SPEECH, **options)
    assert transcript.markers == [0]
    assert transcript.close_code == 1000
    assert transcript.text == " ".join(f"w{i}" for i in range(20))
    assert [start for _, start, _ in transcript.words] == [round(i * 0.16, 6) for i in range(20)]
    assert all(end is not None for _, _, end in transcript.words)
    assert (transcript.steps > 0) is steps


async def test_word_behind_the_marker_is_not_before_it() -> None:
    """What is spoken after the marker must not come before it."""
    engine = ScriptedEngine([ScriptedWord("before", 0, 1), ScriptedWord("after", 40, 41)], steps=False)
    async with serving(engine) as running, client_flows.talking(running.ws, "public_token") as talk:
        await talk.audio(np.zeros(20 * 1920, np.float32))
        await talk.mark(1)
        await talk.audio(np.zeros(40 * 1920, np.float32))
        await talk.mark(2)
        while talk.transcript.markers != [1, 2]:
            talk.marker.clear()
            await talk.marker.wait()
        kinds = [
            getattr(e, "text", None) or getattr(e, "id", None) for e in talk.transcript.events if isinstance(e, Word | Marker)
        ]
    assert kinds == ["before", 1, "after", 2]


class Replay(Reader):
    """Says exactly what a recorded connection received: with each frame, what came between its step and the next."""

    def __init__(self, events: list[AnyEvent]) -> None:
        super().__init__(files_only=False)
        self._samples = 0
        self._groups: list[list[AnyEvent]] = []
        for event in events:
            if isinstance(event, Step):
                self._groups.append([])
            if not isinstance(event, Ready):
                self._groups[-1].append(event)

    def _work(self, stream: Stream) -> None:
        """The marks of the client are answered where the recording has it."""
        self._samples += sum(len(command.samples) for command in stream.drain() if isinstance(command, Audio))
        while self._samples >= FRAME_SAMPLES:
            self._samples -= FRAME_SAMPLES
            stream.stepped(FRAME_SAMPLES)
            stream.deliver(self._groups.pop(0) if self._groups else [])


@pytest.mark.parametrize("name", ["words", "one_message", "small_chunks", "marker_partial", "delay_15", "words_1b"])
async def test_recorded_session_keeps_its_order_and_bytes(name: str, shared: Path) -> None:
    """Sent as recorded, through session, stream and socket: what comes is what moshi-server's client got, byte for byte."""
    session = recorded.load(shared / "goldens" / "recorded", name)
    expected = [bytes.fromhex(entry[2]) for entry in session.log if entry[:2] == ["a", "recv"]]
    engine = Replay(session.events())
    async with serving(engine) as running, await RawClient.connect(running.port) as client:
        for kind, what in session.sent():
            if kind == "audio":
                client.audio(what)
            elif kind == "marker":
                client.marker(what)
            await client.drain()
        received = [await client.receive_message() for _ in expected]
    assert received == expected


async def test_text_messages_are_ignored() -> None:
    """As recorded in text_frame: the audio around a text message is transcribed as if it were not there."""
    async with serving(ScriptedEngine(counting(2))) as running, await RawClient.connect(running.port) as client:
        assert (await client.receive_event())["type"] == "Ready"
        client.write(frame(TEXT, b"hello"))
        client.silence(1920)
        client.write(frame(TEXT, "é".encode()))
        client.silence(1920)
        client.marker(3)
        kinds = [event["type"] for event in await client.events_until("Marker")]
    assert kinds.count("Step") == 2


async def test_init_in_the_middle_is_answered_by_ready() -> None:
    """A client's Init starts the words anew."""
    engine = ScriptedEngine(counting(50), steps=False)
    async with serving(engine) as running, await RawClient.connect(running.port) as client:
        client.silence(1920)
        client.send(bytes.fromhex("81a474797065a4496e6974"))
        client.silence(1920)
        client.marker(1)
        events = await client.events_until("Marker")
    assert [e["type"] for e in events if e["type"] != "EndWord"] == ["Ready", "Word", "Ready", "Word", "Marker"]
    assert [e["text"] for e in events if e["type"] == "Word"] == ["w0", "w0"]


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 100, 1000])
async def test_socket_may_cut_messages_anywhere(size: int) -> None:
    """TCP has no message borders: the same bytes in pieces of any size give the same session."""
    samples = (3, 0, 5) if size < 100 else (10, 200, 1710)
    data = b"".join(frame(BINARY, protocol.encode_audio(np.zeros(n, np.float32))) for n in samples)
    data += frame(BINARY, protocol.encode_marker(1))
    async with serving(ScriptedEngine(counting(1))) as running, await RawClient.connect(running.port) as client:
        for start in range(0, len(data), size):
            client.write(data[start : start + size])
            await client.drain()
        assert (await client.events_until("Marker"))[-1] == {"type": "Marker", "id": 1}


async def test_small_messages_are_not_held_back_by_the_kernel() -> None:
    """TCP_NODELAY, which moshi-server does not set."""
    async with serving(ScriptedEngine()) as running, await RawClient.connect(running.port) as client:
        await client.receive_event()
        (connection,) = running.server.service.connections
        with socket.socket(fileno=os.dup(connection.fileno())) as same:
            assert same.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


async def test_frames_sent_with_the_request_are_not_lost() -> None:
    """A client need not wait for the 101."""
    early = frame(BINARY, protocol.encode_audio(np.zeros(1920, np.float32))) + frame(BINARY, protocol.encode_marker(9))
    async with serving(ScriptedEngine(counting(1))) as running, await RawClient.connect(running.port, early=early) as client:
        kinds = [event["type"] for event in await client.events_until("Marker")]
    assert kinds == ["Ready", "Step", "Word", "EndWord", "Marker"]


def test_transcript_takes_ends_from_the_next_end() -> None:
    """The helper's own rule, which the other tests lean on."""
    transcript = client_flows.Transcript([Word("a", 1.0), EndWord(1.5), Word("b", 2.0)])
    assert transcript.words == [("a", 1.0, 1.5), ("b", 2.0, None)]
