"""Mimi's causal convolutions in Triton, one frame of many rows at a time. Knows nothing of slots, transformers or graphs.

Data lies channels-last, each row with its kept columns in front: (B, context + T, C). The window of an output is then one
contiguous run of kernel * C numbers, stride * C after the last output's, so that a convolution is a matrix product over
overlapping rows and copies nothing. Weights are (C_out, kernel * C_in). An input reaches a convolution with its ELU already
taken by whoever stored it; only residual blocks take raw input, which they add back.

A row's result is the same to the last bit whatever the number of rows: every output is one chain of sums over the window, in
its order, whatever the tile.
"""

# Triton's language has no types.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,attr-defined,operator"

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from moshi_stt.models.report import LOUDEST
from moshi_stt.models.torch_impl.cuda.launch import attempt, device_of, launch
from moshi_stt.models.torch_impl.cuda.limits import Limits, limits_of
from moshi_stt.models.torch_impl.cuda.rounding import rounded, saturated


def conv_weight(weight: Tensor) -> Tensor:
    """(C_out, C_in, kernel) as the kernels take it: (C_out, kernel * C_in)."""
    return weight.transpose(1, 2).reshape(weight.shape[0], -1).contiguous()


@triton.jit
def _elu(x):
    return tl.where(x > 0, x, tl.exp(x) - 1.0)


@triton.jit
def _first_conv(x, weight, bias, out, T, row_in, row_out, skip, C: tl.constexpr, KERNEL: tl.constexpr, BLOCK: tl.constexpr):
    """One channel in, C out: too thin for a matrix product."""
    row = tl.program_id(1).to(tl.int64)
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    c = tl.arange(0, C)
    total = tl.zeros([BLOCK, C], tl.float32) + tl.load(bias + c).to(tl.float32)[None, :]
    for k in tl.static_range(KERNEL):
        sample = tl.load(x + row * row_in + t + k, mask=t < T, other=0.0).to(tl.float32)
        total += sample[:, None] * tl.load(weight + c * KERNEL + k).to(tl.float32)[None, :]
    at = out + row * row_out + skip + t[:, None] * C + c[None, :]
    tl.store(at, rounded(total, out.dtype.element_ty), mask=(t < T)[:, None])


@triton.jit
def _place_sound(x, out, T, row_in, row_out, skip, LOUDEST: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(1).to(tl.int64)
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    sound = tl.load(x + row * row_in + t, mask=t < T, other=0.0)
    sound = tl.where(tl.abs(sound) < float("inf"), sound, 0.0)  # false for what is no number
    tl.store(out + row * row_out + skip + t, tl.minimum(tl.maximum(sound, -LOUDEST), LOUDEST), mask=t < T)


@triton.jit(do_not_specialize=["count", "T"])
def _conv(
    x, weight, bias, shortcut, out, count, T, row_in, step_in, row_shortcut, row_out, skip, N, K,
    ELU_IN: tl.constexpr, ACTIVATION: tl.constexpr, BIAS: tl.constexpr, SHORTCUT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out[m, n] = bias[n] + window(m) . weight[n] (+ shortcut[m, n]) for `count` = B * T outputs m."""
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    row = (m // T).to(tl.int64)
    t = m % T
    a = x + row * row_in + t * step_in
    k = tl.arange(0, BK)
    total = tl.zeros([BM, BN], tl.float32)
    for start in range(0, K, BK):
        window = tl.load(a[:, None] + (start + k)[None, :], mask=(m < count)[:, None], other=0.0)
        if ELU_IN:
            window = _elu(window.to(tl.float32)).to(x.dtype.element_ty)
        w = tl.load(weight + n[None, :] * K + (start + k)[:, None])
        total = tl.dot(window, w, total, input_precision=PRECISION)
    if BIAS:
        total += tl.load(bias + n)[None, :]
    if SHORTCUT:
        at = shortcut + row[:, None] * row_shortcut + t[:, None] * N + n[None, :]
        total += tl.load(at, mask=(m < count)[:, None], other=0.0).to(tl.float32)
    if ACTIVATION == "elu":
        total = _elu(total)
    if ACTIVATION == "gelu":
        total = 0.5 * total * (1.0 + tl.erf(total * 0.7071067811865476))
    at = out + row[:, None] * row_out + skip + t[:, None] * N + n[None, :]
    tl.store(at, rounded(total, out.dtype.element_ty), mask=(m < count)[:, None])


@triton.jit(do_not_specialize=["count", "T"])
def _residual(
    x, weight1, bias1, weight2, bias2, out, count, T, row_in, row_out, skip,
    C: tl.constexpr, HIDDEN: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out = ELU(x + conv1(ELU(conv3(ELU(x))))), the two products in one program: what lies between never leaves it."""
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    inside = (m < count)[:, None]
    row = (m // T).to(tl.int64)
    t = m % T
    a = x + row * row_in + t * C
    k = tl.arange(0, BK)
    h = tl.arange(0, HIDDEN)
    hidden = tl.zeros([BM, HIDDEN], tl.float32)
    for start in range(0, 3 * C, BK):
        window = tl.load(a[:, None] + (start + k)[None, :], mask=inside, other=0.0)
        window = _elu(window.to(tl.float32)).to(x.dtype.element_ty)
        w = tl.load(weight1 + h[None, :] * (3 * C) + (start + k)[:, None])
        hidden = tl.dot(window, w, hidden, input_precision=PRECISION)
    hidden = rounded(_elu(hidden + tl.load(bias1 + h)[None, :]), x.dtype.element_ty)
    for first in tl.static_range(0, C, BN):
        n = first + tl.arange(0, BN)
        w = tl.load(weight2 + n[None, :] * HIDDEN + h[:, None])
        total = tl.dot(hidden, w, input_precision=PRECISION) + tl.load(bias2 + n)[None, :]
        total += tl.load(a[:, None] + 2 * C + n[None, :], mask=inside, other=0.0).to(tl.float32)
        at = out + row[:, None] * row_out + skip + t[:, None] * C + n[None, :]
        tl.store(at, rounded(_elu(total), out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def _swap_tails(
    buffers, tails, starts, strides, columns, slots, frames, rows, count, width,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, SAVE: tl.constexpr,
):  # fmt: skip
    """Copy the kept columns of ROWS rows between their slots and the buffers; at frame 0 zeros go into the buffers."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    first = tl.program_id(1).to(tl.int64) * ROWS
    start = buffers + tl.load(starts + i, mask=i < count, other=0)
    stride = tl.load(strides + i, mask=i < count, other=0)
    column = tl.load(columns + i, mask=i < count, other=0)
    for row in tl.range(first, tl.minimum(first + ROWS, rows)):
        kept = tails + tl.load(slots + row).to(tl.int64) * width + column
        at = start + row * stride
        if SAVE:
            tl.store(kept, tl.load(at, mask=i < count, other=0.0).to(tails.dtype.element_ty), mask=i < count)
        else:
            old = tl.load(frames + row) > 0
            tl.store(at, tl.load(kept, mask=(i < count) & old, other=0.0).to(buffers.dtype.element_ty), mask=i < count)


class Tile(NamedTuple):
    """Block shape, warps and stages of a product."""

    m: int
    n: int
    k: int
    warps: int
    stages: int


def place_sound(pcm: Tensor, out: Tensor) -> None:
    """pcm (B, S) float32 behind the kept columns of out (B, context + S, 1), cleaned as the plain backend does."""
    rows, count = pcm.shape
    skip = out.shape[1] - count
    with device_of(pcm):
        launch(
            _place_sound, (triton.cdiv(count, 1024), rows), pcm, out, count, pcm.stride(0), out.stride(0), skip,
            LOUDEST=LOUDEST, BLOCK=1024, num_warps=4,
        )  # fmt: skip


def first_conv(x: Tensor, weight: Tensor, bias: Tensor, out: Tensor, kept: int) -> None:
    """x (B, context + S, 1) float32 -> out[:, kept:] (B, S, C), raw; weight (C, kernel)."""
    rows, length, channels = x.shape[0], out.shape[1] - kept, out.shape[2]
    with device_of(x):
        launch(
            _first_conv, (triton.cdiv(length, 64), rows),
            x, weight, bias, out, length, x.stride(0), out.stride(0), kept * channels,
            C=channels, KERNEL=weight.shape[1], BLOCK=64, num_warps=4,
        )  # fmt: skip


def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    *,
    precision: str,
    stride: int = 1,
    kept: int = 0,
    elu_in: bool = False,
    shortcut: Tensor | None = None,
    activation: str = "",
    tile: Tile | None = None,
) -> None:
    """x (B, context + T * stride, C) -> out[:, kept:] (B, T, N). A kernel of 1 is a plain product over (B, T, C).

    precision: see `mimi.Precision`, for float32 data; 16-bit data is multiplied as it is. bias is float32.
    elu_in: x is raw and its ELU is taken on the way. shortcut (B, T, N), its last two axes dense, is added before the
    activation: ``, `elu` or `gelu`.
    """
    rows, t, n = x.shape[0], out.shape[1] - kept, out.shape[2]
    count, k = rows * t, weight.shape[1]

    def kernel() -> None:
        cut = tile or choose_tile(count, n, k, x.dtype, precision, limits_of(x.device))
        with device_of(x):
            launch(
                _conv, (triton.cdiv(count, cut.m), n // cut.n),
                x, weight, weight if bias is None else bias, x if shortcut is None else shortcut, out,
                count, t, x.stride(0), stride * x.shape[2],
                0 if shortcut is None else shortcut.stride(0), out.stride(0), kept * n, n, k,
                ELU_IN=elu_in, ACTIVATION=activation, BIAS=bias is not None, SHORTCUT=shortcut is not None,
                BM=cut.m, BN=cut.n, BK=cut.k, PRECISION=precision,
                num_warps=cut.warps, num_stages=cut.stages,
            )  # fmt: skip

    def plain() -> None:
        windows = x.as_strided((rows, t, k), (x.stride(0), stride * x.shape[2], 1))
        y = F.linear(F.elu(windows) if elu_in else windows, weight).float()
        y = y if bias is None else y + bias
        y = y if shortcut is None else y + shortcut
        out[:, kept:] = saturated({"": lambda z: z, "elu": F.elu, "gelu": F.gelu}[activation](y), out.dtype)

    attempt("convolution", kernel, plain)


def residual(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    out: Tensor,
    *,
    precision: str,
    kept: int,
    tile: Tile | None = None,
) -> None:
    """A residual block and the ELU behind it: x (B, 2 + T, C) raw -> out[:, kept:] (B, T, C)."""
    rows, t, channels = x.shape[0], out.shape[1] - kept, out.shape[2]
    count, hidden = rows * t, weight1.shape[0]

    def apart() -> None:
        between = torch.empty(rows, t, hidden, dtype=x.dtype, device=x.device)
        conv(x, weight1, bias1, between, elu_in=True, activation="elu", precision=precision)
        conv(between, weight2, bias2, out, kept=kept, shortcut=x[:, 2:], activation="elu", precision=precision)

    if channels > 128 and tile is None:  # too wide to keep what lies between in registers
        apart()
        return

    def kernel() -> None:
        cut = tile or choose_residual_tile(count, channels, hidden, x.dtype, precision, limits_of(x.device))
        with device_of(x):
            launch(
                _residual, (triton.cdiv(count, cut.m),),
                x, weight1, bias1, weight2, bias2, out, count, t, x.stride(0), out.stride(0), kept * channels,
                C=channels, HIDDEN=hidden, BM=cut.m, BN=cut.n, BK=cut.k, PRECISION=precision,
                num_warps=cut.warps, num_stages=cut.stages,
            )  # fmt: skip

    attempt("residual block", kernel, apart)


def choose_tile(count: int, n: int, k: int, dtype: torch.dtype, precision: str, limits: Limits) -> Tile:
    """Small tiles where there is little work, so that every multiprocessor has some; large ones where there is much.

    Measured on an H200, then cut to what the device allows; a tile's depth is in float32 numbers, doubled for 16 bits.
    """
    work = count * n
    if precision == "ieee":
        tile = Tile(32, 32, 32, 4, 2)
    elif count <= 16 or work <= 1 << 15:
        tile = Tile(16, 16, 256, 4, 3)
    elif work <= 1 << 17:
        tile = Tile(16, 32, 128, 4, 4)
    elif work <= 1 << 18:
        tile = Tile(64, 32, 64, 4, 4)
    elif work < 1 << 21:
        tile = Tile(64, 64, 32, 4, 4)
    elif dtype is not torch.float32 and 2_048 <= count <= 4_096 and k <= 2_048:
        tile = Tile(64, 128, 32, 4, 3) if n < 2_048 else Tile(128, 128, 32, 8, 3)
    elif count <= 4_096:
        tile = Tile(64, 128, 32, 4, 4)
    elif n >= 256 and (dtype is torch.float32 or (n == 256 and k > 256)):
        tile = Tile(128, 256, 32, 8, 3)
    elif n >= 256:
        tile = Tile(128, 128, 32, 8, 3)
    elif work < 1 << 23:
        tile = Tile(128, 64, 32, 4, 4)
    else:
        tile = Tile(128, 128, 32, 8, 3)
    return _fitted(tile if dtype is torch.float32 else tile._replace(k=2 * tile.k), n, k, dtype.itemsize, limits)


def choose_residual_tile(count: int, channels: int, hidden: int, dtype: torch.dtype, precision: str, limits: Limits) -> Tile:
    """As `choose_tile`, for the two products of a residual block."""
    bk = 32 if dtype is torch.float32 else 64
    if precision == "ieee":
        tile = Tile(16, 32, 32, 4, 2)
    elif count <= 1_024:
        tile = Tile(16, 64, 2 * bk, 4, 3)
    elif count <= 4_096:
        tile = Tile(32, 64, bk, 4, 3)
    else:
        tile = Tile(64, 64, bk, 4, 3)
    return _fitted(tile, channels, channels, dtype.itemsize, limits, width=hidden)


def _fitted(tile: Tile, n: int, k: int, itemsize: int, limits: Limits, width: int = 0) -> Tile:
    """The tile, its sides halved until they divide n and k, and with fewer stages and columns where memory is short.

    width: weight rows of the product that is pipelined; 0: the tile's.
    """
    bn, bk = tile.n, tile.k
    while n % bn:
        bn //= 2
    while k % bk:
        bk //= 2
    while not (stages := limits.stages(tile.stages, (tile.m + (width or bn)) * bk * itemsize, tile.m)) and bk > 16:
        bk //= 2
    return tile._replace(n=bn, k=bk, stages=max(stages, 2))


class TailMap:
    """Where kept columns lie: side by side in a slot's row of the state, and in front of each buffer.

    All buffers of a map are cut from one tensor. Several maps may share a state; each has its own columns of it.
    """

    def __init__(self, shapes: list[tuple[int, int, int]], columns: list[int], width: int, device: torch.device) -> None:
        """shapes: (context, T, C) of each buffer; columns: where each one's context begins in a state row of `width`."""
        self.shapes = shapes
        self.width = width
        self.row = sum((context + t) * channels for context, t, channels in shapes)
        self._device = device
        self._columns = torch.cat([first + torch.arange(c * n) for first, (c, _, n) in zip(columns, shapes, strict=True)])
        self._columns = self._columns.to(device)
        self._places: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def make(self, rows: int, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
        """A tensor for the buffers of `rows` rows, and the buffers: views (rows, context + T, C)."""
        whole = torch.empty(rows * self.row, dtype=dtype, device=self._device)
        views, start = [], 0
        for context, t, channels in self.shapes:
            count = rows * (context + t) * channels
            views.append(whole[start : start + count].view(rows, context + t, channels))
            start += count
        return whole, views

    def load(self, whole: Tensor, tails: Tensor, slots: Tensor, frames: Tensor) -> None:
        """Put what is kept in front of the buffers: tails (slots, width), and zeros for rows whose frame is 0."""
        into, _, apart = self.places(slots.shape[0])
        self._swap(whole, tails, into, apart, slots, frames, save=False)

    def save(self, whole: Tensor, tails: Tensor, slots: Tensor) -> None:
        """Keep the last columns of each row's buffers in its slot."""
        _, out_of, apart = self.places(slots.shape[0])
        self._swap(whole, tails, out_of, apart, slots, slots, save=True)

    def places(self, rows: int) -> tuple[Tensor, Tensor, Tensor]:
        """int64 each: where a kept number is loaded to and saved from in row 0, and how far apart rows are. Made once."""
        if rows not in self._places:
            into, out_of, apart, start = [], [], [], 0
            for context, t, channels in self.shapes:
                numbers = torch.arange(context * channels, dtype=torch.int64)
                into.append(start + numbers)
                out_of.append(start + t * channels + numbers)
                apart.append(torch.full_like(numbers, (context + t) * channels))
                start += rows * (context + t) * channels
            first, second, third = (torch.cat(part).to(self._device) for part in (into, out_of, apart))
            self._places[rows] = (first, second, third)
        return self._places[rows]

    def _swap(
        self, whole: Tensor, tails: Tensor, at: Tensor, apart: Tensor, slots: Tensor, frames: Tensor, *, save: bool
    ) -> None:
        count, rows = at.shape[0], slots.shape[0]
        each = 1 if rows < 256 else 8  # where there are programs enough, one reads the map once for several rows
        with device_of(tails):
            launch(
                _swap_tails, (triton.cdiv(count, 1024), triton.cdiv(rows, each)),
                whole, tails, at, apart, self._columns, slots, frames, rows, count, self.width,
                BLOCK=1024, ROWS=each, SAVE=save, num_warps=4,
            )  # fmt: skip
