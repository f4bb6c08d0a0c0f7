"""A server replaces another on the same port: no connection is refused, and the streams of the old one end whole."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.support.ports import free_port

from moshi_stt.audio.decode import read_file
from moshi_stt.client import Client
from moshi_stt.data import SAMPLE, data_file
from moshi_stt.errors import ConfigError
from moshi_stt.server import takeover

pytestmark = pytest.mark.skipif(not hasattr(socket, "send_fds"), reason="this system cannot hand sockets to other processes")

DEADLINE = 120.0


class Worker:
    """`moshi-stt worker` in a process of its own."""

    def __init__(self, folder: Path, port: int, *flags: str) -> None:
        self.pid_file = folder / f"pid-{len(list(folder.glob('log-*')))}"
        self.log = folder / f"log-{len(list(folder.glob('log-*')))}"
        command = [sys.executable, "-m", "moshi_stt", "worker", "--addr", "127.0.0.1", "--port", str(port)]
        command += ["--handover", str(folder / "place.sock"), "--pid-file", str(self.pid_file), "--batch-size", "4", *flags]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)

    async def ready(self) -> None:
        await asyncio.to_thread(appears, self.pid_file, lambda: self.process.poll() is None, self.log)
        assert self.pid_file.read_text() == f"{self.process.pid}\n"


@pytest.fixture
def workers() -> Iterator[list[Worker]]:
    started: list[Worker] = []
    yield started
    for worker in started:
        if worker.process.poll() is None:
            worker.process.send_signal(signal.SIGTERM)
            try:
                worker.process.wait(30)
            except subprocess.TimeoutExpired:
                worker.process.kill()
                worker.process.wait(30)


def appears(path: Path, alive: Callable[[], bool] = lambda: True, log: Path | None = None) -> None:
    """Wait for a file."""
    deadline = time.monotonic() + DEADLINE
    while not path.exists():
        assert alive(), log.read_text() if log else ""
        assert time.monotonic() < deadline
        time.sleep(0.02)


async def test_no_connection_is_refused_and_no_stream_is_cut(tmp_path: Path, workers: list[Worker]) -> None:
    port = free_port()
    workers.append(Worker(tmp_path, port))
    old = workers[0]
    await old.ready()
    refused: list[str] = []
    asked = 0
    stop = threading.Event()

    def ask() -> None:
        nonlocal asked
        while not stop.wait(0.02):
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=DEADLINE) as answer:
                    answer.read()
                asked += 1
            except OSError as error:
                refused.append(str(error))

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        audio = read_file(data_file(SAMPLE))
        async with Client(f"ws://127.0.0.1:{port}") as client:
            await client.send_audio(audio[: len(audio) // 2])
            workers.append(Worker(tmp_path, port, "--take-over"))
            new = workers[1]
            await new.ready()
            assert old.process.poll() is None, "the old server ended while it had a stream"
            await client.send_audio(audio[len(audio) // 2 :])
            await client.mark(1)
            words = [event.text async for event in client_words(client)]
        assert " ".join(words).lower().startswith("ever tried")
        assert words[-1].lower().startswith("better")
        assert await asyncio.to_thread(old.process.wait, DEADLINE) == 0
        async with Client(f"ws://127.0.0.1:{port}") as client:
            again = await client.transcribe([audio])
        assert again[0].text.lower().startswith("ever")
    finally:
        stop.set()
        asking.join()
    assert refused == []
    assert asked > 10
    assert "self-test of asr: PASS  English" in new.log.read_text()


async def client_words(client: Client):  # type: ignore[no-untyped-def]
    """Words up to the marker."""
    from moshi_stt.events import Marker, Word

    async with asyncio.timeout(DEADLINE):
        async for event in client:
            if isinstance(event, Word):
                yield event
            if isinstance(event, Marker):
                return


async def test_one_that_fails_its_self_test_takes_nothing(tmp_path: Path) -> None:
    """In one process: the check raises, and the socket stays where it was."""
    from tests.support.scripted_engine import ScriptedEngine
    from tests.support.serving import raw_request

    from moshi_stt.config_load import embedded_config
    from moshi_stt.errors import EngineError
    from moshi_stt.server.app import Server

    path = tmp_path / "place.sock"

    async def fail() -> None:
        raise EngineError("the self-test failed")

    old = Server(embedded_config(), {"asr": ScriptedEngine()}, "127.0.0.1", 0, takeover=takeover.Takeover(path))
    await old.start()
    handing = asyncio.create_task(old.hand_over())
    try:
        new = Server(
            embedded_config(), {"asr": ScriptedEngine()}, "127.0.0.1", old.port, takeover=takeover.Takeover(path, True, fail)
        )
        with pytest.raises(EngineError, match="the self-test failed"):
            await new.start()
        assert not handing.done()
        answer = await raw_request(old.port, b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert answer.status == 200
    finally:
        handing.cancel()
        await asyncio.gather(handing, return_exceptions=True)
        await old.stop()
    assert not path.exists()


async def nothing() -> None:
    pass


async def test_nobody_to_take_over_from(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no server hands over its place at .*: start this one without --take-over"):
        await takeover.take(tmp_path / "nobody.sock")


async def test_a_successor_that_dies_before_it_confirms_takes_nothing(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        path = tmp_path / "place.sock"
        offering = asyncio.create_task(takeover.offer(path, listener, nothing))
        await asyncio.to_thread(appears, path)
        async with asyncio.timeout(DEADLINE):
            first = await takeover.take(path)
            first.predecessor.close()
            first.listener.close()
            second = await takeover.take(path)
            assert second.listener.getsockname() == listener.getsockname()
            assert not offering.done()
            await asyncio.to_thread(second.confirm)
            await offering
        second.listener.close()


async def test_only_the_same_user_may_ask(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        path = tmp_path / "place.sock"
        offering = asyncio.create_task(takeover.offer(path, listener, nothing))
        await asyncio.to_thread(appears, path)
        assert path.stat().st_mode & 0o077 == 0
        offering.cancel()
        await asyncio.gather(offering, return_exceptions=True)


def test_a_long_path_is_replaced_by_the_same_short_one(tmp_path: Path) -> None:
    long = tmp_path / ("x" * 120) / "place.sock"
    assert takeover.short_path(long) == takeover.short_path(long)
    assert len(os.fsencode(takeover.short_path(long))) <= takeover.LONGEST_PATH
    assert takeover.short_path(Path("/run/place.sock")) == Path("/run/place.sock")
    assert takeover.short_path(long) != takeover.short_path(long.with_name("other.sock"))
