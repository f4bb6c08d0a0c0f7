"""The client's functions for programs without asyncio, against servers that do what the test says, in a thread of their own."""

import asyncio
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from concurrent.futures import Future
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager

import msgspec
import numpy as np
import pytest
from aiohttp import web
from numpy.typing import NDArray
from tests.support.media import encode, noise
from tests.support.scripted_engine import ScriptedEngine, ScriptedWord, counting
from tests.support.serving import DEADLINE, serving

from moshi_stt import stream_utterances, stream_words, transcribe, transcribe_bytes
from moshi_stt.client import Client, asking
from moshi_stt.constants import FRAME_SAMPLES
from moshi_stt.errors import AudioError, ServerError
from moshi_stt.sync import in_background

FRAME = np.zeros(FRAME_SAMPLES, np.float32)


@contextmanager
def elsewhere(server: Callable[[], AbstractAsyncContextManager[str]]) -> Iterator[str]:
    """The address that a server has while it runs on another thread's event loop."""
    address: Future[str] = Future()
    stop = threading.Event()

    async def run() -> None:
        try:
            async with server() as url:
                address.set_result(url)
                await asyncio.to_thread(stop.wait)
        except BaseException as error:
            if not address.done():
                address.set_exception(error)
            raise

    thread = threading.Thread(target=asyncio.run, args=(run(),))
    thread.start()
    try:
        yield address.result(DEADLINE)
    finally:
        stop.set()
        thread.join(DEADLINE)


@contextmanager
def scripted(words: list[ScriptedWord]) -> Iterator[str]:
    @asynccontextmanager
    async def server() -> AsyncIterator[str]:
        async with serving(ScriptedEngine(words)) as running:
            yield f"ws://127.0.0.1:{running.port}"

    with elsewhere(server) as url:
        yield url


def frames(count: int) -> Iterator[NDArray[np.float32]]:
    for _ in range(count):
        yield FRAME


def test_words_come_while_audio_is_still_to_be_sent() -> None:
    heard = threading.Event()

    def source() -> Iterator[NDArray[np.float32]]:
        yield from frames(5)  # one frame more than the first two words need
        assert heard.wait(DEADLINE), "no word came before the audio ended"
        yield from frames(5)

    texts = []
    with scripted(counting(5)) as url:
        for word in stream_words(source(), url):
            texts.append(word.text)
            heard.set()
    assert texts == ["w0", "w1", "w2", "w3", "w4"]


def test_leaving_early_ends_the_stream() -> None:
    with scripted(counting(50)) as url:
        words = stream_words(frames(100), url)
        assert next(words).text == "w0"
        words.close()  # type: ignore[attr-defined]
        assert not [thread for thread in threading.enumerate() if thread.name == "moshi-stt client"]


def test_utterances_end_at_pauses() -> None:
    words = [ScriptedWord("good", 0, 2), ScriptedWord("morning.", 3, 5), ScriptedWord("Yes?", 30, 33)]
    with scripted(words) as url:
        found = list(stream_utterances(frames(40), url, pause_seconds=0.8))
        whole = list(stream_utterances(frames(40), url, pause_seconds=5.0))
    assert [(each.text, each.start, round(each.end, 2), len(each.words)) for each in found] == [
        ("good morning.", 0.0, 0.4, 2),
        ("Yes?", 2.4, 2.64, 1),
    ]
    assert [each.text for each in whole] == ["good morning. Yes?"]


def test_turns_are_asked_for_besides_what_the_url_asks() -> None:
    assert asking("ws://host/path", "turns") == "ws://host/path?turns=1"
    assert asking("ws://host/path?auth_id=k", "turns") == "ws://host/path?auth_id=k&turns=1"


def test_url_and_key_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moshi_stt.server.gate.WRONG_KEY_SECONDS", 0.01)
    with scripted(counting(3)) as url:
        monkeypatch.setenv("MOSHI_STT_URL", url)
        assert [word.text for word in transcribe(np.tile(FRAME, 10))] == ["w0", "w1", "w2"]
        assert [word.text for word in transcribe_bytes(encode(noise(1.0), 24_000))] == ["w0", "w1", "w2"]
        monkeypatch.setenv("MOSHI_STT_KEY", "wrong")
        with pytest.raises(ServerError, match="401"):
            transcribe(FRAME)
        with pytest.raises(ServerError, match="401"):
            transcribe_bytes(b"")
        assert [word.text for word in transcribe(np.tile(FRAME, 10), key="public_token")] == ["w0", "w1", "w2"]
    monkeypatch.delenv("MOSHI_STT_URL")
    assert Client().url == "ws://127.0.0.1:8080/api/asr-streaming"


def test_what_is_no_audio_is_refused_in_plain_words() -> None:
    with scripted([]) as url:
        with pytest.raises(AudioError, match="read_file"):
            list(stream_words("talk.wav", url))  # type: ignore[arg-type]
        with pytest.raises(ServerError, match=r"\(400\)"):
            transcribe_bytes(b"no sound at all", url)


def test_an_answer_that_is_no_transcript_is_an_error() -> None:
    async def answer(request: web.Request) -> web.Response:
        return web.Response(body=msgspec.json.encode({"not": "words"}))

    @asynccontextmanager
    async def server() -> AsyncIterator[str]:
        app = web.Application()
        app.router.add_post("/api/asr-streaming", answer)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        try:
            yield f"http://127.0.0.1:{runner.addresses[0][1]}"
        finally:
            await runner.cleanup()

    with elsewhere(server) as url, pytest.raises(ServerError, match="Expected `array`"):
        transcribe_bytes(b"", url)


def test_errors_of_the_source_are_the_callers() -> None:
    async def broken() -> AsyncGenerator[int, None]:
        yield 1
        raise ZeroDivisionError("source")

    found = in_background(broken)
    assert next(found) == 1
    with pytest.raises(ZeroDivisionError, match="source"):
        next(found)


def test_a_server_that_is_not_there(unused_tcp_port: int) -> None:
    url = f"ws://127.0.0.1:{unused_tcp_port}"
    with pytest.raises(ServerError, match="cannot be reached"):
        list(stream_words(FRAME, url))
    with pytest.raises(ServerError, match=str(unused_tcp_port)):
        transcribe_bytes(b"", url)
