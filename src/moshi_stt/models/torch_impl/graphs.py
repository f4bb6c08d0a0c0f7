"""Steps of fixed sizes, captured once and replayed: `GraphRunner`. It knows no model and captures a function of three tensors.

A step of n rows runs in the smallest bucket that holds them; spare rows point at the scratch slot and are always fresh.
Inputs lie in one pinned buffer, which the caller may fill in place. Slots go over first, the sound beside what needs none;
the outputs come back in one copy. All copies are part of the graph, so that a step is one launch and one wait.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from ctypes import memmove
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moshi_stt.constants import FRAME_SAMPLES
from moshi_stt.cores import usable_cores
from moshi_stt.engine.backend import StepInputs

StepRows = Callable[[Callable[[], Tensor], Tensor, Tensor], Tensor]
"""(load, slots int64 (B,), fresh bool (B,)) -> float32 (B, width): static shapes, no synchronisation.

load: copies the sound to the device, on the stream that is current, and returns it: float32 (B, 1920). To be called once.
"""

SMALL_ROWS = 8
"""Steps of up to so many rows, and that of all rows, are captured before the first stream; others while streams are served."""

BRIEF_ROWS = 256
"""A step of so many rows is waited for without sleeping: to be woken takes longer than a tenth of it."""


LARGE_BYTES = 1 << 20
"""So much sound and more is copied into pinned memory by several threads."""

COPY_THREADS = 4


class Replay(NamedTuple):
    """`begin` starts what was captured, `wait` returns when its results are there."""

    begin: Callable[[], None]
    wait: Callable[[], None]


class Capturer(Protocol):
    """Turns a function on fixed tensors into something to replay."""

    def capture(self, run: Callable[[], None], *, brief: bool) -> Replay:
        """What does the same as `run`, on the same tensors. brief: whether its end is waited for without sleeping."""
        ...

    def host(self, count: int) -> Tensor:
        """`count` bytes of memory that copies to and from the device do not have to stage."""
        ...

    def seconds(self) -> float | None:
        """How long the device worked on the last replay; None where that is not known."""
        ...


class CudaGraphs:
    """CUDA graphs on one stream, sharing one pool: they never run at the same time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._last: tuple[Any, Any] | None = None

    def capture(self, run: Callable[[], None], *, brief: bool) -> Replay:
        with torch.cuda.stream(self.stream):
            run()  # compiles kernels and makes handles, which cannot be captured
        self.stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self.stream, capture_error_mode="thread_local"):
            run()
        started = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        done = torch.cuda.Event(enable_timing=True, blocking=not brief)  # type: ignore[no-untyped-call]

        def begin() -> None:
            with torch.cuda.stream(self.stream):
                started.record(self.stream)
                graph.replay()
                done.record(self.stream)

        def wait() -> None:
            done.synchronize()
            self._last = started, done

        return Replay(begin, wait)

    def seconds(self) -> float | None:
        if self._last is None:
            return None
        started, done = self._last
        return float(started.elapsed_time(done)) / 1e3

    def host(self, count: int) -> Tensor:
        return torch.empty(count, dtype=torch.uint8, pin_memory=True)


class SlotCopier:
    """Copies one slot of many tensors onto another, in one launch. For one thread."""

    def __init__(self, tensors: Sequence[Tensor], graphs: Capturer, device: torch.device) -> None:
        """tensors: (slots, ...), each contiguous in what a slot has."""
        # Indexing is not there for 8-bit floats.
        self._tensors = [tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor for tensor in tensors]
        self._host = graphs.host(16).view(torch.int64).zero_()
        self._slots = torch.zeros(2, dtype=torch.int64, device=device)
        self._replay = graphs.capture(self._run, brief=True)

    def _run(self) -> None:
        self._slots.copy_(self._host, non_blocking=True)
        source, target = self._slots[:1], self._slots[1:]
        for tensor in self._tensors:
            tensor.index_copy_(0, target, tensor.index_select(0, source))

    def copy(self, source: int, target: int) -> None:
        """Make slot `target` what slot `source` is."""
        self._host.numpy()[:] = source, target
        self._replay.begin()
        self._replay.wait()


class _Bucket(NamedTuple):
    output: NDArray[np.float32]
    """(n, width), on the host."""
    replay: Replay


class GraphRunner:
    """Runs `step_rows` in buckets. For one thread.

    inputs: of the largest bucket. What a caller writes there is stepped without another copy on the host.
    """

    def __init__(
        self, step_rows: StepRows, *, width: int, scratch: int, buckets: tuple[int, ...], device: torch.device, graphs: Capturer
    ) -> None:
        """width: columns of the output. scratch: the slot of spare rows. buckets: ascending row counts."""
        self.buckets = buckets
        self._step_rows = step_rows
        self._width = width
        self._scratch = scratch
        self._graphs = graphs
        largest = buckets[-1]
        self._host_in = graphs.host(_header_bytes(largest) + largest * 4 * FRAME_SAMPLES)
        self._host_out = graphs.host(largest * width * 4)
        self._device_in = torch.empty(len(self._host_in), dtype=torch.uint8, device=device)
        pcm, slots, fresh = self._cut(self._host_in, largest)
        self.inputs = StepInputs(pcm.numpy(), slots.numpy(), fresh.numpy())
        self._started = 0
        self._taken = torch.zeros(1, dtype=torch.int64, device=device)
        """Steps whose inputs have come over, as the device counts them; and on the host."""
        self._host_taken = graphs.host(8).view(torch.int64).zero_()
        self._captured: dict[int, _Bucket] = {}
        self._usable = buckets
        self._copiers = min(COPY_THREADS, usable_cores())
        self._pool = ThreadPoolExecutor(self._copiers, "sound")  # its threads sleep between steps, PyTorch's would spin

    def prepare(self) -> None:
        """Capture every bucket, the largest first, so that the smaller ones fit into its memory."""
        for rows in reversed(self.buckets):
            self._bucket(rows)
        self._usable = self.buckets

    @property
    def first_buckets(self) -> tuple[int, ...]:
        """What `begin` captures, in this order: the largest, which needs most memory, then the small ones."""
        largest = self.buckets[-1]
        return (largest, *(rows for rows in self.buckets if rows <= SMALL_ROWS and rows != largest))

    @property
    def later_buckets(self) -> tuple[int, ...]:
        """What `begin` leaves to `go_on`, in this order."""
        return tuple(rows for rows in self.buckets if rows not in self.first_buckets)

    def begin(self) -> None:
        """Capture the first buckets. Until `go_on` captures others, a step runs in the smallest captured one that holds it."""
        for rows in self.first_buckets:
            self._bucket(rows)
        self._usable = tuple(sorted(self._captured))

    def go_on(self, is_ready: Callable[[int], bool] = lambda rows: True) -> bool:
        """Capture the next bucket that is ready. Whether any are left to capture."""
        left = [rows for rows in self.buckets if rows not in self._captured]
        for rows in left:
            if is_ready(rows):
                self._bucket(rows)
                self._usable = tuple(sorted(self._captured))
                return len(left) > 1
        return bool(left)

    @property
    def device_seconds(self) -> float | None:
        """How long the device worked on the last replay."""
        return self._graphs.seconds()

    def read(self, rows: int) -> None:
        """Run a step of so many rows outside a graph, on inputs of zeros: for who reads what it launches."""
        self._device_in.zero_()
        pcm, slots, fresh = self._cut(self._device_in, rows)
        self._step_rows(lambda: pcm, slots, fresh)

    def step(self, pcm: NDArray[np.float32], slots: NDArray[np.int64], fresh: NDArray[np.bool_]) -> NDArray[np.float32]:
        """Step rows, any number of them: float32 (B, width). More than the largest bucket holds go in several steps."""
        return self.start(pcm, slots, fresh)()

    def start(
        self, pcm: NDArray[np.float32], slots: NDArray[np.int64], fresh: NDArray[np.bool_]
    ) -> Callable[[], NDArray[np.float32]]:
        """Start a step: the call that is returned waits for its output. See `engine.backend.StepsAhead`.

        Where it takes several, those are over when this returns.
        """
        largest = self.buckets[-1]
        if len(slots) <= largest:
            return self._start(StepInputs(pcm, slots, fresh))
        parts = [slice(start, start + largest) for start in range(0, len(slots), largest)]
        output = np.concatenate([self._start(StepInputs(pcm[part], slots[part], fresh[part]))() for part in parts])
        return lambda: output

    def _start(self, given: StepInputs) -> Callable[[], NDArray[np.float32]]:
        rows = len(given.slots)
        size = next(size for size in self._usable if size >= rows)
        output, replay = self._bucket(size)
        self._put(given)
        self.inputs.slots[rows:size] = self._scratch
        self.inputs.fresh[rows:size] = True
        replay.begin()
        self._started += 1

        def finish() -> NDArray[np.float32]:
            replay.wait()
            return output[:rows].copy()

        return finish

    @property
    def has_read_inputs(self) -> bool:
        """Whether the step that was started last has its inputs on the device, so that `inputs` may be written to."""
        return int(self._host_taken[0]) >= self._started

    def _put(self, given: StepInputs) -> None:
        """Copy what does not lie in the inputs yet."""
        pcm, into = given.pcm, self.inputs.pcm[: len(given.pcm)]
        source, target, size = pcm.ctypes.data, into.ctypes.data, pcm.nbytes
        if size >= LARGE_BYTES and source != target and pcm.flags.c_contiguous:
            each = -(-size // self._copiers)
            parts = [(target + at, source + at, min(each, size - at)) for at in range(0, size, each)]
            others = [self._pool.submit(memmove, *part) for part in parts[1:]]
            memmove(*parts[0])
            for other in others:
                other.result()
            given = given._replace(pcm=into)
        self.inputs.put(given)

    def _bucket(self, rows: int) -> _Bucket:
        if rows not in self._captured:
            self._captured[rows] = self._capture(rows)
        return self._captured[rows]

    def _capture(self, rows: int) -> _Bucket:
        """Capture a step of so many rows, all of them spare."""
        header = _header_bytes(self.buckets[-1])
        pcm, slots, fresh = self._cut(self._device_in, rows)
        host_pcm = self._cut(self._host_in, rows)[0]
        host_out = self._host_out[: rows * self._width * 4].view(torch.float32).view(rows, self._width)
        parts: tuple[NDArray[Any], ...] = self.inputs
        kept = [part[:rows].copy() for part in parts]
        self.inputs.pcm[:rows] = 0
        self.inputs.slots[:rows] = self._scratch
        self.inputs.fresh[:rows] = True

        def load() -> Tensor:
            pcm.copy_(host_pcm, non_blocking=True)  # slots and fresh went before it
            self._host_taken.copy_(self._taken.add_(1), non_blocking=True)
            return pcm

        def run() -> None:
            self._device_in[:header].copy_(self._host_in[:header], non_blocking=True)
            host_out.copy_(self._step_rows(load, slots, fresh), non_blocking=True)

        replay = self._graphs.capture(run, brief=rows <= BRIEF_ROWS)
        self._started = int(self._taken)
        for part, before in zip(parts, kept, strict=True):
            part[:rows] = before
        return _Bucket(host_out.numpy(), replay)

    def _cut(self, buffer: Tensor, rows: int) -> tuple[Tensor, Tensor, Tensor]:
        """pcm, slots and fresh of the first rows of a packed buffer."""
        largest = self.buckets[-1]
        start = _header_bytes(largest)
        pcm = buffer[start : start + rows * 4 * FRAME_SAMPLES].view(torch.float32).view(rows, FRAME_SAMPLES)
        return pcm, buffer[: 8 * rows].view(torch.int64), buffer[8 * largest : 8 * largest + rows].view(torch.bool)


def _header_bytes(largest: int) -> int:
    """Slots and fresh of every row lie in front, whatever the bucket, so that the sound always begins at the same place."""
    return -(-9 * largest // 256) * 256


def bucket_sizes(slots: int) -> tuple[int, ...]:
    """1, 2, 4, … 256, then steps of half a power, up to the slots themselves."""
    sizes = {1 << i for i in range(9)} | {k << i for i in range(7, 16) for k in (2, 3)}
    return (*sorted(size for size in sizes if size < slots), slots)
