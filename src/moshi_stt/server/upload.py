"""POST: a whole file in, its words out as the door writes them.

The body goes to a temporary file, is decoded in a thread a few seconds at a time, and takes a slot like any stream, after the
live ones. Where moshi-server answers 500, the status here says whose fault it is (docs/operations.md).
"""

import asyncio
import hashlib
import logging
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterator
from contextlib import asynccontextmanager, closing, contextmanager
from typing import IO, TypeVar

import numpy as np
from aiohttp import hdrs, web
from numpy.typing import NDArray

from moshi_stt.config import LimitsConfig
from moshi_stt.constants import SAMPLE_RATE
from moshi_stt.engine.commands import Audio, Finish
from moshi_stt.engine.stream import Stream
from moshi_stt.errors import AudioError, EngineError, NoFreeSlot
from moshi_stt.events import EndWord, Error, Word
from moshi_stt.server.doors.door import (
    FileAnswer,
    FileDoor,
    FileOptions,
    FileRequest,
    Handshake,
    RefusalKind,
    Refused,
    Route,
    Transcript,
)
from moshi_stt.server.forms import MOST_FIELD_BYTES, BadForm, Fields, FormTimeout, read_form
from moshi_stt.server.handshake import handshake_of, refused
from moshi_stt.server.service import Served, Service

log = logging.getLogger(__name__)

BUFFER_BYTES = 1 << 20
"""Body bytes gathered before a thread writes them."""

DECODE_SAMPLES = 10 * SAMPLE_RATE
"""Audio that a thread decodes at a time."""

UNBUFFERED = "Failed to buffer the request body: "

T = TypeVar("T")
Pieces = Generator[NDArray[np.float32], None, None]


class _Fault(Exception):
    """The request cannot be answered as asked."""

    def __init__(self, kind: RefusalKind, sentence: str, status: int | None = None) -> None:
        super().__init__(sentence)
        self.kind = kind
        self.sentence = sentence
        self.status = status
        """Where it is not the usual one."""


async def handle(request: web.Request, service: Service, door: FileDoor, route: Route) -> web.StreamResponse:
    """Transcribe the body."""
    handshake = handshake_of(request, service)
    try:
        service.check_key(door, handshake)
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
    service.metrics.uploads.labels(str(response.status)).inc()
    return response


async def _answer(
    request: web.Request, service: Service, door: FileDoor, route: Route, handshake: Handshake
) -> web.StreamResponse:
    try:
        return await _transcribe(request, service, door, route, handshake)
    except Refused as refusal:
        log.info("POST %s: %d: %s", request.path, refusal.status, refusal.body.decode("utf-8", "replace"))
        return refused(refusal)
    except _Fault as fault:
        log.info("POST %s: %s: %s", request.path, fault.kind, fault.sentence)
        answer = door.refusal(fault.kind, fault.sentence)
        if fault.status is not None:
            answer.status = fault.status
        return refused(answer)


async def _transcribe(
    request: web.Request, service: Service, door: FileDoor, route: Route, handshake: Handshake
) -> web.StreamResponse:
    reason = service.refusal()
    if reason is not None:
        raise _Fault("stopping" if service.failure is None else "failed", reason)
    door.check(handshake)
    async with _received(request, service.config.limits, door.form) as (file, fields, file_name):
        content_type = request.headers.get(hdrs.CONTENT_TYPE, "")
        options = door.parse(FileRequest(handshake, fields, file_name, content_type, lambda: sha256_of(file)))
        served = service.find(options.module or route.module)
        pieces = _decoded(file)
        with closing(pieces), _faults():
            first = await _in_thread(lambda: _gather(pieces))
            stream = await _slot(service, served, options)
            with closing(stream):
                live = door.stream(options)
                if live is not None:
                    return await _stream_answer(request, live, stream, first, pieces)
                transcript = await _run(stream, first, pieces)
        made = await _in_thread(lambda: door.answer(transcript, options))
    return web.Response(
        status=made.status, body=made.body, headers={hdrs.CONTENT_TYPE: made.content_type, **dict(made.headers)}
    )


@contextmanager
def _faults() -> Iterator[None]:
    """What the decoder and the engine raise, as the door's refusals."""
    try:
        yield
    except AudioError as error:
        raise _Fault("bad_audio", str(error)) from None
    except NoFreeSlot as error:
        raise _Fault("full", str(error)) from None
    except EngineError as error:
        raise _Fault("internal", str(error)) from None


async def _stream_answer(
    request: web.Request, answer: FileAnswer, stream: Stream, first: NDArray[np.float32], pieces: Pieces
) -> web.StreamResponse:
    """Write the answer while the file is transcribed. From its first byte on, a fault is told in the body."""
    response = web.StreamResponse(headers={hdrs.CONTENT_TYPE: answer.content_type, **dict(answer.headers)})
    await response.prepare(request)

    async def write(event: Word | EndWord) -> None:
        if data := answer.event(event):
            await response.write(data)

    try:
        with _faults():
            transcript = await _run(stream, first, pieces, write)
        await response.write(answer.end(transcript))
    except _Fault as fault:
        log.info("POST %s: %s: %s", request.path, fault.kind, fault.sentence)
        await response.write(answer.error(fault.kind, fault.sentence))
    await response.write_eof()
    return response


async def _slot(service: Service, served: Served, options: FileOptions) -> Stream:
    """A stream, after the live ones in the queue. Raises NoFreeSlot when none came free in time."""
    patience = service.config.limits.slot_wait_seconds
    if not service.is_started:
        try:
            await asyncio.wait_for(service.started.wait(), patience)
        except TimeoutError:
            raise NoFreeSlot("the model is still loading: try again later") from None
    return await served.engine.open_when_free(patience, live=False, options=options.stream)


async def _in_thread(work: Callable[[], T]) -> T:
    """`work()` in a thread, to its end even when the caller is cancelled: it uses what the caller would close."""
    running = asyncio.get_running_loop().run_in_executor(None, work)
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        await asyncio.wait((running,))
        if not running.cancelled():
            running.exception()  # nobody is left whom it would concern
        raise


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
        raise _Fault("too_large", too_large)
    with tempfile.TemporaryFile() as file:
        spool = _Spool(file, limit, too_large)
        fields: Fields = ()
        name: str | None = None
        try:
            if form is None:
                while piece := await _next_piece(request, limits.idle_seconds):
                    await spool.add(piece)
            else:
                fields, name = await read_form(request, form, spool.add, limits.idle_seconds)
            await spool.flush()
        except (web.RequestPayloadError, BadForm) as error:
            reason = " ".join(str(getattr(error.__cause__, "message", error)).split())
            raise _Fault("bad_request", f"{UNBUFFERED}{reason}") from None
        except FormTimeout:
            raise _Fault("timeout", f"{UNBUFFERED}nothing came for {limits.idle_seconds:g} s") from None
        except ConnectionError:
            raise
        except OSError as error:
            raise _Fault("internal", f"{UNBUFFERED}{error.strerror}", 507) from None
        file.seek(0)
        yield file, fields, name


class _Spool:
    """Bytes on their way to a file, written by a thread, a megabyte at a time."""

    def __init__(self, file: IO[bytes], limit: int, too_large: str) -> None:
        self._file = file
        self._limit = limit
        self._too_large = too_large
        self._received = 0
        self._buffer = bytearray()

    async def add(self, piece: bytes) -> None:
        self._received += len(piece)
        if self._received > self._limit:
            raise _Fault("too_large", self._too_large)
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
        raise _Fault("timeout", f"{UNBUFFERED}nothing came for {patience_seconds:g} s") from None


async def _write(file: IO[bytes], data: bytearray) -> None:
    def write() -> None:
        file.write(data)
        file.flush()

    await _in_thread(write)


def _decoded(file: IO[bytes]) -> Pieces:
    from moshi_stt.audio.decode import decode_file  # loads the codecs: not before the first file

    yield from decode_file(file)


def _gather(pieces: Pieces) -> NDArray[np.float32]:
    """About DECODE_SAMPLES of audio; empty at the end. Runs in a thread."""
    gathered: list[NDArray[np.float32]] = []
    size = 0
    while size < DECODE_SAMPLES and (piece := next(pieces, None)) is not None:
        gathered.append(piece)
        size += len(piece)
    return np.concatenate(gathered) if gathered else np.zeros(0, np.float32)


async def _run(
    stream: Stream,
    first: NDArray[np.float32],
    pieces: Pieces,
    tell: Callable[[Word | EndWord], Awaitable[None]] | None = None,
) -> Transcript:
    """Feed the file while its words are collected, and told one by one. Raises AudioError for damage after `first`."""
    feeding = asyncio.create_task(_feed(stream, first, pieces))
    events: list[Word | EndWord] = []
    try:
        async for event in stream:
            if isinstance(event, Word | EndWord):
                events.append(event)
                if tell is not None:
                    await tell(event)
            elif isinstance(event, Error):
                raise EngineError(event.message)
        return Transcript(events, await feeding / SAMPLE_RATE)
    finally:
        feeding.cancel()
        await asyncio.wait((feeding,))


async def _feed(stream: Stream, first: NDArray[np.float32], pieces: Pieces) -> int:
    """All the audio, then `Finish`; how many samples. Damage in the middle closes the stream: nobody waits for the rest."""
    audio = first
    samples = 0
    try:
        while len(audio):
            samples += len(audio)
            await stream.send(Audio(audio))
            audio = await _in_thread(lambda: _gather(pieces))
    except AudioError:
        stream.close()
        raise
    await stream.send(Finish())
    return samples
