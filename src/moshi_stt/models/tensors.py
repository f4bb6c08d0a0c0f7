"""Numbers in and out of safetensors files with NumPy alone. Knows dtypes and offsets, neither models nor frameworks.

NumPy has no bfloat16: a BF16 tensor is read as its bits, uint16, and widened or rounded here.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from moshi_stt.errors import CheckpointError
from moshi_stt.models.weights import Header, TensorInfo

STORED: Mapping[str, type[np.generic]] = {
    "BF16": np.uint16,
    "F16": np.float16,
    "F32": np.float32,
    "F64": np.float64,
    "U32": np.uint32,
    "I32": np.int32,
}
"""How NumPy holds the safetensors dtypes that are read or written here."""

Bits = NDArray[np.generic]
"""An array as `STORED` says, to be read together with its safetensors dtype."""


class TensorFile:
    """An open file, one tensor at a time: no more than that is held."""

    def __init__(self, header: Header, file: BinaryIO) -> None:
        self.header = header
        self._file = file

    def read(self, name: str) -> Bits:
        """A tensor as it is stored. Raises CheckpointError when the file cannot be read."""
        return self.read_info(self.header.tensors[name], name)

    def read_info(self, info: TensorInfo, name: str) -> Bits:
        try:
            self._file.seek(info.start)
            raw = self._file.read(info.bytes)
        except OSError as error:
            raise CheckpointError(f"cannot read {name} of {self.header.path}: {error.strerror or error}") from error
        if len(raw) != info.bytes:
            raise CheckpointError(f"{self.header.path} ends inside {name}; fetch it again")
        return np.frombuffer(raw, STORED[info.dtype]).reshape(info.shape)

    def read_float32(self, name: str) -> NDArray[np.float32]:
        return to_float32(self.read(name), self.header.tensors[name].dtype)


@contextmanager
def open_tensors(header: Header) -> Iterator[TensorFile]:
    """The file that a header was read from. Raises CheckpointError when it cannot be opened."""
    try:
        file = header.path.open("rb", buffering=0)
    except OSError as error:
        raise CheckpointError(f"cannot read {header.path}: {error.strerror or error}") from error
    with file:
        yield TensorFile(header, file)


def to_float32(values: Bits, dtype: str) -> NDArray[np.float32]:
    """Stored values, widened (F64: rounded)."""
    if dtype == "BF16":
        wide = np.zeros((*values.shape, 2), "<u2")  # a float32's upper half
        wide[..., 1] = values
        return wide.view("<f4")[..., 0]
    return values.astype(np.float32)


def to_stored(values: NDArray[np.float32], dtype: str) -> Bits:
    """float32 values as they are stored, rounded to the nearest, ties to even. NaN stays NaN."""
    if dtype != "BF16":
        return values.astype(STORED[dtype])
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)


def write_tensors(
    path: Path,
    shapes: Mapping[str, tuple[str, tuple[int, ...]]],
    tensors: Iterable[tuple[str, Bits]],
    metadata: Mapping[str, str],
) -> None:
    """Write a safetensors file, one tensor at a time, beside `path` first, so that no half of a file ever bears its name.

    shapes: dtype and shape of each tensor, in the order in which `tensors` brings them.
    Raises CheckpointError when the file cannot be written.
    """
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name, (dtype, shape) in shapes.items():
        start, end = end, end + int(np.prod(shape, dtype=np.int64)) * np.dtype(STORED[dtype]).itemsize
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            for (name, (dtype, shape)), (brought, values) in zip(shapes.items(), tensors, strict=True):
                assert (brought, values.shape) == (name, shape), f"{brought} instead of {name}"
                assert values.dtype == STORED[dtype], name
                file.write(np.ascontiguousarray(values).data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        part.unlink(missing_ok=True)
