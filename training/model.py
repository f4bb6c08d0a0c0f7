"""The small model as it is trained: whole sequences at once, every weight under the name it has in the published files.

The same arithmetic as the server's streaming code (contract section 5), over (B, T) instead of one frame. Two differences,
both gone once the model is quantized: the language model sees the encoder's projected latent instead of its codes, with some
noise on it; and the text that it sees is dropped here and there, so that it listens.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FRAME_SAMPLES = 1_920


@dataclass(frozen=True)
class Shape:
    """Sizes. What is not here is as Mimi and the language model have it."""

    channels: tuple[int, ...] = (16, 32, 64, 128, 256)
    width: int = 128
    """Of the encoder's transformer; a divisor of Mimi's 512, with heads of 64 as there."""
    encoder_layers: int = 3
    feedforward: int = 512
    encoder_context: int = 250
    codebooks: int = 8
    codebook_size: int = 256
    codebook_dim: int = 64
    dim: int = 256
    heads: int = 4
    layers: int = 4
    hidden: int = 704
    context: int = 125
    text_card: int = 512
    pause_heads: int = 4
    delay_frames: int = 6

    @property
    def encoder_heads(self) -> int:
        return self.width // 64

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


STRIDES = (4, 5, 6, 8)


class Output(NamedTuple):
    """logits (B, T, text_card); pause (B, T, heads, 6); word, mel: what the auxiliary losses see, (B, T, ...).

    commitment: how far the latents are from what they are quantized to, in their own variance; 0 where they are not.
    """

    logits: Tensor
    pause: Tensor
    word: Tensor
    mel: Tensor
    commitment: Tensor


class SmallModel(nn.Module):
    """Encoder and language model."""

    def __init__(self, shape: Shape, word_classes: int, mel_bands: int = 160) -> None:
        super().__init__()
        self.shape = shape
        self._names: dict[str, str] = {}
        for name, size, scale in self._table():
            value = torch.ones(size) if scale is None else torch.randn(size) * scale
            self._add(name, value)
        self.word_head = nn.Linear(shape.width, word_classes)
        self.mel_head = nn.Linear(shape.width, mel_bands)

    def _add(self, name: str, value: Tensor) -> None:
        self._names[name] = name.replace(".", "/")
        self.register_parameter(self._names[name], nn.Parameter(value))

    def __getitem__(self, name: str) -> Tensor:
        return self._parameters[self._names[name]]  # type: ignore[return-value]

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every weight under its published name."""
        for name in self._names:
            yield name, self[name]

    def _table(self) -> Iterator[tuple[str, tuple[int, ...], float | None]]:
        """(name, shape, standard deviation at the start; None: ones)."""
        s = self.shape
        for name, out, inside, kernel in convs(s):
            yield f"{name}.conv.conv.weight", (out, inside, kernel), (1.6 / (inside * kernel)) ** 0.5
            if name != "downsample.conv":
                yield f"{name}.conv.conv.bias", (out,), 0.0
        w, ff = s.width, s.feedforward
        for i in range(s.encoder_layers):
            at = f"encoder_transformer.transformer.layers.{i}."
            for norm in ("norm1", "norm2"):
                yield f"{at}{norm}.weight", (w,), None
                yield f"{at}{norm}.bias", (w,), 0.0
            yield f"{at}self_attn.in_proj_weight", (3 * w, w), w**-0.5
            yield f"{at}self_attn.out_proj.weight", (w, w), w**-0.5
            yield f"{at}linear1.weight", (ff, w), w**-0.5
            yield f"{at}linear2.weight", (w, ff), ff**-0.5
            yield f"{at}layer_scale_1.scale", (w,), None
            yield f"{at}layer_scale_2.scale", (w,), None
        yield "quantizer.rvq_rest.input_proj.weight", (s.codebook_dim, w, 1), w**-0.5
        d, h = s.dim, s.hidden
        yield "latent_in", (d, s.codebook_dim), s.codebook_dim**-0.5
        yield "no_latent", (d,), 0.5
        yield "text_emb.weight", (s.text_card + 1, d), 0.5
        for i in range(s.layers):
            at = f"transformer.layers.{i}."
            yield f"{at}norm1.alpha", (1, 1, d), None
            yield f"{at}norm2.alpha", (1, 1, d), None
            yield f"{at}self_attn.in_proj_weight", (3 * d, d), d**-0.5
            yield f"{at}self_attn.out_proj.weight", (d, d), (2 * s.layers * d) ** -0.5
            yield f"{at}gating.linear_in.weight", (2 * h, d), d**-0.5
            yield f"{at}gating.linear_out.weight", (d, h), (2 * s.layers * h) ** -0.5
        yield "out_norm.alpha", (1, 1, d), None
        yield "text_linear.weight", (s.text_card, d), d**-0.5
        for i in range(s.pause_heads):
            yield f"extra_heads.{i}.weight", (6, d), d**-0.5

    # ---- encoder -----------------------------------------------------------------------------------------------------------

    def latents(self, pcm: Tensor) -> Tensor:
        """pcm (B, T * 1920) -> (B, T, width) at 12.5 Hz, before the quantizer."""
        x = self._conv("encoder.model.0", pcm[:, None], 1)
        for i, stride in enumerate(STRIDES):
            at = f"encoder.model.{3 * i + 1}.block"
            x = x + self._conv(f"{at}.3", F.elu(self._conv(f"{at}.1", F.elu(x), 1)), 1)
            x = self._conv(f"encoder.model.{3 * i + 3}", F.elu(x), stride)
        x = self._conv(f"encoder.model.{3 * len(STRIDES) + 2}", F.elu(x), 1).transpose(1, 2)  # (B, 2T, width)
        mask = window_mask(x.shape[1], self.shape.encoder_context, x.device)
        turn = rotary(x.shape[1], 64, 10_000.0, x.device)
        for i in range(self.shape.encoder_layers):
            x = self._encoder_layer(x, i, mask, turn)
        x = x.transpose(1, 2)
        x = torch.cat([x[:, :, :1], x[:, :, :1], x], dim=-1)  # the downsampling begins with copies of the first column
        return F.conv1d(x, self["downsample.conv.conv.conv.weight"].to(x.dtype), stride=2).transpose(1, 2)

    def _conv(self, name: str, x: Tensor, stride: int) -> Tensor:
        weight, bias = self[f"{name}.conv.conv.weight"], self[f"{name}.conv.conv.bias"]
        return F.conv1d(F.pad(x, (weight.shape[-1] - stride, 0)), weight, bias, stride=stride)

    def _encoder_layer(self, x: Tensor, index: int, mask: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
        at = f"encoder_transformer.transformer.layers.{index}."
        w = self.shape.width
        y = F.layer_norm(x, (w,), self[at + "norm1.weight"], self[at + "norm1.bias"], 1e-5)
        y = attend(
            y,
            self[at + "self_attn.in_proj_weight"],
            self[at + "self_attn.out_proj.weight"],
            self.shape.encoder_heads,
            mask,
            turn,
        )
        x = x + self[at + "layer_scale_1.scale"] * y
        y = F.layer_norm(x, (w,), self[at + "norm2.weight"], self[at + "norm2.bias"], 1e-5)
        y = F.linear(F.gelu(F.linear(y, self[at + "linear1.weight"])), self[at + "linear2.weight"])
        return x + self[at + "layer_scale_2.scale"] * y

    def project(self, latents: Tensor) -> Tensor:
        """What the quantizer quantizes: (B, T, codebook_dim)."""
        return F.linear(latents, self["quantizer.rvq_rest.input_proj.weight"][:, :, 0])

    # ---- language model ----------------------------------------------------------------------------------------------------

    def language(self, inputs: Tensor, text: Tensor, keep_text: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """inputs (B, T, dim): the sound at each position, already one frame late.

        text (B, T): the token before. -> (logits, pause)
        """
        s = self.shape
        spoken = F.embedding(text, self["text_emb.weight"])
        if keep_text is not None:
            spoken = spoken * keep_text[..., None]
        x = inputs + spoken
        mask = window_mask(x.shape[1], s.context, x.device)
        turn = rotary(x.shape[1], s.dim // s.heads, 100_000.0, x.device)
        for i in range(s.layers):
            at = f"transformer.layers.{i}."
            y = rms(x, self[at + "norm1.alpha"])
            x = x + attend(
                y, self[at + "self_attn.in_proj_weight"], self[at + "self_attn.out_proj.weight"], s.heads, mask, turn
            )
            gate, up = F.linear(rms(x, self[at + "norm2.alpha"]), self[at + "gating.linear_in.weight"]).chunk(2, -1)
            x = x + F.linear(F.silu(gate) * up, self[at + "gating.linear_out.weight"])
        x = rms(x, self["out_norm.alpha"])
        pause = torch.stack([F.linear(x, self[f"extra_heads.{i}.weight"]) for i in range(s.pause_heads)], -2)
        return F.linear(x, self["text_linear.weight"]), pause

    def shifted(self, inputs: Tensor) -> Tensor:
        """One frame late, as the language model sees them: (B, T, dim) -> (B, T, dim)."""
        first = self["no_latent"].to(inputs.dtype).expand(len(inputs), 1, -1)
        return torch.cat([first, inputs[:, :-1]], 1)

    def forward(
        self,
        pcm: Tensor,
        text: Tensor,
        text_dropout: float = 0.0,
        noise: float = 0.0,
        quantize: Callable[[Tensor], Tensor] | None = None,
    ) -> Output:
        """text (B, T): the true tokens, of which each position sees the one before.

        quantize: what the language model is to see instead of the projected latents (B, T, codebook_dim); gradients pass by it.
        """
        latents = self.latents(pcm)
        projected = self.project(latents)
        commitment = projected.new_zeros(())
        if quantize is not None:
            exact = projected.float()
            rounded = quantize(exact.detach())
            commitment = (exact - rounded).square().mean() / exact.detach().var()
            projected = exact + (rounded - exact).detach()
        elif noise:
            projected = projected + noise * projected.detach().std() * torch.randn_like(projected)
        inputs = self.shifted(F.linear(projected, self["latent_in"]))
        start = torch.full_like(text[:, :1], self.shape.text_card)
        keep = (torch.rand(text.shape, device=text.device) >= text_dropout).to(inputs.dtype) if text_dropout else None
        logits, pause = self.language(inputs, torch.cat([start, text[:, :-1]], 1), keep)
        return Output(logits, pause, self.word_head(latents), self.mel_head(latents), commitment)


def convs(s: Shape) -> Iterator[tuple[str, int, int, int]]:
    """(name, channels out, channels in, kernel) of each convolution."""
    yield "encoder.model.0", s.channels[0], 1, 7
    for i, stride in enumerate(STRIDES):
        here, there = s.channels[i], s.channels[i + 1]
        yield f"encoder.model.{3 * i + 1}.block.1", here // 2, here, 3
        yield f"encoder.model.{3 * i + 1}.block.3", here, here // 2, 1
        yield f"encoder.model.{3 * i + 3}", there, here, 2 * stride
    yield f"encoder.model.{3 * len(STRIDES) + 2}", s.width, s.channels[-1], 3
    yield "downsample.conv", s.width, s.width, 4


def rms(x: Tensor, alpha: Tensor) -> Tensor:
    return F.rms_norm(x.float(), alpha.shape[-1:], alpha.flatten().float(), 1e-8).to(x.dtype)


def window_mask(length: int, context: int, device: torch.device) -> Tensor:
    """bool (T, T): each position sees itself and the `context` - 1 before it."""
    at = torch.arange(length, device=device)
    apart = at[:, None] - at
    return (apart >= 0) & (apart < context)


def rotary(length: int, head_dim: int, period: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosine and sine, (T, 1, head_dim / 2)."""
    thetas = torch.exp(torch.arange(head_dim // 2, device=device) * (-2 * math.log(period) / head_dim))
    angles = torch.arange(length, device=device)[:, None, None] * thetas
    return angles.cos(), angles.sin()


def turned(x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    """Interleaved pairs rotated, contract section 5.3. x (B, T, H, D)."""
    cos, sin = turn
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2).to(x.dtype)


def attend(x: Tensor, in_proj: Tensor, out_proj: Tensor, heads: int, mask: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    """Causal attention over a window: x (B, T, D) -> (B, T, D)."""
    q, k, v = F.linear(x, in_proj).unflatten(-1, (3, heads, -1)).unbind(2)  # (B, T, H, D)
    q, k = turned(q, turn), turned(k, turn)
    y = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask)
    return F.linear(y.transpose(1, 2).flatten(2), out_proj)
