"""`--devices`: which devices of this machine run a model process each: NVIDIA GPUs, or sets of CPU cores."""

import os
import re
import socket
import subprocess
import sys
from dataclasses import dataclass

from moshi_stt.errors import ConfigError

EXPECTED = "expected all, GPUs such as cuda:0,cuda:1, or sets of cores such as cpu:0-3,cpu:4-7"
MOST_DEVICES = 64
COUNT_SECONDS = 120.0
"""How long PyTorch has to say how many GPUs there are."""

_GPU = re.compile(r"cuda:(\d{1,4})")
_CORES = re.compile(r"cpu:(\d{1,5})(?:-(\d{1,5}))?")


@dataclass(frozen=True)
class Device:
    """A GPU, or a set of cores. name: as in `--devices`. gpu: its number among those that are visible. cores: numbers."""

    name: str
    gpu: int | None = None
    cores: tuple[int, ...] = ()

    @property
    def framework_device(self) -> str:
        """What `device` of a module is in this device's process."""
        return "cpu" if self.gpu is None else "cuda"

    def environment(self) -> dict[str, str]:
        """Variables of its process: the GPU is the only one that it sees."""
        if self.gpu is None:
            return {}
        visible = [each.strip() for each in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if each.strip()]
        return {"CUDA_VISIBLE_DEVICES": visible[self.gpu] if self.gpu < len(visible) else str(self.gpu)}

    def pin(self) -> None:
        """Let this process, and those that it starts, use these cores alone. Before a library starts threads."""
        if self.cores:
            os.sched_setaffinity(0, self.cores)


def parse_devices(text: str) -> tuple[Device, ...]:
    """The devices that `--devices` names, in its order. Raises ConfigError where one cannot be had here."""
    names = [name.strip() for name in text.split(",")]
    if names == ["all"]:
        names = [f"cuda:{number}" for number in range(_count_gpus(text))]
        if not names:
            raise ConfigError(
                "--devices all: PyTorch sees no NVIDIA GPU here. Leave --devices out, or name sets of cores, such as "
                "cpu:0-3,cpu:4-7"
            )
    devices = tuple(_parse(name, text) for name in names)
    _check(devices, text)
    return devices


def _parse(name: str, text: str) -> Device:
    gpu, cores = _GPU.fullmatch(name), _CORES.fullmatch(name)
    if gpu is not None:
        return Device(f"cuda:{int(gpu[1])}", gpu=int(gpu[1]))
    if cores is None:
        raise ConfigError(f"--devices {text}: {name or 'nothing'!r} is no device: {EXPECTED}")
    first = int(cores[1])
    last = first if cores[2] is None else int(cores[2])
    if last < first:
        raise ConfigError(f"--devices {text}: {name} ends before it begins: write cpu:{last}-{first}")
    return Device(f"cpu:{first}" if first == last else f"cpu:{first}-{last}", cores=tuple(range(first, last + 1)))


def _check(devices: tuple[Device, ...], text: str) -> None:
    if len(devices) > MOST_DEVICES:
        raise ConfigError(f"--devices {text}: {len(devices)} devices: expected at most {MOST_DEVICES}")
    taken: dict[int, str] = {}
    for device in devices:
        for core in device.cores:
            if core in taken:
                both = "twice" if taken[core] == device.name else f"in {taken[core]} and in {device.name}"
                raise ConfigError(f"--devices {text}: core {core} is there {both}: give each core to one device")
            taken[core] = device.name
    gpus = [device.gpu for device in devices if device.gpu is not None]
    twice = next((gpu for gpu in gpus if gpus.count(gpu) > 1), None)
    if twice is not None:
        raise ConfigError(f"--devices {text}: cuda:{twice} is there twice: one process serves all streams of a GPU")
    if taken:
        _check_cores(sorted(taken), text)
    if len(devices) > 1 and not hasattr(socket, "send_fds"):
        raise ConfigError(f"--devices {text}: this system cannot hand sockets to other processes: name one device")
    if gpus and text.strip() != "all":
        there = _count_gpus(text)
        if max(gpus) >= there:
            seen = "no NVIDIA GPU" if not there else "cuda:0 alone" if there == 1 else f"cuda:0 to cuda:{there - 1}"
            raise ConfigError(f"--devices {text}: there is no cuda:{max(gpus)}; PyTorch sees {seen} here")


def _check_cores(wanted: list[int], text: str) -> None:
    if not hasattr(os, "sched_setaffinity"):
        system = "macOS" if sys.platform == "darwin" else "this system"
        raise ConfigError(f"--devices {text}: {system} does not let a process choose its cores: leave --devices out")
    usable = sorted(os.sched_getaffinity(0))
    missing = [core for core in wanted if core not in usable]
    if missing:
        raise ConfigError(
            f"--devices {text}: core {missing[0]} is not there; this process may use {len(usable)} cores: {_ranges(usable)}"
        )


def _ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 5] → "0-2, 5"."""
    shown: list[list[int]] = []
    for number in numbers:
        if shown and number == shown[-1][1] + 1:
            shown[-1][1] = number
        else:
            shown.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in shown)


def _count_gpus(text: str) -> int:
    """GPUs that PyTorch sees. Asked in a process of its own, so that this one needs no PyTorch: it has no model."""
    code = "import torch; print(torch.cuda.device_count())"
    try:
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            timeout=COUNT_SECONDS,
            check=True,
            stdin=subprocess.DEVNULL,
        )
        return int(done.stdout.split()[-1])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError) as error:
        said = getattr(error, "stderr", None) or str(error)
        reason = said.strip().splitlines()[-1] if said.strip() else "it printed nothing"
        raise ConfigError(
            f"--devices {text}: PyTorch cannot say which GPUs there are ({reason}): run `moshi-stt doctor`"
        ) from None
