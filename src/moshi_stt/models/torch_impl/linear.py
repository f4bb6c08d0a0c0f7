"""Matrix products with a weight that never changes. The one place to put other weight formats. Knows nothing of models.

On a CPU the weight is repacked once, by oneDNN, into the blocks that its kernels read. Beside speed (one row streams the
weights at the memory's bandwidth) this has a property that plain products have not: each output is summed in one order,
whatever the number of rows, so that a row's result does not depend, to the last bit, on its neighbours. That holds
from two rows on; one row alone takes another kernel, and is therefore computed as two, which costs nothing.
"""

from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

_PACKED_DTYPES = (torch.float32, torch.bfloat16)
_PACK = getattr(torch.ops.mkldnn, "_reorder_linear_weight", None)
_PRODUCT = getattr(torch.ops.mkldnn, "_linear_pointwise", None)


class Linear(Protocol):
    """x (..., in) -> (..., out)."""

    def __call__(self, x: Tensor) -> Tensor: ...


class Table(Protocol):
    """A matrix whose rows are looked up: int64 (...) -> (..., columns)."""

    device: torch.device

    def __getitem__(self, index: Tensor) -> Tensor: ...


class QuantizedWeights(NamedTuple):
    """What a language model has in fewer bits: products by canonical name, and its table of embeddings. See `quantized`."""

    products: dict[str, Linear]
    table: Table | None


class DenseLinear:
    """x Wᵀ + b with W (out, in) and b (out,) or None, in x's dtype."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.weight = weight
        self.bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class PackedLinear:
    """The same on a CPU, with the weight in oneDNN's blocks. A row's result does not depend on the other rows."""

    def __init__(self, weight: Tensor, bias: Tensor | None, usual_rows: int) -> None:
        """usual_rows: how many rows to choose the blocks for; any number can be given."""
        assert _PACK is not None
        self.columns = weight.shape[1]
        self.dtype = weight.dtype
        self.packed = _PACK(weight.contiguous(), max(usual_rows, 8))
        self.bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        assert _PRODUCT is not None
        rows = x.reshape(-1, self.columns)
        if len(rows) > 1:
            y: Tensor = _PRODUCT(rows, self.packed, self.bias, "none", [], "")
        else:
            y = _PRODUCT(torch.cat([rows, rows]), self.packed, self.bias, "none", [], "")[:1]
        return y.view(*x.shape[:-1], -1)

    def rows_independent(self) -> bool:
        """Whether the property above holds with this processor's kernels, tried with a few numbers of rows."""
        return sums_in_one_order(self, self.columns, self.dtype)


def sums_in_one_order(product: Linear, columns: int, dtype: torch.dtype) -> bool:
    """Whether a row's result is the same to the last bit beside any other rows, tried with a few numbers of rows."""
    x = torch.linspace(-1, 1, 17 * columns).sin().to(dtype).view(17, columns)
    alone = torch.cat([product(row[None]) for row in x])
    return all(torch.equal(product(x[:rows]), alone[:rows]) for rows in (2, 3, 4, 7, 16, 17))


def make_linear(weight: Tensor, bias: Tensor | None = None, *, usual_rows: int = 1) -> Linear:
    """The best product for the weight's device and dtype. The weight itself may be freed afterwards."""
    if can_pack(weight.device, weight.dtype):
        return PackedLinear(weight, bias, usual_rows)
    return DenseLinear(weight, bias)


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `make_linear` packs here: on a CPU, where this PyTorch has oneDNN."""
    has_kernels = bool(torch._C._has_mkldnn) and _PACK is not None and _PRODUCT is not None
    return device.type == "cpu" and dtype in _PACKED_DTYPES and has_kernels
