"""Drives a session without a server: audio goes into a pretended stream that says scripted words, messages are collected."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from moshi_stt.constants import FRAME_SECONDS, SAMPLE_RATE
from moshi_stt.engine.commands import Audio, Finish, Mark, Reset
from moshi_stt.errors import ProtocolError
from moshi_stt.events import AnyEvent, EndWord, Error, Marker, Pause, Ready, Word
from moshi_stt.session import Action, Close, Feed, Message, Reply, Session

CONFIDENCE = 0.5


@dataclass(frozen=True)
class Said:
    """A word and when it is spoken, in seconds."""

    text: str
    start: float
    end: float


def speech(*groups: str, word: float = 0.24, gap: float = 0.08, pause: float = 1.2, lead: float = 0.4) -> list[Said]:
    """Each group's words one after the other, a pause between groups."""
    said: list[Said] = []
    at = lead
    for group in groups:
        for text in group.split():
            said.append(Said(text, round(at, 3), round(at + word, 3)))
            at += word + gap
        at += pause - gap
    return said


@dataclass
class PretendedStream:
    """Hears scripted words `lag` seconds after they are spoken; a pause source that hears them at once."""

    words: Sequence[Said]
    lag: float = 0.48
    samples: int = 0
    steps: int = 0
    next_word: int = 0
    ended: bool = False
    last_speech: float | None = None

    def carry_out(self, command: object) -> list[AnyEvent]:
        if isinstance(command, Audio):
            assert command.samples.dtype == np.float32
            assert command.samples.ndim == 1
            self.samples += len(command.samples)
            return self._steps()
        if isinstance(command, Mark):
            return [*self._said_before(self._seconds), Marker(command.id)]
        if isinstance(command, Reset):
            self.samples = self.steps = self.next_word = 0
            self.last_speech = None
            return [Ready()]
        assert isinstance(command, Finish)
        self.ended = True
        return self._said_before(self._seconds)

    @property
    def _seconds(self) -> float:
        return self.samples / SAMPLE_RATE

    def _steps(self) -> list[AnyEvent]:
        events: list[AnyEvent] = []
        while (self.steps + 1) * FRAME_SECONDS <= self._seconds + 1e-9:
            self.steps += 1
            now = self.steps * FRAME_SECONDS
            for word in self.words:
                if word.start < now and word.end > now - FRAME_SECONDS:
                    self.last_speech = min(now, word.end)
            heard = max(0.0, now - self.lag)
            events += self._said_before(heard, whole=True)
            settled = heard
            if self.next_word < len(self.words):
                settled = min(settled, self.words[self.next_word].start)
            silence = float("inf") if self.last_speech is None else max(0.0, now - self.last_speech)
            events.append(Pause(round(now, 3), settled, round(silence, 6)))
        return events

    def _said_before(self, time: float, *, whole: bool = False) -> list[AnyEvent]:
        events: list[AnyEvent] = []
        while self.next_word < len(self.words):
            word = self.words[self.next_word]
            if (word.end if whole else word.start) > time - (0 if whole else 1e-9):
                break
            self.next_word += 1
            events += [Word(word.text, word.start, CONFIDENCE), EndWord(word.end)]
        return events


@dataclass
class Driver:
    """Plays the server for one session. messages: everything that was sent, text as objects."""

    session: Session
    words: Sequence[Said] = ()
    channels: int = 1
    lag: float = 0.48
    messages: list[Any] = field(default_factory=list)
    closed: Close | None = None
    streams: list[PretendedStream] = field(default_factory=list)
    clock: float = 0.0

    def __post_init__(self) -> None:
        self.streams = [PretendedStream(self.words, self.lag) for _ in range(self.channels)]
        self._do(self.session.opened())
        for channel in range(self.channels):
            self._send(self.session.send(Ready(), channel))

    def text(self, **message: Any) -> None:
        self.raw(json.dumps(message))

    def raw(self, message: Message) -> None:
        assert self.closed is None
        try:
            self._do(self.session.receive(message))
        except ProtocolError as error:
            for stream in self.streams:
                self._events(0, stream.carry_out(Finish()))
            self.fail(Error(str(error), error.close_code))

    def fail(self, error: Error) -> None:
        self._send(self.session.send(error))
        self.closed = self.session.close(error)

    def tick(self, seconds: float) -> None:
        self.clock += seconds
        self._do(self.session.tick(self.clock))

    def of(self, kind: str) -> list[Any]:
        return [message for message in self.messages if message["type"] == kind]

    def _do(self, actions: Iterable[Action]) -> None:
        for action in actions:
            assert self.closed is None
            if isinstance(action, Reply):
                self._send([action.message])
            elif isinstance(action, Close):
                self.closed = action
            elif isinstance(action, Feed):
                self._events(action.channel, self.streams[action.channel].carry_out(action.command))
            else:
                self._events(0, self.streams[0].carry_out(action))
            if all(stream.ended for stream in self.streams) and self.closed is None:
                self._send(self.session.finished())
                self.closed = self.session.close(None)

    def _events(self, channel: int, events: Iterable[AnyEvent]) -> None:
        for event in events:
            self._send(self.session.send(event, channel))

    def _send(self, messages: Iterable[Message]) -> None:
        assert self.closed is None, "a message after the last"
        self.messages += [json.loads(message) if isinstance(message, str) else message for message in messages]


def pcm16(seconds: float, rate: int = 16_000) -> bytes:
    return bytes(2 * round(seconds * rate))
