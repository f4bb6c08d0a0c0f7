"""POST of whole files: answers, refusals and what is left behind (nothing)."""

import asyncio
import errno
import io
import json
import logging
import tempfile
from pathlib import Path
from typing import IO, Any

import aiohttp
import numpy as np
import pytest
from tests.support.media import encode, noise
from tests.support.raw_ws import RawClient
from tests.support.scripted_engine import ScriptedEngine, counting
from tests.support.serving import DEADLINE, KEY, Running, raw_request, serving, until

from moshi_stt.audio import decode_pool
from moshi_stt.config import LimitsConfig
from moshi_stt.constants import API_KEY_HEADER, DEFAULT_PATH, SAMPLE_RATE
from moshi_stt.engine.engine import NO_EXTRAS, StreamOptions
from moshi_stt.engine.stream import Stream
from moshi_stt.server import upload

HEADERS = {API_KEY_HEADER: KEY}


def wav(seconds: float, rate: int = SAMPLE_RATE) -> bytes:
    return encode(noise(seconds, rate), rate)


async def post(running: Running, body: Any, headers: dict[str, str] = HEADERS, query: str = "") -> tuple[int, str, str]:
    """Status, content type, text."""
    async with (
        aiohttp.ClientSession() as http,
        http.post(
            running.http + DEFAULT_PATH + query, data=io.BytesIO(body) if isinstance(body, bytes) else body, headers=headers
        ) as answer,
    ):
        return answer.status, answer.headers.get("Content-Type", ""), await answer.text()


opened: list[IO[bytes]] = []


def temporary_files() -> list[IO[bytes]]:
    """Those that are open."""
    return [file for file in opened if not file.closed]


def names_left() -> list[Path]:
    return list(Path(tempfile.gettempdir()).iterdir())


@pytest.fixture(autouse=True)
def watched_temporary_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a folder of their own, and known to `temporary_files`."""
    make = tempfile.TemporaryFile

    def watched(**options: Any) -> IO[bytes]:
        file: IO[bytes] = make(**options)
        if not options:  # others than uploads name their folder
            opened.append(file)
        return file

    opened.clear()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(tempfile, "TemporaryFile", watched)


async def test_answer_is_an_array_of_words_and_ends() -> None:
    """The form of contract section 1.4: tag inside, no `Ready`, no `Step`, no log-probability."""
    engine = ScriptedEngine(counting(3, 3), delay_frames=2)
    async with serving(engine) as running:
        status, kind, text = await post(running, wav(1.0))
    assert (status, kind) == (200, "application/json")
    assert text == (
        '[{"type":"Word","text":"w0","start_time":0.0},{"type":"EndWord","stop_time":0.16},'
        '{"type":"Word","text":"w1","start_time":0.24},{"type":"EndWord","stop_time":0.4},'
        '{"type":"Word","text":"w2","start_time":0.48},{"type":"EndWord","stop_time":0.64}]'
    )
    assert engine.samples == [SAMPLE_RATE]
    assert not temporary_files()


@pytest.mark.parametrize("format", ["wav", "flac", "mp3", "opus", "m4a", "webm"])
async def test_any_format_and_rate(format: str) -> None:
    """Nothing but the bytes says what it is."""
    engine = ScriptedEngine(counting(2))
    async with serving(engine) as running:
        status, _, text = await post(running, encode(noise(2.0, 48_000), 48_000, format))
    assert status == 200, text
    assert len(json.loads(text)) == 4
    assert abs(engine.samples[0] - 2 * SAMPLE_RATE) <= 0.1 * SAMPLE_RATE


async def test_larger_than_two_mebibytes_and_than_any_queue() -> None:
    """moshi-server refuses more than 2 MiB. Here a file ten times the inbox goes through in pieces."""
    engine = ScriptedEngine()
    async with serving(engine) as running:
        status, _, text = await post(running, wav(200.0, 8_000))
    assert (status, text) == (200, "[]")
    assert sum(engine.samples) >= 200 * SAMPLE_RATE


async def test_chunked_body_without_a_length() -> None:
    async def pieces() -> Any:
        data = wav(1.0)
        for start in range(0, len(data), 1_000):
            yield data[start : start + 1_000]

    async with serving(ScriptedEngine(counting(1))) as running:
        assert (await post(running, pieces()))[0] == 200


@pytest.mark.parametrize(
    ("headers", "query"), [({}, ""), ({}, f"?auth_id={KEY}"), ({API_KEY_HEADER: "nope"}, ""), ({API_KEY_HEADER: "é"}, "")]
)
async def test_key_counts_in_the_header_alone(headers: dict[str, str], query: str) -> None:
    async with serving(ScriptedEngine()) as running:
        status, _, text = await post(running, wav(0.1), headers, query)
    assert (status, text) == (401, "")


@pytest.mark.parametrize("chunked", [False, True])
async def test_too_large_is_said_with_the_limit(chunked: bool) -> None:
    """413 with moshi-server's beginning, and the number."""

    async def pieces() -> Any:
        for _ in range(20):
            yield bytes(1_000)

    async with serving(ScriptedEngine(), max_upload_bytes=10_000) as running:
        status, kind, text = await post(running, pieces() if chunked else bytes(10_001))
        assert (status, kind) == (413, "text/plain; charset=utf-8")
        assert text.startswith("Failed to buffer the request body: length limit exceeded")
        assert "10000" in text
        assert (await post(running, wav(0.1)))[0] == 200
    assert not temporary_files()


@pytest.mark.parametrize(
    "body", [b"", b"z" * 1000, b"RIFF\x00\x00\x00\x00WAVE", b"<html>" * 100], ids=["empty", "z", "header", "html"]
)
async def test_what_is_no_audio_is_the_clients_fault(body: bytes) -> None:
    """400 and a plain sentence; moshi-server says 500, for some formats it drops the connection."""
    async with serving(ScriptedEngine()) as running:
        status, kind, text = await post(running, body)
    assert (status, kind) == (400, "text/plain; charset=utf-8")
    assert len(text) > 20
    assert "Traceback" not in text
    assert "/" not in text.replace("and/or", "")


async def test_damage_in_the_middle_is_said() -> None:
    """Not half a transcript that looks whole."""
    data = encode(noise(60.0), SAMPLE_RATE, "flac")
    broken = data[: len(data) // 2] + bytes(20_000) + data[len(data) // 2 + 20_000 :]
    engine = ScriptedEngine()
    async with serving(engine) as running:
        status, _, text = await post(running, broken)
        assert status in (200, 400)  # FLAC may find its way again behind the damage
        assert (status == 200) == text.startswith("[")
        status, _, text = await post(running, data[: len(data) // 2])
        assert status == 400, text
        await until(lambda: engine.used_slots == 0)


async def test_no_free_slot_is_503_after_the_wait() -> None:
    """moshi-server answers 500 with the same text; 503 says that trying again helps, and when."""
    engine = ScriptedEngine(slots=1)
    async with serving(engine, slot_wait_seconds=0.1) as running, await RawClient.connect(running.port) as client:
        await client.receive_event()
        request = b"POST /api/asr-streaming HTTP/1.1\r\nHost: x\r\nkyutai-api-key: public_token\r\nContent-Length: %d\r\n\r\n"
        data = wav(0.1)
        answer = await raw_request(running.port, request % len(data) + data)
    assert (answer.status, answer.body) == (503, b"no free channels")
    assert answer.headers["retry-after"] == "10"


async def test_waits_for_a_slot_that_comes_free() -> None:
    engine = ScriptedEngine(counting(1), slots=1)
    async with serving(engine) as running, await RawClient.connect(running.port) as client:
        await client.receive_event()
        posting = asyncio.create_task(post(running, wav(0.5)))
        await until(lambda: engine.waiting == 1, "the upload waiting for a slot")
        metrics = running.server.service.metrics
        assert 'moshi_stt_waiting_files{module="asr"} 1\n' in metrics.render().decode()
        client.close()
        status, _, text = await posting
        assert engine.waiting == 0
        assert "moshi_stt_refused{" not in metrics.render().decode()
    assert status == 200
    assert "w0" in text


async def test_client_that_goes_away_frees_its_slot_and_its_file() -> None:
    """While the engine stands still, and while the body is still coming."""
    engine = ScriptedEngine()
    async with serving(engine) as running:
        for body in (wav(1.0), wav(1.0)[:5_000]):
            engine.hold()
            _, writer = await asyncio.open_connection("127.0.0.1", running.port)
            head = (
                f"POST {DEFAULT_PATH} HTTP/1.1\r\nHost: x\r\nkyutai-api-key: {KEY}\r\nContent-Length: {len(wav(1.0))}\r\n\r\n"
            )
            writer.write(head.encode() + body)
            await writer.drain()
            if len(body) == len(wav(1.0)):
                await until(lambda: engine.used_slots == 1)
            else:
                await until(temporary_files)
            assert not names_left()  # a server that is killed now leaves nothing behind
            writer.transport.abort()
            await until(lambda: engine.used_slots == 0 and not temporary_files() and not running.server.service.uploads)
            engine.release()
        assert (await post(running, wav(0.2)))[0] == 200


@pytest.mark.parametrize(
    ("header", "body"),
    [("Content-Encoding: gzip\r\nContent-Length: 9", b"not gzip."), ("Transfer-Encoding: chunked", b"zz\r\n")],
    ids=["gzip", "chunk"],
)
async def test_body_that_is_not_what_its_header_says(header: str, body: bytes, caplog: pytest.LogCaptureFixture) -> None:
    """The client's fault: a 400 that says so, and no traceback in the log."""
    async with serving(ScriptedEngine(counting(2))) as running:
        request = f"POST {DEFAULT_PATH} HTTP/1.1\r\nHost: x\r\nkyutai-api-key: {KEY}\r\n{header}\r\n\r\n"
        answer = await raw_request(running.port, request.encode() + body)
        if "gzip" in header:
            assert (answer.status, answer.body) == (415, b"Content-Encoding gzip is not taken: send the file as it is")
        else:
            assert answer.status == 400
            assert answer.body
        assert (await post(running, wav(0.2)))[0] == 200
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING], caplog.text


async def test_engine_failure_is_500_in_plain_words() -> None:
    engine = ScriptedEngine()
    async with serving(engine) as running:
        engine.hold()
        posting = asyncio.create_task(post(running, wav(1.0)))
        await until(lambda: engine.used_slots == 1)
        engine.fail_next("the device is gone")
        status, kind, text = await posting
    assert (status, kind) == (500, "text/plain; charset=utf-8")
    assert text == "a model step failed: RuntimeError: the device is gone"


async def test_shutdown_answers_503() -> None:
    engine = ScriptedEngine()
    async with serving(engine) as running:
        engine.hold()
        posting = asyncio.create_task(post(running, wav(1.0)))
        await until(lambda: engine.used_slots == 1)
        await running.server.stop()
        assert (await posting)[::2] == (503, "the server is shutting down")
    assert not temporary_files()


async def test_full_disk_is_507(monkeypatch: pytest.MonkeyPatch) -> None:
    async def full(file: Any, data: bytearray) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(upload, "_write", full)
    async with serving(ScriptedEngine()) as running:
        status, _, text = await post(running, wav(0.1))
    assert (status, text) == (507, "Failed to buffer the request body: No space left on device")


async def test_live_streams_are_not_counted_as_connections_by_uploads() -> None:
    """`asr_connect` counts WebSockets alone, as with moshi-server's BatchedAsr; uploads have a count of their own."""
    async with serving(ScriptedEngine()) as running:
        await post(running, wav(0.1))
        text = running.server.service.metrics.render().decode()
    assert 'asr_connect{handler="all"} 0\n' in text
    assert 'moshi_stt_uploads{status="200"} 1\n' in text


@pytest.mark.parametrize(("key", "first"), [(KEY, b"HTTP/1.1 100 Continue\r\n"), ("nope", b"HTTP/1.1 401 Unauthorized\r\n")])
async def test_expect_continue_asks_for_the_body_only_with_a_key(key: str, first: bytes) -> None:
    """curl waits for it before it sends a large file."""
    data = wav(0.2)
    async with serving(ScriptedEngine()) as running:
        reader, writer = await asyncio.open_connection("127.0.0.1", running.port)
        head = f"POST {DEFAULT_PATH} HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nkyutai-api-key: {key}\r\n"
        writer.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode())
        async with asyncio.timeout(DEADLINE):
            assert await reader.readline() == first
            if key == KEY:
                assert await reader.readline() == b"\r\n"
                writer.write(data)
                assert await reader.readline() == b"HTTP/1.1 200 OK\r\n"
        writer.close()
        await writer.wait_closed()


async def test_bad_chunks_are_said() -> None:
    """A body that breaks HTTP itself."""
    request = b"POST /api/asr-streaming HTTP/1.1\r\nHost: x\r\nkyutai-api-key: public_token\r\n"
    request += b"Transfer-Encoding: chunked\r\n\r\nzz\r\nab\r\n"
    async with serving(ScriptedEngine()) as running:
        assert (await raw_request(running.port, request)).status == 400


async def test_body_that_stops_coming_is_given_up() -> None:
    """Nothing waits for ever: neither the file nor the handler stays."""
    request = b"POST /api/asr-streaming HTTP/1.1\r\nHost: x\r\nkyutai-api-key: public_token\r\nContent-Length: 1000\r\n\r\nabc"
    async with serving(ScriptedEngine(), idle_seconds=0.2) as running:
        answer = await raw_request(running.port, request)
        assert (answer.status, answer.body) == (408, b"Failed to buffer the request body: nothing came for 0.2 s")
        assert not temporary_files()
        assert not running.server.service.uploads


async def test_body_that_drips_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A byte now and then is not a body that comes: it ends by its average rate."""
    monkeypatch.setattr(upload, "RATE_SECONDS", 0.1)
    head = b"POST /api/asr-streaming HTTP/1.1\r\nHost: x\r\nkyutai-api-key: public_token\r\nContent-Length: 1000\r\n\r\n"
    async with serving(ScriptedEngine(), upload_bytes_per_second=10_000) as running:
        reader, writer = await asyncio.open_connection("127.0.0.1", running.port)
        writer.write(head)

        async def drip() -> None:
            for _ in range(900):
                writer.write(b"x")
                await asyncio.sleep(0.02)

        dripping = asyncio.create_task(drip())
        async with asyncio.timeout(DEADLINE):
            answer = await reader.readuntil(b"(10000)")
        dripping.cancel()
        writer.close()
        assert answer.startswith(b"HTTP/1.1 408")
        assert b"upload_bytes_per_second" in answer
        await until(lambda: not running.server.service.uploads and not temporary_files())


async def test_post_that_takes_too_long_is_given_up() -> None:
    """`stream_seconds` bounds a POST, too: whether its body, its slot or its transcript is late; the slot is free again."""
    request = b"POST /api/asr-streaming HTTP/1.1\r\nHost: x\r\nkyutai-api-key: public_token\r\nContent-Length: 1000\r\n\r\nabc"
    engine = ScriptedEngine(counting(4), slots=1)
    async with serving(engine, stream_seconds=0.2) as running:
        engine.hold()
        status, _, text = await post(running, wav(2.0))
        assert (status, "stream_seconds" in text) == (408, True)
        answer = await raw_request(running.port, request)
        assert (answer.status, b"stream_seconds" in answer.body) == (408, True)
        await until(lambda: not running.server.service.uploads and engine.used_slots == 0 and not temporary_files())


async def test_post_that_takes_too_long_is_told_in_the_lines_that_came(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once the answer has begun, its status is said: then the end comes as a line of it."""
    engine = ScriptedEngine(counting(40, 1))
    real = upload._bounded

    def bounded(limits: LimitsConfig, deadline: float | None = None) -> Any:
        """The time is over as soon as the first line is out."""
        return real(limits, None if deadline is None else asyncio.get_running_loop().time())

    monkeypatch.setattr(upload, "_bounded", bounded)
    async with serving(engine, stream_seconds=1_000.0) as running, aiohttp.ClientSession() as http:
        headers = {"kyutai-api-key": KEY, "Accept": "application/x-ndjson"}
        async with http.post(running.http + DEFAULT_PATH, data=wav(10.0), headers=headers) as answer:
            assert answer.status == 200
            lines = [json.loads(line) for line in (await answer.text()).splitlines()]
        assert "stream_seconds" in lines[-1]["message"]
        await until(lambda: not running.server.service.uploads and engine.used_slots == 0)


async def test_recording_that_unpacks_to_hours_is_refused() -> None:
    """A small file may hold any length of audio: beyond max_audio_seconds it is 413 and its slot is free."""
    engine = ScriptedEngine(counting(4))
    async with serving(engine, max_audio_seconds=3.0) as running:
        status, _, text = await post(running, wav(5.0))
        assert (status, "max_audio_seconds" in text) == (413, True)
        await until(lambda: engine.used_slots == 0)
        assert (await post(running, wav(2.0)))[0] == 200


async def test_lines_come_while_the_file_is_transcribed() -> None:
    """`Accept: application/x-ndjson`: each word on a line of its own as it is recognised; the same events as in one array."""
    engine = ScriptedEngine(counting(5), delay_frames=2)
    async with serving(engine) as running, aiohttp.ClientSession() as http:
        headers = {"kyutai-api-key": KEY, "Accept": "application/x-ndjson"}
        async with http.post(running.http + DEFAULT_PATH, data=wav(2.0), headers=headers) as answer:
            assert (answer.status, answer.content_type) == (200, "application/x-ndjson")
            lines = [json.loads(line) for line in (await answer.text()).splitlines()]
        assert lines[-1] == {"type": "End", "duration": 2.0}
        assert lines[:-1] == json.loads((await post(running, wav(2.0)))[2])


async def test_two_uploads_and_a_stream_share_the_engine() -> None:
    engine = ScriptedEngine(counting(4), slots=3)
    async with serving(engine) as running, await RawClient.connect(running.port) as client:
        posts = [asyncio.create_task(post(running, wav(2.0))) for _ in range(2)]
        client.audio(np.zeros(SAMPLE_RATE, np.float32))
        client.marker(1)
        await client.events_until("Marker")
        assert {status for status, _, _ in await asyncio.gather(*posts)} == {200}


async def test_a_form_with_the_file() -> None:
    """As `curl -F file=@talk.wav` sends it."""
    engine = ScriptedEngine(counting(1))
    async with serving(engine) as running:
        form = aiohttp.FormData()
        form.add_field("note", "a field of no meaning")
        form.add_field("file", wav(0.5), filename="talk.wav")
        async with (
            aiohttp.ClientSession() as http,
            http.post(running.http + DEFAULT_PATH, data=form, headers=HEADERS) as answer,
        ):
            assert answer.status == 200, await answer.text()
            assert "w0" in await answer.text()
        assert engine.samples == [SAMPLE_RATE // 2]
        form = aiohttp.FormData()
        form.add_field("other", wav(0.5), filename="talk.wav")
        async with (
            aiohttp.ClientSession() as http,
            http.post(running.http + DEFAULT_PATH, data=form, headers=HEADERS) as answer,
        ):
            assert answer.status == 400
            assert "curl -F file=@" in await answer.text()


async def test_channels_are_kept_apart_or_picked() -> None:
    """Each as if it were alone, labelled, in order of time."""
    engine = ScriptedEngine(counting(2, 3))
    data = encode(np.stack([noise(1.0), noise(1.0, seed=1)], axis=1), SAMPLE_RATE, "wav-float")
    async with serving(engine) as running:
        alone = json.loads((await post(running, data, query="?channels=2"))[2])
        both = json.loads((await post(running, data, query="?channels=split"))[2])
        for number in (1, 2):
            assert [event for event in both if event["channel"] == number] == [event | {"channel": number} for event in alone]
        starts = [event["start_time"] for event in both if event["type"] == "Word"]
        assert starts == sorted(starts)
        for query, text in (
            ("?channels=3", "no channel 3"),
            ("?channels=x", "channels is mix"),
            ("?track=2", "no audio track 2"),
        ):
            status, _, said = await post(running, data, query=query)
            assert (status, text in said) == (400, True)


class _Counted(ScriptedEngine):
    """Knows how many streams there were at once."""

    most = 0

    def open(self, *, live: bool = True, options: StreamOptions = NO_EXTRAS) -> Stream:
        stream = super().open(live=live, options=options)
        self.most = max(self.most, self.used_slots)
        return stream


@pytest.mark.parametrize(("slots", "at_once"), [(2, 1), (3, 2), (8, 4)])
async def test_channels_run_at_once_on_the_slots_that_a_file_may_have(slots: int, at_once: int) -> None:
    """As many as one long recording would take: one where that is all that is left to live streams."""
    engine = _Counted(counting(2, 3), slots=slots)
    engine.hold()
    data = encode(np.stack([noise(1.0, seed=seed) for seed in range(4)], axis=1), SAMPLE_RATE, "wav-float")
    async with serving(engine) as running:
        answer = asyncio.create_task(post(running, data, query="?channels=split"))
        await until(lambda: engine.used_slots == at_once)
        engine.release()
        status, _, text = await answer
    assert (status, engine.most) == (200, at_once)
    assert sorted({event["channel"] for event in json.loads(text)}) == [1, 2, 3, 4]
    assert len(json.loads(text)) == 16


async def test_one_channel_that_cannot_be_decoded_ends_the_others() -> None:
    engine = ScriptedEngine(counting(2, 3), slots=8)
    data = encode(np.stack([noise(4.0, 8_000), noise(4.0, 8_000, seed=1)], axis=1), 8_000)
    async with serving(engine) as running:
        status, _, text = await post(running, data[: len(data) // 2], query="?channels=split")
        assert (status, "cut short" in text) == (400, True)
        await until(lambda: engine.used_slots == 0)
    assert not temporary_files()


@pytest.mark.skipif(not decode_pool.is_supported(), reason="descriptors cannot be handed to a process here")
async def test_long_files_of_an_engine_with_many_slots_are_decoded_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first starts the processes; then the words and the faults are the same as from threads. Short ones stay."""
    monkeypatch.setattr(decode_pool, "usable_cores", lambda: 3)
    sources: list[str | int] = []
    pieces = decode_pool.DecodePool.pieces

    def noted(self: decode_pool.DecodePool, source: str | int, *rest: Any) -> Any:
        sources.append(source)
        return pieces(self, source, *rest)

    monkeypatch.setattr(decode_pool.DecodePool, "pieces", noted)
    engine = ScriptedEngine(counting(5, 3), slots=16)
    stereo = encode(np.stack([noise(100.0, 8_000), noise(100.0, 8_000, seed=1)], axis=1), 8_000, "flac")
    bodies = [(stereo, ""), (stereo, "?channels=split"), (stereo[: len(stereo) * 4 // 5], "")]
    async with serving(engine) as running:
        await until(lambda: running.server.service.decoders.idle(16) is not None)
        elsewhere = [await post(running, body, query=query) for body, query in bodies]
        assert len(sources) == 4
        assert (await post(running, wav(30.0, 8_000)))[0] == 200
        monkeypatch.setattr(running.server.service.decoders, "idle", lambda slots: None)
        here = [await post(running, body, query=query) for body, query in bodies]
        assert len(sources) == 4
    assert elsewhere == here
    assert [status for status, _, _ in here] == [200, 200, 400]
    assert not temporary_files()


@pytest.mark.parametrize(("query", "streams"), [("", 3), ("?whole=1", 1), ("?whole=true", 1)])
async def test_longer_than_a_minute_is_cut_unless_it_is_to_be_whole(query: str, streams: int) -> None:
    engine = ScriptedEngine(slots=4)
    async with serving(engine) as running:
        assert (await post(running, wav(59.0, 8_000), query=query))[0] == 200
        assert len(engine.samples) == 1
        assert (await post(running, wav(100.0, 8_000), query=query))[0] == 200
    assert len(engine.samples) == 1 + streams


async def test_deepgrams_multichannel_keeps_channels_apart() -> None:
    data = encode(np.stack([noise(1.0), noise(1.0, seed=1)], axis=1), SAMPLE_RATE, "wav-float")
    async with serving(ScriptedEngine(counting(2, 3))) as running, aiohttp.ClientSession() as http:
        shown = []
        for query in ("multichannel=true", "multichannel=false"):
            headers = {"Authorization": f"Token {KEY}"}
            async with http.post(f"{running.http}/v1/listen?{query}", data=io.BytesIO(data), headers=headers) as answer:
                assert answer.status == 200, await answer.text()
                shown.append(await answer.json())
    both, one = (each["results"]["channels"] for each in shown)
    assert (len(both), len(one)) == (2, 1)
    assert [channel["alternatives"][0]["transcript"] for channel in both] == [one[0]["alternatives"][0]["transcript"]] * 2
    assert [each["metadata"]["channels"] for each in shown] == [2, 1]
