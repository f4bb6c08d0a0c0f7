"""What has ended is freed at once, by reference count: nothing waits for the cycle collector, which a server runs rarely."""

import asyncio
import gc
import logging
import weakref
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

import numpy as np
import pytest
from numpy.typing import NDArray
from tests.support.batch import DEADLINE, rest
from tests.support.engines import BatchKind, Kind, SegmentKind, speech
from tests.support.streams import some

from moshi_stt.audio.cut import CutRule
from moshi_stt.audio.framer import Framer
from moshi_stt.audio.resample import StreamingResampler
from moshi_stt.constants import SAMPLE_RATE
from moshi_stt.engine.commands import Audio, Finish, Mark, Reset
from moshi_stt.engine.engine import Engine
from moshi_stt.engine.recording import RecordingOptions, transcribe_recording
from moshi_stt.engine.segment_state import SegmentState
from moshi_stt.engine.segmenter import Segmenter
from moshi_stt.engine.stream import Stream
from moshi_stt.engine.stream_state import Flush, StreamState
from moshi_stt.errors import AudioError, EngineError
from moshi_stt.events import Error
from moshi_stt.text.words import WordAssembler

STREAMS = 60
"""Of each way to end."""
PARTS = (Stream, StreamState, Flush, Framer, WordAssembler, SegmentState, Segmenter, StreamingResampler)
SECOND = np.full(SAMPLE_RATE, 0.05, np.float32)


class Sounds:
    """Audio of which it is known whether it is still in memory."""

    def __init__(self) -> None:
        self._refs: list[weakref.ref[NDArray[np.float32]]] = []

    def new(self, pcm: NDArray[np.float32] = SECOND) -> NDArray[np.float32]:
        copy = pcm.copy()
        self._refs.append(weakref.ref(copy))
        return copy

    def alive(self) -> int:
        self._refs = [ref for ref in self._refs if ref() is not None]
        return len(self._refs)


def parts() -> Counter[str]:
    """The parts of streams that are in memory. By type: some objects of other packages warn when asked for their class."""
    return Counter(type(part).__name__ for part in gc.get_objects() if issubclass(type(part), PARTS))


@pytest.fixture(autouse=True)
def no_collector() -> Iterator[None]:
    """What there was before is set aside, so that looking for what is left takes no time."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@pytest.fixture(scope="module", autouse=True)
def thawed() -> Iterator[None]:
    yield
    gc.unfreeze()


@pytest.fixture(params=[BatchKind, SegmentKind], ids=["batch", "segment"])
def kind(request: pytest.FixtureRequest) -> Kind:
    made: Kind = request.param()
    return made


@pytest.fixture
async def engine(kind: Kind) -> AsyncIterator[Engine]:
    made = kind.make()
    await made.start()
    try:
        yield made
    finally:
        await made.stop()


@pytest.fixture
def sounds() -> Sounds:
    return Sounds()


async def assert_freed(sounds: Sounds, before: Counter[str]) -> None:
    """Nothing is left, as soon as the engine's threads have come to rest."""
    try:
        async with asyncio.timeout(DEADLINE):
            while sounds.alive() or parts() > before:  # noqa: ASYNC110 - no event tells that a thread has let go
                await asyncio.sleep(0.01)
    except TimeoutError:
        pytest.fail(f"left in memory: {dict(parts() - before)}, {sounds.alive()} pieces of audio")


async def close_at_once(engine: Engine, sounds: Sounds) -> None:
    stream = engine.open()
    await stream.send(Audio(sounds.new()))
    stream.close()


async def finish(engine: Engine, sounds: Sounds) -> None:
    stream = engine.open()
    await stream.send(Audio(sounds.new(speech([3, 9]))))
    await stream.send(Finish())
    assert await rest(stream)
    stream.close()


async def reset(engine: Engine, sounds: Sounds) -> None:
    stream = engine.open()
    await stream.send(Audio(sounds.new()))
    await stream.send(Reset())
    await stream.send(Audio(sounds.new()))
    stream.close()


async def flood(engine: Engine, sounds: Sounds) -> None:
    """More than the inbox takes, and a listener that hangs on the stream."""
    stream = engine.open()
    stream.listen(lambda: stream.pending_samples, lambda: stream.pending_samples)
    while stream.offer(Audio(sounds.new())) is None:
        pass
    stream.close()


async def mark(engine: Engine, sounds: Sounds) -> None:
    """Gone while the engine answers its mark on silence of its own."""
    stream = engine.open()
    await stream.send(Audio(sounds.new(speech([3]))))
    await stream.send(Mark(1))
    await some(stream)
    stream.close()


async def cancelled(engine: Engine, sounds: Sounds) -> None:
    """The tasks that feed and read are cancelled."""
    stream = engine.open()
    tasks = [asyncio.create_task(stream.send(Audio(sounds.new(np.tile(SECOND, 5))))), asyncio.create_task(rest(stream))]
    await some(stream)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    stream.close()


async def recording(engine: Engine, sounds: Sounds) -> None:
    assert await transcribe_recording(engine, iter([sounds.new(speech([3, 9]))]))


async def damaged_pieces(engine: Engine, sounds: Sounds) -> None:
    """The same where it is cut to pieces that run on several streams."""

    def pieces() -> Iterator[NDArray[np.float32]]:
        yield sounds.new(np.tile(SECOND, 20))
        raise AudioError("damaged")

    with pytest.raises(AudioError):
        await transcribe_recording(engine, pieces(), RecordingOptions(cut=CutRule(2.0, 4.0, 1.0, 0.5)))


async def damaged_recording(engine: Engine, sounds: Sounds) -> None:
    """Its decoder fails in the middle."""

    def pieces() -> Iterator[NDArray[np.float32]]:
        yield sounds.new()
        raise AudioError("damaged")

    with pytest.raises(AudioError):
        await transcribe_recording(engine, pieces())


@pytest.mark.parametrize(
    "way",
    [close_at_once, finish, reset, flood, mark, cancelled, recording, damaged_recording, damaged_pieces],
    ids=lambda way: way.__name__,
)
async def test_ended_streams_leave_nothing(
    engine: Engine, sounds: Sounds, way: Callable[[Engine, Sounds], Awaitable[None]]
) -> None:
    before = parts()
    for _ in range(STREAMS):
        await way(engine, sounds)
    await assert_freed(sounds, before)
    assert engine.used_slots == 0


@pytest.fixture
def no_log() -> Iterator[None]:
    """pytest keeps the records of a test, and with them the frames of their exceptions."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.usefixtures("no_log")
async def test_streams_of_a_broken_model_leave_nothing(kind: Kind, sounds: Sounds) -> None:
    before = parts()
    for _ in range(STREAMS // 10):
        await break_model(kind, sounds)
    await assert_freed(sounds, before)


async def break_model(kind: Kind, sounds: Sounds) -> None:
    """An engine whose model fails in the middle of all its streams."""
    engine = kind.make()
    await engine.start()
    streams = [engine.open() for _ in range(engine.total_slots)]
    kind.break_model()
    for stream in streams:
        await stream.send(Audio(sounds.new(speech([3, 9]))))
    ends = [(await rest(stream))[-1] for stream in streams]
    assert all(isinstance(end, Error) for end in ends)
    for stream in streams:
        stream.close()
    with pytest.raises(EngineError):
        engine.open()
    await engine.stop()
