"""What is bounded: how long a client says or reads nothing, memory, messages. And what is not punished."""

import socket
from typing import Any

import numpy as np
import pytest
from tests.support.raw_ws import BINARY, CLOSE, PING, PONG, TEXT, RawClient, frame
from tests.support.scripted_engine import ScriptedEngine, counting
from tests.support.serving import DEADLINE, HandClock, Running, serving, until

from moshi_stt import protocol
from moshi_stt.engine.stream import StreamLimits

UNSPOOLED: Any = {"spool_bytes": 0, "ahead_bytes": 1}
"""A server that reads no further once an inbox is full."""


def errors(running: Running, kind: str) -> float:
    """The count of one kind of error."""
    value: Any = running.server.service.metrics.registry.get_sample_value("moshi_stt_errors_total", {"kind": kind})
    return value or 0.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> HandClock:
    return HandClock(monkeypatch)


TIMERS: Any = {"ping_seconds": 1_000.0, "silent_seconds": 10_000.0, "idle_seconds": 20_000.0}


async def test_client_that_answers_nothing_is_closed_as_silent(clock: HandClock) -> None:
    """Error and 1008: it was pinged and did not even answer that."""
    async with serving(ScriptedEngine(), **TIMERS) as running, await RawClient.connect(running.port) as client:
        await client.receive_event()
        for _ in range(10):
            clock.advance(running, 1_100)
            assert (await client.receive())[0] == PING
        assert errors(running, "silent") == 0
        clock.advance(running, 1_100)
        events, code = await client.rest()
        assert events[-1]["type"] == "Error"
        assert "nothing came" in events[-1]["message"]
        assert code == 1008
        assert errors(running, "silent") == 1


async def test_client_that_only_answers_pings_is_closed_as_idle(clock: HandClock) -> None:
    """Error and 1008: pongs and text are traffic, but nothing to do."""
    async with serving(ScriptedEngine(), **TIMERS) as running, await RawClient.connect(running.port) as client:
        await client.receive_event()
        (connection,) = running.server.service.connections
        pings = 0
        clock.advance(running, 0)
        while True:
            clock.advance(running, 1_100)
            opcode, payload = await client.receive()
            if opcode != PING:
                break
            pings += 1
            client.write(frame(PONG, payload) + frame(TEXT, b"still here"))
            await until(lambda: connection._heard, "the pong")
        assert pings == 19
        assert opcode == BINARY
        opcode, payload = await client.receive()
        assert (opcode, payload[:2]) == (CLOSE, b"\x03\xf0")
        assert errors(running, "idle") == 1


async def test_pings_come_during_a_long_upload_and_it_survives_the_silent_limit(clock: HandClock) -> None:
    """moshi-server pings only when it has nothing to send: a client that reads steadily and sends no more was cut at 20 s.

    Here the whole file is sent at once; its results come for three times the longest limit, with pings among them.
    """
    engine = ScriptedEngine(counting(40, 1))
    async with serving(engine, **TIMERS) as running, await RawClient.connect(running.port) as client:
        await client.receive_event()
        (connection,) = running.server.service.connections
        engine.hold()
        client.silence(40 * 1920)
        client.marker(1)
        await until(lambda: engine.queued_samples == 40 * 1920, "the file")
        for _ in range(60):
            clock.advance(running, 1_100)
            opcode, payload = await client.receive()
            assert opcode == PING
            client.write(frame(PONG, payload))
            await until(lambda: connection._heard, "the pong")
        engine.release()
        events = await client.events_until("Marker")
        assert [event["type"] for event in events].count("Word") == 40


async def test_unread_socket_is_not_the_clients_silence(clock: HandClock) -> None:
    """While the inbox is full we do not read, so that the client cannot be heard: no limit runs."""
    engine = ScriptedEngine(counting(30, 1), limits=StreamLimits(inbox_samples=2 * 1920))
    async with serving(engine, **TIMERS, **UNSPOOLED) as running, await RawClient.connect(running.port) as client:
        assert (await client.receive_event())["type"] == "Ready"
        (connection,) = running.server.service.connections
        engine.hold()
        for _ in range(30):
            client.silence(1920)
        client.marker(1)
        await until(lambda: engine.queued_samples == 2 * 1920 and connection.unheard, "a full inbox")
        for _ in range(80):  # four times the longest limit
            clock.advance(running, 1_100)
            while (await client.receive())[0] != PING:
                pass
        engine.release()
        events = await client.events_until("Marker")
        assert len([e for e in events if e["type"] == "Word"]) == 30


async def test_reader_that_is_stuck_is_closed_and_its_neighbour_unharmed(clock: HandClock) -> None:
    """It sends and sends and reads nothing: bounded memory, then the end; another stream goes on meanwhile."""
    engine = ScriptedEngine(counting(100_000, 1), limits=StreamLimits(outbox_events=64, stuck_seconds=10 * DEADLINE))
    async with (
        serving(engine, **(TIMERS | {"stuck_seconds": 5_000.0})) as running,
        await RawClient.connect(running.port, receive_buffer=2048) as stuck,
    ):
        await until(lambda: running.connections() == 1, "the connection")
        (connection,) = running.server.service.connections
        assert connection._socket is not None
        transport = connection._socket._transport
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2_048)
        transport.set_write_buffer_limits(high=4_096)
        stuck.reader._transport.pause_reading()  # type: ignore[attr-defined]
        async with await RawClient.connect(running.port) as other:
            while not connection._socket.is_full:
                stuck.silence(24_000)
                other.silence(1920)
                other.marker(1)
                await other.events_until("Marker")
            clock.advance(running, 0, connection)
            clock.advance(running, 4_000, connection)
            assert errors(running, "stuck") == 0

            def is_closed() -> bool:
                clock.advance(running, 5_100, connection)  # again where the kernel has taken some more
                return errors(running, "stuck") == 1

            await until(is_closed, "the end of the stuck client")
            assert connection.held_bytes < 1_000_000
            await until(lambda: engine.used_slots == 1, "the stuck client's slot free")
            other.marker(2)
            await other.events_until("Marker")


async def test_fast_writer_is_held_back_by_tcp() -> None:
    """A full inbox stops the reading: what waits in the server is bounded, and all of it is transcribed in the end."""
    engine = ScriptedEngine(limits=StreamLimits(inbox_samples=48_000))
    async with serving(engine, **UNSPOOLED) as running, await RawClient.connect(running.port) as client:
        assert (await client.receive_event())["type"] == "Ready"
        engine.hold()
        message = frame(BINARY, protocol.encode_audio(np.zeros(24_000, np.float32)))
        for _ in range(400):  # 48 MB: far beyond what kernel buffers hold
            client.write(message)
        client.marker(4)
        await until(lambda: engine.queued_samples == 48_000)
        (connection,) = running.server.service.connections
        before = client.writer.transport.get_write_buffer_size()
        assert before > 30e6, "the server has read on"
        assert connection.held_bytes < 1_000_000
        engine.release()
        events = await client.events_until("Marker")
        assert events[-1] == {"type": "Marker", "id": 4}
    assert engine.samples == [400 * 24_000]


async def test_ping_flood_of_a_client_that_does_not_read_is_bounded() -> None:
    """Only the latest ping is owed an answer (RFC 6455 section 5.5.3): pongs do not pile up."""
    async with (
        serving(ScriptedEngine()) as running,
        await RawClient.connect(running.port, receive_buffer=2048) as client,
    ):
        client.reader._transport.pause_reading()  # type: ignore[attr-defined]
        flood = frame(PING, b"x" * 125) * 500
        (connection,) = running.server.service.connections
        for _ in range(100):
            client.write(flood)
            await client.drain()
        client.silence(1920)
        await client.drain()
        assert connection.held_bytes < 1_000_000
        client.reader._transport.resume_reading()  # type: ignore[attr-defined]
        opcode = PONG
        while opcode != BINARY:
            opcode, _ = await client.receive()


async def test_large_message_does_not_stop_the_others() -> None:
    """A message of many megabytes is decoded in a thread, in order, and its neighbours' small ones are served meanwhile."""
    engine = ScriptedEngine(counting(5), slots=2, limits=StreamLimits(inbox_samples=100 * 24_000))
    async with (
        serving(engine) as running,
        await RawClient.connect(running.port) as large,
        await RawClient.connect(running.port) as small,
    ):
        large.silence(60 * 24_000)
        large.marker(1)
        for number in range(20):
            small.silence(1920)
            small.marker(number)
            assert (await small.events_until("Marker"))[-1]["id"] == number
        events = await large.events_until("Marker")
        assert len([e for e in events if e["type"] == "Word"]) == 5
    assert sorted(engine.samples) == [20 * 1920, 60 * 24_000]


async def test_fragments_and_empty_messages_are_as_good_as_whole_ones() -> None:
    """A message in many frames, with a ping between them, is one message."""
    message = protocol.encode_audio(np.zeros(1920, np.float32))
    async with serving(ScriptedEngine(counting(1))) as running, await RawClient.connect(running.port) as client:
        client.write(frame(BINARY, message[:10], fin=False))
        client.write(frame(PING, b"between"))
        for start in range(10, len(message), 1000):
            client.write(frame(0, message[start : start + 1000], fin=False))
        client.write(frame(0, b""))
        client.silence(0)
        client.marker(1)
        seen = []
        while not seen or seen[-1] != "Marker":
            opcode, payload = await client.receive()
            seen.append("pong" if opcode == PONG else protocol.decode_event(payload).__class__.__name__)
    assert [kind for kind in seen if kind != "pong"] == ["Ready", "Step", "Word", "EndWord", "Marker"]
    assert seen.count("pong") == 1


async def test_extensions_and_subprotocols_are_not_taken_up() -> None:
    """permessage-deflate is declined: a compressed frame is then a violation."""
    extra = "Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits\r\nSec-WebSocket-Protocol: a, b\r\n"
    async with serving(ScriptedEngine()) as running, await RawClient.connect(running.port, extra=extra) as client:
        client.write(frame(BINARY, b"\x00\x01", reserved=4))
        assert (await client.rest())[1] == 1002


async def test_warnings_of_the_session_are_logged(caplog: Any) -> None:
    """What the session finds odd about the audio is in the server's log, with the client's address."""
    async with serving(ScriptedEngine(), ping_seconds=0.1) as running, await RawClient.connect(running.port) as client:
        client.audio(np.full(1920, 20_000, np.float32))
        client.marker(1)
        await client.events_until("Marker")
        await until(lambda: "127.0.0.1" in caplog.text and "32768" in caplog.text)
