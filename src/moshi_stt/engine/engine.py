"""`Engine`: what admits streams. The server, the command line and most tests need this, `Stream`, and nothing below."""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, Protocol

from moshi_stt.engine.stream import Stream
from moshi_stt.errors import EngineFailed


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
    """Receives an engine's metrics. Methods may be called from any thread and must return at once."""

    def stepped(self, seconds: float, rows: int) -> None:
        """One model step (or one recogniser call) of `rows` streams took this wall time."""

    def lagged(self, seconds: float) -> None:
        """Time from the arrival of the last sample that an event of a live stream depends on to the event's delivery."""

    def opened(self) -> None:
        """A slot was taken."""

    def closed(self, steps: int) -> None:
        """A slot was freed after this many steps of its stream."""

    def refused(self) -> None:
        """An `open` found no free slot."""

    def failed(self) -> None:
        """A stream ended with an `Error`."""

    def foreign(self) -> None:
        """A stream's speech does not sound like a language of the model. At most once a stream."""

    def restarted(self) -> None:
        """The model's state of a stream was reset, because it had stopped transcribing."""


class SilentObserver:
    """Counts nothing."""

    def stepped(self, seconds: float, rows: int) -> None: ...

    def lagged(self, seconds: float) -> None: ...

    def opened(self) -> None: ...

    def closed(self, steps: int) -> None: ...

    def refused(self) -> None: ...

    def failed(self) -> None: ...

    def foreign(self) -> None: ...
    def restarted(self) -> None: ...


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
