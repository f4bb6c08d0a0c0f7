"""The model processes, one a device, as the first process sees them: starting them, giving them clients, adding up.

The first process listens, answers the handshake and checks keys and limits. Then the socket goes to the device with most free
slots, and files go there by HTTP. It keeps a duplicate of each socket, so that it can tell the client when the process dies
(`boundaries.py`), and gives the socket to another device when one has no slot for it after all.
"""

import asyncio
import itertools
import logging
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiohttp
import msgspec
from aiohttp import web

from moshi_stt import errors
from moshi_stt.config import KyutaiModule, Module, ServerConfig
from moshi_stt.devices import Device
from moshi_stt.errors import EngineError, EngineFailed
from moshi_stt.events import Error
from moshi_stt.server import framing
from moshi_stt.server.devices import farewell, messages
from moshi_stt.server.devices.boundaries import Boundaries
from moshi_stt.server.devices.engines import NONE_RUNS, DevicesEngine, DeviceSlots
from moshi_stt.server.devices.forward import forward
from moshi_stt.server.devices.members import Client, DeviceMetrics, ModelProcess, Refused
from moshi_stt.server.doors.door import Handshake, NewClient
from moshi_stt.server.faults import Fault
from moshi_stt.server.fleet import merge_metrics
from moshi_stt.server.metrics import ENGINE_FAMILIES
from moshi_stt.server.resume import Place
from moshi_stt.server.takeover import LONGEST_PATH
from moshi_stt.server.workers.messages import Failed
from moshi_stt.server.workers.supervisor import Supervisor, sendable

if TYPE_CHECKING:
    from moshi_stt.server.service import Service

log = logging.getLogger(__name__)

COUNT_SECONDS = 1.0
"""How long one has to say what it has counted; then its last answer stands."""

DOWN_SECONDS = 180.0
"""The server ends when no device has served for so long: whoever supervises it may do better."""

SELF_TEST_SECONDS = 300.0

DIED = "the process that ran the model has ended: start a new stream"


class DevicePool(Supervisor[ModelProcess]):
    """All of them. Used on the event loop alone."""

    program = "moshi_stt.server.devices"
    kind = "the model process of"
    stop_seconds = 20.0

    def __init__(self, config: ServerConfig, devices: Sequence[Device], build: messages.Build) -> None:
        """build: makes the engines in each process."""
        self._config = config
        self._build = build
        self._folder: Path | None = None
        self._devices = [ModelProcess(device, number) for number, device in enumerate(devices)]
        super().__init__(self._devices)
        self._service: Service | None = None
        self._ids = itertools.count()
        self._starting: asyncio.Task[None] | None = None
        self._has_started = False
        self._down_since: float | None = None
        self.engines = {module.name: DevicesEngine(module.name, self.start) for module in config.modules}
        """What stands for each module's engine in this process."""

    def attach(self, service: "Service") -> None:
        """service: the server's own, which speaks to clients that no device takes."""
        self._service = service
        service.metrics.registry.register(DeviceMetrics(self._devices))

    @property
    def _place(self) -> Place:
        assert self._service is not None
        return self._service.connections.place

    # ---- starting and ending -----------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Start all, and wait until all are ready. Awaited by each module's engine; the first one starts them.

        Raises what the engines' start raises in the process of any device.
        """
        if self._starting is None:
            self._starting = asyncio.create_task(self._start())
        await self._starting

    async def _start(self) -> None:
        try:
            self._folder = _private_folder()
            for device in self._devices:
                device.http = self._folder / f"{device.number}.sock"
            await self.spawn_all()
        except OSError as error:
            raise EngineError(f"the processes of the devices cannot be started: {error}") from error
        await asyncio.gather(*(self._wait_started(device) for device in self._devices))
        self._has_started = True
        self._set_slots()

    async def _wait_started(self, device: ModelProcess) -> None:
        await device.started.wait()
        if device.start_failure is not None:
            raise device.start_failure

    def environment(self, child: ModelProcess) -> Mapping[str, str]:
        return child.device.environment()

    def arguments(self, child: ModelProcess) -> Sequence[str]:
        return [",".join(map(str, child.device.cores))] if child.device.cores else []

    def set_up(self, child: ModelProcess) -> None:
        child.boundaries = Boundaries()
        if child.session is None:
            connector = aiohttp.UnixConnector(str(child.http), limit=0, force_close=True)
            child.session = aiohttp.ClientSession(connector=connector, auto_decompress=False)
        sharing = [device for device in self._devices if device.device.gpu is not None]
        inner = msgspec.structs.replace(self._config, authorized_ids=frozenset(), wyoming=None, static_dir=None)
        order = messages.SetUp(
            on_device(inner, child.device),
            self._build,
            str(child.http),
            self._place._replace(device=child.number),
            len(self._devices),
            len(sharing) if child in sharing else 1,
            logging.getLogger().level,
            f"{child.name}: ",
        )
        child.send(order, [child.boundaries.descriptor])

    @property
    def is_wanted(self) -> bool:
        return self._has_started  # a server that cannot start says why, and ends

    def _serves(self, device: ModelProcess, started: messages.Started) -> None:
        device.slots = {name: DeviceSlots(info) for name, info in started.infos.items()}
        device.ready.set()
        device.started.set()
        self._set_slots()
        assert device.process is not None
        total = sum(each.info.total_slots for each in device.slots.values())
        again = ""
        if device.died_at is not None:
            seconds = asyncio.get_running_loop().time() - device.died_at
            again = f" again, {seconds:.1f} s after its process ended"
            device.died_at = None
        log.info("%s: serves%s: process %d, %d slots", device.name, again, device.process.pid, total)

    def _set_slots(self) -> None:
        """Let each module's engine know which devices serve: none before all have started, for one may say that it cannot."""
        if not self._has_started:
            return
        for name, engine in self.engines.items():
            engine.set_slots({device.name: device.slots[name] for device in self._devices if name in device.slots})

    def died(self, child: ModelProcess) -> None:
        child.slots = {}
        self._set_slots()
        if child.died_at is None:
            child.died_at = asyncio.get_running_loop().time()
        child.deaths += 1
        if child.start_failure is None and not child.started.is_set():
            child.start_failure = EngineError(f"{child.name}: the model process ended while it started; the log says why")
        child.started.set()
        if child.tested is not None and not child.tested.done():
            child.tested.set_result("the model process ended")

    async def buried(self, child: ModelProcess) -> None:
        """Tell its clients."""
        clients, child.clients = child.clients, {}
        boundaries, child.boundaries = child.boundaries, None
        assert boundaries is not None
        assert self._service is not None
        for client in clients.values():
            client.on_gone()
            if client.sock is None:
                continue
            self._service.metrics.errors.labels("device").inc()
            words = b""
            if boundaries.may_speak(client.boundary) and farewell.takes_data(client.sock):
                words = farewell.last_words(client.new, Error(DIED, framing.INTERNAL))
            log.info("%s: ended: %s", client.new.peer, DIED)
            self.begin(farewell.say(client.sock, words, client.new.peer))
        boundaries.close()

    def look(self) -> None:
        """Give up where no device has served for long."""
        now = asyncio.get_running_loop().time()
        if not self._has_started or any(device.slots for device in self._devices):
            self._down_since = None
        elif self._down_since is None:
            self._down_since = now
        elif now - self._down_since > DOWN_SECONDS:
            for engine in self.engines.values():
                engine.fail(EngineFailed(f"no model process has run for {DOWN_SECONDS:g} s; the log says why"))

    async def stop(self) -> None:
        """End the processes. Idempotent."""
        if self._starting is not None:
            self._starting.cancel()
            await asyncio.gather(self._starting, return_exceptions=True)
        await super().stop()
        for device in self._devices:
            for client in device.clients.values():
                client.close()
            device.clients.clear()
            if device.session is not None:
                await device.session.close()
            if device.boundaries is not None:
                device.boundaries.close()
                device.boundaries = None
        if self._folder is not None:
            await asyncio.to_thread(shutil.rmtree, self._folder, True)

    async def self_test(self, check: messages.Check) -> None:
        """Let the engines of every device pass their self-test. Raises EngineError."""
        loop = asyncio.get_running_loop()
        for device in self._devices:
            device.tested = loop.create_future()
            device.send(messages.SelfTest(check))
        for device in self._devices:
            assert device.tested is not None
            try:
                failure = await asyncio.wait_for(device.tested, SELF_TEST_SECONDS)
            except TimeoutError:
                failure = f"the self-test took longer than {SELF_TEST_SECONDS:g} s"
            if failure is not None:
                raise EngineError(f"{device.name}: {failure}")

    # ---- sockets -----------------------------------------------------------------------------------------------------

    def hand_over(self, module: str, new: NewClient, transport: asyncio.Transport, on_gone: Callable[[], None]) -> bool:
        """To the device with most free slots."""
        client = self._client(module, new, transport, on_gone)
        if client is None:
            return False
        if not self._give(client):
            client.close()
            return False
        transport.abort()  # closes one descriptor of it, not the connection
        return True

    def _client(self, module: str, new: NewClient, transport: asyncio.Transport, on_gone: Callable[[], None]) -> Client | None:
        sock = sendable(transport)
        if sock is None:
            return None
        try:
            duplicate = socket.socket(fileno=os.dup(sock.fileno()))
        except OSError as error:
            log.warning("%s: cannot be given to a device: %s", new.peer, error)
            return None
        return Client(next(self._ids), module, new, duplicate, on_gone)

    def _give(self, client: Client) -> bool:
        """Whether a device has been given it."""
        opening = client.new.opening
        streams = 0 if opening.on_demand else opening.channels
        while True:
            able = [each for each in self._able() if each.name not in client.declined]
            device = max(able, key=lambda each: (each.free(client.module), -len(each.clients)), default=None)
            if device is None or (streams and device.free(client.module) < streams):
                return False
            client.streams = streams
            if self._sent(device, client, messages.Take(client.id, self._boundary(device), client.module, client.new)):
                return True
            client.declined.add(device.name)

    def _able(self) -> list[ModelProcess]:
        """Those that may be given something: the ones that answer, or where none does just now, the ones that did."""
        answering = [device for device in self._devices if device.takes]
        return answering or [device for device in self._devices if device.ready.is_set() and not device.failed]

    @staticmethod
    def _boundary(device: ModelProcess) -> int | None:
        return None if device.boundaries is None else device.boundaries.take()

    def _sent(self, device: ModelProcess, client: Client, order: messages.Take | messages.TakeBack) -> bool:
        """Whether the socket is on its way. The device has it then."""
        assert client.sock is not None
        client.boundary = order.boundary
        device.clients[client.id] = client
        if client.module in device.slots:
            device.slots[client.module].awaiting += client.streams
        try:
            device.send(order, [client.sock.fileno()])
        except OSError as error:
            log.warning("%s: cannot be given to %s: %s", client.new.peer, device.name, error)
        else:
            if device.ready.is_set():
                return True  # else the sending found it dead
        self._remove(device, client.id)
        return False

    def hand_back(self, place: Place, new: NewClient, transport: asyncio.Transport) -> bool:
        if place.replica != self._place.replica or place.device is None or place.device >= len(self._devices):
            return False
        device = self._devices[place.device]
        if not device.ready.is_set():
            return False
        client = self._client("", new, transport, _nobody)
        if client is None:
            return False
        if not self._sent(device, client, messages.TakeBack(client.id, self._boundary(device), place.process, new)):
            client.close()
            return False
        transport.abort()  # closes one descriptor of it, not the connection
        return True

    def _answered(self, device: ModelProcess, id: int) -> Client | None:
        """A device has said what became of a client."""
        client = device.clients.get(id)
        if client is not None and client.streams:
            if client.module in device.slots:
                device.slots[client.module].awaiting -= client.streams
            client.streams = 0
        return client

    def _remove(self, device: ModelProcess, id: int) -> Client | None:
        """A device does not have this client any more."""
        client = self._answered(device, id)
        if client is not None:
            del device.clients[id]
            if device.boundaries is not None:
                device.boundaries.give_back(client.boundary)
            client.boundary = None
        return client

    async def _refuse(self, client: Client) -> None:
        """No device has a slot for it: this process says so, as an engine does that has none."""
        assert self._service is not None
        assert client.sock is not None
        sock, client.sock = client.sock, None
        refused = Refused(self._service, client)
        try:
            await asyncio.get_running_loop().connect_accepted_socket(lambda: refused, sock)
        except OSError:
            sock.close()
            client.on_gone()

    def on_message(self, child: ModelProcess, message: Any) -> None:
        match message:
            case messages.Slots():
                for name, slots in child.slots.items():
                    slots.used = message.used.get(name, 0)
                    slots.queued_samples = message.queued_samples.get(name, 0)
            case messages.Became():
                self._learn(child, message)
            case messages.Started():
                self._serves(child, message)
            case messages.StartFailed():
                kind = getattr(errors, message.kind, EngineError)
                child.start_failure = kind(f"{child.name}: {message.sentence}")
                log.error("%s: %s", child.name, message.sentence)
                child.started.set()
            case messages.SelfTested():
                if child.tested is not None and not child.tested.done():
                    child.tested.set_result(message.failure)
            case Failed():
                child.failed = True
                child.slots = {}
                self._set_slots()

    def _learn(self, device: ModelProcess, became: messages.Became) -> None:
        """Act on what became of a client."""
        has_it = became.fate in ("carried", "passed")
        client = self._answered(device, became.id) if has_it else self._remove(device, became.id)
        if client is None:
            return
        match became.fate:
            case "carried":
                client.forget_early()
            case "passed":
                client.forget_early()
                client.close()
            case "gone":
                client.close()
                client.on_gone()
            case "declined":
                client.declined.add(device.name)
                if not self._give(client):
                    self.begin(self._refuse(client))

    # ---- files and counts --------------------------------------------------------------------------------------------

    async def post(self, request: web.Request, handshake: Handshake, module: str) -> web.StreamResponse:
        """Let the device with most free slots answer. Raises Fault where none serves, or it dies."""
        device = max(self._able(), key=lambda each: (each.free(module) - each.files, -each.files), default=None)
        if device is None or device.session is None:
            raise Fault("full", NONE_RUNS)
        device.files += 1
        try:
            return await forward(request, handshake, device.session)
        finally:
            device.files -= 1

    async def metrics(self, own: str) -> str:
        """The counts of all processes, each series of a model process with its device. own: those of this process."""
        await asyncio.gather(*(self._count(device) for device in self._devices if device.ready.is_set()))
        members = {device.name: device.counts for device in self._devices if device.ready.is_set() and device.counts}
        return merge_metrics(members, "device", own, leave_out=ENGINE_FAMILIES)

    async def _count(self, device: ModelProcess) -> None:
        assert device.session is not None
        with suppress(aiohttp.ClientError, TimeoutError):
            timeout = aiohttp.ClientTimeout(total=COUNT_SECONDS)
            async with device.session.get("http://localhost/metrics", timeout=timeout) as answer:
                device.counts = await answer.text()


def _private_folder() -> Path:
    """A new folder that only this user may open, with a name short enough for Unix sockets. Raises OSError."""
    usual = tempfile.gettempdir()
    return Path(tempfile.mkdtemp(prefix="moshi-stt-", dir=usual if len(os.fsencode(usual)) < LONGEST_PATH - 40 else "/tmp"))


def on_device(config: ServerConfig, device: Device) -> ServerConfig:
    """The configuration with every module on this device."""

    def placed(module: Module) -> Module:
        if not isinstance(module, KyutaiModule):
            return module
        engine = msgspec.structs.replace(module.engine, device=device.framework_device)
        return msgspec.structs.replace(module, engine=engine)

    return msgspec.structs.replace(config, modules=tuple(placed(module) for module in config.modules))


def _nobody() -> None:
    """Is told, and does nothing."""
