"""The delayed-streams language model, one position a step (contract section 5.2). Knows nothing of sound or of words.

Per-slot state, first axis the slot:
rings  layers x (slots, H, context, D), K and V   uninitialised where not yet written
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moshi_stt.models.spec import Condition, LMSpec
from moshi_stt.models.torch_impl.attention import Ring, RingAttention, make_ring, rotate_and_attend
from moshi_stt.models.torch_impl.linear import Linear, QuantizedWeights, Table, make_linear
from moshi_stt.models.torch_impl.rope import RotaryTable


class LMState:
    """The language model's keys and values of every slot."""

    def __init__(self, spec: LMSpec, slots: int, dtype: torch.dtype, device: torch.device) -> None:
        self.rings = [make_ring(slots, spec.heads, spec.context, spec.head_dim, dtype, device) for _ in range(spec.layers)]

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by name."""
        named: dict[str, Tensor] = {}
        for i, ring in enumerate(self.rings):
            named |= ring.tensors(f"lm.{i}")
        return named


class LMOutput(NamedTuple):
    """logits float32 (B, text_card); pause float32 (B, heads): element 0 of each extra head's softmax."""

    logits: Tensor
    pause: Tensor


def rms_norm(x: Tensor, alpha: Tensor, eps: float) -> Tensor:
    """x (..., D) over its last axis, computed in alpha's dtype (float32 at least), returned in x's."""
    return F.rms_norm(x.to(alpha.dtype), alpha.shape, alpha, eps).to(x.dtype)


class LMLayer:
    """One layer: pre-norm attention, pre-norm gated feed-forward, no biases."""

    def __init__(self, spec: LMSpec, params: dict[str, Tensor], take: Callable[[str], Linear], index: int) -> None:
        at = f"transformer.layers.{index}."
        self.spec = spec
        self.norm1 = params[at + "norm1.alpha"].flatten()
        self.in_proj = take(at + "self_attn.in_proj_weight")
        self.out_proj = take(at + "self_attn.out_proj.weight")
        self.norm2 = params[at + "norm2.alpha"].flatten()
        self.linear_in = take(at + "gating.linear_in.weight")
        self.linear_out = take(at + "gating.linear_out.weight")

    def __call__(
        self, x: Tensor, angles: tuple[Tensor, Tensor], ring: Ring, positions: Tensor, slots: Tensor, attention: RingAttention
    ) -> Tensor:
        """x (B, dim) -> (B, dim)."""
        spec = self.spec
        qkv = self.in_proj(rms_norm(x, self.norm1, spec.norm_eps))
        qkv = qkv.view(-1, 1, 3, spec.heads, spec.head_dim)  # (B, T = 1, 3, H, D)
        x = x + self.out_proj(rotate_and_attend(qkv, angles, ring, positions, slots, attention)[:, 0])
        gate, up = self.linear_in(rms_norm(x, self.norm2, spec.norm_eps)).chunk(2, dim=-1)
        return x + self.linear_out(F.silu(gate) * up)


class LanguageModel:
    """Steps one position of any rows of an `LMState`."""

    def __init__(
        self,
        spec: LMSpec,
        params: dict[str, Tensor],
        attention: RingAttention,
        condition: Condition | None = None,
        quantized: QuantizedWeights | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """params: from `loader.allocate_lm`, filled. The matrices are taken out of it, so that a repacked one can be freed.

        quantized: what is not among `params`. dtype: of activations; None takes the embeddings'.
        """
        products = {} if quantized is None else quantized.products

        def take(name: str) -> Linear:
            return products[name] if name in products else make_linear(params.pop(name))

        table = None if quantized is None else quantized.table
        self.spec = spec
        self.attention = attention
        # (text_card + 1 + K * (audio_card + 1), dim)
        self.embeddings: Table | Tensor = params["embeddings"] if table is None else table
        self.layers = [LMLayer(spec, params, take, i) for i in range(spec.layers)]
        self.out_norm = params["out_norm.alpha"].flatten()
        self.dtype = params["embeddings"].dtype if dtype is None else dtype
        self.text_linear = take("text_linear.weight")
        self.extra_heads = make_linear(params.pop("extra_heads")) if spec.extra_heads else None  # -> (B, heads * head_dim)
        self.condition = None if condition is None else condition_vector(condition, params)
        device = self.out_norm.device
        self.rotary = RotaryTable(spec.head_dim, spec.max_period, device)
        first_rows = spec.text_card + 1 + torch.arange(spec.codebooks) * (spec.audio_card + 1)
        self._first_rows = first_rows.to(device)  # (K,): where each codebook's rows begin in `embeddings`

    def step(self, state: LMState, text: Tensor, codes: Tensor, positions: Tensor, slots: Tensor) -> LMOutput:
        """text int64 (B,), codes int64 (B, K), positions int64 (B,) from 0 in each stream, slots int64 (B,)."""
        x = self.embed(text, codes)
        angles = self.rotary(positions[:, None])
        for layer, ring in zip(self.layers, state.rings, strict=True):
            x = layer(x, angles, ring, positions, slots, self.attention)
        x = rms_norm(x, self.out_norm, self.spec.norm_eps)
        wide = self.out_norm.dtype
        logits = self.text_linear(x).float()
        if self.extra_heads is None:
            return LMOutput(logits, logits.new_zeros(len(x), 0))
        heads = self.extra_heads(x).to(wide).view(-1, self.spec.extra_heads, self.spec.extra_head_dim)
        return LMOutput(logits, heads.softmax(-1)[..., 0].float())

    def embed(self, text: Tensor, codes: Tensor) -> Tensor:
        """The sum of the text token's and the codes' vectors, summed in float32: (B, dim) in the model's dtype."""
        rows = torch.cat([text[:, None], codes + self._first_rows], dim=1)  # (B, 1 + K)
        x = self.embeddings[rows].sum(1, dtype=self.out_norm.dtype)
        return (x if self.condition is None else x + self.condition).to(self.dtype)


def condition_vector(condition: Condition, params: dict[str, Tensor]) -> Tensor:
    """The vector (dim,) that a condition adds to every input (contract section 5.8)."""
    spec = condition.conditioner
    at = f"condition_provider.conditioners.{spec.name}."
    if condition.value is None:
        return params[at + "learnt_padding"].flatten()
    half = spec.dim // 2
    value = condition.value * spec.scale_factor
    angles = [value / spec.max_period ** (i / (half - 1)) for i in range(half)]
    wave = torch.tensor([math.cos(angle) for angle in angles] + [math.sin(angle) for angle in angles])
    projection = params[at + "output_proj.weight"]
    return projection @ wave.to(projection)
