"""A whole protocol of lines of text, as small as one can be: what it takes to add one to the server."""

from collections.abc import Iterable, Sequence

import numpy as np

from moshi_stt.config import ServerConfig
from moshi_stt.engine.commands import Audio, Finish, Mark
from moshi_stt.events import AnyEvent, Error, Marker, Word
from moshi_stt.server.doors.door import Door, Handshake, Opening, Refused, Route
from moshi_stt.session import Action, Close, Message, Reply, Session

COMMANDS = {
    "audio": lambda samples: Audio(np.frombuffer(bytes.fromhex(samples), np.float32)),
    "mark": lambda number: Mark(int(number)),
    "finish": lambda: Finish(),
    "say": Reply,
    "bye": lambda reason: Close(4001, reason),
}


class PlainDoor(Door):
    name = "plain"

    def routes(self, config: ServerConfig) -> Sequence[Route]:
        return [Route("/v0/plain")]

    def key(self, request: Handshake) -> str | None:
        return request.headers.get("x-plain-key")

    def accept(self, request: Handshake) -> Opening:
        if "plain" not in request.subprotocols:
            raise Refused(400, "offer the subprotocol `plain`")
        return Opening(request.parameter("greeting"), subprotocol="plain", headers=(("x-plain", "1"),))

    def session(self, opening: Opening) -> Session:
        return PlainSession(opening.options)


class PlainSession(Session):
    def __init__(self, greeting: str) -> None:
        self.greeting = greeting

    def opened(self) -> Iterable[Action]:
        return (Reply(self.greeting),)

    def receive(self, message: Message) -> Iterable[Action]:
        name, *arguments = message.split() if isinstance(message, str) else [""]
        return (COMMANDS[name](*arguments),) if name in COMMANDS else (Reply(f"error: {message!r}"),)

    def send(self, event: AnyEvent, channel: int = 0) -> Sequence[Message]:
        shown = {Word: "text", Marker: "id", Error: "message"}.get(type(event))
        return () if shown is None else (f"{type(event).__name__} {getattr(event, shown)}",)

    def close(self, error: Error | None) -> Close:
        return Close(4000) if error is None else Close(4011, error.message)
