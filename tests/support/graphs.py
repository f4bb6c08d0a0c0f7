"""A stand-in for CUDA graphs where there are none."""

from collections.abc import Callable

import torch
from torch import Tensor


class NoGraphs:
    """A stand-in where there are no graphs: runs the function itself."""

    def capture(self, run: Callable[[], None], *, brief: bool) -> Callable[[], None]:
        return run

    def host(self, count: int) -> Tensor:
        return torch.empty(count, dtype=torch.uint8)

    def seconds(self) -> float | None:
        return None
