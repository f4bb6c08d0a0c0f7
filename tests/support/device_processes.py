"""A server with two model processes, whose model hears levels. For tests of `worker --devices`."""

import os
import signal
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import numpy as np
import pytest
from tests.support.level_speech import pause, say
from tests.support.scripted_backend import LevelModel, loader, spell_level
from tests.support.serving import Running, server_config, serving, until

from moshi_stt.config import ServerConfig, WyomingConfig
from moshi_stt.devices import Device
from moshi_stt.engine.batch import BatchEngine
from moshi_stt.engine.engine import Engine
from moshi_stt.errors import CheckpointError
from moshi_stt.server.devices import messages
from moshi_stt.server.devices.pool import DevicePool
from moshi_stt.server.workers import supervisor

NAMES = ("cpu:0", "cpu:1")
STREAMS = 4
"""Of each."""

DEVICES = tuple(Device(name) for name in NAMES)
"""Without cores, so that they are there on any machine."""

GAP = 0.24


def levels(config: ServerConfig, processes: int = 0) -> Mapping[str, Engine]:
    """An engine of levels for each module. Called in the model processes."""
    return {
        module.name: BatchEngine(loader(LevelModel, STREAMS, spell_level, processes), marker_wait_seconds=0.05)
        for module in config.modules
    }


def levels_with_a_worker(config: ServerConfig) -> Mapping[str, Engine]:
    """The same, whose sockets are carried by one more process for each device."""
    return levels(config, 1)


def no_model(config: ServerConfig) -> Mapping[str, Engine]:
    """What the loading of weights that are not there comes to."""

    def load() -> Any:
        raise CheckpointError("model.safetensors: not there. Fetch it again.")

    return {module.name: BatchEngine(load) for module in config.modules}


@asynccontextmanager
async def on_devices(
    monkeypatch: pytest.MonkeyPatch | None = None, build: messages.Build = levels, **limits: Any
) -> AsyncIterator[tuple[Running, DevicePool]]:
    """A server with both, and its pool. Where a monkeypatch is given, one that died is started again at once."""
    if monkeypatch is not None:
        monkeypatch.setattr(supervisor, "FIRST_PAUSE_SECONDS", 0.01)
    limits = {"silent_seconds": 600.0, **limits}  # clients of tests do not answer pings while the test waits
    config = msgspec.structs.replace(server_config(**limits), wyoming=WyomingConfig(uri="tcp://127.0.0.1:0"))
    pool = DevicePool(config, DEVICES, build)
    async with serving(dict(pool.engines), config, devices=pool) as running:
        yield running, pool
    for device in pool._devices:
        assert device.process is not None
        assert device.process.returncode == 0
        assert not device.clients
    assert pool._folder is not None
    assert not pool._folder.exists()


def speech(numbers: list[int]) -> np.ndarray:
    return np.concatenate([say(numbers, gap=GAP), pause(0.5)])


def pid(pool: DevicePool, number: int) -> int:
    process = pool._devices[number].process
    assert process is not None
    return process.pid


def clients(pool: DevicePool) -> list[int]:
    """How many sockets each device has."""
    return [len(device.clients) for device in pool._devices]


async def kill(pool: DevicePool, number: int) -> None:
    """`kill -9` of a model process, and wait for the next."""
    device = pool._devices[number]
    process = device.process
    os.kill(pid(pool, number), signal.SIGKILL)
    await until(lambda: device.process is not process and device.ready.is_set(), "the new process")
