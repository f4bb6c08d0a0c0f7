"""The delayed-streams language model, one position a step (contract section 5.2). Knows nothing of sound or of words.

Per-slot state:
rings  layers x slots x (2, H, up to context, D)   keys and values
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from moshi_stt.models.mlx_impl.attention import Ring, rotate_and_attend
from moshi_stt.models.mlx_impl.fuse import fused
from moshi_stt.models.mlx_impl.linear import PackedWeight, Weight, make_linear
from moshi_stt.models.mlx_impl.rope import Angles, RotaryTable
from moshi_stt.models.spec import Condition, LMSpec


class LMState:
    """The language model's keys and values of every slot."""

    def __init__(self, spec: LMSpec, slots: int, dtype: mx.Dtype) -> None:
        self.rings = [Ring(slots, spec.heads, spec.context, spec.head_dim, dtype) for _ in range(spec.layers)]


class LMOutput(NamedTuple):
    """logits float32 (B, text_card); pause float32 (B, heads): element 0 of each extra head's softmax."""

    logits: mx.array
    pause: mx.array


def rms_norm(x: mx.array, alpha: mx.array, eps: float) -> mx.array:
    """x (..., D) over its last axis, computed in float32, returned in x's dtype."""
    return mx.fast.rms_norm(x.astype(mx.float32), alpha, eps).astype(x.dtype)


@fused
def gated(gate: mx.array, up: mx.array) -> mx.array:
    """silu(gate) * up."""
    return gate * mx.sigmoid(gate) * up


class LMLayer:
    """One layer: pre-norm attention, pre-norm gated feed-forward, no biases."""

    def __init__(self, spec: LMSpec, params: dict[str, Weight], index: int) -> None:
        at = f"transformer.layers.{index}."
        self.spec = spec
        self.norm1 = _vector(params[at + "norm1.alpha"])
        self.in_proj = make_linear(params[at + "self_attn.in_proj_weight"])
        self.out_proj = make_linear(params[at + "self_attn.out_proj.weight"])
        self.norm2 = _vector(params[at + "norm2.alpha"])
        self.linear_in = make_linear(params[at + "gating.linear_in.weight"])
        self.linear_out = make_linear(params[at + "gating.linear_out.weight"])

    def __call__(self, x: mx.array, angles: Angles, ring: Ring, positions: Sequence[int], slots: Sequence[int]) -> mx.array:
        """x (B, dim) -> (B, dim)."""
        spec = self.spec
        qkv = self.in_proj(rms_norm(x, self.norm1, spec.norm_eps))
        qkv = qkv.reshape(-1, 1, 3, spec.heads, spec.head_dim)  # (B, T = 1, 3, H, D)
        x = x + self.out_proj(rotate_and_attend(qkv, angles, ring, positions, slots, [None] * len(slots))[:, 0])
        gate, up = mx.split(self.linear_in(rms_norm(x, self.norm2, spec.norm_eps)), 2, axis=-1)
        return x + self.linear_out(gated(gate, up))


class LanguageModel:
    """Steps one position of any rows of an `LMState`."""

    def __init__(self, spec: LMSpec, params: dict[str, Weight], dtype: mx.Dtype, condition: Condition | None = None) -> None:
        """params: from `loader.load_lm_params`. dtype: of the activations."""
        self.spec = spec
        self.dtype = dtype
        self.embeddings = params["embeddings"]  # (text_card + 1 + K * (audio_card + 1), dim)
        self.layers = [LMLayer(spec, params, i) for i in range(spec.layers)]
        self.out_norm = _vector(params["out_norm.alpha"])
        self.text_linear = make_linear(params["text_linear.weight"])
        self.extra_heads = make_linear(params["extra_heads"]) if spec.extra_heads else None  # -> (B, heads * head_dim)
        self.condition = None if condition is None else condition_vector(condition, params)
        self.rotary = RotaryTable(spec.head_dim, spec.max_period)
        self._first_rows = spec.text_card + 1 + np.arange(spec.codebooks) * (spec.audio_card + 1)
        """(K,): where each codebook's rows begin in `embeddings`."""

    def step(
        self,
        state: LMState,
        text: NDArray[np.int64],
        codes: NDArray[np.int64],
        positions: NDArray[np.int64],
        slots: Sequence[int],
    ) -> LMOutput:
        """text (B,), codes (B, K), positions (B,) from 0 in each stream; slots: of the rows that are no padding."""
        spec = self.spec
        x = self.embed(text, codes)
        angles = self.rotary(positions[:, None])
        own_positions = positions[: len(slots)].tolist()
        for layer, ring in zip(self.layers, state.rings, strict=True):
            x = layer(x, angles, ring, own_positions, slots)
        x = rms_norm(x, self.out_norm, spec.norm_eps)
        logits = self.text_linear(x).astype(mx.float32)
        if self.extra_heads is None:
            return LMOutput(logits, mx.zeros((len(text), 0)))
        heads = self.extra_heads(x).astype(mx.float32).reshape(-1, spec.extra_heads, spec.extra_head_dim)
        return LMOutput(logits, mx.softmax(heads, axis=-1)[..., 0])

    def embed(self, text: NDArray[np.int64], codes: NDArray[np.int64]) -> mx.array:
        """The sum of the text token's and the codes' vectors, summed in float32: (B, dim) in the model's dtype."""
        rows = mx.array(np.concatenate([text[:, None], codes + self._first_rows], axis=1).astype(np.uint32))  # (B, 1 + K)
        table = self.embeddings
        vectors = table.rows(rows) if isinstance(table, PackedWeight) else table[rows]  # (B, 1 + K, dim)
        x = vectors.astype(mx.float32).sum(1)
        return (x if self.condition is None else x + self.condition).astype(self.dtype)


def condition_vector(condition: Condition, params: dict[str, Weight]) -> mx.array:
    """The vector (dim,) float32 that a condition adds to every input (contract section 5.8)."""
    spec = condition.conditioner
    at = f"condition_provider.conditioners.{spec.name}."
    if condition.value is None:
        return _vector(params[at + "learnt_padding"])
    half = spec.dim // 2
    value = condition.value * spec.scale_factor
    angles = [value / spec.max_period ** (i / (half - 1)) for i in range(half)]
    wave = mx.array([math.cos(angle) for angle in angles] + [math.sin(angle) for angle in angles])
    return _array(params[at + "output_proj.weight"]) @ wave


def _array(weight: Weight) -> mx.array:
    assert isinstance(weight, mx.array), "norms and conditioners are never packed"
    return weight


def _vector(weight: Weight) -> mx.array:
    return _array(weight).flatten()
