"""Where and in what precision a model runs: device, dtypes, threads, memory. Knows no model.

Every choice that was not asked for and that its user should know of comes back as a note for the start-up log.
"""

import importlib.util

import torch

from moshi_stt.cores import usable_cores
from moshi_stt.errors import ConfigError
from moshi_stt.models.spec import LMSpec
from moshi_stt.models.torch_impl.beside import Beside

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32, "f64": torch.float64}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def choose_device(wanted: str) -> tuple[torch.device, tuple[str, ...]]:
    """The device for a setting, and what its user should know of the choice.

    Raises ConfigError when a device was asked for that is not there.
    """
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    kind, _, index = wanted.partition(":")
    if kind == "auto":
        found = "cuda" if cuda else "mps" if mps else "cpu"
        built = torch.version.cuda if found == "cpu" else None
        note = f"this PyTorch is built for CUDA {built} but finds no GPU: running on the CPU"
        return torch.device(found), (note,) if built else ()
    if kind not in ("cpu", "cuda", "mps") or not (index.isdecimal() if ":" in wanted else True):
        raise ConfigError(f'device = "{wanted}" is none that PyTorch runs on: auto, cpu, cuda, cuda:1 or mps')
    if kind == "cuda" and not cuda:
        built = torch.version.cuda
        why = f"is built for CUDA {built} but finds no GPU (see nvidia-smi)" if built else "is built without CUDA"
        raise ConfigError(f'device = "{wanted}", but this PyTorch {why}; install a matching PyTorch, or use --cpu')
    if kind == "cuda" and index and int(index) >= torch.cuda.device_count():
        raise ConfigError(f'device = "{wanted}", but there are {torch.cuda.device_count()} GPUs, counted from 0')
    if kind == "mps" and not mps:
        raise ConfigError(f'device = "{wanted}", but this PyTorch finds no Metal device; use device = "cpu"')
    return torch.device(wanted), ()


def choose_threads(setting: int) -> Beside:
    """How a CPU is shared between the language model and Mimi.

    setting: threads in all; 0 takes every core this process may use, up to four, since a few stream the weights as fast as
    the memory gives them. From two on, Mimi has one of them and the language model the others.
    """
    return Beside((setting or min(usable_cores(), 4)) - 1, 1)


def choose_dtype(override: str | None, device: torch.device) -> torch.dtype:
    """The language model's dtype (contract section 4.3): bf16 on a GPU, f32 on a CPU, unless overridden."""
    if override == "f64" and device.type == "mps":
        raise ConfigError('dtype_override = "f64": Metal has no float64; use "f32"')
    return DTYPES[override] if override else torch.float32 if device.type == "cpu" else torch.bfloat16


def choose_kv_dtype(setting: str, dtype: torch.dtype, without_kernels: str) -> torch.dtype:
    """The dtype of the language model's keys and values: the model's own unless set.

    without_kernels: why Triton's kernels cannot run here; empty where they can.
    """
    if setting == "fp8":
        if without_kernels:
            raise ConfigError(f'kv_dtype = "fp8" needs a CUDA device with Triton, and {without_kernels}; use "auto"')
        return torch.float8_e4m3fn
    return dtype if setting == "auto" else DTYPES[setting]


def without_kernels(spec: LMSpec, dtype: torch.dtype, device: torch.device) -> str:
    """Why the fused kernels of `torch_impl.cuda` cannot run a model here; empty where they can."""
    if device.type != "cuda":
        return f"this is {device.type}"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} is older than they need (compute capability 8.0)"
    if dtype not in (torch.bfloat16, torch.float32):
        return f"they know no {DTYPE_NAMES[dtype]}"
    if spec.head_dim not in (32, 64, 128, 256) or spec.extra_head_dim > 16:
        return f"they know no attention heads of {spec.head_dim} or extra heads of {spec.extra_head_dim}"
    return ""


def device_name(device: torch.device) -> str:
    """A name that people know the device by."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    if device.type == "mps":
        return "mps (Apple GPU)"
    return "cpu"
