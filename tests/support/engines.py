"""One suite, every engine: how to make each, and what each must hear in a recording. Knows no socket.

Two engines hear the language of `level_speech`, in which it is known what was said. The others run a real model with random
weights; what those must hear is what the bare backend says of the same frames, stepped one by one, without an engine.
"""

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tests.support.checkpoints import Checkpoint, module
from tests.support.level_speech import LevelRecogniser, pause, say
from tests.support.scripted_backend import FakeBackend, LevelModel, loader, spell, spell_level

from moshi_stt.config import KyutaiModule
from moshi_stt.config_load import parse_config
from moshi_stt.constants import FRAME_SAMPLES, SAMPLE_RATE
from moshi_stt.engine.backend import Backend, StepOutput
from moshi_stt.engine.batch import BatchEngine
from moshi_stt.engine.engine import Engine, EngineInfo
from moshi_stt.engine.loaded import LoadedModel
from moshi_stt.engine.segment import SegmentEngine
from moshi_stt.engine.slots import spare_slots
from moshi_stt.engine.stream import StreamLimits
from moshi_stt.engine.stream_state import HOLD_FRAMES
from moshi_stt.events import AnyEvent
from moshi_stt.models.spec_tables import spec_from_module
from moshi_stt.text.subtitles import TimedWord, pair_words
from moshi_stt.text.words import PAD, WordAssembler

STREAMS = 3
DELAY = 6
GAP = 0.24
"""Three frames of silence between words."""
SETTLED = FRAME_SAMPLES * (DELAY + 1 + HOLD_FRAMES) / SAMPLE_RATE
"""Silence after which a batch engine's early answer to a marker has heard nothing that the stream itself will not hear."""

LIMITS = StreamLimits(inbox_samples=3 * SAMPLE_RATE)


def speech(numbers: Sequence[int]) -> NDArray[np.float32]:
    """These words and half a second, in whole frames."""
    pcm = np.concatenate([say(numbers, gap=GAP), pause(0.5)])
    return np.pad(pcm, (0, -len(pcm) % FRAME_SAMPLES))


class Kind(ABC):
    """A kind of engine."""

    exact = False
    """Whether times are known to the frame; else a word starts within 0.25 s of where it was said."""

    @abstractmethod
    def make(self) -> Engine:
        """A new engine, not started, of STREAMS streams."""

    @abstractmethod
    def words(self, pcm: NDArray[np.float32]) -> list[TimedWord]:
        """What a stream of this audio alone must hear."""

    @abstractmethod
    def break_model(self) -> None:
        """Let whatever the newest engine's model does next raise."""

    def texts(self, pcm: NDArray[np.float32]) -> list[str]:
        return [word.text for word in self.words(pcm)]


class LevelKind(Kind):
    """Reads the levels off, as the models of this language do."""

    def words(self, pcm: NDArray[np.float32]) -> list[TimedWord]:
        levels = np.rint(np.abs(pcm) * 100).astype(int)
        edges = np.flatnonzero(np.diff(levels, prepend=0, append=0))
        return [
            TimedWord(f"w{levels[start]}.", start / SAMPLE_RATE, stop / SAMPLE_RATE)
            for start, stop in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True)
        ]


class BatchKind(LevelKind):
    def make(self) -> Engine:
        def model(slots: int) -> FakeBackend:
            self.model = LevelModel(slots)
            return self.model

        load = loader(model, STREAMS, spell_level, delay=DELAY)
        return BatchEngine(load, limits=LIMITS, marker_wait_seconds=0.05)

    def break_model(self) -> None:
        self.model.raise_next = True


class SegmentKind(LevelKind):
    def make(self) -> Engine:
        self.model = LevelRecogniser()
        return SegmentEngine(lambda: self.model, slots=STREAMS, threads=2, limits=LIMITS)

    def break_model(self) -> None:
        self.model.broken = True


class Window:
    """A real backend seen through a window: so many slots of it, and every odd token as padding.

    Random weights babble; so they say words of a piece or two. What the model itself hears of its tokens stays as it is.
    """

    def __init__(self, backend: Backend, slots: int, lock: threading.Lock, *, keep: bool) -> None:
        """lock: held while the backend is stepped. keep: leave the model loaded at `close`, for the next engine."""
        self.backend = backend
        self.slots = slots
        self.pause_heads = backend.pause_heads
        self.broken = False
        self._lock = lock
        self._keep = keep

    def step(self, pcm: NDArray[np.float32], slots: NDArray[np.int64], fresh: NDArray[np.bool_]) -> StepOutput:
        if self.broken:
            raise RuntimeError("device-side assert triggered")
        with self._lock:
            output = self.backend.step(pcm, slots, fresh)
        tokens = output.text_token
        return output._replace(text_token=np.where(tokens % 2 == 1, PAD, tokens))

    def copy(self, source: int, target: int) -> None:
        with self._lock:
            self.backend.copy(source, target)

    def warm_up(self) -> None:
        with self._lock:
            self.backend.warm_up()

    def close(self) -> None:
        if not self._keep:
            self.backend.close()


class ModelKind(Kind):
    """A real model, loaded by `load(slots)`."""

    exact = True

    def __init__(self, load: Callable[[int], Backend], decode: Callable[[Sequence[int]], str], *, keep: bool) -> None:
        """keep: one backend serves every engine; else each engine loads its own, on its own thread."""
        self._load = load
        self._decode = decode
        self._keep = keep
        self._slots = STREAMS + spare_slots(STREAMS)
        self._own = load(self._slots + 1)
        """Its last slot is for `words`."""
        self._lock = threading.Lock()
        """The engine's thread and the test's step it by turns."""
        self._newest: Window | None = None
        self._known: dict[bytes, list[TimedWord]] = {}

    def make(self) -> Engine:
        def load() -> LoadedModel:
            backend = self._own if self._keep else self._load(self._slots)
            lock = self._lock if self._keep else threading.Lock()
            self._newest = window = Window(backend, self._slots, lock, keep=self._keep)
            info = EngineInfo("batched_asr", "random", "", (), "cpu", "f32", STREAMS)
            return LoadedModel(window, partial(WordAssembler, self._decode, DELAY), info, STREAMS, DELAY)

        return BatchEngine(load, limits=LIMITS, marker_wait_seconds=0.4)

    def words(self, pcm: NDArray[np.float32]) -> list[TimedWord]:
        """Frame by frame, then silence until the delay is over, and with it the word under way."""
        if not len(pcm):
            return []
        sound = pcm.tobytes()
        if sound not in self._known:
            self._known[sound] = self._step(pcm)
        return self._known[sound]

    def _step(self, pcm: NDArray[np.float32]) -> list[TimedWord]:
        window = Window(self._own, self._slots + 1, self._lock, keep=True)
        assembler = WordAssembler(self._decode, DELAY)
        last = -(-len(pcm) // FRAME_SAMPLES) + DELAY + 1
        padded = np.pad(pcm, (0, (last + HOLD_FRAMES) * FRAME_SAMPLES - len(pcm)))
        events: list[AnyEvent] = []
        for step, frame in enumerate(padded.reshape(-1, 1, FRAME_SAMPLES), 1):
            output = window.step(frame, np.array([self._slots]), np.array([step == 1]))
            events += assembler.push(int(output.text_token[0]), float(output.logprob[0]))
            if step >= last and not assembler.in_word:
                break
        return pair_words([*events, *assembler.finish(len(pcm) / SAMPLE_RATE)])

    def break_model(self) -> None:
        assert self._newest is not None
        self._newest.broken = True


def torch_kind(tiny: Path) -> Kind:
    """The checkpoint of the recorded sessions by PyTorch on the CPU, loaded once."""
    from moshi_stt.models.torch_impl.build import load_backend
    from moshi_stt.text.tokenizer import TextTokenizer

    text = (tiny / "moshi-server.toml").read_text() + "[modules.asr.moshi_stt]\nfixed_shapes = true\n"
    configured = parse_config(text, "tiny").config.modules[0]
    assert isinstance(configured, KyutaiModule)
    files = Path(configured.lm_model_file), Path(configured.audio_tokenizer_file)
    load = partial(load_backend, configured, *files, spec_from_module(configured), device="cpu")
    return ModelKind(load, TextTokenizer(Path(configured.text_tokenizer_file)).decode, keep=True)


def mlx_kind(small: Checkpoint) -> Kind:
    """A small model by MLX, which wants to be stepped by the thread that loaded it."""
    from moshi_stt.models.mlx_impl.build import load_backend

    load = partial(load_backend, module(engine_fixed_shapes=True), small.lm_file, small.mimi_file, small.spec, device="cpu")
    return ModelKind(load, spell, keep=False)
