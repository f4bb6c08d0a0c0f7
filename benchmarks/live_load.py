#!/usr/bin/env python3
"""One process of a trial's load: streams that arrive over 10 s, speak in real time for a fixed time, and end.

    live_load.py JOB          a JSON object with the fields of `Job`

Prints one JSON object: see `Told`. A chunk is late when its `Step` comes back more than 80 ms after its last packet was due to
be sent: that counts both sockets and the step itself, so at least what a server's own clock would. Run by `bench_server.py`.
"""

import asyncio
import heapq
import json
import random
import sys
import time
import wave
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
from find_most import ABORT_SECONDS, ARRIVAL_SECONDS

FRAME_SECONDS = 0.08
RATE = 24_000
LAST_SECONDS = 20.0
"""How long last words are waited for."""


class Job(NamedTuple):
    """begin: time.monotonic() at which the first may arrive. speech: a WAV of 24 kHz, mono, 16 bits; empty: noise."""

    port: int
    streams: int
    seconds: float
    seed: int
    packet_ms: int
    begin: float
    speech: str = ""


@dataclass
class Told:
    """What a process says. lags: milliseconds of chunks; final: of streams; worst_send_ms: how late the load itself was."""

    streams: int
    chunks: int
    steps: int
    words: int
    lags: list[float]
    final: list[float]
    unfinished: int
    aborted: str
    worst_send_ms: float


class Speaker:
    """One stream. sent: when the last packet of each chunk was due."""

    def __init__(self, ws: Any, due: float, place: int) -> None:
        self.ws = ws
        self.due = due
        self.place = place
        self.packets = 0
        self.sent: list[float] = []
        self.steps = 0
        self.words = 0
        self.ended: float | None = None
        self.last: float | None = None
        self.error = ""


def packets(job: Job) -> list[np.ndarray]:
    """Packets of a long recording, or of noise, one after the other."""
    count = RATE * job.packet_ms // 1_000
    if job.speech:
        with wave.open(job.speech, "rb") as file:
            samples = np.frombuffer(file.readframes(file.getnframes()), "<i2").astype(np.float32) / 32_768
    else:
        samples = np.random.default_rng(job.seed).standard_normal(20 * RATE).astype(np.float32) * 0.2
    return list(samples[: len(samples) // count * count].reshape(-1, count))


class Load:
    """The streams of one process, over sockets."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.packets: list[Any] = packets(job)
        self.speakers: list[Speaker] = []
        self.lags: list[float] = []
        self.queue: list[tuple[float, int]] = []
        self.aborted = ""
        self.worst = 0.0
        self.left = job.streams
        self.over = asyncio.Event()

    async def run(self) -> Told:
        import aiohttp

        from moshi_stt.protocol import encode_audio

        self.packets = [encode_audio(packet) for packet in self.packets]
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector, headers={"kyutai-api-key": "public_token"}) as self.session:
            await self.live()
            for speaker in self.speakers:
                await speaker.ws.close()
        return self.told()

    async def live(self) -> None:
        """Let all streams arrive, speak, and be answered."""
        draw = random.Random(self.job.seed)
        arrivals = sorted(draw.uniform(0.0, ARRIVAL_SECONDS) for _ in range(self.job.streams))
        tasks = [asyncio.create_task(self.arrive(arrivals, draw)), asyncio.create_task(self.speak())]
        limit = self.job.begin - time.monotonic() + ARRIVAL_SECONDS + self.job.seconds + LAST_SECONDS
        await asyncio.wait([asyncio.create_task(self.over.wait())], timeout=max(1.0, limit))
        for task in tasks:
            task.cancel()

    async def connect(self) -> Any:
        return await self.session.ws_connect(f"ws://127.0.0.1:{self.job.port}/api/asr-streaming", max_msg_size=0)

    async def deliver(self, speaker: Speaker, packet: Any, due: float) -> None:
        await speaker.ws.send_bytes(packet)

    async def mark(self, speaker: Speaker) -> None:
        from moshi_stt.protocol import encode_marker

        await speaker.ws.send_bytes(encode_marker(1))

    def told(self) -> Told:
        final = [1e3 * (s.last - s.ended) for s in self.speakers if s.ended is not None and s.last is not None]
        return Told(
            streams=len(self.speakers),
            chunks=sum(len(s.sent) for s in self.speakers),
            steps=sum(s.steps for s in self.speakers),
            words=sum(s.words for s in self.speakers),
            lags=[round(1e3 * lag, 2) for lag in self.lags],
            final=[round(value, 1) for value in final],
            unfinished=self.job.streams - len(final),
            aborted=self.aborted or next((s.error for s in self.speakers if s.error), ""),
            worst_send_ms=round(1e3 * self.worst, 1),
        )

    async def arrive(self, arrivals: Sequence[float], draw: random.Random) -> None:
        """Connect each stream at its time; it speaks from then on."""
        for arrival in arrivals:
            await asyncio.sleep(max(0.0, self.job.begin + arrival - time.monotonic()))
            try:
                ws = await self.connect()
            except Exception as error:
                self.abort(f"a stream was refused: {type(error).__name__}: {error}")
                return
            speaker = Speaker(ws, time.monotonic() + self.job.packet_ms / 1e3, draw.randrange(len(self.packets)))
            self.speakers.append(speaker)
            speaker.listener = asyncio.create_task(self.listen(speaker))  # type: ignore[attr-defined]
            heapq.heappush(self.queue, (speaker.due, len(self.speakers) - 1))

    async def speak(self) -> None:
        """Send every packet when it is due: when its last sample was spoken."""
        seconds = self.job.packet_ms / 1e3
        while not self.over.is_set():
            now = time.monotonic()
            while self.queue and self.queue[0][0] <= now:
                due, number = heapq.heappop(self.queue)
                await self.send(self.speakers[number], due)
                self.worst = max(self.worst, now - due)
                if self.speakers[number].ended is None:
                    heapq.heappush(self.queue, (due + seconds, number))
                now = time.monotonic()
            wait = (self.queue[0][0] if self.queue else now + 0.01) - time.monotonic()
            await asyncio.sleep(max(0.0005, min(0.01, wait)))

    async def send(self, speaker: Speaker, due: float) -> None:
        job = self.job
        if speaker.ws.closed or speaker.error:
            self.abort(speaker.error or "a stream was closed")
            return
        await self.deliver(speaker, self.packets[(speaker.place + speaker.packets) % len(self.packets)], due)
        speaker.packets += 1
        if speaker.packets * job.packet_ms % 80 == 0:
            speaker.sent.append(due)
            if (len(speaker.sent) - speaker.steps) * FRAME_SECONDS > ABORT_SECONDS:
                self.abort(f"a stream is more than {ABORT_SECONDS:g} s behind")
        if speaker.packets * job.packet_ms >= 1e3 * job.seconds:
            await self.mark(speaker)
            speaker.ended = due

    async def listen(self, speaker: Speaker) -> None:
        """Count what comes back."""
        import msgpack

        async for message in speaker.ws:
            event = msgpack.unpackb(message.data)
            self.heard(speaker, event["type"], event.get("message", ""))

    def heard(self, speaker: Speaker, kind: str, said: str) -> None:
        """An event has come."""
        now = time.monotonic()
        if kind == "Step":
            if speaker.steps < len(speaker.sent):
                self.lags.append(now - speaker.sent[speaker.steps])
            speaker.steps += 1
        elif kind == "Word":
            speaker.words += 1
        elif kind == "Marker":
            speaker.last = now
            self.left -= 1
            if not self.left:
                self.over.set()
        elif kind == "Error":
            speaker.error = said

    def abort(self, reason: str) -> None:
        self.aborted = self.aborted or reason
        self.over.set()


def main() -> None:
    job = Job(**json.loads(sys.argv[1]))
    print(json.dumps(asdict(asyncio.run(Load(job).run()))))


if __name__ == "__main__":
    main()
