"""What clients do wrong, and what goes wrong with them: at every door, with every kind of engine, and a neighbour at peace."""

import asyncio
import contextlib
import gc
import random
import struct

import numpy as np
import pytest
from tests.support.callers import ALL_DOORS, Caller, as_frame
from tests.support.engines import Kind, speech
from tests.support.house import NUMBERS, WORDS, house
from tests.support.raw_ws import BINARY, CONTINUATION, TEXT, NotUpgraded, frame
from tests.support.serving import DEADLINE, raw_request, serving, until

from moshi_stt.server.connection import Connection


def connections_in_memory() -> int:
    gc.collect()
    return len([each for each in gc.get_objects() if type(each) is Connection])


def upgrade(caller: Caller, headers: str) -> bytes:
    path = caller.path.partition("?")[0]
    return (
        f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
        f"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n{headers}\r\n"
    ).encode()


async def test_no_key_no_upgrade(caller: Caller, kind: Kind) -> None:
    async with house(kind, caller) as there:
        assert (await raw_request(there.port, upgrade(caller, ""))).status == 401
        wrong = "kyutai-api-key: x\r\nx-plain-key: x\r\nAuthorization: Bearer x\r\nx-api-key: x\r\n"
        assert (await raw_request(there.port, upgrade(caller, wrong))).status == 401


async def test_garbage_is_answered_or_closed_after_what_was_good(caller: Caller, kind: Kind) -> None:
    """The words before it come out; then an error, or a Close with a status; the slot is free; nobody else hears of it."""
    async with house(kind, caller) as there:
        for garbage in caller.garbage:
            async with await caller.connect(there.port) as call:
                call.say(speech(NUMBERS))
                call.send(caller.mark(1))
                assert await call.words_until_marked(1) == WORDS
                call.send(garbage)
                message = await call.receive()
                while isinstance(message, str | bytes) and not caller.is_error(message):
                    message = await call.receive()
                assert isinstance(message, str | bytes) or (message is not None and message >= 1000), garbage
            await there.alone()


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (frame(BINARY, b"x", masked=False), 1002),
        (frame(3, b"x"), 1002),
        (frame(CONTINUATION, b"x"), 1002),
        (frame(BINARY, b"x", reserved=4), 1002),
        (frame(TEXT, b"\xff\xfe"), 1007),
        (b"\x82\xff" + struct.pack("!Q", 1 << 40), 1009),
    ],
    ids=["unmasked", "unknown opcode", "nothing to continue", "reserved bits", "not UTF-8", "oversized"],
)
async def test_broken_framing_is_told_after_what_was_good(caller: Caller, kind: Kind, data: bytes, code: int) -> None:
    async with house(kind, caller) as there, await caller.connect(there.port) as call:
        call.say(speech(NUMBERS))
        call.client.write(data)
        messages, closed = await call.rest()
        assert [word for message in messages for word in caller.words(message)] == WORDS
        assert caller.is_error(messages[-1])
        assert closed in (code, 4011)  # a door may have a status of its own
        await call.client.end_of_file()


@pytest.mark.parametrize("how", range(6))
async def test_clients_that_vanish_leave_nothing_behind(caller: Caller, kind: Kind, how: int) -> None:
    """By reset, end-of-file, Close or half a frame, with audio in every stage of the way: 24 on two slots."""
    async with house(kind, caller) as there:
        generator = random.Random(how)

        async def come_and_go() -> None:
            for _ in range(6):
                try:
                    call = await caller.connect(there.port)
                except NotUpgraded as refused:  # some doors say before the upgrade that every slot is taken
                    if refused.is_full:
                        continue
                    raise
                if generator.random() < 0.5:
                    call.say(speech(NUMBERS))
                match how:
                    case 0:
                        call.client.reset()
                    case 1:
                        call.client.writer.close()
                    case 2:
                        call.client.close()
                        call.client.writer.close()
                    case 3:
                        call.client.half_close()
                        call.client.writer.close()
                    case 4:
                        call.client.write(as_frame(caller.audio(speech(NUMBERS))[0])[:50])
                        call.client.reset()
                    case 5:
                        call.send(caller.mark(1))
                        call.client.half_close()
                        await call.rest()
                        call.client.writer.close()
                with contextlib.suppress(ConnectionError):
                    await call.client.writer.wait_closed()

        await asyncio.gather(*(come_and_go() for _ in range(4)))
        await there.alone()
        await until(lambda: connections_in_memory() == 1, "the memory of the others free")


async def test_random_bytes_instead_of_frames(caller: Caller, kind: Kind) -> None:
    """Each connection ends, and the neighbour hears what it hears without them (`house`)."""
    async with house(kind, caller, max_message_bytes=100_000) as there:
        generator = random.Random(7)
        for _ in range(20):
            async with await caller.connect(there.port) as call:
                data = bytearray(b"".join(map(as_frame, caller.audio(speech(NUMBERS))[:4])))
                for _ in range(3):
                    data[generator.randrange(len(data))] = generator.randrange(256)
                with contextlib.suppress(ConnectionError):
                    call.client.write(bytes(data) + generator.randbytes(50))
                    await call.client.drain()
                    call.client.half_close()
                await call.rest()


async def test_a_failed_model_is_told_at_once(caller: Caller, kind: Kind) -> None:
    """In the protocol's own shape, and by a status that is not 1000."""
    engine = kind.make()
    async with serving(engine, doors=ALL_DOORS) as running, await caller.connect(running.port) as call:
        call.say(speech(NUMBERS))
        call.send(caller.mark(1))
        assert await call.words_until_marked(1) == WORDS
        kind.break_model()
        call.say(np.tile(speech(NUMBERS), 3))
        call.send(caller.mark(2))
        messages, code = await call.rest()
        assert caller.is_error(messages[-1])
        assert code in (1011, 4011)


async def test_a_stream_that_has_lasted_long_enough_gets_its_words_and_is_told(caller: Caller, kind: Kind) -> None:
    """`stream_seconds` by a clock that the test moves, for this stream alone."""
    async with house(kind, caller, stream_seconds=1_000.0) as there, there.visitor(caller) as (call, connection):
        call.say(speech(NUMBERS))
        await until(lambda: connection.tally.samples >= len(speech(NUMBERS)), "its audio")
        now = asyncio.get_running_loop().time()
        connection.tick(now + 990)
        connection.tick(now + 1_001)
        messages, code = await call.rest()
        assert [word for message in messages for word in caller.words(message)] == WORDS
        assert caller.is_error(messages[-1])
        assert "stream_seconds" in str(messages[-1])
        assert code in (1008, 4011)


async def test_shutdown_is_told(caller: Caller, kind: Kind) -> None:
    async with serving(kind.make(), doors=ALL_DOORS) as running, await caller.connect(running.port) as call:
        call.say(speech(NUMBERS))
        call.send(caller.mark(1))
        assert await call.words_until_marked(1) == WORDS
        stopping = asyncio.create_task(running.server.stop())
        messages, code = await call.rest()
        assert caller.is_error(messages[-1])
        assert code in (1001, 4011)
        call.client.close(1001)
        await asyncio.wait_for(stopping, 2 * DEADLINE)
