"""One ONNX Runtime session for one product with packed weights. Knows ONNX's encoding, neither models nor PyTorch.

The model file that ONNX Runtime wants is a hundred bytes around the weights, written here; the weights are handed over beside
it and lie in memory once, repacked by ONNX Runtime for this processor.
"""

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from moshi_stt.errors import ConfigError
from moshi_stt.models.weights import Packing

_INT8_ACTIVATIONS = 4
"""`accuracy_level`: activations are rounded to 8 bits, each row and each group of columns by a scale of its own."""

_FLOAT, _UINT8 = 1, 2
_EXTERNAL = 1
_INT = 2

Initializer = NDArray[np.uint8] | NDArray[np.float32]


def product_session(
    levels: NDArray[np.uint8], scales: NDArray[np.float32], zeros: NDArray[np.uint8], packing: Packing, threads: int
) -> onnxruntime.InferenceSession:
    """A session that computes `y` (rows, out) = x Wᵀ of `x` float32 (rows, in), W = scale * (level - zero).

    levels (out, groups, group_size * bits / 8), scales (out, groups), zeros (out, groups * bits / 8, rounded up), the first of
    two 4-bit numbers in the lower half of its byte. The arrays may be freed afterwards.
    threads: of this session's products, the caller's included. More than one do not spin while they wait.
    Raises ConfigError where this ONNX Runtime has no such product.
    """
    rows, groups = scales.shape
    weights: dict[str, Initializer] = {"levels": levels, "scales": scales, "zeros": zeros}
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.enable_cpu_mem_arena = False  # one for each product would each keep memory
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    values = [onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array)) for array in weights.values()]
    options.add_external_initializers(list(weights), values)
    model = _model(weights, groups * packing.group_size, rows, packing)
    try:
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # of classes that ONNX Runtime does not export
        raise ConfigError(
            f"onnxruntime {onnxruntime.__version__} cannot multiply by weights of {packing.bits} bits in groups of "
            f'{packing.group_size} ({str(error).splitlines()[0]}): install 1.22 or later, or set quantize = "none"'
        ) from error


# ---- the bytes of the model: Protocol Buffers, with the field numbers of onnx.proto ------------------------------------------


def _model(weights: dict[str, Initializer], columns: int, rows: int, packing: Packing) -> bytes:
    attributes = {
        "K": columns,
        "N": rows,
        "bits": packing.bits,
        "block_size": packing.group_size,
        "accuracy_level": _INT8_ACTIVATIONS,
    }
    node = b"".join(_field(1, name) for name in ("x", *weights)) + _field(2, "y") + _field(4, "MatMulNBits")
    node += b"".join(_field(5, _field(1, name) + _field(3, value) + _field(20, _INT)) for name, value in attributes.items())
    node += _field(7, "com.microsoft")
    graph = _field(1, node) + _field(2, "product")
    graph += b"".join(_field(5, _initializer(name, array)) for name, array in weights.items())
    graph += _field(11, _matrix("x", columns)) + _field(12, _matrix("y", rows))
    opsets = _field(8, _field(1, "") + _field(2, 17)) + _field(8, _field(1, "com.microsoft") + _field(2, 1))
    return _field(1, 8) + opsets + _field(7, graph)


def _initializer(name: str, array: Initializer) -> bytes:
    """A tensor whose numbers are handed over beside the model."""
    kind = _FLOAT if array.dtype == np.float32 else _UINT8
    where = {"location": "memory", "offset": "0", "length": str(array.nbytes)}
    dims = b"".join(_field(1, size) for size in array.shape)
    entries = b"".join(_field(13, _field(1, key) + _field(2, value)) for key, value in where.items())
    return dims + _field(2, kind) + _field(8, name) + entries + _field(14, _EXTERNAL)


def _matrix(name: str, columns: int) -> bytes:
    """An input or output: float32, any number of rows."""
    shape = _field(1, _field(2, "rows")) + _field(1, _field(1, columns))
    return _field(1, name) + _field(2, _field(1, _field(1, _FLOAT) + _field(2, shape)))


def _field(number: int, value: int | str | bytes) -> bytes:
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    data = value.encode() if isinstance(value, str) else value
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])
