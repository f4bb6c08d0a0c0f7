"""One stream inside the segment engine, and the queue in which streams wait for a turn of a worker."""

import threading
import time
from collections import deque
from collections.abc import Iterator
from typing import Literal

from moshi_stt.constants import SAMPLE_RATE
from moshi_stt.engine.commands import Audio, Command, Mark, Reset
from moshi_stt.engine.segmenter import Segmenter
from moshi_stt.engine.stream import Stream
from moshi_stt.events import AnyEvent, Marker, Ready

TURN_SAMPLES = SAMPLE_RATE
"""Audio of one stream that is gone through in one turn, if no hypothesis comes before."""

FILE_TURN = 4
"""In every FILE_TURN-th turn a file goes first, so that live streams that fill the machine leave it some."""


class SegmentState:
    """A stream and its segmenter. A worker that has taken it from the queue is alone with it."""

    def __init__(self, stream: Stream, segmenter: Segmenter) -> None:
        self.stream = stream
        self.segmenter = segmenter
        self.commands: deque[Command] = deque()
        self.work: Iterator[list[AnyEvent]] | None = None
        self.command: Command | None = None
        """What `work` is going through; of long `Audio`, the piece."""
        self.arrived = 0.0
        """When the last sample, or the mark after it, came that the next event may depend on."""
        self.absorbed = 0.0
        self.turn: Literal["none", "queued", "running", "again"] = "none"
        """Whether it has one: in the queue, with a worker, or with a worker and due again. Belongs to the queue."""
        self.done = False

    def absorb(self) -> None:
        """Take what the client sent since the last turn."""
        self.absorbed = time.monotonic()
        self.commands.extend(self.stream.drain())

    def begin(self) -> bool:
        """Start on the next command. False when there is none."""
        if not self.commands:
            return False
        command = self.commands.popleft()
        if isinstance(command, Audio):
            self.arrived = self.absorbed if command.arrived is None else command.arrived
            piece = command.samples[:TURN_SAMPLES]
            if len(piece) < len(command.samples):
                self.commands.appendleft(Audio(command.samples[TURN_SAMPLES:], command.arrived))
            self.command = Audio(piece, command.arrived)
            self.work = self.segmenter.feed(piece)
        else:
            self.arrived = max(self.arrived, self.absorbed)
            self.command = command
            self.work = self.segmenter.flush()
        return True

    def end(self) -> tuple[int, list[AnyEvent]]:
        """The command is through: samples that left our hands, and what it is answered by."""
        command, self.command, self.work = self.command, None, None
        if isinstance(command, Audio):
            return len(command.samples), []
        if isinstance(command, Mark):
            return 0, [Marker(command.id)]
        if isinstance(command, Reset):
            self.segmenter.reset()
            return 0, [Ready()]
        self.done = True
        return 0, []


class TurnQueue:
    """Streams that have work, live ones before files, each at most once. Any thread."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._live: deque[SegmentState] = deque()
        self._files: deque[SegmentState] = deque()
        self._turns = 0
        self._closed = False

    def wake(self, state: SegmentState) -> None:
        """The stream has commands, or room for events again."""
        with self._changed:
            if state.turn == "none":
                self._append(state)
            elif state.turn == "running":
                state.turn = "again"

    def next(self) -> SegmentState | None:
        """The stream whose turn it is, waiting for one; None once the queue is closed."""
        with self._changed:
            while not (self._live or self._files or self._closed):
                self._changed.wait()
            if self._closed:
                return None
            self._turns += 1
            file_first = self._files and (not self._live or self._turns % FILE_TURN == 0)
            state = (self._files if file_first else self._live).popleft()
            state.turn = "running"
            return state

    def put_back(self, state: SegmentState, *, more: bool) -> None:
        """The turn is over. more: it wants another."""
        with self._changed:
            if more or state.turn == "again":
                self._append(state)
            else:
                state.turn = "none"

    def close(self) -> None:
        """There are no more turns: let the workers end, and let go of the streams that waited for one."""
        with self._changed:
            self._closed = True
            self._live.clear()
            self._files.clear()
            self._changed.notify_all()

    def _append(self, state: SegmentState) -> None:
        if self._closed:
            return
        state.turn = "queued"
        (self._live if state.stream.live else self._files).append(state)
        self._changed.notify()
