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


class Ring(NamedTuple):
    """Keys and values of one layer, both (slots, H, context, D), uninitialised at first."""

    k: Tensor
    v: Tensor


RingAttention = Callable[[Tensor, Tensor, Tensor, Ring, Tensor, Tensor], Tensor]
"""(q, k, v, ring, positions, slots) -> attended, as `ring_attention`."""


def make_ring(slots: int, heads: int, context: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> Ring:
    """A ring whose memory is touched only as streams fill it."""
    shape = (slots, heads, context, head_dim)
    return Ring(torch.empty(shape, dtype=dtype, device=device), torch.empty(shape, dtype=dtype, device=device))


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
    ring.k[slots[:, None], :, index] = k.to(ring.k.dtype)
    ring.v[slots[:, None], :, index] = v.to(ring.v.dtype)
    last = written[:, -1:]  # (B, 1)
    entries = torch.arange(context, device=q.device)
    held = last - (last - entries) % context  # (B, context): the position that each entry holds; negative: none
    seen = (held[:, None] >= 0) & (held[:, None] <= written[:, :, None])  # (B, T, context)
    keys = ring.k[slots].to(q.dtype)  # (B, H, context, D)
    values = torch.where((held >= 0)[:, None, :, None], ring.v[slots], 0).to(q.dtype)
    scores = torch.einsum("bthd,bhcd->bhtc", q, keys).to(torch.promote_types(q.dtype, torch.float32)) * q.shape[-1] ** -0.5
    weights = torch.where(seen[:, None], scores, -torch.inf).softmax(-1).to(q.dtype)
    return torch.einsum("bhtc,bhcd->bthd", weights, values)


def ring_attention_rows(q: Tensor, k: Tensor, v: Tensor, ring: Ring, positions: Tensor, slots: Tensor) -> Tensor:
    """As `ring_attention`, for tensors on the CPU."""
    steps, context = q.shape[1], ring.k.shape[2]
    rows = []
    for row, (slot, position) in enumerate(zip(slots.tolist(), positions.tolist(), strict=True)):
        for step in range(steps):
            index = (position + step) % context
            ring.k[slot, :, index] = k[row, step]
            ring.v[slot, :, index] = v[row, step]
        held = min(position + steps, context)
        keys, values = ring.k[slot, None, :, :held].to(q.dtype), ring.v[slot, None, :, :held].to(q.dtype)  # (1, H, held, D)
        mask = _later_hidden(position, steps, context, held) if steps > 1 else None
        rows.append(F.scaled_dot_product_attention(q[row, None].transpose(1, 2), keys, values, attn_mask=mask))
    return torch.cat(rows).transpose(1, 2)


def _later_hidden(position: int, steps: int, context: int, held: int) -> Tensor:
    """bool (T, held): which entries each of this call's positions sees; those written behind it are hidden."""
    mask = torch.ones(steps, held, dtype=torch.bool)
    for step in range(steps):
        for later in range(step + 1, steps):
            mask[step, (position + later) % context] = False
    return mask
