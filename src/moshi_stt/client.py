"""A client of the default wire, for programs: `Client` for asyncio; `sync.py` has functions for the rest.

It talks to this server and to moshi-server alike. With `resume=True` a stream outlives its socket on this server: the client
connects again by itself, and no word is lost or comes twice. Otherwise reconnecting is the caller's business.
"""

import asyncio
import contextlib
import os
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Iterator
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit, urlunsplit

import aiohttp
import numpy as np
from numpy.typing import NDArray
from yarl import URL

from moshi_stt import protocol
from moshi_stt.audio.resample import StreamingResampler, to_mono_float
from moshi_stt.constants import (
    API_KEY_HEADER,
    DEFAULT_PATH,
    DEFAULT_URL,
    FRAME_SAMPLES,
    KEY_VARIABLE,
    PUBLIC_KEY,
    SAMPLE_RATE,
    URL_VARIABLE,
)
from moshi_stt.errors import AudioError, ProtocolError, ServerError
from moshi_stt.events import AnyEvent, EndOfTurn, EndWord, Error, Marker, Warning, Word  # noqa: A004 - the event
from moshi_stt.text.subtitles import TimedWord
from moshi_stt.text.utterances import PAUSE_SECONDS, Utterance, timed, utterance_of
from moshi_stt.unacknowledged import Unacknowledged

Audio = NDArray[np.generic] | Iterable[NDArray[np.generic]]
"""A recording, whole or in pieces; pieces may come as they are recorded. Each as `Client.send_audio` takes it."""

EVENTS_HELD = 65_536
"""Events that wait to be iterated before the socket is no longer read."""

MESSAGE_SAMPLES = SAMPLE_RATE
"""Longer audio is sent in several messages."""

RETRY_SECONDS = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 4.0)
"""Pauses before the attempts to connect again: together less than a server keeps a stream."""

CLOSED = (aiohttp.WSMsgType.CLOSE, aiohttp.WSMsgType.CLOSING, aiohttp.WSMsgType.CLOSED, aiohttp.WSMsgType.ERROR)

_KEEP_ALIVE_SECONDS = 5.0
_CLOSE_SECONDS = 3.0


def websocket_url(url: str | None) -> str:
    """`url`, else that of MOSHI_STT_URL, else ws://127.0.0.1:8080, with what may be left out: `ws://`, and the path.

    `http(s)` becomes `ws(s)`. Raises ServerError for a URL of another kind.
    """
    if url is None:
        url = os.environ.get(URL_VARIABLE) or DEFAULT_URL
    parts = urlsplit(url if "://" in url else f"ws://{url}")
    scheme = {"http": "ws", "https": "wss"}.get(parts.scheme, parts.scheme)
    if scheme not in ("ws", "wss") or not parts.netloc:
        raise ServerError(f"{url!r} is no address of a server: expected one like ws://127.0.0.1:8080")
    path = parts.path if parts.path not in ("", "/") else DEFAULT_PATH
    return urlunsplit((scheme, parts.netloc, path, parts.query, ""))


def asking(url: str, name: str) -> str:
    """`url` with a parameter that asks for more events. Servers that have none of them ignore it."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(query=f"{parts.query}&{name}=1".lstrip("&")))


def key_headers(key: str | None) -> dict[str, str]:
    """The header with `key`, or with that of MOSHI_STT_KEY, or with `public_token`; none for an empty `key`."""
    key = key if key is not None else os.environ.get(KEY_VARIABLE) or PUBLIC_KEY
    return {API_KEY_HEADER: key} if key else {}


class Client:
    """One stream on a server.

        async with Client("ws://127.0.0.1:8080") as client:
            await client.send_audio(pcm)
            await client.mark(0)
            async for event in client:
                ...

    Audio may be sent while events are iterated, from several tasks. Iteration ends when the server has closed the
    socket in good order and raises ServerError when it has not, or when the server sent an `Error`.
    """

    def __init__(
        self,
        url: str | None = None,
        key: str | None = None,
        *,
        as_bin: bool = False,
        open_timeout_seconds: float = 10.0,
        ping_seconds: float = 10.0,
        resume: bool = False,
        on_warning: Callable[[Warning], None] | None = None,
    ) -> None:
        """url: see `websocket_url`. key: sent in a header; None takes MOSHI_STT_KEY, else `public_token`, and "" sends none.

        as_bin: send audio as bytes, 4 a sample and not 5; this server takes that, moshi-server does not.
        on_warning: called with each `Warning` of the server, which is then asked for them.
        resume: connect again when the connection breaks, and go on where it broke. For audio sent by `send_audio`.
        """
        self.url = websocket_url(url)
        if on_warning is not None:
            self.url = asking(self.url, "warnings")
        self._on_warning = on_warning
        self._unacknowledged = Unacknowledged() if resume else None
        self._headers = key_headers(key)
        self._as_bin = as_bin
        self._open_timeout_seconds = open_timeout_seconds
        self._ping_seconds = ping_seconds
        self._session: aiohttp.ClientSession | None = None
        self._socket: aiohttp.ClientWebSocketResponse | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._events: deque[AnyEvent] = deque()
        self._news = asyncio.Event()
        self._room = asyncio.Event()
        self._ended = False
        self._closing = False
        self._failure: ServerError | None = None
        self._resampler: StreamingResampler | None = None
        self._socket_broken = False

    @classmethod
    async def connect(cls, url: str | None = None, key: str | None = None) -> Self:
        """An open client. The caller must `close` it."""
        return await cls(url, key).open()

    # ---- opening and closing -----------------------------------------------------------------------------------------

    async def open(self) -> Self:
        """Connect. Raises ServerError naming why it cannot be done."""
        self._session = aiohttp.ClientSession()
        try:
            self._socket = await self._connect(self._session)
        except BaseException as error:
            await self._session.close()
            if isinstance(error, aiohttp.ClientError | OSError):  # TimeoutError is an OSError
                raise ServerError(self._refusal(error)) from None
            raise
        self._tasks = [asyncio.create_task(self._read(self._socket)), asyncio.create_task(self._ping())]
        return self

    async def _connect(self, session: aiohttp.ClientSession) -> aiohttp.ClientWebSocketResponse:
        query = {} if self._unacknowledged is None else self._unacknowledged.query()
        async with asyncio.timeout(self._open_timeout_seconds):
            return await session.ws_connect(
                URL(self.url).update_query(query) if query else self.url,
                headers=self._headers,
                timeout=aiohttp.ClientWSTimeout(ws_receive=None, ws_close=_CLOSE_SECONDS),
                max_msg_size=0,
                autoclose=True,
                autoping=True,
            )

    async def _come_back(self) -> aiohttp.ClientWebSocketResponse | None:
        """Another socket of the same stream, on which everything not acknowledged was sent again; None without one."""
        held = self._unacknowledged
        if held is None or not held.can_resume or self._closing or self._session is None:
            return None
        self._socket_broken = True
        for pause in RETRY_SECONDS:
            await asyncio.sleep(pause)
            try:
                socket = await self._connect(self._session)
                held.greeted = False
                for message in held.messages():
                    await socket.send_bytes(message)
            except (aiohttp.ClientError, OSError):
                continue
            self._socket, self._socket_broken = socket, False
            return socket
        return None

    async def close(self) -> None:
        """Close the socket in good order. Events that have come can still be iterated. Idempotent."""
        self._closing = True
        if self._session is None or self._socket is None:
            return
        self._room.set()  # the reader may be waiting for the caller to iterate
        with contextlib.suppress(aiohttp.ClientError, OSError):
            await self._socket.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._session.close()

    async def __aenter__(self) -> Self:
        return await self.open()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    def _refusal(self, error: Exception) -> str:
        address = self.url.partition("?")[0]  # the query is ours, or has a key
        if isinstance(error, aiohttp.WSServerHandshakeError):
            why = {
                401: "the server does not know this key (401): pass one of its authorized_ids",
                404: f"the server has no path {urlsplit(self.url).path} (404)",
                503: "the server cannot serve now (503): its /ready says why",
            }.get(error.status, f"the server answered {error.status} {error.message}")
            return f"{address}: {why}"
        if isinstance(error, aiohttp.ClientConnectorError):
            reason = error.os_error.strerror or str(error.os_error)
            return f"{address} cannot be reached ({reason}): start a server with `moshi-stt worker`, or check the address"
        if isinstance(error, TimeoutError):
            return f"{address} did not answer within {self._open_timeout_seconds:g} s"
        return f"{address}: {error or type(error).__name__}"

    # ---- sending -----------------------------------------------------------------------------------------------------

    async def send_audio(self, pcm: NDArray[np.generic], sample_rate: int = SAMPLE_RATE) -> None:
        """Send audio: (S,) or (S, channels), floats, signed integers or uint8, at any rate (kept from call to call).

        Waits while the server takes no more. Raises ServerError when the stream has ended, AudioError for what is no PCM.
        """
        mono = to_mono_float(np.asarray(pcm))
        if self._resampler is not None and self._resampler.rate_in != sample_rate:
            await self._flush()
        if sample_rate != SAMPLE_RATE:
            self._resampler = self._resampler or StreamingResampler(sample_rate)
            mono = self._resampler.feed(mono)
        await self._send_pcm(mono)

    async def send_opus(self, data: bytes) -> None:
        """Send the next bytes of an Ogg-Opus stream, cut anywhere (see `moshi_stt.audio.opus.OpusEncoder`)."""
        if self._unacknowledged is not None:
            raise ServerError("a client with resume=True sends audio by send_audio: Opus cannot be sent again from a sample")
        await self._send(protocol.encode_opus(data, as_bin=self._as_bin))

    async def mark(self, id: int = 0) -> None:
        """Ask for `Marker(id)` when everything sent before has been transcribed. id: any int64."""
        await self._flush()
        await self._send(protocol.encode_marker(id))

    async def init(self) -> None:
        """Start the model state anew; answered by `Ready`. Not needed at the start."""
        await self._send(protocol.encode_init())

    async def _flush(self) -> None:
        """Send what the resampler holds back."""
        if self._resampler is not None:
            resampler, self._resampler = self._resampler, None
            await self._send_pcm(resampler.finish())

    async def _send_pcm(self, pcm: NDArray[np.float32]) -> None:
        for start in range(0, len(pcm), MESSAGE_SAMPLES):
            piece = pcm[start : start + MESSAGE_SAMPLES]
            await self._send(protocol.encode_audio(piece, as_bin=self._as_bin), len(piece))

    async def _send(self, message: bytes, samples: int = 0) -> None:
        """samples: that the message carries."""
        if self._socket is None:
            raise ServerError("the client is not open: use `async with Client(url)` or `await client.open()`")
        if not self._ended and not self._closing:
            if self._unacknowledged is not None:
                await self._unacknowledged.room()
                self._unacknowledged.add(message, samples)
            try:
                if not self._socket_broken:
                    await self._socket.send_bytes(message)
                return
            except (aiohttp.ClientError, OSError):
                if self._unacknowledged is not None:
                    return  # it is sent again when the reader has another socket
                with contextlib.suppress(TimeoutError):  # the reader learns why
                    async with asyncio.timeout(_CLOSE_SECONDS):
                        await asyncio.wait(self._tasks[:1])
        raise self._failure or ServerError("the stream has ended: nothing more can be sent", self._socket.close_code)

    async def _ping(self) -> None:
        """moshi-server closes clients from which no frame came for 20 s. A late answer means nothing: a server whose inbox is
        full reads later."""
        while not self._ended:
            await asyncio.sleep(self._ping_seconds)
            with contextlib.suppress(aiohttp.ClientError, OSError):
                if self._socket is not None:
                    await self._socket.ping()

    # ---- receiving ---------------------------------------------------------------------------------------------------

    async def _read(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        """Everything the server sends, as it comes, so that pings are answered whatever the caller does."""
        error: Error | None = None
        try:
            while True:
                message = await socket.receive()
                if message.type is aiohttp.WSMsgType.BINARY:
                    event = protocol.decode_event(message.data)
                    if isinstance(event, Error):
                        error = event
                        continue
                    if self._unacknowledged is None or self._unacknowledged.is_new(event):
                        if self._on_warning is not None and isinstance(event, Warning):
                            self._on_warning(event)
                        await self._keep(event)
                elif message.type in CLOSED:
                    code = 1006 if message.type is aiohttp.WSMsgType.ERROR else socket.close_code
                    again = await self._come_back() if code == 1006 and error is None else None
                    if again is None:
                        self._failure = self._verdict(error, code)
                        return
                    socket = again
        except ProtocolError as problem:
            self._failure = ServerError(str(problem))
        finally:
            self._ended = True
            self._news.set()

    async def _keep(self, event: AnyEvent) -> None:
        while len(self._events) >= EVENTS_HELD and not self._closing:
            self._room.clear()
            await self._room.wait()
        self._events.append(event)
        self._news.set()

    def _verdict(self, error: Error | None, code: int | None) -> ServerError | None:
        """What the end of the socket means. 1005: closed without a code, as moshi-server does."""
        if error is not None:
            return ServerError(error.message, None if code in (1005, 1006) else code)
        if self._closing or code in (None, 1000, 1001, 1005):
            return None
        if code == 1006:
            return ServerError("the connection was lost", code)
        return ServerError(f"the server closed the stream with code {code}", code)

    async def __aiter__(self) -> AsyncIterator[AnyEvent]:
        while True:
            while self._events:
                event = self._events.popleft()
                self._room.set()
                yield event
            if self._ended:
                break
            self._news.clear()
            await self._news.wait()
        if self._failure is not None:
            raise self._failure

    # ---- a whole recording -------------------------------------------------------------------------------------------

    async def transcribe(
        self,
        audio: Audio,
        sample_rate: int = SAMPLE_RATE,
        *,
        silence_before_seconds: float = 0.0,
        silence_after_seconds: float = 1.0,
        on_progress: Callable[[float], None] | None = None,
    ) -> list[TimedWord]:
        """Send a recording, whole or in pieces, and return its words. The client has to be fresh.

        silence_before_seconds: what Kyutai's 2.6B model needs (1 s); taken out of the times again.
        silence_after_seconds: moshi-server loses the last word without it; this server needs none.
        on_progress: called with the seconds transcribed so far, as words come.
        Raises ServerError, and whatever iterating `audio` raises (it is iterated in a thread).
        """
        words = []
        found = self.words(
            audio, sample_rate, silence_before_seconds=silence_before_seconds, silence_after_seconds=silence_after_seconds
        )
        async with contextlib.aclosing(found):
            async for word in found:
                words.append(word)
                if on_progress is not None:
                    on_progress(word.end)
        return words

    async def words(
        self,
        audio: Audio,
        sample_rate: int = SAMPLE_RATE,
        *,
        silence_before_seconds: float = 0.0,
        silence_after_seconds: float = 1.0,
    ) -> AsyncGenerator[TimedWord, None]:
        """Send audio, whole or in pieces as they come, and yield each word as soon as its end is known.

        Arguments and errors as of `transcribe`. Iterate it inside `contextlib.aclosing` if you may leave early.
        """
        open_word: Word | None = None
        events = self._heard(audio, sample_rate, silence_before_seconds, silence_after_seconds)
        async with contextlib.aclosing(events):
            async for event in events:
                if open_word is not None and isinstance(event, Word | EndWord | Marker):
                    yield timed(open_word, event, silence_before_seconds)
                    open_word = None
                if isinstance(event, Word):
                    open_word = event

    async def utterances(
        self,
        audio: Audio,
        sample_rate: int = SAMPLE_RATE,
        *,
        pause_seconds: float = PAUSE_SECONDS,
        silence_before_seconds: float = 0.0,
    ) -> AsyncGenerator[Utterance, None]:
        """Send audio as `words` does, and yield what is said between two pauses.

        pause_seconds: a silence so long between two words is a pause. If the client's URL has `turns=1`, an utterance comes as
        soon as the server says that the turn is over, else with the first word after the pause.
        """
        words: list[TimedWord] = []
        open_word: Word | None = None
        events = self._heard(audio, sample_rate, silence_before_seconds, 1.0)
        async with contextlib.aclosing(events):
            async for event in events:
                if open_word is not None and isinstance(event, Word | EndWord | Marker | EndOfTurn):
                    word, open_word = timed(open_word, event, silence_before_seconds), None
                    if words and word.start - words[-1].end >= pause_seconds:
                        yield utterance_of(words)
                        words = []
                    words.append(word)
                if words and isinstance(event, EndOfTurn | Marker):
                    yield utterance_of(words)
                    words = []
                if isinstance(event, Word):
                    open_word = event

    async def _heard(
        self, audio: Audio, sample_rate: int, before_seconds: float, after_seconds: float
    ) -> AsyncGenerator[AnyEvent, None]:
        """Send audio and yield the events up to the marker after it, the marker included."""
        if isinstance(audio, str | bytes):
            raise AudioError("expected audio: an array of samples or an iterable of arrays, as read_file(PATH) makes them")
        pieces = iter([audio] if isinstance(audio, np.ndarray) else audio)
        sender = asyncio.create_task(self._send_all(pieces, sample_rate, before_seconds, after_seconds))
        try:
            async with contextlib.aclosing(self._until_failed(sender)) as stream:
                async for event in stream:
                    yield event
                    if isinstance(event, Marker):
                        return
        finally:
            sender.cancel()
            await asyncio.gather(sender, return_exceptions=True)
        raise ServerError("the server closed the stream before the recording was transcribed")

    async def _until_failed(self, sender: "asyncio.Task[None]") -> AsyncGenerator[AnyEvent, None]:
        """The events, until the sender fails: then its exception, unless the server's own says more."""
        sender.add_done_callback(lambda _: self._news.set())
        while True:
            while self._events:
                event = self._events.popleft()
                self._room.set()
                yield event
            if self._ended and self._failure is not None:
                raise self._failure
            if sender.done() and (error := sender.exception()) is not None:
                raise error
            if self._ended:
                return
            self._news.clear()
            await self._news.wait()

    async def _send_all(
        self, pieces: Iterator[NDArray[np.generic]], sample_rate: int, before_seconds: float, after_seconds: float
    ) -> None:
        """Audio, silence, marker, and then silence until cancelled: moshi-server needs audio to bring a marker back (3 s are
        enough for all models), and closes clients that send none for 120 s however much it has still to do."""
        await self._send_pcm(np.zeros(round(before_seconds * SAMPLE_RATE), np.float32))
        while (piece := await asyncio.to_thread(next, pieces, None)) is not None:
            await self.send_audio(piece, sample_rate)
        await self._flush()
        await self._send_pcm(np.zeros(round(after_seconds * SAMPLE_RATE), np.float32))
        await self.mark(0)
        await self._send_pcm(np.zeros(3 * SAMPLE_RATE, np.float32))
        while True:
            await asyncio.sleep(_KEEP_ALIVE_SECONDS)
            await self._send_pcm(np.zeros(FRAME_SAMPLES, np.float32))
