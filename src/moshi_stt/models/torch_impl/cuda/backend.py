"""`CudaBackend`: a whole step on the GPU as one graph launch. Knows no streams, words or sockets.

Within the graph, Mimi and the language model run side by side: step n of the language model reads the codes of frame n - 1.
"""

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moshi_stt.engine.backend import StepInputs, StepOutput, StepRecorder
from moshi_stt.models.report import LoadReport
from moshi_stt.models.spec import ModelSpec
from moshi_stt.models.torch_impl.backend import BackendState, SlotBackend
from moshi_stt.models.torch_impl.cuda.compile import Compiler, finish
from moshi_stt.models.torch_impl.cuda.elementwise import advance
from moshi_stt.models.torch_impl.cuda.launch import INTERPRETED
from moshi_stt.models.torch_impl.cuda.lm import FusedLM
from moshi_stt.models.torch_impl.cuda.mimi import FusedMimi
from moshi_stt.models.torch_impl.graphs import Capturer, CudaGraphs, GraphRunner, SlotCopier, bucket_sizes

log = logging.getLogger(__name__)

FIXED_ROWS = 64
"""Rows of every step where shapes must not depend on the neighbours."""


class CudaBackend(SlotBackend):
    """See `engine.Backend`. The same state as `TorchBackend`'s, stepped by the kernels of this folder."""

    def __init__(
        self,
        spec: ModelSpec,
        lm: FusedLM,
        mimi: FusedMimi,
        state: BackendState,
        *,
        fixed_shapes: bool = False,
        report: LoadReport | None = None,
        graphs: Capturer | None = None,
        buckets: tuple[int, ...] | None = None,
    ) -> None:
        """fixed_shapes: every step has the same shapes, so that no row's rounding depends on how many others there are.

        graphs, buckets: CUDA graphs of `bucket_sizes` unless given.
        """
        super().__init__(spec, state, report)
        self.lm = lm
        self.mimi = mimi
        self._side = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._fixed_shapes = fixed_shapes
        self._buckets = buckets
        self._graphs = graphs
        self._copier: SlotCopier | None = None
        self.runner = self._make_runner()
        self._compiler: Compiler | None = None
        self._compiling: dict[int, list[Future[None]]] = {}

    def _make_runner(self) -> GraphRunner:
        sizes = (min(FIXED_ROWS, self.slots),) if self._fixed_shapes else bucket_sizes(self.slots)
        self._copier, self._capturer = None, self._graphs or CudaGraphs(self.device)
        return GraphRunner(
            self.step_rows,
            width=self.width,
            scratch=self.slots,
            buckets=self._buckets or sizes,
            device=self.device,
            graphs=self._capturer,
        )

    def record_to(self, recorder: StepRecorder) -> None:
        """See `SlotBackend.record_to`. The graphs are captured anew, of wider outputs."""
        super().record_to(recorder)
        del self.runner
        self.runner = self._make_runner()

    def resize(self, slots: int) -> None:
        """See `SlotBackend.resize`."""
        del self.runner  # its graphs are about the state that goes
        super().resize(slots)
        self.runner = self._make_runner()

    # ---- Backend -----------------------------------------------------------------------------------------------------

    def step(self, pcm: NDArray[np.float32], slots: NDArray[np.int64], fresh: NDArray[np.bool_]) -> StepOutput:
        """Step each row once: pcm (B, 1920), slots (B,), fresh (B,). See `engine.Backend.step`."""
        if not len(slots):
            return StepOutput(np.zeros(0, np.int64), np.zeros(0, np.float32), np.zeros((0, self.pause_heads), np.float32))
        with torch.inference_mode():
            packed = self.runner.step(pcm, slots, fresh)
        return self._unpack(packed, slots, fresh)

    @property
    def inputs(self) -> StepInputs:
        """Arrays that a step takes without a copy: pcm, slots and fresh of as many rows as there are slots."""
        return self.runner.inputs

    def warm_up(self) -> None:
        """Compile the kernels and capture every bucket."""
        self._compile(self.runner.buckets[::-1])
        self._wait_compiled(self.runner.buckets)
        with torch.inference_mode():
            self.runner.prepare()
            self._copier = self._new_copier()
        self._stop_compiling()

    def begin_warm_up(self) -> None:
        """Capture the largest bucket and the small ones. The kernels of the others go on being compiled in the background."""
        runner = self.runner
        self._compile((*runner.first_buckets, *runner.later_buckets))
        self._wait_compiled(runner.first_buckets)
        begun = time.monotonic()
        with torch.inference_mode():
            runner.begin()
            self._copier = self._new_copier()
        log.info("start: graphs of %s rows took %.1f s", _listed(sorted(runner.first_buckets)), time.monotonic() - begun)

    def go_on_warming_up(self) -> bool:
        """Capture one more bucket, if its kernels are compiled. Whether any are left; takes about as long as a step of it."""
        begun = time.monotonic()
        with torch.inference_mode():
            left = self.runner.go_on(self._is_compiled)
        if not left:
            self._stop_compiling()
            log.info("start: the graphs of all sizes are captured, the last in %.2f s", time.monotonic() - begun)
        return left

    @property
    def device_seconds(self) -> float | None:
        """See `engine.backend.TimesSteps`."""
        return self.runner.device_seconds

    def _compile(self, buckets: tuple[int, ...]) -> None:
        """Have the kernels of these buckets compiled, in this order, without waiting for it."""
        if INTERPRETED:
            return
        self._compiler = self._compiler or Compiler(self.device)
        with torch.inference_mode():
            for rows in buckets:
                self._compiling[rows] = self._compiler.read(lambda rows=rows: self.runner.read(rows))  # type: ignore[misc]
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # what the reading took, the graphs take from a pool of their own

    def _is_compiled(self, rows: int) -> bool:
        return all(future.done() for future in self._compiling.get(rows, ()))

    def _wait_compiled(self, buckets: tuple[int, ...]) -> None:
        begun = time.monotonic()
        futures = {future for rows in buckets for future in self._compiling.get(rows, ())}
        finish(futures)
        log.info("start: %d kernels, compiled or from Triton's cache, took %.1f s", len(futures), time.monotonic() - begun)

    def _stop_compiling(self) -> None:
        self._compiling.clear()
        if self._compiler is not None:
            self._compiler.close()
            self._compiler = None

    def close(self) -> None:
        """Free the graphs, the weights and the state. No step may follow."""
        self._stop_compiling()
        self._copier = None
        del self.runner, self.lm, self.mimi, self.state
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    # ---- state of one slot -------------------------------------------------------------------------------------------

    def copy(self, source: int, target: int) -> None:
        """See `SlotBackend.copy`."""
        with torch.inference_mode():
            self._copier = self._copier or self._new_copier()
            self._copier.copy(source, target)

    def _new_copier(self) -> SlotCopier:
        return SlotCopier(list(self.state.named.values()), self._capturer, self.device)

    def fill_context(self) -> None:
        """See `SlotBackend.fill_context`."""
        super().fill_context()
        self._settle()

    def _settle(self) -> None:
        """Wait for what was done outside the graphs' stream."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    # ---- one step ----------------------------------------------------------------------------------------------------

    def begin(self, pcm: NDArray[np.float32], slots: NDArray[np.int64], fresh: NDArray[np.bool_]) -> Callable[[], StepOutput]:
        """See `engine.backend.StepsAhead`."""
        slots, fresh = slots.copy(), fresh.copy()
        with torch.inference_mode():
            finish = self.runner.start(pcm, slots, fresh)
        return lambda: self._unpack(finish(), slots, fresh)

    @property
    def has_read_inputs(self) -> bool:
        """See `engine.backend.StepsAhead`."""
        return self.runner.has_read_inputs

    def step_rows(self, load: Callable[[], Tensor], slots: Tensor, fresh: Tensor) -> Tensor:
        """The whole step on the device, of static shape and without synchronisation: see `graphs.StepRows`."""
        state = self.state
        frames = advance(slots, fresh.view(torch.uint8), state.frames)
        x = self.lm.embed(frames, slots, state.text, state.codes)  # reads the codes that Mimi is about to replace
        if self._side is None:
            self.mimi.step(state.mimi, load(), frames, slots, state.codes)
            return self._with_codes(self.lm.step(state.lm, x, frames, slots, state.text), slots)
        stream = torch.cuda.current_stream(self.device)
        self._side.wait_stream(stream)
        with torch.cuda.stream(self._side):
            self.mimi.step(state.mimi, load(), frames, slots, state.codes)
        output = self.lm.step(state.lm, x, frames, slots, state.text)
        stream.wait_stream(self._side)
        return self._with_codes(output, slots)

    def _with_codes(self, output: Tensor, slots: Tensor) -> Tensor:
        """The columns of `width`."""
        return output if self.recorder is None else torch.cat([output, self.state.codes[slots].float()], dim=1)


def _listed(numbers: list[int]) -> str:
    """`1, 2 and 4`."""
    head, last = ", ".join(map(str, numbers[:-1])), str(numbers[-1])
    return f"{head} and {last}" if head else last
