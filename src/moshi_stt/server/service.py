"""What the handlers of the main process share: modules, keys, counts, connections, and whether all is well."""

import asyncio
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from moshi_stt.config import Module, ServerConfig
from moshi_stt.engine.engine import Engine
from moshi_stt.engine.sharing import ShareableEngine
from moshi_stt.server.auth import Keys
from moshi_stt.server.connections import Connections
from moshi_stt.server.decoders import Decoders
from moshi_stt.server.devices.pool import DevicePool
from moshi_stt.server.doors.door import Handshake, HttpDoor, NewClient
from moshi_stt.server.gate import Gate
from moshi_stt.server.metrics import Metrics
from moshi_stt.server.resume import Place, replica_name
from moshi_stt.server.workers.pool import WorkerPool

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Member:
    """What a server knows that is a model process of a larger one, which has let in everybody who comes.

    http: the Unix socket on which it answers. place: its own, for tokens. servers: how many share what the limits say of all
    streams together.
    """

    http: Path
    place: Place
    servers: int


@dataclass(frozen=True)
class Served:
    """A module and its engine."""

    module: Module
    engine: Engine


@dataclass
class Service:
    """State of one server. Used on the event loop alone."""

    config: ServerConfig
    served: tuple[Served, ...]
    metrics: Metrics
    gate: Gate
    connections: Connections
    uploads: "set[asyncio.Task[object]]" = field(default_factory=set)
    started: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when every engine has started."""
    failure: str | None = None
    """Why `/health` is red."""
    stopping: bool = False
    decoders: Decoders = field(default_factory=Decoders)
    workers: WorkerPool | None = None
    """Who else carries WebSockets."""
    devices: DevicePool | None = None
    """The model processes, where this one has no model."""
    servers: int = 1
    """See `Member`."""

    @classmethod
    def build(
        cls,
        config: ServerConfig,
        engines: Mapping[str, Engine],
        metrics: Metrics | None = None,
        member: Member | None = None,
    ) -> "Service":
        """engines: by module name, one for each of config.modules. They report to `metrics` from now on.

        Raises ConfigError for a name of this replica that is none.
        """
        metrics = metrics or Metrics()
        served = tuple(Served(module, engines[module.name]) for module in config.modules)
        for each in served:
            each.engine.observer = metrics
        metrics.watch(lambda: ((each.module.name, each.engine) for each in served))
        gate = Gate(Keys(config.authorized_ids), config.limits, metrics, time.monotonic)
        gate.is_open = member is not None
        place = Place(replica_name()) if member is None else member.place
        servers = 1 if member is None else member.servers
        connections = Connections(config.limits, metrics, place=place, processes=servers)
        return cls(config, served, metrics, gate, connections, servers=servers)

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

    async def admit(self, door: HttpDoor, request: Handshake) -> None:
        """Raises Refused for a page or key that may not come in, and where nothing new is taken."""
        await self.gate.admit(door, request)
        refusal = self.refusal()
        if refusal is not None:
            self.metrics.refusals.labels("not_serving").inc()
            raise door.refusal("stopping" if self.failure is None else "failed", refusal)

    def find(self, module: str | None) -> Served:
        """By name; None is the first."""
        return self.served[0] if module is None else next(each for each in self.served if each.module.name == module)

    @property
    def pools(self) -> list[WorkerPool | DevicePool]:
        """The other processes that carry connections."""
        return [pool for pool in (self.workers, self.devices) if pool is not None]

    def hand_over(self, served: Served, client: NewClient, transport: asyncio.Transport, on_gone: Callable[[], None]) -> bool:
        """Whether another process carries a new client's socket from here on. on_gone: told when its connection is gone."""
        name = served.module.name
        return self.is_started and any(pool.hand_over(name, client, transport, on_gone) for pool in self.pools)

    async def start_processes(self) -> None:
        """Start the processes that carry WebSockets, as many as the engines were loaded for."""
        engines = {each.module.name: each.engine for each in self.served if isinstance(each.engine, ShareableEngine)}
        shared = {name: engine for name, engine in engines.items() if engine.processes}
        if shared:
            count = min(engine.processes for engine in shared.values())
            self.workers = WorkerPool(self.config, shared, count, self.connections.place, self.servers)
            await self.workers.start()

    async def drain_connections(self, sentence: str, code: int, drain_seconds: float, within_seconds: float) -> None:
        """Let live streams go on for a while, then let what they sent be transcribed and close them; cut the rest."""
        seconds = drain_seconds, within_seconds
        elsewhere = [pool.drain(sentence, code, *seconds) for pool in self.pools]
        await asyncio.gather(self.connections.drain(sentence, code, *seconds), *elsewhere)

    async def close_connections(self, sentence: str, code: int, within_seconds: float) -> None:
        """End every connection with this Error and status; cut those that have not gone in time."""
        elsewhere = [pool.end(sentence, code, within_seconds) for pool in self.pools]
        await asyncio.gather(self.connections.close(sentence, code, within_seconds), *elsewhere)

    async def finish_uploads(self, drain_seconds: float, within_seconds: float) -> None:
        """Let the POST requests that run go on for a while, then end them. Each answers 503 itself."""
        if self.uploads and drain_seconds > 0:
            await asyncio.wait(set(self.uploads), timeout=drain_seconds)
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
