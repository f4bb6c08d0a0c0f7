"""`TorchBackend`: the engine's frame-synchronous backend over Mimi and the language model. Knows no streams, words or sockets.

Step n of a stream (contract section 5.5): the language model sees the codes of frame n - 1 and the text token of step n - 1,
while Mimi encodes frame n, so neither waits for the other.

Per-slot state besides the models', first axis the slot:
frames (slots,) int64      steps done since the stream began
text   (slots,) int64      token of the last step
codes  (slots, K) int64    codes of the last frame
The last slot of every tensor is scratch, for rows that pad a step to a fixed number of rows.
"""

import time
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moshi_stt.constants import FRAME_SAMPLES
from moshi_stt.engine.backend import StepOutput, StepRecorder
from moshi_stt.errors import ConfigError
from moshi_stt.models.report import LOUDEST, LoadReport
from moshi_stt.models.spec import ModelSpec
from moshi_stt.models.torch_impl.beside import Beside, RowShare
from moshi_stt.models.torch_impl.device import device_name
from moshi_stt.models.torch_impl.linear import PackedLinear
from moshi_stt.models.torch_impl.lm import LanguageModel, LMState
from moshi_stt.models.torch_impl.mimi import MimiEncoder, MimiState
from moshi_stt.models.torch_impl.sampling import choose


@dataclass
class BackendState:
    """Every tensor that belongs to slots. `slots` counts the scratch slot."""

    lm: LMState
    mimi: MimiState
    frames: Tensor
    text: Tensor
    codes: Tensor
    named: dict[str, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.named = {"frames": self.frames, "text": self.text, "codes": self.codes, **self.lm.tensors(), **self.mimi.tensors()}

    def copy(self, source: int, target: int, positions_per_frame: int) -> None:
        """Copy one slot onto another. On a CPU only the part of its rings that the stream has filled is touched."""
        for tensor in (self.frames, self.text, self.codes, self.mimi.conv):
            tensor[target].copy_(tensor[source])
        frames = int(self.frames[source]) if self.frames.device.type == "cpu" else None  # elsewhere: no synchronisation
        for rings, positions in ((self.lm.rings, 1), (self.mimi.rings, positions_per_frame)):
            filled = None if frames is None else frames * positions
            for tensor in (tensor for ring in rings for tensor in ring if tensor is not None):
                tensor[target, :, :filled].copy_(tensor[source, :, :filled])

    def slot_bytes(self) -> int:
        """Bytes of one slot."""
        return sum(tensor[0].numel() * tensor.element_size() for tensor in self.named.values())


def make_state(
    spec: ModelSpec,
    slots: int,
    kv_dtype: torch.dtype,
    device: torch.device,
    mimi_kv_dtype: torch.dtype = torch.float32,
) -> BackendState:
    """State of `slots` slots and the scratch slot. Raises ConfigError where there is no memory for it.

    kv_dtype, mimi_kv_dtype: of the keys and values of the language model and of Mimi's transformer.
    """
    count = slots + 1
    try:
        return BackendState(
            lm=LMState(spec.lm, count, kv_dtype, device),
            mimi=MimiState(spec.mimi, count, device, mimi_kv_dtype),
            frames=torch.zeros(count, dtype=torch.int64, device=device),
            text=torch.zeros(count, dtype=torch.int64, device=device),
            codes=torch.zeros(count, spec.lm.codebooks, dtype=torch.int64, device=device),
        )
    except RuntimeError as error:  # torch.OutOfMemoryError is one
        raise ConfigError(
            f"no memory for the state of {slots} streams on {device_name(device)} beside the weights "
            f"({str(error).splitlines()[0]}): lower batch_size"
        ) from error


class SlotBackend:
    """What every backend over a `BackendState` has in common."""

    def __init__(self, spec: ModelSpec, state: BackendState, report: LoadReport | None) -> None:
        self.spec = spec
        self.state = state
        self.slots = len(state.frames) - 1
        self.pause_heads = spec.lm.extra_heads
        self.report = report
        self.device = state.frames.device
        self.recorder: StepRecorder | None = None

    def record_to(self, recorder: StepRecorder) -> None:
        """Tell this recorder of every step, from before `warm_up` on. The codes come back in the same copy as all else."""
        self.recorder = recorder

    @property
    def width(self) -> int:
        """Columns of a step's output: the token, its log-probability, the pauses and, where they are recorded, the codes."""
        return 2 + self.pause_heads + (0 if self.recorder is None else self.spec.lm.codebooks)

    def _unpack(self, packed: NDArray[np.float32], slots: NDArray[np.int64], fresh: NDArray[np.bool_]) -> StepOutput:
        """packed float32 (B, width), in which float32 holds tokens and codes exactly."""
        said = 2 + self.pause_heads
        tokens = packed[:, 0].astype(np.int64)
        if self.recorder is not None:
            self.recorder.record(slots, fresh, tokens, packed[:, said:].astype(np.int64))
        return StepOutput(tokens, packed[:, 1].copy(), packed[:, 2:said].copy())

    def resize(self, slots: int) -> None:
        """Have so many slots, all of them new, over the same weights. To be warmed up again.

        Raises ConfigError where there is no memory for them; the backend is of no use then.
        """
        kv_dtype, mimi_kv_dtype = self.state.lm.rings[0].k.dtype, self.state.mimi.rings[0].k.dtype
        del self.state  # the memory of the one is the other's
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self.state = make_state(self.spec, slots, kv_dtype, self.device, mimi_kv_dtype)
        self.slots = slots

    def copy(self, source: int, target: int) -> None:
        """Make slot `target`'s state what slot `source`'s is; they go their own ways from there."""
        with torch.inference_mode():
            self.state.copy(source, target, self.spec.mimi.positions_per_frame)

    def fill_context(self) -> None:
        """Make every slot's stream one whose context is full, of anything: for measuring. The state is undefined then."""
        self.state.frames.fill_(max(self.spec.lm.context, self.spec.mimi.context))


class TorchBackend(SlotBackend):
    """See `engine.Backend`. Deterministic: the same frames give the same tokens."""

    def __init__(
        self,
        spec: ModelSpec,
        lm: LanguageModel,
        mimi: MimiEncoder,
        state: BackendState,
        *,
        beside: Beside | None = None,
        fixed_rows: int = 0,
        seed: int = 0,
        report: LoadReport | None = None,
    ) -> None:
        """beside: runs the language model and Mimi at once; None runs one after the other.
        fixed_rows: step so many rows at once, always, padding with the scratch slot, so that no row's rounding can depend
        on how many others there are; 0 steps the rows that come. seed: of the noise where spec.temperature > 0.
        """
        super().__init__(spec, state, report)
        self.lm = lm
        self.mimi = mimi
        self._beside = beside
        self._share = RowShare()
        # only on two threads, and where a row's codes cannot depend on which rows are computed with it
        independent = not fixed_rows and all(isinstance(conv.product, PackedLinear) for conv in mimi.convs)
        self._splits = independent and beside is not None and beside.first_threads > 0
        self.fixed_rows = fixed_rows
        self.seed = seed

    # ---- Backend -----------------------------------------------------------------------------------------------------

    def step(self, pcm: NDArray[np.float32], slots: NDArray[np.int64], fresh: NDArray[np.bool_]) -> StepOutput:
        """Step each row once: pcm (B, 1920), slots (B,), fresh (B,). See `engine.Backend.step`."""
        block = self.fixed_rows or max(len(slots), 1)
        outputs = []
        with torch.inference_mode():
            for start in range(0, len(slots), block):
                rows = slice(start, start + block)
                outputs.append(self._step_block(pcm[rows], slots[rows], fresh[rows]))
        return self._unpack(np.concatenate(outputs) if outputs else np.zeros((0, self.width), np.float32), slots, fresh)

    def warm_up(self) -> None:
        """Step the scratch slot, which every other slot's stream never sees."""
        for _ in range(3):
            self.step(np.zeros((1, FRAME_SAMPLES), np.float32), np.array([self.slots]), np.array([True]))

    def close(self) -> None:
        """Free the weights and the state. No step may follow."""
        if self._beside is not None:
            self._beside.close()
        del self.lm, self.mimi, self.state
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    # ---- one step ----------------------------------------------------------------------------------------------------

    def _step_block(self, pcm: NDArray[np.float32], slots: NDArray[np.int64], fresh: NDArray[np.bool_]) -> NDArray[np.float32]:
        """To the device, step, and back in one copy: float32 (B, width)."""
        rows = len(slots)
        spare = max(self.fixed_rows - rows, 0)
        if spare:
            pcm = np.concatenate([pcm, np.zeros((spare, FRAME_SAMPLES), np.float32)])
            slots = np.concatenate([slots, np.full(spare, self.slots)])
            fresh = np.concatenate([fresh, np.ones(spare, bool)])
        packed = self.step_rows(
            torch.from_numpy(pcm).to(self.device),
            torch.from_numpy(slots).to(self.device),
            torch.from_numpy(fresh).to(self.device),
        )
        return packed.cpu().numpy()[:rows]

    def step_rows(self, pcm: Tensor, slots: Tensor, fresh: Tensor) -> Tensor:
        """The whole step on the device, of static shape and without synchronisation.

        pcm float32 (B, 1920), slots int64 (B,), fresh bool (B,).
        Returns float32 (B, width).
        """
        state = self.state
        pcm = torch.nan_to_num(pcm, 0.0, 0.0, 0.0).clamp(-LOUDEST, LOUDEST)
        frames = torch.where(fresh, 0, state.frames[slots])
        (token, logprob, pause), codes = self._both(pcm, frames, slots)
        state.frames[slots] = frames + 1
        state.text[slots] = token
        state.codes[slots] = codes
        recorded = [] if self.recorder is None else [codes.float()]
        return torch.cat([token[:, None].float(), logprob[:, None], pause, *recorded], dim=1)

    def _both(self, pcm: Tensor, frames: Tensor, slots: Tensor) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
        """What `step_lm` returns, and the frame's codes (B, K). Side by side, the quicker thread takes rows off the slower."""

        def mimi(rows: slice) -> Tensor:
            return self.mimi.step(self.state.mimi, pcm[rows], frames[rows], slots[rows])

        if self._beside is None:
            return self.step_lm(frames, slots), mimi(slice(None))
        count = len(slots)
        second_rows = count - (self._share.rows(count) if self._splits else 0)

        def first() -> tuple[tuple[Tensor, Tensor, Tensor], float, list[Tensor]]:
            begun = time.perf_counter()
            said = self.step_lm(frames, slots)
            taken = time.perf_counter() - begun
            return said, taken, [mimi(slice(second_rows, None))] if second_rows < count else []

        def second() -> tuple[Tensor, float]:
            begun = time.perf_counter()
            return mimi(slice(second_rows)), time.perf_counter() - begun

        (said, own, late), (codes, other) = self._beside(first, second)
        self._share.learn(own / count, other / second_rows)
        return said, torch.cat([codes, *late]) if late else codes

    def step_lm(self, frames: Tensor, slots: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The language model's half of the step, which reads the last frame's codes and not this frame's sound.

        frames, slots int64 (B,). Returns token int64 (B,), logprob float32 (B,), pause float32 (B, heads).
        """
        spec, state = self.spec, self.state
        first = frames == 0
        text = torch.where(first, spec.lm.start_token, state.text[slots])
        codes = torch.where(first[:, None], spec.lm.pad_code, state.codes[slots])
        logits, pause = self.lm.step(state.lm, text, codes, frames, slots)
        token, logprob = choose(logits, frames, spec.temperature, self.seed)
        return token, logprob, pause
