"""A stand-in for CUDA graphs where there are none."""

from collections.abc import Callable

import torch
from torch import Tensor

from moshi_stt.models.torch_impl.graphs import Replay


class NoGraphs:
    """A stand-in where there are no graphs: runs the function itself."""

    def capture(self, run: Callable[[], None], *, brief: bool) -> Replay:
        return Replay(run, lambda: None)

    def host(self, count: int) -> Tensor:
        return torch.empty(count, dtype=torch.uint8)

    def seconds(self) -> float | None:
        return None
