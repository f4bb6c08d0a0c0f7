"""Affine quantisation of matrices to 8 or 4 bits, as MLX does it, in NumPy. Knows no framework.

Each group of neighbours in a row shares a scale and a bias: weight = scale * level + bias, level = 0 .. 2**bits - 1. Levels
lie side by side in uint32 words, the first in the lowest bits. The numbers equal those of `mx.quantize` on the same dtype.
"""

from collections.abc import Mapping
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moshi_stt.errors import CheckpointError, ConfigError
from moshi_stt.models.weights import Packing, Plan

Scheme = Literal["int8", "int4"]
SCHEMES: Mapping[int, Scheme] = {8: "int8", 4: "int4"}

_INT8 = Packing(bits=8, group_size=64)
_INT4 = Packing(bits=4, group_size=32)
_SMALLEST_SCALE = np.float32(1e-7)
_BLOCK = 1 << 18
"""Numbers worked on at once, few enough to stay in a core's cache."""


class Packed(NamedTuple):
    """weight uint32 (rows, columns * bits / 32); scales and biases float32 (rows, columns / group_size)."""

    weight: NDArray[np.uint32]
    scales: NDArray[np.float32]
    biases: NDArray[np.float32]


def choose_packing(name: str, shape: tuple[int, ...], scheme: Scheme) -> Packing | None:
    """How a language model's tensor, by canonical name, is packed under a scheme; None leaves it as it is.

    int4 gives the matrices of the layers 4 bits; the embeddings and the output, which are read once a step and not
    summed away, keep 8. Norms and conditioners are never packed.
    """
    if len(shape) != 2 or name.startswith("condition_provider"):
        return None
    wanted = _INT4 if scheme == "int4" and name.startswith("transformer.") else _INT8
    for group_size in (wanted.group_size, 32):
        if shape[1] % group_size == 0:
            return Packing(wanted.bits, group_size)
    return None


def choose_scheme(plan: Plan, setting: str) -> Scheme | None:
    """What the layers' weights of a file are, or are to be packed to. setting: none, int8 or int4.

    Raises ConfigError where the file is packed already and something else is wanted, CheckpointError for a packing that is
    none of this program's.
    """
    bits = {source.packing.bits for source in plan.sources if source.packing}
    if not bits:
        return "int8" if setting == "int8" else "int4" if setting == "int4" else None
    unknown = bits - set(SCHEMES)
    if unknown:
        raise CheckpointError(
            f"{plan.header.path} holds weights of {min(unknown)} bits, and this program reads 4 and 8: "
            "quantise the original with `moshi-stt quantize`"
        )
    found = SCHEMES[min(bits)]
    if setting not in ("none", found):
        raise ConfigError(
            f'{plan.header.path} holds weights of {min(bits)} bits already, but quantize = "{setting}" is set: '
            'use quantize = "none", or the file that is not quantised'
        )
    return found


def left_unpacked(plan: Plan, scheme: Scheme | None) -> tuple[str, ...]:
    """A note where matrices that are to be packed while loading have a width that no packing fits."""
    if scheme is None or plan.packed:
        return ()
    shapes = [(source.param.name, source.param.shape) for source in plan.sources]
    left = sum(
        name.startswith(("transformer.", "text_linear.")) and len(shape) == 2 and choose_packing(name, shape, scheme) is None
        for name, shape in shapes
    )
    return (f"{left} matrices are left as they are: no multiple of 32 wide",) if left else ()


def quantize(weight: NDArray[np.float32], packing: Packing) -> Packed:
    """Pack a matrix (rows, columns); columns must be a multiple of the group size."""
    rows, columns = weight.shape
    block = max(1, _BLOCK // columns)
    parts = [_quantize_rows(weight[start : start + block], packing) for start in range(0, rows, block)]
    return Packed(*(np.concatenate(part) for part in zip(*parts, strict=True)))


def _quantize_rows(weight: NDArray[np.float32], packing: Packing) -> Packed:
    levels = np.float32((1 << packing.bits) - 1)
    groups = weight.reshape(len(weight), -1, packing.group_size)
    low, high = _folded(np.minimum, groups), _folded(np.maximum, groups)
    # The end that is farther from 0 becomes an exact multiple of the scale, so that 0 itself is one too.
    low_is_farther = np.abs(low) > np.abs(high)
    scale = np.maximum((high - low) / levels, _SMALLEST_SCALE)
    scale = np.where(low_is_farther, scale, -scale)
    edge = np.where(low_is_farther, low, high)
    steps = np.rint(edge / scale)
    flat = steps == 0
    scale = np.where(flat, scale, edge / np.where(flat, np.float32(1), steps))
    bias = np.where(flat, np.float32(0), edge)
    steps = groups - bias[..., None]
    steps /= scale[..., None]
    np.rint(steps, out=steps)
    level = np.clip(steps, 0, levels, out=steps).astype(np.uint8).reshape(len(weight), -1)
    if packing.bits == 4:
        level = level[:, ::2] | level[:, 1::2] << np.uint8(4)
    words = level.view("<u4").astype(np.uint32, copy=False)
    return Packed(words, scale.astype(np.float32, copy=False), bias.astype(np.float32, copy=False))


def _folded(ufunc: np.ufunc, groups: NDArray[np.float32]) -> NDArray[np.float32]:
    """The least or greatest of each group, (..., size) -> (...), by halves: NumPy reduces short axes number by number."""
    while (size := groups.shape[-1]) % 2 == 0:
        groups = ufunc(groups[..., : size // 2], groups[..., size // 2 :])
    folded: NDArray[np.float32] = groups[..., 0] if size == 1 else ufunc.reduce(groups, axis=-1)
    return folded


def levels_of(weight: NDArray[np.uint32], packing: Packing) -> NDArray[np.uint8]:
    """The levels in packed words: (rows, words) -> (rows, columns)."""
    shifts = np.arange(32 // packing.bits, dtype=np.uint32) * np.uint32(packing.bits)
    mask = np.uint32((1 << packing.bits) - 1)
    return ((weight[..., None] >> shifts) & mask).astype(np.uint8).reshape(len(weight), -1)


def dequantize(packed: Packed, packing: Packing) -> NDArray[np.float32]:
    """The matrix that packed words stand for: (rows, columns)."""
    levels = levels_of(packed.weight, packing).reshape(len(packed.weight), -1, packing.group_size)
    return (levels * packed.scales[..., None] + packed.biases[..., None]).reshape(len(levels), -1)
