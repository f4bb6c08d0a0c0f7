"""A matrix product with a weight. The one place to put other weight formats. Knows nothing of models."""

from typing import Protocol

import torch.nn.functional as F
from torch import Tensor


class Linear(Protocol):
    """x (..., in) -> (..., out)."""

    def __call__(self, x: Tensor) -> Tensor: ...


class DenseLinear:
    """x Wᵀ with W (out, in) in x's dtype."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)
