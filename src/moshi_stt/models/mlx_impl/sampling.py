"""The choice of a text token from its logits. Knows nothing of models or streams.

The noise is a function of (seed, position in the stream, token), the same as in `torch_impl`, so that a stream's choices depend
on itself alone.
"""

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

_MASK = 0xFFFFFFFF


def choose(logits: mx.array, positions: Sequence[int], temperature: float, seed: int) -> tuple[mx.array, mx.array]:
    """The token of each row and its natural-log probability.

    logits float32 (B, V); positions (B,). temperature <= 0 takes the largest (the lowest id of equals); above, it samples
    from softmax(logits / temperature). Returns uint32 (B,) and float32 (B,): the probability at temperature 1.
    """
    scores = logits
    if temperature > 0:
        scores = logits + temperature * gumbel(seed, positions, logits.shape[-1])
    token = mx.argmax(scores, axis=-1)
    chosen = mx.take_along_axis(logits, token[:, None], axis=-1)[:, 0]
    return token, chosen - mx.logsumexp(logits, axis=-1)


def gumbel(seed: int, positions: Sequence[int], count: int) -> mx.array:
    """Standard Gumbel noise, float32 (B, count)."""
    keys = mx.array(np.array([(position ^ seed) & _MASK for position in positions], np.uint32))
    ids = mx.arange(count, dtype=mx.uint32) * mx.array(0x9E3779B9, mx.uint32)
    bits = _hash(_hash(keys)[:, None] + ids)
    uniform = ((bits >> 9).astype(mx.float32) + 0.5) * 2.0**-23  # strictly between 0 and 1
    return -mx.log(-mx.log(uniform))


def _hash(x: mx.array) -> mx.array:
    """Mix uint32 values (a multiply-xorshift hash, modulo 2**32)."""
    x = (x ^ (x >> 16)) * mx.array(0x7FEB352D, mx.uint32)
    x = (x ^ (x >> 15)) * mx.array(0x846CA68B, mx.uint32)
    return x ^ (x >> 16)
