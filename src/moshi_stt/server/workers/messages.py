"""What the server's processes say to each other. Plain values, which go through a `MessageSocket`."""

from dataclasses import dataclass
from typing import Any

from prometheus_client.metrics_core import Metric

from moshi_stt.config import ServerConfig
from moshi_stt.engine.sharing import WorkerConfig
from moshi_stt.server.doors.door import NewClient
from moshi_stt.server.resume import Place


@dataclass(frozen=True)
class SetUp:
    """First of all. Two descriptors a share come along: its memory and its signal."""

    config: ServerConfig
    shares: dict[str, WorkerConfig]
    """By module name."""
    log_level: int
    place: Place
    """Of the worker."""
    processes: int
    """How many carry sockets, the first process included."""


@dataclass(frozen=True)
class Ready:
    """The answer: sockets may come."""


@dataclass(frozen=True)
class Take:
    """A new client's socket, as the one descriptor, and the slots that its streams may use."""

    module: str
    client: NewClient
    slots: tuple[int, ...]


@dataclass(frozen=True)
class TakeBack:
    """A socket, as the one descriptor, whose client comes back to a stream of this process."""

    client: NewClient


@dataclass(frozen=True)
class Freed:
    """No row will name this slot again."""

    module: str
    slot: int


@dataclass(frozen=True)
class Ping:
    """Say that you are at work."""


@dataclass(frozen=True)
class Pong:
    """The answer."""


@dataclass(frozen=True)
class Count:
    """Say what you have counted."""


@dataclass(frozen=True)
class Counted:
    """The answer. queued_samples: by module name."""

    families: list[Metric]
    queued_samples: dict[str, int]


@dataclass(frozen=True)
class End:
    """Close every connection with this Error and status, and cut those that have not gone in time."""

    sentence: str
    code: int
    within_seconds: float


@dataclass(frozen=True)
class Drain:
    """As `End`, after the live streams have gone on for a while and what they sent has been transcribed."""

    sentence: str
    code: int
    drain_seconds: float
    within_seconds: float


@dataclass(frozen=True)
class Ended:
    """The answer: no connection is left."""


@dataclass(frozen=True)
class Failed:
    """An engine here has failed: no more sockets."""


@dataclass(frozen=True)
class Logged:
    """A line for the log. record: the arguments of `logging.makeLogRecord`."""

    record: dict[str, Any]


@dataclass(frozen=True)
class Stop:
    """End the process."""
