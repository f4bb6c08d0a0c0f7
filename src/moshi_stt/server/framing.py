"""How messages lie in the bytes of a connection, and the WebSocket statuses. No I/O."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Final, NamedTuple

from moshi_stt.session import Message

NORMAL: Final = 1000
GOING_AWAY: Final = 1001
PROTOCOL_ERROR: Final = 1002
NO_STATUS: Final = 1005
NOT_UTF8: Final = 1007
POLICY: Final = 1008
TOO_BIG: Final = 1009
INTERNAL: Final = 1011
TRY_AGAIN: Final = 1013


class Ping(NamedTuple):
    """The client asks whether we are there, and wants the payload back."""

    payload: bytes


class Pong(NamedTuple):
    """The client's answer to a ping."""

    payload: bytes


class Closed(NamedTuple):
    """The client's Close. code: NO_STATUS where it gave none. Nothing follows it."""

    code: int


class Violation(NamedTuple):
    """The client broke the framing. code: the status to close with. Nothing follows it."""

    code: int
    sentence: str


Frame = Message | Ping | Pong | Closed | Violation
"""A whole message, or what is not one."""


class Framing(ABC):
    """One connection's framing, both ways.

    After a `Closed` or a `Violation`, and after `stop`, `feed` throws away what comes.
    """

    @abstractmethod
    def feed(self, data: bytes) -> Sequence[Frame]:
        """What these bytes complete, in order. Never raises."""

    @abstractmethod
    def encode(self, message: Message) -> bytes:
        """A message as it goes on the socket."""

    @property
    @abstractmethod
    def pending_bytes(self) -> int:
        """Bytes held of what is not whole yet."""

    @property
    def broken(self) -> bool:
        """Whether the client broke it, so that its answer to our Close cannot be read."""
        return False

    def ping(self, payload: bytes = b"") -> bytes:
        """Ask whether the client is there; empty where the protocol has no such thing."""
        return b""

    def pong(self, payload: bytes) -> bytes:
        """Answer a `Ping`."""
        return b""

    def close(self, code: int, reason: str = "") -> bytes:
        """Our Close; empty where the protocol has none. reason: cut to what fits."""
        return b""

    @property
    def handshakes(self) -> bool:
        """Whether the client answers our Close, so that the socket stays until it has."""
        return False
