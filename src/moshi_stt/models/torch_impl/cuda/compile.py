"""Kernels compiled in parallel, ahead of their first launch. No model and no kernel is known here.

What a step would launch is read (`launch.instead`), each distinct launch is compiled on a thread of a pool (Triton's compiler
and the assembler run outside Python's lock for most of their time), and Triton finds the result when the launch is made. Triton
keeps compiled kernels in a folder (`TRITON_CACHE_DIR`, by default ~/.triton/cache) by what they are made of: other processes,
and later versions with the same kernels, find them there.
"""

import logging
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import torch
from torch import Tensor

from moshi_stt.cores import usable_cores
from moshi_stt.models.torch_impl.cuda.launch import Launch, instead, loading

log = logging.getLogger(__name__)

MOST_THREADS = 16


class Compiler:
    """Compiles what it reads. For one thread, but for its own pool."""

    def __init__(self, device: torch.device, threads: int = 0) -> None:
        """threads: 0 takes as many as there are cores, at most MOST_THREADS."""
        count = threads or min(usable_cores(), MOST_THREADS)
        index = None if device.type != "cuda" else torch.cuda.current_device() if device.index is None else device.index
        self._pool = ThreadPoolExecutor(count, "compiler", initializer=_use_device, initargs=(index,))
        self._known: dict[tuple[Any, ...], Future[None]] = {}

    def read(self, run: Callable[[], object]) -> list["Future[None]"]:
        """Call `run`, whose launches are not made but compiled: a future for each distinct one."""
        found: dict[tuple[Any, ...], Future[None]] = {}

        def note(launch: Launch) -> None:
            light = lighter(launch)
            key = identity(light)
            if key not in self._known:
                self._known[key] = self._pool.submit(_compile, light)
            found[key] = self._known[key]

        with instead(note):
            run()
        return list(found.values())

    @property
    def kernels(self) -> int:
        """How many were read."""
        return len(self._known)

    def close(self) -> None:
        """Compile nothing that is not begun; what is under way ends by itself."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def finish(futures: Iterable["Future[None]"]) -> None:
    """Wait for compilations."""
    wait(futures)


class Pointer:
    """Stands for a tensor in a compilation: what Triton looks at, without the memory."""

    def __init__(self, dtype: torch.dtype, address: int) -> None:
        self.dtype = dtype
        self._address = address

    def data_ptr(self) -> int:
        return self._address

    def ptr_range(self) -> int:
        return 0


def lighter(launch: Launch) -> Launch:
    """The same launch without its tensors' memory."""

    def light(value: Any) -> Any:
        return Pointer(value.dtype, value.data_ptr() % 16) if isinstance(value, Tensor) else value

    return launch._replace(arguments=tuple(light(value) for value in launch.arguments))


def identity(launch: Launch) -> tuple[Any, ...]:
    """What Triton tells compiled kernels apart by: types, divisibility, constants and options."""
    arguments = tuple(
        (value.dtype, value.data_ptr() % 16 == 0)
        if isinstance(value, Pointer | Tensor)
        else (value % 16 == 0, value == 1, value.bit_length() > 31)
        if isinstance(value, int)
        else type(value)
        for value in launch.arguments
    )
    return launch.kernel, arguments, tuple(sorted((name, str(value)) for name, value in launch.options.items()))


def _use_device(index: int | None) -> None:
    if index is not None:
        torch.cuda.set_device(index)


def _compile(launch: Launch) -> None:
    """Compile and load, and leave a failure to the launch itself, which knows what to do then."""
    try:
        compiled = launch.kernel.warmup(*launch.arguments, grid=launch.grid, **launch.options)
        if torch.cuda.is_available() and hasattr(compiled, "_init_handles"):
            with loading:
                compiled._init_handles()  # onto the device, which takes some milliseconds of the first launch otherwise
    except Exception as error:
        log.debug("%s was not compiled ahead: %s", launch.kernel, error)
