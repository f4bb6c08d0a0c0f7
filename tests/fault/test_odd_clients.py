"""Clients that are slow, silent, huge or tiny, and requests that no client should send, next to one that hears the same."""

import asyncio
import contextlib
import gzip
import logging
import socket
import time
from pathlib import Path

import numpy as np
import pytest
from tests.support.callers import CALLERS, Caller, as_frame
from tests.support.engines import Kind, speech
from tests.support.house import NUMBERS, WORDS, House, house
from tests.support.media import encode
from tests.support.raw_ws import BINARY, HANDSHAKE, NotUpgraded, RawClient, frame
from tests.support.serving import DEADLINE, KEY, raw_request, until
from tests.support.socket_processes import counts

from moshi_stt import protocol
from moshi_stt.cli.logs import DailyFileHandler
from moshi_stt.constants import DEFAULT_PATH, SAMPLE_RATE
from moshi_stt.server import app, upload

NATIVE = CALLERS["native"]


def errors(there: House, kind: str) -> float:
    """The count of one kind of error."""
    counted = there.running.server.service.metrics.registry.get_sample_value("moshi_stt_errors_total", {"kind": kind})
    return counted or 0.0


# ---- WebSockets ----------------------------------------------------------------------------------------------------------


async def test_half_open_peer_is_closed_when_it_answers_no_ping(caller: Caller, kind: Kind) -> None:
    """Its machine is gone without a word: nothing comes any more. By a clock that the test moves."""
    limits = {"ping_seconds": 300.0, "silent_seconds": 900.0, "idle_seconds": 9_000.0}
    async with house(kind, caller, **limits) as there, there.visitor(caller) as (call, connection):
        call.say(speech(NUMBERS))
        await until(lambda: connection.tally.samples >= len(speech(NUMBERS)), "its audio")
        now = asyncio.get_running_loop().time()
        connection.tick(now + 1)
        connection.tick(now + 850)
        assert errors(there, "silent") == 0
        connection.tick(now + 902)
        assert errors(there, "silent") == 1
        messages, code = await call.rest()
        assert caller.is_error(messages[-1])
        assert code in (1008, 4011)


async def test_reader_that_stops_is_closed(caller: Caller, kind: Kind) -> None:
    """What it does not read fills its socket, then nothing more is taken of its stream; after `stuck_seconds` it is closed."""
    limits = {"ping_seconds": 9_000.0, "silent_seconds": 9_000.0, "idle_seconds": 9_000.0, "stuck_seconds": 600.0}
    async with house(kind, caller, **limits) as there, there.visitor(caller, receive_buffer=2_048) as (call, connection):
        assert connection._socket is not None
        transport = connection._socket._transport
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2_048)
        transport.set_write_buffer_limits(high=4_096)
        call.client.reader._transport.pause_reading()  # type: ignore[attr-defined]

        async def push() -> None:
            number = 0
            while True:
                call.say(speech([number % 29 + 1]))
                for _ in range(20):
                    number += 1
                    call.send(caller.mark(number))
                await call.client.writer.drain()
                await asyncio.sleep(0.01)

        pushing = asyncio.create_task(push())
        await until(lambda: connection._socket.is_full, "a socket that takes no more")
        pushing.cancel()
        now = asyncio.get_running_loop().time()
        connection.tick(now + 1)
        connection.tick(now + 590)
        assert errors(there, "stuck") == 0

        def is_closed() -> bool:
            nonlocal now
            now += 610  # again where the kernel has taken some more
            connection.tick(now)
            return errors(there, "stuck") == 1

        await until(is_closed, "the end of the client that is stuck")
        assert connection.held_bytes < 1_000_000
        call.client.reset()


async def test_messages_of_one_sample(kind: Kind) -> None:
    async with house(kind, NATIVE) as there, there.visitor(NATIVE) as (call, _):
        pcm = speech(NUMBERS)
        for start in range(0, len(pcm), 4_000):
            call.client.write(b"".join(frame(BINARY, protocol.encode_audio([each])) for each in pcm[start : start + 4_000]))
            await call.client.drain()
        call.send(NATIVE.mark(1))
        assert await call.words_until_marked(1) == WORDS


async def test_a_message_of_sixty_megabytes(kind: Kind) -> None:
    """Ten minutes in one message: decoded in a thread, and every word of it comes."""
    said = [(number * number + number // 7) % 39 + 1 for number in range(1_000)]
    pcm = speech(said)
    padded = np.concatenate([pcm, np.zeros(60_000_000 // 4 - len(pcm), np.float32)])
    message = protocol.encode_audio(padded, as_bin=True)
    assert len(message) >= 60_000_000
    async with house(kind, NATIVE) as there, there.visitor(NATIVE) as (call, _):
        call.client.write(frame(BINARY, message))
        call.send(NATIVE.mark(1))
        assert await call.words_until_marked(1) == [f"w{number}." for number in said]


async def test_headers_of_every_odd_size(kind: Kind) -> None:
    """Served where they are small, refused where they are not, and never a hang or a word in the log."""
    async with house(kind, NATIVE) as there:
        for size in (0, 1, 125, 4_096, 8_000, 8_189, 8_190, 8_191, 8_192, 16_384, 65_536, 1_000_000):
            assert await upgraded(there.port, f"X-Odd: {'x' * size}\r\n") in ((101,) if size < 8_000 else (101, 400, 431, None))
        for count in (1, 99, 500, 5_000):
            extra = "".join(f"X-{number}: y\r\n" for number in range(count))
            assert await upgraded(there.port, extra) in ((101,) if count < 100 else (101, 400, 431, None))
        for extra in ("X: \x00\r\n", ": empty\r\n", "No colon\r\n", "X : y\r\n", " folded\r\n", "X: \xff\xfe\r\n"):
            assert await upgraded(there.port, extra) in (101, 400)


async def upgraded(port: int, extra: str) -> int | None:
    """Status of the answer; None where the server closed before it had read the request."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        async with asyncio.timeout(DEADLINE):
            writer.write(HANDSHAKE.format(path=DEFAULT_PATH, key=KEY, extra=extra).encode("latin-1"))
            with contextlib.suppress(ConnectionError):
                line = await reader.readline()
                return int(line.split()[1]) if line else None
            return None
    finally:
        writer.transport.abort()


async def test_slow_handshake_is_closed(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request that comes byte by byte, and one that does not come: both end after the time of an idle connection."""
    monkeypatch.setattr(app, "KEEPALIVE_SECONDS", 2.0)
    async with house(kind, NATIVE) as there:
        ends = [asyncio.open_connection("127.0.0.1", there.port) for _ in range(20)]
        clients = [await end for end in ends]

        async def drip(writer: asyncio.StreamWriter) -> None:
            with contextlib.suppress(ConnectionError):
                for byte in HANDSHAKE.format(path=DEFAULT_PATH, key=KEY, extra=f"X-Long: {'y' * 5_000}\r\n").encode():
                    writer.write(bytes((byte,)))
                    await asyncio.sleep(0.1)

        dripping = [asyncio.create_task(drip(writer)) for _, writer in clients[::2]]
        for reader, writer in clients:
            with contextlib.suppress(ConnectionError):
                assert await asyncio.wait_for(reader.read(), DEADLINE) == b""
            writer.close()
        for each in dripping:
            each.cancel()


async def test_foreign_origin_is_refused(caller: Caller, kind: Kind) -> None:
    async with house(kind, caller) as there:
        for origin in ("https://evil.example", "http://127.0.0.1.evil.example", "null", "http://10.0.0.1"):
            with pytest.raises(NotUpgraded, match="403"):
                await RawClient.connect(there.port, caller.path, extra=f"{caller.headers}Origin: {origin}\r\n")


async def test_compressed_messages_are_neither_offered_nor_taken(caller: Caller, kind: Kind) -> None:
    """A small message could unpack to any size: the extension is not agreed to, and a compressed frame is a violation."""
    extra = "Sec-WebSocket-Extensions: permessage-deflate\r\n"
    async with house(kind, caller) as there:
        request = HANDSHAKE.format(path=caller.path, key=KEY, extra=caller.headers + extra).encode()
        answer = await raw_request(there.port, request)
        assert answer.status == 101
        assert "sec-websocket-extensions" not in answer.headers
        async with await caller.connect(there.port) as call:
            call.client.write(frame(BINARY, gzip.compress(bytes(100_000)), reserved=4))
            messages, code = await call.rest()
            assert caller.is_error(messages[-1])
            assert code in (1002, 4011)


async def test_thousands_of_connections(kind: Kind) -> None:
    """As many as five thousand a minute would be in six seconds: all are answered, and nothing is left of them.

    The neighbour hears what it hears without them (`house`).
    """
    async with house(kind, NATIVE) as there:

        async def come_and_go() -> None:
            for number in range(50):
                client = await RawClient.connect(there.port)
                client.write(as_frame(protocol.encode_audio(speech([3]))))
                client.reset() if number % 2 else client.writer.close()

        connects = 'asr_connect{handler="all"}'
        before = (await counts(there.running))[connects]
        await asyncio.gather(*(come_and_go() for _ in range(10)))
        await there.alone()
        assert (await counts(there.running))[connects] == before + 500


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
async def test_logs_on_a_full_disk_cost_no_stream(kind: Kind, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for day in (0, 1):  # the test may run past midnight
        date = time.strftime("%Y-%m-%d", time.gmtime(time.time() + day * 86_400))
        (tmp_path / f"log.test.{date}").symlink_to("/dev/full")
    root = logging.getLogger()
    handler = DailyFileHandler(tmp_path, "test")
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    try:
        async with house(kind, NATIVE) as there:
            for _ in range(5):
                async with there.visitor(NATIVE) as (call, _):
                    call.say(speech(NUMBERS))
                    call.send(NATIVE.mark(1))
                    assert await call.words_until_marked(1) == WORDS
    finally:
        root.removeHandler(handler)
        handler.close()
    assert "log lines are lost" in capsys.readouterr().err


# ---- POST ----------------------------------------------------------------------------------------------------------------


def posted(body: bytes, extra: str = "") -> bytes:
    head = f"POST {DEFAULT_PATH} HTTP/1.1\r\nHost: x\r\nkyutai-api-key: {KEY}\r\nContent-Length: {len(body)}\r\n{extra}\r\n"
    return head.encode() + body


@pytest.mark.parametrize("format", ["wav", "flac", "opus"])
async def test_audio_that_unpacks_to_more_than_is_taken(kind: Kind, format: str) -> None:
    """Silence of five minutes in a small file: 413, and its slot is free again."""
    body = encode(np.zeros(300 * SAMPLE_RATE, np.float32), SAMPLE_RATE, format)
    async with house(kind, NATIVE, max_audio_seconds=20.0) as there:
        answer = await raw_request(there.port, posted(body))
        assert (answer.status, b"max_audio_seconds" in answer.body) == (413, True)
        await until(lambda: not there.running.server.service.uploads, "the upload")


async def test_compressed_body_is_not_unpacked(kind: Kind) -> None:
    async with house(kind, NATIVE) as there:
        for coding in ("gzip", "deflate", "br", "zstd", "gzip, gzip"):
            body = gzip.compress(bytes(10_000_000))
            answer = await raw_request(there.port, posted(body, f"Content-Encoding: {coding}\r\n"))
            assert answer.status == 415


async def test_body_that_drips_is_given_up(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upload, "RATE_SECONDS", 0.0)
    async with house(kind, NATIVE, upload_bytes_per_second=1_000_000_000) as there:
        reader, writer = await asyncio.open_connection("127.0.0.1", there.port)
        request = posted(bytes(2_000))
        writer.write(request[:-1_999])
        async with asyncio.timeout(DEADLINE):
            assert b" 408 " in await reader.readline()
        writer.transport.abort()
        await until(lambda: not there.running.server.service.uploads, "the upload")
