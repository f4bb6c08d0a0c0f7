"""POST: a whole file in, its words out as the door writes them.

The body goes to a temporary file and takes slots like any stream, after the live ones. It is decoded in a thread, a few seconds
at a time; a long one for an engine of many slots in another process. Where moshi-server answers 500, the status here says whose
fault it is (docs/operations.md).
"""

import asyncio
import hashlib
import logging
import tempfile
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Generator, Iterator
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager, closing, contextmanager
from dataclasses import replace
from typing import IO, TYPE_CHECKING

import numpy as np
from aiohttp import hdrs, web
from numpy.typing import NDArray

from moshi_stt.audio.cut import Piece
from moshi_stt.audio.file_view import view_of
from moshi_stt.audio.level import LevelMeter
from moshi_stt.audio.live import PcmFormat, PcmInput
from moshi_stt.audio.selection import Selection
from moshi_stt.config import LimitsConfig
from moshi_stt.constants import SAMPLE_RATE
from moshi_stt.engine.recording import USUAL_CUT, InFlight, RecordingEvent, RecordingOptions, in_thread, recording_events
from moshi_stt.errors import AudioError, EngineError, NoFreeSlot
from moshi_stt.events import EndWord, Word
from moshi_stt.server.devices.forward import Forwarded
from moshi_stt.server.doors.door import (
    FileAnswer,
    FileDoor,
    FileOptions,
    FileRequest,
    Handshake,
    Refused,
    Route,
    Transcript,
)
from moshi_stt.server.faults import Fault
from moshi_stt.server.forms import MOST_FIELD_BYTES, BadForm, Fields, FormTimeout, read_form
from moshi_stt.server.handshake import handshake_of, refused
from moshi_stt.server.service import Served, Service
from moshi_stt.server.timers import total_sentence

if TYPE_CHECKING:
    from moshi_stt.audio.decode_pool import Decoded, DecodePool

log = logging.getLogger(__name__)

BUFFER_BYTES = 1 << 20
"""Body bytes gathered before a thread writes them."""

CUT_FROM_SECONDS = 60.0
"""A longer file may be cut at pauses, and its pieces run on several slots."""

KEPT_FREE = 4
"""One slot in so many is kept for live streams, as long as one of a file's pieces runs."""

CHANNELS_AT_ONCE = 8
"""Of a file whose channels are kept apart. Each holds up to a minute of audio while it waits for a slot."""

RATE_SECONDS = 30.0
"""Time after which a body must have come at the least rate."""

UNBUFFERED = "Failed to buffer the request body: "


class _TooLong(AudioError):
    """More audio than is taken of one file."""


async def handle(request: web.Request, service: Service, door: FileDoor, route: Route) -> web.StreamResponse:
    """Transcribe the body."""
    handshake = handshake_of(request, service)
    try:
        await service.gate.admit(door, handshake)
        if len(service.uploads) >= service.config.limits.max_uploads:
            service.metrics.refusals.labels("uploads").inc()
            raise door.refusal("busy", f"{len(service.uploads)} files are being received (max_uploads): try again later")
    except Refused as refusal:
        return refused(refusal)
    task = asyncio.current_task()
    assert task is not None
    service.uploads.add(task)
    try:
        response = await _answer(request, service, door, route, handshake)
    except asyncio.CancelledError:
        if not service.stopping or task.uncancel() > 0:
            raise
        response = refused(door.refusal("stopping", "the server is shutting down"))
        response.headers.popall(hdrs.RETRY_AFTER, None)
        response.force_close()
    finally:
        service.uploads.discard(task)
    if not isinstance(response, Forwarded):
        service.metrics.uploads.labels(str(response.status)).inc()
    if not response.prepared and request.headers.get("X-Request-ID", "") == handshake.peer.rpartition(" ")[2]:
        response.headers["X-Request-ID"] = request.headers["X-Request-ID"]
    return response


async def _answer(
    request: web.Request, service: Service, door: FileDoor, route: Route, handshake: Handshake
) -> web.StreamResponse:
    try:
        async with _bounded(service.config.limits) as bound:
            return await _transcribe(request, service, door, route, handshake, bound)
    except Refused as refusal:
        log.info("POST %s: %d: %s", handshake.peer, refusal.status, refusal.body.decode("utf-8", "replace"))
        return refused(refusal)
    except Fault as fault:
        log.info("POST %s: %s: %s", handshake.peer, fault.kind, fault.sentence)
        answer = door.refusal(fault.kind, fault.sentence)
        if fault.status is not None:
            answer.status = fault.status
        return refused(answer)


@asynccontextmanager
async def _bounded(limits: LimitsConfig, deadline: float | None = None) -> AsyncIterator[asyncio.Timeout]:
    """Raises Fault in a block that has not ended by then. deadline: of the loop's clock; None: `stream_seconds` from now."""
    if deadline is None and limits.stream_seconds:
        deadline = asyncio.get_running_loop().time() + limits.stream_seconds
    try:
        async with asyncio.timeout_at(deadline) as bound:
            yield bound
    except TimeoutError:
        if not bound.expired():
            raise
        raise Fault("timeout", total_sentence(limits)) from None


async def _transcribe(
    request: web.Request, service: Service, door: FileDoor, route: Route, handshake: Handshake, bound: asyncio.Timeout
) -> web.StreamResponse:
    """bound: ends it; a response that is streamed sees to that by itself from its first byte on."""
    reason = service.refusal()
    if reason is not None:
        raise Fault("stopping" if service.failure is None else "failed", reason)
    coding = request.headers.get(hdrs.CONTENT_ENCODING, "identity").lower()
    if coding != "identity":  # a few bytes may unpack to a full disk, and recordings are compressed already
        raise Fault("bad_request", f"Content-Encoding {coding} is not taken: send the file as it is", 415)
    door.check(handshake)
    content_type = request.headers.get(hdrs.CONTENT_TYPE, "")
    if service.devices is not None:
        with _faults():
            await _wait_started(service)
        bound.reschedule(None)  # the model process has one of its own
        return await service.devices.post(request, handshake, service.find(route.module).module.name)
    form = door.form or ("file" if content_type.lower().startswith("multipart/form-data") else None)
    async with _received(request, service.config.limits, form) as (file, fields, file_name):
        if form and file_name is None and door.form is None:
            raise Fault("bad_request", 'the form has no file called "file": send it with curl -F file=@talk.wav')
        options = door.parse(FileRequest(handshake, fields, file_name, content_type, lambda: sha256_of(file)))
        served = service.find(options.module or route.module)
        source = _Decoded(file, service.config.limits.max_audio_seconds, options.selection, options.raw)
        with closing(source), _faults():
            await _wait_started(service)
            if options.selection.channels == "split":
                return await _answer_split(service, served, door, options, source)
            async with aclosing(_events(service, served, options, source)) as events:
                first = await anext(events, None)
                live = door.stream(options)
                if live is not None:
                    rest = _bounded(service.config.limits, bound.when())
                    bound.reschedule(None)  # `rest` takes its place
                    return await _stream_answer(request, live, first, events, source, rest)
                said = [] if first is None else [first, *[event async for event in events]]
        words = sum(isinstance(event, Word) for event in said)
        log.info("POST %s: ended: door=%s audio_seconds=%.1f words=%d", handshake.peer, door.name, source.seconds, words)
        if not words:
            log.info("POST %s: no words: %s", handshake.peer, source.silence or "nothing that this model understands")
        transcript = Transcript([event for event in said if isinstance(event, Word | EndWord)], source.seconds)
        return await _whole_answer(door, options, transcript)


async def _whole_answer(door: FileDoor, options: FileOptions, transcript: Transcript) -> web.Response:
    made = await in_thread(lambda: door.answer(transcript, options))
    headers = {hdrs.CONTENT_TYPE: made.content_type, **dict(made.headers)}
    return web.Response(status=made.status, body=made.body, headers=headers)


async def _answer_split(
    service: Service, served: Served, door: FileDoor, options: FileOptions, source: "_Decoded"
) -> web.Response:
    """Each channel by itself, some at the same time, each reading the file for itself."""
    in_flight, at_once = InFlight(), asyncio.Semaphore(CHANNELS_AT_ONCE)
    sources = [source.channel(number) for number in range(1, await in_thread(source.count_channels) + 1)]

    async def words(channel: _Decoded) -> list[Word | EndWord]:
        async with at_once, aclosing(_events(service, served, options, channel, in_flight)) as events:
            with closing(channel):
                return [event async for event in events if isinstance(event, Word | EndWord)]

    tasks = [asyncio.create_task(words(channel)) for channel in sources]
    try:
        channels = await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return await _whole_answer(door, options, Transcript([], sources[0].seconds, tuple(channels)))


def _events(
    service: Service, served: Served, options: FileOptions, source: "_Decoded", in_flight: InFlight | None = None
) -> AsyncGenerator[RecordingEvent, None]:
    """The recording's words, in order."""
    slots = served.engine.total_slots
    recording = RecordingOptions(
        cut=None if options.whole else USUAL_CUT,
        cut_from_seconds=CUT_FROM_SECONDS,
        stream=options.stream,
        slot_wait_seconds=service.config.limits.slot_wait_seconds,
        keep_free=max(1, slots // KEPT_FREE),
        elsewhere=lambda: source.elsewhere(service.decoders.idle(slots)),
    )
    return recording_events(served.engine, source, recording, in_flight=in_flight)


async def _wait_started(service: Service) -> None:
    """Raises NoFreeSlot where the model is not loaded in time."""
    if not service.is_started:
        try:
            await asyncio.wait_for(service.started.wait(), service.config.limits.slot_wait_seconds)
        except TimeoutError:
            raise NoFreeSlot("the model is still loading: try again later") from None


@contextmanager
def _faults() -> Iterator[None]:
    """What the decoder and the engine raise, as the door's refusals."""
    try:
        yield
    except _TooLong as error:
        raise Fault("too_large", str(error)) from None
    except AudioError as error:
        raise Fault("bad_audio", str(error)) from None
    except NoFreeSlot as error:
        raise Fault("full", str(error)) from None
    except EngineError as error:
        raise Fault("internal", str(error)) from None


async def _stream_answer(
    request: web.Request,
    answer: FileAnswer,
    first: RecordingEvent | None,
    events: AsyncGenerator[RecordingEvent, None],
    source: "_Decoded",
    bounded: AbstractAsyncContextManager[asyncio.Timeout],
) -> web.StreamResponse:
    """Write the answer while the file is transcribed. From its first byte on, a fault is told in the body.

    bounded: ends it.
    """
    response = web.StreamResponse(headers={hdrs.CONTENT_TYPE: answer.content_type, **dict(answer.headers)})
    await response.prepare(request)
    said: list[Word | EndWord] = []
    event = first
    try:
        async with bounded:
            with _faults():
                while event is not None:
                    if isinstance(event, Word | EndWord):
                        said.append(event)
                    if data := answer.event(event):
                        await response.write(data)
                    event = await anext(events, None)
        await response.write(answer.end(Transcript(said, source.seconds)))
    except Fault as fault:
        log.info("POST %s: %s: %s", request.path, fault.kind, fault.sentence)
        await response.write(answer.error(fault.kind, fault.sentence))
    await response.write_eof()
    return response


@asynccontextmanager
async def _received(
    request: web.Request, limits: LimitsConfig, form: str | None
) -> AsyncIterator[tuple[IO[bytes], Fields, str | None]]:
    """The recording in a file of its own, the other fields of the form, and the recording's name.

    form: the part that is the recording; None where the body is. The file has no name, so that nothing is left of it even
    when the process is killed.
    """
    limit = limits.max_upload_bytes
    too_large = f"{UNBUFFERED}length limit exceeded: at most {limit} bytes are taken (max_upload_bytes)"
    if request.content_length is not None and request.content_length > limit + (MOST_FIELD_BYTES if form else 0):
        raise Fault("too_large", too_large)
    with tempfile.TemporaryFile() as file:
        body = _Body(file, limit, too_large, limits.upload_bytes_per_second)
        fields: Fields = ()
        name: str | None = None
        try:
            if form is None:
                while piece := await _next_piece(request, limits.idle_seconds):
                    await body.add(piece)
            else:
                fields, name = await read_form(request, form, body.add, limits.idle_seconds)
            await body.flush()
        except (web.RequestPayloadError, BadForm) as error:
            reason = " ".join(str(getattr(error.__cause__, "message", error)).split())
            raise Fault("bad_request", f"{UNBUFFERED}{reason}") from None
        except FormTimeout:
            raise Fault("timeout", f"{UNBUFFERED}nothing came for {limits.idle_seconds:g} s") from None
        except ConnectionError:
            raise
        except OSError as error:
            raise Fault("internal", f"{UNBUFFERED}{error.strerror}", 507) from None
        file.seek(0)
        yield file, fields, name


class _Body:
    """Bytes on their way to a file, written by a thread, a megabyte at a time."""

    def __init__(self, file: IO[bytes], limit: int, too_large: str, least_rate: int) -> None:
        """least_rate: bytes a second, on average from RATE_SECONDS on."""
        self._least_rate = least_rate
        self._started = time.monotonic()
        self._file = file
        self._limit = limit
        self._too_large = too_large
        self._received = 0
        self._buffer = bytearray()

    async def add(self, piece: bytes) -> None:
        self._received += len(piece)
        if self._received > self._limit:
            raise Fault("too_large", self._too_large)
        seconds = time.monotonic() - self._started
        if seconds > RATE_SECONDS and self._received < seconds * self._least_rate:
            sentence = f"{self._received} bytes in {seconds:.0f} s are less than upload_bytes_per_second ({self._least_rate})"
            raise Fault("timeout", UNBUFFERED + sentence)
        self._buffer += piece
        if len(self._buffer) >= BUFFER_BYTES:
            await self.flush()

    async def flush(self) -> None:
        buffer, self._buffer = self._buffer, bytearray()
        await _write(self._file, buffer)


def sha256_of(file: IO[bytes]) -> str:
    """Of a whole file. It is left at its start."""
    file.seek(0)
    digest = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
    file.seek(0)
    return digest


async def _next_piece(request: web.Request, patience_seconds: float) -> bytes:
    """What came of the body, waiting for at least a byte; empty at its end."""
    try:
        async with asyncio.timeout(patience_seconds):
            return await request.content.readany()
    except TimeoutError:
        raise Fault("timeout", f"{UNBUFFERED}nothing came for {patience_seconds:g} s") from None


async def _write(file: IO[bytes], data: bytearray) -> None:
    def write() -> None:
        file.write(data)
        file.flush()

    await in_thread(write)


class _Decoded:
    """A file's audio, float32 (S,) at 24 kHz, from its start. Iterated in threads; `seconds` so far."""

    def __init__(
        self,
        file: IO[bytes],
        most_seconds: float,
        selection: Selection,
        raw: PcmFormat | None,
        lock: "threading.Lock | None" = None,
    ) -> None:
        """raw: the file is samples alone. lock: of all that read it. Raises _TooLong, while iterating, beyond most_seconds."""
        self._file = file
        self._lock = lock or threading.Lock()
        self._view = view_of(file, self._lock)
        self._raw = raw
        self._most_seconds = most_seconds
        self._selection = selection
        self._pieces: Iterator[NDArray[np.float32]] | None = None
        self._meter = LevelMeter()
        self._elsewhere: Decoded | None = None

    def channel(self, number: int) -> "_Decoded":
        """One of its channels alone, from the start."""
        return _Decoded(self._file, self._most_seconds, replace(self._selection, channels=number), self._raw, self._lock)

    def count_channels(self) -> int:
        """Channels of the track. Raises AudioError."""
        if self._raw is not None:
            return self._raw.channels
        from moshi_stt.audio.decode import probe

        return probe(self._view, self._selection.track).channels

    def __iter__(self) -> Iterator[NDArray[np.float32]]:
        return self

    def __next__(self) -> NDArray[np.float32]:
        if self._pieces is None and self._raw is not None:
            self._pieces = _raw_pieces(self._view, self._raw, self._selection.channels)
        elif self._pieces is None:
            from moshi_stt.audio.decode import decode_file  # loads the codecs: not before the first file

            self._pieces = decode_file(self._view, self._selection)
        pcm = next(self._pieces)
        self._meter.hear(pcm)
        self._check_length(self.seconds)
        return pcm

    def _check_length(self, seconds: float) -> None:
        if seconds > self._most_seconds:
            raise _TooLong(f"the recording is longer than {self._most_seconds:g} s (max_audio_seconds): send it in parts")

    def elsewhere(self, pool: "DecodePool | None") -> AsyncGenerator[Piece, None] | None:
        """All of it again, decoded and cut by a process of the pool; None where it has to go on here."""
        if pool is None or self._raw is not None:
            return None
        self.close()
        return self._pieces_of(pool)

    async def _pieces_of(self, pool: "DecodePool") -> AsyncGenerator[Piece, None]:
        from moshi_stt.audio.decode_pool import Decoded

        decoded = self._elsewhere = Decoded()
        async with aclosing(pool.pieces(self._file.fileno(), self._selection, decoded)) as pieces:
            async for piece in pieces:
                decoded.seconds = piece.offset + len(piece.pcm) / SAMPLE_RATE
                try:
                    self._check_length(decoded.seconds)
                except _TooLong:
                    piece.release()
                    raise
                yield piece
        if decoded.fault is not None:
            raise decoded.fault

    @property
    def seconds(self) -> float:
        return self._meter.samples / SAMPLE_RATE if self._elsewhere is None else self._elsewhere.seconds

    @property
    def silence(self) -> str:
        """Why there can be no words, where the level says so."""
        return self._meter.reason() if self._elsewhere is None else self._elsewhere.silence

    def close(self) -> None:
        if isinstance(self._pieces, Generator):
            self._pieces.close()


def _raw_pieces(file: IO[bytes], form: PcmFormat, channels: int | str) -> Iterator[NDArray[np.float32]]:
    """Samples without a header, a second at a time. channels: a number, from 1 on, or all of them mixed."""
    conversion = PcmInput(form, mix=not isinstance(channels, int))
    index = channels - 1 if isinstance(channels, int) else 0
    while data := file.read(form.bytes_per_second):
        for pieces in conversion.feed(data):
            yield pieces[index]
    yield conversion.flush()[index]
