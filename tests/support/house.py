"""A server with a neighbour, who must hear the same whatever happens next to it. For tests of faults, at every door."""

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Awaitable, Callable

from msgspec.structs import replace
from tests.support.callers import ALL_DOORS, Call, Caller
from tests.support.engines import Kind, speech
from tests.support.serving import KEY, Running, server_config, serving, until

from moshi_stt.engine.engine import Engine
from moshi_stt.events import Step
from moshi_stt.protocol import decode_event
from moshi_stt.server.connection import Connection
from moshi_stt.session import Message

NUMBERS = [3, 9, 5]
WORDS = ["w3.", "w9.", "w5."]

VARIES = re.compile(r'[0-9a-f]{8}-[0-9a-f-]{27}|[0-9a-f]{24,}|"expires_at":[0-9]+|event_[0-9]+')
"""In a door's messages: names and times of day."""


def told(messages: list[Message]) -> list[object]:
    """What a client was told, less what differs from one connection to the next, and steps, which are joined under load.

    Texts are sorted: some protocols answer a mark at once, before or after what they have just heard.
    """
    texts = sorted(VARIES.sub("", each) for each in messages if isinstance(each, str) and '"type":"step"' not in each)
    events = [decode_event(each) for each in messages if isinstance(each, bytes)]
    return [*texts, *(event for event in events if not isinstance(event, Step))]


class House:
    """A server and its engine, with the one neighbour that is there all the time, in the middle of a word."""

    def __init__(self, running: Running, engine: Engine) -> None:
        self.running, self.engine = running, engine
        self.port = running.port

    async def hears_all(self, caller: Caller, fault: Callable[[], Awaitable[None]]) -> list[object]:
        """What a client is told that says its words before the fault, half a word and more during it, and the rest after it."""
        pcm = speech(NUMBERS)
        middle = len(pcm) // 2
        async with await caller.connect(self.port) as call:
            call.say(pcm)
            call.send(caller.mark(1))
            messages = await call.until_marked(1)
            call.say(pcm[:middle])
            await fault()
            call.say(pcm[middle:])
            call.send(caller.mark(2))
            messages += await call.until_marked(2)
        assert [word for message in messages for word in caller.words(message)] == WORDS * 2
        return told(messages)

    @contextlib.asynccontextmanager
    async def visitor(self, caller: Caller, *, receive_buffer: int | None = None) -> AsyncIterator[tuple[Call, Connection]]:
        """A client next to the neighbour, and the server's side of it."""
        before = set(self.running.server.service.connections)
        async with await caller.connect(self.port, receive_buffer=receive_buffer) as call:
            await until(lambda: set(self.running.server.service.connections) - before, "the connection")
            (connection,) = set(self.running.server.service.connections) - before
            yield call, connection

    async def alone(self) -> None:
        """Wait until the neighbour is the only one left."""
        await self.left(1)

    async def left(self, connections: int) -> None:
        def are_left() -> bool:
            return self.engine.used_slots == connections == self.running.connections()

        await until(are_left, "all but the neighbour gone")


@contextlib.asynccontextmanager
async def house(kind: Kind, caller: Caller, **limits: float) -> AsyncIterator[House]:
    """The neighbour must be told what a client is told that is alone on the server."""
    engine = kind.make()
    config = replace(server_config(**limits), authorized_ids=frozenset({KEY, "a key that nobody else has"}))
    async with serving(engine, config, doors=ALL_DOORS) as running:
        made = House(running, engine)

        async def nothing() -> None: ...

        alone = await made.hears_all(caller, nothing)
        await made.left(0)
        is_there, over = asyncio.Event(), asyncio.Event()

        async def fault() -> None:
            is_there.set()
            await over.wait()

        neighbour = asyncio.create_task(made.hears_all(caller, fault))
        try:
            await asyncio.wait((neighbour, asyncio.create_task(is_there.wait())), return_when=asyncio.FIRST_COMPLETED)
            assert is_there.is_set()
            yield made
            over.set()
            assert await neighbour == alone
        finally:
            neighbour.cancel()
        await made.left(0)
