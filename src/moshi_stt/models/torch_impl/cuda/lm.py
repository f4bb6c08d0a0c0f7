"""The language model's step in fused kernels. Knows nothing of sound, of graphs, or of who owns a slot."""

import torch
import torch.nn.functional as F
from torch import Tensor

from moshi_stt.models.spec import Condition, LMSpec
from moshi_stt.models.torch_impl.cuda.attention import ring_attention
from moshi_stt.models.torch_impl.cuda.elementwise import add_rms, angle_rates, angles, choose, embed, gate
from moshi_stt.models.torch_impl.cuda.gated import fits, gated_product
from moshi_stt.models.torch_impl.cuda.thin import thin
from moshi_stt.models.torch_impl.lm import LMState, condition_vector
from moshi_stt.models.torch_impl.sampling import choose as sample

THIN_ROWS = 2
"""Up to here one kernel with all around it beats the library's product; beyond, the library's is better (H200)."""


class FusedLayer:
    """The weights of one layer."""

    def __init__(self, params: dict[str, Tensor], index: int) -> None:
        at = f"transformer.layers.{index}."
        self.norm1 = params[at + "norm1.alpha"].flatten()
        self.in_proj = params[at + "self_attn.in_proj_weight"]
        self.out_proj = params[at + "self_attn.out_proj.weight"]
        self.norm2 = params[at + "norm2.alpha"].flatten()
        self.linear_in = params[at + "gating.linear_in.weight"]
        self.linear_out = params[at + "gating.linear_out.weight"]


class FusedLM:
    """Steps one position of any rows, as `LanguageModel.step` and `sampling.choose` do."""

    def __init__(
        self,
        spec: LMSpec,
        params: dict[str, Tensor],
        condition: Condition | None = None,
        *,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> None:
        """params: from `loader.allocate_lm`, filled."""
        self.spec = spec
        self.temperature = temperature
        self.seed = seed
        self.embeddings = params["embeddings"]  # (text_card + 1 + K * (audio_card + 1), dim)
        self.layers = [FusedLayer(params, i) for i in range(spec.layers)]
        self.out_norm = params["out_norm.alpha"].flatten()
        self.head = torch.cat([params["text_linear.weight"], params["extra_heads"]])  # (text_card + heads * head_dim, dim)
        self.condition = None if condition is None else condition_vector(condition, params)
        self.rates = angle_rates(spec.head_dim // 2, spec.max_period, self.head.device)

    def embed(self, frames: Tensor, slots: Tensor, texts: Tensor, codes: Tensor) -> Tensor:
        """The input (B, dim) of rows at `frames`, from their slots' last token and codes."""
        start, pad = self.spec.start_token, self.spec.pad_code
        return embed(slots, frames, texts, codes, self.embeddings, self.condition, start_token=start, pad_code=pad)

    def step(self, state: LMState, x: Tensor, frames: Tensor, slots: Tensor, texts: Tensor) -> Tensor:
        """From the input x (B, dim), which is overwritten: token, log-probability and pauses, float32 (B, 2 + heads).

        The token goes into its slot's `texts` (slots,) too.
        """
        spec = self.spec
        attend = self._attend_thin if x.shape[0] <= THIN_ROWS else self._attend
        logits = attend(state, x, frames, slots)
        out = torch.empty(x.shape[0], 2 + spec.extra_heads, dtype=torch.float32, device=x.device)
        choose(logits, slots, texts, out, spec.text_card, spec.extra_heads, spec.extra_head_dim)
        if self.temperature > 0:
            token, logprob = sample(logits[:, : spec.text_card].float(), frames, self.temperature, self.seed)
            texts[slots] = token
            out[:, 0], out[:, 1] = token, logprob
        return out

    def _attend(self, state: LMState, x: Tensor, frames: Tensor, slots: Tensor) -> Tensor:
        """All layers and the logits (B, text_card + heads * head_dim), through the library's products."""
        spec, eps = self.spec, self.spec.norm_eps
        cos, sin = angles(frames, self.rates, 1)
        delta: Tensor | None = None
        for layer, ring in zip(self.layers, state.rings, strict=True):
            qkv = F.linear(add_rms(x, delta, layer.norm1, eps), layer.in_proj).view(-1, 1, 3, spec.heads, spec.head_dim)
            delta = F.linear(ring_attention(qkv, cos, sin, ring, slots, frames).view(-1, spec.dim), layer.out_proj)
            normed = add_rms(x, delta, layer.norm2, eps)
            inner = gated_product(normed, layer.linear_in) if fits(normed) else gate(F.linear(normed, layer.linear_in))
            delta = F.linear(inner, layer.linear_out)
        return F.linear(add_rms(x, delta, self.out_norm, eps), self.head)

    def _attend_thin(self, state: LMState, x: Tensor, frames: Tensor, slots: Tensor) -> Tensor:
        """As `_attend`, for few rows."""
        spec, eps, rows = self.spec, self.spec.norm_eps, x.shape[0]
        cos, sin = angles(frames, self.rates, 1)
        for layer, ring in zip(self.layers, state.rings, strict=True):
            qkv = thin(x, layer.in_proj, x.new_empty(rows, 3 * spec.dim), norm=layer.norm1, eps=eps)
            qkv = qkv.view(rows, 1, 3, spec.heads, spec.head_dim)
            thin(ring_attention(qkv, cos, sin, ring, slots, frames).view(rows, -1), layer.out_proj, x, shortcut=x)
            hidden = x.new_empty(rows, layer.linear_out.shape[1])
            thin(thin(x, layer.linear_in, hidden, norm=layer.norm2, eps=eps, gate=True), layer.linear_out, x, shortcut=x)
        return thin(x, self.head, x.new_empty(rows, self.head.shape[0]), norm=self.out_norm, eps=eps)
