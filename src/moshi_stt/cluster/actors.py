"""The Ray part: actors that place and watch replicas, and the one that controls them. Imports Ray."""

import asyncio
import logging
import logging.handlers
import os
import threading
from collections.abc import Callable, Coroutine
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from moshi_stt.cluster.controller import Controller
from moshi_stt.cluster.replica import Replica
from moshi_stt.cluster.spec import CONTROLLER, NAMESPACE, ClusterSpec, Fleet, Paths, Report
from moshi_stt.errors import MoshiSttError

log = logging.getLogger(__name__)

T = TypeVar("T")

untyped: Any = ray
"""For functions of Ray's without annotations."""

ANSWER_SECONDS = 3.0
"""How long an actor has to answer the controller."""

CALL_SECONDS = 30.0
"""How long a call waits inside an actor for its own loop."""

CONTROLLER_CPUS = 0.01


class _Loop:
    """An event loop in a thread of its own: a Ray actor's methods come on Ray's threads."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()

    def forever(self, life: Coroutine[Any, Any, None]) -> None:
        """Run something as long as the actor lives. If it fails, so does the actor, and Ray starts it again."""

        async def run() -> None:
            try:
                await life
            except BaseException:
                log.exception("the actor ends")
                os._exit(1)

        asyncio.run_coroutine_threadsafe(run(), self._loop)

    def call(self, function: Callable[[], T]) -> T:
        """Call something on the loop."""

        async def run() -> T:
            return function()

        return asyncio.run_coroutine_threadsafe(run(), self._loop).result(CALL_SECONDS)

    def begin(self, deed: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(deed, self._loop)


def _log_to(path: Path) -> None:
    handler = logging.handlers.RotatingFileHandler(path, maxBytes=1 << 20, backupCount=1)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    ours = logging.getLogger("moshi_stt")
    ours.setLevel(logging.INFO)
    ours.addHandler(handler)


class ReplicaActor:
    """One replica's place in the cluster. A killed one is started again by Ray and goes on with the worker that still runs."""

    def __init__(self, name: str, spec: bytes, folder: str) -> None:
        paths = Paths(Path(folder))
        paths.make()
        _log_to(paths.log("replicas"))
        self._loop = _Loop()
        self._replica = Replica(name, msgspec.json.decode(spec, type=ClusterSpec), paths, untyped.util.get_node_ip_address())
        self._loop.forever(self._replica.run())

    def report(self) -> bytes:
        return msgspec.json.encode(self._loop.call(self._replica.report))

    def stop(self, drain_seconds: float) -> None:
        self._loop.begin(self._replica.stop(drain_seconds))


class ControllerActor:
    """Owns what shall be. On the host of the cluster's address."""

    def __init__(self, cluster: str, spec: bytes, folder: str) -> None:
        paths = Paths(Path(folder))
        paths.make()
        _log_to(paths.log("controller"))
        self._loop = _Loop()
        wanted = msgspec.json.decode(spec, type=ClusterSpec)
        wanted = msgspec.structs.replace(wanted, proxy=untyped.util.get_node_ip_address())
        self._controller = self._loop.call(lambda: Controller(wanted, paths, RayReplicas(cluster, folder)))
        self._loop.forever(self._controller.run())

    def fleet(self) -> bytes:
        return msgspec.json.encode(self._loop.call(self._controller.fleet))

    def configure(self, spec: bytes) -> None:
        """Take what another `cluster up` asks for. Another configuration replaces the replicas."""
        wanted = msgspec.json.decode(spec, type=ClusterSpec)

        def configure() -> None:
            known = self._controller.spec
            wanted_now = msgspec.structs.replace(wanted, proxy=known.proxy, revision=known.revision)
            if _runs(wanted_now) != _runs(known):
                wanted_now = msgspec.structs.replace(wanted_now, revision=known.revision + 1)
            self._controller.configure(wanted_now)

        self._loop.call(configure)

    def scale(self, minimum: int, maximum: int) -> None:
        self._loop.call(lambda: self._controller.scale(minimum, maximum))

    def restart(self, config: str | None, text: str | None, drain_seconds: float | None) -> None:
        self._loop.call(lambda: self._controller.restart(config, text, drain_seconds))

    def down(self, now: bool) -> None:
        self._loop.call(lambda: self._controller.down(now))

    def has_ended(self) -> bool:
        return self._loop.call(self._controller.ended.is_set)


def _runs(spec: ClusterSpec) -> tuple[object, ...]:
    """What a replica is started with."""
    return spec.config, spec.config_text, spec.cpus, spec.gpus, spec.worker_flags, spec.folder


class RayReplicas:
    """Replicas as Ray's detached actors."""

    def __init__(self, cluster: str, folder: str) -> None:
        self._cluster, self._folder = cluster, folder
        self._handles: dict[str, Any] = {}

    def find(self) -> list[str]:
        prefix = f"{self._cluster}:"
        names = [each["name"] for each in ray.util.list_named_actors(all_namespaces=True) if each["namespace"] == NAMESPACE]
        bare = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
        return [name for name in bare if name != CONTROLLER]

    def start(self, name: str, spec: ClusterSpec, node: str) -> None:
        node_id = next(
            (each["NodeID"] for each in untyped.nodes() if each["Alive"] and each["NodeManagerAddress"] == node), None
        )
        strategy: Any = NodeAffinitySchedulingStrategy(node_id, soft=True) if node_id is not None else "SPREAD"
        self._handles[name] = (
            ray.remote(ReplicaActor)
            .options(
                name=f"{self._cluster}:{name}",
                namespace=NAMESPACE,
                lifetime="detached",
                get_if_exists=True,
                max_restarts=-1,
                max_concurrency=4,
                num_cpus=spec.cpus,
                num_gpus=spec.gpus,
                scheduling_strategy=strategy,
            )
            .remote(name, msgspec.json.encode(spec), self._folder)
        )

    def has_room(self, spec: ClusterSpec) -> bool:
        free: dict[str, float] = untyped.available_resources()
        return free.get("CPU", 0.0) >= spec.cpus and free.get("GPU", 0.0) >= spec.gpus

    async def report(self, name: str) -> Report | None:
        try:
            handle = self._handle(name)
            answer = await asyncio.wait_for(asyncio.wrap_future(handle.report.remote().future()), ANSWER_SECONDS)
        except (TimeoutError, ValueError, ray.exceptions.RayError) as error:
            log.debug("%s: %s", name, error)
            return None
        return msgspec.json.decode(answer, type=Report)

    async def stop(self, name: str, drain_seconds: float) -> None:
        with suppress(TimeoutError, ValueError, ray.exceptions.RayError):
            handle = self._handle(name)
            await asyncio.wait_for(asyncio.wrap_future(handle.stop.remote(drain_seconds).future()), ANSWER_SECONDS)

    def remove(self, name: str) -> None:
        with suppress(ValueError, ray.exceptions.RayError):
            ray.kill(self._handle(name), no_restart=True)
        self._handles.pop(name, None)

    def _handle(self, name: str) -> Any:
        """Raises ValueError where there is none."""
        if name not in self._handles:
            self._handles[name] = ray.get_actor(f"{self._cluster}:{name}", namespace=NAMESPACE)
        return self._handles[name]


class Remote:
    """The controller, as a command line sees it. Raises MoshiSttError where it does not answer."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    @classmethod
    def find(cls, cluster: str) -> "Remote | None":
        try:
            return cls(ray.get_actor(f"{cluster}:{CONTROLLER}", namespace=NAMESPACE))
        except ValueError:
            return None

    @classmethod
    def start(cls, spec: ClusterSpec, folder: Path) -> "Remote":
        """Start a controller on this host."""
        here = ray.get_runtime_context().get_node_id()
        actor = ray.remote(ControllerActor).options(
            name=f"{spec.name}:{CONTROLLER}",
            namespace=NAMESPACE,
            lifetime="detached",
            get_if_exists=True,
            max_restarts=-1,
            max_concurrency=8,
            num_cpus=CONTROLLER_CPUS,
            scheduling_strategy=NodeAffinitySchedulingStrategy(here, soft=False),
        )
        return cls(actor.remote(spec.name, msgspec.json.encode(spec), str(folder)))

    def fleet(self) -> Fleet:
        return msgspec.json.decode(self._call("fleet"), type=Fleet)

    def configure(self, spec: ClusterSpec) -> None:
        self._call("configure", msgspec.json.encode(spec))

    def scale(self, minimum: int, maximum: int) -> None:
        self._call("scale", minimum, maximum)

    def restart(self, config: str | None, text: str | None, drain_seconds: float | None) -> None:
        self._call("restart", config, text, drain_seconds)

    def down(self, now: bool) -> None:
        self._call("down", now)

    def has_ended(self) -> bool:
        return bool(self._call("has_ended"))

    def remove(self) -> None:
        with suppress(ray.exceptions.RayError):
            ray.kill(self._handle, no_restart=True)

    def _call(self, method: str, *arguments: object) -> Any:
        try:
            return ray.get(getattr(self._handle, method).remote(*arguments), timeout=CALL_SECONDS)
        except ray.exceptions.RayError as error:
            raise MoshiSttError(f"the cluster's controller does not answer: {error}") from None


def sweep_hosts(cluster: str, folder: Path) -> None:
    """End what is left of a cluster: replicas without a controller, and processes on every host of Ray's."""
    replicas = RayReplicas(cluster, str(folder))
    for name in replicas.find():
        replicas.remove(name)
    task = ray.remote(_sweep).options(num_cpus=0, max_retries=0)
    here = ray.get_runtime_context().get_node_id()
    sweeps = [
        task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(str(folder))
        for node in untyped.nodes()
        if node["Alive"] and node["NodeID"] != here
    ]
    ray.wait(sweeps, num_returns=len(sweeps), timeout=CALL_SECONDS) if sweeps else None


def _sweep(folder: str) -> None:
    from moshi_stt.cluster.sweep import sweep

    asyncio.run(sweep(Paths(Path(folder))))
