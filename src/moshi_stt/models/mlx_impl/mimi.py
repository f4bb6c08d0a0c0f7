"""Mimi's streaming encoder: 80 ms of sound to its codes (contract section 5.1). Knows nothing of the language model.

Per-slot state:
conv   (slots, 11 526) float32               the left contexts of all convolutions, one behind the other
rings  8 x slots x (2, 8, up to 250, 64)     the transformer's last 10 s
"""

from collections.abc import Sequence

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from moshi_stt.models.mlx_impl.attention import Ring, later_hidden, rotate_and_attend
from moshi_stt.models.mlx_impl.conv import Conv, make_conv, stream_conv
from moshi_stt.models.mlx_impl.fuse import fused
from moshi_stt.models.mlx_impl.linear import make_linear
from moshi_stt.models.mlx_impl.quantizer import SplitQuantizer
from moshi_stt.models.mlx_impl.rope import Angles, RotaryTable
from moshi_stt.models.spec import MimiSpec


class MimiState:
    """The encoder's state of every slot."""

    def __init__(self, spec: MimiSpec, slots: int) -> None:
        floats = sum(conv.context * conv.channels_in for conv in spec.convs)
        self.conv = mx.zeros((slots, floats))
        self.rings = [Ring(slots, spec.heads, spec.context, spec.head_dim, mx.float32) for _ in range(spec.layers)]


@fused
def elu(x: mx.array) -> mx.array:
    """ELU with alpha 1."""
    return mx.where(x > 0, x, mx.expm1(mx.minimum(x, 0)))


@fused
def gelu(x: mx.array) -> mx.array:
    """GELU in its exact form."""
    return x * (1 + mx.erf(x * 0.5**0.5)) * 0.5


class MimiLayer:
    """One layer of the encoder's transformer: pre-norm, with layer scales."""

    def __init__(self, spec: MimiSpec, params: dict[str, mx.array], index: int) -> None:
        at = f"encoder_transformer.transformer.layers.{index}."
        self.spec = spec
        self.norm1 = (params[at + "norm1.weight"], params[at + "norm1.bias"])
        self.in_proj = make_linear(params[at + "self_attn.in_proj_weight"])
        self.out_proj = make_linear(params[at + "self_attn.out_proj.weight"])
        self.scale1 = params[at + "layer_scale_1.scale"]
        self.norm2 = (params[at + "norm2.weight"], params[at + "norm2.bias"])
        self.linear1 = make_linear(params[at + "linear1.weight"])
        self.linear2 = make_linear(params[at + "linear2.weight"])
        self.scale2 = params[at + "layer_scale_2.scale"]

    def __call__(
        self,
        x: mx.array,
        angles: Angles,
        ring: Ring,
        positions: Sequence[int],
        slots: Sequence[int],
        masks: Sequence[mx.array | None],
    ) -> mx.array:
        """x (B, T, dim) -> (B, T, dim)."""
        spec = self.spec
        qkv = self.in_proj(mx.fast.layer_norm(x, *self.norm1, spec.norm_eps))
        qkv = qkv.reshape(*x.shape[:2], 3, spec.heads, spec.head_dim)  # (B, T, 3, H, D)
        attended = rotate_and_attend(qkv, angles, ring, positions, slots, masks)
        x = x + self.scale1 * self.out_proj(attended)
        hidden = gelu(self.linear1(mx.fast.layer_norm(x, *self.norm2, spec.norm_eps)))
        return x + self.scale2 * self.linear2(hidden)


def make_convs(spec: MimiSpec, params: dict[str, mx.array]) -> list[Conv]:
    """The convolutions in the order of the data, the downsampling last."""
    convs = []
    for conv in spec.convs:
        stem = f"{conv.name}.conv.conv"
        convs.append(make_conv(conv, params[f"{stem}.weight"], params.get(f"{stem}.bias")))
    return convs


class MimiEncoder:
    """Steps one frame of any rows of a `MimiState`."""

    def __init__(self, spec: MimiSpec, params: dict[str, mx.array], *, zero_start: bool = False) -> None:
        """params: every tensor of `weights.mimi_table`, by canonical name, float32.

        zero_start: begin the downsampling from zeros, as batched moshi-server does, instead of from a copy of the first
        latent; only for comparisons with it (contract F13).
        """
        self.spec = spec
        self.zero_start = zero_start
        self.convs = make_convs(spec, params)
        self.layers = [MimiLayer(spec, params, i) for i in range(spec.layers)]
        self.quantizer = SplitQuantizer(spec, params)
        self.rotary = RotaryTable(spec.head_dim, spec.max_period)
        self._context_ends = np.cumsum([conv.context * conv.channels_in for conv in spec.convs])[:-1].tolist()

    def step(self, state: MimiState, pcm: mx.array, frames: NDArray[np.int64], slots: Sequence[int], scratch: int) -> mx.array:
        """Codes uint32 (B, K) of one frame of each row.

        pcm float32 (B, 1920); frames (B,): frames that the row's stream has had before, 0 starts it anew; slots: of
        the rows that are no padding; scratch: the slot of those that are.
        """
        rows = mx.array(np.array([*slots, *[scratch] * (len(frames) - len(slots))], np.uint32))
        first = mx.array(frames == 0)[:, None]  # (B, 1)
        kept = mx.where(first, 0, state.conv[rows])
        contexts = [
            context.reshape(len(frames), conv.context, conv.channels_in)
            for conv, context in zip(self.spec.convs, mx.split(kept, self._context_ends, axis=-1), strict=True)
        ]
        latents, contexts[:-1] = self._convolve(pcm, contexts[:-1])
        latents = self._transform(state.rings, latents, frames * self.spec.positions_per_frame, slots)
        if not self.zero_start:
            contexts[-1] = mx.where(first[:, :, None], latents[:, :1], contexts[-1])
        latent, contexts[-1] = stream_conv(self.convs[-1], latents, contexts[-1])
        state.conv[rows] = mx.concatenate([context.reshape(len(frames), -1) for context in contexts], axis=-1)
        return self.quantizer.encode(latent[:, 0])

    def _convolve(self, pcm: mx.array, contexts: list[mx.array]) -> tuple[mx.array, list[mx.array]]:
        """The convolution stack: (B, 1920) -> (B, 2, dim), and the next contexts."""
        left = iter(zip(self.convs, contexts, strict=False))
        kept: list[mx.array] = []

        def conv(x: mx.array) -> mx.array:
            layer, context = next(left)
            y, context = stream_conv(layer, x, context)
            kept.append(context)
            return y

        x = conv(pcm[:, :, None])  # (B, 1920, 64)
        for _ in self.spec.stages:
            x = x + conv(elu(conv(elu(x))))
            x = conv(elu(x))
        return conv(elu(x)), kept

    def _transform(self, rings: list[Ring], x: mx.array, positions: NDArray[np.int64], slots: Sequence[int]) -> mx.array:
        """The transformer at 25 Hz: x (B, T, dim) at positions (B,) .. + T - 1."""
        steps = x.shape[1]
        angles = self.rotary(positions[:, None] + np.arange(steps))
        own_positions = positions[: len(slots)].tolist()
        masks = [later_hidden(position, steps, self.spec.context) for position in own_positions]
        for layer, ring in zip(self.layers, rings, strict=True):
            x = layer(x, angles, ring, own_positions, slots, masks)
        return x
