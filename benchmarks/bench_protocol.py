"""What a message costs the server: CPU time to take in a frame of audio and send an event, with an engine that does nothing.

Beside it, in the same run and on the same event loop: aiohttp's own WebSocket echoing the same messages, and aiohttp answering
each with as few bytes as our `Step` has. Each server is a process of its own; the load comes from another. Messages a second
and core is the inverse of the server's CPU time for each message, so the load's own cost does not enter.

    python benchmarks/bench_protocol.py                      256 connections, each sends when it has its answer
    python benchmarks/bench_protocol.py --live 1024          also paced streams of 12.5 messages a second
    python benchmarks/bench_protocol.py --before FOLDER      also another version of this project, taking turns with this one

Prints a table and, as its last line, one JSON document.
"""

import argparse
import asyncio
import base64
import json
import os
import statistics
import struct
import subprocess
import sys
import time
import timeit
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import door_costs
import numpy as np
import report
import uvloop

from moshi_stt import protocol
from moshi_stt.constants import DEFAULT_PATH, FRAME_SAMPLES, FRAME_SECONDS
from moshi_stt.events import Step

if TYPE_CHECKING:
    from moshi_stt.engine.engine import Engine

PROJECT = Path(__file__).resolve().parents[1]
SERVERS = ("aiohttp echo", "aiohttp short reply", "moshi-stt")
BEFORE = "moshi-stt before"

OWN_PARSER = {"us_in": 3.22, "us_out": 0.12}
"""What framing cost with the parser of our own that the library replaced, on two shared cores of x86 (best of seven)."""

AUDIO = protocol.encode_audio(0.1 * np.random.default_rng(0).standard_normal(FRAME_SAMPLES).astype(np.float32))
STEP = protocol.encode(Step(1000, (0.5, 0.25, 0.125, 0.0625), 0))


# ---- the servers, each run as `bench_protocol.py --serve NAME` --------------------------------------------------------------


async def serve_aiohttp(reply: bytes | None) -> int:
    """aiohttp as its documentation writes a WebSocket handler. Returns the port."""
    from aiohttp import WSMsgType, web

    async def handle(request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse(compress=False, max_msg_size=1 << 26)
        await socket.prepare(request)
        with suppress(ConnectionResetError):  # the load just ends
            async for message in socket:
                if message.type is WSMsgType.BINARY:
                    await socket.send_bytes(message.data if reply is None else reply)
        return socket

    app = web.Application()
    app.router.add_get(DEFAULT_PATH, handle)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port: int = runner.addresses[0][1]
    return port


def null_engine() -> "Engine":
    """An engine that answers each frame with a `Step`, on the event loop itself."""
    from moshi_stt.engine.commands import Audio
    from moshi_stt.engine.engine import NO_EXTRAS, Engine, EngineInfo, StreamOptions
    from moshi_stt.engine.stream import Delivery, Stream, StreamLimits, deliver_all
    from moshi_stt.events import Ready

    class NullEngine(Engine):
        info = EngineInfo("null", "none", "", (), "none", "none", 1 << 20)

        async def start(self) -> None:
            self._streams: dict[Stream, int] = {}
            self._woken: set[Stream] = set()
            self._due = False

        async def stop(self) -> None:
            for stream in list(self._streams):
                stream.fail("stopped", 1001)

        def open(self, *, live: bool = True, options: StreamOptions = NO_EXTRAS) -> Stream:
            stream = Stream(StreamLimits(), live=live, wake=self._wake, release=self._streams.pop)
            self._streams[stream] = 0
            stream.deliver([Ready()])
            return stream

        def _wake(self, stream: Stream) -> None:
            self._woken.add(stream)
            if not self._due:
                self._due = True
                asyncio.get_running_loop().call_soon(self._turn)

        def _turn(self) -> None:
            self._due = False
            woken, self._woken = self._woken, set()
            deliveries = []
            for stream in woken:
                events = []
                for command in stream.drain():
                    if isinstance(command, Audio):
                        stream.stepped(len(command.samples))
                        events.append(Step(1000, (0.5, 0.25, 0.125, 0.0625), 0))
                deliveries.append(Delivery(stream, events))
            deliver_all(deliveries)

        ready = True

        @property
        def used_slots(self) -> int:
            return len(self._streams)

        queued_samples = 0

    return NullEngine()


async def serve_ours() -> int:
    """Our whole server over an engine that does nothing."""
    from moshi_stt.audio import watch
    from moshi_stt.config import EmbeddedModule, ServerConfig
    from moshi_stt.server.app import Server

    # A stream's first seconds are listened to for a wrong rate or level; this measures what stays after them.
    watch.LAST_LOOK = watch.FAINT_SECONDS = 1

    config = ServerConfig(
        static_dir=None,
        log_dir=None,
        instance_name="bench",
        authorized_ids=frozenset({"public_token"}),
        modules=(EmbeddedModule(name="asr", path=DEFAULT_PATH),),
    )
    server = Server(config, {"asr": null_engine()}, "127.0.0.1", 0)
    await server.start()
    globals()["_server"] = server  # lives as long as the process
    return server.port


def pin(first_core: bool) -> None:
    """Servers on one core, the load on the others: a client that wakes up must not push the server off its core."""
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, cores[:1] if first_core else cores[1:] or cores)


async def serve(name: str) -> None:
    """Print the port; then, for each line on stdin, the CPU seconds so far: in our own code, and in the kernel."""
    starts: dict[str, Callable[[], Awaitable[int]]] = {
        "aiohttp echo": lambda: serve_aiohttp(None),
        "aiohttp short reply": lambda: serve_aiohttp(STEP),
        "moshi-stt": serve_ours,
    }
    print(await starts[name](), flush=True)
    loop = asyncio.get_running_loop()
    ended = loop.create_future()

    def on_line() -> None:
        if sys.stdin.readline():
            used = os.times()
            print(used.user, used.system, flush=True)
        else:
            loop.remove_reader(0)
            ended.set_result(None)

    loop.add_reader(0, on_line)
    await ended
    os._exit(0)


# ---- the load, run as `bench_protocol.py --load PORT …` ---------------------------------------------------------------------


class LoadConnection(asyncio.Protocol):
    """One client: sends `message` and counts whole frames that come back."""

    def __init__(self, message: bytes, closed_loop: bool) -> None:
        self.message, self.closed_loop = message, closed_loop
        self.received = 0
        self.sent_at = 0.0
        self.waits: list[float] = []
        self.upgraded = asyncio.get_running_loop().create_future()
        self.going = False
        self._buffer = b""

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        key = base64.b64encode(os.urandom(16)).decode()
        transport.write(
            f"GET {DEFAULT_PATH} HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
            f"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {key}\r\nkyutai-api-key: public_token\r\n\r\n".encode()
        )

    def data_received(self, data: bytes) -> None:
        self._buffer = self._buffer + data if self._buffer else data
        if not self.upgraded.done():
            head, found, self._buffer = self._buffer.partition(b"\r\n\r\n")
            if not found:
                self._buffer = head
                return
            self.upgraded.set_result(None)
        self._frames()

    def _frames(self) -> None:
        while len(self._buffer) >= 2:
            size, head = self._buffer[1], 2
            if size == 126:
                if len(self._buffer) < 4:
                    return
                size, head = struct.unpack_from("!H", self._buffer, 2)[0], 4
            if len(self._buffer) < head + size:
                return
            is_answer = self._buffer[0] == 0x82 and size > 20  # neither Ready nor a ping
            self._buffer = self._buffer[head + size :]
            if is_answer:
                self.received += 1
                self.waits.append(time.perf_counter() - self.sent_at)
                if self.closed_loop and self.going:
                    self.send()

    def send(self) -> None:
        self.sent_at = time.perf_counter()
        self.transport.write(self.message)

    async def pace(self, phase: float) -> None:
        loop = asyncio.get_running_loop()
        due = loop.time() + phase
        while self.going:
            await asyncio.sleep(max(0.0, due - loop.time()))
            self.send()
            due += FRAME_SECONDS


def client_frame(payload: bytes) -> bytes:
    """Masked with a random key, as browsers do."""
    key = os.urandom(4)
    mask = np.frombuffer((key * (len(payload) // 4 + 1))[: len(payload)], np.uint8)
    return b"\x82\xfe" + struct.pack("!H", len(payload)) + key + (np.frombuffer(payload, np.uint8) ^ mask).tobytes()


async def load(port: int, connections: int, live: bool) -> None:
    """Start when a line comes on stdin, count between two more, then report."""
    loop = asyncio.get_running_loop()
    message = client_frame(AUDIO)
    clients = []
    for _ in range(connections):
        _, client = await loop.create_connection(lambda: LoadConnection(message, not live), "127.0.0.1", port)
        await client.upgraded
        clients.append(client)
    lines: asyncio.Queue[str] = asyncio.Queue()
    loop.add_reader(0, lambda: lines.put_nowait(sys.stdin.readline()))
    print("connected", flush=True)
    await lines.get()
    tasks = []
    for index, client in enumerate(clients):
        client.going = True
        if live:
            tasks.append(asyncio.create_task(client.pace(index / connections * FRAME_SECONDS)))
        else:
            client.send()
    print("going", flush=True)
    for _ in range(2):
        await lines.get()
        for client in clients:
            client.waits = client.waits[-1:] if _ == 0 else client.waits
        print(sum(client.received for client in clients), flush=True)
    waits = sorted(wait for client in clients for wait in client.waits)
    print(json.dumps({"p50_ms": waits[len(waits) // 2] * 1e3, "p99_ms": waits[len(waits) * 99 // 100] * 1e3}), flush=True)
    os._exit(0)


# ---- the measurement --------------------------------------------------------------------------------------------------------


class Child:
    """This script as another process, spoken to in lines. project: the checkout whose version of it, and sources, run there."""

    def __init__(self, *arguments: str, project: Path = PROJECT) -> None:
        script = project / "benchmarks" / Path(__file__).name
        self.process = subprocess.Popen(
            [sys.executable, str(script), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
            env={**os.environ, "PYTHONPATH": str(project / "src")},
        )

    def line(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.process.args} ended early")
        return line.strip()

    def ask(self) -> str:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        return self.line()

    def end(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(10)


def framing_costs(messages: int = 20_000) -> dict[str, float]:
    """Microseconds to take one message of audio apart, and to frame one `Step`: best of five."""
    from moshi_stt.server.websocket import WebSocketFraming

    framing = WebSocketFraming(1 << 26)
    data = client_frame(AUDIO)

    def best(work: Callable[[], object]) -> float:
        return min(timeit.repeat(work, number=messages, repeat=5)) / messages * 1e6

    return {"us_in": round(best(lambda: framing.feed(data)), 2), "us_out": round(best(lambda: framing.encode(STEP)), 2)}


def measure(name: str, connections: int, live: bool, seconds: float, before: Path | None) -> dict[str, float]:
    """One server, one load: CPU microseconds for each message, messages a second, and the load's view of the wait."""
    server = Child("--serve", "moshi-stt", project=before) if name == BEFORE and before else Child("--serve", name)
    port = server.line()
    clients = Child("--load", port, "--connections", str(connections), *(["--paced"] if live else []))
    assert clients.line() == "connected"
    clients.ask()
    time.sleep(min(2.0, seconds / 3))
    used, count, wall = server.ask(), int(clients.ask()), time.perf_counter()
    time.sleep(seconds)
    user, system = (float(after) - float(before) for before, after in zip(used.split(), server.ask().split(), strict=True))
    count, wall = int(clients.ask()) - count, time.perf_counter() - wall
    cpu = user + system
    waits = json.loads(clients.line())
    clients.process.wait(10)
    server.end()
    costs = {"us_per_message": cpu / count * 1e6, "us_kernel": system / count * 1e6}
    return {**costs, "messages_per_second": count / wall, "core_share": cpu / wall, **waits}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--connections", type=int, default=256)
    parser.add_argument("--live", type=int, default=0, metavar="N", help="also N paced streams")
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--rounds", type=int, default=3, help="the servers take turns; the table shows medians")
    parser.add_argument("--before", type=Path, metavar="FOLDER", help="another checkout of this project")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--load", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--paced", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve or options.load:
        pin(first_core=bool(options.serve))
    if options.serve:
        uvloop.run(serve(options.serve))
    if options.load:
        uvloop.run(load(options.load, options.connections, options.paced))
    servers = (*SERVERS, BEFORE) if options.before else SERVERS
    rows: list[dict[str, Any]] = []
    for live in [False, True] if options.live else [False]:
        connections = options.live if live else options.connections
        results: dict[str, list[dict[str, float]]] = {name: [] for name in servers}
        for _ in range(options.rounds):
            for name in servers:
                results[name].append(measure(name, connections, live, options.seconds, options.before))
        for name in servers:
            median = {key: statistics.median(result[key] for result in results[name]) for key in results[name][0]}
            rows.append(
                {"server": name, "connections": connections, "paced": live, **{k: round(v, 3) for k, v in median.items()}}
            )
    print(f"{len(AUDIO)} bytes of Audio in, {len(STEP)} bytes of Step out; CPU time of the server alone; one core")
    head = f"{'server':22} {'conn':>5} {'load':>7} {'µs/msg':>8} {'kernel':>7} {'msg/s/core':>11} {'core':>6}"
    print(f"{head} {'p50 ms':>8} {'p99 ms':>8}")
    for row in rows:
        print(
            f"{row['server']:22} {row['connections']:5} {'paced' if row['paced'] else 'closed':>7} "
            f"{row['us_per_message']:8.1f} {row['us_kernel']:7.1f} {1e6 / row['us_per_message']:11,.0f} "
            f"{row['core_share']:6.2f} {row['p50_ms']:8.2f} {row['p99_ms']:8.2f}"
        )
    framing = {"library": framing_costs(), "own parser, earlier": OWN_PARSER}
    for name, costs in framing.items():
        print(f"framing, {name:20} {costs['us_in']:6.2f} µs a message in, {costs['us_out']:6.2f} µs out")
    doors = door_costs.table()
    for name, door in doors.items():
        share = doors["native"]["us_per_message"] / door["us_per_message"]
        print(
            f"door {name:17} {door['us_per_message']:7.1f} µs for 80 ms without socket and engine, "
            f"{door['messages_per_second']:9,.0f} a second and core, {share:5.2f} of native"
        )
    report.finish("protocol", {"device": "cpu", "weights": "none", "framing": framing, "doors": doors, "rows": rows})


if __name__ == "__main__":
    main()
