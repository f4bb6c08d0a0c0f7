"""Another family of streaming models through the engine: frames of 40 ms, no pause heads, tokens that are letters."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from copy import copy
from functools import partial
from typing import Self

import numpy as np
import pytest
from numpy.typing import NDArray
from tests.support.batch import feed_in_pieces, rest, until

from moshi_stt.constants import SAMPLE_RATE
from moshi_stt.engine.backend import StepOutput, WordEvent
from moshi_stt.engine.batch import BatchEngine
from moshi_stt.engine.commands import Audio, Finish, Mark, Reset
from moshi_stt.engine.engine import EngineInfo
from moshi_stt.engine.loaded import LoadedModel
from moshi_stt.engine.slots import spare_slots
from moshi_stt.events import AnyEvent, EndWord, Marker, Ready, Word

STREAMS = 3
DELAY = 2
FRAME = 960
FRAME_SECONDS = FRAME / SAMPLE_RATE
SPACE = 32


class LetterModel:
    """Says, two frames late, the letter whose code is in a frame's samples; silence is a space."""

    pause_heads = 0

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.heard = np.full((slots, DELAY + 1), SPACE)

    def step(self, pcm: NDArray[np.float32], slots: NDArray[np.int64], fresh: NDArray[np.bool_]) -> StepOutput:
        assert pcm.shape == (len(slots), FRAME)
        self.heard[slots[fresh]] = SPACE
        self.heard[slots] = np.roll(self.heard[slots], -1, axis=1)
        codes = np.rint(np.abs(pcm).max(axis=1) * 128).astype(int)
        self.heard[slots, -1] = np.where(codes == 0, SPACE, codes)
        rows = len(slots)
        return StepOutput(self.heard[slots, 0].astype(np.int64), np.zeros(rows, np.float32), np.zeros((rows, 0), np.float32))

    def copy(self, source: int, target: int) -> None:
        self.heard[target] = self.heard[source]

    def warm_up(self) -> None: ...

    def close(self) -> None: ...


class LetterWords:
    """Letters up to a space are a word."""

    def __init__(self, *, confidence: bool, interim: bool) -> None:
        self.steps = 0
        self._letters = ""
        self._start = 0.0
        self._emitted_to = 0.0

    @property
    def in_word(self) -> bool:
        return bool(self._letters)

    @property
    def settled(self) -> float:
        return self._start if self._letters else self._now

    @property
    def _now(self) -> float:
        return max(0, self.steps - DELAY) * FRAME_SECONDS

    def push(self, token: int, logprob: float) -> Sequence[WordEvent]:
        events: Sequence[WordEvent] = ()
        if token == SPACE:
            events = self.flush()
        else:
            if not self._letters:
                self._start = self._now
            self._letters += chr(token)
        self.steps += 1
        return events

    def flush(self) -> Sequence[WordEvent]:
        letters, self._letters = self._letters, ""
        if not letters or self._start < self._emitted_to:
            return ()
        self._emitted_to = self._now
        return (Word(letters, round(self._start, 3)), EndWord(round(self._now, 3)))

    def finish(self, audio_seconds: float) -> Sequence[WordEvent]:
        return self.flush()

    def restart(self, step: int) -> Sequence[WordEvent]:
        self.steps, self._letters = step, ""
        return ()

    def fork(self) -> Self:
        return copy(self)

    def join(self, fork: Self) -> None:
        self._emitted_to = fork._emitted_to


def spoken(text: str) -> NDArray[np.float32]:
    """A frame a letter."""
    codes = np.array([0 if letter == " " else ord(letter) for letter in text], np.float32)
    return np.repeat(codes / 128, FRAME).astype(np.float32)


@asynccontextmanager
async def engine() -> AsyncIterator[BatchEngine]:
    def load() -> LoadedModel:
        info = EngineInfo("letters", "letters", "", (), "none", "none", STREAMS)
        return LoadedModel(LetterModel(STREAMS + spare_slots(STREAMS)), LetterWords, info, STREAMS, DELAY, FRAME)

    made = BatchEngine(load, marker_wait_seconds=0.02)
    await made.start()
    try:
        yield made
    finally:
        await made.stop()


@pytest.mark.parametrize("size", [7, 959, 961, 1_920, 100_000])
async def test_any_chunking(size: int) -> None:
    pcm = spoken("one two  three")
    async with engine() as made:
        stream = made.open()
        await feed_in_pieces(stream, pcm, [size] * (len(pcm) // size))
        await stream.send(Finish())
        assert await rest(stream) == [
            Ready(),
            *(Word("one", 0.0), EndWord(0.12)),
            *(Word("two", 0.16), EndWord(0.28)),
            *(Word("three", 0.36), EndWord(0.56)),
        ]
        stream.close()


async def test_markers_and_resets() -> None:
    """A marker is answered on a copy, no word comes twice, and times start again after a reset."""
    async with engine() as made:
        stream = made.open()
        await stream.send(Audio(spoken("one two")))
        await stream.send(Mark(1))
        events = await until(stream, lambda e: Marker(1) in e)
        assert [e.text for e in events if isinstance(e, Word)] == ["one", "two"]
        await stream.send(Audio(spoken(" three    ")))
        await stream.send(Reset())
        await stream.send(Audio(spoken("four")))
        await stream.send(Finish())
        later: list[AnyEvent] = await rest(stream)
        assert later == [Word("three", 0.32), EndWord(0.52), Ready(), Word("four", 0.0), EndWord(0.16)]
        stream.close()


async def test_what_the_start_prints_counts_its_own_frames() -> None:
    async with engine() as made:
        assert made.info.details["real-time streams"] == "3 of 3 slots"


def test_new_words_can_be_a_partial() -> None:
    assert partial(LetterWords, confidence=False)(interim=False).steps == 0
