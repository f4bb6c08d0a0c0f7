"""The law of markers under random load: each is answered once, after all that was said before it, and before all that is said
after it. With sockets that break and come back, clients that come and go, and a shutdown at any moment.
"""

import asyncio
import contextlib
import os
import random
import struct
from collections.abc import AsyncIterator

import numpy as np
import pytest
from tests.support.engines import GAP, LIMITS
from tests.support.level_speech import LevelRecogniser, pause, say
from tests.support.raw_ws import BINARY, CLOSE, NotUpgraded, RawClient
from tests.support.scripted_backend import LevelModel, loader, spell_level
from tests.support.serving import DEADLINE, Running, event_of, serving, until
from tests.support.socket_processes import served

from moshi_stt.constants import DEFAULT_PATH
from moshi_stt.engine.batch import BatchEngine
from moshi_stt.engine.segment import SegmentEngine

KINDS = ("batch", "segment", "processes")
SEEDS = range(30 if "MOSHI_STT_FULL" in os.environ else 3)
SPEAKERS = 6
SLOTS = 24
ENDED = (asyncio.IncompleteReadError, ConnectionError)


@contextlib.asynccontextmanager
async def server(kind: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Running]:
    if kind == "processes":
        async with served(monkeypatch, streams=SLOTS) as (running, _, _):
            yield running
        return
    engine = (
        BatchEngine(loader(LevelModel, SLOTS, spell_level), limits=LIMITS, marker_wait_seconds=0.05)
        if kind == "batch"
        else SegmentEngine(LevelRecogniser, slots=SLOTS, threads=2, limits=LIMITS)
    )
    async with serving(engine) as running:
        yield running


class Speaker:
    """A client with things to say and markers between them; it may lose its socket and come back."""

    def __init__(self, port: int, rng: random.Random, *, resumes: bool) -> None:
        self._port, self._rng, self._resumes = port, rng, resumes
        self.expected: list[str | int] = []
        """Words and markers, in the order in which they must come."""
        self._marks: list[tuple[int, int]] = []
        """Sample at which each is sent, and its number."""
        pieces: list[np.ndarray] = []
        for number in range(rng.randrange(3, 9)):
            said = [rng.randrange(1, 40) for _ in range(rng.randrange(0, 5))]
            pieces += [say(said, gap=GAP), pause(rng.choice([0.0, 0.1, 0.5, 1.1]))]
            self.expected += [f"w{each}." for each in said]
            for twice in range(rng.choice([1, 1, 1, 2])):
                self._marks.append((sum(map(len, pieces)), 2 * number + twice))
                self.expected.append(2 * number + twice)
        self._pcm = np.concatenate(pieces)
        self._token: str | None = None
        self._acked = 0
        self.events: list[dict[str, object]] = []
        self.over = False
        """Whether the server has ended the stream, or lets nobody in any more."""

    @property
    def heard(self) -> list[object]:
        told = {"Word": "text", "Marker": "id"}
        return [event[told[str(event["type"])]] for event in self.events if event["type"] in told]

    async def run(self) -> None:
        while not self.over and self.heard[-1:] != self.expected[-1:]:
            breaks = self._resumes and self._rng.random() < 0.7
            try:
                await self._connected(self._rng.randrange(1, 40) if breaks else None)
            except NotUpgraded as refused:
                if not refused.is_full:
                    raise
                self.over = True

    async def _connected(self, most_messages: int | None) -> None:
        """One socket. most_messages: after which it breaks, read or unread."""
        path = DEFAULT_PATH
        if self._resumes:
            asked = "1" if self._token is None else f"{self._token}&samples={self._acked}&events={len(self.events)}"
            path += f"?resume={asked}"
        async with await RawClient.connect(self._port, path) as client:
            reading = asyncio.create_task(self._read(client))
            try:
                with contextlib.suppress(*ENDED):
                    await self._send(client, most_messages)
                if most_messages is None:
                    await reading
                elif self._rng.random() < 0.5:
                    await asyncio.wait((reading,), timeout=self._rng.choice([0.0, 0.01, 0.1]))
            finally:
                reading.cancel()
                await asyncio.wait((reading,))
            if most_messages is None:
                client.close()
            elif self._rng.random() < 0.5:
                client.reset()
        if not reading.cancelled():
            reading.result()

    async def _send(self, client: RawClient, most_messages: int | None) -> None:
        at, sent = self._acked, 0
        for position, number in [*(mark for mark in self._marks if mark[0] >= at), (len(self._pcm), None)]:
            while at < position:
                size = min(self._rng.randrange(200, 12_000), position - at)
                client.audio(self._pcm[at : at + size])
                at, sent = at + size, sent + 1
                await client.drain()
                if self._rng.random() < 0.3:
                    await asyncio.sleep(self._rng.choice([0.0, 0.001, 0.02]))
                if sent == most_messages:
                    return
            if number is not None:
                client.marker(number)

    async def _read(self, client: RawClient) -> None:
        """Up to the last marker, or the end of the socket."""
        greeted = False
        while self.heard[-1:] != self.expected[-1:]:
            try:
                opcode, payload = await client.receive()
            except ENDED:
                assert self._resumes or not self.events, "cut"
                return
            if opcode == CLOSE:
                code = struct.unpack("!H", payload[:2])[0]
                assert code == 1001 or (code == 1013 and not self.events), payload  # no slot: try again
                self.over = code == 1001
                return
            if opcode != BINARY:
                continue
            event = event_of(payload)
            if event["type"] == "Ack":
                self._acked = event["samples"]
            elif event["type"] == "Ready" and not greeted:
                greeted, self._token = True, event.get("token")
            elif event["type"] != "Error":
                self.events.append(event)


async def passers_by(port: int, rng: random.Random, over: asyncio.Event) -> None:
    """Clients that leave in the middle of a word."""
    while not over.is_set():
        with contextlib.suppress(NotUpgraded, *ENDED):
            async with await RawClient.connect(port) as client:
                client.audio(say([rng.randrange(1, 40)])[: rng.randrange(1, 9_000)])
                client.marker(1)
                await asyncio.sleep(rng.choice([0.0, 0.02]))
                if rng.random() < 0.5:
                    client.reset()


@pytest.mark.parametrize("drained", [False, True], ids=["", "drained"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", SEEDS)
async def test_markers_come_where_they_were_set(kind: str, seed: int, drained: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a shutdown everything comes; with one, what comes is the beginning of it, in order, without a gap."""
    rng = random.Random(f"{kind} {seed} {drained}")
    over = asyncio.Event()
    async with server(kind, monkeypatch) as running:
        speakers = [Speaker(running.port, random.Random(rng.random()), resumes=index % 2 == 0) for index in range(SPEAKERS)]
        passing = [asyncio.create_task(passers_by(running.port, random.Random(rng.random()), over)) for _ in range(3)]
        speaking = [asyncio.create_task(speaker.run()) for speaker in speakers]
        try:
            if drained:
                wanted = rng.randrange(1, sum(len(speaker.expected) for speaker in speakers) // 2)
                await until(
                    lambda: sum(len(each.heard) for each in speakers) >= wanted or all(each.done() for each in speaking),
                    "half of the words",
                )
                await running.server.drain(rng.choice([0.0, DEADLINE]))
            await asyncio.gather(*speaking)
        finally:
            over.set()
            for each in speaking:
                each.cancel()
            await asyncio.gather(*speaking, *passing, return_exceptions=True)
    for speaker in speakers:
        heard = speaker.heard
        assert heard == (speaker.expected[: len(heard)] if drained else speaker.expected)
