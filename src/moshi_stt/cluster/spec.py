"""The structs that travel between a cluster's processes: what it shall be, what replicas report, what HAProxy is told."""

from pathlib import Path
from typing import Literal

import msgspec

MOST_REPLICAS = 64
"""Server places in HAProxy's file. A replica's name is `r0` to `r63`, and names its place."""

CONTROLLER = "controller"
NAMESPACE = "moshi-stt"
"""Ray's namespace of all our actors."""


class ClusterSpec(msgspec.Struct, frozen=True, kw_only=True):
    """What `cluster up` asked for."""

    name: str = "moshi-stt"
    config: str
    """Name of a shipped configuration, or what messages call the file."""
    config_text: str | None = None
    """Text of the file; None for a shipped configuration."""
    minimum: int
    maximum: int
    cpus: float = 0.01
    """Of each replica, as Ray counts them. A fraction: an actor that watches a process needs no core of its own."""
    gpus: float = 0.0
    host: str = "127.0.0.1"
    """Address that HAProxy listens on."""
    port: int = 8080
    proxy: str = "127.0.0.1"
    """Address from which HAProxy connects: its word on a client's address counts."""
    wyoming: tuple[str, int] | None = None
    """Address and port of Home Assistant's protocol; None: not served."""
    drain_seconds: float = 30.0
    """How long live streams of a replica that ends may go on: the configuration's."""
    start_seconds: float = 600.0
    """How long a replica may take to load its models."""
    up_after_seconds: float = 3.0
    down_after_seconds: float = 60.0
    worker_flags: tuple[str, ...] = ()
    """Further flags of `moshi-stt worker`."""
    folder: str = "."
    """Working folder of the workers, where a host has it."""
    revision: int = 1
    """Grows with each restart: replicas of an older one are replaced."""

    @property
    def is_local(self) -> bool:
        """Whether only this machine can connect. Replicas of this host then listen on 127.0.0.1 alone, too."""
        return self.host in ("127.0.0.1", "::1")


class WorkerRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A running `worker` of a replica, as its state file has it: enough to find it again."""

    pid: int
    started: str
    """When the process started, as the system tells it: a process that has the same number later has another start."""
    host: str
    port: int
    wyoming_port: int | None
    revision: int
    devices: str | None
    """CUDA_VISIBLE_DEVICES that it was given."""


Phase = Literal["pending", "starting", "ready", "failing", "stopping", "gone", "away"]
"""pending: Ray has not placed it. starting: the models load. failing: its worker died or hangs, another is being started. away:
its actor does not answer, which says nothing of its worker."""


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What a replica says of itself."""

    name: str
    revision: int
    phase: Phase
    node: str = ""
    """IP address of its host."""
    host: str = ""
    port: int = 0
    wyoming_port: int | None = None
    pid: int = 0
    """Of its worker."""
    actor_pid: int = 0
    """Of the process that watches the worker."""
    used: int = 0
    total: int = 0
    lag_seconds: float = 0.0
    """95th percentile over the last seconds, from the arrival of a sample to its event."""
    restarts: int = 0
    """Workers that had to be replaced."""
    why: str = ""


class Server(msgspec.Struct, frozen=True, kw_only=True):
    """A replica as HAProxy sees it."""

    name: str
    host: str
    port: int
    slots: int
    wyoming_port: int | None = None
    draining: bool = False
    """Takes nothing new but clients that come back to their stream."""


class Fleet(msgspec.Struct, frozen=True, kw_only=True):
    """What the controller tells the front: the servers, and what `cluster status` shows."""

    spec: ClusterSpec
    target: int
    servers: tuple[Server, ...] = ()
    reports: tuple[Report, ...] = ()
    note: str = ""
    controller_pid: int = 0


def number_of(name: str) -> int:
    """3 of `r3`."""
    return int(name.removeprefix("r"))


class Paths:
    """The files of one cluster on one host. The folder is readable by its user alone."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.cluster = folder / "cluster.json"
        """The controller's: spec and target."""
        self.fleet = folder / "fleet.json"
        """The front's: what it was told last."""
        self.front = folder / "front.json"
        self.front_lock = folder / "front.lock"
        self.front_socket = folder / "front.sock"
        self.view_socket = folder / "view.sock"
        self.haproxy = folder / "haproxy.json"
        self.haproxy_config = folder / "haproxy.cfg"
        self.haproxy_socket = folder / "haproxy.sock"
        self.ray = folder / "ray.json"

    def make(self) -> None:
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.folder.chmod(0o700)

    def record(self, name: str) -> Path:
        """State file of a replica's worker."""
        return self.folder / f"{name}.json"

    def config(self, revision: int) -> Path:
        return self.folder / f"config-{revision}.toml"

    def log(self, name: str) -> Path:
        return self.folder / f"{name}.log"


def write_json(path: Path, value: msgspec.Struct) -> None:
    """Write whole or not at all."""
    scratch = path.with_name(f"{path.name}.new")
    scratch.write_bytes(msgspec.json.encode(value))
    scratch.replace(path)
