"""The two interfaces everything hangs on: `Engine`, which admits streams, and `Backend`, which steps frames.

Knows nothing of sockets, encodings, or any model framework. Legend of axes for the whole project:
B row (a stream in this step), T frame, K codebook, H head, D dim, S sample.
"""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from moshi_stt.engine.stream import Stream
from moshi_stt.errors import EngineFailed


class StepOutput(NamedTuple):
    """What one step says of each of its rows.

    text_token: int64 (B,)        the token produced at this position (contract section 5.5)
    logprob:    float32 (B,)      natural-log probability of that token
    pause:      float32 (B, H)    pause probability per extra head; H = 0 where the model has none
    """

    text_token: NDArray[np.int64]
    logprob: NDArray[np.float32]
    pause: NDArray[np.float32]

    def rows(self, start: int, stop: int) -> "StepOutput":
        """Views of some rows."""
        return StepOutput(self.text_token[start:stop], self.logprob[start:stop], self.pause[start:stop])

    def put(self, rows: "StepOutput") -> None:
        """Copy rows over the first ones."""
        count = len(rows.text_token)
        self.text_token[:count], self.logprob[:count], self.pause[:count] = rows


class Backend(Protocol):
    """A frame-synchronous model with persistent state in numbered slots.

    All methods are called from one thread, the model thread. A row's output depends on its slot's own frames since its
    last `fresh` alone, never on the other rows.
    """

    slots: int
    """How many slots have state. Slot numbers are 0 .. slots - 1."""

    heads: int
    """Extra heads of the model; 0 means that its streams send no `Step`."""

    def step(self, pcm: NDArray[np.float32], slots: NDArray[np.int64], fresh: NDArray[np.bool_]) -> StepOutput:
        """Step each row once.

        pcm (B, 1920) float32 at 24 kHz; slots (B,) without repeats; fresh (B,): start that slot's state from zero first.
        Raises whatever the framework raises; the engine then counts as failed.
        """
        ...

    def copy(self, source: int, target: int) -> None:
        """Make slot `target`'s state what slot `source`'s is: convolution tails, K/V, positions, last token and codes.

        They go their own ways from there. It lets a marker be answered early without touching the stream's own state.
        """
        ...

    def warm_up(self) -> None:
        """Run what makes the first real step as fast as the later ones. Leaves every slot's state undefined until `fresh`."""
        ...

    def close(self) -> None:
        """Free the device's memory."""
        ...


class StepRecorder(Protocol):
    """Who keeps what went through a model, step by step. For the model thread; must return at once."""

    def start(self) -> None:
        """The model is warm: what is stepped from here on are streams."""
        ...

    def record(
        self, slots: NDArray[np.int64], fresh: NDArray[np.bool_], text: NDArray[np.int64], codes: NDArray[np.int64]
    ) -> None:
        """A step is done: its rows' slots and fresh (B,) as `Backend.step` took them, its tokens (B,) and codes (B, K)."""
        ...

    def stop(self) -> None:
        """No step follows. Idempotent."""
        ...


@runtime_checkable
class Ages(Protocol):
    """A backend whose steps take longer the more its streams have said."""

    def age(self) -> None:
        """Make every slot's stream one whose context is full, of anything. The state is undefined then."""
        ...


@runtime_checkable
class WarmsUpInParts(Protocol):
    """A backend that can serve before everything is as fast as it gets."""

    def begin_warm_up(self) -> None:
        """As `warm_up`, but for what `go_on_warming_up` does: steps of some numbers of rows may take as long as larger ones."""
        ...

    def go_on_warming_up(self) -> bool:
        """Do the next part, if it can be done now. Whether any are left. Takes about as long as a step of all rows."""
        ...


@runtime_checkable
class TimesSteps(Protocol):
    """A backend that knows how long its device worked on the last step."""

    @property
    def device_seconds(self) -> float | None:
        """None where there was no step yet."""
        ...


class StepInputs(NamedTuple):
    """What `Backend.step` takes. pcm float32 (B, 1920), slots int64 (B,), fresh bool (B,)."""

    pcm: NDArray[np.float32]
    slots: NDArray[np.int64]
    fresh: NDArray[np.bool_]

    def rows(self, start: int, stop: int) -> "StepInputs":
        """Views of some rows."""
        return StepInputs(self.pcm[start:stop], self.slots[start:stop], self.fresh[start:stop])

    def put(self, rows: "StepInputs", start: int = 0) -> None:
        """Copy rows over those from `start` on, but for what lies there already."""
        pairs: tuple[tuple[NDArray[Any], NDArray[Any]], ...] = (
            (rows.pcm, self.pcm),
            (rows.slots, self.slots),
            (rows.fresh, self.fresh),
        )
        for source, target in pairs:
            into = target[start : start + len(source)]
            if source.ctypes.data != into.ctypes.data:
                into[:] = source


@runtime_checkable
class TakesInPlace(Protocol):
    """A backend with arrays of its own, whose first rows a step takes without a copy on the host."""

    @property
    def inputs(self) -> StepInputs: ...


@dataclass(frozen=True)
class EngineInfo:
    """What an engine says of itself: printed at start, shown by `modules_info`, `/ready` and `moshi-stt status`."""

    kind: str
    """`batched_asr` or `embedded`."""

    model: str
    """Name or resolved path of the model."""

    audio_tokenizer: str
    """Resolved path of the audio tokenizer, empty where there is none."""

    languages: tuple[str, ...]
    device: str
    dtype: str
    total_slots: int
    prefix_silence_seconds: float = 0.0
    """Silence that a recording needs before its first sound. Clients of the native WebSocket send it themselves."""
    details: dict[str, str] = field(default_factory=dict)
    """More lines for the start-up log: measured step time, load time, real-time streams this means."""


class EngineObserver(Protocol):
    """Who counts. Methods may be called from any thread and must return at once."""

    def stepped(self, seconds: float, rows: int) -> None:
        """One model step (or one recogniser call) of `rows` streams took this wall time."""

    def lagged(self, seconds: float) -> None:
        """Time from the arrival of the last sample an event depends on to the event's delivery."""

    def opened(self) -> None:
        """A slot was taken."""

    def closed(self, steps: int) -> None:
        """A slot was freed after this many steps of its stream."""

    def refused(self) -> None:
        """An `open` found no free slot."""

    def failed(self) -> None:
        """A stream ended with an `Error`."""


class SilentObserver:
    """Counts nothing."""

    def stepped(self, seconds: float, rows: int) -> None: ...

    def lagged(self, seconds: float) -> None: ...

    def opened(self) -> None: ...

    def closed(self, steps: int) -> None: ...

    def refused(self) -> None: ...

    def failed(self) -> None: ...


@dataclass(frozen=True)
class StreamOptions:
    """The extra events that a client asked for. An engine makes them only for the streams that did."""

    interim: bool = False
    """`Interim`: the word or sentence that is not settled yet."""
    confidence: bool = False
    """`Word.confidence`."""
    turns: bool = False
    """`SpeechStarted`, `EndOfTurn`, `TurnResumed`."""
    warnings: bool = False
    """`Warning`."""


NO_EXTRAS: Final = StreamOptions()


class Engine(ABC):
    """Admits streams. All methods are called from the event loop's thread."""

    info: EngineInfo
    cuts_speech = False
    """Whether it cuts speech to utterances itself: a recording, however long, then goes through it as one stream."""

    def __init__(self, observer: EngineObserver | None = None) -> None:
        self.observer: EngineObserver = observer or SilentObserver()
        self._slot_freed = asyncio.Condition()
        self.waiting = 0
        """How many are in `open_when_free`."""
        self.failure: EngineFailed | None = None
        self._failed = asyncio.Event()

    @abstractmethod
    async def start(self) -> None:
        """Load and warm the model. Returns when the first step will be as fast as the later ones.

        Raises CheckpointError or EngineError naming what is wrong.
        """

    @abstractmethod
    async def stop(self) -> None:
        """End every stream with an `Error` (close code 1001), free the model, join the threads. Idempotent."""

    @abstractmethod
    def open(self, *, live: bool = True, options: StreamOptions = NO_EXTRAS) -> Stream:
        """Admit a stream: its first event is `Ready`.

        live: False for files; live streams have priority over them. options: what it says beyond the default.
        Raises NoFreeSlot, or EngineFailed after a failure.
        """

    @property
    @abstractmethod
    def ready(self) -> bool:
        """Whether the model is warm and not failed."""

    @property
    @abstractmethod
    def used_slots(self) -> int: ...

    @property
    @abstractmethod
    def queued_samples(self) -> int:
        """Samples received from all streams and not yet stepped."""

    @property
    def total_slots(self) -> int:
        return self.info.total_slots

    async def open_when_free(
        self,
        timeout_seconds: float,
        *,
        live: bool = False,
        options: StreamOptions = NO_EXTRAS,
        keep_free: Callable[[], int] = lambda: 0,
    ) -> Stream:
        """`open`, waiting up to timeout_seconds for a slot, and for as many more as `keep_free` says to be free.

        Raises NoFreeSlot when none came free, EngineFailed after a failure, also one that comes meanwhile. Who waits is counted
        as refused only when it waited in vain.
        """
        async with self._slot_freed:
            self.waiting += 1
            try:
                async with asyncio.timeout(timeout_seconds):
                    while self.ready and self.used_slots + keep_free() >= self.total_slots:
                        await self._slot_freed.wait()
            except TimeoutError:
                pass  # one last look
            finally:
                self.waiting -= 1
            return self.open(live=live, options=options)

    async def wait_failed(self) -> EngineFailed:
        """Return the failure when it comes; never returns while the engine is well."""
        await self._failed.wait()
        assert self.failure is not None
        return self.failure

    def _announce_free_slot(self) -> None:
        """Wake who waits in `open_when_free`. For subclasses, on the event loop's thread.

        All of them, in the order of their coming: one alone could be about to give up, and the slot would stay free.
        """

        async def notify() -> None:
            async with self._slot_freed:
                self._slot_freed.notify_all()

        task = asyncio.get_running_loop().create_task(notify())
        _background.add(task)
        task.add_done_callback(_background.discard)

    def _announce_failure(self, failure: EngineFailed) -> None:
        """Turn the engine red. For subclasses, on the event loop's thread."""
        if self.failure is None:
            self.failure = failure
            self._failed.set()
            self._announce_free_slot()  # there will be none: who waits for one is told so


_background: set[asyncio.Task[None]] = set()
