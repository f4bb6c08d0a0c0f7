"""Ring attention in Triton: write the new keys and values, and attend, in one pass. Knows nothing of models or graphs.

A ring holds, for each slot and head, the keys and values of the last `context` positions; position p lies at index
p % context. A call advances each row by T positions (1 in the language model, 2 in Mimi): both are written before anything
is attended to, so of a full ring the first of a pair sees context - 1 positions and the second all of them.

Entries that the stream has not written are never read, whatever lies there. Rows are independent of each other. The plain
twin is `torch_impl.attention.rotate_and_attend` with `ring_attention`.
Axes: B row, T position, H head, D dim.
"""

# Triton's language has no types.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,attr-defined,operator"

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from moshi_stt.models.torch_impl.attention import FP8, Ring
from moshi_stt.models.torch_impl.cuda.attention_dot import ring_attention_16, ring_attention_fp8
from moshi_stt.models.torch_impl.cuda.launch import INTERPRETED, device_of


@triton.jit
def _rotated(x, cos, sin, D: tl.constexpr):
    """float32 (D,): the vector at x, its interleaved pairs turned by the angle whose cosines and sines (D/2,) are given."""
    d = tl.arange(0, D)
    straight = tl.load(x + d).to(tl.float32)
    swapped = tl.load(x + (d ^ 1)).to(tl.float32)
    sign = tl.where(d % 2 == 0, -1.0, 1.0)
    return straight * tl.load(cos + d // 2) + sign * swapped * tl.load(sin + d // 2)


@triton.jit
def _fold(m, l, acc, scores, seen, v):  # noqa: E741
    """One block into a running softmax: scores (N,) in powers of two, seen (N,) bool, v (N, D)."""
    scores = tl.where(seen, scores, -1e30)
    new_m = tl.maximum(m, tl.max(scores, 0))
    shrink = tl.exp2(m - new_m)
    p = tl.where(seen, tl.exp2(scores - new_m), 0.0)
    return new_m, l * shrink + tl.sum(p, 0), acc * shrink + tl.sum(p[:, None] * v, 0)


@triton.jit
def _finish(m, l, acc, out, part, where, split, D: tl.constexpr, SPLITS: tl.constexpr):  # noqa: E741
    """Store the result, or, of a split row, what `_combine` needs: D sums, then the maximum, then the weight."""
    d = tl.arange(0, D)
    if SPLITS == 1:
        tl.store(out + where * D + d, (acc / l).to(out.dtype.element_ty))
    else:
        base = part + (where * SPLITS + split) * (D + 2)
        tl.store(base + d, acc)
        tl.store(base + D, m)
        tl.store(base + D + 1, l)


@triton.jit
def _ring_attention(
    qkv, cos, sin, k_ring, v_ring, k_scales, v_scales, slots, positions, out, part, scale,
    H: tl.constexpr, D: tl.constexpr, CONTEXT: tl.constexpr, T: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program for each head, row and split of the ring. For float32 rings, whose arithmetic stays float32."""
    head = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2)
    slot = tl.load(slots + row).to(tl.int64)
    position = tl.load(positions + row).to(tl.int64)
    d = tl.arange(0, D)
    ring = (slot * H + head) * CONTEXT
    k_ring += ring * D
    v_ring += ring * D

    # The new positions: rotated, rounded as the projection's dtype rounds, written by the first split.
    first = split == 0
    half: tl.constexpr = D // 2
    x = qkv + (row * T * 3 * H + head) * D
    angle = row * T * half
    dtype = qkv.dtype.element_ty
    scale = scale * 1.4426950408889634
    w0 = (position % CONTEXT).to(tl.int32)
    q0 = _rotated(x, cos + angle, sin + angle, D).to(dtype).to(tl.float32) * scale
    k0 = _rotated(x + H * D, cos + angle, sin + angle, D).to(dtype).to(tl.float32)
    v0 = tl.load(x + 2 * H * D + d).to(tl.float32)
    tl.store(k_ring + w0 * D + d, k0, mask=first & (d >= 0))
    tl.store(v_ring + w0 * D + d, v0, mask=first & (d >= 0))
    m0 = tl.where(first, tl.sum(q0 * k0, 0), -1e30)
    l0 = tl.where(first, 1.0, 0.0)
    acc0 = tl.where(first, v0, 0.0)
    w1 = w0
    if T == 2:
        x += 3 * H * D
        angle += half
        w1 = ((position + 1) % CONTEXT).to(tl.int32)
        q1 = _rotated(x, cos + angle, sin + angle, D).to(dtype).to(tl.float32) * scale
        k1 = _rotated(x + H * D, cos + angle, sin + angle, D).to(dtype).to(tl.float32)
        v1 = tl.load(x + 2 * H * D + d).to(tl.float32)
        tl.store(k_ring + w1 * D + d, k1, mask=first & (d >= 0))
        tl.store(v_ring + w1 * D + d, v1, mask=first & (d >= 0))
        s10 = tl.sum(q1 * k0, 0)
        s11 = tl.sum(q1 * k1, 0)
        top = tl.maximum(s10, s11)
        m1 = tl.where(first, top, -1e30)
        l1 = tl.where(first, tl.exp2(s10 - top) + tl.exp2(s11 - top), 0.0)
        acc1 = tl.where(first, tl.exp2(s10 - top) * v0 + tl.exp2(s11 - top) * v1, 0.0)

    # The old positions of this split: those written before, less those that the new ones have just replaced.
    share: tl.constexpr = ((CONTEXT + BLOCK - 1) // BLOCK + SPLITS - 1) // SPLITS * BLOCK
    low = split * share
    high = tl.minimum(tl.minimum(position, CONTEXT).to(tl.int32), low + share)
    for start in tl.range(low, high, BLOCK, num_stages=STAGES):
        n = start + tl.arange(0, BLOCK)
        seen = (n < high) & (n != w0) & (n != w1)
        entry = n[:, None] * D + d[None, :]
        k = tl.load(k_ring + entry, mask=seen[:, None], other=0.0).to(tl.float32)
        v = tl.load(v_ring + entry, mask=seen[:, None], other=0.0).to(tl.float32)
        s0 = tl.sum(k * q0[None, :], 1)
        m0, l0, acc0 = _fold(m0, l0, acc0, s0, seen, v)
        if T == 2:
            s1 = tl.sum(k * q1[None, :], 1)
            m1, l1, acc1 = _fold(m1, l1, acc1, s1, seen, v)

    _finish(m0, l0, acc0, out, part, row * T * H + head, split, D, SPLITS)
    if T == 2:
        _finish(m1, l1, acc1, out, part, (row * T + 1) * H + head, split, D, SPLITS)


@triton.jit
def _combine(part, out, D: tl.constexpr, SPLITS: tl.constexpr):
    """Join the splits of one head of one position."""
    where = tl.program_id(0).to(tl.int64)
    s = tl.arange(0, SPLITS)
    d = tl.arange(0, D)
    base = part + (where * SPLITS + s) * (D + 2)
    m = tl.load(base + D)
    weight = tl.exp2(m - tl.max(m, 0))
    total = tl.sum(weight * tl.load(base + D + 1), 0)
    acc = tl.sum(tl.load(base[:, None] + d[None, :]) * weight[:, None], 0)
    tl.store(out + where * D + d, (acc / total).to(out.dtype.element_ty))


class Tiling(NamedTuple):
    """How a call is cut: splits of the ring, ring entries a block, warps a program, blocks in flight."""

    splits: int
    block: int
    warps: int
    stages: int


def choose_tiling(rows: int, heads: int, context: int, dtype: torch.dtype) -> Tiling:
    """Few rows are split, so that every multiprocessor has programs; many rows take one pass. Measured on an H200."""
    programs = rows * heads
    splits = 1
    while programs * splits < 512 and splits < 16:
        splits *= 2
    if dtype is torch.float32:
        if programs * splits < 512 or splits > 1:
            return Tiling(min(splits, 8), 32, 2, 1)
        return Tiling(1, 32, 2, 3)
    if dtype is FP8:
        if splits > 1:
            return Tiling(splits, 64, 2, 3) if splits < 8 else Tiling(splits, 64, 4, 2)
        return Tiling(1, 64, 2, 4 if programs >= 4_096 else 3)
    if splits > 1:
        return Tiling(splits, 64, 4, 3 if splits < 8 else 1)
    return Tiling(1, 64, 4, 3)


def ring_attention(
    qkv: Tensor, cos: Tensor, sin: Tensor, ring: Ring, slots: Tensor, positions: Tensor, *, tiling: Tiling | None = None
) -> Tensor:
    """Write T new positions of each row into its slot's ring, and attend over it.

    qkv       (B, T, 3, H, D) contiguous: the projection before rotation; T is 1 or 2
    cos, sin  (B, T, D/2) float32 of the rows' angles
    slots     (B,) integer, without repeats but for a scratch slot whose contents nobody reads
    positions (B,) integer: the first new position of each row; 0 starts anew, whatever lies in the ring

    Returns (B, T, H, D) in qkv's dtype.
    """
    rows, t, three, heads, dim = qkv.shape
    context = ring.k.shape[2]
    if three != 3 or t not in (1, 2) or not qkv.is_contiguous():
        raise ValueError(f"ring_attention takes contiguous (B, 1 or 2, 3, H, D), got {tuple(qkv.shape)}")
    tiling = tiling or choose_tiling(rows, heads, context, ring.k.dtype)
    out = torch.empty(rows, t, heads, dim, dtype=qkv.dtype, device=qkv.device)
    splits = tiling.splits
    part = torch.empty(rows * t * heads * splits * (dim + 2), dtype=torch.float32, device=qkv.device) if splits > 1 else cos
    k_scale, v_scale = (ring.k_scale, ring.v_scale) if ring.k_scale is not None else (cos, cos)
    with device_of(qkv):
        arguments = (qkv, cos, sin, ring.k, ring.v, k_scale, v_scale, slots, positions, out, part, dim**-0.5)
        constants = {"H": heads, "D": dim, "CONTEXT": context, "T": t, "SPLITS": splits, "BLOCK": tiling.block}
        launch = {"STAGES": tiling.stages, "num_warps": tiling.warps}
        if ring.k.dtype is torch.float32:
            _ring_attention[(heads, rows, splits)](*arguments, **constants, **launch)
        elif ring.k.dtype is FP8:
            ring_attention_fp8[(heads, rows, splits)](*arguments, **constants, **launch, ASSEMBLY=not INTERPRETED)
        else:  # Triton's interpreter cannot multiply bfloat16
            dot = tl.float16 if ring.k.dtype is torch.float16 else tl.float32 if INTERPRETED else tl.bfloat16
            ring_attention_16[(heads, rows, splits)](*arguments, **constants, **launch, DOT=dot)
        if splits > 1:
            _combine[(rows * t * heads,)](part, out, D=dim, SPLITS=splits, num_warps=1 if dim <= 64 else 2)
    return out
