"""A whole recording through an engine, faster than real time. Knows engines by their interface alone, and no files.

A frame-synchronous engine gets a long recording in pieces that run on many slots at once; an engine that cuts speech to
utterances itself gets it as one stream.
"""

import asyncio
from collections.abc import Callable, Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from moshi_stt.audio.cut import CutRule, Piece, cut_pieces
from moshi_stt.constants import SAMPLE_RATE
from moshi_stt.engine.commands import Audio, Finish
from moshi_stt.engine.engine import Engine, StreamOptions
from moshi_stt.engine.stream import Stream
from moshi_stt.errors import EngineError
from moshi_stt.events import AnyEvent, EndWord, Error, Word
from moshi_stt.text.merge import merge_words
from moshi_stt.text.subtitles import TimedWord, pair_words

SLOT_WAIT_SECONDS = 3_600.0
"""Live streams go first; a recording waits."""

Progress = Callable[[float], None]
"""Called with the seconds of audio done since the last call."""


async def transcribe_recording(
    engine: Engine,
    audio: Iterable[NDArray[np.float32]],
    *,
    rule: CutRule | None = None,
    prefix_seconds: float = 0.0,
    on_progress: Progress | None = None,
) -> list[TimedWord]:
    """Every word of a decoded recording (float32 (S,) arrays, 24 kHz), with times from its start.

    audio is iterated in a thread, one piece ahead at most of what the engine takes.
    rule: how to cut; None runs it as one stream. prefix_seconds: silence put before each stream and taken out of the times.
    Raises EngineError, NoFreeSlot, and whatever iterating `audio` raises.
    """
    if rule is None:
        return await _transcribe_stream(engine, iter(audio), 0.0, prefix_seconds, on_progress)
    pieces = cut_pieces(audio, rule)
    free = asyncio.Semaphore(max(1, engine.total_slots))
    starts: list[float] = []
    tasks: list[asyncio.Task[list[TimedWord]]] = []
    try:
        async with asyncio.TaskGroup() as group:
            while True:
                await free.acquire()
                piece = await asyncio.to_thread(next, pieces, None)
                if piece is None:
                    break
                task = group.create_task(_transcribe_piece(engine, piece, prefix_seconds, on_progress))
                task.add_done_callback(lambda _: free.release())
                starts.append(piece.start)
                tasks.append(task)
    except ExceptionGroup as group_error:
        raise group_error.exceptions[0] from None
    return merge_words(starts, [task.result() for task in tasks])


async def _transcribe_piece(
    engine: Engine, piece: Piece, prefix_seconds: float, on_progress: Progress | None
) -> list[TimedWord]:
    words = await _transcribe_stream(engine, iter([piece.pcm]), piece.offset, prefix_seconds, None)
    if on_progress is not None:
        end = min(piece.end, piece.offset + len(piece.pcm) / SAMPLE_RATE)
        on_progress(max(0.0, end - piece.start))
    return words


async def _transcribe_stream(
    engine: Engine, audio: Iterator[NDArray[np.float32]], offset: float, prefix_seconds: float, on_progress: Progress | None
) -> list[TimedWord]:
    stream = await engine.open_when_free(SLOT_WAIT_SECONDS, live=False, options=StreamOptions(confidence=True))
    feeder = asyncio.create_task(_feed(stream, audio, prefix_seconds, on_progress))
    try:
        events = await _words_of(stream, feeder)
        await feeder
    finally:
        feeder.cancel()
        stream.close()
        await asyncio.gather(feeder, return_exceptions=True)
        del feeder  # its exception leads to this frame: only the cycle collector would free the two
    shift = offset - prefix_seconds
    return [word._replace(start=max(0.0, word.start + shift), end=max(0.0, word.end + shift)) for word in pair_words(events)]


async def _words_of(stream: Stream, feeder: "asyncio.Task[None]") -> list[AnyEvent]:
    """The stream's words until it ends. A feeder that fails ends it."""
    feeder.add_done_callback(lambda task: stream.close() if not task.cancelled() and task.exception() is not None else None)
    events: list[AnyEvent] = []
    async for event in stream:
        if isinstance(event, Error):
            raise EngineError(event.message)
        if isinstance(event, Word | EndWord):
            events.append(event)
    return events


async def _feed(
    stream: Stream, audio: Iterator[NDArray[np.float32]], prefix_seconds: float, on_progress: Progress | None
) -> None:
    await stream.send(Audio(np.zeros(round(prefix_seconds * SAMPLE_RATE), np.float32)))
    fed = told = 0
    while (pcm := await asyncio.to_thread(next, audio, None)) is not None:
        await stream.send(Audio(pcm))
        fed += len(pcm)
        done = max(told, fed - stream.pending_samples)
        if on_progress is not None:
            on_progress((done - told) / SAMPLE_RATE)
        told = done
    await stream.send(Finish())
