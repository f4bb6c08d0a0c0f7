"""The models of contract section 5 once more, over a whole recording at a time, in float64: no state, no slots, no rings.

Written from the text alone and as plainly as can be, to hold streaming implementations to.
Axes: T position, K codebook, H head, D dim.
"""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from moshi_stt.models.spec import ConvSpec, LMSpec, MimiSpec

Params = Mapping[str, Tensor]


def rotate(x: Tensor, max_period: float, first: int = 0) -> Tensor:
    """x (T, H, D) at positions first, first + 1, …"""
    dim = x.shape[-1]
    theta = max_period ** (-2 * torch.arange(dim // 2, dtype=torch.float64) / dim)
    angle = ((first + torch.arange(len(x), dtype=torch.float64))[:, None] * theta)[:, None]  # (T, 1, D/2)
    pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2).contiguous())
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)).flatten(-2)


def attend(qkv: Tensor, heads: int, max_period: float, seen: Tensor) -> Tensor:
    """qkv (T, 3 D); seen bool (T, T): which positions each one sees. Returns (T, D)."""
    q, k, v = qkv.view(len(qkv), 3, heads, -1).unbind(1)
    q, k = rotate(q, max_period), rotate(k, max_period)
    scores = torch.einsum("thd,shd->hts", q, k) / math.sqrt(q.shape[-1])
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    return torch.einsum("hts,shd->thd", weights, v).flatten(1)


def mimi_latents(params: Params, spec: MimiSpec, pcm: Tensor) -> Tensor:
    """Latents (frames, dim) of pcm (S,), S whole frames."""

    def conv(x: Tensor, conv: ConvSpec, mode: str = "constant") -> Tensor:
        stem = f"{conv.name}.conv.conv"
        padded = F.pad(x[None], (conv.context, 0), mode=mode)
        return F.conv1d(padded, params[f"{stem}.weight"], params.get(f"{stem}.bias"), conv.stride)[0]

    x = conv(pcm[None], spec.first_conv)
    for wide, narrow, down in spec.stages:
        x = x + conv(F.elu(conv(F.elu(x), wide)), narrow)
        x = conv(F.elu(x), down)
    x = conv(F.elu(x), spec.last_conv).T  # (T, dim)
    per_frame = spec.positions_per_frame
    t = torch.arange(len(x))
    newest = t // per_frame * per_frame + per_frame - 1  # a frame's positions are written before any of them attends
    seen = (t[None] <= t[:, None]) & (t[None] > newest[:, None] - spec.context)
    for i in range(spec.layers):
        at = f"encoder_transformer.transformer.layers.{i}."
        norm = F.layer_norm(x, (spec.dim,), params[at + "norm1.weight"], params[at + "norm1.bias"], 1e-5)
        mixed = attend(norm @ params[at + "self_attn.in_proj_weight"].T, spec.heads, spec.max_period, seen)
        x = x + params[at + "layer_scale_1.scale"] * (mixed @ params[at + "self_attn.out_proj.weight"].T)
        norm = F.layer_norm(x, (spec.dim,), params[at + "norm2.weight"], params[at + "norm2.bias"], 1e-5)
        hidden = F.gelu(norm @ params[at + "linear1.weight"].T)
        x = x + params[at + "layer_scale_2.scale"] * (hidden @ params[at + "linear2.weight"].T)
    return conv(x.T, spec.downsample, "replicate").T


def quantize(params: Params, spec: MimiSpec, latents: Tensor) -> tuple[Tensor, Tensor]:
    """Codes int64 (frames, K), and for each the distance by which it won (frames, K)."""

    def nearest(x: Tensor, stem: str) -> tuple[Tensor, Tensor, Tensor]:
        usage = params[f"{stem}.cluster_usage"].clamp(min=1e-5)
        book = params[f"{stem}.embedding_sum"] / usage[:, None]
        two = torch.cdist(x, book, compute_mode="donot_use_mm_for_euclid_dist").topk(2, largest=False)
        code = two.indices[:, 0]
        return code, two.values[:, 1] - two.values[:, 0], x - book[code]

    def project(part: str) -> Tensor:
        return latents @ params[f"quantizer.{part}.input_proj.weight"][:, :, 0].T

    code, margin, _ = nearest(project("rvq_first"), "quantizer.rvq_first.vq.layers.0._codebook")
    codes, margins, residual = [code], [margin], project("rvq_rest")
    for i in range(spec.codebooks - 1):
        code, margin, residual = nearest(residual, f"quantizer.rvq_rest.vq.layers.{i}._codebook")
        codes.append(code)
        margins.append(margin)
    return torch.stack(codes, 1), torch.stack(margins, 1)


def lm_outputs(params: Params, spec: LMSpec, codes: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (T, V) and pauses (T, heads) of T steps whose produced tokens are given (contract section 5.5).

    codes int64 (T, K): step n sees those of frame n - 1. tokens int64 (T,): step n sees the one produced at n - 1.
    """
    text = torch.cat([torch.tensor([spec.start_token]), tokens[:-1]])
    audio = torch.cat([torch.full((1, spec.codebooks), spec.pad_code), codes[:-1]])
    x = params["text_emb.weight"][text]
    for i in range(spec.codebooks):
        x = x + params[f"emb.{i}.weight"][audio[:, i]]

    def rms(x: Tensor, name: str) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-8) * params[name].flatten()

    t = torch.arange(len(x))
    seen = (t[None] <= t[:, None]) & (t[None] > t[:, None] - spec.context)
    for i in range(spec.layers):
        at = f"transformer.layers.{i}."
        qkv = rms(x, at + "norm1.alpha") @ params[at + "self_attn.in_proj_weight"].T
        x = x + attend(qkv, spec.heads, spec.max_period, seen) @ params[at + "self_attn.out_proj.weight"].T
        gate, up = (rms(x, at + "norm2.alpha") @ params[at + "gating.linear_in.weight"].T).chunk(2, -1)
        x = x + (F.silu(gate) * up) @ params[at + "gating.linear_out.weight"].T
    x = rms(x, "out_norm.alpha")
    heads = [(x @ params[f"extra_heads.{i}.weight"].T).softmax(-1)[:, 0] for i in range(spec.extra_heads)]
    pause = torch.stack(heads, 1) if heads else x.new_zeros(len(x), 0)
    return x @ params["text_linear.weight"].T, pause
