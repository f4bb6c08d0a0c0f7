"""What a connection's protocol is made of, without I/O: messages in, actions out; events in, messages out.

A session has no clock, no socket and no stream. Whoever drives it (`server/connection.py`) hands it what came and carries out
the actions it answers with.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from moshi_stt.engine.commands import Audio, Command, Finish, Mark, Reset
from moshi_stt.events import AnyEvent, Error

NORMAL = 1000
"""WebSocket status of a connection that ended as it should."""
INTERNAL = 1011
"""WebSocket status of an error that is the server's fault."""

Message = str | bytes
"""One message of a client or to it. On a WebSocket `str` is a text message and `bytes` a binary one."""


class Reply(NamedTuple):
    """Send this message at once, before later events."""

    message: Message


class Close(NamedTuple):
    """Close the connection with this status and reason. Pending audio and events are dropped."""

    code: int = NORMAL
    reason: str = ""


class Feed(NamedTuple):
    """A command for one of several streams."""

    command: Command
    channel: int = 0


Action = Audio | Mark | Reset | Finish | Feed | Reply | Close
"""What a session asks for. A command that is not in a `Feed` goes to stream 0."""


class Session(ABC):
    """One connection's side of a protocol.

    The driver calls `opened` once; then `receive` for each message, carrying out all actions of one call, in order, before the
    next; `send` for each event; `tick` now and then; `end_of_input` when the client will send no more. After `end_of_input`
    and after a ProtocolError, neither it nor `receive` is called again: the streams are finished, what still comes of them
    is sent, then an Error if there was one, and the connection is closed as `close` says. After the session has asked each
    stream to finish, messages of the client are dropped.

    Calls never overlap, but `receive` of a large message may run in another thread.
    """

    may_idle = False
    """Whether a client may stay without sending anything but answers to pings for as long as it likes."""

    def opened(self) -> Iterable[Action]:
        """The connection has its streams (where `Opening.on_demand` is set: it has none yet)."""
        return ()

    @abstractmethod
    def receive(self, message: Message) -> Iterable[Action]:
        """What one message of the client asks for.

        Iterating may do the work bit by bit, so that the caller can let others run in between. Raises ProtocolError, also
        from within the iteration and then after what was good.
        """

    def end_of_input(self) -> Iterable[Action]:
        """The client will send no more; the streams are finished after this. Raises ProtocolError like `receive`."""
        return ()

    @abstractmethod
    def send(self, event: AnyEvent, channel: int = 0) -> Sequence[Message]:
        """The messages that tell the client of an event of one stream: none, one or several. `Error` comes last of all."""

    def finished(self) -> Sequence[Message]:
        """Every stream has ended after `Finish`, and all its events were sent: the last messages."""
        return ()

    def close(self, error: Error | None) -> Close:
        """How to close a connection that has ended, by itself or with an error that `send` was given."""
        if error is None:
            return Close()
        return Close(INTERNAL if error.close_code is None else error.close_code, error.message)

    def tick(self, now: float) -> Iterable[Action]:
        """The session's clock, about ten times a second. Called only where a session overrides it, and not while input waits.

        now: seconds of a clock that never goes back.
        """
        return ()

    def warnings(self, waiting_samples: int) -> list[str]:
        """What is new to be said, in the log, about the audio that came. Each thing is said once a connection.

        waiting_samples: audio that the streams hold and have not transcribed.
        """
        return []
