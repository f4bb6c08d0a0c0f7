"""How WebSockets end: whatever was wrong, the last words arrive, the handshake completes, and the slot is free."""

import asyncio
import struct
from collections.abc import Iterable

import numpy as np
import pytest
from tests.support.raw_ws import BINARY, CLOSE, CONTINUATION, PING, PONG, TEXT, RawClient, frame
from tests.support.scripted_engine import ScriptedEngine, ScriptedWord, counting
from tests.support.serving import KEY, Running, raw_request, server_config, serving, until

from moshi_stt import protocol
from moshi_stt.constants import SAMPLE_RATE
from moshi_stt.engine.stream import StreamLimits
from moshi_stt.server.doors.kyutai import KyutaiSession
from moshi_stt.session import Action

NOT_PACKED = b"\xc1"


def slots_free(engine: ScriptedEngine) -> bool:
    return engine.used_slots == 0


async def all_gone(running: Running, engine: ScriptedEngine) -> None:
    """Nothing is left of any connection."""
    await until(lambda: slots_free(engine) and running.connections() == 0, "every slot and connection free")


async def test_no_slot_is_said_then_closed_with_try_again_later() -> None:
    """Message and order as recorded in no_slot; moshi-server's Close has no status, ours has 1013."""
    engine = ScriptedEngine(slots=1)
    async with serving(engine) as running, await RawClient.connect(running.port) as first:
        assert (await first.receive_event())["type"] == "Ready"
        async with await RawClient.connect(running.port) as second:
            opcode, payload = await second.receive()
            assert (opcode, payload.hex()) == (
                BINARY,
                "82a474797065a54572726f72a76d657373616765b06e6f2066726565206368616e6e656c73",
            )
            opcode, payload = await second.receive()
            assert (opcode, payload[:2]) == (CLOSE, struct.pack("!H", 1013))
            second.close(1013)
            await second.end_of_file()
        first.close()
        assert (await first.rest())[1] == 1000
        await all_gone(running, engine)
        async with await RawClient.connect(running.port) as third:
            assert (await third.receive_event())["type"] == "Ready"


async def test_malformed_message_lets_what_was_good_come_out() -> None:
    """moshi-server stepped one of three frames and dropped the connection without a word (recorded in malformed)."""
    engine = ScriptedEngine(counting(3, 1))
    async with serving(engine) as running, await RawClient.connect(running.port) as client:
        client.silence(3 * 1920)
        client.marker(5)
        client.send(NOT_PACKED)
        client.silence(1920)  # behind the bad message: not taken
        events, code = await client.rest()
        assert [e["type"] for e in events if e["type"] not in ("Word", "EndWord")] == [
            "Ready",
            *["Step"] * 3,
            "Marker",
            "Error",
        ]
        assert [e["text"] for e in events if e["type"] == "Word"] == ["w0", "w1", "w2"]
        assert "not MessagePack" in events[-1]["message"]
        assert code == 1007
        client.close(code)
        await client.end_of_file()
        await all_gone(running, engine)


@pytest.mark.parametrize(
    ("message", "code"),
    [(b"", 1007), (b"\xc0", 1003), (bytes.fromhex("81a474797065a3466f6f"), 1003), (b"\x91" * 5000, 1008)],
    ids=["empty", "nil", "unknown type", "deep"],
)
async def test_status_says_what_kind_of_wrong(message: bytes, code: int) -> None:
    async with serving(ScriptedEngine()) as running, await RawClient.connect(running.port) as client:
        client.send(message)
        events, closed = await client.rest()
    assert events[-1]["type"] == "Error"
    assert closed in (code, 1007)


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (frame(BINARY, b"x", masked=False), 1002),
        (frame(3, b"x"), 1002),
        (frame(11), 1002),
        (frame(BINARY, b"x", reserved=4), 1002),
        (frame(PING, b"x", fin=False), 1002),
        (frame(PING, b"x" * 126), 1002),
        (frame(CONTINUATION, b"x"), 1002),
        (frame(BINARY, b"x", fin=False) + frame(BINARY, b"y"), 1002),
        (frame(TEXT, b"x", fin=False) + frame(CONTINUATION, b"y", reserved=1), 1002),
        (b"\x82\xff\xff\xff\xff\xff\xff\xff\xff\xff\x00\x00\x00\x00", 1009),
        (frame(TEXT, b"\xff\xfe"), 1007),
        (frame(BINARY, b"x" * 5001), 1009),
        (frame(BINARY, b"x" * 3000, fin=False) + frame(CONTINUATION, b"y" * 3000), 1009),
    ],
    ids=[
        *("unmasked", "unknown opcode", "unknown control opcode", "reserved bits", "fragmented ping", "long ping"),
        *(
            "nothing to continue",
            "interrupted message",
            "reserved bit later",
            "impossible length",
            "not UTF-8",
            "too big",
            "too big in parts",
        ),
    ],
)
async def test_broken_framing_is_told_after_what_was_good(data: bytes, code: int) -> None:
    """Nothing after it is read as frames, not even a Close (RFC 6455 section 7.1.7); the server's half is closed at once."""
    engine = ScriptedEngine(counting(1))
    async with serving(engine, max_message_bytes=5000) as running, await RawClient.connect(running.port) as client:
        client.send(protocol.encode_audio(np.zeros(950, np.float32)))
        client.send(protocol.encode_audio(np.zeros(970, np.float32)))
        client.write(data)
        events, closed = await client.rest()
        assert [e["type"] for e in events if e["type"] != "EndWord"] == ["Ready", "Step", "Word", "Error"]
        assert closed == code
        client.close(code)
        await client.end_of_file()
        client.writer.close()
        await all_gone(running, engine)


@pytest.mark.parametrize("code", [1000, 1001, 1008, 3000, 4999, None])
async def test_client_close_is_answered(code: int | None) -> None:
    """moshi-server never answers it. The answer has the client's status, or 1000."""
    engine = ScriptedEngine(counting(9))
    async with serving(engine) as running, await RawClient.connect(running.port) as client:
        client.silence(5 * 1920)
        client.close(code, b"bye" if code else b"")
        assert (await client.rest())[1] == (code or 1000)
        await client.end_of_file()
        await all_gone(running, engine)


@pytest.mark.parametrize("payload", [b"\x03", struct.pack("!H", 999), struct.pack("!H", 1005), struct.pack("!H", 5000)])
async def test_close_with_an_impossible_status_is_answered_as_broken(payload: bytes) -> None:
    async with serving(ScriptedEngine()) as running, await RawClient.connect(running.port) as client:
        client.send(payload, CLOSE)
        assert (await client.rest())[1] == 1002
        await client.end_of_file()


async def test_close_with_much_audio_waiting_frees_the_slot_at_once() -> None:
    """What is pending may be dropped: the client reads no more."""
    engine = ScriptedEngine()
    async with serving(engine) as running, await RawClient.connect(running.port) as client:
        await client.receive_event()
        engine.hold()
        for _ in range(10):
            client.silence(SAMPLE_RATE)
        client.close()
        assert (await client.rest())[1] == 1000
        await all_gone(running, engine)


async def test_half_close_lets_the_rest_come_out() -> None:
    """A client that shuts its sending half has ended its audio, and gets all of its transcript and a Close 1000."""
    engine = ScriptedEngine(counting(100, 1), delay_frames=6, step_seconds=0.001)
    async with serving(engine) as running, await RawClient.connect(running.port) as client:
        client.silence(100 * 1920 + 5)
        client.half_close()
        events, code = await client.rest()
        assert [e["text"] for e in events if e["type"] == "Word"] == [f"w{i}" for i in range(100)]
        assert code == 1000
        await client.end_of_file()
        await all_gone(running, engine)


async def test_half_close_with_a_full_inbox_loses_nothing() -> None:
    """The end-of-file is behind data that is not read yet."""
    engine = ScriptedEngine(counting(50, 1), limits=StreamLimits(inbox_samples=4 * 1920))
    async with serving(engine) as running, await RawClient.connect(running.port) as client:
        engine.hold()
        for _ in range(60):
            client.silence(1920)
        client.half_close()
        await until(lambda: engine.queued_samples == 4 * 1920)
        engine.release()
        events, code = await client.rest()
        assert len([e for e in events if e["type"] == "Word"]) == 50
        assert code == 1000
    assert engine.samples == [60 * 1920]


async def test_malformed_behind_a_full_inbox_loses_nothing() -> None:
    """The bad message is read while the good ones before it still wait for room."""
    engine = ScriptedEngine(counting(50, 1), limits=StreamLimits(inbox_samples=4 * 1920))
    async with serving(engine) as running, await RawClient.connect(running.port) as client:
        engine.hold()
        for _ in range(60):
            client.silence(1920)
        client.marker(1)
        client.write(frame(3))
        await until(lambda: engine.queued_samples == 4 * 1920)
        engine.release()
        events, code = await client.rest()
    assert len([e for e in events if e["type"] == "Word"]) == 50
    assert [e["type"] for e in events[-2:]] == ["Marker", "Error"]
    assert code == 1002
    assert engine.samples == [60 * 1920]


@pytest.mark.parametrize("how", ["close", "reset", "half_close and gone"])
@pytest.mark.parametrize("blocked", [False, True], ids=["idle", "inbox full"])
async def test_loss_frees_the_slot_while_the_engine_stands_still(how: str, blocked: bool) -> None:
    """A client that is gone is noticed though its socket is not read and nothing is being written to it."""
    engine = ScriptedEngine(slots=1, limits=StreamLimits(inbox_samples=2 * 1920))
    async with serving(engine) as running:
        client = await RawClient.connect(running.port)
        assert (await client.receive_event())["type"] == "Ready"
        engine.hold()
        if blocked:
            for _ in range(40):
                client.silence(1920)
            await until(lambda: engine.queued_samples == 2 * 1920)
        if how == "reset":
            client.reset()
        else:
            if how != "close":
                client.half_close()
            client.writer.transport.abort() if how == "close" else client.writer.close()
        await all_gone(running, engine)
        async with await RawClient.connect(running.port) as next_client:
            engine.release()
            assert (await next_client.receive_event())["type"] == "Ready"


async def test_client_that_never_answers_our_close_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moshi_stt.server.timers.CLOSE_SECONDS", 0.1)
    engine = ScriptedEngine()
    async with serving(engine, ping_seconds=0.5) as running, await RawClient.connect(running.port) as client:
        client.send(NOT_PACKED)
        assert (await client.rest())[1] == 1007
        await client.end_of_file()
        await all_gone(running, engine)


async def test_upload_goes_on_behind_our_close() -> None:
    """A client amid a long upload sees Error and Close: its data is read and thrown away, not answered by a reset."""
    engine = ScriptedEngine()
    async with serving(engine) as running, await RawClient.connect(running.port) as client:
        client.send(NOT_PACKED)
        for _ in range(40):
            client.silence(SAMPLE_RATE)
        await client.drain()
        events, code = await client.rest()
        assert (events[-1]["type"], code) == ("Error", 1007)
        client.silence(SAMPLE_RATE)
        client.close(1007)
        await client.end_of_file()


async def test_engine_failure_is_told_to_every_stream_and_turns_health_red() -> None:
    """Error, 1011, and the server asks for its process to end with a non-zero status."""
    engine = ScriptedEngine()
    async with serving(engine) as running:
        waiting = asyncio.create_task(running.server.wait(asyncio.Event()))
        clients = [await RawClient.connect(running.port) for _ in range(3)]
        for client in clients:
            assert (await client.receive_event())["type"] == "Ready"
        engine.fail_next("the device is gone")
        for client in clients:
            events, code = await client.rest()
            assert events[-1]["type"] == "Error"
            assert "the device is gone" in events[-1]["message"]
            assert code == 1011
            client.close(1011)
            await client.end_of_file()
            client.writer.close()
        answer = await raw_request(running.port, b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert answer.status == 503
        assert b"the device is gone" in answer.body
        request = f"GET /api/asr-streaming?auth_id={KEY} HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        request += "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
        assert (await raw_request(running.port, request.encode())).status == 503
        assert await asyncio.wait_for(waiting, 20) == 1


async def test_fault_of_our_own_ends_that_connection_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A bug behind a message is an Error and 1011 to its client, and a traceback in the log, not a dropped socket."""

    def broken(session: KyutaiSession, message: str | bytes) -> Iterable[Action]:
        if message == NOT_PACKED:
            raise ZeroDivisionError("our own")
        return receive(session, message)

    receive = KyutaiSession.receive
    monkeypatch.setattr(KyutaiSession, "receive", broken)
    engine = ScriptedEngine(counting(5, 1), slots=2)
    async with (
        serving(engine) as running,
        await RawClient.connect(running.port) as client,
        await RawClient.connect(running.port) as other,
    ):
        client.send(NOT_PACKED)
        events, code = await client.rest()
        assert (events[-1]["type"], code) == ("Error", 1011)
        assert "its log says why" in events[-1]["message"]
        other.silence(1920)
        other.marker(1)
        assert (await other.events_until("Marker"))[-1]["id"] == 1
    assert "ZeroDivisionError: our own" in caplog.text


async def test_shutdown_tells_running_streams() -> None:
    """Error and 1001; the handshake completes; the server's stop returns."""
    engine = ScriptedEngine([ScriptedWord("a", 0, 1)])
    async with serving(engine) as running, await RawClient.connect(running.port) as client:
        client.silence(1920)
        await client.events_until("Word")
        stopping = asyncio.create_task(running.server.stop())
        events, code = await client.rest()
        assert events[-1]["type"] == "Error"
        assert code == 1001
        client.close(1001)
        await client.end_of_file()
        await asyncio.wait_for(stopping, 20)
    assert engine.used_slots == 0


async def test_websocket_opened_while_the_model_loads_waits_for_its_ready() -> None:
    """As with moshi-server; what the client sends meanwhile is kept."""
    loading = asyncio.Event()

    class Loading(ScriptedEngine):
        async def start(self) -> None:
            await loading.wait()
            await super().start()

    from moshi_stt.server.app import Server

    engine = Loading(counting(1))
    server = Server(server_config(), {"asr": engine}, "127.0.0.1", 0)
    starting = asyncio.create_task(server.start())
    try:
        await until(lambda: server.port)
        async with await RawClient.connect(server.port) as client:
            client.silence(1920)
            client.marker(1)
            answer = await raw_request(server.port, b"GET /ready HTTP/1.1\r\nHost: x\r\n\r\n")
            assert (answer.status, b"loading" in answer.body) == (503, True)
            assert (await raw_request(server.port, b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")).status == 200
            loading.set()
            events = await client.events_until("Marker")
            assert [e["type"] for e in events] == ["Ready", "Step", "Word", "EndWord", "Marker"]
        await starting
    finally:
        await server.stop()


async def test_pings_are_answered_with_their_payload() -> None:
    async with serving(ScriptedEngine()) as running, await RawClient.connect(running.port) as client:
        await client.receive_event()
        client.write(frame(PING, b"are you there"))
        assert await client.receive() == (PONG, b"are you there")
