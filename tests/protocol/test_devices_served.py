"""`worker --devices`: one port, several model processes; what clients see is what one process does, whichever dies."""

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pytest
from tests.support.batch import noise
from tests.support.client_flows import FLOWS, Transcript
from tests.support.device_processes import (
    DEVICES,
    NAMES,
    STREAMS,
    clients,
    kill,
    levels,
    levels_with_a_worker,
    no_model,
    on_devices,
    pid,
    speech,
)
from tests.support.door_clients import LIVE, Sound
from tests.support.media import encode
from tests.support.raw_ws import NotUpgraded, RawClient, frame
from tests.support.serving import KEY, Running, raw_request, server_config, until
from tests.support.socket_processes import counts

from moshi_stt import protocol
from moshi_stt.constants import API_KEY_HEADER, DEFAULT_PATH, SAMPLE_RATE
from moshi_stt.errors import CheckpointError
from moshi_stt.server.app import Server
from moshi_stt.server.devices.farewell import LONGEST_CLOSE, ends_with_close
from moshi_stt.server.devices.pool import DIED, DevicePool
from moshi_stt.server.resume import REFUSED
from moshi_stt.server.workers import supervisor

pytestmark = pytest.mark.skipif(not hasattr(socket, "send_fds"), reason="this system cannot hand sockets over")

HEADERS = {API_KEY_HEADER: KEY}


async def ready_client(running: Running, query: str = "") -> tuple[RawClient, dict[str, Any]]:
    client = await RawClient.connect(running.port, DEFAULT_PATH + query)
    ready = await client.receive_event()
    assert ready["type"] == "Ready", ready
    return client, ready


async def leave(*some: RawClient) -> None:
    for client in some:
        await client.__aexit__()


async def json_of(running: Running, path: str) -> Any:
    async with aiohttp.ClientSession() as http, http.get(running.http + path) as answer:
        return await answer.json()


async def used(running: Running) -> int:
    (module,) = await json_of(running, "/api/modules_info")
    return int(module["used_slots"])


async def test_known_clients_many_at_once() -> None:
    """Every flow, on both devices; all slots are free in the end, and all sockets closed."""
    numbers = [3, 9, 5, 20, 31, 4]
    async with on_devices() as (running, pool):
        for flow, run in FLOWS.items():
            options = {"rtf": 50} if flow == "dsm" else {}
            running_flows = [asyncio.create_task(run(running.ws, speech(numbers), **options)) for _ in range(8)]
            await until(lambda: clients(pool) == [4, 4], "four streams on each")
            for transcript in await asyncio.gather(*running_flows):
                assert transcript.text == " ".join(f"w{number}." for number in numbers)
                assert transcript.markers == [0]
                assert transcript.close_code == 1000
            await until(lambda: clients(pool) == [0, 0], "giving back")
            await until(lambda: running.server.service.served[0].engine.used_slots == 0, "the slots")


async def test_one_page_one_modules_info_one_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    async with on_devices(monkeypatch) as (running, pool):
        some = [(await ready_client(running))[0] for _ in range(3)]
        (module,) = await json_of(running, "/api/modules_info")
        assert (module["used_slots"], module["total_slots"]) == ("3", str(2 * STREAMS))
        assert module["device"] == ",".join(NAMES)
        assert (await json_of(running, "/ready"))["modules"] == {"asr": {"used_slots": 3, "total_slots": 2 * STREAMS}}
        assert (await json_of(running, "/health")) == {"status": "ok"}
        found = await counts(running)
        shares = [found[f'moshi_stt_used_slots{{device="{name}",module="asr"}}'] for name in NAMES]
        assert sorted(shares) == [1, 2]
        assert sum(found[f'asr_open_channels{{device="{name}",handler="all"}}'] for name in NAMES) == 3
        assert found['asr_connect{handler="all"}'] == 3
        assert 'moshi_stt_used_slots{module="asr"}' not in found  # the sum over devices is the sum over series
        assert [found[f'moshi_stt_device_up{{device="{name}"}}'] for name in NAMES] == [1, 1]
        page = await raw_request(running.port, b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert page.status == 200
        await kill(pool, 0)
        assert (await counts(running))[f'moshi_stt_device_deaths{{device="{NAMES[0]}"}}'] == 1
        await leave(*some)


async def test_the_last_slot_of_both_and_no_more() -> None:
    """Who finds no slot is told as by one process, at every place where that shows."""
    async with on_devices() as (running, _):
        some = [(await ready_client(running))[0] for _ in range(2 * STREAMS)]
        async with await RawClient.connect(running.port) as refused:
            assert await refused.receive_event() == {"type": "Error", "message": "no free channels"}
            assert (await refused.rest())[1] == 1013
        ready = await raw_request(running.port, b"GET /ready HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert (ready.status, b"no free channels" in ready.body) == (503, True)
        some[0].close()
        assert (await some[0].rest())[1] == 1000
        await until(lambda: running.server.service.unready() is None, "a free slot")
        again, _ = await ready_client(running)
        await leave(again, *some)


async def test_a_device_that_declines_gives_the_socket_to_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first process may not know yet that a file has taken the last slot there: nothing that the client sent is lost."""
    async with on_devices() as (running, pool):
        engine = running.server.service.served[0].engine
        first, second = (device.slots["asr"] for device in pool._devices)
        some = [(await ready_client(running))[0] for _ in range(2 * STREAMS - 1)]
        await until(lambda: first.awaiting == second.awaiting == 0, "the answers")
        full, other = (first, second) if first.free == 0 else (second, first)
        full.used -= 2  # what it knows is old: that one seems to have more free
        early = frame(2, protocol.encode_audio(noise(1)))
        client = await RawClient.connect(running.port, early=early)
        assert [(await client.receive_event())["type"] for _ in range(2)] == ["Ready", "Step"]
        await until(lambda: engine.used_slots == 2 * STREAMS, "the truth")
        assert other.free == 0
        full.used -= 1
        async with await RawClient.connect(running.port, early=early) as refused:
            assert await refused.receive_event() == {"type": "Error", "message": "no free channels"}
            assert (await refused.rest())[1] == 1013
        await leave(client, *some)


async def test_clients_that_come_while_the_models_load() -> None:
    """They wait for a slot, and what they have sent is not lost."""
    config = server_config()
    pool = DevicePool(config, DEVICES, levels)
    server = Server(config, dict(pool.engines), "127.0.0.1", 0, devices=pool)
    starting = asyncio.create_task(server.start())
    try:
        await until(lambda: server.port, "the port")
        async with await RawClient.connect(server.port, early=frame(2, protocol.encode_audio(noise(1)))) as client:
            client.audio(noise(1))
            assert [(await client.receive_event())["type"] for _ in range(3)] == ["Ready", "Step", "Step"]
        await starting
        ready = await raw_request(server.port, b"GET /ready HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert ready.status == 200
    finally:
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)
        await server.stop()


async def test_limits_of_an_address_are_kept() -> None:
    """A connection counts as long as its device has it."""
    async with on_devices(connections_per_address=1) as (running, pool):
        first, _ = await ready_client(running)
        with pytest.raises(NotUpgraded, match=r"429"):
            await RawClient.connect(running.port)
        first.close()
        await first.rest()
        await leave(first)
        await until(lambda: clients(pool) == [0, 0], "its end")
        second, _ = await ready_client(running)
        await leave(second)


# ---- files -----------------------------------------------------------------------------------------------------------------


async def post(running: Running, body: Any, path: str = DEFAULT_PATH, **headers: str) -> tuple[int, str]:
    async with (
        aiohttp.ClientSession() as http,
        http.post(running.http + path, data=body, headers={**HEADERS, **headers}) as answer,
    ):
        return answer.status, await answer.text()


async def test_files_go_to_both_devices() -> None:
    """Answers, whole and by pieces, and refusals are those of one process; each is counted once, where it was answered."""
    wav = encode(np.concatenate([speech([3, 9, 5]), np.zeros(SAMPLE_RATE, np.float32)]), SAMPLE_RATE)
    async with on_devices() as (running, _):
        for status, text in await asyncio.gather(*(post(running, wav) for _ in range(6))):
            assert status == 200
            assert "w3." in text
        status, text = await post(running, wav, Accept="application/x-ndjson")
        assert (status, '"w3."' in text) == (200, True)
        form = aiohttp.FormData()
        form.add_field("file", wav, filename="talk.wav")
        form.add_field("model", "whisper-1")
        status, text = await post(running, form, "/v1/audio/transcriptions", Authorization=f"Bearer {KEY}")
        assert (status, "w3." in text) == (200, True)
        assert await post(running, b"no audio at all") == (400, (await post(running, b"no audio at all"))[1])
        async with aiohttp.ClientSession() as http, http.post(running.http + DEFAULT_PATH, data=wav) as answer:
            assert answer.status == 401
        async with (
            aiohttp.ClientSession() as http,
            http.post(running.http + DEFAULT_PATH, data=wav, headers={**HEADERS, "X-Request-ID": "mine"}) as answer,
        ):
            assert answer.headers["X-Request-ID"] == "mine"
            assert answer.headers.getall("Content-Type") == ["application/json"]
        found = await counts(running)
        answered = {name: found.get(f'moshi_stt_uploads{{device="{name}",status="200"}}', 0) for name in NAMES}
        assert sum(answered.values()) == 9
        assert min(answered.values()) >= 3
        assert 'moshi_stt_uploads{status="200"}' not in found


async def test_a_client_that_goes_away_amid_its_file_leaves_nothing() -> None:
    async with on_devices() as (running, pool):
        head = f"POST {DEFAULT_PATH} HTTP/1.1\r\nHost: x\r\n{API_KEY_HEADER}: {KEY}\r\nContent-Length: 1000000\r\n\r\n"
        _, writer = await asyncio.open_connection("127.0.0.1", running.port)
        writer.write(head.encode() + bytes(10_000))
        await until(lambda: sum(device.files for device in pool._devices) == 1, "its arrival")
        writer.close()
        await until(lambda: sum(device.files for device in pool._devices) == 0, "its end")
        assert len(running.server.service.uploads) == 0


async def test_a_broken_body_is_said() -> None:
    request = (
        f"POST {DEFAULT_PATH} HTTP/1.1\r\nHost: x\r\n{API_KEY_HEADER}: {KEY}\r\nTransfer-Encoding: chunked\r\n"
        "Connection: close\r\n\r\nzz\r\n"
    )
    async with on_devices() as (running, _):
        answer = await raw_request(running.port, request.encode())
        assert answer.status == 400


async def test_a_process_that_dies_amid_a_file_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    async with on_devices(monkeypatch) as (running, pool):
        head = f"POST {DEFAULT_PATH} HTTP/1.1\r\nHost: x\r\n{API_KEY_HEADER}: {KEY}\r\nContent-Length: 1000000\r\n\r\n"
        reader, writer = await asyncio.open_connection("127.0.0.1", running.port)
        writer.write(head.encode() + bytes(10_000))
        await until(lambda: any(device.files for device in pool._devices), "its arrival")
        number = next(i for i, device in enumerate(pool._devices) if device.files)
        os.kill(pid(pool, number), signal.SIGKILL)
        answer = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 60)
        assert answer.startswith(b"HTTP/1.1 503 ")
        writer.close()
        await until(lambda: all(device.ready.is_set() for device in pool._devices), "the new process")
        assert (await post(running, encode(speech([3]), SAMPLE_RATE)))[0] == 200


# ---- the end of a model process --------------------------------------------------------------------------------------


async def test_kill_ends_its_own_streams_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its clients get Error and a Close; the others get what they get without the kill, event for event; slots come back."""
    numbers = [3, 9, 5, 20, 31, 4]
    pcm = speech(numbers)
    half = len(pcm) // 2

    async def to_the_end(client: RawClient) -> tuple[list[dict[str, Any]], int | None]:
        events = []
        while not events or events[-1]["type"] not in ("Marker", "Error"):
            events.append(await client.receive_event())
        client.close()
        for event in events:
            for key in ("step_idx", "buffered_pcm"):  # the steps of all streams so far, and what waits: matters of time
                event.pop(key, None)
        return events, (await client.rest())[1]

    async def streams(killed: bool) -> list[tuple[list[dict[str, Any]], int | None]]:
        async with on_devices(monkeypatch) as (running, pool):
            some = [(await ready_client(running))[0] for _ in range(2 * STREAMS)]
            for client in some:
                client.audio(pcm[:half])
                first = await client.receive_event()
                assert first["type"] == "Step"
            if killed:
                os.kill(pid(pool, 0), signal.SIGKILL)
            for client in some:
                client.audio(pcm[half:])
                client.marker(7)
            found = await asyncio.gather(*(to_the_end(client) for client in some))
            await leave(*some)
            await until(lambda: all(device.ready.is_set() for device in pool._devices), "the new process")
            await until(lambda: running.server.service.served[0].engine.used_slots == 0, "the slots")
            assert running.server.service.served[0].engine.total_slots == 2 * STREAMS
            assert (await FLOWS["mac"](running.ws, speech([3]))).text == "w3."
            return list(found)

    alone = await streams(False)
    with_kill = await streams(True)
    ended = [pair for pair in with_kill if pair[0][-1]["type"] == "Error"]
    assert len(ended) == STREAMS
    for events, code in ended:
        assert (events[-1]["message"], code) == (DIED, 1011)
    assert [pair for pair in with_kill if pair not in ended] == alone[:STREAMS]
    assert all(pair == alone[0] for pair in alone)


async def test_resume_of_a_dead_process_is_refused_and_of_the_other_not(monkeypatch: pytest.MonkeyPatch) -> None:
    async with on_devices(monkeypatch, resume_seconds=60.0) as (running, pool):
        tokens = []
        for _ in range(2):
            client, ready = await ready_client(running, "?resume=1")
            tokens.append(ready["token"])
            client.reset()
        assert sorted(token.partition("-")[0] for token in tokens) == ["d0.0", "d1.0"]
        for token in tokens:  # parked, and on its own device
            client, ready = await ready_client(running, f"?resume={token}&samples=0&events=0")
            assert ready["token"] == token
            client.reset()
        await kill(pool, 0)
        for token in tokens:
            path = f"{DEFAULT_PATH}?resume={token}&samples=0&events=0"
            async with await RawClient.connect(running.port, path) as client:
                event = await client.receive_event()
                if token.startswith("d0."):
                    assert event["type"] == "Error"
                    assert "start a new one" in event["message"]
                    assert (await client.rest())[1] == REFUSED
                else:
                    assert event == {"type": "Ready", "token": token}
        path = f"{DEFAULT_PATH}?resume=d7.0-nobody&samples=0&events=0"
        async with await RawClient.connect(running.port, path) as client:
            assert (await client.rest())[1] == REFUSED


async def test_a_process_that_hangs_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its streams end with Error, its slots come back, and meanwhile new clients go to the other."""
    monkeypatch.setattr(supervisor, "OWED_SECONDS", 5.0)
    async with on_devices(monkeypatch) as (running, pool):
        some = [(await ready_client(running))[0] for _ in range(2)]
        hung = pool._devices[0]
        process = hung.process
        os.kill(pid(pool, 0), signal.SIGSTOP)
        await until(lambda: not hung.takes, "noticing that it hangs")
        assert (await FLOWS["mac"](running.ws, speech([3]))).text == "w3."
        assert hung.pinged_at is not None
        hung.pinged_at -= 1_000  # as if that was long ago; the other has its time
        await until(lambda: hung.process is not process and hung.ready.is_set(), "the new process")
        endings = []
        for client in some:
            client.audio(noise(1))
            endings.append(await client.receive_event())
        assert sorted(event["type"] for event in endings) == ["Error", "Step"]
        await leave(*some)
        await until(lambda: running.server.service.served[0].engine.used_slots == 0, "the slots")


async def test_workers_of_a_dead_process_tell_their_clients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a device has socket processes, those speak to the clients themselves."""
    async with on_devices(monkeypatch, levels_with_a_worker, resume_seconds=60.0) as (running, pool):
        some = [await ready_client(running, "?resume=1") for _ in range(4)]
        assert sorted(ready["token"].partition("-")[0] for _, ready in some) == ["d0.1", "d0.1", "d1.1", "d1.1"]
        await until(lambda: all(c.sock is None for d in pool._devices for c in d.clients.values()), "the workers")
        assert await used(running) == 4
        client, ready = some[0]
        client.reset()
        back, again = await ready_client(running, f"?resume={ready['token']}&samples=0&events=0")
        assert again["token"] == ready["token"]
        some[0] = back, again
        os.kill(pid(pool, 0), signal.SIGKILL)
        for client, ready in some:
            if ready["token"].startswith("d0."):
                assert "has ended" in (await client.events_until("Error"))[-1]["message"]
                assert (await client.rest())[1] == 1011
            else:
                client.audio(noise(1))
                assert (await client.receive_event())["type"] == "Step"
        await leave(*(client for client, _ in some))
        await until(lambda: all(device.ready.is_set() for device in pool._devices), "the new process")
        await until(lambda: running.server.service.served[0].engine.used_slots == 0, "the slots")


# ---- the other doors, and the end of the server ----------------------------------------------------------------------


@pytest.mark.parametrize("door", LIVE)
async def test_every_door(door: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Words come on each device; a client of one that dies is told in its own protocol."""
    pcm = speech([3, 9, 5])
    sound = Sound((np.clip(pcm, -1, 1) * 32_767).astype("<i2").tobytes(), SAMPLE_RATE)
    async with on_devices(monkeypatch) as (running, pool):
        said = await asyncio.gather(*(LIVE[door](running, sound) for _ in range(2)))
        assert [[word.text for word in each] for each in said] == [["w3.", "w9.", "w5."]] * 2
        await until(lambda: clients(pool) == [0, 0], "giving back")


@pytest.mark.parametrize(
    ("path", "headers", "told", "code"),
    [
        ("/v1/listen?encoding=linear16&sample_rate=24000", {"Authorization": f"Token {KEY}"}, DIED, 1011),
        ("/v1/realtime?intent=transcription", {"Authorization": f"Bearer {KEY}"}, DIED, 1011),
        ("/api/speech/asr", {"x-api-key": KEY}, DIED, 1011),
    ],
)
async def test_every_doors_error(
    path: str, headers: dict[str, str], told: str, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with (
        on_devices(monkeypatch) as (running, pool),
        aiohttp.ClientSession() as http,
        http.ws_connect(running.http + path, headers=headers) as client,
    ):
        if "speech" in path:
            await client.send_json({"type": "setup", "input_format": "pcm_24000"})
        await until(lambda: sum(clients(pool)) == 1, "its arrival")
        number = clients(pool).index(1)
        reading = asyncio.create_task(rest_of(client))
        os.kill(pid(pool, number), signal.SIGKILL)
        texts = await reading
        assert client.close_code == code
        assert told in texts[-1]
        await until(lambda: pool._devices[number].ready.is_set(), "the new process")


async def rest_of(client: aiohttp.ClientWebSocketResponse) -> list[str]:
    async with asyncio.timeout(60):
        return [str(message.data) async for message in client]


def test_where_a_close_ends() -> None:
    """Wherever the data begins, and however long the Close is."""
    for size in (0, 2, 30, 125):
        close = frame(8, bytes(size))
        for before in (b"", b"x", bytes(200), frame(2, bytes(50))):
            assert ends_with_close((before + close)[-LONGEST_CLOSE:])
            assert not ends_with_close((before + close + b"x")[-LONGEST_CLOSE:])
    for data in (b"", b"\x88", bytes(131), frame(2, bytes(20))):
        assert not ends_with_close(data)


@pytest.mark.parametrize("ending", ["stop", "drain"])
async def test_shutdown_tells_every_client(ending: str) -> None:
    async with on_devices() as (running, _):
        some = [(await ready_client(running))[0] for _ in range(4)]
        server = running.server
        stopping = asyncio.create_task(server.stop() if ending == "stop" else server.drain(0.0))
        for client in some:
            assert (await client.events_until("Error"))[-1]["message"].startswith("the server is shutting down")
            assert (await client.rest())[1] == 1001
            client.close(1001)
        await stopping
        await leave(*some)


async def test_drain_lets_streams_finish() -> None:
    """What was sent is transcribed; new clients are refused; the end comes when the streams have ended."""
    async with on_devices() as (running, pool):
        numbers = [3, 9, 5]
        talks: list[asyncio.Task[Transcript]] = [
            asyncio.create_task(FLOWS["dsm"](running.ws, speech(numbers), rtf=2)) for _ in range(2)
        ]
        await until(lambda: clients(pool) == [1, 1], "their arrival")
        draining = asyncio.create_task(running.server.drain(60.0))
        await until(lambda: running.server.service.stopping, "the drain")
        refused = await raw_request(running.port, f"GET {DEFAULT_PATH} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        assert refused.status in (400, 503)
        for talk in talks:
            assert (await talk).text == "w3. w9. w5."
        await asyncio.wait_for(draining, 60)


async def test_a_device_that_cannot_start_says_why() -> None:
    with pytest.raises(CheckpointError, match=r"cpu:\d: model.safetensors: not there\. Fetch it again\."):
        async with on_devices(build=no_model):
            pass


async def test_the_self_test_runs_on_every_device() -> None:
    async with on_devices() as (_, pool):
        await pool.self_test(passes)
        with pytest.raises(Exception, match=r"cpu:0: the model says nothing"):
            await pool.self_test(fails)


async def passes(module: object, engine: object) -> None:
    """A self-test."""


async def fails(module: object, engine: object) -> None:
    """Another one."""
    raise CheckpointError("the model says nothing")


# ---- the command -----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system does not let a process choose its cores")
@pytest.mark.parametrize("ending", ["SIGKILL", "SIGTERM"])
async def test_the_end_of_the_first_process(ending: str, tmp_path: Path) -> None:
    """However it ends, its clients are told, and its model processes end with it and leave nothing."""
    cores = sorted(os.sched_getaffinity(0))[:2]
    if len(cores) < 2:
        pytest.skip("this process may use one core alone")
    pid_file, log = tmp_path / "pid", tmp_path / "log"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "moshi_stt", "worker", "--addr", "127.0.0.1", "--port", str(port), "--batch-size", "1"]
    command += ["--devices", ",".join(f"cpu:{core}" for core in cores), "--pid-file", str(pid_file)]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    first = started(command, log, environment)
    try:
        await until(lambda: pid_file.exists() or first.poll() is not None, "its start")
        processes = [int(found) for found in re.findall(r"serves: process (\d+)", log.read_text())]
        assert len(processes) == 2, log.read_text()
        assert {frozenset(os.sched_getaffinity(each)) for each in processes} == {frozenset({core}) for core in cores}
        some = [await RawClient.connect(port) for _ in range(2)]
        for client in some:
            assert (await client.receive_event())["type"] == "Ready"
        first.send_signal(signal.Signals[ending])
        for client in some:
            events, code = await client.rest()
            assert (events[-1]["type"], code) == ("Error", 1011 if ending == "SIGKILL" else 1001)
            await client.__aexit__()
        assert await asyncio.to_thread(first.wait, 60) == (-signal.SIGKILL if ending == "SIGKILL" else 0)
        await until(lambda: not any(Path(f"/proc/{each}").exists() for each in processes), "the end of the others")
        assert left(tmp_path) == []
    finally:
        first.kill()
        first.wait()


def started(command: list[str], log: Path, environment: dict[str, str]) -> "subprocess.Popen[bytes]":
    with log.open("wb") as out:
        return subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment)


def left(folder: Path) -> list[str]:
    """What processes of a server have left in the folder for temporary files."""
    return [path.name for path in folder.glob("moshi-stt-*")]
