"""Sees clients go away whose sockets are not being read. Knows descriptors, and of connections only that they can be probed.

A socket that is not read (its stream's inbox is full) or that has given end-of-file tells the event loop nothing more. The
kernel still knows: a reset shows at once as POLLERR or POLLHUP, and a half-closed peer (POLLRDHUP) is sent a ping, which a
peer that is gone altogether answers with a reset.
"""

import asyncio
import select
import sys
from typing import Protocol

PROBE_SECONDS = 0.1
"""How often the watched sockets are looked at."""

PING_EVERY = 10
"""Looks between two probes of a half-closed socket."""


class Watched(Protocol):
    """What the watch needs of a connection."""

    @property
    def unheard(self) -> bool: ...

    def fileno(self) -> int: ...

    def probe(self) -> None: ...

    def abort(self) -> None: ...


class HangupWatch:
    """Looks at the connections that were handed to `add`, as long as they are `unheard`."""

    def __init__(self) -> None:
        self._looks: dict[Watched, int] = {}
        self._timer: asyncio.TimerHandle | None = None

    def add(self, connection: Watched) -> None:
        self._looks.setdefault(connection, 0)
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(PROBE_SECONDS, self._look)

    def stop(self) -> None:
        self._looks.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self) -> None:
        self._timer = None
        for connection in [c for c in self._looks if not c.unheard]:
            del self._looks[connection]
        for connection, state in _poll(list(self._looks)):
            if state == _GONE:
                del self._looks[connection]
                connection.abort()
            elif state == _HALF_CLOSED:
                if self._looks[connection] % PING_EVERY <= 1:
                    connection.probe()
                self._looks[connection] += 1
        if self._looks:
            self._timer = asyncio.get_running_loop().call_later(PROBE_SECONDS, self._look)


_GONE, _HALF_CLOSED = 2, 1


def _poll(connections: list[Watched]) -> list[tuple[Watched, int]]:
    """The connections whose peer is gone or half closed. Where the system has no poll(2), none: a ping then finds out."""
    if not connections or not hasattr(select, "poll"):
        return []
    half_closed = getattr(select, "POLLRDHUP", 0)
    poll = select.poll()
    by_descriptor = {c.fileno(): c for c in connections if c.fileno() >= 0}
    for descriptor in by_descriptor:
        poll.register(descriptor, half_closed)
    found = []
    for descriptor, events in poll.poll(0):
        gone = events & (select.POLLERR | select.POLLNVAL)
        # Linux reports POLLHUP when both halves are closed, other systems when the peer's is.
        if events & select.POLLHUP and sys.platform == "linux":
            gone = True
        found.append((by_descriptor[descriptor], _GONE if gone else _HALF_CLOSED))
    return found
