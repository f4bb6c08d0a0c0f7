"""Small fused kernels in Triton: angles, embeddings, norms, gates, the choice of the token. Knows no model and no graph.

Each replaces a string of PyTorch operations that would take a launch and a trip through memory apiece. Arithmetic is
float32 inside; what is stored is rounded to the tensor's dtype. Axes: B row, T position, D dim, K codebook, H extra head.
"""

# Triton's language has no types.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,attr-defined,operator"

import torch
import triton
import triton.language as tl
from torch import Tensor

from moshi_stt.models.torch_impl.cuda.launch import device_of, launch


@triton.jit
def _advance(slots, fresh, frames, rows):
    """The frame number of each row, 0 where it is fresh; the slot's own is set to the next one."""
    row = tl.program_id(0)
    slot = tl.load(slots + row).to(tl.int64)
    frame = tl.where(tl.load(fresh + row) != 0, 0, tl.load(frames + slot))
    tl.store(rows + row, frame)
    tl.store(frames + slot, frame + 1)


@triton.jit
def _angles(rows, turns, cos, sin, T: tl.constexpr, HALF: tl.constexpr):
    """Cosines and sines of T positions of a row. In float64 turns, of which only the fraction counts: exact for days."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, HALF)
    rate = tl.load(turns + i)
    frame = tl.load(rows + row)
    for t in tl.static_range(T):
        turn = (frame * T + t).to(tl.float64) * rate
        angle = (turn - tl.floor(turn)) * 6.283185307179586
        at = (row * T + t) * HALF + i
        tl.store(cos + at, tl.cos(angle).to(tl.float32))
        tl.store(sin + at, tl.sin(angle).to(tl.float32))


def advance(slots: Tensor, fresh: Tensor, frames: Tensor) -> Tensor:
    """Take each row's next frame number: int64 (B,), 0 where `fresh` (B,) is not 0. frames (slots,) int64 moves on."""
    rows = torch.empty(slots.shape[0], dtype=torch.int64, device=slots.device)
    with device_of(slots):
        launch(_advance, (slots.shape[0],), slots, fresh, frames, rows, num_warps=1)
    return rows


def angle_rates(half: int, max_period: float, device: torch.device) -> Tensor:
    """Turns per position of each pair: float64 (half,), max_period^(-i/half) / 2 pi."""
    i = torch.arange(half, dtype=torch.float64, device=device)
    return max_period ** (-i / half) / (2 * torch.pi)


def angles(frames: Tensor, rates: Tensor, positions: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines, float32 (B, positions, D/2), of positions frame * positions + t for frames (B,) int64."""
    half = rates.shape[0]
    cos = torch.empty(frames.shape[0], positions, half, dtype=torch.float32, device=frames.device)
    sin = torch.empty_like(cos)
    with device_of(frames):
        launch(_angles, (frames.shape[0],), frames, rates, cos, sin, T=positions, HALF=half, num_warps=1)
    return cos, sin


@triton.jit
def _embed(
    slots, frames, texts, codes, table, condition, out,
    START: tl.constexpr, PAD: tl.constexpr, K: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, CONDITION: tl.constexpr,
):  # fmt: skip
    """Sum a row's embeddings: text, then codebooks 0, 1, …"""
    row = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = d < D
    slot = tl.load(slots + row).to(tl.int64)
    first = tl.load(frames + row) == 0
    text = tl.where(first, START, tl.load(texts + slot)).to(tl.int64)
    total = tl.load(table + text * D + d, mask=inside, other=0.0).to(tl.float32)
    for k in range(K):
        code = tl.where(first, PAD, tl.load(codes + slot * K + k)).to(tl.int64)
        code += START + 1 + k * (PAD + 1)
        total += tl.load(table + code * D + d, mask=inside, other=0.0).to(tl.float32)
    if CONDITION:
        total += tl.load(condition + d, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * D + d, total.to(out.dtype.element_ty), mask=inside)


def embed(
    slots: Tensor,
    frames: Tensor,
    texts: Tensor,
    codes: Tensor,
    table: Tensor,
    condition: Tensor | None,
    *,
    start_token: int,
    pad_code: int,
) -> Tensor:
    """The language model's input (B, D), summed in float32, for rows (B,) of `slots` at `frames`.

    texts (slots,), codes (slots, K): each slot's last token and codes; at frame 0 start_token and pad_code stand for them.
    table (start_token + 1 + K * (pad_code + 1), D): text, then each codebook; condition (D,) float32 is added.
    """
    books, dim = codes.shape[1], table.shape[1]
    out = torch.empty(slots.shape[0], dim, dtype=table.dtype, device=table.device)
    with device_of(out):
        launch(
            _embed, (slots.shape[0], triton.cdiv(dim, 512)),
            slots, frames, texts, codes, table, table if condition is None else condition, out,
            START=start_token, PAD=pad_code, K=books, D=dim, BLOCK=512, CONDITION=condition is not None, num_warps=2,
        )  # fmt: skip
    return out


@triton.jit
def _add_rms(
    x, delta, alpha, out, eps, apart, D: tl.constexpr, BLOCK: tl.constexpr, ADD: tl.constexpr, PARTS: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK)
    inside = d < D
    value = tl.load(x + row * D + d, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        total = tl.load(delta + row * D + d, mask=inside, other=0.0).to(tl.float32)
        for part in tl.static_range(1, PARTS):
            total += tl.load(delta + part * apart + row * D + d, mask=inside, other=0.0)
        value += total.to(x.dtype.element_ty).to(tl.float32)
        value = value.to(x.dtype.element_ty).to(tl.float32)
        tl.store(x + row * D + d, value.to(x.dtype.element_ty), mask=inside)
    scale = tl.rsqrt(tl.sum(value * value, 0) / D + eps)
    value = value * scale * tl.load(alpha + d, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * D + d, value.to(out.dtype.element_ty), mask=inside)


def add_rms(x: Tensor, delta: Tensor | None, alpha: Tensor, eps: float) -> Tensor:
    """x += delta (in place), then the RMS norm of x times alpha (D,), both (B, D).

    delta: (B, D), or float32 (parts, B, D) whose sum over the parts, rounded to x's dtype, it is.
    """
    rows, dim = x.shape
    out = torch.empty_like(x)
    parts = delta.shape[0] if delta is not None and delta.dim() == 3 else 1
    with device_of(x):
        launch(
            _add_rms, (rows,), x, x if delta is None else delta, alpha, out, eps, rows * dim,
            D=dim, BLOCK=triton.next_power_of_2(dim), ADD=delta is not None, PARTS=parts, num_warps=4,
        )  # fmt: skip
    return out


@triton.jit
def _scaled_add_norm(
    x, delta, layer_scale, weight, bias, out, tail, frames, eps,
    D: tl.constexpr, ADD: tl.constexpr, NORM: tl.constexpr, TAIL: tl.constexpr, T: tl.constexpr, REPLICATE: tl.constexpr,
):  # fmt: skip
    """x += layer_scale * delta; then either a layer norm of x, or x into the columns behind the `TAIL` kept ones."""
    place = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, D)
    value = tl.load(x + place * D + d).to(tl.float32)
    if ADD:
        value += tl.load(layer_scale + d) * tl.load(delta + place * D + d).to(tl.float32)
        if NORM:
            tl.store(x + place * D + d, value)
    if NORM:
        mean = tl.sum(value, 0) / D
        centred = value - mean
        scale = tl.rsqrt(tl.sum(centred * centred, 0) / D + eps)
        normed = centred * scale * tl.load(weight + d) + tl.load(bias + d)
        tl.store(out + place * D + d, normed.to(out.dtype.element_ty))
    else:
        row = place // T
        t = place % T
        base = tail + row * (TAIL + T) * D
        tl.store(base + (TAIL + t) * D + d, value)
        first = (t == 0) & (tl.load(frames + row) == 0)
        if REPLICATE:
            for column in tl.static_range(TAIL):
                tl.store(base + column * D + d, value, mask=first & (d >= 0))


def scaled_add_norm(
    x: Tensor,
    delta: Tensor | None,
    layer_scale: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """x += layer_scale * delta (in place), then the layer norm of x, in dtype; x, delta (B*T, D) float32, the rest (D,)."""
    out = torch.empty_like(x, dtype=dtype)
    add = delta is not None
    with device_of(x):
        launch(
            _scaled_add_norm, (x.shape[0],),
            x, delta if add else x, layer_scale if add else x, weight, bias, out, x, x, eps,
            D=x.shape[1], ADD=add, NORM=True, TAIL=0, T=1, REPLICATE=False, num_warps=4,
        )  # fmt: skip
    return out


def scaled_add_into(
    x: Tensor, delta: Tensor, layer_scale: Tensor, out: Tensor, frames: Tensor, kept: int, *, replicate: bool
) -> None:
    """x + layer_scale * delta into out[:, kept:]; with `replicate`, a row's first column also into the kept ones at frame 0.

    x, delta (B*T, D) float32; out (B, kept + T, D) contiguous; frames (B,).
    """
    t = out.shape[1] - kept
    with device_of(x):
        launch(
            _scaled_add_norm, (x.shape[0],),
            x, delta, layer_scale, x, x, x, out, frames, 0.0,
            D=x.shape[1], ADD=True, NORM=False, TAIL=kept, T=t, REPLICATE=replicate, num_warps=4,
        )  # fmt: skip


@triton.jit
def _choose(
    logits, slots, texts, out,
    V: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Greedy token of a row, its log-probability and each extra head's first probability, into a row of `out`."""
    row = tl.program_id(0).to(tl.int64)
    base = logits + row * WIDTH
    best = -float("inf")
    token = 0
    total = 0.0
    for start in range(0, V, BLOCK):
        i = start + tl.arange(0, BLOCK)
        x = tl.load(base + i, mask=i < V, other=-float("inf")).to(tl.float32)
        top, at = tl.max(x, 0, return_indices=True)
        higher = tl.maximum(best, top)
        total = total * tl.exp(best - higher) + tl.sum(tl.exp(x - higher), 0)
        token = tl.where(top > best, start + at, token)
        best = higher
    tl.store(texts + tl.load(slots + row), token.to(texts.dtype.element_ty))
    out += row * (2 + HEADS)
    tl.store(out, token.to(tl.float32))
    tl.store(out + 1, -tl.log(total))
    for head in tl.static_range(HEADS):
        j = tl.arange(0, 16)
        x = tl.load(base + V + head * DIM + j, mask=j < DIM, other=-float("inf")).to(tl.float32)
        e = tl.exp(x - tl.max(x, 0))
        tl.store(out + 2 + head, tl.sum(tl.where(j == 0, e, 0.0), 0) / tl.sum(e, 0))


def choose(logits: Tensor, slots: Tensor, texts: Tensor, out: Tensor, vocabulary: int, heads: int, head_dim: int) -> None:
    """The most likely token of each row (the lowest of equals) into its slot's `texts`, and what a step says into out.

    logits (B, vocabulary + heads * head_dim), head_dim at most 16; out (B, 2 + heads) float32: the token, its
    log-probability, and each head's first probability.
    """
    with device_of(logits):
        launch(
            _choose,
            (logits.shape[0],),
            logits,
            slots,
            texts,
            out,
            V=vocabulary,
            HEADS=heads,
            DIM=head_dim,
            WIDTH=logits.shape[1],
            BLOCK=2048,
            num_warps=4,
        )
