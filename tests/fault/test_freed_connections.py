"""What has ended is freed at once, at every door and for every way to end: no connection, session, stream or sound is left.

The cycle collector is off: a server runs it rarely, and a client could fill the machine meanwhile.
"""

import asyncio
import gc
import json
import logging
import os
import signal
import socket
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import aiohttp
import numpy as np
import pytest
from tests.support.callers import ALL_DOORS, CALLERS, Caller
from tests.support.engines import BatchKind, Kind, SegmentKind, speech
from tests.support.media import encode
from tests.support.serving import DEADLINE, KEY, Running, serving, until
from tests.support.socket_processes import served

from moshi_stt.audio.framer import Framer
from moshi_stt.audio.opus import OpusStream
from moshi_stt.audio.resample import StreamingResampler
from moshi_stt.constants import DEFAULT_PATH, SAMPLE_RATE
from moshi_stt.engine.segment_state import SegmentState
from moshi_stt.engine.segmenter import Segmenter
from moshi_stt.engine.stream import Stream
from moshi_stt.engine.stream_state import Flush, StreamState
from moshi_stt.server.connection import Connection
from moshi_stt.server.framing import Framing
from moshi_stt.server.inputs import InputQueue
from moshi_stt.server.spool import Backlog
from moshi_stt.server.streams import StreamSet
from moshi_stt.server.timers import ClosingTimer, ConnectionTimers
from moshi_stt.session import Session
from moshi_stt.text.words import WordAssembler

PARTS = (
    *(Connection, Session, Framing, InputQueue, Backlog, StreamSet, ConnectionTimers, ClosingTimer),
    *(Stream, StreamState, Flush, Framer, WordAssembler, SegmentState, Segmenter, StreamingResampler, OpusStream),
)
CONNECTIONS = 20
"""Of each way to end."""
IN_PROCESSES = 200 if "MOSHI_STT_FULL" in os.environ else 40
"""The same, in socket processes."""
AT_EACH_DOOR = 3
"""The same, at the doors that are not the native one."""


def parts() -> Counter[str]:
    """The parts of connections that are in memory. By type: some objects of other packages warn when asked for their class."""
    found: Counter[str] = Counter()
    for part in gc.get_objects():
        if issubclass(type(part), PARTS):
            found[type(part).__name__] += 1
    return found


@pytest.fixture(autouse=True)
def no_collector() -> Iterator[None]:
    """And no log: pytest keeps its records, and with them the frames of their exceptions."""
    gc.collect()
    gc.disable()
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
        gc.enable()


@pytest.fixture(params=[BatchKind, SegmentKind], ids=["batch", "segment"])
async def running(request: pytest.FixtureRequest) -> AsyncIterator[Running]:
    kind: Kind = request.param()
    async with serving(kind.make(), doors=ALL_DOORS) as server:
        yield server


async def finish(running: Running, caller: Caller) -> None:
    """The server closes after the client half-closed."""
    async with await caller.connect(running.port) as call:
        call.say(speech([3]))
        call.client.half_close()
        await call.rest()


async def close(running: Running, caller: Caller) -> None:
    async with await caller.connect(running.port) as call:
        call.say(speech([3]))
        call.client.close()
        await call.rest()


async def cut(running: Running, caller: Caller) -> None:
    """Gone in the middle of a word, without a word."""
    async with await caller.connect(running.port) as call:
        call.say(np.full(SAMPLE_RATE, 0.05, np.float32))
        call.client.reset()


async def garbage(running: Running, caller: Caller) -> None:
    async with await caller.connect(running.port) as call:
        call.say(speech([3]))
        for message in caller.garbage:
            call.send(message)
        call.client.close()
        await call.rest()


async def flood(running: Running, caller: Caller) -> None:
    """More audio than a stream takes at once, then gone."""
    async with await caller.connect(running.port) as call:
        call.say(np.zeros(8 * SAMPLE_RATE, np.float32))
        call.client.reset()


async def mark(running: Running, caller: Caller) -> None:
    """Gone while a mark is answered."""
    async with await caller.connect(running.port) as call:
        call.say(speech([3]))
        call.send(caller.mark(1))
        await call.receive()
        call.client.reset()


Way = Callable[[Running, Caller], Awaitable[None]]


async def assert_freed(running: Running, before: Counter[str]) -> None:
    def is_clean() -> bool:
        return not running.connections() and not parts() - before

    try:
        await until(is_clean)
    except AssertionError:
        pytest.fail(f"left in memory: {dict(parts() - before)}")


@pytest.mark.parametrize("way", [finish, close, cut, garbage, flood, mark], ids=lambda way: way.__name__)
@pytest.mark.parametrize("caller", CALLERS.values(), ids=CALLERS)
async def test_ended_connections_leave_nothing(running: Running, caller: Caller, way: Way) -> None:
    before = parts()
    for _ in range(CONNECTIONS if caller is CALLERS["native"] else AT_EACH_DOOR):
        await way(running, caller)
        await until(lambda: running.server.service.served[0].engine.used_slots < 3, "a slot")
    await assert_freed(running, before)


# ---- POST ----------------------------------------------------------------------------------------------------------------


async def post(running: Running) -> None:
    assert await status_of(running, SOUND) == 200


async def post_what_is_no_sound(running: Running) -> None:
    assert await status_of(running, b"?" * 5_000) == 400


async def status_of(running: Running, body: bytes) -> int:
    async with aiohttp.ClientSession(headers=HEADERS) as http, http.post(running.http + DEFAULT_PATH, data=body) as answer:
        await answer.read()
        return answer.status


async def post_half(running: Running) -> None:
    """Gone in the middle of the body."""
    reader, writer = await asyncio.open_connection("127.0.0.1", running.port)
    writer.write(
        f"POST {DEFAULT_PATH} HTTP/1.1\r\nHost: x\r\nkyutai-api-key: {KEY}\r\nContent-Length: {len(SOUND)}\r\n\r\n".encode()
        + SOUND[: len(SOUND) // 2]
    )
    await writer.drain()
    writer.close()
    assert await reader.read() == b""


SOUND = encode(speech([3, 9]), SAMPLE_RATE)
HEADERS = {"kyutai-api-key": KEY}


@pytest.mark.parametrize("way", [post, post_what_is_no_sound, post_half], ids=lambda way: way.__name__)
async def test_ended_uploads_leave_nothing(running: Running, way: Callable[[Running], Awaitable[None]]) -> None:
    before = parts()
    for _ in range(CONNECTIONS):
        await way(running)
    await until(lambda: not running.server.service.uploads, "the uploads")
    await assert_freed(running, before)


# ---- socket processes ----------------------------------------------------------------------------------------------------

LOOK_INSIDE = """
import collections, gc, json, os, signal

def tell(*_):
    gc.disable()
    kinds = map(type, gc.get_objects())
    counts = collections.Counter(kind.__name__ for kind in kinds if str(kind.__module__).startswith("moshi_stt."))
    path = os.path.join({folder!r}, str(os.getpid()))
    with open(path + ".new", "w") as file:
        json.dump(counts, file)
    os.rename(path + ".new", path)

signal.signal(signal.SIGUSR1, tell)
"""
"""A `sitecustomize` module: the process says at a signal which of the package's objects are in its memory."""


async def parts_inside(processes: list[int], folder: Path) -> Counter[str]:
    found: Counter[str] = Counter()
    for pid in processes:
        said = folder / str(pid)
        said.unlink(missing_ok=True)
        os.kill(pid, signal.SIGUSR1)
        await until(said.exists, "its answer")
        found += Counter(json.loads(said.read_text()))
    return found


async def parts_once(processes: list[int], folder: Path, is_so: Callable[[Counter[str]], bool]) -> Counter[str]:
    """The same, as soon as this is true of them, or after the deadline."""
    found = await parts_inside(processes, folder)
    try:
        async with asyncio.timeout(DEADLINE):
            while not is_so(found):
                await asyncio.sleep(0.01)
                found = await parts_inside(processes, folder)
    except TimeoutError:
        pass
    return found


@pytest.mark.skipif(not hasattr(socket, "send_fds"), reason="this system cannot hand sockets over")
@pytest.mark.timeout(1_800)
async def test_ended_connections_leave_nothing_in_socket_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of any class of the package, whatever it is."""
    (tmp_path / "sitecustomize.py").write_text(LOOK_INSIDE.format(folder=str(tmp_path)))
    monkeypatch.syspath_prepend(tmp_path)
    async with served(monkeypatch, streams=4) as (running, pool, _):
        processes = [worker.process.pid for worker in pool._workers if worker.process is not None]
        native = CALLERS["native"]

        async def come_and_go(way: Way, times: int) -> None:
            for _ in range(times):
                await way(running, native)
                await until(lambda: running.server.service.served[0].engine.used_slots < 3, "a slot")
            await until(lambda: running.server.service.served[0].engine.used_slots == 0, "every slot")

        for way in (finish, close, cut, garbage, flood, mark):
            await come_and_go(way, 4)  # what is made once is there
        async with await native.connect(running.port):
            await until(lambda: running.server.service.served[0].engine.used_slots == 1, "a stream")
            assert (await parts_inside(processes, tmp_path))["Connection"] >= 1, "what is there is seen"
        before = await parts_once(processes, tmp_path, lambda parts: not parts["Connection"])
        for way in (finish, close, cut, garbage, flood, mark):
            await come_and_go(way, IN_PROCESSES)
            left = await parts_once(processes, tmp_path, lambda parts: not parts - before) - before
            assert not left, f"left in memory after {way.__name__}"
