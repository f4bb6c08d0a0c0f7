"""One backend for several processes: shared memory for the rows, a socket pair for "go".

The process that has the model owns a `BackendServer`; each other process has a `RemoteBackend`, a `Backend` like any other,
whose rows the server's owner steps together with everybody else's. A request is 9 bytes (what, and two numbers), the answer to
a step one byte; what they are about lies in a `RowBlock`, which belongs to the remote process from the answer to the next
request and to the server in between. A process that dies closes its socket, which is all that the others notice.
"""

import contextlib
import mmap
import os
import selectors
import socket
import struct
import tempfile
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import DTypeLike, NDArray

from moshi_stt.engine.backend import StepInputs, StepOutput
from moshi_stt.engine.sharing import BackendLink
from moshi_stt.errors import EngineError

_REQUEST: Final = struct.Struct("<BII")
_STEP: Final = 1
"""With the number of rows."""
_COPY: Final = 2
"""With source and target slot."""
_DONE: Final = b"\0"
"""Of a step. Copies have no answer."""
_GONE: Final = "the process that runs the model has ended"
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

    inputs: pcm float32 (B, frame_samples), slots int64 (B,), fresh bool (B,). output: token int64 (B,), log-probability
    float32 (B,), pause float32 (B, pause_heads).
    """

    def __init__(self, descriptor: int, rows: int, pause_heads: int, frame_samples: int) -> None:
        """descriptor: of a `shared_file` of `size(rows, pause_heads, frame_samples)` bytes; the caller closes it."""
        memory = mmap.mmap(descriptor, self.size(rows, pause_heads, frame_samples))
        arrays: list[NDArray[Any]] = []
        start = 0
        for dtype, shape in _arrays(rows, pause_heads, frame_samples):
            arrays.append(np.ndarray(shape, dtype, memory, start))
            start += _padded(arrays[-1].nbytes)
        self.rows = rows
        self.inputs = StepInputs(*arrays[:3])
        self.output = StepOutput(*arrays[3:])

    @staticmethod
    def size(rows: int, pause_heads: int, frame_samples: int) -> int:
        arrays = _arrays(rows, pause_heads, frame_samples)
        return sum(_padded(int(np.prod(shape)) * np.dtype(dtype).itemsize) for dtype, shape in arrays)


def _arrays(rows: int, pause_heads: int, frame_samples: int) -> tuple[tuple[DTypeLike, tuple[int, ...]], ...]:
    return (
        (np.float32, (rows, frame_samples)),
        (np.int64, (rows,)),
        (np.bool_, (rows,)),
        (np.int64, (rows,)),
        (np.float32, (rows,)),
        (np.float32, (rows, pause_heads)),
    )


def _padded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


# ---- the side that has the model -----------------------------------------------------------------------------------------


class SocketWakeup:
    """As a `threading.Event` for one waiting thread, which also wakes when there is something to read from sockets."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._in, self._out = socket.socketpair()
        self._in.setblocking(False)
        self._out.setblocking(False)
        self._selector.register(self._in, selectors.EVENT_READ)
        self._is_set = False

    def set(self) -> None:
        """Wake the thread. Any thread."""
        if not self._is_set:
            self._is_set = True
            with contextlib.suppress(OSError):  # full: it is awake; closed: nobody is there
                self._out.send(b"w")

    def clear(self) -> None:
        """Forget that `set` was called. What it was called for must be looked at after this."""
        if self._is_set:
            with contextlib.suppress(BlockingIOError):
                self._in.recv(4_096)
            self._is_set = False

    def wait(self, timeout: float | None = None) -> None:
        """Return when `set` was called, a socket can be read, or the time is over."""
        if not self._is_set:
            for key, _ in self._selector.select(timeout):
                if key.data is None:
                    self._is_set = True  # its byte may have come after the `clear` that was meant to take it

    def register(self, source: socket.socket, data: object) -> None:
        """Also wake for what comes from this socket. data: names it in `readable`."""
        self._selector.register(source, selectors.EVENT_READ, data)

    def unregister(self, source: socket.socket) -> None:
        self._selector.unregister(source)

    def readable(self) -> list[Any]:
        """The data of the sockets that can be read now."""
        return [key.data for key, _ in self._selector.select(0) if key.data is not None]

    def close(self) -> None:
        self._selector.close()
        self._in.close()
        self._out.close()


@dataclass(eq=False)
class _Client:
    """One process. asked: rows of the step it waits for, 0 when it waits for none. on_gone: see `BackendServer.connect`."""

    block: RowBlock
    signal: socket.socket
    on_gone: Callable[[], None]
    asked: int = 0


class RowRequest(NamedTuple):
    """A step that a process waits for."""

    client: _Client
    rows: int

    @property
    def inputs(self) -> StepInputs:
        """Its rows."""
        return self.client.block.inputs.rows(0, self.rows)


class BackendServer:
    """Collects the rows of other processes. `collect`, `answer`, `close` and waiting on `wakeup` belong to the model thread."""

    def __init__(self, rows: int, pause_heads: int, frame_samples: int) -> None:
        """rows: the most that one process may have in a step."""
        self.wakeup = SocketWakeup()
        """Also wakes for the requests of other processes."""
        self._shape = rows, pause_heads, frame_samples
        self._arriving: deque[_Client] = deque()
        self._clients: set[_Client] = set()
        self._closed = False

    def connect(self, on_gone: Callable[[], None]) -> BackendLink:
        """A link for one more process. Any thread.

        on_gone: called once, by any thread, when the process has gone and no row of it is under way any more.
        """
        memory = shared_file(RowBlock.size(*self._shape))
        try:
            block = RowBlock(memory, *self._shape)
            here, there = socket.socketpair()
        except BaseException:
            os.close(memory)
            raise
        here.setblocking(False)
        self._arriving.append(_Client(block, here, on_gone))
        self.wakeup.set()
        if self._closed:
            self._refuse_arriving()
        return BackendLink(memory, there)

    @property
    def is_shared(self) -> bool:
        """Whether another process has, or is getting, a link."""
        return bool(self._clients or self._arriving)

    def collect(self, copy: Callable[[int, int], None]) -> list[RowRequest]:
        """The steps that are waited for now, and have no answer yet. Requests to copy a slot are done by `copy` on the way."""
        while self._arriving:
            client = self._arriving.popleft()
            self._clients.add(client)
            self.wakeup.register(client.signal, client)
        if not self._clients:
            return []
        for client in self.wakeup.readable():
            self._read(client, copy)
        return [RowRequest(client, client.asked) for client in self._clients if client.asked]

    def _read(self, client: _Client, copy: Callable[[int, int], None]) -> None:
        """Copies, and the step that follows them if it is there already."""
        while not client.asked:
            try:
                data = client.signal.recv(_REQUEST.size)
            except BlockingIOError:
                return
            except OSError:
                data = b""
            if len(data) < _REQUEST.size:
                self._drop(client)
                return
            kind, first, second = _REQUEST.unpack(data)
            if kind == _COPY:
                copy(first, second)
            else:
                client.asked = min(first, client.block.rows)

    def answer(self, requests: list[RowRequest], output: StepOutput, start: int) -> None:
        """Give each request its rows of `output`, the first of which is `start`."""
        for client, rows in requests:
            client.block.output.put(output.rows(start, start + rows))
            start += rows
            client.asked = 0
            self._send(client)

    def _send(self, client: _Client) -> None:
        try:
            client.signal.send(_DONE)
        except OSError:
            self._drop(client)

    def _drop(self, client: _Client) -> None:
        client.asked = 0
        self._clients.discard(client)
        self.wakeup.unregister(client.signal)
        client.signal.close()
        client.on_gone()

    def _refuse_arriving(self) -> None:
        while self._arriving:
            client = self._arriving.popleft()
            client.signal.close()
            client.on_gone()

    def close(self) -> None:
        """Let every process know that there is no model any more."""
        if self._closed:
            return
        self._closed = True
        for client in list(self._clients):
            self._drop(client)
        self._refuse_arriving()
        self.wakeup.close()


# ---- the other side ------------------------------------------------------------------------------------------------------


class RemoteBackend:
    """A `Backend` whose steps are done in another process. Rows written into `inputs` are not copied on this side."""

    def __init__(self, block: RowBlock, signal: socket.socket, slots: int, pause_heads: int) -> None:
        """signal: this side's end of the pair, which `close` closes. slots: of the whole model."""
        self.slots = slots
        self.pause_heads = pause_heads
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
        try:
            self._signal.sendall(_REQUEST.pack(_STEP, rows, 0))
            answer = self._signal.recv(1)
        except OSError:
            answer = b""
        if answer != _DONE:
            raise EngineError(_GONE)
        token, logprob, pause = self._block.output
        return StepOutput(token[:rows].copy(), logprob[:rows].copy(), pause[:rows].copy())

    def copy(self, source: int, target: int) -> None:
        """See `engine.Backend`. It is done before the next step, and is not waited for: that would be a turn of the model.

        Raises EngineError when the model's process has gone.
        """
        try:
            self._signal.sendall(_REQUEST.pack(_COPY, source, target))
        except OSError:
            raise EngineError(_GONE) from None

    def warm_up(self) -> None:
        """The model is warm before anybody shares it."""

    def close(self) -> None:
        """Leave. A `step` that another thread waits in ends with an error."""
        with contextlib.suppress(OSError):
            self._signal.shutdown(socket.SHUT_RDWR)
        self._signal.close()
