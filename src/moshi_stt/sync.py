"""The client for programs without asyncio: words and utterances as they come, whole recordings, files by POST.

Each function makes a connection of its own. `url` and `key` may be left out: then MOSHI_STT_URL and MOSHI_STT_KEY count, else
ws://127.0.0.1:8080 and `public_token`.
"""

import asyncio
import contextlib
import threading
import urllib.error
import urllib.request
from collections.abc import AsyncGenerator, Callable, Generator, Iterator
from typing import TypeVar
from urllib.parse import urlsplit, urlunsplit

import msgspec

from moshi_stt.client import Audio, Client, asking, key_headers, websocket_url
from moshi_stt.constants import SAMPLE_RATE
from moshi_stt.errors import ServerError
from moshi_stt.events import EndWord, Word
from moshi_stt.text.subtitles import TimedWord, pair_words
from moshi_stt.text.utterances import PAUSE_SECONDS, Utterance

T = TypeVar("T")

ITEMS_HELD = 1_024
"""Items that wait to be taken; then the server's events wait in the client."""

SHOWN_BYTES = 1_000
"""Of an answer that is an error."""


def transcribe(
    audio: Audio,
    url: str | None = None,
    key: str | None = None,
    *,
    sample_rate: int = SAMPLE_RATE,
    silence_before_seconds: float = 0.0,
    on_progress: Callable[[float], None] | None = None,
) -> list[TimedWord]:
    """`Client.transcribe` on a new connection: all words at the end. Raises RuntimeError inside a running loop."""

    async def whole() -> list[TimedWord]:
        async with Client(url, key) as client:
            return await client.transcribe(
                audio, sample_rate, silence_before_seconds=silence_before_seconds, on_progress=on_progress
            )

    return asyncio.run(whole())


def stream_words(
    audio: Audio,
    url: str | None = None,
    key: str | None = None,
    *,
    sample_rate: int = SAMPLE_RATE,
    silence_before_seconds: float = 0.0,
) -> Iterator[TimedWord]:
    """Each word as soon as the server has it, while `audio` is still being sent.

    audio: iterated in a thread, so it may wait for a microphone. Raises ServerError, and what iterating `audio` raises.
    """

    async def found() -> AsyncGenerator[TimedWord, None]:
        async with Client(url, key) as client:
            words = client.words(audio, sample_rate, silence_before_seconds=silence_before_seconds)
            async with contextlib.aclosing(words):
                async for word in words:
                    yield word

    return in_background(found)


def stream_utterances(
    audio: Audio,
    url: str | None = None,
    key: str | None = None,
    *,
    sample_rate: int = SAMPLE_RATE,
    pause_seconds: float = PAUSE_SECONDS,
    silence_before_seconds: float = 0.0,
) -> Iterator[Utterance]:
    """What is said up to each pause, as soon as the server finds that the turn is over. As `stream_words` otherwise."""

    async def found() -> AsyncGenerator[Utterance, None]:
        async with Client(asking(websocket_url(url), "turns"), key) as client:
            utterances = client.utterances(
                audio, sample_rate, pause_seconds=pause_seconds, silence_before_seconds=silence_before_seconds
            )
            async with contextlib.aclosing(utterances):
                async for utterance in utterances:
                    yield utterance

    return in_background(found)


def transcribe_bytes(
    data: bytes, url: str | None = None, key: str | None = None, *, timeout_seconds: float = 600.0
) -> list[TimedWord]:
    """The words of a file of any common format, sent as it is by one POST. Raises ServerError with the server's reason.

    timeout_seconds: how long the server may say nothing.
    """
    parts = urlsplit(websocket_url(url))
    address = urlunsplit(parts._replace(scheme={"ws": "http", "wss": "https"}[parts.scheme]))
    request = urllib.request.Request(address, data, key_headers(key), method="POST")
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=timeout_seconds) as answer:
            return pair_words(msgspec.json.decode(answer.read(), type=list[Word | EndWord]))
    except urllib.error.HTTPError as error:
        with error:
            reason = error.read(SHOWN_BYTES).decode("utf-8", "replace").strip()
        if error.code == 401:
            reason = "the server does not know this key: pass one of its authorized_ids"
        raise ServerError(f"{address}: {reason or error.reason} ({error.code})") from None
    except (OSError, msgspec.MsgspecError) as error:
        raise ServerError(f"{address}: {getattr(error, 'reason', None) or error}") from None


def in_background(make: Callable[[], AsyncGenerator[T, None]]) -> Generator[T, None, None]:
    """The items of an asynchronous generator, which runs on an event loop in a thread of its own.

    Leaving the generator early (`close`, or `break` and no reference left) ends the asynchronous one, too.
    """
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="moshi-stt client", daemon=True)
    thread.start()
    items: asyncio.Queue[T | _End] = asyncio.Queue(ITEMS_HELD)

    async def pump() -> None:
        end = _End(None)
        try:
            async with contextlib.aclosing(make()) as found:
                async for item in found:
                    await items.put(item)
        except Exception as error:
            end = _End(error)
        await items.put(end)

    async def begin() -> asyncio.Task[None]:
        return asyncio.create_task(pump())

    async def finish() -> None:
        pumping.cancel()
        await asyncio.gather(pumping, return_exceptions=True)

    pumping = asyncio.run_coroutine_threadsafe(begin(), loop).result()
    try:
        while True:
            taking = asyncio.run_coroutine_threadsafe(items.get(), loop)
            try:
                item = taking.result()
            finally:
                taking.cancel()
            if isinstance(item, _End):
                if item.error is not None:
                    raise item.error
                return
            yield item
    finally:
        asyncio.run_coroutine_threadsafe(finish(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


class _End:
    """There are no more items; error: why, where it is not because all have come."""

    def __init__(self, error: Exception | None) -> None:
        self.error = error
