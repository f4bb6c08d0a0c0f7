"""Where kernels are launched: on the tensor's device, or in Triton's interpreter on the CPU. No kernel is known here.

Every launch goes through `launch`, so that another reader of the same calls can stand in its place (`instead`): the compiler
that gets kernels ready in parallel (`compile.py`), and the tests that compile them for GPUs which are not there.
"""

import contextlib
import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor

log = logging.getLogger(__name__)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether Triton interprets kernels on the CPU, as it decides when it is imported."""


class Launch(NamedTuple):
    """One launch: a kernel, its grid, its positional arguments, and its constants and options by name."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    options: dict[str, Any]


loading = threading.Lock()
"""Held while a kernel is loaded. Triton below 3.7 loads a C module for each signature, all of them under one name in
`sys.modules`, where two threads can be given each other's: a kernel is then launched with the arguments of another."""

_reader: ContextVar[Callable[[Launch], None] | None] = ContextVar("moshi_stt_launch_reader", default=None)
_replaced: dict[str, str] = {}


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Launch a Triton kernel on the current device, or tell the reader that `instead` has set."""
    reader = _reader.get()
    if reader is None:
        with loading:  # a first launch loads what was not loaded ahead
            kernel[grid](*arguments, **options)
    else:
        reader(Launch(kernel, grid, arguments, options))


@contextlib.contextmanager
def instead(reader: Callable[[Launch], None]) -> Iterator[None]:
    """While this lasts, this thread's launches are not made but told to `reader`. What kernels would write stays undefined."""
    token = _reader.set(reader)
    try:
        yield
    finally:
        _reader.reset(token)


def attempt(name: str, kernel: Callable[[], None], plain: Callable[[], None]) -> None:
    """Run a kernel, or what does the same in PyTorch's own operations where the kernel cannot be built or launched.

    name: of the kernel, for the one line that the log gets. Once it has failed, `plain` is run from then on, for every shape.
    """
    if name in _replaced:
        plain()
        return
    try:
        kernel()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # Triton, its compiler, the assembler and the driver each raise exceptions of their own
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        _replaced[name] = reason
        log.warning("the %s kernel cannot run on this GPU (%s): PyTorch's own operations take its place, slower", name, reason)
        plain()


def device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Make the tensor's GPU the current one; nothing on the CPU, where only Triton's interpreter runs kernels."""
    if tensor.is_cuda and tensor.get_device() != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return contextlib.nullcontext()
