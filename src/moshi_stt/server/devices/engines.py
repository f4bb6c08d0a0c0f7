"""What the first process has in place of an engine: the slots of a module on all devices together. It runs no model."""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace

from moshi_stt.engine.engine import NO_EXTRAS, Engine, EngineInfo, StreamOptions
from moshi_stt.engine.stream import Stream
from moshi_stt.errors import EngineFailed, NoFreeSlot

NONE_RUNS = "no model process is running just now: try again in a moment"


class DeviceSlots:
    """Those of one module on one device. awaiting: streams of sockets that it has not answered yet."""

    def __init__(self, info: EngineInfo) -> None:
        self.info = info
        self.used = 0
        self.queued_samples = 0
        self.awaiting = 0

    @property
    def taken(self) -> int:
        return self.used + self.awaiting

    @property
    def free(self) -> int:
        return self.info.total_slots - self.taken


class DevicesEngine(Engine):
    """A module on several devices, as the server sees an engine. No stream is opened here."""

    def __init__(self, name: str, start: Callable[[], Awaitable[None]]) -> None:
        """name: of the module. start: starts the processes of all devices; returns when they are ready."""
        super().__init__()
        self.info = EngineInfo("", "", "", (), "", "", 0)
        self.name = name
        self._start = start
        self._slots: dict[str, DeviceSlots] = {}

    async def start(self) -> None:
        await self._start()

    async def stop(self) -> None:
        """The processes belong to the pool."""

    def open(self, *, live: bool = True, options: StreamOptions = NO_EXTRAS) -> Stream:
        """Raises NoFreeSlot: whoever comes here found no device."""
        if self.failure is not None:
            raise self.failure
        self.observer.refused()
        raise NoFreeSlot() if self._slots else NoFreeSlot(NONE_RUNS)

    def fail(self, failure: EngineFailed) -> None:
        """Nothing more can be served."""
        self._announce_failure(failure)

    def set_slots(self, slots: Mapping[str, DeviceSlots]) -> None:
        """The devices that serve now, by name."""
        self._slots = dict(slots)
        infos = {device: each.info for device, each in slots.items()}
        if infos:
            details = {f"{device}: {key}": value for device, info in infos.items() for key, value in info.details.items()}
            totals = {device: str(info.total_slots) for device, info in infos.items()}
            first = next(iter(infos.values()))
            details |= {f"{device}: slots": total for device, total in totals.items()}
            self.info = replace(first, device=",".join(infos), total_slots=self.total_slots, details=details)

    @property
    def ready(self) -> bool:
        return bool(self._slots) and self.failure is None

    @property
    def used_slots(self) -> int:
        return sum(each.taken for each in self._slots.values())

    @property
    def total_slots(self) -> int:
        return sum(each.info.total_slots for each in self._slots.values())

    @property
    def queued_samples(self) -> int:
        return sum(each.queued_samples for each in self._slots.values())
