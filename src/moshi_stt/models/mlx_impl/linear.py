"""Matrix products with a weight that never changes, dense or packed. Knows nothing of models."""

from typing import NamedTuple, Protocol, TypeAlias

import mlx.core as mx
import numpy as np

from moshi_stt.models.weights import Packing


class PackedWeight(NamedTuple):
    """weight uint32 (out, in * bits / 32); scales and biases (out, in / group_size) in the dtype of the products."""

    weight: mx.array
    scales: mx.array
    biases: mx.array
    packing: Packing

    def rows(self, index: mx.array) -> mx.array:
        """Some rows of the matrix, unpacked: uint32 (...) -> (..., in)."""
        weight, scales, biases, packing = self
        return mx.dequantize(weight[index], scales[index], biases[index], group_size=packing.group_size, bits=packing.bits)

    def unpacked(self) -> mx.array:
        """The whole matrix."""
        weight, scales, biases, packing = self
        return mx.dequantize(weight, scales, biases, group_size=packing.group_size, bits=packing.bits)

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes + self.scales.nbytes + self.biases.nbytes


Weight: TypeAlias = mx.array | PackedWeight
"""A matrix (out, in)."""


class Linear(Protocol):
    """x (..., in) -> (..., out)."""

    def __call__(self, x: mx.array) -> mx.array: ...


class DenseLinear:
    """x Wᵀ + b with W (out, in) and b (out,) or None, in x's dtype."""

    def __init__(self, weight: mx.array, bias: mx.array | None = None) -> None:
        self.weight = weight
        self.bias = bias
        self.columns = weight.shape[1]

    def __call__(self, x: mx.array) -> mx.array:
        if self.bias is None:
            return x @ self.weight.T
        return mx.addmm(self.bias, x, self.weight.T)


class QuantizedLinear:
    """x Wᵀ with a packed W. Products are in the dtype of the scales, results in x's."""

    def __init__(self, weight: PackedWeight) -> None:
        self.weight = weight
        self.columns = weight.scales.shape[1] * weight.packing.group_size

    def __call__(self, x: mx.array) -> mx.array:
        weight, scales, biases, packing = self.weight
        y = mx.quantized_matmul(
            x.astype(scales.dtype), weight, scales, biases, transpose=True, group_size=packing.group_size, bits=packing.bits
        )
        return y.astype(x.dtype)


def make_linear(weight: Weight, bias: mx.array | None = None) -> DenseLinear | QuantizedLinear:
    """The product for a weight. A packed one has no bias."""
    if isinstance(weight, PackedWeight):
        assert bias is None
        return QuantizedLinear(weight)
    return DenseLinear(weight, bias)


def is_row_independent(linear: DenseLinear | QuantizedLinear, dtype: mx.Dtype) -> bool:
    """Whether a row's result is the same to the last bit beside any other rows, tried with a few numbers of rows."""
    numbers = np.sin(np.linspace(-1, 1, 17 * linear.columns, dtype=np.float32)).reshape(17, -1)
    x = mx.array(numbers).astype(dtype)
    alone = mx.concatenate([linear(x[i : i + 1]) for i in range(17)])
    return all(bool(mx.array_equal(linear(x[:rows]), alone[:rows]).item()) for rows in (2, 3, 4, 7, 16, 17))
