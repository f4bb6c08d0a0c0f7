"""Backends without a model: tokens from a list, or a function of the stream's own audio. Knows no engine and no socket."""

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from moshi_stt.constants import FRAME_SAMPLES
from moshi_stt.engine.backend import StepOutput
from moshi_stt.engine.engine import EngineInfo
from moshi_stt.engine.loaded import LoadedModel
from moshi_stt.engine.slots import spare_slots
from moshi_stt.text.words import WordAssembler


class FakeBackend(ABC):
    """Slots with a position and a hash of the frames they heard. Checks what the engine promises; steps can fail or hang.

    Set at any time: raise_next, the next step raises; hang_next, the next step waits for `resume`; step_seconds, each sleeps.
    """

    def __init__(self, slots: int, heads: int = 4) -> None:
        self.slots = slots
        self.pause_heads = heads
        self.position = np.zeros(slots, np.int64)
        self.heard = np.zeros(slots, np.int64)
        self.raise_next = self.hang_next = self.is_hanging = False
        self.resume = threading.Event()
        self.steps = 0
        self.rows: list[int] = []
        self.closed = False
        self.step_seconds = 0.0
        self._thread: int | None = None

    def warm_up(self) -> None:
        self._check_thread()

    def close(self) -> None:
        self._check_thread()
        self.closed = True

    def copy(self, source: int, target: int) -> None:
        self._check_thread()
        self.position[target] = self.position[source]
        self.heard[target] = self.heard[source]

    def step(self, pcm: NDArray[np.float32], slots: NDArray[np.int64], fresh: NDArray[np.bool_]) -> StepOutput:
        self._check_thread()
        assert pcm.shape == (len(slots), FRAME_SAMPLES)
        assert pcm.dtype == np.float32
        assert len(set(slots.tolist())) == len(slots) == len(fresh)
        self.steps += 1
        self.rows.append(len(slots))
        if self.raise_next:
            raise RuntimeError("device-side assert triggered")
        if self.hang_next:
            self.is_hanging = True
            self.resume.wait(120)
            self.is_hanging = False
        if self.step_seconds:
            time.sleep(self.step_seconds)
        self.position[slots[fresh]] = 0
        self.heard[slots[fresh]] = 1
        sums = np.frombuffer(np.ascontiguousarray(pcm).tobytes(), np.uint32).reshape(len(slots), -1).sum(1, dtype=np.int64)
        self.heard[slots] = (self.heard[slots] * 1_000_003 + sums + 12_345) % (1 << 40)
        self.position[slots] += 1
        tokens = np.asarray(self.tokens(slots), np.int64)
        noise = (self.heard[slots, None] >> (8 * np.arange(self.pause_heads))) & 255
        return StepOutput(tokens, (-1 - tokens % 7).astype(np.float32) / 4, (noise / 256).astype(np.float32))

    @abstractmethod
    def tokens(self, slots: NDArray[np.int64]) -> Sequence[int] | NDArray[np.int64]:
        """The next token of each slot, (B,)."""

    def _check_thread(self) -> None:
        """All methods are called from one thread."""
        self._thread = self._thread or threading.get_ident()
        assert self._thread == threading.get_ident()


class PseudoModel(FakeBackend):
    """Tokens are a function of the stream's own frames and their order. About half padding, an eighth boundaries."""

    def tokens(self, slots: NDArray[np.int64]) -> NDArray[np.int64]:
        draw = (self.heard[slots] >> 7) % 16
        return np.where(draw < 8, 3, np.where(draw < 10, 0, 4 + (self.heard[slots] >> 13) % 60))


class Scripted(FakeBackend):
    """The same tokens, and pauses if given, for every stream, from its first frame on; padding behind the list."""

    def __init__(
        self, slots: int, script: Sequence[int], heads: int = 4, pauses: Sequence[Sequence[float]] | None = None
    ) -> None:
        super().__init__(slots, heads)
        self.script = list(script)
        self.pauses = pauses

    def tokens(self, slots: NDArray[np.int64]) -> list[int]:
        return [self.script[p - 1] if p <= len(self.script) else 3 for p in self.position[slots].tolist()]

    def step(self, pcm: NDArray[np.float32], slots: NDArray[np.int64], fresh: NDArray[np.bool_]) -> StepOutput:
        output = super().step(pcm, slots, fresh)
        if self.pauses is None:
            return output
        known = [self.pauses[min(p, len(self.pauses)) - 1] for p in self.position[slots].tolist()]
        return output._replace(pause=np.asarray(known, np.float32))


def spell(ids: Sequence[int]) -> str:
    """A word's text that shows its ids: `spell([5, 6])` is "5.6"."""
    return ".".join(map(str, ids))


def loader(
    make: Callable[[int], FakeBackend],
    streams: int,
    decode: Callable[[Sequence[int]], str] = spell,
    processes: int = 0,
    delay: int = 6,
) -> Callable[[], LoadedModel]:
    """A loader for `BatchEngine` around `make(slots)`."""

    def load() -> LoadedModel:
        backend = make(streams + spare_slots(streams, processes))
        info = EngineInfo("batched_asr", "scripted", "", ("en",), "none", "float32", streams)
        return LoadedModel(backend, partial(WordAssembler, decode, delay), info, streams, delay, processes=processes)

    return load


class LevelModel(FakeBackend):
    """Hears the language of `level_speech` frame by frame, as Kyutai's models hear theirs: a boundary, then a word's one piece.

    A word that starts in frame f has its boundary at step f + delay + 1: a frame is heard one step late. The levels of the last
    frames are a slot's state. Silence of a whole frame must lie between two words.
    """

    def __init__(self, slots: int, heads: int = 4, delay: int = 6) -> None:
        super().__init__(slots, heads)
        self.levels = np.zeros((slots, delay + 2), np.int64)  # newest last

    def copy(self, source: int, target: int) -> None:
        super().copy(source, target)
        self.levels[target] = self.levels[source]

    def step(self, pcm: NDArray[np.float32], slots: NDArray[np.int64], fresh: NDArray[np.bool_]) -> StepOutput:
        self.levels[slots[fresh]] = 0
        output = super().step(pcm, slots, fresh)
        self.levels[slots] = np.roll(self.levels[slots], -1, axis=1)
        self.levels[slots, -1] = np.rint(np.abs(pcm).max(axis=1) * 100)
        return output

    def tokens(self, slots: NDArray[np.int64]) -> NDArray[np.int64]:
        """Of the frames before this one: its own levels come after."""
        before, first, second = self.levels[slots, 0], self.levels[slots, 1], self.levels[slots, 2]
        starts, goes_on = (before == 0) & (first > 0), (first == 0) & (second > 0)
        return np.where(starts, first + 10, np.where(goes_on, 0, 3))


def spell_level(ids: Sequence[int]) -> str:
    """As the recogniser of `level_speech` writes its words."""
    return " ".join(f"w{piece - 10}." for piece in ids)
