"""`--devices`: what is taken, and what each error says. And what may still be said on the socket of a process that died."""

import argparse
import asyncio
import os
import socket
from pathlib import Path

import pytest
from tests.support.serving import server_config

from moshi_stt import devices
from moshi_stt.cli import worker
from moshi_stt.config_load import load_config
from moshi_stt.devices import Device, parse_devices
from moshi_stt.errors import ConfigError
from moshi_stt.server.devices import boundaries
from moshi_stt.server.devices.boundaries import OVER, PARTIAL, WHOLE, Boundaries, NotedTransport


@pytest.fixture(autouse=True)
def four_cores_and_two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3}, raising=False)
    monkeypatch.setattr(os, "sched_setaffinity", lambda pid, cores: None, raising=False)
    monkeypatch.setattr(devices, "_count_gpus", lambda text: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("all", (Device("cuda:0", gpu=0), Device("cuda:1", gpu=1))),
        ("cuda:1, cuda:0", (Device("cuda:1", gpu=1), Device("cuda:0", gpu=0))),
        ("cpu:0,cpu:1", (Device("cpu:0", cores=(0,)), Device("cpu:1", cores=(1,)))),
        ("cpu:0-1,cpu:2-3", (Device("cpu:0-1", cores=(0, 1)), Device("cpu:2-3", cores=(2, 3)))),
        ("cpu:2-2", (Device("cpu:2", cores=(2,)),)),
        ("cuda:0,cpu:3", (Device("cuda:0", gpu=0), Device("cpu:3", cores=(3,)))),
    ],
)
def test_what_is_taken(text: str, found: tuple[Device, ...]) -> None:
    assert parse_devices(text) == found


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gpu:0", r"--devices gpu:0: 'gpu:0' is no device: expected all, GPUs such as cuda:0,cuda:1, or sets of cores"),
        ("cpu:0,", r"'nothing' is no device|nothing is no device"),
        ("all,cpu:0", r"'all' is no device"),
        ("cpu", r"'cpu' is no device"),
        ("cpu:3-1", r"cpu:3-1 ends before it begins: write cpu:1-3"),
        ("cpu:0,cpu:0", r"core 0 is there twice: give each core to one device"),
        ("cpu:0-2,cpu:2-3", r"core 2 is there in cpu:0-2 and in cpu:2-3"),
        ("cuda:0,cuda:0", r"cuda:0 is there twice: one process serves all streams of a GPU"),
        ("cpu:2-5", r"core 4 is not there; this process may use 4 cores: 0-3"),
        ("cuda:0,cuda:2", r"there is no cuda:2; PyTorch sees cuda:0 to cuda:1 here"),
    ],
)
def test_what_is_not(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_devices(text)


def test_systems_that_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "_count_gpus", lambda text: 0)
    with pytest.raises(ConfigError, match=r"--devices all: PyTorch sees no NVIDIA GPU here\. Leave --devices out"):
        parse_devices("all")
    with pytest.raises(ConfigError, match=r"there is no cuda:0; PyTorch sees no NVIDIA GPU here"):
        parse_devices("cuda:0")
    with monkeypatch.context() as patch:
        patch.delattr(socket, "send_fds", raising=False)
        with pytest.raises(ConfigError, match=r"cannot hand sockets to other processes: name one device"):
            parse_devices("cpu:0,cpu:1")
        assert len(parse_devices("cpu:0")) == 1
    monkeypatch.delattr(os, "sched_setaffinity")
    monkeypatch.setattr(devices.sys, "platform", "darwin")
    with pytest.raises(ConfigError, match=r"macOS does not let a process choose its cores"):
        parse_devices("cpu:0")


def test_a_gpu_is_one_of_those_that_are_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Ray and containers name them: by number or by name."""
    assert Device("cuda:1", gpu=1).environment() == {"CUDA_VISIBLE_DEVICES": "1"}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-5d0a")
    assert Device("cuda:0", gpu=0).environment() == {"CUDA_VISIBLE_DEVICES": "3"}
    assert Device("cuda:1", gpu=1).environment() == {"CUDA_VISIBLE_DEVICES": "GPU-5d0a"}
    assert Device("cpu:0", cores=(0,)).environment() == {}


def arguments(*flags: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    return worker.add_parser(parser.add_subparsers()).parse_args(list(flags))


def test_flags_that_contradict_each_other() -> None:
    config = server_config()
    assert worker.devices_of(arguments(), config) == ()
    assert [each.name for each in worker.devices_of(arguments("--devices", "cpu:0,cpu:1"), config)] == ["cpu:0", "cpu:1"]
    for flags in ("--cpu",), ("--device", "cpu"):
        with pytest.raises(ConfigError, match=rf"{' '.join(flags)} and devices cpu:0 contradict each other"):
            worker.devices_of(arguments("--devices", "cpu:0", *flags), config)
    with pytest.raises(ConfigError, match=r"the embedded model runs on the CPU alone, not on cuda:0"):
        worker.devices_of(arguments("--devices", "cuda:0,cpu:1"), config)


def test_the_configuration_names_devices_too(tmp_path: Path) -> None:
    file = tmp_path / "two.toml"
    server = 'static_dir = "s"\nlog_dir = "l"\ninstance_name = "i"\nauthorized_ids = ["k"]\n'
    ours = '[moshi_stt]\ndevices = "cpu:0,cpu:1"\n[modules.asr]\ntype = "Embedded"\npath = "/x"\n'
    file.write_text(server + ours)
    config = load_config(str(file)).config
    assert [each.name for each in worker.devices_of(arguments(), config)] == ["cpu:0", "cpu:1"]
    assert [each.name for each in worker.devices_of(arguments("--devices", "cpu:3"), config)] == ["cpu:3"]


# ---- what may still be said ------------------------------------------------------------------------------------------


class Buffer(asyncio.Transport):
    """Keeps what the system does not take."""

    def __init__(self) -> None:
        super().__init__()
        self.kept = b""

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.kept += data

    def get_write_buffer_size(self) -> int:
        return len(self.kept)

    def is_closing(self) -> bool:
        return False


def test_a_frame_that_went_out_in_part_is_noted_until_it_is_whole() -> None:
    mine, theirs = socket.socketpair()
    with mine, theirs:
        mine.setblocking(False)
        buffer, notes = Buffer(), list[int]()
        transport = NotedTransport(buffer, mine, notes.append)
        transport.write(b"\x82\x01x")
        assert (theirs.recv(10), notes) == (b"\x82\x01x", [])
        transport.write(b"\x82" + bytes(10_000_000))
        assert notes == [PARTIAL]
        transport.write(b"\x82\x01y")  # waits for its turn
        assert buffer.kept.endswith(b"\x82\x01y")
        transport.settle()
        assert notes == [PARTIAL]
        buffer.kept = b""  # the system took it
        transport.settle()
        assert notes == [PARTIAL, WHOLE]


def test_nothing_follows_our_close() -> None:
    mine, theirs = socket.socketpair()
    with mine, theirs:
        notes = list[int]()
        transport = NotedTransport(Buffer(), mine, notes.append)
        transport.write(b"\x88\x02\x03\xe8")
        assert notes == [OVER]
        transport.settle()
        assert notes == [OVER]


def test_boundaries_are_seen_by_the_other_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(boundaries, "PLACES", 4_096)
    ours = Boundaries()
    theirs = Boundaries(os.dup(ours.descriptor))
    place = ours.take()
    assert ours.may_speak(place)
    theirs.note(place, PARTIAL)
    assert not ours.may_speak(place)
    ours.give_back(place)
    assert ours.take() == place
    assert ours.may_speak(place)
    assert not ours.may_speak(None)
    assert len({ours.take() for _ in range(4_095)}) == 4_095
    assert ours.take() is None
    ours.close()
    theirs.close()
