"""What clients see when something goes wrong in a process that carries WebSockets. On one event loop."""

import asyncio
import os
import signal
import socket

import msgspec
import pytest
from tests.support.batch import noise
from tests.support.client_flows import FLOWS
from tests.support.raw_ws import RawClient
from tests.support.scripted_backend import LevelModel, loader, spell_level
from tests.support.serving import DEADLINE, Running, server_config, serving, until
from tests.support.socket_processes import counts, lent, served, speech

from moshi_stt.engine.batch import BatchEngine
from moshi_stt.server.workers import pool as worker_pool
from moshi_stt.server.workers import supervisor
from moshi_stt.server.workers.pool import WorkerPool

pytestmark = pytest.mark.skipif(not hasattr(socket, "send_fds"), reason="this system cannot hand sockets over")


async def test_a_broken_message_is_answered_there(monkeypatch: pytest.MonkeyPatch) -> None:
    async with served(monkeypatch) as (running, _, _), await RawClient.connect(running.port) as client:
        client.send(b"\x01")
        events = await client.events_until("Error")
        assert "map" in events[-1]["message"]
        assert (await client.rest())[1] == 1003
        assert (await counts(running))['moshi_stt_errors{kind="malformed"}'] == 1


async def test_a_failed_model_tells_every_client(monkeypatch: pytest.MonkeyPatch) -> None:
    async with served(monkeypatch) as (running, _, model):
        clients = [await RawClient.connect(running.port) for _ in range(4)]
        for client in clients:
            assert (await client.receive_event())["type"] == "Ready"
        waiting = asyncio.create_task(running.server.wait(asyncio.Event()))
        model.backend.raise_next = True
        clients[0].audio(noise(1))
        for client in clients:
            assert (await client.events_until("Error"))[-1]["message"]
            assert (await client.rest())[1] == 1011
            client.close(1011)
            await client.__aexit__()
        async with asyncio.timeout(DEADLINE):
            assert await waiting == 1


async def killed(running: Running, processes: WorkerPool) -> None:
    """Kill the first process, and wait for the next."""
    first = processes._workers[0]
    process = first.process
    assert process is not None
    os.kill(process.pid, signal.SIGKILL)
    await until(lambda: first.process is not process and first.ready.is_set(), "the new process")


async def test_counts_outlive_their_process_without_growing(monkeypatch: pytest.MonkeyPatch) -> None:
    """However often one dies, counters only rise, and what is kept of it stays as small."""
    async with served(monkeypatch, streams=2) as (running, processes, _):
        sizes, before = [], await counts(running)
        for turn in range(1, 3):
            await FLOWS["mac"](running.ws, speech([3]))
            await until(lambda: lent(processes) == [0, 0], "giving back")
            counted = await counts(running)
            await killed(running, processes)
            after = await counts(running)
            assert after["asr_connection_num_steps_count"] == counted["asr_connection_num_steps_count"] == turn
            assert after["moshi_stt_messages_sent"] >= counted["moshi_stt_messages_sent"] > before["moshi_stt_messages_sent"]
            before = after
            sizes.append({name: len(family.samples) for name, family in processes._past.items()})
        assert sizes[0] == sizes[1] != {}


async def test_a_process_that_hangs_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """It holds sockets and slots that nobody serves: it is killed, its clients see an end, and the slots come back."""
    monkeypatch.setattr(supervisor, "HANG_SECONDS", 10.0)
    monkeypatch.setattr(worker_pool, "COUNT_SECONDS", 0.01)
    async with served(monkeypatch, streams=2) as (running, processes, _), await RawClient.connect(running.port) as client:
        assert (await client.receive_event())["type"] == "Ready"
        first = processes._workers[0]
        process, channel = first.process, first.channel
        assert process is not None
        assert channel is not None
        os.kill(process.pid, signal.SIGSTOP)
        asked = []
        monkeypatch.setattr(channel, "send", lambda message, descriptors: asked.append(type(message).__name__))
        for _ in range(10):
            await counts(running)
        assert asked.count("Count") <= 1  # it is not asked again before it has answered
        assert not first.counted.is_set()
        await until(lambda: first.pinged_at is not None, "a ping")
        assert first.pinged_at is not None
        first.pinged_at -= 1_000  # as if that was long ago; the others have their time
        assert (await client.rest())[1] == -1
        await until(lambda: first.process is not process and first.ready.is_set(), "the new process")
        await until(lambda: running.server.service.served[0].engine.used_slots == 0, "the slots")
        assert (await FLOWS["mac"](running.ws, speech([3]))).text == "w3."


async def test_a_process_that_owes_an_answer_gets_no_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients that come while one process is stopped are served by the others at once, and by it when it goes on."""
    monkeypatch.setattr(supervisor, "OWED_SECONDS", 0.3)
    async with served(monkeypatch, streams=8) as (running, processes, _):
        stopped = processes._workers[0]
        assert stopped.process is not None
        os.kill(stopped.process.pid, signal.SIGSTOP)
        try:
            await until(lambda: not stopped.takes, "noticing that it is stopped")
            for _ in range(4):
                assert (await FLOWS["mac"](running.ws, speech([3]))).text == "w3."
        finally:
            os.kill(stopped.process.pid, signal.SIGCONT)
        await until(lambda: stopped.takes, "its answer")
        assert stopped.process.returncode is None


async def test_a_process_whose_engine_fails_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else it would have the fewest streams, be given every new socket, and refuse it."""
    async with served(monkeypatch, streams=4) as (running, processes, _):
        clients = [await RawClient.connect(running.port) for _ in range(2)]
        for client in clients:
            assert (await client.receive_event())["type"] == "Ready"
        before = [worker.process for worker in processes._workers]
        model = running.server.service.served[0].engine._model  # type: ignore[attr-defined]
        client = next(iter(model.server._clients))
        client.signal.shutdown(socket.SHUT_RDWR)  # its link to the model breaks, and nothing else
        clients[0].audio(noise(1))
        clients[1].audio(noise(1))
        endings = [await asyncio.wait_for(client.receive_event(), DEADLINE) for client in clients]
        assert sorted(event["type"] for event in endings) == ["Error", "Step"]
        for client, event in zip(clients, endings, strict=True):
            if event["type"] == "Error":
                assert (await client.rest())[1] == 1011
                client.close(1011)
        await until(lambda: [worker.process for worker in processes._workers] != before, "the new process")
        for client in clients:
            await client.__aexit__()
        await until(lambda: running.server.service.served[0].engine.used_slots == 0, "the slots")
        await until(lambda: all(worker.takes for worker in processes._workers), "both processes")
        for _ in range(2):
            assert (await FLOWS["mac"](running.ws, speech([3]))).text == "w3."


async def test_a_socket_that_cannot_be_sent_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no further descriptor is to be had for it, the first process carries it, and no slot is lost."""
    async with served(monkeypatch, streams=1) as (running, processes, _):

        def full(descriptor: int) -> int:
            raise OSError(24, "Too many open files")

        with monkeypatch.context() as patch:
            patch.setattr(os, "dup", full)
            assert (await FLOWS["mac"](running.ws, speech([3]))).text == "w3."
        assert lent(processes) == [0, 0]
        await until(lambda: running.server.service.served[0].engine.used_slots == 0, "the slot")
        assert (await FLOWS["mac"](running.ws, speech([3]))).text == "w3."


async def test_several_modules() -> None:
    """Two that share their processes, and one that this process keeps for itself."""

    def made(shared: int) -> BatchEngine:
        return BatchEngine(loader(LevelModel, 4, spell_level, shared), marker_wait_seconds=0.05)

    config = server_config()
    names = {"asr": 2, "second": 1, "alone": 0}
    modules = tuple(msgspec.structs.replace(config.modules[0], name=name, path=f"/api/{name}") for name in names)
    engines = {name: made(shared) for name, shared in names.items()}
    async with serving(engines, msgspec.structs.replace(config, modules=modules)) as running:
        processes = running.server.service.workers
        assert processes is not None
        for name, shared in names.items():
            async with await RawClient.connect(running.port, f"/api/{name}") as client:
                assert (await client.receive_event())["type"] == "Ready"
                assert sum(lent(processes)) == (shared > 0)
                assert running.connections() == (shared == 0)
                assert [each for each, engine in engines.items() if engine.used_slots] == [name]
                client.audio(noise(1))
                assert (await client.receive_event())["type"] == "Step"
                client.close()
                await client.rest()
            await until(lambda: not any(engine.used_slots for engine in engines.values()), "giving back")
