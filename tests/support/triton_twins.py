"""Triton kernels beside their plain PyTorch twins: on a GPU where there is one, else in Triton's interpreter on the CPU.

Import this before anything of `torch_impl.cuda`: Triton decides at import whether it interprets. Tensors are poisoned where
nothing was written, so that a kernel that reads or leaves out what it should not shows it.
"""

import importlib.util
import os
from collections.abc import Iterator

import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed (PyTorch brings it on Linux, with CUDA)", allow_module_level=True)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

torch.backends.cudnn.allow_tf32 = False  # the twins' convolutions: what they are compared with is exact

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

INTERPRETED = DEVICE.type == "cpu"
"""The interpreter rounds toward zero where a GPU rounds to nearest."""


QUIET = [
    pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0 to a scalar:DeprecationWarning"),
]
"""Marks for tests of kernels: what the interpreter of Triton, of 3.2 in the second case, makes NumPy warn of."""


@pytest.fixture
def kernels_run() -> "Iterator[None]":
    """At the end of a test no kernel may have been replaced by PyTorch's own operations, which would pass in its place."""
    from moshi_stt.models.torch_impl.cuda import launch

    launch._replaced.clear()
    yield
    assert not launch._replaced


def poisoned(*shape: int, dtype: "torch.dtype" = torch.float32) -> "torch.Tensor":
    """Not-a-number everywhere, in any dtype."""
    tensor = torch.empty(shape, dtype=dtype, device=DEVICE)
    tensor.view(torch.uint8).fill_(0xFF)
    return tensor


def difference(got: "torch.Tensor", wanted: "torch.Tensor") -> float:
    """Relative to the length of `wanted`; not a number stays so."""
    got, wanted = got.double(), wanted.double()
    return float((got - wanted).norm() / wanted.norm())
