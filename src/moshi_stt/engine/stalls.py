"""The longest turn of a model thread, and why it took so long. No stream and no model is known here.

A turn longer than a frame makes every stream late at once, and is over before anybody can look. So what else happened during a
turn is noted while it runs (a few calls a turn), and is put into words for the turns that are worth it.
"""

import gc
import logging
import os
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from moshi_stt.constants import FRAME_SECONDS

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

log = logging.getLogger(__name__)

QUIET_SECONDS = 10.0
"""Between two lines about stalls."""


class Turn(NamedTuple):
    """A turn: its length, its rows, and what else went on."""

    seconds: float
    rows: int
    reason: str


class StallWatch:
    """Watches the turns of one thread. `begin`, `note` and `end` are called by that thread."""

    def __init__(self, device_seconds: Callable[[], float | None] = lambda: None) -> None:
        """To be made by the thread that is watched.

        device_seconds: how long the device worked on the last step, where that is known.
        """
        self.longest = Turn(0.0, 0, "")
        self._device_seconds = device_seconds
        self._begun = 0.0
        self._usage: Any = None
        self._queue = _Queue()
        self._queued = 0.0
        self._collecting_since: float | None = None
        self._collected = 0.0
        self._generations: list[int] = []
        self._notes: list[str] = []
        self._said_at = -QUIET_SECONDS
        gc.callbacks.append(self._collect)

    def close(self) -> None:
        """Watch no more, and say which turn was the longest."""
        if self._collect in gc.callbacks:
            gc.callbacks.remove(self._collect)
        self._queue.close()
        if self.longest.rows:
            log.info("the longest turn of the model thread: %s", described(self.longest))

    def begin(self) -> None:
        self._collected = 0.0
        self._generations.clear()
        self._notes.clear()
        self._usage = _usage()
        self._queued = self._queue.seconds()
        self._begun = time.monotonic()

    def note(self, what: str) -> None:
        """Something that this turn did besides stepping rows."""
        self._notes.append(what)

    def end(self, rows: int, step_seconds: float = 0.0) -> None:
        """The turn is over. step_seconds: of it, in the backend's step."""
        seconds = time.monotonic() - self._begun
        is_late = seconds > FRAME_SECONDS
        if not is_late and (seconds <= self.longest.seconds or not rows):
            return
        turn = Turn(seconds, rows, self._reason(seconds, step_seconds))
        if seconds > self.longest.seconds:
            self.longest = turn
        if is_late and self._begun - self._said_at > QUIET_SECONDS:
            self._said_at = self._begun
            log.warning("a turn of the model thread took longer than a frame: %s", described(turn))

    def _reason(self, seconds: float, step_seconds: float) -> str:
        parts = list(self._notes)
        if self._collected > 0.1 * seconds:
            parts.append(
                f"Python's garbage collector (generation {max(self._generations)}) took {1e3 * self._collected:.0f} ms"
            )
        device = self._device_seconds()
        if device is not None:
            parts.append(f"the device worked {1e3 * device:.0f} ms of the step's {1e3 * step_seconds:.0f} ms")
        elif step_seconds:
            parts.append(f"the step took {1e3 * step_seconds:.0f} ms")
        if (queued := self._queue.seconds() - self._queued) > 0.1 * seconds:
            parts.append(f"the thread waited {1e3 * queued:.0f} ms for a processor")
        now = _usage()
        if now is not None and self._usage is not None:
            if (switches := now.ru_nivcsw - self._usage.ru_nivcsw) > 0:
                parts.append(f"the thread lost its processor {switches} times")
            if (faults := now.ru_majflt - self._usage.ru_majflt) > 0:
                parts.append(f"{faults} pages were read from disk")
        return ", ".join(parts)

    def _collect(self, phase: str, info: dict[str, int]) -> None:
        """Called by Python before and after each collection, by whichever thread has it; the others stand still meanwhile."""
        if phase == "start":
            self._collecting_since = time.monotonic()
        elif self._collecting_since is not None:
            self._collected += time.monotonic() - max(self._collecting_since, self._begun)
            self._generations.append(info["generation"])
            self._collecting_since = None


class _Queue:
    """How long the thread that made this was ready to run while others had the processors. Linux counts that; elsewhere 0."""

    def __init__(self) -> None:
        try:
            self._file: int | None = os.open("/proc/thread-self/schedstat", os.O_RDONLY)
        except OSError:
            self._file = None

    def seconds(self) -> float:
        if self._file is None:
            return 0.0
        try:
            return int(os.pread(self._file, 96, 0).split()[1]) / 1e9
        except (OSError, IndexError, ValueError):  # a kernel that does not count
            return 0.0

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None


def described(turn: Turn) -> str:
    rows = f"{turn.rows} row{'s' if turn.rows != 1 else ''}"
    return f"{1e3 * turn.seconds:.1f} ms of {rows}: {turn.reason or 'no reason seen'}"


def _usage() -> Any:
    """What the system counts of this thread; None where it does not."""
    if resource is None or not hasattr(resource, "RUSAGE_THREAD"):
        return None
    return resource.getrusage(resource.RUSAGE_THREAD)
