"""Steps of fixed sizes, captured once and replayed: `GraphRunner`. Knows no model: it captures a function of three tensors.

A step of n rows runs in the smallest bucket that holds them; spare rows point at the scratch slot and are always fresh.
Inputs lie in one pinned buffer, which the caller may fill in place, and go over in one copy; the outputs come back in one.
There are two of each, so that one step can be prepared, and the last one's output read, while another is under way.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moshi_stt.constants import FRAME_SAMPLES
from moshi_stt.engine.engine import StepInputs

StepRows = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(pcm float32 (B, 1920), slots int64 (B,), fresh bool (B,)) -> float32 (B, width): static shapes, no synchronisation."""


class Capturer(Protocol):
    """Turns a function on fixed tensors into something to replay, and keeps what is started in order."""

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        """A call that starts what `run` does, on the same tensors."""
        ...

    def ordered(self) -> AbstractContextManager[object]:
        """Within it, what is started runs behind what was started before."""
        ...

    def mark(self) -> Callable[[], None]:
        """A call that waits until all that was started so far has been done."""
        ...

    def host(self, count: int) -> Tensor:
        """`count` bytes of memory that copies to and from the device do not have to stage."""
        ...


class CudaGraphs:
    """CUDA graphs on one stream, sharing one pool: they never run at the same time."""

    def __init__(self, device: torch.device) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        with self.ordered():
            run()  # compiles kernels and makes handles, which cannot be captured
        self.stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self.stream, capture_error_mode="thread_local"):
            run()
        return graph.replay

    def ordered(self) -> AbstractContextManager[object]:
        return torch.cuda.stream(self.stream)

    def mark(self) -> Callable[[], None]:
        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        event.record(self.stream)
        return event.synchronize

    def host(self, count: int) -> Tensor:
        return torch.empty(count, dtype=torch.uint8, pin_memory=True)


class NoGraphs:
    """A stand-in where there are no graphs: runs the function itself, at once."""

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        return run

    def ordered(self) -> AbstractContextManager[object]:
        return nullcontext()

    def mark(self) -> Callable[[], None]:
        return lambda: None

    def host(self, count: int) -> Tensor:
        return torch.empty(count, dtype=torch.uint8)


class _Bucket(NamedTuple):
    output: Tensor
    """(n, width) on the device."""
    replay: Callable[[], None]


class _Side:
    """Buffers on the host for one step."""

    def __init__(self, packed: Tensor, output: Tensor, inputs: StepInputs) -> None:
        self.packed = packed
        self.output = output
        self.inputs = inputs
        self.wait: Callable[[], None] | None = None
        """Of the step that uses these buffers."""


class GraphRunner:
    """Runs `step_rows` in buckets. For one thread."""

    def __init__(
        self, step_rows: StepRows, *, width: int, scratch: int, buckets: tuple[int, ...], device: torch.device, graphs: Capturer
    ) -> None:
        """width: columns of the output. scratch: the slot of spare rows. buckets: ascending row counts."""
        self.buckets = buckets
        self._step_rows = step_rows
        self._width = width
        self._scratch = scratch
        self._graphs = graphs
        self._packed = torch.empty(_input_bytes(buckets[-1], buckets[-1]), dtype=torch.uint8, device=device)
        self._sides = [self._side() for _ in range(2)]
        self._turn = 0
        self._captured: dict[int, _Bucket] = {}

    @property
    def inputs(self) -> StepInputs:
        """Arrays of the largest bucket's rows; others after each step.

        What a caller writes there, the next step takes without another copy on the host.
        """
        return self._sides[self._turn].inputs

    def prepare(self) -> None:
        """Capture every bucket, the largest first, so that the smaller ones fit into its memory."""
        for rows in reversed(self.buckets):
            self._bucket(rows)

    def step(self, pcm: NDArray[np.float32], slots: NDArray[np.int64], fresh: NDArray[np.bool_]) -> NDArray[np.float32]:
        """Step rows, any number of them: float32 (B, width). More than the largest bucket holds go in several steps."""
        largest = self.buckets[-1]
        parts = [slice(start, start + largest) for start in range(0, len(slots), largest)]
        outputs = [self.submit(pcm[part], slots[part], fresh[part])() for part in parts]
        return outputs[0] if len(outputs) == 1 else np.concatenate(outputs)

    def submit(
        self, pcm: NDArray[np.float32], slots: NDArray[np.int64], fresh: NDArray[np.bool_]
    ) -> Callable[[], NDArray[np.float32]]:
        """Start a step of at most the largest bucket's rows; the call returned waits for it: float32 (B, width)."""
        rows, side = len(slots), self._sides[self._turn]
        if side.wait is not None:
            side.wait()
        for source, target in zip((pcm, slots, fresh), side.inputs, strict=True):
            if source.ctypes.data != target.ctypes.data:
                np.copyto(target[:rows], source)
        size = next(size for size in self.buckets if size >= rows)
        side.inputs.slots[rows:size] = self._scratch
        side.inputs.fresh[rows:size] = True
        used, wanted = _input_bytes(size, self.buckets[-1]), size * self._width
        output, replay = self._bucket(size)
        with self._graphs.ordered():
            self._packed[:used].copy_(side.packed[:used], non_blocking=True)
            replay()
            host_output = side.output[:wanted].view(size, self._width)
            host_output.copy_(output, non_blocking=True)
            side.wait = wait = self._graphs.mark()
        self._turn ^= 1

        def result() -> NDArray[np.float32]:
            wait()
            return host_output[:rows].numpy().copy()

        return result

    def _side(self) -> _Side:
        largest = self.buckets[-1]
        packed = self._graphs.host(_input_bytes(largest, largest))
        output = self._graphs.host(largest * self._width * 4).view(torch.float32)
        return _Side(packed, output, StepInputs(*(part.numpy() for part in _cut(packed, largest, largest))))

    def _bucket(self, rows: int) -> _Bucket:
        if rows not in self._captured:
            self._captured[rows] = self._capture(rows)
        return self._captured[rows]

    def _capture(self, rows: int) -> _Bucket:
        """Capture a step of so many rows, first run on rows that are all spare."""
        pcm, slots, fresh = _cut(self._packed, rows, self.buckets[-1])
        with self._graphs.ordered():
            pcm.zero_()
            slots.fill_(self._scratch)
            fresh.fill_(True)
        output = torch.zeros(rows, self._width, device=self._packed.device)

        def run() -> None:
            output.copy_(self._step_rows(pcm, slots, fresh))

        return _Bucket(output, self._graphs.capture(run))


def _cut(packed: Tensor, rows: int, largest: int) -> tuple[Tensor, Tensor, Tensor]:
    """pcm, slots and fresh of the first rows of a packed buffer."""
    start = _header_bytes(largest)
    pcm = packed[start : start + rows * 4 * FRAME_SAMPLES].view(torch.float32).view(rows, FRAME_SAMPLES)
    return pcm, packed[: 8 * rows].view(torch.int64), packed[8 * largest : 8 * largest + rows].view(torch.bool)


def _header_bytes(largest: int) -> int:
    """Slots and fresh of every row lie in front, whatever the bucket, so that the sound always begins at the same place."""
    return -(-9 * largest // 256) * 256


def _input_bytes(rows: int, largest: int) -> int:
    """What a step of `rows` copies: the header and its own sound, one run of bytes."""
    return _header_bytes(largest) + rows * 4 * FRAME_SAMPLES


def bucket_sizes(slots: int) -> tuple[int, ...]:
    """1, 2, 4, … 256, then steps of half a power, up to the slots themselves."""
    sizes = {1 << i for i in range(9)} | {k << i for i in range(7, 16) for k in (2, 3)}
    return (*sorted(size for size in sizes if size < slots), slots)
