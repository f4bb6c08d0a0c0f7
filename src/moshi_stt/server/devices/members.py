"""What the first process knows of each model process, and of each client that it has given to one."""

import asyncio
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

import aiohttp
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from moshi_stt import errors
from moshi_stt.devices import Device
from moshi_stt.server.devices.boundaries import Boundaries
from moshi_stt.server.devices.engines import DeviceSlots
from moshi_stt.server.doors.door import NewClient
from moshi_stt.server.workers.supervisor import Child

if TYPE_CHECKING:
    from moshi_stt.server.service import Service


@dataclass(eq=False)
class Client:
    """A socket that a device has."""

    id: int
    module: str
    new: NewClient
    sock: socket.socket | None
    """Our duplicate; None where a worker of the process carries it, and will speak itself."""
    on_gone: Callable[[], None]
    boundary: int | None = None
    streams: int = 0
    """Slots that it may still take: it is not answered yet."""
    declined: set[str] = field(default_factory=set)
    """Names of the devices that had no slot for it."""

    def forget_early(self) -> None:
        """Its device has read it."""
        self.new = replace(self.new, early=b"")

    def close(self) -> None:
        if self.sock is not None:
            self.sock.close()
            self.sock = None


class ModelProcess(Child):
    """One process."""

    most_backlog = 1_024  # nobody else can take a socket: one that is slow to read is waited for

    def __init__(self, device: Device, number: int) -> None:
        super().__init__(device.name)
        self.device = device
        self.number = number
        self.http = Path()
        """The Unix socket on which it answers HTTP."""
        self.boundaries: Boundaries | None = None
        self.clients: dict[int, Client] = {}
        self.slots: dict[str, DeviceSlots] = {}
        """By module, while it serves."""
        self.started = asyncio.Event()
        """Whether its first start has ended, one way or the other."""
        self.start_failure: errors.MoshiSttError | None = None
        self.files = 0
        """POST requests that it has."""
        self.counts = ""
        """Its last answer to `/metrics`."""
        self.died_at: float | None = None
        self.deaths = 0
        self.session: aiohttp.ClientSession | None = None
        self.tested: asyncio.Future[str | None] | None = None

    @property
    def streams(self) -> int:
        return len(self.clients)

    def free(self, module: str) -> int:
        return self.slots[module].free if module in self.slots else 0


class Refused(asyncio.Protocol):
    """The protocol of a socket that no device takes, until it has its connection here."""

    def __init__(self, service: "Service", client: Client) -> None:
        self._service = service
        self._client = client

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        client, service = self._client, self._service
        connection = service.connections.take(
            cast(asyncio.Transport, transport),  # uvloop's is of no such class
            client.new,
            service.find(client.module).engine,
            lambda exc: client.on_gone(),
        )
        connection.open()


class DeviceMetrics(Collector):
    """What the first process knows of the others."""

    def __init__(self, devices: Sequence[ModelProcess]) -> None:
        self._devices = devices

    def collect(self) -> Iterator[Metric]:
        up = GaugeMetricFamily("moshi_stt_device_up", "Whether the model process of a device serves.", labels=["device"])
        deaths = Metric("moshi_stt_device_deaths", "Model processes that have ended by themselves.", "counter")
        for device in self._devices:
            up.add_metric([device.name], float(bool(device.slots)))
            deaths.add_sample("moshi_stt_device_deaths_total", {"device": device.name}, device.deaths)
        yield up
        yield deaths
