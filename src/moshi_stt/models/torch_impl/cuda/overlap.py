"""How the kernels of one step share the GPU: streams and their priorities. No model is known here.

Attention waits for memory, products for the matrix units; next to each other they take less time than one after the other.
Which of two kernels gets a free multiprocessor first is the priority of the stream it was captured on, which CUDA graphs keep.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch

T = TypeVar("T")


class Overlap(NamedTuple):
    """What runs next to what.

    halves_from: from so many rows on, the language model steps two halves of its rows at once, so that one half's products
    run next to the other's attention, for a second reading of the weights; 0: never. product_priority: of those products;
    attention has 0, and lower numbers go first. mimi_priority: of Mimi's kernels, which run next to the language model's.
    """

    halves_from: int = 0
    product_priority: int = -1
    mimi_priority: int = 0


class Lane(NamedTuple):
    """The streams of one half of the rows."""

    products: torch.cuda.Stream
    attention: torch.cuda.Stream


class Streams:
    """The streams of a step on one device."""

    def __init__(self, device: torch.device, overlap: Overlap) -> None:
        self.overlap = overlap
        self.mimi = torch.cuda.Stream(device, overlap.mimi_priority)  # type: ignore[no-untyped-call]
        self.lanes = [
            Lane(
                torch.cuda.Stream(device, overlap.product_priority),  # type: ignore[no-untyped-call]
                torch.cuda.Stream(device, 0),  # type: ignore[no-untyped-call]
            )
            for _ in range(2 if overlap.halves_from else 0)
        ]

    def halves(self, rows: int) -> list[tuple[slice, Lane]]:
        """The two parts of a step's rows and their streams; none where the step stays whole."""
        if not 0 < self.overlap.halves_from <= rows:
            return []
        middle = (rows + 1) // 2
        return list(zip((slice(0, middle), slice(middle, rows)), self.lanes, strict=True))


def on_stream(stream: torch.cuda.Stream | None, run: Callable[[], T]) -> T:
    """Run on another stream, after what was launched on the current one and before what will be; None: on the current one.

    What `run` allocates belongs to the other stream: keep to one pair of streams, so that memory is used again in order.
    """
    if stream is None:
        return run()
    current = torch.cuda.current_stream(stream.device)
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        result = run()
    current.wait_stream(stream)
    return result
