"""What a connection's client and its streams say to each other: commands one way, messages the other, each counted once.

Between the session, which knows the protocol, and the streams, which know the model, stands what is common to all protocols:
commands that a client repeats after a lost socket, messages that are kept for it, and the counts for the log.
"""

from collections.abc import Callable
from typing import NamedTuple

from moshi_stt.engine.commands import Audio, Command, Mark, Reset
from moshi_stt.engine.engine import Engine
from moshi_stt.events import AnyEvent, Error, Ready, Word
from moshi_stt.server.doors.door import Opening
from moshi_stt.server.inputs import Request
from moshi_stt.server.resume import Again, Resumption
from moshi_stt.server.streams import StreamSet
from moshi_stt.server.tally import Tally
from moshi_stt.session import Close, Feed, Message, Reply, Session


class Said(NamedTuple):
    """What the streams have said since the last look. failure: one of them ended by itself. over: all have ended."""

    messages: list[Message]
    failure: Error | None
    over: bool


class Conversation:
    """Session, streams and what connects them. Used on the event loop alone."""

    def __init__(self, engine: Engine, opening: Opening, session: Session, token: str | None, tally: Tally) -> None:
        """token: names the stream for a client that may come back to it."""
        self.session = session
        self.streams = StreamSet(engine, opening.channels, opening.stream)
        self.on_demand = opening.on_demand
        """Whether the streams are opened by the first command and given back when they have ended."""
        self.resumption = None if token is None else Resumption(token)
        self._tally = tally
        self._kept: Request | None = None
        """The request that found no room: it is counted already."""

    # ---- the client's side -------------------------------------------------------------------------------------------

    def carry_out(self, request: Request, open_streams: Callable[[], None]) -> Request | None:
        """Give a command to its stream; returns what there is no room for. open_streams: called where there are none yet."""
        if type(request) is Audio and self.streams.first is not None and self.resumption is None:  # nearly always
            return self._counted(request, self.streams.first.offer(request))
        new = self._new_part(request)
        if new is None:
            return None
        assert not isinstance(new, Reply | Close | Again)
        if self.streams.finishing:
            return new if self.on_demand else None
        if not self.streams.is_open:
            open_streams()
        if isinstance(new, Feed):
            command, channel = new
            rest = self._counted(command, self.streams.offer(command, channel))
            return None if rest is None else Feed(rest, channel)
        self._kept = self._counted(new, self.streams.offer(new))
        return self._kept

    def _new_part(self, request: Request) -> Request | None:
        """What of it has not come before, over a socket that was lost."""
        resumption = self.resumption
        if resumption is None or request is self._kept:
            return request
        if isinstance(request, Again):
            resumption.again(request.samples)
            return None
        return resumption.take(request) if isinstance(request, Audio | Mark | Reset) else request

    def _counted(self, command: Command, rest: Command | None) -> Command | None:
        """`rest`, after what was taken of the command has been counted."""
        if type(command) is Audio:
            self._tally.samples += len(command.samples) - (len(rest.samples) if type(rest) is Audio else 0)
        elif type(command) is Mark:
            self._tally.markers += rest is None
        return rest

    # ---- the streams' side -------------------------------------------------------------------------------------------

    def listen(self, *, last_words: bool) -> Said:
        """Everything that the streams have said. last_words: the session may end in good order when they are over."""
        messages: list[Message] = []
        for channel, events in self.streams.take():
            for event in events:
                if type(event) is Error:
                    return Said(messages, event, False)
                self._tally.words += type(event) is Word
                messages += self.session.send(event, channel) if self.resumption is None else self._kept_messages(event)
        over = self.streams.ended
        if over and self.streams.finishing and last_words:
            messages += self.session.finished()
        return Said(messages, None, over)

    def _kept_messages(self, event: AnyEvent) -> list[Message]:
        """The messages of an event, kept to be sent again. The first `Ready` of a connection is not among those."""
        resumption = self.resumption
        assert resumption is not None
        told = list(self.session.send(Ready(resumption.token) if type(event) is Ready else event))
        if resumption.greeted:
            resumption.sent(told)
        resumption.greeted = True
        return told

    def missed(self, received: int) -> list[Message] | None:
        """What to send to a client that comes back after so many messages; None where that cannot be told any more."""
        if self.resumption is None:
            return None
        missed = self.resumption.missed(received)
        return None if missed is None else [*self.session.send(Ready(self.resumption.token)), *missed]
