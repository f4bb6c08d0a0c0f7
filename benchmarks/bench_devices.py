#!/usr/bin/env python3
"""Several model processes at one port, `moshi-stt worker --devices`: one of them is killed, and the others must not notice.

    bench_devices.py [--config phrases] [--devices cpu:0,cpu:1] [--streams 32] [--audio FILE …] [--seconds 12] [--rtf 1]
                     [--out FILE]

The streams speak real recordings at `rtf` times the speed of speech, each from another place of them, through one port, and end
with a marker. This is done twice: undisturbed, and with `kill -9` of the first device's process once every stream is half
through. Printed are the streams that ended with `Error`, those of the others whose events are the same in both runs (all of
them, `Step`s included), the time until the killed process's slots were back, and as the last line one JSON document.
"""

import argparse
import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import numpy as np
from numpy.typing import NDArray

from moshi_stt import protocol
from moshi_stt.audio.decode import read_file
from moshi_stt.constants import FRAME_SAMPLES, FRAME_SECONDS, SAMPLE_RATE
from moshi_stt.data import SAMPLE, data_file
from moshi_stt.events import Error, Marker, Step

START_SECONDS = 600.0
STREAM_SECONDS = 600.0
FLUSH_SECONDS = 1.0


class Server:
    """A worker of our own."""

    def __init__(self, args: argparse.Namespace, log: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.log = log
        slots = -(-args.streams // len(args.devices.split(","))) if args.devices != "all" else args.streams
        command = [sys.executable, "-m", "moshi_stt", "worker", "--config", args.config, "--devices", args.devices]
        command += ["--addr", "127.0.0.1", "--port", str(self.port), "--batch-size", str(slots)]
        with log.open("wb") as out:
            self.process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)

    def get(self, path: str) -> bytes:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=30) as answer:
            data: bytes = answer.read()
            return data

    def wait_ready(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                self.get("/ready")
                return
            except OSError:
                if self.process.poll() is not None or time.monotonic() > deadline:
                    raise SystemExit(f"the worker did not start:\n{self.log.read_text()}") from None
            time.sleep(0.2)

    def slots(self) -> int:
        return sum(int(module.get("total_slots", 0)) for module in json.loads(self.get("/api/modules_info")))

    def slots_back(self, before: int) -> float:
        """When there are as many again, once there have been fewer."""
        while self.slots() == before:
            time.sleep(0.02)
        while self.slots() < before:
            time.sleep(0.1)
        return time.monotonic()

    def first_device(self) -> tuple[str, int]:
        """Name and process id, from the log."""
        found = re.search(r": (\S+): serves: process (\d+)", self.log.read_text())
        assert found is not None
        return found[1], int(found[2])

    def stop(self) -> None:
        self.process.send_signal(signal.SIGINT)
        self.process.wait(60)


async def speak(
    http: aiohttp.ClientSession, port: int, pcm: NDArray[np.float32], rtf: float, half: asyncio.Event, go_on: asyncio.Event
) -> list[bytes]:
    """Every message of one stream. half: set in the middle; then it waits for go_on."""
    messages: list[bytes] = []

    async def send() -> None:
        begun, middle = time.monotonic(), len(pcm) // 2
        for start in range(0, len(pcm), FRAME_SAMPLES):
            if start <= middle < start + FRAME_SAMPLES:
                half.set()
                await go_on.wait()
            await ws.send_bytes(protocol.encode_audio(pcm[start : start + FRAME_SAMPLES]))
            await asyncio.sleep(begun + start / SAMPLE_RATE / rtf - time.monotonic())
        await ws.send_bytes(protocol.encode_marker(1))

    url = f"http://127.0.0.1:{port}/api/asr-streaming"
    async with asyncio.timeout(STREAM_SECONDS), http.ws_connect(url, headers={"kyutai-api-key": "public_token"}) as ws:
        sending = asyncio.create_task(send())
        async for message in ws:
            messages.append(message.data)
            if isinstance(protocol.decode_event(message.data), Marker | Error):
                break
        half.set()
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)
    return messages


async def run(server: Server, speech: list[NDArray[np.float32]], rtf: float, kill: bool) -> tuple[list[list[bytes]], float]:
    """Every stream's messages, and the seconds until all slots were back after the kill."""
    go_on, halves = asyncio.Event(), [asyncio.Event() for _ in speech]
    before = server.slots()
    seconds = 0.0
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http:
        streams = []
        for pcm, half in zip(speech, halves, strict=True):
            streams.append(asyncio.create_task(speak(http, server.port, pcm, rtf, half, go_on)))
            await asyncio.sleep(0.02)
        await asyncio.gather(*(half.wait() for half in halves))
        killed = time.monotonic()
        if kill:
            os.kill(server.first_device()[1], signal.SIGKILL)
        go_on.set()
        if kill:
            seconds = await asyncio.to_thread(server.slots_back, before) - killed
        return list(await asyncio.gather(*streams)), seconds


def comparable(messages: list[bytes]) -> list[Any]:
    """The events, without what is a matter of time: the steps of all streams so far, and how much audio waits."""
    events = [protocol.decode_event(message) for message in messages]
    return [
        msgspec.structs.replace(event, step_idx=0, buffered_pcm=0) if isinstance(event, Step) else event for event in events
    ]


def ended_with_error(messages: list[bytes]) -> bool:
    return isinstance(protocol.decode_event(messages[-1]), Error)


def recordings(args: argparse.Namespace) -> list[NDArray[np.float32]]:
    """What each stream says, float32 (S,) at 24 kHz."""
    whole = np.concatenate([read_file(path) for path in args.audio or [data_file(SAMPLE)]])
    size = round(args.seconds * SAMPLE_RATE)
    silence = np.zeros(round(FLUSH_SECONDS * SAMPLE_RATE), np.float32)
    starts = [number * len(whole) // args.streams for number in range(args.streams)]
    return [np.concatenate([np.resize(np.roll(whole, -start), size), silence]) for start in starts]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="phrases")
    parser.add_argument("--devices", default="cpu:0,cpu:1")
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--audio", nargs="+", help="recordings; without it the sample that comes with the package")
    parser.add_argument("--seconds", type=float, default=12.0, help="of each stream's speech")
    parser.add_argument("--rtf", type=float, default=1.0, help="how many times as fast as speech")
    parser.add_argument("--out")
    args = parser.parse_args()
    speech = recordings(args)
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        for kill in (False, True):
            server = Server(args, Path(folder) / f"worker-{kill}.log")
            try:
                server.wait_ready()
                runs.append(asyncio.run(run(server, speech, args.rtf, kill)))
            finally:
                server.stop()
    result = compare(runs[0][0], runs[1][0])
    result |= {"devices": args.devices, "config": args.config, "slots_back_seconds": round(runs[1][1], 2)}
    print(f"{result['streams']} streams of {args.seconds:g} s on {args.devices}, {result['messages']} messages; one killed")
    print(f"ended with Error: {result['ended']}; the others: {result['others']}, unchanged to the event: {result['unchanged']}")
    print(f"slots back after {result['slots_back_seconds']} s")
    document = json.dumps(result)
    if args.out:
        Path(args.out).write_text(document + "\n")
    print(document)
    return 0 if result["unchanged"] == result["others"] and result["ended"] else 1


def compare(alone: list[list[bytes]], disturbed: list[list[bytes]]) -> dict[str, Any]:
    """Of the streams that were not ended, how many got the same messages."""
    pairs = list(zip(alone, disturbed, strict=True))
    others = [pair for pair in pairs if not ended_with_error(pair[1])]
    return {
        "streams": len(pairs),
        "messages": sum(len(messages) for messages in alone),
        "errors": sorted({str(protocol.decode_event(run[-1])) for pair in pairs for run in pair if ended_with_error(run)}),
        "errors_undisturbed": sum(ended_with_error(messages) for messages in alone),
        "ended": len(pairs) - len(others),
        "others": len(others),
        "unchanged": sum(comparable(left) == comparable(right) for left, right in others),
        "words_of_others": sum(type(protocol.decode_event(m)).__name__ == "Word" for _, right in others for m in right),
        "frame_seconds": FRAME_SECONDS,
    }


if __name__ == "__main__":
    sys.exit(main())
