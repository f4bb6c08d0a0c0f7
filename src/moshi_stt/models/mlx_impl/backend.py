"""`MLXBackend`: the engine's frame-synchronous backend over Mimi and the language model. Knows no streams, words or sockets.

Step n of a stream (contract section 5.5): the language model sees the codes of frame n - 1 and the text token of step n - 1,
while Mimi encodes frame n, so neither waits for the other.

Per-slot state besides the models' is on the host, first axis the slot:
frames (slots,) int64      steps done since the stream began
text   (slots,) int64      token of the last step
codes  (slots, K) int64    codes of the last frame
The last slot is scratch, for rows that pad a step to a fixed number of rows.
"""

import copy
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from moshi_stt.constants import FRAME_SAMPLES
from moshi_stt.engine.backend import StepOutput, StepRecorder
from moshi_stt.models.mlx_impl.attention import Ring
from moshi_stt.models.mlx_impl.lm import LanguageModel, LMState
from moshi_stt.models.mlx_impl.mimi import MimiEncoder, MimiState
from moshi_stt.models.mlx_impl.sampling import choose
from moshi_stt.models.report import LOUDEST, LoadReport
from moshi_stt.models.spec import ModelSpec


@dataclass
class BackendState:
    """Everything that belongs to slots. `slots` counts the scratch slot."""

    lm: LMState
    mimi: MimiState
    slots: int
    codebooks: int
    frames: NDArray[np.int64] = field(init=False)
    text: NDArray[np.int64] = field(init=False)
    codes: NDArray[np.int64] = field(init=False)

    def __post_init__(self) -> None:
        self.frames = np.zeros(self.slots, np.int64)
        self.text = np.zeros(self.slots, np.int64)
        self.codes = np.zeros((self.slots, self.codebooks), np.int64)

    @property
    def rings(self) -> list[Ring]:
        return [*self.lm.rings, *self.mimi.rings]

    def slot_bytes(self) -> int:
        """Bytes of one slot, its rings full."""
        return sum(ring.slot_bytes() for ring in self.rings) + self.mimi.conv.nbytes // self.slots


def make_state(spec: ModelSpec, slots: int, kv_dtype: mx.Dtype) -> BackendState:
    """State of `slots` slots and the scratch slot."""
    count = slots + 1
    return BackendState(LMState(spec.lm, count, kv_dtype), MimiState(spec.mimi, count), count, spec.lm.codebooks)


class MLXBackend:
    """See `engine.Backend`. Deterministic: the same frames give the same tokens. For one thread, the one that made it."""

    def __init__(
        self,
        spec: ModelSpec,
        lm: LanguageModel,
        mimi: MimiEncoder,
        state: BackendState,
        *,
        device: mx.Device,
        mimi_stream: mx.Stream | None = None,
        fixed_rows: int = 0,
        seed: int = 0,
        report: LoadReport | None = None,
    ) -> None:
        """mimi_stream: where Mimi is computed, beside the language model; None computes it behind it.
        fixed_rows: step so many rows at once (all slots, where those are fewer), always, padding with the scratch slot, so
        that no row's rounding can depend on how many others there are; 0 steps the rows that come. seed: of the noise where
        spec.temperature > 0.
        """
        self.spec = spec
        self.lm = lm
        self.mimi = mimi
        self.state = state
        self.slots = state.slots - 1
        self.pause_heads = spec.lm.extra_heads
        self.device = device
        self._mimi_stream = mimi_stream
        self.fixed_rows = fixed_rows
        self.seed = seed
        self.report = report
        self.recorder: StepRecorder | None = None

    def record_to(self, recorder: StepRecorder) -> None:
        """Tell this recorder of every step, from before `warm_up` on."""
        self.recorder = recorder

    @property
    def padded_rows(self) -> int:
        """Rows of every step; 0: those that come."""
        return min(self.fixed_rows, self.slots)

    def resize(self, slots: int) -> None:
        """Have so many slots, all of them new, over the same weights."""
        dtype = self.state.lm.rings[0].dtype
        del self.state  # the memory of the one is the other's
        mx.clear_cache()
        with mx.stream(self.device):
            self.state = make_state(self.spec, slots, dtype)
        self.slots = slots

    # ---- Backend -----------------------------------------------------------------------------------------------------

    def step(self, pcm: NDArray[np.float32], slots: NDArray[np.int64], fresh: NDArray[np.bool_]) -> StepOutput:
        """Step each row once: pcm (B, 1920), slots (B,), fresh (B,). See `engine.Backend.step`."""
        block = self.padded_rows or max(len(slots), 1)
        outputs = []
        with mx.stream(self.device):
            for start in range(0, len(slots), block):
                rows = slice(start, start + block)
                outputs.append(self._step_block(pcm[rows], slots[rows], fresh[rows]))
        said, width = 2 + self.pause_heads, 2 + self.pause_heads + self.spec.lm.codebooks
        packed = np.concatenate(outputs) if outputs else np.zeros((0, width), np.float32)
        tokens = packed[:, 0].astype(np.int64)
        if self.recorder is not None:
            self.recorder.record(slots, fresh, tokens, packed[:, said:].astype(np.int64))
        return StepOutput(tokens, packed[:, 1].copy(), packed[:, 2:said].copy())

    def warm_up(self) -> None:
        """Step the scratch slot, which every other slot's stream never sees."""
        for _ in range(3):
            self.step(np.zeros((1, FRAME_SAMPLES), np.float32), np.array([self.slots]), np.array([True]))

    def close(self) -> None:
        """Free the weights and the state. No step may follow."""
        del self.lm, self.mimi, self.state
        mx.clear_cache()

    # ---- state of one slot -------------------------------------------------------------------------------------------

    def copy(self, source: int, target: int) -> None:
        """Make slot `target`'s state what slot `source`'s is; they go their own ways from there."""
        state = self.state
        for array in (state.frames, state.text, state.codes):
            array[target] = array[source]
        with mx.stream(self.device):
            state.mimi.conv[target] = state.mimi.conv[source]
            for ring in state.rings:  # shared until one of the two is written to
                ring.entries[target] = copy.copy(ring.entries[source])
            mx.eval(state.mimi.conv)

    # ---- one step ----------------------------------------------------------------------------------------------------

    def _step_block(self, pcm: NDArray[np.float32], slots: NDArray[np.int64], fresh: NDArray[np.bool_]) -> NDArray[np.float32]:
        """Pad, step, and back in one copy: float32 (B, 2 + heads + K)."""
        state, rows = self.state, len(slots)
        spare = max(self.padded_rows - rows, 0)
        frames = np.concatenate([np.where(fresh, 0, state.frames[slots]), np.zeros(spare, np.int64)])
        pcm = np.clip(np.nan_to_num(pcm, nan=0.0, posinf=0.0, neginf=0.0), -LOUDEST, LOUDEST)
        pcm = np.concatenate([pcm, np.zeros((spare, FRAME_SAMPLES), np.float32)])
        packed = self.step_rows(mx.array(pcm), frames, slots.tolist())
        mx.eval(packed, state.mimi.conv)
        output = np.array(packed)[:rows]
        state.frames[slots] = frames[:rows] + 1
        state.text[slots] = output[:, 0]
        state.codes[slots] = output[:, 2 + self.pause_heads :]
        return output

    def step_rows(self, pcm: mx.array, frames: NDArray[np.int64], slots: list[int]) -> mx.array:
        """The graph of a whole step, which nothing has computed yet; the rings already refer to it.

        pcm float32 (B, 1920); frames (B,): steps done before, 0 starts anew; slots: of the rows that are no padding.
        Returns float32 (B, 2 + heads + K): the token, its log-probability, the pauses, the codes.
        """
        spec, state = self.spec, self.state
        first = frames == 0
        every = np.array(slots + [self.slots] * (len(frames) - len(slots)))
        text = np.where(first, spec.lm.start_token, state.text[every])
        codes = np.where(first[:, None], spec.lm.pad_code, state.codes[every])
        logits, pause = self.lm.step(state.lm, text, codes, frames, slots)
        token, logprob = choose(logits, frames.tolist(), spec.temperature, self.seed)
        with mx.stream(self._mimi_stream or self.device):
            new_codes = self.mimi.step(state.mimi, pcm, frames, slots, self.slots)
        # Tokens and codes are small enough for float32 to hold them exactly.
        columns = [token[:, None], logprob[:, None], pause, new_codes]
        return mx.concatenate([column.astype(mx.float32) for column in columns], axis=1)
