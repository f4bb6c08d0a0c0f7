"""The language model's step in fused kernels. Knows nothing of sound, of graphs, or of who owns a slot."""

import torch
from torch import Tensor

from moshi_stt.models.spec import Condition, LMSpec
from moshi_stt.models.torch_impl.cuda.attention import ring_attention
from moshi_stt.models.torch_impl.cuda.elementwise import add_rms, angle_rates, angles, choose, embed
from moshi_stt.models.torch_impl.cuda.product import gated_product, product, sliced_product
from moshi_stt.models.torch_impl.lm import LMState, condition_vector
from moshi_stt.models.torch_impl.sampling import choose as sample


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
        logits = self._attend(state, x, frames, slots)
        out = torch.empty(x.shape[0], 2 + spec.extra_heads, dtype=torch.float32, device=x.device)
        choose(logits, slots, texts, out, spec.text_card, spec.extra_heads, spec.extra_head_dim)
        if self.temperature > 0:
            token, logprob = sample(logits[:, : spec.text_card].float(), frames, self.temperature, self.seed)
            texts[slots] = token
            out[:, 0], out[:, 1] = token, logprob
        return out

    def _attend(self, state: LMState, x: Tensor, frames: Tensor, slots: Tensor) -> Tensor:
        """All layers and the logits (B, text_card + heads * head_dim)."""
        spec, eps = self.spec, self.spec.norm_eps
        cos, sin = angles(frames, self.rates, 1)
        delta: Tensor | None = None
        for layer, ring in zip(self.layers, state.rings, strict=True):
            qkv = product(add_rms(x, delta, layer.norm1, eps), layer.in_proj).view(-1, 1, 3, spec.heads, spec.head_dim)
            attended = ring_attention(qkv, cos, sin, ring, slots, frames).view(-1, spec.dim)
            delta = sliced_product(attended, layer.out_proj)
            inner = gated_product(add_rms(x, delta, layer.norm2, eps), layer.linear_in)
            delta = sliced_product(inner, layer.linear_out)
        return product(add_rms(x, delta, self.out_norm, eps), self.head)
