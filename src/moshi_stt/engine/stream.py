"""One listener: commands go in on the event loop, a worker thread drains them, events come back. Knows no model and no socket.

Bounds, and what happens at them:

* inbox: `inbox_samples` of PCM in at most `inbox_pieces` pieces, counted until the engine has stepped them. A full inbox
  makes `feed` wait, so that its caller stops reading the socket; nothing is dropped.
* marks and resets: `unread_answers`, counted until their `Marker` or `Ready` has been read. Then `mark` and `reset` wait: a
  client that asks and never reads cannot fill the outbox with answers.
* outbox: `outbox_events`. From a quarter of it on, a `Step` directly behind a `Step` replaces it. A full outbox makes
  `writable` False, so that the engine stops stepping this stream (and its inbox fills). A reader that takes nothing for
  `stuck_seconds` while the outbox is full ends the stream with an `Error` (close code 1008).
"""

import asyncio
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from moshi_stt.constants import SAMPLE_RATE
from moshi_stt.errors import EngineError
from moshi_stt.events import AnyEvent, Error, Marker, Ready, Step


@dataclass(frozen=True)
class StreamLimits:
    """What one stream may hold."""

    inbox_samples: int = 20 * SAMPLE_RATE
    outbox_events: int = 1_024
    stuck_seconds: float = 30.0
    unread_answers: int = 1_024
    inbox_pieces: int = 16_384
    """More than there are in any audio that an engine waits for: a frame has 1,920 samples."""


class Pcm(NamedTuple):
    """samples: float32 (S,) at 24 kHz. arrived: time.monotonic() when they came."""

    samples: NDArray[np.float32]
    arrived: float


class Mark(NamedTuple):
    """To be answered by exactly one `Marker(id)`."""

    id: int


class Reset(NamedTuple):
    """Start the model state anew; to be answered by exactly one `Ready`."""


class Finish(NamedTuple):
    """No more audio: flush what is pending, then end."""


Command = Pcm | Mark | Reset | Finish

_ANSWERS = (Marker, Ready)


class Stream:
    """A stream of an engine. Made by `Engine.open`; the caller must `close` it.

    `feed`, `mark`, `reset`, `finish`, `close`, `take` and iteration belong to the event loop's thread, as do the forms that
    never wait (`offer`, `offer_mark`, `offer_reset`, `finish_now`, `take_now`, `listen`), with which a server of many streams
    does without a task for each. One task may feed while another reads; two that feed at once would mix their pieces.
    `drain`, `stepped`, `pending_samples` and `writable` belong to the engine's worker threads.
    """

    def __init__(
        self, limits: StreamLimits, *, live: bool, wake: Callable[[], None], release: Callable[["Stream"], None]
    ) -> None:
        """wake: tell the worker that there is something to do. release: give the slot back; called once, by `close`."""
        self.limits = limits
        self.live = live
        self._wake = wake
        self._release = release
        self._loop = asyncio.get_running_loop()
        self._lock = threading.Lock()
        self._commands: deque[Command] = deque()
        self._pending_samples = 0
        self._piece_sizes: deque[int] = deque()
        """Of the pieces that hold the pending samples."""
        self._unread_answers = 1  # the `Ready` that comes first
        self._room = asyncio.Event()
        self._room.set()
        self._on_events: Callable[[], None] | None = None
        self._on_room: Callable[[], None] | None = None
        self._outbox: deque[AnyEvent] = deque()
        self._arrived = asyncio.Event()
        self._finishing = False
        self._ended = False
        self.closed = False
        self._stuck_timer: asyncio.TimerHandle | None = None

    # ---- the caller's side -------------------------------------------------------------------------------------------

    async def feed(self, pcm: NDArray[np.float32]) -> None:
        """Append audio: float32 (S,), 24 kHz mono, any length, 0 included. Waits while the inbox is full.

        Returns without effect once the stream has ended by itself (its `Error` says why).
        Raises EngineError after `finish` or `close`.
        """
        arrived = time.monotonic()
        start = self.offer(pcm, arrived)
        while start < len(pcm):
            await self._room.wait()
            start += self.offer(pcm[start:], arrived)

    def offer(self, pcm: NDArray[np.float32], arrived: float | None = None) -> int:
        """Append as much of pcm as there is room for, now, and return how many samples that was.

        arrived: time.monotonic() when they came; None is now. Once the stream has ended by itself all are taken, to no effect.
        Raises EngineError after `finish` or `close`.
        """
        if pcm.dtype != np.float32 or pcm.ndim != 1:
            raise ValueError(f"feed takes float32 of one dimension, got {pcm.dtype} of shape {pcm.shape}")
        self._check_open("feed")
        wanted = len(pcm)
        if self._ended or not wanted:
            return wanted
        with self._lock:
            room = self.limits.inbox_samples - self._pending_samples
            taken = min(wanted, room) if len(self._piece_sizes) < self.limits.inbox_pieces else 0
            if taken:
                self._commands.append(Pcm(pcm[:taken], time.monotonic() if arrived is None else arrived))
                self._piece_sizes.append(taken)
                self._pending_samples += taken
            if taken < wanted:
                self._room.clear()
        if taken:
            self._wake()
        return taken

    async def mark(self, id: int) -> None:
        """Ask for `Marker(id)` when everything fed before this is transcribed. Waits while too many answers are unread."""
        while not self.offer_mark(id):
            await self._room.wait()

    def offer_mark(self, id: int) -> bool:
        """`mark`, unless too many answers are unread; returns whether it was done."""
        return self._ask("mark", Mark(id))

    async def reset(self) -> None:
        """Start the model state anew behind what was fed; answered by `Ready`. Waits while too many answers are unread."""
        while not self.offer_reset():
            await self._room.wait()

    def offer_reset(self) -> bool:
        """`reset`, unless too many answers are unread; returns whether it was done."""
        return self._ask("reset", Reset())

    def _ask(self, verb: str, command: Mark | Reset) -> bool:
        self._check_open(verb)
        if self._ended:
            return True
        if self._unread_answers >= self.limits.unread_answers:
            self._room.clear()
            return False
        self._unread_answers += 1
        with self._lock:
            self._commands.append(command)
        self._wake()
        return True

    async def finish(self) -> None:
        """No more audio. What is pending is transcribed, then iteration ends. Idempotent."""
        self.finish_now()

    def finish_now(self) -> None:
        """`finish`, which never waits."""
        if self._finishing or self._ended or self.closed:
            return
        self._finishing = True
        with self._lock:
            self._commands.append(Finish())
        self._wake()

    def close(self) -> None:
        """Free the slot at once, whatever state the stream is in. Pending audio and events are dropped. Idempotent."""
        if self.closed:
            return
        self.closed = True
        self._on_events = self._on_room = None
        self._end()
        self._outbox.clear()
        with self._lock:
            self._commands.clear()
            self._piece_sizes.clear()
            self._pending_samples = 0
        self._release(self)

    async def take(self) -> list[AnyEvent]:
        """Every event that is there, waiting for at least one. An empty list means that the stream has ended."""
        await self._events()
        return self.take_now()

    def take_now(self) -> list[AnyEvent]:
        """Every event that is there. Empty when there is none; `ended` says whether more can come."""
        was_full = not self.writable
        events = list(self._outbox)
        self._outbox.clear()
        self._has_read(events, was_full)
        return events

    def __aiter__(self) -> AsyncIterator[AnyEvent]:
        """Event by event to the end. Iteration may stop and start again: what was not reached stays."""
        return self

    async def __anext__(self) -> AnyEvent:
        await self._events()
        if not self._outbox:
            raise StopAsyncIteration
        was_full = not self.writable
        event = self._outbox.popleft()
        self._has_read((event,), was_full)
        return event

    async def _events(self) -> None:
        """Wait until there is an event, or the end."""
        while not self._outbox and not self._ended:
            self._arrived.clear()
            await self._arrived.wait()

    def _has_read(self, events: Sequence[AnyEvent], was_full: bool) -> None:
        if self._stuck_timer is not None:
            self._stuck_timer.cancel()
            self._stuck_timer = None
        if self._unread_answers:
            self._unread_answers -= min(self._unread_answers, sum(type(event) in _ANSWERS for event in events))
            if self._unread_answers < self.limits.unread_answers:
                self._announce_room()
        if was_full:
            self._wake()

    @property
    def ended(self) -> bool:
        """Whether nothing will be added to what `take_now` has."""
        return self._ended

    def listen(self, on_events: Callable[[], None], on_room: Callable[[], None]) -> None:
        """Be called back on the event loop instead of waiting.

        on_events: there is something for `take_now`, or the stream has ended. May be called more often than that.
        on_room: an `offer` that took less than everything may be repeated.
        Neither may raise, nor call the stream from inside.
        """
        self._on_events = on_events
        self._on_room = on_room

    # ---- the engine's side, any thread -------------------------------------------------------------------------------

    def drain(self) -> list[Command]:
        """Take every pending command, in order. The samples count as pending until `stepped`."""
        with self._lock:
            commands = list(self._commands)
            self._commands.clear()
        return commands

    @property
    def pending_samples(self) -> int:
        """Samples fed and not yet `stepped`."""
        return self._pending_samples

    @property
    def writable(self) -> bool:
        """Whether the outbox has room; where it has not, the engine leaves this stream's audio where it is."""
        return len(self._outbox) < self.limits.outbox_events

    def stepped(self, samples: int) -> None:
        """These many samples have left the engine's hands, the oldest first: make room for more."""
        with self._lock:
            left = min(samples, self._pending_samples)
            self._pending_samples -= left
            sizes = self._piece_sizes
            while left:
                if sizes[0] > left:
                    sizes[0] -= left
                    break
                left -= sizes.popleft()
            waiting = not self._room.is_set()
        if waiting:
            with suppress(RuntimeError):  # the loop is closed: nobody waits any more
                self._loop.call_soon_threadsafe(self._announce_room)

    # ---- the engine's side, event loop -------------------------------------------------------------------------------

    def deliver(self, events: Iterable[AnyEvent], *, ended: bool = False) -> None:
        """Put events into the outbox. After `close` or the end they are dropped. ended: nothing follows them."""
        if self._ended:
            return
        outbox = self._outbox
        merge_from = max(1, self.limits.outbox_events // 4)
        for event in events:
            if len(outbox) >= merge_from and type(event) is Step and type(outbox[-1]) is Step:
                outbox[-1] = event
            else:
                outbox.append(event)
        if ended:
            self._end()
        elif not self.writable and self._stuck_timer is None:
            self._stuck_timer = self._loop.call_later(self.limits.stuck_seconds, self._give_up)
        if outbox:
            self._arrived.set()
            if self._on_events is not None:
                self._on_events()

    def fail(self, message: str, close_code: int = 1011) -> None:
        """End the stream with an `Error`, behind what is already in the outbox."""
        self.deliver([Error(message, close_code)], ended=True)

    def _give_up(self) -> None:
        self._stuck_timer = None
        self._outbox.clear()
        self.fail(
            f"nothing was read for {self.limits.stuck_seconds:g} s while {self.limits.outbox_events} messages waited: "
            "read the socket while you write to it",
            1008,
        )

    def _end(self) -> None:
        self._ended = True
        if self._stuck_timer is not None:
            self._stuck_timer.cancel()
            self._stuck_timer = None
        self._arrived.set()
        if self._on_events is not None:
            self._on_events()
        self._announce_room()

    def _announce_room(self) -> None:
        if self._room.is_set():
            return
        self._room.set()
        if self._on_room is not None:
            self._on_room()

    def _check_open(self, verb: str) -> None:
        if self.closed or self._finishing:
            raise EngineError(f"cannot {verb}: the stream is {'closed' if self.closed else 'finished'}")


class Delivery(NamedTuple):
    """Events of one stream, on their way from a worker thread to the event loop."""

    stream: Stream
    events: Sequence[AnyEvent]
    ended: bool = False


def deliver_all(deliveries: Sequence[Delivery]) -> None:
    """Hand a whole step's events over in one turn of the event loop: `loop.call_soon_threadsafe(deliver_all, batch)`."""
    for stream, events, ended in deliveries:
        stream.deliver(events, ended=ended)
