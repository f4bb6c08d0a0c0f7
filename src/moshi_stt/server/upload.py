"""POST: a whole file in, its words out as the door writes them.

The body goes to a temporary file, is decoded in a thread a few seconds at a time, and takes a slot like any stream, after the
live ones. Where moshi-server answers 500, the status here says whose fault it is (docs/operations.md).
"""

import asyncio
import logging
import tempfile
from collections.abc import AsyncIterator, Callable, Generator
from contextlib import asynccontextmanager, closing
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
    FileDoor,
    FileOptions,
    FileRequest,
    Handshake,
    RefusalKind,
    Refused,
    Route,
    Transcript,
)
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
        if not service.keys.allow(door.key(handshake)):
            service.metrics.refusals.labels("key").inc()
            raise door.refusal("unauthorized", "the API key is missing or wrong")
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


async def _answer(request: web.Request, service: Service, door: FileDoor, route: Route, handshake: Handshake) -> web.Response:
    try:
        transcript, options = await _transcribe(request, service, door, route, handshake)
        made = await asyncio.to_thread(door.answer, transcript, options)
        headers = {hdrs.CONTENT_TYPE: made.content_type, **dict(made.headers)}
        return web.Response(status=made.status, body=made.body, headers=headers)
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
) -> tuple[Transcript, FileOptions]:
    limits = service.config.limits
    reason = service.refusal()
    if reason is not None:
        raise _Fault("stopping" if service.failure is None else "failed", reason)
    door.check(handshake)
    async with _received(request, limits) as file:
        options = door.parse(FileRequest(handshake, content_type=request.headers.get(hdrs.CONTENT_TYPE, "")))
        served = service.find(options.module or route.module)
        pieces = _decoded(file)
        with closing(pieces):
            try:
                first = await _in_thread(lambda: _gather(pieces))
                stream = await _slot(service, served, options)
                with closing(stream):
                    return await _run(stream, first, pieces), options
            except AudioError as error:
                raise _Fault("bad_audio", str(error)) from None
            except NoFreeSlot as error:
                raise _Fault("full", str(error)) from None
            except EngineError as error:
                raise _Fault("internal", str(error)) from None


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
async def _received(request: web.Request, limits: LimitsConfig) -> AsyncIterator[IO[bytes]]:
    """The body in a file of its own. It has no name, so that nothing is left of it even when the process is killed."""
    limit = limits.max_upload_bytes
    too_large = f"{UNBUFFERED}length limit exceeded: at most {limit} bytes are taken (max_upload_bytes)"
    if request.content_length is not None and request.content_length > limit:
        raise _Fault("too_large", too_large)
    with tempfile.TemporaryFile() as file:
        try:
            received = 0
            buffer = bytearray()
            while piece := await _next_piece(request, limits.idle_seconds):
                received += len(piece)
                if received > limit:
                    raise _Fault("too_large", too_large)
                buffer += piece
                if len(buffer) >= BUFFER_BYTES:
                    await _write(file, buffer)
                    buffer = bytearray()
            await _write(file, buffer)
        except web.RequestPayloadError as error:
            reason = " ".join(str(getattr(error.__cause__, "message", error)).split())
            raise _Fault("bad_request", f"{UNBUFFERED}{reason}") from None
        except ConnectionError:
            raise
        except OSError as error:
            raise _Fault("internal", f"{UNBUFFERED}{error.strerror}", 507) from None
        file.seek(0)
        yield file


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


async def _run(stream: Stream, first: NDArray[np.float32], pieces: Pieces) -> Transcript:
    """Feed the file while its words are collected. Raises AudioError for damage after `first`."""
    feeding = asyncio.create_task(_feed(stream, first, pieces))
    events: list[Word | EndWord] = []
    try:
        async for event in stream:
            if isinstance(event, Word | EndWord):
                events.append(event)
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
