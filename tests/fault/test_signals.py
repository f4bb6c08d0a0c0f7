"""What is done to a whole server under load: signals, and no descriptors left. On both engines and with socket processes."""

import asyncio
import contextlib
import signal
import socket
import sys

import numpy as np
import pytest
from numpy.typing import NDArray
from tests.support.engines import speech
from tests.support.raw_ws import NotUpgraded, RawClient
from tests.support.server_process import KINDS, ServerProcess, server_process
from tests.support.serving import DEADLINE

from moshi_stt.constants import FRAME_SAMPLES

pytestmark = pytest.mark.skipif(not hasattr(socket, "send_fds") or sys.platform == "win32", reason="needs POSIX processes")

SAID = [[7 + i, 3, 9, 5, 11, 2, 8, 4] * 4 for i in range(2)]
"""16 s and more."""


def words(numbers: list[int]) -> list[str]:
    return [f"w{number}." for number in numbers]


def heard(events: list[dict[str, object]]) -> list[object]:
    return [event["text"] for event in events if event["type"] == "Word"]


async def spoken(client: RawClient, pcm: NDArray[np.float32], first_word: asyncio.Event) -> list[dict[str, object]]:
    """Speak frame by frame and ask for a marker; what came up to it, or up to the Error. first_word: set when one has come."""
    events: list[dict[str, object]] = []

    async def read() -> None:
        while not events or events[-1]["type"] not in ("Marker", "Error"):
            events.append(await client.receive_event())
            if events[-1]["type"] == "Word":
                first_word.set()

    reading = asyncio.create_task(read())
    for start in range(0, len(pcm), FRAME_SAMPLES):
        client.audio(pcm[start : start + FRAME_SAMPLES])
        await client.drain()
        await asyncio.sleep(0.01)  # the pace of speech, faster
    client.marker(1)
    await reading
    return events


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
@pytest.mark.parametrize("kind", KINDS)
async def test_streams_that_speak_come_to_their_end(kind: str, name: str) -> None:
    """Two streams of 16 s, signalled at their first word: each gets its marker and every word, and no new one is taken."""
    async with server_process(kind, drain_seconds=600) as server:
        clients = [await RawClient.connect(server.port) for _ in SAID]
        started = [asyncio.Event() for _ in SAID]
        speaking = [asyncio.create_task(spoken(*each)) for each in zip(clients, map(speech, SAID), started, strict=True)]
        for event in started:
            await event.wait()
        server.process.send_signal(signal.Signals[name])
        await refused(server)
        for client, numbers, events in zip(clients, SAID, await asyncio.gather(*speaking), strict=True):
            assert events[-1]["type"] == "Marker"
            assert heard(events) == words(numbers)
            client.close()
            assert (await client.rest())[1] == 1000
            await client.__aexit__()
        assert await server.ended() == 0
    assert any(f"{name}: shutting down" in line for line in server.log)


async def refused(server: ServerProcess) -> None:
    """Wait until new streams are refused."""
    async with asyncio.timeout(DEADLINE):
        while True:
            try:
                async with await RawClient.connect(server.port) as client:
                    client.reset()
            except NotUpgraded as answer:
                if not answer.is_full:
                    raise
                return


@pytest.mark.parametrize(("name", "drain_seconds"), [("SIGINT", 600), ("SIGTERM", 0), ("SIGHUP", 0)])
@pytest.mark.parametrize("kind", KINDS)
async def test_what_was_sent_is_given_where_nothing_is_waited_for(kind: str, name: str, drain_seconds: int) -> None:
    """Eight streams with their audio in every stage of the way: all of their words, then Error and 1001; status 0."""
    said = [[index + 3, 9, 5] * 4 for index in range(8)]
    async with server_process(kind, drain_seconds=drain_seconds) as server:
        clients = [await RawClient.connect(server.port) for _ in said]
        events: list[list[dict[str, object]]] = []
        for client, numbers in zip(clients, said, strict=True):
            client.audio(speech(numbers))
            await client.drain()
            events.append(await client.events_until("Word"))
        server.process.send_signal(signal.Signals[name])
        for client, numbers, before in zip(clients, said, events, strict=True):
            after, code = await client.rest()
            assert heard([*before, *after]) == words(numbers)
            assert (after[-1]["type"], code) == ("Error", 1001)
            client.close(1001)
            await client.__aexit__()
        assert await server.ended() == 0


@pytest.mark.parametrize("kind", KINDS)
async def test_a_second_signal_ends_it_at_once(kind: str) -> None:
    """And its socket processes with it: the client of each sees the end of its connection."""
    async with server_process(kind, drain_seconds=600) as server:
        clients = [await RawClient.connect(server.port) for _ in range(4)]
        for client in clients:
            await client.events_until("Ready")
        over = asyncio.Event()

        async def speak(client: RawClient) -> None:
            with contextlib.suppress(ConnectionError):
                while not over.is_set():
                    client.silence(FRAME_SAMPLES)
                    await client.drain()
                    await asyncio.sleep(0.05)

        speaking = [asyncio.create_task(speak(client)) for client in clients]
        server.process.send_signal(signal.SIGTERM)
        await refused(server)
        server.process.send_signal(signal.SIGTERM)
        assert await server.ended() == -signal.SIGTERM
        for client in clients:
            await client.end_of_file()
        over.set()
        await asyncio.gather(*speaking)
        for client in clients:
            await client.__aexit__()


@pytest.mark.parametrize("kind", ["batch", "segment"])
async def test_where_descriptors_are_used_up_nobody_is_cut(kind: str) -> None:
    """A hundred clients at once on a process that cannot carry so many: each is served or told, and nobody is reset."""
    async with server_process(kind, descriptors=120) as server, await RawClient.connect(server.port) as neighbour:
        neighbour.audio(speech([3, 9]))
        neighbour.marker(1)
        assert heard(await neighbour.events_until("Marker")) == words([3, 9])
        clients: list[RawClient] = []
        told = 0

        async def come() -> None:
            nonlocal told
            try:
                clients.append(await RawClient.connect(server.port))
            except NotUpgraded as answer:
                if not answer.is_full:
                    raise
                told += 1

        neighbour.audio(speech([5, 4]))
        await asyncio.gather(*(come() for _ in range(100)))
        assert len(clients) + told == 100
        assert told > 0
        neighbour.marker(2)
        assert heard(await neighbour.events_until("Marker")) == words([5, 4])
        for client in clients:
            client.close()
            await client.rest()
            await client.__aexit__()
        server.process.send_signal(signal.SIGINT)
        await neighbour.rest()
        neighbour.close(1001)
        assert await server.ended() == 0
    assert len([line for line in server.log if "file descriptors are used up" in line]) == 1
