"""Mimi's encoder step in fused kernels. Knows nothing of the language model or of graphs.

The state is `MimiState` with one difference: what residual blocks keep is their raw input, not its ELU. So a slot's state
goes on only in the implementation that began it.
"""

from itertools import accumulate
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moshi_stt.models.spec import ConvSpec, MimiSpec
from moshi_stt.models.torch_impl.cuda import conv as kernels
from moshi_stt.models.torch_impl.cuda.attention import ring_attention
from moshi_stt.models.torch_impl.cuda.elementwise import angle_rates, angles, scaled_add_into, scaled_add_norm
from moshi_stt.models.torch_impl.cuda.quantiser import make_books, quantise
from moshi_stt.models.torch_impl.cuda.rounding import saturated
from moshi_stt.models.torch_impl.device import MimiDtype
from moshi_stt.models.torch_impl.mimi import MimiState
from moshi_stt.models.weights import codebook_stems

ConvWeight = tuple[Tensor, Tensor | None]
"""A weight (C_out, kernel * C_in) and its bias."""

LEAST_COLUMNS = 16
"""Of a product on the matrix units."""


class Precision(NamedTuple):
    """How each part multiplies: `ieee` float32; `tf32`, good to 2**-10; `tf32x3`, three products, float32 in effect.

    conv_dtype, linear_dtype: of what the convolutions and the transformer's products read; 16 bits are multiplied as they are.
    """

    conv: str
    linear: str
    quantiser: str
    conv_dtype: torch.dtype = torch.float32
    linear_dtype: torch.dtype = torch.float32


PRECISIONS: dict[MimiDtype, Precision] = {
    "f32": Precision("ieee", "ieee", "ieee"),
    "tf32": Precision("tf32", "tf32", "tf32x3"),
    "f16": Precision("tf32", "tf32", "tf32x3", torch.float16, torch.float16),
    "bf16": Precision("tf32", "tf32", "tf32x3", torch.bfloat16),
}
"""The transformer's TF32 changes no more codes than the convolutions' alone (docs/internals/gpu.md). float16 keeps the 10 bits
of fraction that TF32 keeps, in half the bytes. The quantiser decides between near vectors and stays float32.
"""


class FusedMimiLayer:
    """The weights of one layer of the transformer."""

    def __init__(self, params: dict[str, Tensor], index: int, dtype: torch.dtype) -> None:
        """dtype: of the products' weights."""
        at = f"encoder_transformer.transformer.layers.{index}."
        self.norm1 = (params[at + "norm1.weight"], params[at + "norm1.bias"])
        self.in_proj = saturated(params[at + "self_attn.in_proj_weight"], dtype)
        self.out_proj = saturated(params[at + "self_attn.out_proj.weight"], dtype)
        self.scale1 = params[at + "layer_scale_1.scale"]
        self.norm2 = (params[at + "norm2.weight"], params[at + "norm2.bias"])
        self.linear1 = saturated(params[at + "linear1.weight"], dtype)
        self.linear2 = saturated(params[at + "linear2.weight"], dtype)
        self.scale2 = params[at + "layer_scale_2.scale"]


class FusedMimi:
    """Steps one frame of any rows, as `MimiEncoder.step` does."""

    def __init__(self, spec: MimiSpec, params: dict[str, Tensor], precision: Precision, *, zero_start: bool = False) -> None:
        """params, zero_start: as `MimiEncoder`'s."""
        self.spec = spec
        self.precision = precision
        self.zero_start = zero_start
        self.weights = [_conv_weight(conv, params, precision, i, len(spec.convs)) for i, conv in enumerate(spec.convs)]
        for at in range(1, len(self.weights) - 2, 3):
            self.weights[at : at + 2] = _widened(*self.weights[at : at + 2])
        self.layers = [FusedMimiLayer(params, i, precision.linear_dtype) for i in range(spec.layers)]
        parts = (params[f"quantizer.{part}.input_proj.weight"] for part in ("rvq_first", "rvq_rest"))
        self.project = torch.cat(list(parts)).squeeze(-1).contiguous()  # (2 * codebook_dim, dim)
        vectors = [
            params[f"{stem}.embedding_sum"] / params[f"{stem}.cluster_usage"].clamp(min=1e-5)[:, None]
            for stem in codebook_stems(spec)
        ]
        self.books = make_books(torch.stack(vectors))
        device = self.books.vectors.device
        self.rates = angle_rates(spec.head_dim // 2, spec.max_period, device)
        self._groups, self._maps = _tail_maps(spec, device)

    def step(self, state: MimiState, pcm: Tensor, frames: Tensor, slots: Tensor, codes: Tensor) -> None:
        """Encode pcm float32 (B, 1920) of rows at `frames` (B,) int64; the codes go into their slots' rows of `codes`."""
        spec, convs, precision = self.spec, self.spec.convs, self.precision
        rows = pcm.shape[0]
        buffers: dict[int, Tensor] = {}
        wholes = []
        for group, tails, kind in zip(self._groups, self._maps, (torch.float32, precision.conv_dtype), strict=True):
            whole, views = tails.make(rows, kind)
            tails.load(whole, state.conv, slots, frames)
            wholes.append(whole)
            buffers |= dict(zip(group, views, strict=True))
        kernels.place_sound(pcm, buffers[0])
        x = self._convolve(buffers)
        self._transform(state, x, frames, slots, buffers[len(convs) - 1])
        latent = torch.empty(rows, 1, spec.dim, device=x.device)
        kernels.conv(
            buffers[len(convs) - 1], self.weights[-1][0], None, latent, stride=convs[-1].stride, precision=precision.linear
        )
        for whole, tails in zip(wholes, self._maps, strict=True):
            tails.save(whole, state.conv, slots)
        projected = torch.empty(rows, 1, self.project.shape[0], device=x.device)
        kernels.conv(latent, self.project, None, projected, precision=precision.linear)
        quantise(projected[:, 0], self.books, codes, slots, precision=precision.quantiser)

    def _convolve(self, buffers: dict[int, Tensor]) -> Tensor:
        """The convolution stack, from buffer to buffer: (B * T, dim) float32."""
        convs, precision = self.spec.convs, self.precision.conv
        weight, bias = self.weights[0]
        assert bias is not None
        kernels.first_conv(buffers[0], weight, bias, buffers[1], convs[1].context)
        at = 1
        for _ in self.spec.stages:
            (weight1, bias1), (weight2, bias2), (weight3, bias3) = self.weights[at : at + 3]
            assert bias1 is not None
            assert bias2 is not None
            kept = convs[at + 2].context
            kernels.residual(buffers[at], weight1, bias1, weight2, bias2, buffers[at + 2], kept=kept, precision=precision)
            following = buffers[at + 3]
            last = at + 3 == len(convs) - 2
            kernels.conv(
                buffers[at + 2],
                weight3,
                bias3,
                following,
                stride=convs[at + 2].stride,
                kept=convs[at + 3].context,
                activation="elu" if last else "",
                precision=precision,
            )
            at += 3
        x = buffers[at]
        weight, bias = self.weights[at]
        out = torch.empty(x.shape[0], x.shape[1] - convs[at].context, self.spec.dim, device=x.device)
        kernels.conv(x, weight, bias, out, precision=precision)
        return out.view(-1, self.spec.dim)

    def _transform(self, state: MimiState, x: Tensor, frames: Tensor, slots: Tensor, into: Tensor) -> None:
        """The transformer over x (B * T, dim), which is overwritten; the result goes into the downsampling's buffer."""
        spec, dtype = self.spec, self.precision.linear_dtype
        steps, rows = spec.positions_per_frame, frames.shape[0]
        cos, sin = angles(frames, self.rates, steps)
        positions = frames * steps
        delta: Tensor | None = None
        scale: Tensor | None = None
        for layer, ring in zip(self.layers, state.rings, strict=True):
            normed = scaled_add_norm(x, delta, scale, *layer.norm1, spec.norm_eps, dtype)
            qkv = self._linear(normed, layer.in_proj, dtype).view(rows, steps, 3, spec.heads, spec.head_dim)
            attended = ring_attention(qkv, cos, sin, ring, slots, positions)
            delta = self._linear(attended.view(-1, spec.dim), layer.out_proj)
            normed = scaled_add_norm(x, delta, layer.scale1, *layer.norm2, spec.norm_eps, dtype)
            delta = self._linear(self._linear(normed, layer.linear1, dtype, "gelu"), layer.linear2)
            scale = layer.scale2
        assert delta is not None
        assert scale is not None
        kept = into.shape[1] - steps
        scaled_add_into(x, delta, scale, into, frames, kept, replicate=not self.zero_start)

    def _linear(self, x: Tensor, weight: Tensor, dtype: torch.dtype = torch.float32, activation: str = "") -> Tensor:
        """x (N, in) times weight (out, in), in dtype."""
        out = torch.empty(x.shape[0], weight.shape[0], dtype=dtype, device=x.device)
        kernels.conv(x[:, None], weight, None, out[:, None], activation=activation, precision=self.precision.linear)
        return out


def _conv_weight(conv: ConvSpec, params: dict[str, Tensor], precision: Precision, index: int, count: int) -> ConvWeight:
    """A convolution's weight (C_out, kernel * C_in) and float32 bias; the first and the last of all stay float32."""
    kind = torch.float32 if index in (0, count - 1) else precision.conv_dtype
    bias = params.get(f"{conv.name}.conv.conv.bias")
    return saturated(kernels.conv_weight(params[f"{conv.name}.conv.conv.weight"]), kind), bias


def _widened(first: ConvWeight, second: ConvWeight) -> tuple[ConvWeight, ConvWeight]:
    """A residual block's convolutions with zeros between them, up to the least that the matrix units multiply."""
    (weight1, bias1), (weight2, bias2) = first, second
    assert bias1 is not None
    more = max(0, LEAST_COLUMNS - weight1.shape[0])
    wide = F.pad(weight1, (0, 0, 0, more)), F.pad(bias1, (0, more))
    return wide, (F.pad(weight2, (0, more)), bias2)


def _tail_maps(spec: MimiSpec, device: torch.device) -> tuple[list[list[int]], list[kernels.TailMap]]:
    """Which convolutions' buffers lie together, and their maps: float32 ones, then those of the convolutions' dtype."""
    sizes = [conv.context * conv.channels_in for conv in spec.convs]
    starts = [0, *accumulate(sizes)]
    shapes, steps = [], spec.frame_samples
    for conv in spec.convs:
        shapes.append((conv.context, steps, conv.channels_in))
        steps //= conv.stride
    last = len(sizes) - 1
    groups = [
        [last, 0],
        [i for i in range(1, last) if sizes[i]],
    ]  # the sound behind: its odd length leaves what follows unaligned
    maps = [kernels.TailMap([shapes[i] for i in group], [starts[i] for i in group], starts[-1], device) for group in groups]
    return groups, maps
