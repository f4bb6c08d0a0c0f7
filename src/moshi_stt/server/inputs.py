"""From a client's messages to commands for its streams: in order, each as soon as there is room, nothing in between lost."""

import asyncio
from collections.abc import Callable, Iterable, Iterator
from typing import Final

from moshi_stt.constants import SAMPLE_RATE
from moshi_stt.engine.commands import Audio
from moshi_stt.errors import ProtocolError
from moshi_stt.server.framing import Violation
from moshi_stt.server.resume import Again
from moshi_stt.server.spool import Backlog
from moshi_stt.session import Action, Feed, Message, Session

ASIDE_BYTES = 256 << 10
"""Messages beyond this are decoded in a thread, so that the other connections do not wait."""

TURN_SAMPLES = 4 * SAMPLE_RATE
"""Audio that one message may yield before the other connections have a turn."""


class EndOfInput:
    """Stands after the last message."""


END_OF_INPUT: Final = EndOfInput()

Request = Action | Again
"""What a connection carries out."""

Item = Message | Violation | EndOfInput | Iterable[Request]


def _nothing(*_: object) -> None: ...


def _refuse(action: Request) -> Request | None:
    return None


class InputQueue:
    """What a connection has read and not yet given to its streams, in a bounded backlog.

    `put` and `resume` raise what the session or a stream raises (ProtocolError also for a `Violation`); the caller then
    calls `clear`.
    """

    def __init__(
        self,
        session: Session,
        act: Callable[[Request], Request | None],
        again: Callable[[], None],
        failed: Callable[[BaseException], None],
        backlog: "Backlog[Item] | None" = None,
    ) -> None:
        """backlog: where items wait. act: carry out an action; returns what found no room. again: call `resume` soon.
        failed: work in a thread failed.
        """
        self._session = session
        self._act = act
        self._again = again
        self._failed = failed
        self._items: Backlog[Item] = Backlog(0, None) if backlog is None else backlog
        self._rest: Request | None = None
        """The action that found no room."""
        self._actions: Iterator[Request] = iter(())
        """What follows it of the latest message."""
        self._work: asyncio.Future[Iterable[Action]] | None = None
        """A message that a thread decodes."""
        self._ending = False
        self.blocked = False
        """Whether what comes now has to wait."""
        self.ended = False
        """Whether everything up to the end of input has been given to the streams."""
        self.was_active = True
        """Whether a message asked for something, or was binary. The reader sets it back."""

    @property
    def in_thread(self) -> bool:
        """Whether the session is at work in a thread, and must be left alone."""
        return self._work is not None

    @property
    def waiting_bytes(self) -> int:
        """Bytes held in memory."""
        rest = self._rest.command if type(self._rest) is Feed else self._rest
        return self._items.memory_bytes + (rest.samples.nbytes if type(rest) is Audio else 0)

    @property
    def spooled_bytes(self) -> int:
        """Bytes held in the spool."""
        return self._items.spooled_bytes

    @property
    def is_full(self) -> bool:
        """Whether the spool has no room for what came."""
        return self._items.is_full

    @property
    def wants_pause(self) -> bool:
        """Whether the socket should not be read now."""
        return self.blocked and self._items.wants_pause

    def put(self, item: Item) -> None:
        """Take what came, now or when its turn has come."""
        if self.blocked:
            self._items.put(item)
        else:
            self._take(item)

    def resume(self) -> None:
        """There may be room again."""
        if not self.blocked or self._work is not None:
            return
        self.blocked = False
        self._carry_out()
        while self._items and not self.blocked:
            item = self._items.pop()
            if item is None:  # it is being fetched
                self.blocked = True
                return
            self._take(item)

    def clear(self) -> None:
        """Drop everything, for good."""
        self._items.clear()
        self._rest, self._actions = None, iter(())
        self._ending = False
        self.blocked = True
        if self._work is not None:
            self._work.cancel()
        self._act, self._again, self._failed = _refuse, _nothing, _nothing  # they lead to the connection, which leads here

    def _take(self, item: Item) -> None:
        if isinstance(item, bytes) or isinstance(item, str):  # noqa: SIM101  # of a union it takes longer than all the rest
            self._take_message(item)
        elif isinstance(item, Violation):
            raise ProtocolError(item.sentence, item.code)
        elif isinstance(item, EndOfInput):
            self._ending = True
            self._actions = iter(self._session.end_of_input())
            self._carry_out()
        else:
            self._actions = iter(item)
            self._carry_out()

    def _take_message(self, message: Message) -> None:
        if type(message) is bytes:
            self.was_active = True
        if len(message) > ASIDE_BYTES:
            self.blocked = True
            self._work = asyncio.get_running_loop().run_in_executor(None, self._session.receive, message)
            self._work.add_done_callback(self._worked)
            return
        actions = self._session.receive(message)
        if type(actions) is tuple and len(actions) == 1:  # nearly always
            self.was_active = True
            self._rest = self._act(actions[0])
            if self._rest is not None:
                self.blocked = True
            return
        self._actions = iter(actions)
        self._carry_out()

    def _worked(self, work: "asyncio.Future[Iterable[Action]]") -> None:
        self._work = None
        if work.cancelled():
            return
        error = work.exception()
        if error is not None:
            self._failed(error)
            return
        self._actions = iter(work.result())
        self._again()

    def _carry_out(self) -> None:
        """What is left of the latest message. What finds no room is kept."""
        action, self._rest = self._rest, None
        fed = 0
        while action is not None or (action := next(self._actions, None)) is not None:
            self.was_active = True
            command = action.command if type(action) is Feed else action
            size = len(command.samples) if type(command) is Audio else 0
            self._rest = self._act(action)
            if self._rest is not None:
                self.blocked = True
                return
            action = None
            fed += size
            if fed > TURN_SAMPLES:
                self.blocked = True
                self._again()
                return
        if self._ending:
            self.ended = True
