"""Matrices of 8 or 4 bits on a CPU: products by ONNX Runtime, and tables whose rows are looked up. Knows nothing of models.

Weights are packed as MLX packs them (`models.affine`), so that either framework's files serve the other. ONNX Runtime's
`MatMulNBits` rounds activations to 8 bits, row by row: a row's result does not depend on its neighbours. It was chosen by
measuring; see docs/internals/quantization.md.
"""

import ctypes
import sys

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moshi_stt.models.affine import Packed, dequantize, levels_of
from moshi_stt.models.torch_impl.linear import Linear, make_linear, sums_in_one_order
from moshi_stt.models.torch_impl.onnx_node import product_session
from moshi_stt.models.weights import Packing

_BITS = (4, 8)
_GROUPS = {4: (32,), 8: (64, 32)}
"""Sizes of the groups whose products are summed in one order whatever the number of rows. Larger groups are cut to them."""

_LEVELS_OFF = 0.125
"""How far, in levels, a zero may be off the whole number that ONNX Runtime takes before the difference is added apart."""


class QuantizedLinear:
    """x Wᵀ with a packed W (out, in), in float32 with activations of 8 bits, in x's dtype. Rows are independent."""

    def __init__(self, packed: Packed, packing: Packing, threads: int = 1) -> None:
        """packing: one that `can_multiply`. The arrays may be freed afterwards. Raises ConfigError for an old ONNX Runtime."""
        packed, packing = _regroup(packed, packing)
        weight, scales, biases = packed
        rows, groups = scales.shape
        self.columns = groups * packing.group_size
        self.packing = packing
        scales = np.where(scales == 0, np.float32(1e-30), scales)  # a group of one number: its bias
        zeros = np.clip(np.rint(-biases / scales), 0, (1 << packing.bits) - 1)
        off = biases + scales * zeros
        self._groups = groups
        self._rest: Linear | None = None
        if np.abs(off / scales).max() > _LEVELS_OFF:
            self._rest = make_linear(torch.from_numpy(off))
        levels = weight.view(np.uint8).reshape(rows, groups, -1)
        stored = _bytes_of(zeros.astype(np.uint8), packing.bits)
        self._session = product_session(levels, scales, stored, packing, threads)
        # ONNX Runtime keeps the scales, a copy of them among the levels, and a sum for each group
        self.nbytes = levels.nbytes + stored.nbytes + 3 * scales.nbytes + (off.nbytes if self._rest else 0)
        _return_freed_memory()

    def __call__(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.columns).float()
        y = torch.from_numpy(self._session.run(None, {"x": rows.numpy()})[0])
        if self._rest is not None:
            y += self._rest(rows.view(-1, self._groups, self.packing.group_size).sum(-1))
        return y.to(x.dtype).view(*x.shape[:-1], -1)

    def rows_independent(self) -> bool:
        return sums_in_one_order(self, self.columns, torch.float32)


class PackedTable:
    """A matrix whose rows are looked up, a byte for each number: levels (rows, columns), scales and biases (rows, groups)."""

    dtype = torch.float32

    def __init__(self, levels: Tensor, scales: Tensor, biases: Tensor) -> None:
        self.levels, self.scales, self.biases = levels, scales, biases
        self.device = levels.device

    def __getitem__(self, index: Tensor) -> Tensor:
        """Rows: int64 (...) -> float32 (..., columns)."""
        levels = self.levels[index].view(*index.shape, self.scales.shape[1], -1)
        return (levels * self.scales[index].unsqueeze(-1) + self.biases[index].unsqueeze(-1)).flatten(-2)

    @property
    def nbytes(self) -> int:
        return self.levels.nbytes + self.scales.nbytes + self.biases.nbytes


def can_multiply(packing: Packing) -> bool:
    """Whether `QuantizedLinear` takes a packing."""
    return packing.bits in _BITS and any(packing.group_size % size == 0 for size in _GROUPS[packing.bits])


def packed_linear(packed: Packed, packing: Packing, threads: int) -> Linear:
    """The product for a packed matrix; for a packing that ONNX Runtime lacks, with the matrix unpacked."""
    if can_multiply(packing):
        return QuantizedLinear(packed, packing, threads)
    return make_linear(torch.from_numpy(dequantize(packed, packing)))


def packed_table(parts: list[tuple[Packed, Packing]]) -> PackedTable:
    """Tables of equal width one below the other, of any packing. `parts` is emptied."""
    group_size = min(packing.group_size for _, packing in parts)
    rows = sum(len(packed.weight) for packed, _ in parts)
    columns = parts[0][0].scales.shape[1] * parts[0][1].group_size
    levels = torch.empty(rows, columns, dtype=torch.uint8)
    scales, biases = (torch.empty(rows, columns // group_size) for _ in range(2))
    end = rows
    while parts:
        packed, packing = parts.pop()
        begin = end - len(packed.weight)
        times = packing.group_size // group_size
        levels[begin:end] = torch.from_numpy(levels_of(packed.weight, packing))
        scales[begin:end] = torch.from_numpy(np.repeat(packed.scales, times, axis=1))
        biases[begin:end] = torch.from_numpy(np.repeat(packed.biases, times, axis=1))
        end = begin
    return PackedTable(levels, scales, biases)


def _regroup(packed: Packed, packing: Packing) -> tuple[Packed, Packing]:
    """The same numbers in groups of a size that is summed in one order."""
    size = next(size for size in _GROUPS[packing.bits] if packing.group_size % size == 0)
    times = packing.group_size // size
    if times == 1:
        return packed, packing
    scales, biases = (np.repeat(array, times, axis=1) for array in (packed.scales, packed.biases))
    return Packed(packed.weight, scales, biases), Packing(packing.bits, size)


def _bytes_of(numbers: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Numbers (rows, n) of so many bits each, side by side in bytes; rows begin with a byte of their own."""
    if bits == 8:
        return numbers
    if numbers.shape[1] % 2:
        numbers = np.pad(numbers, ((0, 0), (0, 1)))
    return numbers[:, ::2] | numbers[:, 1::2] << np.uint8(4)


def _return_freed_memory() -> None:
    """Give back to the system what repacking has freed: glibc would keep a matrix's worth for each product."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # not there in musl
        if trim is not None:
            trim(0)
