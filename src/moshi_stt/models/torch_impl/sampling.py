"""The choice of a text token from its logits. Knows nothing of models or streams.

The noise is a function of (seed, position in the stream, token), so that a stream's choices depend on itself alone.
"""

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF


def choose(logits: Tensor, positions: Tensor, temperature: float, seed: int) -> tuple[Tensor, Tensor]:
    """The token of each row and its natural-log probability.

    logits float32 (B, V); positions int64 (B,). temperature <= 0 takes the largest (the lowest id of equals); above, it samples
    from softmax(logits / temperature). Returns int64 (B,) and float32 (B,): the probability at temperature 1.
    """
    scores = logits
    if temperature > 0:
        scores = logits + temperature * gumbel(seed, positions, logits.shape[-1])
    token = scores.argmax(-1)
    logprob = logits.log_softmax(-1).gather(-1, token[:, None])[:, 0]
    return token, logprob


def gumbel(seed: int, positions: Tensor, count: int) -> Tensor:
    """Standard Gumbel noise, float32 (B, count), for int64 positions (B,)."""
    row = _hash(positions ^ (seed & _MASK))[:, None]  # (B, 1)
    bits = _hash(row + torch.arange(count, device=positions.device) * 0x9E3779B9)
    uniform = ((bits >> 9).to(torch.float32) + 0.5) * 2.0**-23  # strictly between 0 and 1
    return -torch.log(-torch.log(uniform))


def _hash(x: Tensor) -> Tensor:
    """Mix the low 32 bits of int64 values (a multiply-xorshift hash); the result is in 0 .. 2**32 - 1."""
    x = x & _MASK
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _MASK
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _MASK
    return x ^ (x >> 16)
