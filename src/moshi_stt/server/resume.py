"""Streams that outlive their socket, for clients that ask for it (docs/protocol.md, "Resume").

A client that has lost its connection comes back with the stream's token, the sample from which it sends again, and how many
messages it has received. What it sends twice counts once; what it has not received is sent again.
"""

import secrets
from collections import OrderedDict, deque
from typing import NamedTuple

from moshi_stt.engine.commands import Audio, Mark, Reset
from moshi_stt.errors import ProtocolError
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


def new_token(process: int) -> str:
    """Names the process that holds the stream: 0 for the first one, else the number of a worker from 1 on."""
    return f"{process}-{secrets.token_urlsafe(18)}"


def process_of(token: str) -> int | None:
    """The process that a token names; None for what is no token."""
    number = token.partition("-")[0]
    return int(number) if number.isdecimal() and len(number) < 6 else None


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
