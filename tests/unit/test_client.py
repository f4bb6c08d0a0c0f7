"""The client against a server that does exactly what the test says, over a live socket."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import aiohttp
import msgpack
import numpy as np
import pytest
from aiohttp import web
from tests.support.media import noise

from moshi_stt import client as client_module
from moshi_stt import protocol
from moshi_stt.audio.opus import OpusEncoder, OpusStream
from moshi_stt.client import Client, websocket_url
from moshi_stt.engine.commands import Audio, Mark, Reset
from moshi_stt.errors import AudioError, ServerError
from moshi_stt.events import AnyEvent, EndWord, Error, Marker, Ready, Word
from moshi_stt.sync import transcribe
from moshi_stt.text.subtitles import TimedWord

Handler = Callable[[web.WebSocketResponse], Awaitable[None]]


@asynccontextmanager
async def serving(handler: Handler, keys: frozenset[str] = frozenset({"public_token"})) -> AsyncIterator[str]:
    """The address of a server that runs `handler` on each socket."""

    async def upgrade(request: web.Request) -> web.StreamResponse:
        if request.headers.get("kyutai-api-key") not in keys:
            return web.Response(status=401)
        socket = web.WebSocketResponse(timeout=1)
        await socket.prepare(request)
        await handler(socket)
        return socket

    app = web.Application()
    app.router.add_get("/api/asr-streaming", upgrade)
    runner = web.AppRunner(app, shutdown_timeout=1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"ws://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


async def send(socket: web.WebSocketResponse, *events: AnyEvent) -> None:
    for event in events:
        await socket.send_bytes(protocol.encode(event))


async def collect(client: Client, events: list[AnyEvent]) -> None:
    async for event in client:
        events.append(event)  # noqa: PERF401 - a comprehension would lose what came before the error


class Recorder:
    """Answers a marker with the words given and the marker; keeps what came."""

    def __init__(self, *events: AnyEvent) -> None:
        self.events = events
        self.inbound: list[protocol.Inbound] = []

    async def __call__(self, socket: web.WebSocketResponse) -> None:
        await send(socket, Ready())
        async for message in socket:
            inbound = protocol.decode(message.data)
            self.inbound.append(inbound)
            if isinstance(inbound, Mark):
                await send(socket, *self.events, Marker(inbound.id))

    @property
    def pcm(self) -> np.ndarray:
        return np.concatenate([message.samples for message in self.inbound if isinstance(message, Audio)])


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("ws://host:8080", "ws://host:8080/api/asr-streaming"),
        ("host:8080/", "ws://host:8080/api/asr-streaming"),
        ("https://host/asr?auth_id=k", "wss://host/asr?auth_id=k"),
        ("http://[::1]:80", "ws://[::1]:80/api/asr-streaming"),
    ],
)
def test_urls_are_completed(given: str, meant: str) -> None:
    assert websocket_url(given) == meant


@pytest.mark.parametrize("url", ["ftp://host", "ws://", ""])
def test_other_urls_are_refused(url: str) -> None:
    with pytest.raises(ServerError, match="expected one like"):
        websocket_url(url)


async def test_events_come_typed_and_in_order() -> None:
    async def handler(socket: web.WebSocketResponse) -> None:
        await send(socket, Ready(), Word("one", 0.5), EndWord(0.75), Marker(-7))
        await socket.close()

    async with serving(handler) as url, Client(url) as client:
        assert [event async for event in client] == [Ready(), Word("one", 0.5), EndWord(0.75), Marker(-7)]


async def test_events_of_a_newer_server_lose_only_what_is_unknown() -> None:
    async def handler(socket: web.WebSocketResponse) -> None:
        await socket.send_bytes(msgpack.packb({"type": "Word", "text": "one", "start_time": 1, "mood": "calm"}))
        await socket.close()

    async with serving(handler) as url, Client(url) as client:
        assert [event async for event in client] == [Word("one", 1.0)]


async def test_audio_arrives_as_float32_arrays_as_moshi_server_wants_them() -> None:
    raw: list[bytes] = []

    async def handler(socket: web.WebSocketResponse) -> None:
        async for message in socket:
            raw.append(message.data)
            if isinstance(protocol.decode(message.data), Mark):
                await socket.close()

    async with serving(handler) as url, Client(url) as client:
        await client.send_audio(np.array([0.5, -0.25], np.float32))
        await client.init()
        await client.mark(5)
        async for _ in client:
            pass
    assert raw[0].hex() == "82a474797065a5417564696fa370636d92ca3f000000cabe800000"
    assert isinstance(protocol.decode(raw[1]), Reset)
    assert raw[2].hex() == "82a474797065a64d61726b6572a2696405"


@pytest.mark.parametrize("as_bin", [False, True])
@pytest.mark.parametrize("kind", ["float32", "float64", "int16", "int32", "uint8", "stereo"])
async def test_any_sample_type_arrives_as_the_same_sound(kind: str, as_bin: bool) -> None:
    pcm = np.round(noise(0.2) * 100) / 128  # exact in every type
    given = {
        "float32": pcm.astype(np.float32),
        "float64": pcm.astype(np.float64),
        "int16": (pcm * 2**15).astype(np.int16),
        "int32": (pcm * 2.0**31).astype(np.int32),
        "uint8": (pcm * 128 + 128).astype(np.uint8),
        "stereo": np.stack([pcm * 2, pcm * 0], axis=1),
    }[kind]
    recorder = Recorder()
    async with serving(recorder) as url, Client(url, as_bin=as_bin) as client:
        await client.send_audio(given)
        await client.mark()
        async for event in client:
            if isinstance(event, Marker):
                break
    np.testing.assert_array_equal(recorder.pcm, pcm.astype(np.float32))


async def test_audio_at_another_rate_is_resampled_and_flushed_by_the_marker() -> None:
    recorder = Recorder()
    async with serving(recorder) as url, Client(url) as client:
        pcm = noise(1.5, 16_000)
        for start in range(0, len(pcm), 333):
            await client.send_audio(pcm[start : start + 333], 16_000)
        await client.mark()
        async for event in client:
            if isinstance(event, Marker):
                break
    assert len(recorder.pcm) == 36_000
    assert isinstance(recorder.inbound[-1], Mark)


@pytest.mark.parametrize("as_bin", [False, True])
async def test_opus_arrives(as_bin: bool) -> None:
    recorder = Recorder()
    encoder = OpusEncoder()
    data = encoder.feed(noise(1.0)) + encoder.finish()
    async with serving(recorder) as url, Client(url, as_bin=as_bin) as client:
        for start in range(0, len(data), 1_000):
            await client.send_opus(data[start : start + 1_000])
        await client.mark()
        async for event in client:
            if isinstance(event, Marker):
                break
    stream = OpusStream()
    sent = [message.data for message in recorder.inbound if isinstance(message, protocol.OggOpus)]
    assert sum(len(piece) for data in sent for piece in stream.pieces(data)) >= 24_000


async def test_no_pcm_is_refused_before_it_is_sent() -> None:
    async with serving(Recorder()) as url, Client(url) as client:
        with pytest.raises(AudioError, match="shape"):
            await client.send_audio(np.zeros((2, 2, 2), np.float32))
        with pytest.raises(AudioError, match="complex"):
            await client.send_audio(np.zeros(2, np.complex64))


async def test_an_error_of_the_server_is_raised_with_its_close_code_behind_the_events() -> None:
    async def handler(socket: web.WebSocketResponse) -> None:
        await send(socket, Ready(), Word("one", 0.5), Error("Audio.pcm must be an array of numbers"))
        await socket.close(code=1007)

    async with serving(handler) as url, Client(url) as client:
        events: list[AnyEvent] = []
        with pytest.raises(ServerError, match=r"pcm must be an array") as caught:
            await collect(client, events)
        assert events == [Ready(), Word("one", 0.5)]
        assert caught.value.close_code == 1007
        with pytest.raises(ServerError, match=r"pcm must be an array"):
            await client.mark()


async def test_no_free_channels_as_moshi_server_says_it() -> None:
    async def handler(socket: web.WebSocketResponse) -> None:
        await send(socket, Error("no free channels"))
        assert socket._writer is not None
        await socket._writer.send_frame(b"", aiohttp.WSMsgType.CLOSE)  # a close frame without a code

    async with serving(handler) as url, Client(url) as client:
        with pytest.raises(ServerError, match="no free channels"):
            await client.transcribe(np.zeros(10, np.float32))


async def test_a_lost_connection_is_an_error() -> None:
    async def handler(socket: web.WebSocketResponse) -> None:
        await send(socket, Ready())
        transport = socket._req.transport if socket._req else None
        assert transport is not None
        transport.abort()

    async with serving(handler) as url, Client(url) as client:
        with pytest.raises(ServerError, match="connection was lost") as caught:
            async for _ in client:
                pass
        assert caught.value.close_code == 1006


async def test_a_message_that_is_none_is_an_error() -> None:
    async def handler(socket: web.WebSocketResponse) -> None:
        await socket.send_bytes(b"\xc1")
        async for _ in socket:
            pass

    async with serving(handler) as url, Client(url) as client:
        with pytest.raises(ServerError, match="no message of this protocol"):
            async for _ in client:
                pass


async def test_a_wrong_key_says_so() -> None:
    async with serving(Recorder()) as url:
        with pytest.raises(ServerError, match=r"does not know this key \(401\)"):
            await Client.connect(url, "wrong")
        with pytest.raises(ServerError, match=r"no path /nowhere \(404\)"):
            await Client.connect(f"{url}/nowhere")


async def test_no_server_says_what_to_start(unused_tcp_port: int) -> None:
    with pytest.raises(ServerError, match="start a server with `moshi-stt worker`") as caught:
        await Client.connect(f"ws://127.0.0.1:{unused_tcp_port}?auth_id=secret")
    assert "secret" not in str(caught.value)


async def test_a_silent_server_is_given_up() -> None:
    hold = asyncio.Event()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await hold.wait()
        writer.close()

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    with pytest.raises(ServerError, match=r"did not answer within 0\.2 s"):
        await Client(f"ws://127.0.0.1:{port}", open_timeout_seconds=0.2).open()
    hold.set()
    server.close()
    await server.wait_closed()


async def test_sending_before_opening_says_how_to_open() -> None:
    with pytest.raises(ServerError, match="async with"):
        await Client("ws://127.0.0.1:1").mark()


async def test_close_is_idempotent_and_completes_the_handshake() -> None:
    codes: list[int | None] = []

    async def handler(socket: web.WebSocketResponse) -> None:
        async for _ in socket:
            pass
        codes.append(socket.close_code)

    async with serving(handler) as url:
        client = await Client.connect(url)
        await client.close()
        await client.close()
        assert [event async for event in client] == []
    assert codes == [1000]


async def test_transcribe_sends_silence_and_takes_it_out_of_the_times() -> None:
    recorder = Recorder(Word("one", 1.5), EndWord(1.75), Word("two", 2.0), EndWord(2.25))
    seen: list[float] = []
    async with serving(recorder) as url, Client(url) as client:
        pieces = [noise(0.5, seed=1), noise(0.5, seed=2)]
        words = await client.transcribe(
            iter(pieces), silence_before_seconds=1.0, silence_after_seconds=0.5, on_progress=seen.append
        )
    assert words == [TimedWord("one", 0.5, 0.75), TimedWord("two", 1.0, 1.25)]
    assert seen == [0.75, 1.25]
    before_marker = recorder.inbound[: [isinstance(m, Mark) for m in recorder.inbound].index(True)]
    sent = np.concatenate([message.samples for message in before_marker if isinstance(message, Audio)])
    expected = [np.zeros(24_000, np.float32), *pieces, np.zeros(12_000, np.float32)]
    np.testing.assert_array_equal(sent, np.concatenate(expected))


async def test_transcribe_keeps_a_slow_server_awake(monkeypatch: pytest.MonkeyPatch) -> None:
    """moshi-server closes a client that sent no audio for 120 s, however much it still has to transcribe."""
    monkeypatch.setattr(client_module, "_KEEP_ALIVE_SECONDS", 0.01)

    async def handler(socket: web.WebSocketResponse) -> None:
        marked = False
        after = 0
        async for message in socket:
            marked |= isinstance(protocol.decode(message.data), Mark)
            after += marked
            if after == 10:
                await send(socket, Word("late", 0.0), Marker(0))

    async with serving(handler) as url, Client(url) as client:
        assert [word.text for word in await client.transcribe(noise(0.1))] == ["late"]


async def test_transcribe_passes_on_what_breaks_the_audio() -> None:
    def broken() -> object:
        yield noise(0.1)
        raise AudioError("the file is cut short")

    async with serving(Recorder()) as url, Client(url) as client:
        with pytest.raises(AudioError, match="cut short"):
            await client.transcribe(broken())  # type: ignore[arg-type]


async def test_a_server_that_leaves_early_is_an_error() -> None:
    async def handler(socket: web.WebSocketResponse) -> None:
        await socket.receive()
        await socket.close(code=1001)

    async with serving(handler) as url, Client(url) as client:
        with pytest.raises(ServerError):
            await client.transcribe(noise(0.1))


async def test_a_caller_that_reads_late_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client keeps a bounded number of events and then stops reading the socket."""
    monkeypatch.setattr(client_module, "EVENTS_HELD", 10)

    async def handler(socket: web.WebSocketResponse) -> None:
        await send(socket, *(Marker(number) for number in range(1_000)))
        await socket.close()

    async with serving(handler) as url, Client(url) as client:
        got = []
        async for event in client:
            assert len(client._events) <= 10
            got.append(event)
    assert got == [Marker(number) for number in range(1_000)]


def test_transcribe_without_asyncio() -> None:
    async def serve(started: asyncio.Future[str], stop: asyncio.Event) -> None:
        async with serving(Recorder(Word("one", 0.5), EndWord(0.75))) as url:
            started.set_result(url)
            await stop.wait()

    async def whole() -> list[tuple[str, float, float, float | None]]:
        started: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        stop = asyncio.Event()
        task = asyncio.create_task(serve(started, stop))
        url = await started
        words = await asyncio.to_thread(transcribe, noise(0.1), url)
        stop.set()
        await task
        return list(words)

    assert asyncio.run(whole()) == [TimedWord("one", 0.5, 0.75)]


async def test_pings_are_sent_on_a_timer() -> None:
    pinged = asyncio.Event()

    async def handler(socket: web.WebSocketResponse) -> None:
        async for message in socket:
            if message.type is aiohttp.WSMsgType.PING:
                pinged.set()

    async def upgrade(request: web.Request) -> web.StreamResponse:
        socket = web.WebSocketResponse(autoping=False, timeout=1)
        await socket.prepare(request)
        await handler(socket)
        return socket

    app = web.Application()
    app.router.add_get("/api/asr-streaming", upgrade)
    runner = web.AppRunner(app, shutdown_timeout=1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    async with Client(f"ws://127.0.0.1:{runner.addresses[0][1]}", ping_seconds=0.01), asyncio.timeout(90):
        await pinged.wait()
    await runner.cleanup()
