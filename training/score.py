"""Greedy decoding of whole sequences, and word errors."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from training.model import SmallModel, rms, rotary, turned


@torch.no_grad()
def greedy(model: SmallModel, inputs: Tensor) -> Tensor:
    """inputs (B, T, dim), one frame late: the tokens (B, T) as the server would choose them, one position at a time."""
    s = model.shape
    rows, frames = inputs.shape[:2]
    cos, sin = rotary(frames, s.dim // s.heads, 100_000.0, inputs.device)
    caches = [inputs.new_empty(2, rows, frames, s.heads, s.dim // s.heads) for _ in range(s.layers)]
    token = torch.full((rows,), s.text_card, device=inputs.device)
    tokens = []
    for t in range(frames):
        x = inputs[:, t] + F.embedding(token, model["text_emb.weight"]).to(inputs.dtype)
        window = slice(max(0, t + 1 - s.context), t + 1)
        for i, cache in enumerate(caches):
            at = f"transformer.layers.{i}."
            qkv = F.linear(rms(x, model[at + "norm1.alpha"]), model[at + "self_attn.in_proj_weight"])
            q, k, v = qkv.view(rows, 1, 3, s.heads, -1).unbind(2)
            turn = cos[t : t + 1], sin[t : t + 1]
            cache[0, :, t], cache[1, :, t] = turned(k, turn)[:, 0], v[:, 0]
            keys, values = cache[:, :, window].transpose(2, 3)
            y = F.scaled_dot_product_attention(turned(q, turn).transpose(1, 2), keys, values)
            x = x + F.linear(y.transpose(1, 2).reshape(rows, -1), model[at + "self_attn.out_proj.weight"])
            gate, up = F.linear(rms(x, model[at + "norm2.alpha"]), model[at + "gating.linear_in.weight"]).chunk(2, -1)
            x = x + F.linear(F.silu(gate) * up, model[at + "gating.linear_out.weight"])
        token = F.linear(rms(x, model["out_norm.alpha"]), model["text_linear.weight"]).argmax(-1)
        tokens.append(token)
    return torch.stack(tokens, 1)


def word_ids(tokens: Sequence[int]) -> list[tuple[int, ...]]:
    """The pieces of each word: what stands between boundaries (0) and padding (3)."""
    found: list[tuple[int, ...]] = []
    here: list[int] = []
    for token in [*tokens, 3]:
        if token not in (0, 3):
            here.append(token)
        elif here:
            found.append(tuple(here))
            here = []
    return found


def pairs(said: Sequence[str], heard: Sequence[str]) -> list[tuple[int, int]]:
    """(i, j): the heard word j stands for the said word i, in the alignment of the fewest edits."""
    costs = [list(range(len(heard) + 1))]
    for i, word in enumerate(said, 1):
        row = [i]
        for j, other in enumerate(heard, 1):
            row.append(min(costs[-1][j] + 1, row[-1] + 1, costs[-1][j - 1] + (word != other)))
        costs.append(row)
    found, i, j = [], len(said), len(heard)
    while i and j:
        if costs[i][j] == costs[i - 1][j - 1] + (said[i - 1] != heard[j - 1]):
            i, j = i - 1, j - 1
            found.append((i, j))
        elif costs[i][j] == costs[i - 1][j] + 1:
            i -= 1
        else:
            j -= 1
    return found[::-1]
