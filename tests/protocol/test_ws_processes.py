"""WebSockets carried by further processes: what clients see is what one process does, also when one of the others dies."""

import asyncio
import os
import signal
import socket

import pytest
from tests.support.batch import noise
from tests.support.client_flows import FLOWS
from tests.support.raw_ws import RawClient, frame
from tests.support.serving import until
from tests.support.socket_processes import counts, lent, served, speech

from moshi_stt import protocol

pytestmark = pytest.mark.skipif(not hasattr(socket, "send_fds"), reason="this system cannot hand sockets over")


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


async def test_a_process_that_dies_takes_its_own_streams_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its clients see the connection end; the others' go on; their slots come back, and a new process takes its place."""
    async with served(monkeypatch, streams=4) as (running, processes, _):
        clients = [await RawClient.connect(running.port) for _ in range(4)]
        for client in clients:
            assert (await client.receive_event())["type"] == "Ready"
        first = processes._workers[0]
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
        await until(lambda: lent(processes) == [0, 2] and processes._workers[0].ready.is_set(), "the new process")
        await until(lambda: running.server.service.served[0].engine.used_slots == 2, "the slots")
        transcript = await FLOWS["mac"](running.ws, speech([3, 9]))
        assert transcript.text == "w3. w9."
        for client in clients:
            await client.__aexit__()
