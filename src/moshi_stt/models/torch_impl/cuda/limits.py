"""What a GPU allows a kernel: shared memory, instructions, and memory in all. No kernel and no model is known here.

`MOSHI_STT_PRETEND_GPU=8.9:24` (compute capability, GB of memory) takes another card's limits for this one's, so that a large
GPU shows how the server starts and what it holds on a smaller one; the speed stays that of the GPU that is there.
"""

import os
from functools import lru_cache
from typing import NamedTuple

import torch

from moshi_stt.errors import ConfigError

PRETEND_VARIABLE = "MOSHI_STT_PRETEND_GPU"

SHARED_BYTES = {
    (8, 0): 166_912,
    (8, 6): 101_376,
    (8, 7): 166_912,
    (8, 9): 101_376,
    (9, 0): 232_448,
    (10, 0): 232_448,
    (10, 3): 232_448,
    (11, 0): 232_448,
    (12, 0): 101_376,
    (12, 1): 101_376,
}
"""Shared memory that one block may have, by compute capability (CUDA programming guide, technical specifications)."""

SMALLEST_SHARED_BYTES = 101_376
"""Of every GPU from Ampere on."""


class Limits(NamedTuple):
    """capability: of the GPU whose limits these are. shared_bytes: a block's most. memory_bytes: the card's, None if untold."""

    capability: tuple[int, int]
    shared_bytes: int
    memory_bytes: int | None = None

    def buffers(self, stages: int, rows: int) -> int:
        """How many blocks a pipeline of so many stages holds at once, for products of so many rows a tile.

        The matrix units of Hopper and of datacentre Blackwell read shared memory while the next blocks arrive: one more.
        """
        reads_shared = self.capability[0] in (9, 10, 11) and rows >= 64
        return stages if reads_shared else max(1, stages - 1)

    def stages(self, wanted: int, stage_bytes: int, rows: int = 16) -> int:
        """The most stages, up to `wanted`, whose blocks fit; 0 where not even two do."""
        for stages in range(wanted, 1, -1):
            if self.buffers(stages, rows) * stage_bytes <= self.shared_bytes - _RESERVE:
                return stages
        return 0


_RESERVE = 1_024
"""Shared memory that a kernel needs beside its pipeline: barriers, what warps exchange in a reduction."""


def limits_of(device: torch.device) -> Limits:
    """The limits of a device, or the pretended ones. On a CPU, where kernels are interpreted or only compiled, the smallest."""
    pretended = pretended_limits()
    if pretended is not None:
        return pretended
    if device.type != "cuda":
        return Limits((8, 0), SMALLEST_SHARED_BYTES)
    return _device_limits(torch.cuda.current_device() if device.index is None else device.index)


@lru_cache
def _device_limits(index: int) -> Limits:
    properties = torch.cuda.get_device_properties(index)
    capability = (properties.major, properties.minor)
    known = SHARED_BYTES.get(capability, SMALLEST_SHARED_BYTES)
    return Limits(capability, getattr(properties, "shared_memory_per_block_optin", known), properties.total_memory)


@lru_cache
def pretended_limits() -> Limits | None:
    """What MOSHI_STT_PRETEND_GPU says; None where it is not set. Raises ConfigError where it cannot be read."""
    text = os.environ.get(PRETEND_VARIABLE, "")
    if not text:
        return None
    capability, _, gigabytes = text.partition(":")
    major, _, minor = capability.partition(".")
    if not (major.isdecimal() and minor.isdecimal() and (gigabytes.isdecimal() or not gigabytes)):
        raise ConfigError(
            f"{PRETEND_VARIABLE}={text}: expected a compute capability and, behind a colon, GB of memory, as in 8.9:24"
        )
    pair = (int(major), int(minor))
    return Limits(pair, SHARED_BYTES.get(pair, SMALLEST_SHARED_BYTES), int(gigabytes) * 10**9 if gigabytes else None)
