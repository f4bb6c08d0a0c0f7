"""What the first process and the model processes say to each other, besides `workers/messages.py`."""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from moshi_stt.config import Module, ServerConfig
from moshi_stt.engine.engine import Engine, EngineInfo
from moshi_stt.server.doors.door import NewClient
from moshi_stt.server.resume import Place

Build = Callable[[ServerConfig], Mapping[str, Engine]]
"""Makes the engines, by module name. Raises ConfigError. A function that can be pickled."""

Check = Callable[[Module, Engine], Awaitable[None]]
"""Raises EngineError where a module's engine fails its self-test. A function that can be pickled."""


@dataclass(frozen=True)
class SetUp:
    """First of all. One descriptor comes along: the memory of the `Boundaries`."""

    config: ServerConfig
    """Without keys, which are asked for by the first process, and with this device in every module."""
    build: Build
    http: str
    """Path of the Unix socket on which HTTP is served."""
    place: Place
    devices: int
    """How many there are."""
    sharers: int
    """How many of them run on the same cores."""
    log_level: int
    prefix: str
    """What its lines in the log begin with."""


@dataclass(frozen=True)
class Started:
    """The answer: the models are warm."""

    infos: dict[str, EngineInfo]
    """By module."""


@dataclass(frozen=True)
class StartFailed:
    """The other answer: they cannot be had. kind: name of the class in `errors`."""

    kind: str
    sentence: str


@dataclass(frozen=True)
class Slots:
    """How many slots of each module are used, and the samples that wait. Sent whenever the first has changed."""

    used: dict[str, int]
    queued_samples: dict[str, int]


@dataclass(frozen=True)
class Take:
    """A new client's socket, as the one descriptor.

    id: names it from here on. boundary: its place in the `Boundaries`; None where there was none left.
    """

    id: int
    boundary: int | None
    module: str
    client: NewClient


@dataclass(frozen=True)
class TakeBack:
    """The same of a client that comes back to a stream of this process, or of its worker `process`, from 1 on."""

    id: int
    boundary: int | None
    process: int
    client: NewClient


Fate = Literal["carried", "passed", "declined", "gone"]
"""What became of a client's socket:

carried   it has its connection in this process
passed    a worker of this process carries it, and speaks to the client whatever happens here
declined  there was no slot for it; nothing was read
gone      its connection is over
"""


@dataclass(frozen=True)
class Became:
    """Said of a client that was taken, as often as it changes."""

    id: int
    fate: Fate


@dataclass(frozen=True)
class SelfTest:
    """Let each module pass its self-test."""

    check: Check


@dataclass(frozen=True)
class SelfTested:
    """The answer. failure: what failed; None where all is well."""

    failure: str | None
