"""Rows of other processes for one backend: shared memory for numbers, a socket pair for "go". Knows no streams and no model.

The process that has the model owns a `RowHub`; each other process has a `RowClient`, a `Backend` like any other, whose rows the
hub's owner steps together with everybody else's. A request is 9 bytes (what, and two numbers), an answer one byte; what they
are about lies in a `RowBlock`, which belongs to the client from the answer to the next request and to the hub in between. A
process that dies closes its socket, which is all that the others notice.
"""

import contextlib
import mmap
import os
import selectors
import socket
import struct
import tempfile
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import DTypeLike, NDArray

from moshi_stt.constants import FRAME_SAMPLES
from moshi_stt.engine.engine import StepInputs, StepOutput
from moshi_stt.errors import EngineError

_REQUEST: Final = struct.Struct("<BII")
_STEP: Final = 1
"""With the number of rows."""
_COPY: Final = 2
"""With source and target slot."""
_DONE: Final = b"\0"
_ALIGNMENT: Final = 64


def shared_file(size: int) -> int:
    """A descriptor of so many bytes of memory without a name, for `mmap` here and in a process that it is given to."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("moshi-stt-rows")
    else:
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    os.ftruncate(descriptor, size)
    return descriptor


class RowBlock:
    """The arrays of one process's rows, in shared memory.

    inputs: pcm float32 (B, 1920), slots int64 (B,), fresh bool (B,). output: token int64 (B,), log-probability float32 (B,),
    pause float32 (B, heads).
    """

    def __init__(self, descriptor: int, rows: int, heads: int) -> None:
        """descriptor: of a `shared_file` of `size(rows, heads)` bytes; the caller closes it."""
        memory = mmap.mmap(descriptor, self.size(rows, heads))
        arrays: list[NDArray[Any]] = []
        start = 0
        for dtype, shape in _arrays(rows, heads):
            arrays.append(np.ndarray(shape, dtype, memory, start))
            start += _padded(arrays[-1].nbytes)
        self.rows = rows
        self.inputs = StepInputs(*arrays[:3])
        self.output = StepOutput(*arrays[3:])

    @staticmethod
    def size(rows: int, heads: int) -> int:
        return sum(_padded(int(np.prod(shape)) * np.dtype(dtype).itemsize) for dtype, shape in _arrays(rows, heads))


def _arrays(rows: int, heads: int) -> tuple[tuple[DTypeLike, tuple[int, ...]], ...]:
    return (
        (np.float32, (rows, FRAME_SAMPLES)),
        (np.int64, (rows,)),
        (np.bool_, (rows,)),
        (np.int64, (rows,)),
        (np.float32, (rows,)),
        (np.float32, (rows, heads)),
    )


def _padded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


# ---- the side that has the model -----------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Port:
    """One client. asked: rows of the step it waits for, 0 when it waits for none. on_gone: see `RowHub.add`."""

    block: RowBlock
    signal: socket.socket
    on_gone: Callable[[], None]
    asked: int = 0


class RowRequest(NamedTuple):
    """A step that a process waits for."""

    port: _Port
    rows: int


class RowHub:
    """Collects the rows of other processes, and wakes the model thread, whose are `wait`, `clear`, `collect` and `answer`.

    It stands where a `threading.Event` would for a thread that waits for streams of its own process alone.
    """

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._wake_in, self._wake_out = socket.socketpair()
        self._wake_in.setblocking(False)
        self._wake_out.setblocking(False)
        self._selector.register(self._wake_in, selectors.EVENT_READ)
        self._is_set = False
        self._arriving: deque[_Port] = deque()
        self._ports: set[_Port] = set()
        self._closed = False
        self.heard_at = -1e9
        """time.monotonic() when a process last had rows."""

    def add(self, block: RowBlock, signal: socket.socket, on_gone: Callable[[], None]) -> None:
        """Take a process in. Any thread. signal: this side's end, which the hub closes.

        on_gone: called once, by any thread, when the process has gone and no row of it is under way any more.
        """
        signal.setblocking(False)
        self._arriving.append(_Port(block, signal, on_gone))
        self.set()
        if self._closed:
            self._refuse_arriving()

    def set(self) -> None:
        """Wake the model thread. Any thread."""
        if not self._is_set:
            self._is_set = True
            with contextlib.suppress(OSError):  # full: it is awake; closed: nobody is there
                self._wake_out.send(b"w")

    def clear(self) -> None:
        """Forget that `set` was called. What it was called for must be looked at after this."""
        if self._is_set:
            with contextlib.suppress(BlockingIOError):
                self._wake_in.recv(4_096)
            self._is_set = False

    def wait(self, timeout: float | None = None) -> None:
        """Return when `set` was called, a process has rows, or the time is over."""
        if not self._is_set:
            for key, _ in self._selector.select(timeout):
                if key.data is None:
                    self._is_set = True  # its byte may have come behind the `clear` that was meant to take it

    def collect(self, copy: Callable[[int, int], None]) -> list[RowRequest]:
        """The steps that are waited for now, and have no answer yet. Requests to copy a slot are done by `copy` on the way."""
        while self._arriving:
            port = self._arriving.popleft()
            self._ports.add(port)
            self._selector.register(port.signal, selectors.EVENT_READ, port)
        if not self._ports:
            return []
        for key, _ in self._selector.select(0):
            if isinstance(key.data, _Port):
                self._read(key.data, copy)
        requests = [RowRequest(port, port.asked) for port in self._ports if port.asked]
        if requests:
            self.heard_at = time.monotonic()
        return requests

    def _read(self, port: _Port, copy: Callable[[int, int], None]) -> None:
        try:
            data = port.signal.recv(_REQUEST.size)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if len(data) < _REQUEST.size:
            self._drop(port)
            return
        kind, first, second = _REQUEST.unpack(data)
        if kind == _COPY:
            copy(first, second)
            self._send(port)
        else:
            port.asked = min(first, port.block.rows)

    def answer(self, requests: list[RowRequest], output: StepOutput, start: int) -> None:
        """Give each request its rows of `output`, the first of which is `start`."""
        for port, rows in requests:
            port.block.output.put(output.rows(start, start + rows))
            start += rows
            port.asked = 0
            self._send(port)

    def _send(self, port: _Port) -> None:
        try:
            port.signal.send(_DONE)
        except OSError:
            self._drop(port)

    def _drop(self, port: _Port) -> None:
        port.asked = 0
        self._ports.discard(port)
        self._selector.unregister(port.signal)
        port.signal.close()
        port.on_gone()

    def _refuse_arriving(self) -> None:
        while self._arriving:
            port = self._arriving.popleft()
            port.signal.close()
            port.on_gone()

    def close(self) -> None:
        """Let every process know that there is no model any more."""
        if self._closed:
            return
        self._closed = True
        for port in list(self._ports):
            self._drop(port)
        self._refuse_arriving()
        self._selector.close()
        self._wake_in.close()
        self._wake_out.close()


# ---- the other side ------------------------------------------------------------------------------------------------------


class RowClient:
    """A `Backend` whose steps are done in another process. Rows written into `inputs` are not copied on this side."""

    def __init__(self, block: RowBlock, signal: socket.socket, slots: int, heads: int) -> None:
        """signal: this side's end of the pair, which `close` closes. slots: of the whole model."""
        self.slots = slots
        self.heads = heads
        self._block = block
        self._signal = signal
        signal.settimeout(None)

    @property
    def inputs(self) -> StepInputs:
        return self._block.inputs

    def step(self, pcm: NDArray[np.float32], slots: NDArray[np.int64], fresh: NDArray[np.bool_]) -> StepOutput:
        """See `engine.Backend`. Raises EngineError when the model's process has gone."""
        rows = len(slots)
        self._block.inputs.put(StepInputs(pcm, slots, fresh))
        self._ask(_STEP, rows, 0)
        token, logprob, pause = self._block.output
        return StepOutput(token[:rows].copy(), logprob[:rows].copy(), pause[:rows].copy())

    def copy(self, source: int, target: int) -> None:
        """See `engine.Backend`."""
        self._ask(_COPY, source, target)

    def _ask(self, kind: int, first: int, second: int) -> None:
        try:
            self._signal.sendall(_REQUEST.pack(kind, first, second))
            answer = self._signal.recv(1)
        except OSError:
            answer = b""
        if answer != _DONE:
            raise EngineError("the process that runs the model has ended")

    def warm_up(self) -> None:
        """The model is warm before anybody shares it."""

    def close(self) -> None:
        """Leave. A `step` that another thread waits in ends with an error."""
        with contextlib.suppress(OSError):
            self._signal.shutdown(socket.SHUT_RDWR)
        self._signal.close()
