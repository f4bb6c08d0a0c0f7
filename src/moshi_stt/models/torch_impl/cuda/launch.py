"""Where kernels are launched: on the tensor's device, or in Triton's interpreter on the CPU. Knows no kernel."""

import contextlib
import os
from contextlib import AbstractContextManager

import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether Triton interprets kernels on the CPU, as it decides when it is imported."""


def device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Make the tensor's GPU the current one; nothing on the CPU, where only Triton's interpreter runs kernels."""
    if tensor.is_cuda and tensor.get_device() != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return contextlib.nullcontext()
