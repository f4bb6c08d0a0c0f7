"""Streams that outlive their socket, for clients that ask for it (docs/protocol.md, "Resume").

A client that has lost its connection comes back with the stream's token, the sample from which it sends again, and how many
messages it has received. What it sends twice counts once; what it has not received is sent again.
"""

import os
import re
import secrets
from collections import OrderedDict, deque
from typing import NamedTuple

from moshi_stt.engine.commands import Audio, Mark, Reset
from moshi_stt.errors import ConfigError, ProtocolError
from moshi_stt.session import Message

MOST_MESSAGES = 4_096
"""Messages that are kept to be sent again: more than sockets hold between two programs that both read."""

MOST_REQUESTS = 1_024
"""Markers and resets that are remembered: no more can be unanswered."""

REFUSED = 4404
"""WebSocket status: there is no such stream here; start a new one."""


class ResumeRequest(NamedTuple):
    """What a client asks for. token: None for a new stream that may be resumed later.

    samples: from which it sends again. events: messages that it has received, but for `Ack` and a connection's first `Ready`.
    """

    token: str | None = None
    samples: int = 0
    events: int = 0


class Again(NamedTuple):
    """Stands in a connection's input where the client came back: what follows begins at this sample."""

    samples: int


REPLICA_VARIABLE = "MOSHI_STT_REPLICA"
"""Environment variable with the name of this server among several that share an address. Tokens then begin with it."""

_REPLICA = re.compile(r"[A-Za-z0-9_]{1,64}")
_PLACE = re.compile(r"(?:r(?P<replica>[A-Za-z0-9_]{1,64})\.)?(?:d(?P<device>[0-9]{1,4})\.)?(?P<process>[0-9]{1,5})")


class Place(NamedTuple):
    """Who holds a stream. Each layer on a client's way in looks at its own part.

    replica: the server, where several share an address. device: the number of the model process, from 0 on, where there are
    several. process: 0 for the process that has the model, else the number of the worker that carries the socket.
    """

    replica: str | None = None
    device: int | None = None
    process: int = 0

    def __str__(self) -> str:
        replica = "" if self.replica is None else f"r{self.replica}."
        device = "" if self.device is None else f"d{self.device}."
        return f"{replica}{device}{self.process}"


def replica_name() -> str | None:
    """The name of this server among several, from the environment; None where it has none. Raises ConfigError."""
    name = os.environ.get(REPLICA_VARIABLE, "")
    if name and not _REPLICA.fullmatch(name):
        raise ConfigError(f"{REPLICA_VARIABLE}={name!r}: expected 1 to 64 letters, digits or underscores, such as 2")
    return name or None


def new_token(place: Place) -> str:
    """Names a stream of that place: `r2.d1.0-SECRET`."""
    return f"{place}-{secrets.token_urlsafe(18)}"


def place_of(token: str) -> Place | None:
    """The place that a token names; None for what is no token."""
    name, dash, _ = token.partition("-")
    found = _PLACE.fullmatch(name)
    if found is None or not dash:
        return None
    device = found["device"]
    return Place(found["replica"], None if device is None else int(device), int(found["process"]))


class Resumption:
    """What one such stream remembers."""

    def __init__(self, token: str) -> None:
        self.token = token
        self.greeted = False
        """Whether the first `Ready` was sent."""
        self.samples = 0
        """Samples taken."""
        self._position = 0
        """The sample that the client sends next, by its own count. Less than `samples` while it sends again."""
        self._requests: OrderedDict[tuple[int, int | None], None] = OrderedDict()
        """Markers (position, id) and resets (position, None) that were taken."""
        self._sent: deque[Message] = deque(maxlen=MOST_MESSAGES)
        self._sent_count = 0
        self._acknowledged = 0

    # ---- from the client ---------------------------------------------------------------------------------------------

    def again(self, samples: int) -> None:
        """The client came back. Raises ProtocolError where it would leave samples out."""
        if samples > self.samples:
            raise ProtocolError(f"resume from sample {samples}, but only {self.samples} have come: some would be missing", 1008)
        self._position = samples

    def take(self, command: Audio | Mark | Reset) -> Audio | Mark | Reset | None:
        """What is new of a command; None where all of it came before."""
        if type(command) is Audio:
            return self._take_audio(command)
        request = (self._position, command.id if type(command) is Mark else None)
        if request in self._requests:
            return None
        self._requests[request] = None
        if len(self._requests) > MOST_REQUESTS:
            self._requests.popitem(last=False)
        return command

    def _take_audio(self, audio: Audio) -> Audio | None:
        size = len(audio.samples)
        known = min(size, self.samples - self._position)
        self._position += size
        self.samples = max(self.samples, self._position)
        if not known:
            return audio
        return Audio(audio.samples[known:], audio.arrived) if known < size else None

    # ---- to the client -----------------------------------------------------------------------------------------------

    def sent(self, messages: "list[Message]") -> None:
        """Keep messages that were sent, or would have been."""
        self._sent.extend(messages)
        self._sent_count += len(messages)

    def missed(self, received: int) -> "list[Message] | None":
        """What a client has missed that has received so many; None where that cannot be told any more."""
        missing = self._sent_count - received
        if missing < 0 or missing > len(self._sent):
            return None
        return list(self._sent)[len(self._sent) - missing :]

    def acknowledgement(self) -> int | None:
        """Samples taken, if that has not been said yet."""
        if self.samples == self._acknowledged:
            return None
        self._acknowledged = self.samples
        return self.samples
