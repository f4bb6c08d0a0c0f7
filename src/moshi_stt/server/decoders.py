"""The processes that decode long uploads: started with the first one that is worth it."""

import asyncio
import logging
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from moshi_stt.audio.decode_pool import DecodePool

log = logging.getLogger(__name__)

MOST_PIECES: Final = 256
"""Pieces in the pool's memory, 4.5 MB each once used, which stays with the server."""


class Decoders:
    """Lends the pool of one server. Used on the event loop alone."""

    def __init__(self) -> None:
        self._pool: DecodePool | None = None
        self._stack = AsyncExitStack()
        self._starting: asyncio.Task[None] | None = None
        self._stopped = False

    def idle(self, slots: int) -> "DecodePool | None":
        """The pool if one of its processes is free now, for an engine of so many slots.

        None where threads do as well, and while the processes start: who asks for them first starts them.
        """
        if self._pool is not None:
            return self._pool if self._pool.is_idle else None
        if self._starting is None and not self._stopped:
            from moshi_stt.audio.decode_pool import decoders_for

            if count := decoders_for(slots):
                self._starting = asyncio.create_task(self._start(count, slots))
        return None

    async def _start(self, count: int, slots: int) -> None:
        from moshi_stt.audio.decode_pool import DecodePool

        try:
            self._pool = await self._stack.enter_async_context(DecodePool(count, min(slots, MOST_PIECES)))
        except OSError as error:
            log.warning("no processes for decoding long uploads, threads decode them: %s", error)

    async def stop(self) -> None:
        """End the processes. Nothing may be decoded any more. Idempotent."""
        self._stopped = True
        if self._starting is not None:
            await asyncio.gather(self._starting, return_exceptions=True)
        self._pool = None
        await self._stack.aclose()
