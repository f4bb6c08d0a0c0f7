"""WebSockets carried by further processes: what clients see is what one process does, also when one of the others dies."""

import asyncio
import os
import signal
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp
import numpy as np
import pytest
from tests.support.batch import noise
from tests.support.client_flows import FLOWS
from tests.support.level_speech import pause, say
from tests.support.raw_ws import RawClient, frame
from tests.support.scripted_backend import FakeBackend, LevelModel, loader, spell_level
from tests.support.serving import Running, serving, until

from moshi_stt import protocol
from moshi_stt.engine.batch import BatchEngine
from moshi_stt.server import processes as server_processes
from moshi_stt.server.processes import SocketProcesses

pytestmark = pytest.mark.skipif(not hasattr(socket, "send_fds"), reason="this system cannot hand sockets over")

PROCESSES = 2
GAP = 0.24


class Model:
    """The engine's backend, once it is loaded."""

    backend: FakeBackend


@asynccontextmanager
async def served(monkeypatch: pytest.MonkeyPatch, streams: int = 8) -> AsyncIterator[tuple[Running, SocketProcesses, Model]]:
    """A server whose sockets are elsewhere."""
    monkeypatch.setattr(server_processes, "FIRST_PAUSE_SECONDS", 0.01)
    model = Model()

    def make(slots: int) -> FakeBackend:
        model.backend = LevelModel(slots)
        return model.backend

    engine = BatchEngine(loader(make, streams, spell_level, PROCESSES), delay_frames=6, marker_wait_seconds=0.05)
    async with serving(engine) as running:
        processes = running.server.service.processes
        assert processes is not None
        yield running, processes, model
    for child in processes._children:
        assert child.process is not None
        assert child.process.returncode == 0


def speech(numbers: list[int]) -> np.ndarray:
    return np.concatenate([say(numbers, gap=GAP), pause(0.5)])


def lent(processes: SocketProcesses) -> list[int]:
    """How many streams each process carries."""
    return [len(child.lent) for child in processes._children]


async def counts(running: Running) -> dict[str, float]:
    """The samples of /metrics."""
    async with aiohttp.ClientSession() as http, http.get(running.http + "/metrics") as answer:
        lines = (await answer.text()).splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))}


async def test_known_clients_many_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every flow, on every process; what they did is counted once; then all slots are free."""
    numbers = [3, 9, 5, 20, 31, 4]
    async with served(monkeypatch) as (running, processes, _):
        for flow, run in FLOWS.items():
            options = {"rtf": 50} if flow == "dsm" else {}
            for transcript in await asyncio.gather(*(run(running.ws, speech(numbers), **options) for _ in range(6))):
                assert transcript.text == " ".join(f"w{number}." for number in numbers)
                assert transcript.markers == [0]
                assert transcript.close_code == 1000
        await until(lambda: lent(processes) == [0, 0], "giving back")
        assert running.connections() == 0
        found = await counts(running)
        assert found['asr_connect{handler="all"}'] == 18
        assert found['asr_open_channels{handler="all"}'] == 0
        assert found["asr_connection_num_steps_count"] == 18
        assert found["moshi_stt_websockets"] == 0
        assert found["moshi_stt_messages_sent"] > 18 * 8
        assert found['moshi_stt_used_slots{module="asr"}'] == 0
        assert found["moshi_stt_step_rows_sum"] >= found["asr_connection_num_steps_sum"] > 0


async def test_sockets_are_shared_out_and_slots_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each new one goes where there are fewest; who finds no slot is told as by one process."""
    async with served(monkeypatch, streams=5) as (running, processes, _):
        clients = []
        for i in range(5):
            clients.append(await RawClient.connect(running.port, early=frame(2, protocol.encode_audio(noise(1)))))
            assert (await clients[-1].receive_event())["type"] == "Ready"
            assert (await clients[-1].receive_event())["type"] == "Step"
            assert sorted(lent(processes)) == [(i + 1) // 2, (i + 2) // 2]
        found = await counts(running)
        assert found['moshi_stt_used_slots{module="asr"}'] == found['asr_open_channels{handler="all"}'] == 5
        assert found["moshi_stt_websockets"] == 5
        async with await RawClient.connect(running.port) as refused:
            assert await refused.receive_event() == {"type": "Error", "message": "no free channels"}
            assert (await refused.rest())[1] == 1013
        for client in clients:
            client.close()
            assert (await client.rest())[1] == 1000
            await client.__aexit__()
        await until(lambda: lent(processes) == [0, 0], "giving back")
        assert (await counts(running))['moshi_stt_refused{reason="no_free_slot"}'] == 1


async def test_a_broken_message_is_answered_there(monkeypatch: pytest.MonkeyPatch) -> None:
    async with served(monkeypatch) as (running, _, _), await RawClient.connect(running.port) as client:
        client.send(b"\x01")
        events = await client.events_until("Error")
        assert "map" in events[-1]["message"]
        assert (await client.rest())[1] == 1003
        assert (await counts(running))['moshi_stt_errors{kind="malformed"}'] == 1


async def test_shutdown_tells_every_client(monkeypatch: pytest.MonkeyPatch) -> None:
    async with served(monkeypatch) as (running, _, _):
        clients = [await RawClient.connect(running.port) for _ in range(4)]
        for client in clients:
            assert (await client.receive_event())["type"] == "Ready"
        stopping = asyncio.create_task(running.server.stop())
        for client in clients:
            assert (await client.events_until("Error"))[-1]["message"].startswith("the server is shutting down")
            assert (await client.rest())[1] == 1001
            client.close(1001)
            await client.__aexit__()
        await stopping


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
        async with asyncio.timeout(20):
            assert await waiting == 1


async def test_a_process_that_dies_takes_its_own_streams_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its clients see the connection end; the others' go on; their slots come back, and a new process takes its place."""
    async with served(monkeypatch, streams=4) as (running, processes, _):
        clients = [await RawClient.connect(running.port) for _ in range(4)]
        for client in clients:
            assert (await client.receive_event())["type"] == "Ready"
        first = processes._children[0]
        assert first.process is not None
        os.kill(first.process.pid, signal.SIGKILL)
        ended = 0
        for client in clients:
            client.audio(noise(1))
            try:
                assert (await client.receive_event())["type"] == "Step"
            except (asyncio.IncompleteReadError, ConnectionError):
                ended += 1
        assert ended == 2
        await until(lambda: lent(processes) == [0, 2] and processes._children[0].ready.is_set(), "the new process")
        await until(lambda: running.server.service.served[0].engine.used_slots == 2, "the slots")
        transcript = await FLOWS["mac"](running.ws, speech([3, 9]))
        assert transcript.text == "w3. w9."
        for client in clients:
            await client.__aexit__()


async def killed(running: Running, processes: SocketProcesses) -> None:
    """Kill the first process, and wait for the next."""
    first = processes._children[0]
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
    monkeypatch.setattr(server_processes, "HANG_SECONDS", 0.5)
    monkeypatch.setattr(server_processes, "COUNT_SECONDS", 0.01)
    async with served(monkeypatch, streams=2) as (running, processes, _), await RawClient.connect(running.port) as client:
        assert (await client.receive_event())["type"] == "Ready"
        first = processes._children[0]
        process, channel = first.process, first.channel
        assert process is not None
        assert channel is not None
        os.kill(process.pid, signal.SIGSTOP)
        asked = []
        monkeypatch.setattr(channel, "send", lambda *message: asked.append(message))
        for _ in range(10):
            await counts(running)
        assert len(asked) <= 1  # it is not asked again before it has answered
        assert (await client.rest())[1] == -1
        await until(lambda: first.process is not process and first.ready.is_set(), "the new process")
        await until(lambda: running.server.service.served[0].engine.used_slots == 0, "the slots")
        assert (await FLOWS["mac"](running.ws, speech([3]))).text == "w3."


async def test_a_process_whose_engine_fails_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else it would have the fewest streams, be given every new socket, and refuse it."""
    async with served(monkeypatch, streams=4) as (running, processes, _):
        clients = [await RawClient.connect(running.port) for _ in range(2)]
        for client in clients:
            assert (await client.receive_event())["type"] == "Ready"
        before = [child.process for child in processes._children]
        hub = running.server.service.served[0].engine._hub  # type: ignore[attr-defined]
        port = next(iter(hub._ports))
        port.signal.shutdown(socket.SHUT_RDWR)  # its line to the model breaks, and nothing else
        clients[0].audio(noise(1))
        clients[1].audio(noise(1))
        endings = [await asyncio.wait_for(client.receive_event(), 20) for client in clients]
        assert sorted(event["type"] for event in endings) == ["Error", "Step"]
        for client, event in zip(clients, endings, strict=True):
            if event["type"] == "Error":
                assert (await client.rest())[1] == 1011
                client.close(1011)
        await until(lambda: [child.process for child in processes._children] != before, "the new process")
        for client in clients:
            await client.__aexit__()
        await until(lambda: running.server.service.served[0].engine.used_slots == 0, "the slots")
        await until(lambda: all(child.takes for child in processes._children), "both processes")
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
