"""Attention over a ring of keys and values addressed by slot, in plain PyTorch. Knows nothing of models.

A ring holds the last `context` positions of every slot; position p lies at index p % context. A call advances each row by
T positions (1 in the language model, 2 in Mimi): they are written before anything is attended to, so of a
full ring the first of a pair sees context - 1 positions and the second all of them (contract section 5.1).
What lies in entries that the stream has not written since its position was 0 is never seen, not even a NaN.

Two implementations of one signature: `ring_attention` has static shapes and no host round trip, for devices;
`ring_attention_rows` goes row by row over views of the ring, for the CPU: nothing is copied, only
written positions are read, and a row's result cannot depend on its neighbours.
Axes: B row, T position, H head, D dim.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moshi_stt.models.torch_impl.rope import rotate

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0


class Ring(NamedTuple):
    """Keys and values of one layer, uninitialised at first.

    k, v              (slots, H, context, D)
    k_scale, v_scale  (slots, H, context) float32: what a vector of an fp8 ring is multiplied with; None in other dtypes
    """

    k: Tensor
    v: Tensor
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Every tensor as `name.k` and so on."""
        return {f"{name}.{part}": tensor for part, tensor in zip(self._fields, self, strict=True) if tensor is not None}


ATTENDS_NARROW = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
"""Whether this CPU attends to rings of bfloat16 as they are: half the bytes of float32. Elsewhere they are widened first."""

RingAttention = Callable[[Tensor, Tensor, Tensor, Ring, Tensor, Tensor], Tensor]
"""(q, k, v, ring, positions, slots) -> attended, as `ring_attention`."""


def make_ring(slots: int, heads: int, context: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> Ring:
    """A ring whose memory is touched only as streams fill it."""
    shape = (slots, heads, context, head_dim)
    k, v = (torch.empty(shape, dtype=dtype, device=device) for _ in "kv")
    if dtype is not FP8:
        return Ring(k, v)
    k_scale, v_scale = (torch.empty(shape[:3], device=device) for _ in "kv")
    return Ring(k, v, k_scale, v_scale)


def to_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (..., D) as fp8 with one float32 scale (...) a vector, its largest number at the top of fp8's range."""
    top = x.float().abs().amax(-1)
    scale = torch.where(top > 0, top / FP8_MAX, 1.0)
    return (x.float() / scale[..., None]).to(FP8), scale


def rotate_and_attend(
    qkv: Tensor, angles: tuple[Tensor, Tensor], ring: Ring, positions: Tensor, slots: Tensor, attention: RingAttention
) -> Tensor:
    """Rotate queries and keys, write keys and values, attend.

    qkv (B, T, 3, H, D); angles: cosine and sine (B, T, D/2); positions (B,) int64, of each row's first query; slots (B,).
    Returns (B, T, H * D).
    """
    cos, sin = angles
    qk = rotate(qkv[:, :, :2], cos[:, :, None, None], sin[:, :, None, None])  # (B, T, 2, H, D)
    return attention(qk[:, :, 0], qk[:, :, 1], qkv[:, :, 2], ring, positions, slots).flatten(-2)


def ring_attention(q: Tensor, k: Tensor, v: Tensor, ring: Ring, positions: Tensor, slots: Tensor) -> Tensor:
    """Write k and v (B, T, H, D) at `positions` + t of each row's slot, then attend with q. Returns (B, T, H, D).

    Static shapes, no synchronisation. Rows may share a scratch slot, whose contents are then undefined.
    """
    steps, context = q.shape[1], ring.k.shape[2]
    written = positions[:, None] + torch.arange(steps, device=q.device)  # (B, T)
    index = written % context
    for values, target, scales in ((k, ring.k, ring.k_scale), (v, ring.v, ring.v_scale)):
        if scales is None:
            target[slots[:, None], :, index] = values.to(target.dtype)
        else:
            stored, scale = to_fp8(values)
            target.view(torch.uint8)[slots[:, None], :, index] = stored.view(torch.uint8)
            scales[slots[:, None], :, index] = scale
    last = written[:, -1:]  # (B, 1)
    entries = torch.arange(context, device=q.device)
    held = last - (last - entries) % context  # (B, context): the position that each entry holds; negative: none
    seen = (held[:, None] >= 0) & (held[:, None] <= written[:, :, None])  # (B, T, context)
    keys = _gathered(ring.k, ring.k_scale, slots, q.dtype)  # (B, H, context, D)
    values = torch.where((held >= 0)[:, None, :, None], _gathered(ring.v, ring.v_scale, slots, q.dtype), 0)
    scores = torch.einsum("bthd,bhcd->bhtc", q, keys).to(torch.promote_types(q.dtype, torch.float32)) * q.shape[-1] ** -0.5
    weights = torch.where(seen[:, None], scores, -torch.inf).softmax(-1).to(q.dtype)
    return torch.einsum("bhtc,bhcd->bthd", weights, values)


def _gathered(ring: Tensor, scales: Tensor | None, slots: Tensor, dtype: torch.dtype) -> Tensor:
    """The rows' part of a ring, (B, H, context, D) in dtype."""
    if scales is None:
        return ring[slots].to(dtype)
    return (ring.view(torch.uint8)[slots].view(ring.dtype).float() * scales[slots][..., None]).to(dtype)


def ring_attention_rows(q: Tensor, k: Tensor, v: Tensor, ring: Ring, positions: Tensor, slots: Tensor) -> Tensor:
    """As `ring_attention`, for tensors on the CPU; of fp8 rings it knows nothing."""
    steps, context = q.shape[1], ring.k.shape[2]
    index = (positions[:, None] + torch.arange(steps)) % context  # (B, T)
    ring.k[slots[:, None], :, index] = k.to(ring.k.dtype)
    ring.v[slots[:, None], :, index] = v.to(ring.v.dtype)
    rows = []
    for row, (slot, position) in enumerate(zip(slots.tolist(), positions.tolist(), strict=True)):
        held = min(position + steps, context)
        keys, values = ring.k[slot, None, :, :held], ring.v[slot, None, :, :held]  # (1, H, held, D)
        if not (ring.k.dtype is torch.bfloat16 and ATTENDS_NARROW):
            keys, values = keys.to(q.dtype), values.to(q.dtype)
        mask = _later_hidden(position, steps, context, held) if steps > 1 else None
        query = q[row, None].transpose(1, 2).to(keys.dtype)
        rows.append(F.scaled_dot_product_attention(query, keys, values, attn_mask=mask).to(q.dtype))
    return torch.cat(rows).transpose(1, 2)


def _later_hidden(position: int, steps: int, context: int, held: int) -> Tensor:
    """bool (T, held): which entries each of this call's positions sees; those written behind it are hidden."""
    mask = torch.ones(steps, held, dtype=torch.bool)
    for step in range(steps):
        for later in range(step + 1, steps):
            mask[step, (position + later) % context] = False
    return mask
