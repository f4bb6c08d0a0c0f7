"""Detects disconnects on sockets that are not being read.

A socket that is not read (its stream's inbox is full) or that has given end-of-file tells the event loop nothing more. The
kernel still knows of a reset: POLLERR or POLLHUP. So each watched client is sent a ping now and then, which the system of a
client that is gone altogether answers with a reset, even when its last data is still on the way to us.
"""

import asyncio
import select
import sys
from typing import Protocol

LOOK_SECONDS = 0.1
"""How often the watched sockets are looked at."""

LOOKS_PER_PROBE = 10
"""Looks between two pings; the first ping is at the second look."""


class Watched(Protocol):
    """What the monitor needs of a connection."""

    @property
    def unheard(self) -> bool: ...

    def fileno(self) -> int: ...

    def probe(self) -> None: ...

    def abort(self) -> None: ...


class DisconnectMonitor:
    """Looks at the connections that were handed to `add`, as long as they are `unheard`."""

    def __init__(self) -> None:
        self._looks: dict[Watched, int] = {}
        self._timer: asyncio.TimerHandle | None = None

    def add(self, connection: Watched) -> None:
        self._looks.setdefault(connection, 0)
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(LOOK_SECONDS, self._look)

    def stop(self) -> None:
        self._looks.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self) -> None:
        self._timer = None
        for connection in [c for c in self._looks if not c.unheard]:
            del self._looks[connection]
        for connection in _gone(list(self._looks)):
            del self._looks[connection]
            connection.abort()
        for connection in self._looks:
            self._looks[connection] += 1
            if self._looks[connection] % LOOKS_PER_PROBE == 2:
                connection.probe()
        if self._looks:
            self._timer = asyncio.get_running_loop().call_later(LOOK_SECONDS, self._look)


def _gone(connections: list[Watched]) -> list[Watched]:
    """Those whose socket is dead. Where the system has no poll(2), none: there the failing of a write tells."""
    if not connections or not hasattr(select, "poll"):
        return []
    dead = select.POLLERR | select.POLLNVAL
    if sys.platform == "linux":
        dead |= select.POLLHUP  # both halves are closed; elsewhere it may be one
    poll = select.poll()
    by_descriptor = {c.fileno(): c for c in connections if c.fileno() >= 0}
    for descriptor in by_descriptor:
        poll.register(descriptor, 0)
    return [by_descriptor[descriptor] for descriptor, events in poll.poll(0) if events & dead]
