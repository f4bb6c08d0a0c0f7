"""All connections of one process: building them, their timers, and ending them."""

import asyncio
import logging
import math
from collections.abc import Callable, Iterator

from moshi_stt.config import LimitsConfig
from moshi_stt.engine.engine import Engine
from moshi_stt.events import Error
from moshi_stt.server.connection import Connection
from moshi_stt.server.disconnects import DisconnectMonitor
from moshi_stt.server.doors.door import Door, NewClient, SocketDoor
from moshi_stt.server.doors.options import on_ignored
from moshi_stt.server.framing import Framing
from moshi_stt.server.metrics import Metrics
from moshi_stt.server.resume import REFUSED, Place, new_token
from moshi_stt.server.spool import SpoolBudget
from moshi_stt.server.surroundings import Surroundings
from moshi_stt.server.timers import tick_seconds
from moshi_stt.server.websocket import WebSocketFraming

log = logging.getLogger(__name__)

SESSION_TICK_SECONDS = 0.1
"""How often the sessions that have a clock look at it."""

MOST_PARKED = 1_024
"""Streams that may wait for their clients at once."""

STILL_SECONDS = 2.0
"""A connection whose client has sent nothing for so long does not hold a drain."""


class Connections:
    """Used on the event loop alone."""

    def __init__(self, limits: LimitsConfig, metrics: Metrics, *, place: Place | None = None, processes: int = 1) -> None:
        """place: of this process, for tokens. processes: how many share what the limits say of all streams together."""
        self.place = place or Place()
        self._by_token: dict[str, Connection] = {}
        self._ending = False
        self._limits = limits
        self._metrics = metrics
        on_ignored(metrics.ignored)
        self.spool = SpoolBudget(limits, metrics, processes=processes)
        self._monitor = DisconnectMonitor()
        self._connections: set[Connection] = set()

    def __len__(self) -> int:
        return len(self._connections)

    def __iter__(self) -> Iterator[Connection]:
        return iter(list(self._connections))

    def take(
        self,
        transport: asyncio.Transport,
        client: NewClient,
        engine: Engine,
        lost: Callable[[Exception | None], None] | None = None,
    ) -> Connection:
        """A connection over a socket that is its own from now on; its `open` is still to be called.

        lost: told when the socket is gone.
        """
        door, opening = client.door, client.opening
        server = Surroundings(self._limits, self._metrics, self.spool, self._may_park, self._lost, self._monitor.add)
        token = None
        if opening.resume is not None and self._limits.resume_seconds > 0:
            token = new_token(self.place)
        connection = Connection(engine, opening, door.session(opening), server, client.peer, token, door.name)
        self._connections.add(connection)
        if token is not None:
            self._by_token[token] = connection
        self._metrics.websockets.inc()
        connection.start(transport, client.early, self._framing(door), lost)
        log.debug("%s: connected", client.peer)
        return connection

    def resume(
        self, transport: asyncio.Transport, client: NewClient, lost: Callable[[Exception | None], None] | None = None
    ) -> Connection | None:
        """The connection that this client comes back to; None where there is none any more, and it has been told so."""
        request = client.opening.resume
        assert request is not None
        framing = self._framing(client.door)
        connection = self._by_token.get(request.token or "")
        if connection is not None and connection.attach(transport, client.early, framing, request, lost):
            self._metrics.resumed.labels("yes").inc()
            log.info("%s: back on the stream of %s", client.peer, connection.peer)
            return connection
        self._metrics.resumed.labels("refused").inc()
        log.info("%s: there is no such stream to resume", client.peer)
        sentence = "there is no such stream here any more: start a new one"
        for message in client.door.session(client.opening).send(Error(sentence)):
            transport.write(framing.encode(message))
        transport.write(framing.close(REFUSED, sentence))
        transport.close()
        return None

    def _framing(self, door: Door | SocketDoor) -> Framing:
        limit = self._limits.max_message_bytes
        return door.framing(limit) if isinstance(door, SocketDoor) else WebSocketFraming(limit)

    def _may_park(self, connection: Connection) -> bool:
        """Whether a connection whose socket is lost may keep its slot for a while."""
        if self._ending or self.parked >= MOST_PARKED:
            return False
        self._metrics.parked.inc()
        return True

    @property
    def parked(self) -> int:
        """Connections that wait for their client to come back."""
        return sum(connection.is_parked for connection in self._by_token.values())

    def _lost(self, connection: Connection) -> None:
        if connection in self._connections:
            self._connections.remove(connection)
            self._metrics.websockets.dec()
        if connection.token is not None:
            self._by_token.pop(connection.token, None)
        log.debug("%s: disconnected", connection.peer)

    async def tick(self) -> None:
        """Look at every connection's timers, for ever."""
        pause = tick_seconds(self._limits)
        loop = asyncio.get_running_loop()
        due = loop.time() + pause
        while True:
            await asyncio.sleep(min(pause, SESSION_TICK_SECONDS))
            now = loop.time()
            self._tick_sessions(now)
            if now >= due:
                due = now + pause
                self._tick_connections(now)

    # Functions of their own, so that no name of `tick` keeps a connection that has ended.

    def _tick_sessions(self, now: float) -> None:
        for connection in self:
            if connection.has_clock:
                self._guarded(connection, connection.tick_session, now)

    def _tick_connections(self, now: float) -> None:
        for connection in self:
            self._guarded(connection, connection.tick, now)

    def _guarded(self, connection: Connection, tick: Callable[[float], None], now: float) -> None:
        try:
            tick(now)
        except Exception:
            log.exception("%s: the connection's timers failed", connection.peer)
            connection.abort()

    async def drain(self, sentence: str, code: int, drain_seconds: float, within_seconds: float) -> None:
        """Let clients that send go on for up to `drain_seconds`; then take no more of any, let what was sent be transcribed
        and given, and close with this Error and status. Cut those that have not gone in time.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + drain_seconds
        for _ in range(math.ceil(drain_seconds / SESSION_TICK_SECONDS)):
            if loop.time() >= deadline or all(each.is_still(loop.time(), STILL_SECONDS) for each in self):
                break
            await asyncio.sleep(SESSION_TICK_SECONDS)
        self._ending = True
        for connection in self:
            self._metrics.drained.inc()
            connection.finish(Error(sentence, code))
        await self._wait_gone(within_seconds)
        await self.close(sentence, code, 1.0)

    async def close(self, sentence: str, code: int, within_seconds: float) -> None:
        """End every connection with this Error and status; cut those that have not gone in time."""
        self._ending = True
        for connection in self:
            connection.end(Error(sentence, code))
        await self._wait_gone(within_seconds)
        for connection in self:
            connection.abort()
        await self._wait_gone(1.0)

    async def _wait_gone(self, seconds: float) -> None:
        if self._connections:
            await asyncio.wait([connection.lost for connection in self], timeout=seconds)

    def stop(self) -> None:
        """No more looking for disconnects."""
        self._monitor.stop()
