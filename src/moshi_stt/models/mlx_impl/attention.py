"""Attention over a ring of keys and values in slots, row by row over views of the ring. Knows nothing of models.

A ring holds the last `context` positions of a slot; position p lies at index p % context. A call advances each row by
T positions (1 in the language model, 2 in Mimi): they are written before anything is attended to, so of a
full ring the first of a pair sees context - 1 positions and the second all of them (contract section 5.1).
Positions are known on the host, so only what the stream has written is ever read, and nothing is gathered or masked
but the later one of a pair. An assignment into a ring that nothing else refers to is done in place.
Axes: B row, T position, H head, D dim.
"""

from collections.abc import Sequence

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from moshi_stt.models.mlx_impl.rope import Angles, rotate

_FIRST_ENTRIES = 64
"""A ring begins with room for so many positions and doubles, so that memory goes with what streams have said."""


class Ring:
    """Keys and values of one layer: for each slot None or (2, H, up to `context`, D), keys before values."""

    def __init__(self, slots: int, heads: int, context: int, head_dim: int, dtype: mx.Dtype) -> None:
        self.entries: list[mx.array | None] = [None] * slots
        self.context = context
        self.dtype = dtype
        self.heads = heads
        self.head_dim = head_dim

    def slot_bytes(self) -> int:
        """Bytes of one full slot."""
        return 2 * self.heads * self.context * self.head_dim * self.dtype.size

    def write(self, slot: int, position: int, kv: mx.array) -> mx.array:
        """Write kv (2, H, T, D) from `position` on. Returns the slot's ring, of which `held(position + T)` entries count."""
        steps = kv.shape[2]
        ring = self._with_room(slot, self.held(position + steps))
        index = position % self.context
        if index + steps <= self.context:
            ring[:, :, index : index + steps] = kv
        else:
            for step in range(steps):
                at = (position + step) % self.context
                ring[:, :, at : at + 1] = kv[:, :, step : step + 1]
        return ring

    def held(self, positions: int) -> int:
        """Entries that a stream of so many positions can see."""
        return min(positions, self.context)

    def _with_room(self, slot: int, count: int) -> mx.array:
        """The slot's ring with room for `count` entries at least."""
        ring = self.entries[slot]
        room = 0 if ring is None else ring.shape[2]
        if ring is not None and room >= count:
            return ring
        size = min(max(_FIRST_ENTRIES, 2 * room, count), self.context)
        grown = mx.zeros((2, self.heads, size, self.head_dim), self.dtype)
        if ring is not None:
            grown[:, :, :room] = ring
        self.entries[slot] = grown
        return grown


def rotate_and_attend(
    qkv: mx.array,
    angles: Angles,
    ring: Ring,
    positions: Sequence[int],
    slots: Sequence[int],
    masks: Sequence[mx.array | None],
) -> mx.array:
    """Rotate queries and keys, write keys and values, attend.

    qkv (B, T, 3, H, D); angles (B, T, D/2); positions: of each row's first query; slots; masks: from `later_hidden`.
    There may be fewer positions than rows: the rows behind them are padding, and give zeros. Returns (B, T, H * D).
    """
    rows, steps, _, heads, dim = qkv.shape
    cos, sin = angles
    qk = rotate(qkv[:, :, :2], cos[:, :, None, None], sin[:, :, None, None])  # (B, T, 2, H, D)
    q = qk[:, :, 0].swapaxes(1, 2)  # (B, H, T, D)
    kv = mx.stack([qk[:, :, 1], qkv[:, :, 2]], axis=1).swapaxes(2, 3).astype(ring.dtype)  # (B, 2, H, T, D)
    attended = []
    for row, (slot, position, mask) in enumerate(zip(slots, positions, masks, strict=True)):
        held = ring.held(position + steps)
        seen = ring.write(slot, position, kv[row])[:, :, :held].astype(q.dtype)  # (2, H, held, D)
        attended.append(
            mx.fast.scaled_dot_product_attention(q[row : row + 1], seen[:1], seen[1:], scale=dim**-0.5, mask=mask)
        )  # (1, H, T, D)
    if rows > len(attended):
        attended.append(mx.zeros((rows - len(attended), heads, steps, dim), q.dtype))
    return mx.concatenate(attended).swapaxes(1, 2).reshape(rows, steps, -1)


def later_hidden(position: int, steps: int, context: int) -> mx.array | None:
    """bool (T, held): which entries each of a call's positions sees; those written behind it are hidden. None: all."""
    if steps == 1:
        return None
    mask: NDArray[np.bool_] = np.ones((steps, min(position + steps, context)), bool)
    for step in range(steps):
        for later in range(step + 1, steps):
            mask[step, (position + later) % context] = False
    return mx.array(mask)
