"""Clients that come and go, break off, or send rubbish, by the hundred; and one that minds its own business beside them."""

import asyncio
import contextlib
import gc
import logging
import os
import random

import numpy as np
import pytest
from tests.support.raw_ws import BINARY, RawClient, frame
from tests.support.scripted_engine import ScriptedEngine, counting
from tests.support.serving import Running, serving, until

from moshi_stt import protocol
from moshi_stt.server.connection import Connection

FUZZ_MESSAGES = int(os.environ.get("MOSHI_STT_FUZZ_MESSAGES", "3000"))
"""Set it to 100000 for the long run."""


class Bystander:
    """A client that speaks all the time and checks every word of what it gets."""

    def __init__(self, running: Running) -> None:
        self._running = running
        self.rounds = 0

    async def talk(self, stop: asyncio.Event) -> None:
        async with await RawClient.connect(self._running.port) as client:
            assert (await client.receive_event())["type"] == "Ready"
            while not stop.is_set():
                client.silence(2 * 1920)
                client.marker(self.rounds)
                events = await client.events_until("Marker")
                assert events[-1]["id"] == self.rounds
                words = [event["text"] for event in events if event["type"] == "Word"]
                assert words == [f"w{self.rounds}"], f"round {self.rounds}: {events}"
                self.rounds += 1
            client.close()
            assert (await client.rest())[1] == 1000

    @contextlib.asynccontextmanager
    async def beside(self):  # type: ignore[no-untyped-def]
        """Talk while the body runs, and at least five rounds."""
        stop = asyncio.Event()
        talking = asyncio.create_task(self.talk(stop))
        try:
            yield self
            await until(lambda: self.rounds >= 5 or talking.done())
        finally:
            stop.set()
            await asyncio.wait_for(talking, 30)


async def vanish(client: RawClient, how: int) -> None:
    """Leave in one of six ways, some with audio in every stage of the way."""
    if how % 2:
        client.silence(20 * 1920)
    match how:
        case 0 | 1:
            client.reset()
        case 2:
            client.writer.close()
        case 3:
            client.close()
            client.writer.close()
        case 4:
            client.half_close()
            client.writer.close()
        case 5:
            client.write(frame(BINARY, b"x" * 1000)[:500])
            await client.drain()
            client.reset()
    with contextlib.suppress(ConnectionError):
        await client.writer.wait_closed()


async def test_disconnect_storms_free_every_slot() -> None:
    """Three hundred clients on eight slots; not one slot, connection or object is left behind."""
    engine = ScriptedEngine(counting(20_000), slots=9)
    generator = random.Random(5)
    async with serving(engine) as running, Bystander(running).beside():

        async def come_and_go(count: int) -> None:
            for _ in range(count):
                client = await RawClient.connect(running.port)
                if generator.random() < 0.5:
                    with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
                        await client.receive()
                await vanish(client, generator.randrange(6))

        await asyncio.gather(*(come_and_go(25) for _ in range(12)))
        await until(lambda: engine.used_slots == 1 and running.connections() == 1, "all but the bystander gone")
        clients = [await RawClient.connect(running.port) for _ in range(8)]
        for client in clients:
            assert (await client.receive_event())["type"] == "Ready"
            client.close()
            await client.end_of_file()
            client.writer.close()
    gc.collect()
    assert [each for each in gc.get_objects() if type(each) is Connection] == []  # isinstance would ask each for its __class__


def mutated(message: bytes, generator: random.Random) -> bytes:
    """A message with bytes changed, lost or doubled; or none at all."""
    data = bytearray(message)
    match generator.randrange(5):
        case 0:
            return generator.randbytes(generator.randrange(64))
        case 1:
            for _ in range(generator.randrange(1, 4)):
                data[generator.randrange(len(data))] = generator.randrange(256)
        case 2:
            del data[generator.randrange(len(data)) :]
        case 3:
            at = generator.randrange(len(data))
            data[at:at] = generator.randbytes(generator.randrange(1, 9))
        case 4:
            at = generator.randrange(len(data))
            data[at:at] = data[: generator.randrange(len(data))]
    return bytes(data)


GOOD = [
    protocol.encode_audio(np.zeros(3, np.float32)),
    protocol.encode_audio(np.ones(40, np.float32), as_bin=True),
    protocol.encode_marker(70_000),
    protocol.encode_opus(b"OggS" + bytes(40)),
    protocol.encode_init(),
]


@pytest.mark.parametrize("level", ["messages", "frames"])
async def test_fuzz_over_a_live_socket_disturbs_nobody(level: str, caplog: pytest.LogCaptureFixture) -> None:
    """Random and mutated messages, or bytes of frames: no exception escapes, nothing hangs, the bystander hears its words."""
    caplog.set_level(logging.ERROR)
    engine = ScriptedEngine(counting(20_000), slots=9)
    sent = 0

    async def fuzz(seed: int) -> None:
        nonlocal sent
        generator = random.Random(seed)
        while sent < FUZZ_MESSAGES:
            async with await RawClient.connect(running.port) as client:
                reading = asyncio.create_task(client.rest())
                for _ in range(generator.randrange(1, 30)):
                    message = generator.choice(GOOD)
                    if level == "frames":
                        client.write(mutated(frame(BINARY, message), generator))
                    else:
                        client.send(mutated(message, generator) if generator.random() < 0.3 else message)
                    sent += 1
                with contextlib.suppress(ConnectionError):
                    await client.drain()
                    client.half_close()
                events, _ = await reading
                assert all(event["type"] in ("Ready", "Step", "Word", "EndWord", "Marker", "Error") for event in events)
                assert [event["type"] for event in events].count("Error") <= 1

    async with serving(engine, max_message_bytes=100_000) as running, Bystander(running).beside():
        await asyncio.gather(*(fuzz(seed) for seed in range(8)))
        await until(lambda: engine.used_slots == 1 and running.connections() == 1, "all but the bystander gone")
    assert sent >= FUZZ_MESSAGES
    assert not caplog.records, caplog.text


async def test_failed_step_ends_every_stream_alike() -> None:
    """Streams amid their audio, idle ones and half-closed ones: each gets the Error and 1011, none hangs."""
    engine = ScriptedEngine(counting(1000), slots=30, step_seconds=0.001)
    async with serving(engine) as running:
        clients = [await RawClient.connect(running.port) for _ in range(30)]
        for index, client in enumerate(clients):
            assert (await client.receive_event())["type"] == "Ready"
            if index % 3:
                client.silence(200 * 1920)
            if index % 3 == 2:
                client.half_close()
        engine.fail_next("step failed")

        async def ending(index: int, client: RawClient) -> tuple[str, int | None]:
            events, code = await client.rest()
            if index % 3 != 2:
                client.close(code)
            await client.end_of_file()
            return events[-1]["type"], code

        endings = await asyncio.gather(*(ending(index, client) for index, client in enumerate(clients)))
        assert set(endings) == {("Error", 1011)}
        for client in clients:
            client.writer.close()
            with contextlib.suppress(ConnectionError):
                await client.writer.wait_closed()
        await until(lambda: running.connections() == 0 and engine.used_slots == 0)


async def test_requests_that_are_no_http_leave_the_server_and_its_log_well(caplog: pytest.LogCaptureFixture) -> None:
    """Port scanners, TLS hellos and half requests; a broken request line may hold a key."""
    async with serving(ScriptedEngine(counting(20_000))) as running, Bystander(running).beside():
        rubbish = (
            b"\x16\x03\x01\x02\x00",
            b"\r\n\r\n",
            b"GET",
            b"GET /?auth_id=hunter2 HTTP/9.9\r\n\r\n",
            bytes(100),
            b"A" * 100_000,
        )
        for data in rubbish:
            _, writer = await asyncio.open_connection("127.0.0.1", running.port)
            writer.write(data)
            with contextlib.suppress(ConnectionError):
                await writer.drain()
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING], caplog.text
