"""What a client keeps of a stream in order to come back to it after a lost connection."""

import asyncio
from collections import deque

from moshi_stt.constants import SAMPLE_RATE
from moshi_stt.events import Ack, AnyEvent, Ready

MOST_UNACKNOWLEDGED_SAMPLES = 600 * SAMPLE_RATE
"""Audio that is kept to be sent again; beyond it sending waits."""


class Unacknowledged:
    """What a client keeps of a stream to come back to it: messages that the server may not have, and what it has received."""

    def __init__(self) -> None:
        self.token: str | None = None
        self.greeted = False
        """Whether the first `Ready` of the present connection has come."""
        self._events = 0
        self._samples = 0
        self._acknowledged = 0
        self._held: deque[tuple[int, int, bytes]] = deque()
        """Start and size in samples, and the message. Markers have size 0."""
        self._room = asyncio.Event()

    def query(self) -> dict[str, str]:
        """Parameters for the next connection."""
        if self.token is None:
            return {"resume": "1"}
        start = self._held[0][0] if self._held else self._samples
        return {"resume": self.token, "samples": str(start), "events": str(self._events)}

    @property
    def can_resume(self) -> bool:
        """Whether there is a stream to come back to, or none has begun. A server that gives no token does not keep streams."""
        return self.token is not None or not self.greeted

    def add(self, message: bytes, samples: int) -> None:
        self._held.append((self._samples, samples, message))
        self._samples += samples

    def messages(self) -> list[bytes]:
        """Those that are to be sent again."""
        return [message for _, _, message in self._held]

    async def room(self) -> None:
        """Wait while as much is kept as may be."""
        while self._samples - self._acknowledged > MOST_UNACKNOWLEDGED_SAMPLES:
            self._room.clear()
            await self._room.wait()

    def is_new(self, event: AnyEvent) -> bool:
        """Note an event; whether the caller is to see it."""
        if isinstance(event, Ack):
            self._acknowledged = event.samples
            while self._held and self._held[0][0] + max(1, self._held[0][1]) <= event.samples:
                self._held.popleft()
            self._room.set()
            return False
        if isinstance(event, Ready) and not self.greeted:
            self.greeted = True
            first, self.token = self.token is None, event.token
            return first
        self._events += 1
        return True
