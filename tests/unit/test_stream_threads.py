"""A stream between the event loop and a real thread: nothing is lost, nothing stalls, at any moment it may close."""

import asyncio
import random
import threading
from collections.abc import AsyncIterator

import pytest
from tests.support.owner import Owner, ramp
from tests.support.streams import some

from moshi_stt.engine.commands import Audio, Finish, Mark, Reset
from moshi_stt.engine.stream import Delivery, Stream, deliver_all
from moshi_stt.errors import EngineError
from moshi_stt.events import AnyEvent, Marker, Ready, Word

DEADLINE_SECONDS = 120

pytestmark = pytest.mark.timeout(DEADLINE_SECONDS)
"""A lost wake-up shows as a hang: no test here may take long."""


@pytest.fixture
def owner() -> Owner:
    return Owner()


class Worker(threading.Thread):
    """Drains and steps a stream as an engine does, in uneven portions, and echoes what it saw as events."""

    def __init__(self, owner: Owner, stream: Stream, seed: int) -> None:
        super().__init__(daemon=True)
        self.owner, self.stream, self.rng = owner, stream, random.Random(seed)
        self.loop = asyncio.get_running_loop()
        self.seen: list[float] = []
        self.most_pending = 0
        self.stopping = False

    def run(self) -> None:
        held: list[Audio | Mark | Reset | Finish] = []
        unstepped = 0
        while not self.stopping:
            self.owner.event.clear()
            held += self.stream.drain()
            self.most_pending = max(self.most_pending, self.stream.pending_samples)
            events: list[AnyEvent] = []
            ended = False
            while held and self.stream.writable and len(events) < 8:
                command = held.pop(0)
                match command:
                    case Audio():
                        self.seen += command.samples.tolist()
                        unstepped += len(command.samples)
                        events.append(Word(str(len(self.seen)), 0.0))
                    case Mark():
                        events.append(Marker(command.id))
                    case Reset():
                        events.append(Ready())
                    case Finish():
                        ended = True
            while unstepped and self.rng.random() < 0.8:
                portion = self.rng.randint(1, unstepped)
                self.stream.stepped(portion)
                unstepped -= portion
            if events or ended:
                self.loop.call_soon_threadsafe(deliver_all, [Delivery(self.stream, events, ended)])
            if ended:
                return
            if (not held and not unstepped) or not self.stream.writable:
                self.owner.event.wait(DEADLINE_SECONDS)


@pytest.mark.parametrize("seed", range(6))
async def test_nothing_is_lost_or_stalls_between_two_threads(owner: Owner, seed: int) -> None:
    """Small bounds, random portions, a reader that dawdles: a lost wake-up on any side ends in the deadline."""
    stream = owner.stream(inbox_samples=50, inbox_pieces=5, outbox_events=6, unread_answers=3)
    stream.deliver([Ready()])
    worker = Worker(owner, stream, seed)
    worker.start()
    rng = random.Random(seed)
    events: list[AnyEvent] = []

    async def read() -> None:
        while got := await some(stream) if rng.random() < 0.5 else [event async for event in first_of(stream)]:
            events.extend(got)
            for _ in range(rng.randrange(3)):
                await asyncio.sleep(0)

    async def first_of(stream: Stream) -> AsyncIterator[AnyEvent]:
        async for event in stream:
            yield event
            return

    reading = asyncio.create_task(read())
    sent, marks, resets = 0, 0, 1
    for _ in range(400):
        choice = rng.random()
        if choice < 0.7:
            size = rng.choice((1, 2, 30, 90))
            await stream.send(Audio(ramp(sent, sent + size)))
            sent += size
        elif choice < 0.9:
            await stream.send(Mark(marks))
            marks += 1
        else:
            await stream.send(Reset())
            resets += 1
    await stream.send(Finish())
    await reading
    await asyncio.to_thread(worker.join, DEADLINE_SECONDS)
    assert not worker.is_alive()
    assert worker.seen == list(range(sent))
    assert worker.most_pending <= 50
    assert [event.id for event in events if isinstance(event, Marker)] == list(range(marks))
    assert sum(isinstance(event, Ready) for event in events) == resets
    stream.close()


async def test_close_at_any_moment_leaves_the_worker_well(owner: Owner) -> None:
    for seed in range(20):
        stream = owner.stream(inbox_samples=40, outbox_events=5)
        worker = Worker(owner, stream, seed)
        worker.start()
        feeding = asyncio.create_task(stream.send(Audio(ramp(0, 100_000))))
        for _ in range(seed):
            await some(stream)
        stream.close()
        with pytest.raises(EngineError, match="closed"):
            await feeding
        worker.stopping = True
        owner.event.set()
        await asyncio.to_thread(worker.join, DEADLINE_SECONDS)
        assert not worker.is_alive()
    assert len(owner.released) == 20
