"""A `RemoteEngine` and the engine that it shares, in one process."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

from moshi_stt.engine.batch import BatchEngine
from moshi_stt.engine.engine import NO_EXTRAS, StreamOptions
from moshi_stt.engine.remote import RemoteEngine
from moshi_stt.engine.slots import Slot
from moshi_stt.engine.stream import Stream


class Lent(RemoteEngine):
    """Borrows a slot for each stream, as the server does for each socket that it hands over."""

    def __init__(self, owner: BatchEngine, number: int = 0) -> None:
        """owner: started, and stopped by whoever started it."""
        self.gone = asyncio.Event()
        super().__init__(owner.share(number), owner.connect(self.gone.set), on_freed=self._give_back_lent)
        self._owner = owner
        self._lent: dict[int, Slot] = {}

    def open(self, *, live: bool = True, options: StreamOptions = NO_EXTRAS) -> Stream:
        slot = self._owner.lend()
        self._lent[slot.index] = slot
        self.grant(slot.index)
        return super().open(live=live, options=options)

    def _give_back_lent(self, index: int) -> None:
        self._owner.take_back(self._lent.pop(index))


@asynccontextmanager
async def remotes(owner: BatchEngine, count: int) -> AsyncIterator[list[Lent]]:
    """Engines over owner's backend."""
    async with AsyncExitStack() as stack:
        made = []
        for number in range(count):
            remote = Lent(owner, number)
            await remote.start()
            stack.push_async_callback(remote.stop)
            made.append(remote)
        yield made
