"""A recording through an engine's streams: the one way of `transcribe`, POST and every door that takes files.

    words = await transcribe_recording(engine, audio, RecordingOptions(...))

    async for event in recording_events(engine, audio, options):    # Word, EndWord and Interim, in order
        ...

audio: arrays of float32 (S,) at 24 kHz, iterated in a thread; or, decoded and cut in other processes, the `Piece`s of a
`DecodePool`. The silence that a model needs in front is added here and taken out of the times.

An engine that cuts speech to utterances itself gets a recording as one stream, and so does any engine one of up to
`cut_from_seconds`. A longer one is cut at pauses; its pieces run on as many slots as are free, but for those that are kept for
live streams (`keep_free`), on one at least.
"""

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import numpy as np
from numpy.typing import NDArray

from moshi_stt.audio.cut import CutRule, Piece, cut_pieces
from moshi_stt.constants import SAMPLE_RATE
from moshi_stt.engine.commands import Audio, Command, Finish
from moshi_stt.engine.engine import Engine, StreamOptions
from moshi_stt.engine.stream import Stream
from moshi_stt.errors import EngineError
from moshi_stt.events import AnyEvent, EndWord, Error, Interim, Word
from moshi_stt.text.merge import WordMerger
from moshi_stt.text.subtitles import TimedWord, pair_words, word_events

SLOT_WAIT_SECONDS = 3_600.0
"""Live streams go first; a recording waits."""

GATHERED_SAMPLES = 10 * SAMPLE_RATE
"""Audio that a thread decodes at a time."""

USUAL_CUT: Final = CutRule()
WITH_CONFIDENCE: Final = StreamOptions(confidence=True)

T = TypeVar("T")
Pcm = NDArray[np.float32]
RecordingEvent = Word | EndWord | Interim
RecordingAudio = Iterable[Pcm] | AsyncIterator[Piece]
Progress = Callable[[float], None]
"""Called with the seconds of audio done since the last call."""


class InFlight:
    """The streams that run for one recording, or for the channels of one that are run at the same time."""

    def __init__(self) -> None:
        self.count = 0
        self.opening = asyncio.Lock()
        """Held while one of them waits for a slot: the others then know whether one of them runs."""


def _nowhere() -> AsyncIterator[Piece] | None:
    return None


@dataclass(frozen=True)
class RecordingOptions:
    """How a recording is run.

    cut: where a long one is cut; None runs any as one stream. cut_from_seconds: up to this length it is one stream anyway.
    prefix_seconds: silence in front of each stream; None takes what the model needs. stream: the events that are wanted.
    slot_wait_seconds: how long the first of its streams may wait for a slot. keep_free: slots that it leaves to others, as
    long as one of its streams runs. elsewhere: decodes and cuts a long one from its start in another process; None where no
    process is free.
    """

    cut: CutRule | None = USUAL_CUT
    cut_from_seconds: float = 0.0
    prefix_seconds: float | None = None
    stream: StreamOptions = WITH_CONFIDENCE
    slot_wait_seconds: float = SLOT_WAIT_SECONDS
    keep_free: int = 0
    elsewhere: Callable[[], AsyncIterator[Piece] | None] = _nowhere


async def transcribe_recording(
    engine: Engine,
    audio: RecordingAudio,
    options: RecordingOptions | None = None,
    *,
    on_progress: Progress | None = None,
) -> list[TimedWord]:
    """Every word of a recording, with times from its start. Raises like `recording_events`."""
    async with contextlib.aclosing(recording_events(engine, audio, options, on_progress=on_progress)) as events:
        return pair_words([event async for event in events])


async def recording_events(
    engine: Engine,
    audio: RecordingAudio,
    options: RecordingOptions | None = None,
    *,
    on_progress: Progress | None = None,
    in_flight: InFlight | None = None,
) -> AsyncGenerator[RecordingEvent, None]:
    """The words of a recording in order, each as soon as it is final. Close it (`contextlib.aclosing`) to free its slots.

    in_flight: shared by channels that are run at the same time; together they then take slots as one recording does.
    Raises EngineError, NoFreeSlot where no slot came free in time, and whatever iterating `audio` raises.
    """
    options = options or RecordingOptions()
    prefix = engine.info.prefix_silence_seconds if options.prefix_seconds is None else options.prefix_seconds
    run = _Run(engine, options, prefix, on_progress or _ignore, in_flight or InFlight())
    if isinstance(audio, AsyncIterator):
        generator = run.in_pieces(audio)
    elif engine.cuts_speech or options.cut is None:
        generator = run.whole(_in_threads(iter(audio)))
    else:
        generator = run.as_long_as_it_is(iter(audio), options.cut)
    async with contextlib.aclosing(generator) as events:
        async for event in events:
            yield event


def _ignore(seconds: float) -> None: ...


class _Run:
    """One recording under way."""

    def __init__(
        self, engine: Engine, options: RecordingOptions, prefix_seconds: float, on_progress: Progress, in_flight: InFlight
    ) -> None:
        self._engine = engine
        self._options = options
        self._prefix_seconds = prefix_seconds
        self._prefix = np.zeros(round(prefix_seconds * SAMPLE_RATE), np.float32)
        self._on_progress = on_progress
        self._in_flight = in_flight

    async def as_long_as_it_is(self, audio: Iterator[Pcm], rule: CutRule) -> AsyncGenerator[RecordingEvent, None]:
        """Whole or in pieces, by the length of its audio."""
        head: list[Pcm] = []
        samples = 0
        source = _in_threads(audio)
        while samples <= self._options.cut_from_seconds * SAMPLE_RATE and (pcm := await anext(source, None)) is not None:
            head.append(pcm)
            samples += len(pcm)
        if samples <= self._options.cut_from_seconds * SAMPLE_RATE:
            generator = self.whole(_of_list(head))
        else:
            await source.aclose()
            pieces = self._options.elsewhere()
            generator = self.in_pieces(_cut_in_threads(_chained(head, audio), rule) if pieces is None else pieces)
        async with contextlib.aclosing(generator) as events:
            async for event in events:
                yield event

    async def _open(self) -> Stream:
        """One more stream: at once where none of this recording runs, else when more than `keep_free` are free."""
        running = self._in_flight
        async with running.opening:
            stream = await self._engine.open_when_free(
                SLOT_WAIT_SECONDS if running.count else self._options.slot_wait_seconds,
                live=False,
                options=self._options.stream,
                keep_free=lambda: self._options.keep_free if running.count else 0,
            )
            running.count += 1
        return stream

    # ---- one stream --------------------------------------------------------------------------------------------------

    async def whole(self, audio: AsyncGenerator[Pcm, None]) -> AsyncGenerator[RecordingEvent, None]:
        """As one stream."""
        first = await anext(audio, None)  # no slot is taken for what cannot be decoded
        stream = await self._open()
        feeder = asyncio.create_task(self._feed(stream, first, audio))
        feeder.add_done_callback(lambda task: stream.close() if task.cancelled() or task.exception() is not None else None)
        try:
            async for event in stream:
                if (word := moved(event, -self._prefix_seconds)) is not None:
                    yield word
            await feeder
        finally:
            feeder.cancel()
            self._in_flight.count -= 1
            stream.close()
            await asyncio.gather(feeder, return_exceptions=True)
            await audio.aclose()
            del feeder  # its exception leads to this frame: only the cycle collector would free the two

    async def _feed(self, stream: Stream, first: Pcm | None, audio: AsyncGenerator[Pcm, None]) -> None:
        await stream.send(Audio(self._prefix))
        fed = told = 0
        pcm = first
        while pcm is not None:
            await stream.send(Audio(pcm))
            fed += len(pcm)
            done = max(told, fed - stream.pending_samples)
            self._on_progress((done - told) / SAMPLE_RATE)
            told = done
            pcm = await anext(audio, None)
        await stream.send(Finish())

    # ---- many streams ------------------------------------------------------------------------------------------------

    async def in_pieces(self, pieces: AsyncIterator[Piece]) -> AsyncGenerator[RecordingEvent, None]:
        """Each piece as a stream of its own. The events of a piece come when those of the next are there."""
        merger = WordMerger()
        running: deque[_PieceRun] = deque()
        reading: asyncio.Task[Piece | None] | None = asyncio.create_task(_next(pieces))
        try:
            while reading is not None or running:
                await _first_of(running[0].done if running else None, reading)
                if running and running[0].done.done():
                    for event in word_events(merger.add(running[0].piece.start, self._words(running[0]))):
                        yield event
                    running.popleft()
                if reading is not None and reading.done():
                    piece = reading.result()
                    reading = None
                    if piece is not None:
                        running.append(await self._start(piece))
                        reading = asyncio.create_task(_next(pieces))
            for event in word_events(merger.finish()):
                yield event
        finally:
            for run in running:
                run.end()
            if reading is not None:
                reading.cancel()
                await asyncio.gather(reading, return_exceptions=True)
                if not reading.cancelled() and reading.exception() is None and (piece := reading.result()) is not None:
                    piece.release()
                reading = None  # as above: its exception leads to this frame
            if isinstance(pieces, AsyncGenerator):
                await pieces.aclose()

    async def _start(self, piece: Piece) -> "_PieceRun":
        try:
            stream = await self._open()
        except BaseException:
            piece.release()
            raise
        return _PieceRun(stream, piece, self._prefix, self._has_ended)

    def _has_ended(self, piece: Piece) -> None:
        self._in_flight.count -= 1
        self._on_progress(max(0.0, min(piece.end, piece.offset + len(piece.pcm) / SAMPLE_RATE) - piece.start))

    def _words(self, run: "_PieceRun") -> list[TimedWord]:
        """A piece's words at their times in the recording."""
        shift = run.piece.offset - self._prefix_seconds
        return pair_words(word for event in run.done.result() if (word := moved(event, shift)) is not None)


class _PieceRun:
    """A piece as a stream: all of it in, its events out, by callbacks, so that thousands of them cost the event loop little."""

    def __init__(self, stream: Stream, piece: Piece, prefix: Pcm, on_end: Callable[[Piece], None]) -> None:
        """on_end: called once, just before the slot comes free."""
        self.piece = piece
        self.done: asyncio.Future[list[AnyEvent]] = asyncio.get_running_loop().create_future()
        """What the stream said to its end; its `Error` included."""
        self._loop = asyncio.get_running_loop()
        self._stream = stream
        self._commands: deque[Command] = deque([Audio(prefix), Audio(piece.pcm), Finish()])
        self._events: list[AnyEvent] = []
        self._on_end = on_end
        self._is_due = False
        stream.listen(self._on_news, self._on_news)
        self._on_news()

    def end(self) -> None:
        """Give back the slot and the piece's memory, whatever state the stream is in. Idempotent."""
        if not self._stream.closed:
            self._on_end(self.piece)
            self._stream.close()
            self.piece.release()
            self.done.cancel()

    def _on_news(self) -> None:
        """The stream may not be called from here. Nobody waits for the words of a piece before its end."""
        is_wanted = self._commands or self._stream.ended or not self._stream.writable
        if is_wanted and not self._is_due:
            self._is_due = True
            self._loop.call_soon(self._work)

    def _work(self) -> None:
        self._is_due = False
        stream = self._stream
        if stream.closed:
            return
        while self._commands:
            rest = stream.offer(self._commands[0])
            if rest is not None:
                self._commands[0] = rest
                break
            self._commands.popleft()
        self._events += stream.take()
        if stream.ended:
            self.done.set_result(self._events)
            self.end()


def moved(event: AnyEvent, by_seconds: float) -> RecordingEvent | None:
    """An event of words at another time; None for one of another kind. Raises EngineError for an `Error`."""
    if isinstance(event, Error):
        raise EngineError(event.message)
    if isinstance(event, Word):
        return Word(event.text, max(0.0, event.start_time + by_seconds), event.confidence) if by_seconds else event
    if isinstance(event, EndWord):
        return EndWord(max(0.0, event.stop_time + by_seconds)) if by_seconds else event
    if isinstance(event, Interim):
        return Interim(event.text, max(0.0, event.start_time + by_seconds))
    return None


# ---- audio from threads --------------------------------------------------------------------------------------------------


async def _in_threads(audio: Iterator[Pcm]) -> AsyncGenerator[Pcm, None]:
    """Some seconds at a time."""
    while len(pcm := await in_thread(lambda: _gather(audio))):
        yield pcm


async def _cut_in_threads(audio: Iterator[Pcm], rule: CutRule) -> AsyncGenerator[Piece, None]:
    pieces = cut_pieces(audio, rule)
    while (piece := await in_thread(lambda: next(pieces, None))) is not None:
        yield piece


async def _of_list(arrays: list[Pcm]) -> AsyncGenerator[Pcm, None]:
    for pcm in arrays:
        yield pcm


def _chained(head: list[Pcm], rest: Iterator[Pcm]) -> Iterator[Pcm]:
    yield from head
    yield from rest


async def _first_of(*futures: asyncio.Future[Any] | None) -> None:
    """Wait until one is done; None is no future."""
    await asyncio.wait([future for future in futures if future is not None], return_when=asyncio.FIRST_COMPLETED)


async def _next(pieces: AsyncIterator[Piece]) -> Piece | None:
    return await anext(pieces, None)


def _gather(audio: Iterator[Pcm]) -> Pcm:
    """About GATHERED_SAMPLES; empty at the end."""
    gathered: list[Pcm] = []
    size = 0
    while size < GATHERED_SAMPLES and (pcm := next(audio, None)) is not None:
        gathered.append(pcm)
        size += len(pcm)
    if len(gathered) == 1:
        return gathered[0]
    return np.concatenate(gathered) if gathered else np.zeros(0, np.float32)


async def in_thread(work: Callable[[], T]) -> T:
    """`work()` in a thread, to its end even when the caller is cancelled: it uses what the caller would close."""
    running = asyncio.get_running_loop().run_in_executor(None, work)
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        await asyncio.wait((running,))
        if not running.cancelled():
            running.exception()  # nobody is left whom it would concern
        raise
    finally:
        del running  # its exception leads to this frame: only the cycle collector would free the two
