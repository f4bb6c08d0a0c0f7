"""The silence that some models need in front of speech: put there by the server, and taken out of the times."""

from collections.abc import Iterable, Iterator, Sequence

import msgspec
import numpy as np

from moshi_stt.constants import SAMPLE_RATE
from moshi_stt.engine.commands import Audio, Reset
from moshi_stt.events import AnyEvent, EndWord, Error, Interim, Pause, Word
from moshi_stt.session import Action, Close, Feed, Message, Session


class PrefixedSession(Session):
    """Another session, whose streams all begin with silence that it knows nothing of."""

    def __init__(self, session: Session, seconds: float) -> None:
        self._session = session
        self._seconds = seconds
        self._begun: set[int] = set()
        """Channels whose stream has its silence."""
        self.may_idle = session.may_idle

    def opened(self) -> Iterable[Action]:
        return self._prefixed(self._session.opened())

    def receive(self, message: Message) -> Iterable[Action]:
        return self._prefixed(self._session.receive(message))

    def end_of_input(self) -> Iterable[Action]:
        return self._prefixed(self._session.end_of_input())

    def tick(self, now: float) -> Iterable[Action]:
        return self._prefixed(self._session.tick(now))

    def send(self, event: AnyEvent, channel: int = 0) -> Sequence[Message]:
        moved = self._moved(event)
        return () if moved is None else self._session.send(moved, channel)

    def finished(self) -> Sequence[Message]:
        self._begun.clear()
        return self._session.finished()

    def close(self, error: Error | None) -> Close:
        return self._session.close(error)

    def warnings(self, waiting_samples: int) -> list[str]:
        return self._session.warnings(waiting_samples)

    def _prefixed(self, actions: Iterable[Action]) -> Iterator[Action]:
        for action in actions:
            command, channel = action if isinstance(action, Feed) else (action, 0)
            if isinstance(command, Reset):
                self._begun.discard(channel)
            elif isinstance(command, Audio) and channel not in self._begun:
                self._begun.add(channel)
                yield Feed(Audio(np.zeros(round(self._seconds * SAMPLE_RATE), np.float32)), channel)
            yield action

    def _moved(self, event: AnyEvent) -> AnyEvent | None:
        """The event at the client's time; None for what lies in the silence."""
        back = self._seconds
        if type(event) is Word or type(event) is Interim:
            return msgspec.structs.replace(event, start_time=max(0.0, event.start_time - back))
        if type(event) is EndWord:
            return EndWord(max(0.0, event.stop_time - back))
        if type(event) is Pause:
            if event.time <= back + 1e-6:
                return None
            return msgspec.structs.replace(event, time=round(event.time - back, 3), settled=max(0.0, event.settled - back))
        return event


def with_prefix(session: Session, seconds: float) -> Session:
    """The session, with silence in front of its streams where the model needs any."""
    return PrefixedSession(session, seconds) if seconds > 0 else session
