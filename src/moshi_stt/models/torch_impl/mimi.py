"""Mimi's streaming encoder: 80 ms of sound to its codes (contract section 5.1). Knows nothing of the language model.

Per-slot state, first axis the slot:
conv   (slots, 11 526) float32          the left contexts of all convolutions, one after the other
rings  8 x (slots, 8, 250, 64), K and V  the transformer's last 10 s, uninitialised where not yet written: float32 here, float16
                                        under `mimi_dtype = "f16"`, the default where our kernels run
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from moshi_stt.models.spec import MimiSpec
from moshi_stt.models.torch_impl.attention import Ring, RingAttention, make_ring, rotate_and_attend
from moshi_stt.models.torch_impl.conv import Conv, make_conv, stream_conv
from moshi_stt.models.torch_impl.linear import make_linear
from moshi_stt.models.torch_impl.quantizer import SplitQuantizer
from moshi_stt.models.torch_impl.rope import RotaryTable


class MimiState:
    """The encoder's state of every slot."""

    def __init__(self, spec: MimiSpec, slots: int, device: torch.device, ring_dtype: torch.dtype = torch.float32) -> None:
        """ring_dtype: of the transformer's keys and values."""
        floats = sum(conv.context * conv.channels_in for conv in spec.convs)
        self.conv = torch.zeros(slots, floats, device=device)
        self.rings = [make_ring(slots, spec.heads, spec.context, spec.head_dim, ring_dtype, device) for _ in range(spec.layers)]

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by name."""
        named = {"mimi.conv": self.conv}
        for i, ring in enumerate(self.rings):
            named |= ring.tensors(f"mimi.{i}")
        return named


class MimiLayer:
    """One layer of the encoder's transformer: pre-norm, with layer scales."""

    def __init__(self, spec: MimiSpec, params: dict[str, Tensor], index: int) -> None:
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
        self, x: Tensor, angles: tuple[Tensor, Tensor], ring: Ring, positions: Tensor, slots: Tensor, attention: RingAttention
    ) -> Tensor:
        """x (B, T, dim) -> (B, T, dim)."""
        spec = self.spec
        qkv = self.in_proj(F.layer_norm(x, (spec.dim,), *self.norm1, spec.norm_eps))
        qkv = qkv.view(*x.shape[:2], 3, spec.heads, spec.head_dim)  # (B, T, 3, H, D)
        attended = rotate_and_attend(qkv, angles, ring, positions, slots, attention)
        x = x + self.scale1 * self.out_proj(attended)
        hidden = F.gelu(self.linear1(F.layer_norm(x, (spec.dim,), *self.norm2, spec.norm_eps)))
        return x + self.scale2 * self.linear2(hidden)


def make_convs(spec: MimiSpec, params: dict[str, Tensor]) -> list[Conv]:
    """The convolutions in the order of the data, the downsampling last."""
    steps, convs = spec.frame_samples, []
    for conv in spec.convs:
        steps //= conv.stride
        stem = f"{conv.name}.conv.conv"
        convs.append(make_conv(conv, params[f"{stem}.weight"], params.get(f"{stem}.bias"), steps))
    return convs


class MimiEncoder:
    """Steps one frame of any rows of a `MimiState`."""

    def __init__(
        self, spec: MimiSpec, params: dict[str, Tensor], attention: RingAttention, *, zero_start: bool = False
    ) -> None:
        """params: every tensor of `weights.mimi_table`, by canonical name, float32, on the device.

        zero_start: begin the downsampling from zeros, as batched moshi-server does, instead of from a copy of the first
        latent; only for comparisons with it (contract F13).
        """
        self.spec = spec
        self.attention = attention
        self.zero_start = zero_start
        self.convs = make_convs(spec, params)
        self.layers = [MimiLayer(spec, params, i) for i in range(spec.layers)]
        self.quantizer = SplitQuantizer(spec, params)
        self.rotary = RotaryTable(spec.head_dim, spec.max_period, self.quantizer.codebooks.device)
        self._context_sizes = [conv.context * conv.channels_in for conv in spec.convs]

    def step(self, state: MimiState, pcm: Tensor, frames: Tensor, slots: Tensor) -> Tensor:
        """Codes int64 (B, K) of one frame of each row.

        pcm float32 (B, 1920); frames int64 (B,): frames that the row's stream has had before, 0 starts it anew; slots (B,).
        """
        first = (frames == 0)[:, None]  # (B, 1)
        kept = torch.where(first, 0, state.conv[slots])
        contexts = [
            context.view(len(kept), conv.context, conv.channels_in)
            for conv, context in zip(self.spec.convs, torch.split(kept, self._context_sizes, dim=-1), strict=True)
        ]
        latents, contexts[:-1] = self._convolve(pcm, contexts[:-1])
        latents = self._transform(state.rings, latents, frames * self.spec.positions_per_frame, slots)
        if not self.zero_start:
            contexts[-1] = torch.where(first[:, :, None], latents[:, :1], contexts[-1])
        latent, contexts[-1] = stream_conv(self.convs[-1], latents, contexts[-1])
        state.conv[slots] = torch.cat([context.flatten(1) for context in contexts], dim=-1)
        return self.quantizer.encode(latent[:, 0])

    def _convolve(self, pcm: Tensor, contexts: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """The convolution stack: (B, 1920) -> (B, 2, dim), and the next contexts."""
        left = iter(zip(self.convs, contexts, strict=False))
        kept: list[Tensor] = []

        def conv(x: Tensor) -> Tensor:
            layer, context = next(left)
            y, context = stream_conv(layer, x, context)
            kept.append(context)
            return y

        x = conv(pcm[:, :, None])  # (B, 1920, 64)
        for _ in self.spec.stages:  # what is not needed again is overwritten: memory costs as much as arithmetic here
            x = conv(F.elu_(conv(F.elu(x)))).add_(x)
            x = conv(F.elu_(x))
        return conv(F.elu_(x)), kept

    def _transform(self, rings: list[Ring], x: Tensor, positions: Tensor, slots: Tensor) -> Tensor:
        """The transformer at 25 Hz: x (B, T, dim) at positions (B,) .. + T - 1."""
        angles = self.rotary(positions[:, None] + torch.arange(x.shape[1], device=x.device))
        for layer, ring in zip(self.layers, rings, strict=True):
            x = layer(x, angles, ring, positions, slots, self.attention)
        return x
