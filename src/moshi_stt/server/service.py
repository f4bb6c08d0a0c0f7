"""What the handlers of one process share: engines, keys, counts, open connections, and whether all is well. Knows no routes."""

import asyncio
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from moshi_stt.config import Module, ServerConfig
from moshi_stt.engine.batch import BatchEngine
from moshi_stt.engine.engine import Engine
from moshi_stt.events import Error
from moshi_stt.server.auth import Keys
from moshi_stt.server.connection import Connection
from moshi_stt.server.hangup import HangupWatch
from moshi_stt.server.metrics import Metrics
from moshi_stt.server.patience import tick_seconds
from moshi_stt.server.processes import SocketProcesses

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Served:
    """A module and the engine behind it."""

    module: Module
    engine: Engine


@dataclass
class Service:
    """State of one server. Used on the event loop alone."""

    config: ServerConfig
    served: tuple[Served, ...]
    metrics: Metrics
    keys: Keys
    watch: HangupWatch = field(default_factory=HangupWatch)
    connections: set[Connection] = field(default_factory=set)
    uploads: "set[asyncio.Task[object]]" = field(default_factory=set)
    started: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when every engine has started."""
    failure: str | None = None
    """Why `/health` is red."""
    stopping: bool = False
    processes: SocketProcesses | None = None
    """Who else carries WebSockets."""

    @classmethod
    def build(cls, config: ServerConfig, engines: Mapping[str, Engine], metrics: Metrics | None = None) -> "Service":
        """engines: by module name, one for each of config.modules. They report to `metrics` from now on."""
        metrics = metrics or Metrics()
        served = tuple(Served(module, engines[module.name]) for module in config.modules)
        for each in served:
            each.engine.observer = metrics
        metrics.watch(lambda: ((each.module.name, each.engine) for each in served))
        return cls(config, served, metrics, Keys(config.authorized_ids))

    @property
    def is_started(self) -> bool:
        """Whether every engine is there: either `started` was set, or whoever made the engines started them."""
        return self.started.is_set() or all(each.engine.ready for each in self.served)

    def unready(self) -> str | None:
        """Why a new stream would not be served at once; None when it would."""
        if self.failure is not None:
            return self.failure
        if self.stopping:
            return "the server is shutting down"
        for each in self.served:
            if not each.engine.ready:
                return f"module {each.module.name}: the model is loading"
            if each.engine.used_slots >= each.engine.total_slots:
                return f"module {each.module.name}: no free channels"
        return None

    def refusal(self) -> str | None:
        """Why nothing new is taken, whatever is free; None when it is."""
        return self.failure or ("the server is shutting down" if self.stopping else None)

    def connected(self, connection: Connection) -> None:
        self.connections.add(connection)
        self.metrics.websockets.inc()

    def disconnected(self, connection: Connection) -> None:
        if connection in self.connections:
            self.connections.remove(connection)
            self.metrics.websockets.dec()

    async def start_processes(self) -> None:
        """Start the processes that carry WebSockets, as many as the engines were loaded for."""
        engines = {each.module.name: each.engine for each in self.served if isinstance(each.engine, BatchEngine)}
        shared = {name: engine for name, engine in engines.items() if engine.processes}
        if shared:
            count = min(engine.processes for engine in shared.values())
            self.processes = SocketProcesses(self.config, shared, count)
            await self.processes.start()

    async def tick(self) -> None:
        """Look at every connection's clocks, for ever."""
        pause = tick_seconds(self.config.limits)
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(pause)
            now = loop.time()
            for connection in list(self.connections):
                try:
                    connection.tick(now)
                except Exception:
                    log.exception("%s: the connection's clock failed", connection.peer)
                    connection.abort()

    async def close_connections(self, sentence: str, code: int, within_seconds: float) -> None:
        """End every connection with this Error and status; cut those that have not gone in time."""
        elsewhere = self.processes.end(sentence, code, within_seconds) if self.processes is not None else asyncio.sleep(0)
        await asyncio.gather(self._close_own(sentence, code, within_seconds), elsewhere)

    async def _close_own(self, sentence: str, code: int, within_seconds: float) -> None:
        for connection in list(self.connections):
            connection.end(Error(sentence), code)
        await self._wait_gone(within_seconds)
        for connection in list(self.connections):
            connection.abort()
        await self._wait_gone(1.0)

    async def _wait_gone(self, seconds: float) -> None:
        if self.connections:
            await asyncio.wait([connection.lost for connection in self.connections], timeout=seconds)

    async def cancel_uploads(self, within_seconds: float) -> None:
        """End the POST requests that run. Each answers 503 itself."""
        running = set(self.uploads)
        for upload in running:
            upload.cancel()
        if running:
            await asyncio.wait(running, timeout=within_seconds)

    def fail(self, sentence: str) -> None:
        """Turn red. The first reason stays."""
        if self.failure is None:
            self.failure = sentence

    def __iter__(self) -> Iterator[Served]:
        return iter(self.served)
