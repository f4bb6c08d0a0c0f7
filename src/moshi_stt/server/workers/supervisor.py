"""Starts the server's further processes, sees that they are at work, and starts those again that die.

Each has a Unix socket pair to this process (`ipc.py`) on which it says that it is ready, answers pings, sends its log lines and
is told to end. What a kind of process is for (carrying sockets, running a model) is its own pool's business: a subclass.
"""

import asyncio
import logging
import os
import socket
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Generic, TypeVar

from moshi_stt.server.doors.door import NewClient
from moshi_stt.server.resume import Place
from moshi_stt.server.workers import messages
from moshi_stt.server.workers.ipc import MessageSocket

log = logging.getLogger(__name__)

STOP_SECONDS = 5.0
"""How long one has to end before it is killed."""

PING_SECONDS = 0.25
"""How often each is asked whether it is at work."""

OWED_SECONDS = 1.0
"""One that has owed an answer for so long gets no further socket until it answers."""

HANG_SECONDS = 30.0
"""One that does not answer for so long is killed."""

FIRST_PAUSE_SECONDS = 1.0
LONGEST_PAUSE_SECONDS = 30.0
"""Between two starts of one that keeps dying."""

MOST_BACKLOG = 32
"""Messages that one has not read yet, beyond which it gets no further socket."""


class Child:
    """One process, and the socket to it. Started again, it is the same object."""

    most_backlog = MOST_BACKLOG

    def __init__(self, name: str) -> None:
        """name: for the log."""
        self.name = name
        self.process: asyncio.subprocess.Process | None = None
        self.channel: MessageSocket | None = None
        self.started_at = 0.0
        self.ready = asyncio.Event()
        self.failed = False
        """Whether an engine of it is of no use any more."""
        self.ended = asyncio.Event()
        """Whether the last `End` has been answered."""
        self.deaf = False
        """Whether it was not, in the time that it had."""
        self.pinged_at: float | None = None
        """Since when it has owed an answer to a ping."""
        self.pause = FIRST_PAUSE_SECONDS

    @property
    def takes(self) -> bool:
        """Whether it can be given a socket."""
        if self.pinged_at is not None and asyncio.get_running_loop().time() - self.pinged_at > OWED_SECONDS:
            return False
        return (
            self.ready.is_set() and not self.failed and self.channel is not None and self.channel.backlog <= self.most_backlog
        )

    @property
    def streams(self) -> int:
        """How many end if it dies."""
        return 0

    def send(self, message: Any, descriptors: Sequence[int] = ()) -> None:
        """Nothing happens where it is gone."""
        if self.channel is not None:
            self.channel.send(message, descriptors)


C = TypeVar("C", bound=Child)


class Supervisor(ABC, Generic[C]):
    """All processes of one kind. Used on the event loop alone."""

    program: str
    """The module that each runs."""
    kind: str
    """What they are called in the log."""
    stop_seconds = STOP_SECONDS

    def __init__(self, children: Sequence[C]) -> None:
        self._children = list(children)
        self._tasks: set[asyncio.Task[None]] = set()
        self._stopping = False

    def __len__(self) -> int:
        return len(self._children)

    # ---- what a subclass adds ----------------------------------------------------------------------------------------

    @abstractmethod
    def set_up(self, child: C) -> None:
        """A process runs: send it what it must know first. Raises OSError."""

    @abstractmethod
    def on_message(self, child: C, message: Any) -> None:
        """A message that is not one of every process."""

    @abstractmethod
    def hand_over(self, module: str, client: NewClient, transport: asyncio.Transport, on_gone: Callable[[], None]) -> bool:
        """Give a new client's socket to a process; whether it has gone. on_gone: told when its connection is gone."""

    @abstractmethod
    def hand_back(self, place: Place, client: NewClient, transport: asyncio.Transport) -> bool:
        """Give the socket of a client that comes back to the process that has its stream; whether it has gone."""

    def died(self, child: C) -> None:
        """A process has closed its socket: it ends, or has ended."""

    async def buried(self, child: C) -> None:
        """It is gone for certain: take back what it had. Then another is started."""

    def look(self) -> None:
        """Called about every HANG_SECONDS / 4."""

    @property
    def is_wanted(self) -> bool:
        """Whether a process that died is to be started again."""
        return True

    def environment(self, child: C) -> Mapping[str, str]:
        """Variables of its own."""
        return {}

    def arguments(self, child: C) -> Sequence[str]:
        """What its program is told besides the descriptor of its socket."""
        return ()

    # ---- starting ----------------------------------------------------------------------------------------------------

    async def spawn_all(self) -> None:
        """Start all. Raises OSError where one cannot be started at all."""
        await asyncio.gather(*(self._spawn(child) for child in self._children))
        self.begin(self._watch())

    async def _spawn(self, child: C) -> None:
        here, there = socket.socketpair()
        with there:
            try:
                child.process = await asyncio.create_subprocess_exec(
                    sys.executable,
                    "-P",  # no module of the folder that we happen to be in
                    "-m",
                    self.program,
                    str(there.fileno()),
                    *self.arguments(child),
                    stdin=asyncio.subprocess.DEVNULL,
                    pass_fds=[there.fileno()],
                    env={
                        **os.environ,
                        "PYTHONPATH": os.pathsep.join(path or str(Path.cwd()) for path in sys.path),
                        **self.environment(child),
                    },
                    start_new_session=True,  # Ctrl-C is ours: we end them in order
                )
            except BaseException:
                here.close()
                raise
        child.channel = MessageSocket(here, lambda message, _: self._on_message(child, message), lambda: self._on_closed(child))
        child.started_at = asyncio.get_running_loop().time()
        child.failed = child.deaf = False
        child.pinged_at = None
        try:
            self.set_up(child)
        except OSError:
            child.channel.close()  # which ends it
            raise

    def begin(self, work: Coroutine[Any, Any, None]) -> None:
        """Run as long as the pool does."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _on_message(self, child: C, message: Any) -> None:
        match message:
            case messages.Pong():
                child.pinged_at = None
            case messages.Ready():
                child.ready.set()
            case messages.Ended():
                child.ended.set()
            case messages.Logged():
                record = logging.makeLogRecord(message.record)
                logging.getLogger(record.name).handle(record)
            case _:
                self.on_message(child, message)

    # ---- watching ----------------------------------------------------------------------------------------------------

    async def _watch(self) -> None:
        """Kill a process that does not answer: its clients had better connect again."""
        now = asyncio.get_running_loop().time
        looked_at = now()
        while True:
            await asyncio.sleep(min(PING_SECONDS, HANG_SECONDS / 4))
            for child in self._children:
                if child.ready.is_set() and child.pinged_at is None:
                    child.pinged_at = now()
                    child.send(messages.Ping(), [])
                elif child.ready.is_set() and child.pinged_at is not None and now() - child.pinged_at > HANG_SECONDS:
                    log.error("%s %s has not answered for %g s; killing it", self.kind, child.name, HANG_SECONDS)
                    child.ready.clear()
                    self.kill(child)
            if now() - looked_at >= HANG_SECONDS / 4:
                looked_at = now()
                self.look()

    def kill(self, child: C) -> None:
        if child.process is not None:
            with suppress(ProcessLookupError):
                child.process.kill()

    def _on_closed(self, child: C) -> None:
        """A process has died, or ended as it was told."""
        child.ready.clear()
        child.ended.set()
        self.died(child)
        if not self._stopping:
            self.begin(self._replace(child))

    async def _replace(self, child: C) -> None:
        """Take back what a process had that is about to be gone, and start another."""
        await self.reap(child)
        assert child.process is not None
        log.error("%s %s ended with status %s and %d streams", self.kind, child.name, child.process.returncode, child.streams)
        await self.buried(child)
        if asyncio.get_running_loop().time() - child.started_at > 2 * LONGEST_PAUSE_SECONDS:
            child.pause = FIRST_PAUSE_SECONDS
        while not self._stopping:
            await asyncio.sleep(child.pause)
            child.pause = min(2 * child.pause, LONGEST_PAUSE_SECONDS)
            if not self.is_wanted:
                return
            try:
                await self._spawn(child)
                return
            except OSError as error:
                log.error("%s %s cannot be started, trying again: %s", self.kind, child.name, error)

    # ---- ending ------------------------------------------------------------------------------------------------------

    async def end(self, sentence: str, code: int, within_seconds: float) -> None:
        """End every connection of theirs with this Error and status; return when they are gone."""
        order = messages.End(sentence, code, within_seconds)
        await self._tell_all(order, within_seconds)

    async def drain(self, sentence: str, code: int, drain_seconds: float, within_seconds: float) -> None:
        """Let their live streams go on for a while, then let what they sent be transcribed; return when all are gone."""
        order = messages.Drain(sentence, code, drain_seconds, within_seconds)
        await self._tell_all(order, drain_seconds + within_seconds)

    async def _tell_all(self, order: messages.End | messages.Drain, within_seconds: float) -> None:
        asked = [child for child in self._children if child.ready.is_set() and not child.deaf]
        await asyncio.gather(*(self.tell(child, order, within_seconds) for child in asked))

    async def tell(self, child: C, order: messages.End | messages.Drain, within_seconds: float) -> None:
        """Send the order, and wait until no connection is left."""
        child.ended.clear()
        child.send(order, [])
        try:
            await asyncio.wait_for(child.ended.wait(), within_seconds + 4.0)
        except TimeoutError:
            child.deaf = True

    async def stop(self) -> None:
        """End the processes. Idempotent."""
        self._stopping = True
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for child in self._children:
            child.send(messages.Stop(), [])
        await asyncio.gather(*(self.reap(child) for child in self._children))
        for child in self._children:
            if child.channel is not None:
                child.channel.close()

    async def reap(self, child: C) -> None:
        """Wait until the process is gone; kill it where it takes too long."""
        process = child.process
        if process is None:
            return
        try:
            await asyncio.wait_for(process.wait(), self.stop_seconds)
        except TimeoutError:
            log.error("%s %s did not end within %g s; killing it", self.kind, child.name, self.stop_seconds)
            self.kill(child)
            await process.wait()


def sendable(transport: asyncio.Transport) -> socket.socket | None:
    """The socket of a transport that another process may take over; None where it is gone, or has still something to send."""
    sock: socket.socket | None = transport.get_extra_info("socket")
    return None if sock is None or transport.is_closing() or transport.get_write_buffer_size() else sock
