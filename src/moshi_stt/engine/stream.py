"""One stream of an engine: commands go in on the event loop, a worker thread drains them, events come back.

Bounds, and what happens at them:

* inbox: `inbox_samples` of PCM in at most `inbox_pieces` pieces, counted until the engine has stepped them. A full inbox
  makes `send` wait, so that its caller stops reading the socket; nothing is dropped.
* marks and resets: `unread_answers`, counted until their `Marker` or `Ready` has been read. Then `send` waits: a client that
  asks and never reads cannot fill the outbox with answers.
* outbox: `outbox_events`. From a quarter of it on, a `Step` directly after a `Step` replaces it. A full outbox makes
  `writable` False, so that the engine stops stepping this stream (and its inbox fills). A reader that takes nothing for
  `stuck_seconds` while the outbox is full ends the stream with an `Error` (close code 1008).
"""

import asyncio
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from moshi_stt.constants import SAMPLE_RATE
from moshi_stt.engine.commands import Audio, Command, Finish, Mark, Reset
from moshi_stt.errors import EngineError
from moshi_stt.events import AnyEvent, Error, Marker, Ready, Step

RECORDING_SAMPLES = 60 * SAMPLE_RATE
"""Longer than any piece that a long recording is cut to."""


@dataclass(frozen=True)
class StreamLimits:
    """What one stream may hold."""

    inbox_samples: int = 20 * SAMPLE_RATE
    outbox_events: int = 1_024
    stuck_seconds: float = 30.0
    unread_answers: int = 1_024
    inbox_pieces: int = 16_384
    """More than there are in any audio that an engine waits for: a frame has 1,920 samples."""

    @property
    def of_recordings(self) -> "StreamLimits":
        """Those of a stream of a file: a piece of it goes in at once, so that nobody is woken for each frame of it."""
        return replace(self, inbox_samples=max(self.inbox_samples, RECORDING_SAMPLES))


_ANSWERS = (Marker, Ready)


class Stream:
    """Made by `Engine.open`; the caller must `close` it.

    `offer`, `send`, `take`, iteration, `listen` and `close` belong to the event loop's thread. A server of many streams uses
    `offer`, `take` and `listen`, which never wait, and needs no task for each. One task may send while another reads; two that
    send at once would mix their pieces. `drain`, `stepped`, `pending_samples` and `writable` belong to the engine's threads.
    """

    def __init__(
        self,
        limits: StreamLimits,
        *,
        live: bool,
        wake: Callable[["Stream"], None],
        release: Callable[["Stream"], None],
    ) -> None:
        """wake: tell the worker that there is something to do. release: give the slot back; called once, by `close`.

        Both are given the stream rather than bound to it, so that no ring of references keeps a closed stream in memory.
        """
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

    def offer(self, command: Command) -> Command | None:
        """Take a command, as far as there is room for it now. Returns what did not fit, None when all was taken.

        Of `Audio` that is the rest of it, with its time of arrival; of `Mark` and `Reset`, while too many answers are unread,
        the command itself. `Finish` always fits and is idempotent. Once the stream has ended by itself everything is taken, to
        no effect: its `Error` says why it ended.
        Raises EngineError for any command but `Finish` after `Finish` or `close`, ValueError for audio of another type.
        """
        if type(command) is Audio:
            return self._offer_audio(command)
        if type(command) is Finish:
            self._finish(command)
            return None
        self._check_open(command)
        if self._ended:
            return None
        if self._unread_answers >= self.limits.unread_answers:
            self._room.clear()
            return command
        self._unread_answers += 1
        with self._lock:
            self._commands.append(command)
        self._wake(self)
        return None

    def _offer_audio(self, audio: Audio) -> Audio | None:
        samples = audio.samples
        if samples.dtype != np.float32 or samples.ndim != 1:
            raise ValueError(f"audio is float32 of one dimension, got {samples.dtype} of shape {samples.shape}")
        self._check_open(audio)
        wanted = len(samples)
        if self._ended or not wanted:
            return None
        if audio.arrived is None:
            audio = Audio(samples, time.monotonic())
        with self._lock:
            room = self.limits.inbox_samples - self._pending_samples
            taken = min(wanted, room) if len(self._piece_sizes) < self.limits.inbox_pieces else 0
            if taken:
                self._commands.append(audio if taken == wanted else Audio(samples[:taken], audio.arrived))
                self._piece_sizes.append(taken)
                self._pending_samples += taken
            if taken < wanted:
                self._room.clear()
        if taken:
            self._wake(self)
        return None if taken == wanted else Audio(samples[taken:], audio.arrived)

    def _finish(self, finish: Finish) -> None:
        if self._finishing or self._ended or self.closed:
            return
        self._finishing = True
        with self._lock:
            self._commands.append(finish)
        self._wake(self)

    async def send(self, command: Command) -> None:
        """`offer`, waiting for room until all is taken."""
        rest = self.offer(command)
        while rest is not None:
            await self._room.wait()
            rest = self.offer(rest)

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

    def take(self) -> list[AnyEvent]:
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
        while not self._outbox:
            if self._ended:
                raise StopAsyncIteration
            self._arrived.clear()
            await self._arrived.wait()
        was_full = not self.writable
        event = self._outbox.popleft()
        self._has_read((event,), was_full)
        return event

    def _has_read(self, events: Sequence[AnyEvent], was_full: bool) -> None:
        if self._stuck_timer is not None:
            self._stuck_timer.cancel()
            self._stuck_timer = None
        if self._unread_answers:
            self._unread_answers -= min(self._unread_answers, sum(type(event) in _ANSWERS for event in events))
            if self._unread_answers < self.limits.unread_answers:
                self._announce_room()
        if was_full:
            self._wake(self)

    @property
    def ended(self) -> bool:
        """Whether nothing will be added to what `take` gives."""
        return self._ended

    def listen(self, on_events: Callable[[], None], on_room: Callable[[], None]) -> None:
        """Be called back on the event loop instead of waiting.

        on_events: there is something for `take`, or the stream has ended. May be called more often than that.
        on_room: an `offer` that did not take everything may be repeated.
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
        """Samples taken and not yet `stepped`."""
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
        """End the stream with an `Error`, after what is already in the outbox."""
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

    def _check_open(self, command: Command) -> None:
        if self.closed or self._finishing:
            verb = {Audio: "feed", Mark: "mark", Reset: "reset"}.get(type(command), "finish")
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
