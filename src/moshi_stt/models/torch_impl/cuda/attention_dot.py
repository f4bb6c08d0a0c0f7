"""Ring attention on the matrix units, for rings narrower than float32. Called by `attention.ring_attention` alone.

The T queries of a head stand in a tile of 16, the least that the units take: they would idle otherwise, and reading the ring is
what takes the time. Scores and sums are float32; the softmax's weights are rounded to the products' dtype.
"""

# Triton's language has no types.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,attr-defined,operator"

import triton
import triton.language as tl

from moshi_stt.models.torch_impl.cuda.rounding import rounded

FP8_UP = 2048.0
"""Keeps the softmax's weights, times the scales of fp8 values, clear of float16's small end."""


@triton.jit
def merge(m, l, acc, block_m, block_l, block_acc):  # noqa: E741
    """A block's maximum, weight and sums into those of the blocks before it: scalars and (D,), or (N,) and (N, D).

    The one way in which blocks are joined, here and in `_combine`, so that a row's bits do not depend on who joins them.
    """
    top = tl.maximum(m, block_m)
    old = tl.exp2(m - top)
    new = tl.exp2(block_m - top)
    l = tl.fma(block_l, new, l * old)  # noqa: E741
    if len(acc.shape) == 2:
        acc = tl.fma(block_acc, new[:, None].broadcast_to(acc.shape), acc * old[:, None])
    else:
        acc = tl.fma(block_acc, new.broadcast_to(acc.shape), acc * old)
    return top, l, acc


@triton.jit
def _softmax(scores, seen):
    """A block's scores (16, N), in powers of two: their maximum, their weights, and the sum of these."""
    scores = tl.where(seen, scores, -1e30)
    m = tl.max(scores, 1)
    p = tl.where(seen, tl.exp2(scores - m[:, None]), 0.0)
    return m, p, tl.sum(p, 1)


@triton.jit
def _split_range(position, split, T: tl.constexpr, CONTEXT: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """The first entry of a split, the end of those written before, and the first and last entry just replaced."""
    share: tl.constexpr = ((CONTEXT + BLOCK - 1) // BLOCK + SPLITS - 1) // SPLITS * BLOCK
    low = split * share
    high = tl.minimum(tl.minimum(position, CONTEXT).to(tl.int32), low + share)
    return low, high, (position % CONTEXT).to(tl.int32), ((position + T - 1) % CONTEXT).to(tl.int32)


# ---- 16 bits -----------------------------------------------------------------------------------------------------------------


@triton.jit
def _rotated(x, cos, sin, rows, stride, T: tl.constexpr, D: tl.constexpr):
    """The first T of `rows` vectors with their interleaved pairs turned: float32 (N, D), zeros behind."""
    d = tl.arange(0, D)
    there = (rows < T)[:, None]
    straight = tl.load(x + rows[:, None] * stride + d[None, :], mask=there, other=0.0).to(tl.float32)
    swapped = tl.load(x + rows[:, None] * stride + (d ^ 1)[None, :], mask=there, other=0.0).to(tl.float32)
    pair = rows[:, None] * (D // 2) + (d // 2)[None, :]
    c = tl.load(cos + pair, mask=there, other=0.0)
    s = tl.load(sin + pair, mask=there, other=0.0)
    return straight * c + tl.where(d % 2 == 0, -1.0, 1.0)[None, :] * swapped * s


@triton.jit
def ring_attention_16(
    qkv, cos, sin, k_ring, v_ring, k_scales, v_scales, slots, positions, out, part, scale,
    H: tl.constexpr, D: tl.constexpr, CONTEXT: tl.constexpr, T: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """bfloat16 or float16 rings, multiplied as DOT. The scales are not used."""
    head = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2)
    ring = (tl.load(slots + row).to(tl.int64) * H + head) * CONTEXT * D
    position = tl.load(positions + row).to(tl.int64)
    k_ring += ring
    v_ring += ring
    d = tl.arange(0, D)
    r = tl.arange(0, 16)
    new = r < T
    x = qkv + (row * T * 3 * H + head) * D
    cos += row * T * (D // 2)
    sin += row * T * (D // 2)
    scale = scale * 1.4426950408889634
    dtype = qkv.dtype.element_ty
    stored = k_ring.dtype.element_ty

    q = rounded(_rotated(x, cos, sin, r, 3 * H * D, T, D), dtype).to(DOT)
    BLOCKS: tl.constexpr = (CONTEXT + BLOCK - 1) // BLOCK
    where = row * T * H + r * H + head
    base = part + where * (BLOCKS + 1) * (D + 2)
    m = tl.zeros([16], tl.float32) - 1e30
    l = tl.zeros([16], tl.float32)  # noqa: E741
    acc = tl.zeros([16, D], tl.float32)
    if split == 0:
        k = rounded(_rotated(x + H * D, cos, sin, r, 3 * H * D, T, D), dtype).to(stored)
        v = tl.load(x + 2 * H * D + r[:, None] * (3 * H * D) + d[None, :], mask=new[:, None], other=0.0).to(stored)
        entry = ((position + r) % CONTEXT)[:, None] * D + d[None, :]
        tl.store(k_ring + entry, k, mask=new[:, None])
        tl.store(v_ring + entry, v, mask=new[:, None])
        seen = (r[None, :] <= r[:, None]) & new[None, :]
        m, p, l = _softmax(tl.dot(q, tl.trans(k.to(DOT))) * scale, seen)  # noqa: E741
        acc = tl.dot(p.to(DOT), v.to(DOT))
        if SPLITS > 1:
            tl.store(base[:, None] + d[None, :], acc, mask=new[:, None])
            tl.store(base + D, m, mask=new)
            tl.store(base + D + 1, l, mask=new)

    low, high, w0, w1 = _split_range(position, split, T, CONTEXT, SPLITS, BLOCK)
    for start in tl.range(low, high, BLOCK, num_stages=STAGES):
        n = start + tl.arange(0, BLOCK)
        old = (n < high) & (n != w0) & (n != w1)
        entry = n[:, None] * D + d[None, :]
        k = tl.load(k_ring + entry, mask=old[:, None], other=0.0).to(DOT)
        v = tl.load(v_ring + entry, mask=old[:, None], other=0.0).to(DOT)
        block_m, p, block_l = _softmax(tl.dot(q, tl.trans(k)) * scale, old[None, :])
        block_acc = tl.dot(p.to(DOT), v)
        if SPLITS == 1:
            m, l, acc = merge(m, l, acc, block_m, block_l, block_acc)  # noqa: E741
        else:
            at = base + (1 + start // BLOCK) * (D + 2)
            tl.store(at[:, None] + d[None, :], block_acc, mask=new[:, None])
            tl.store(at + D, block_m, mask=new)
            tl.store(at + D + 1, block_l, mask=new)

    if SPLITS == 1:
        tl.store(out + where[:, None] * D + d[None, :], (acc / l[:, None]).to(out.dtype.element_ty), mask=new[:, None])


# ---- fp8 ---------------------------------------------------------------------------------------------------------------------


@triton.jit
def _rotated_halves(x, cos, sin, rows, stride, T: tl.constexpr, D: tl.constexpr):
    """As `_rotated`, even and odd elements apart: two float32 (N, D/2)."""
    j = tl.arange(0, D // 2)
    there = (rows < T)[:, None]
    at = x + rows[:, None] * stride + 2 * j[None, :]
    even = tl.load(at, mask=there, other=0.0).to(tl.float32)
    odd = tl.load(at + 1, mask=there, other=0.0).to(tl.float32)
    pair = rows[:, None] * (D // 2) + j[None, :]
    c = tl.load(cos + pair, mask=there, other=0.0)
    s = tl.load(sin + pair, mask=there, other=0.0)
    return even * c - odd * s, even * s + odd * c


@triton.jit
def _store_fp8(even, odd, ring, scales, index, write, D: tl.constexpr):
    """Write vectors (N, D/2) twice into entries `index` (N,): as read again, in float16, and their scales (N,)."""
    j = tl.arange(0, D // 2)
    top = tl.maximum(tl.max(tl.abs(even), 1), tl.max(tl.abs(odd), 1))
    scale = tl.where(top > 0, top / 448.0, 1.0)
    even = (even / scale[:, None]).to(tl.float8e4nv)
    odd = (odd / scale[:, None]).to(tl.float8e4nv)
    at = ring + index[:, None] * D + 2 * j[None, :]
    tl.store(at, even, mask=write[:, None])
    tl.store(at + 1, odd, mask=write[:, None])
    tl.store(scales + index, scale, mask=write)
    return even.to(tl.float16), odd.to(tl.float16), scale


@triton.jit
def _put_halves(base, even, odd, m, l, write, D: tl.constexpr):  # noqa: E741
    """Store a block (16, D/2) twice for `attention._combine`: D sums, the maximum, the weight."""
    j = tl.arange(0, D // 2)
    tl.store(base[:, None] + 2 * j[None, :], even, mask=write[:, None])
    tl.store(base[:, None] + 2 * j[None, :] + 1, odd, mask=write[:, None])
    tl.store(base + D, m, mask=write)
    tl.store(base + D + 1, l, mask=write)


@triton.jit
def _halves(words, ASSEMBLY: tl.constexpr):
    """float16 of the low and of the high fp8 in each 16-bit word.

    Words, since the matrix units' loads shuffle 16 bits at a time; bytes would go one by one. Interpreters know no assembly.
    """
    if ASSEMBLY:
        low, high = tl.inline_asm_elementwise(
            """{ .reg .b32 l, h; .reg .b16 a, b;
            prmt.b32 l, $2, 0, 0x4420; prmt.b32 h, $2, 0, 0x4431;
            cvt.u16.u32 a, l; cvt.u16.u32 b, h;
            cvt.rn.f16x2.e4m3x2 $0, a; cvt.rn.f16x2.e4m3x2 $1, b; }""",
            "=r,=r,r",
            [words],
            dtype=(tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    else:
        low = (words & 0xFF).to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float16)
        high = (words >> 8).to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float16)
    return low, high


@triton.jit
def ring_attention_fp8(
    qkv, cos, sin, k_ring, v_ring, k_scales, v_scales, slots, positions, out, part, scale,
    H: tl.constexpr, D: tl.constexpr, CONTEXT: tl.constexpr, T: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr, UP: tl.constexpr, ASSEMBLY: tl.constexpr,
):  # fmt: skip
    """fp8 rings with a scale a vector, multiplied as float16, which holds every fp8 number; even and odd elements apart.

    UP: what the softmax's weights are multiplied with on their way through float16.
    """
    head = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2)
    ring = (tl.load(slots + row).to(tl.int64) * H + head) * CONTEXT
    position = tl.load(positions + row).to(tl.int64)
    half: tl.constexpr = D // 2
    k_ring += ring * D
    v_ring += ring * D
    k_scales += ring
    v_scales += ring
    j = tl.arange(0, half)
    r = tl.arange(0, 16)
    new = r < T
    x = qkv + (row * T * 3 * H + head) * D
    cos += row * T * half
    sin += row * T * half
    scale = scale * 1.4426950408889634
    dtype = qkv.dtype.element_ty
    BLOCKS: tl.constexpr = (CONTEXT + BLOCK - 1) // BLOCK
    where = row * T * H + r * H + head
    base = part + where * (BLOCKS + 1) * (D + 2)

    q0, q1 = _rotated_halves(x, cos, sin, r, 3 * H * D, T, D)
    q0 = q0.to(dtype).to(tl.float16)
    q1 = q1.to(dtype).to(tl.float16)
    m = tl.zeros([16], tl.float32) - 1e30
    l = tl.zeros([16], tl.float32)  # noqa: E741
    acc0 = tl.zeros([16, half], tl.float32)
    acc1 = tl.zeros([16, half], tl.float32)
    if split == 0:
        k0, k1 = _rotated_halves(x + H * D, cos, sin, r, 3 * H * D, T, D)
        at = x + 2 * H * D + r[:, None] * (3 * H * D) + 2 * j[None, :]
        v0 = tl.load(at, mask=new[:, None], other=0.0).to(tl.float32)
        v1 = tl.load(at + 1, mask=new[:, None], other=0.0).to(tl.float32)
        index = (position + r) % CONTEXT
        k0, k1, ks = _store_fp8(k0.to(dtype).to(tl.float32), k1.to(dtype).to(tl.float32), k_ring, k_scales, index, new, D)
        v0, v1, vs = _store_fp8(v0, v1, v_ring, v_scales, index, new, D)
        scores = tl.dot(q1, tl.trans(k1), tl.dot(q0, tl.trans(k0))) * (ks * scale)[None, :]
        m, p, l = _softmax(scores, (r[None, :] <= r[:, None]) & new[None, :])  # noqa: E741
        p = (p * (vs * UP)[None, :]).to(tl.float16)
        acc0 = tl.dot(p, v0)
        acc1 = tl.dot(p, v1)
        if SPLITS > 1:
            _put_halves(base, acc0, acc1, m, l, new, D)

    low, high, w0, w1 = _split_range(position, split, T, CONTEXT, SPLITS, BLOCK)
    k_words = k_ring.to(tl.pointer_type(tl.uint16))
    v_words = v_ring.to(tl.pointer_type(tl.uint16))
    for start in tl.range(low, high, BLOCK, num_stages=STAGES):
        n = start + tl.arange(0, BLOCK)
        old = (n < high) & (n != w0) & (n != w1)
        entry = n[:, None] * half + j[None, :]
        k0, k1 = _halves(tl.load(k_words + entry, mask=old[:, None], other=0), ASSEMBLY)
        v0, v1 = _halves(tl.load(v_words + entry, mask=old[:, None], other=0), ASSEMBLY)
        ks = tl.load(k_scales + n, mask=old, other=0.0) * scale
        vs = tl.load(v_scales + n, mask=old, other=0.0) * UP
        scores = tl.dot(q1, tl.trans(k1), tl.dot(q0, tl.trans(k0))) * ks[None, :]
        block_m, p, block_l = _softmax(scores, old[None, :])
        p = (p * vs[None, :]).to(tl.float16)
        block0 = tl.dot(p, v0)
        block1 = tl.dot(p, v1)
        if SPLITS == 1:
            _, _, acc0 = merge(m, l, acc0, block_m, block_l, block0)
            m, l, acc1 = merge(m, l, acc1, block_m, block_l, block1)  # noqa: E741
        else:
            _put_halves(base + (1 + start // BLOCK) * (D + 2), block0, block1, block_m, block_l, new, D)

    if SPLITS == 1:
        at = out + where[:, None] * D + 2 * j[None, :]
        l = l * UP  # noqa: E741
        tl.store(at, (acc0 / l[:, None]).to(out.dtype.element_ty), mask=new[:, None])
        tl.store(at + 1, (acc1 / l[:, None]).to(out.dtype.element_ty), mask=new[:, None])
