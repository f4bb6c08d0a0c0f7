"""Ring attention against attention over all keys with a mask, for both of its implementations."""

import numpy as np
import pytest
import torch

from moshi_stt.models.torch_impl.attention import RingAttention, make_ring, ring_attention, ring_attention_rows

HEADS, DIM, CONTEXT = 2, 8, 10


def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, steps: int) -> torch.Tensor:
    """One stream, (P, H, D) of all positions, in float64. A call's positions are written together before any attends."""
    t = torch.arange(len(q))
    newest = t // steps * steps + steps - 1
    seen = (t[None] <= t[:, None]) & (t[None] > newest[:, None] - CONTEXT)
    scores = torch.einsum("thd,shd->hts", q.double(), k.double()) * DIM**-0.5
    return torch.einsum("hts,shd->thd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v.double())


@pytest.mark.parametrize("attention", [ring_attention, ring_attention_rows])
@pytest.mark.parametrize("steps", [1, 2])
def test_ring_attention(attention: RingAttention, steps: int) -> None:
    """Three streams at different positions, past the ring, with slots out of order and NaN where nothing was written."""
    calls, rng = 18, torch.Generator().manual_seed(steps)
    q, k, v = torch.randn(3, 3, calls * steps, HEADS, DIM, generator=rng)  # (rows, P, H, D) each
    ring = make_ring(5, HEADS, CONTEXT, DIM, torch.float32, torch.device("cpu"))
    for tensor in (ring.k, ring.v):
        tensor.fill_(torch.nan)
    slots, starts = torch.tensor([3, 0, 2]), [0, 2, 5]  # rows join at different calls
    got = torch.zeros(3, calls * steps, HEADS, DIM)
    done = [0, 0, 0]
    for call in range(calls + 5):
        rows = [row for row in range(3) if starts[row] <= call and done[row] < calls]
        here = [slice(done[row] * steps, (done[row] + 1) * steps) for row in rows]

        def pick(x: torch.Tensor, rows: list[int] = rows, here: list[slice] = here) -> torch.Tensor:
            return torch.stack([x[row, part] for row, part in zip(rows, here, strict=True)])

        positions = torch.tensor([done[row] * steps for row in rows])
        out = attention(pick(q), pick(k), pick(v), ring, positions, slots[rows])
        for row, part, values in zip(rows, here, out, strict=True):
            got[row, part] = values
            done[row] += 1
    for row in range(3):
        np.testing.assert_allclose(got[row], plain(q[row], k[row], v[row], steps), atol=1e-5)
    assert ring.k[[1, 4]].isnan().all(), "a slot that took no part was written to"
