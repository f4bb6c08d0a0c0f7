"""A connection's input queue without socket, engine or session of any protocol."""

import asyncio
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import pytest

from moshi_stt.engine.commands import Audio, Mark
from moshi_stt.errors import ProtocolError
from moshi_stt.events import AnyEvent
from moshi_stt.server import inputs
from moshi_stt.server.framing import Violation
from moshi_stt.server.inputs import END_OF_INPUT, TURN_SAMPLES, InputQueue
from moshi_stt.session import Action, Feed, Message, Reply, Session


def audio(samples: int) -> Audio:
    return Audio(np.zeros(samples, np.float32))


class Numbers(Session):
    """A message `1 2 3` asks for the marks 1, 2 and 3; `bad` breaks the protocol; at the end of input comes mark 99."""

    def receive(self, message: Message) -> Iterable[Action]:
        if message == "bad":
            raise ProtocolError("bad", 1007)
        words = message.split() if isinstance(message, str) else [str(len(message))]
        return tuple(Mark(int(word)) for word in words)

    def end_of_input(self) -> Iterable[Action]:
        return (Mark(99),)

    def send(self, event: AnyEvent, channel: int = 0) -> Sequence[Message]:
        return ()


class Sink:
    """Takes actions while it has room."""

    def __init__(self, room: int = 1_000_000, session: Session | None = None) -> None:
        self.room = room
        self.taken: list[object] = []
        self.again = 0
        self.errors: list[BaseException] = []
        self.queue = InputQueue(session or Numbers(), self.act, self.call_again, self.errors.append)

    def act(self, action: Action) -> Action | None:
        if not self.room:
            return action
        self.room -= 1
        self.taken.append(action.id if isinstance(action, Mark) else action)
        return None

    def call_again(self) -> None:
        self.again += 1


def test_order_is_kept_through_a_lack_of_room() -> None:
    sink = Sink(room=2)
    queue = sink.queue
    queue.put("1 2 3")
    assert queue.blocked
    queue.put("4")
    queue.put("5 6")
    queue.put(END_OF_INPUT)
    assert (sink.taken, queue.ended) == ([1, 2], False)
    assert queue.waiting_bytes == 4
    sink.room = 2
    queue.resume()
    assert sink.taken == [1, 2, 3, 4]
    assert queue.blocked
    sink.room = 100
    queue.resume()
    assert sink.taken == [1, 2, 3, 4, 5, 6, 99]
    assert queue.ended
    assert not queue.blocked
    assert queue.waiting_bytes == 0


def test_a_violation_is_raised_when_its_turn_has_come() -> None:
    """What was good before it is carried out first."""
    sink = Sink(room=0)
    sink.queue.put("1")
    sink.queue.put("2")
    sink.queue.put(Violation(1002, "broken"))
    sink.queue.put("3")
    sink.room = 100
    with pytest.raises(ProtocolError, match="broken") as raised:
        sink.queue.resume()
    assert raised.value.close_code == 1002
    assert sink.taken == [1, 2]
    sink.queue.clear()
    sink.queue.resume()
    assert sink.taken == [1, 2]


def test_what_a_message_raises_comes_out() -> None:
    with pytest.raises(ProtocolError):
        Sink().queue.put("bad")


def test_an_action_may_find_less_room_than_it_needs() -> None:
    """The rest that was handed back is offered again, and counted while it waits."""
    taken: list[int] = []

    def act(action: Action) -> Action | None:
        assert isinstance(action, Feed)
        command = action.command
        assert isinstance(command, Audio)
        taken.append(min(60, len(command.samples)))
        return Feed(Audio(command.samples[60:]), action.channel) if len(command.samples) > 60 else None

    class One(Numbers):
        def receive(self, message: Message) -> Iterable[Action]:
            return (Feed(audio(150), 1),)

    queue = InputQueue(One(), act, lambda: None, lambda error: None)
    queue.put("x")
    assert queue.waiting_bytes == 4 * 90
    queue.resume()
    queue.resume()
    assert taken == [60, 60, 30]
    assert not queue.blocked


def test_others_have_a_turn_in_the_middle_of_a_long_message() -> None:
    class Long(Numbers):
        def receive(self, message: Message) -> Iterator[Action]:
            for _ in range(5):
                yield audio(TURN_SAMPLES // 2)

    sink = Sink(session=Long())
    sink.queue.put("x")
    assert (len(sink.taken), sink.again, sink.queue.blocked) == (3, 1, True)
    sink.queue.resume()
    assert (len(sink.taken), sink.again, sink.queue.blocked) == (5, 1, False)


async def test_a_large_message_is_decoded_in_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes meanwhile waits; the session is left alone."""
    monkeypatch.setattr(inputs, "ASIDE_BYTES", 10)
    again = asyncio.Event()
    sink = Sink()
    monkeypatch.setattr(sink.queue, "_again", again.set)
    sink.queue.put(b"x" * 11)
    assert sink.queue.in_thread
    sink.queue.put("5")
    sink.queue.resume()
    assert sink.taken == []
    await asyncio.wait_for(again.wait(), 20)
    sink.queue.resume()
    assert sink.taken == [11, 5]


async def test_what_the_thread_raises_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "ASIDE_BYTES", 2)
    told = asyncio.Event()
    sink = Sink()
    monkeypatch.setattr(sink.queue, "_failed", lambda error: (sink.errors.append(error), told.set()))
    sink.queue.put("bad")
    await asyncio.wait_for(told.wait(), 20)
    assert [type(error) for error in sink.errors] == [ProtocolError]


def test_activity_is_a_binary_message_or_an_action() -> None:
    """A text that asks for nothing keeps no connection alive."""

    class Deaf(Numbers):
        def receive(self, message: Message) -> Iterable[Action]:
            return (Reply("x"),) if message == "say" else ()

    queue = Sink(session=Deaf()).queue
    for message, active in (("hello", False), ("say", True), (b"x", True)):
        queue.was_active = False
        queue.put(message)
        assert queue.was_active is active
