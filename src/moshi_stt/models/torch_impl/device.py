"""Where and in what precision a model runs: device, dtypes, threads, memory. Knows no model.

Every choice that was not asked for and that its user should know of comes back as a note for the start-up log.
"""

import ctypes
import importlib.util
import sys
from typing import Literal

import torch

from moshi_stt.cores import usable_cores
from moshi_stt.errors import ConfigError
from moshi_stt.models.spec import LMSpec
from moshi_stt.models.torch_impl.beside import Beside
from moshi_stt.models.torch_impl.cuda.limits import limits_of, pretended_limits
from moshi_stt.models.torch_impl.cuda.toolchain import NO_COMPILER, c_compiler

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32, "f64": torch.float64}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

MimiDtype = Literal["f32", "tf32", "f16", "bf16"]
"""What our kernels multiply Mimi's numbers in (`cuda.mimi.PRECISIONS`)."""


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


_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1  # of glibc's mallopt


def keep_freed_memory(bytes_kept: int = 256 << 20) -> None:
    """Have glibc keep what a step frees for the next one, instead of giving it back to the system and taking it again.

    Of a step of many rows, page faults are a third otherwise. Other C libraries are left as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, bytes_kept)
        mallopt(_TRIM_THRESHOLD, bytes_kept)


def choose_dtype(override: str | None, device: torch.device) -> torch.dtype:
    """The language model's dtype (contract section 4.3): bf16 on a GPU, f32 on a CPU, unless overridden."""
    if override == "f64" and device.type == "mps":
        raise ConfigError('dtype_override = "f64": Metal has no float64; use "f32"')
    return DTYPES[override] if override else torch.float32 if device.type == "cpu" else torch.bfloat16


FP8_CAPABILITY = (8, 9)
"""From which compute capability on there are conversions to and from 8-bit floats: Ada, Hopper and later."""


def choose_kv_dtype(setting: str, dtype: torch.dtype, without_kernels: str, device: torch.device) -> torch.dtype:
    """The dtype of the language model's keys and values: the model's own unless set.

    without_kernels: why Triton's kernels cannot run on the device; empty where they can.
    Raises ConfigError where 8 bits were asked for and cannot be had.
    """
    if setting == "fp8":
        if without_kernels:
            raise ConfigError(f'kv_dtype = "fp8" needs a CUDA device with Triton, and {without_kernels}; use "auto"')
        capability = limits_of(device).capability
        if capability < FP8_CAPABILITY:
            raise ConfigError(
                f'kv_dtype = "fp8": {device_name(device)} has compute capability {_dotted(capability)}, which has no 8-bit '
                f'floats; they begin with {_dotted(FP8_CAPABILITY)} (Ada, Hopper): use "auto"'
            )
        return torch.float8_e4m3fn
    return dtype if setting == "auto" else DTYPES[setting]


def choose_mimi_dtype(setting: Literal["auto"] | MimiDtype) -> MimiDtype:
    """What our kernels multiply Mimi's numbers in: `auto` is float16. PyTorch's own operations stay in float32."""
    return "f16" if setting == "auto" else setting


def choose_mimi_kv_dtype(mimi_dtype: MimiDtype, *, fused: bool) -> torch.dtype:
    """Of the keys and values of Mimi's transformer: float16 under `f16`, where our kernels run, else float32."""
    return torch.float16 if fused and mimi_dtype == "f16" else torch.float32


def without_kernels(spec: LMSpec, dtype: torch.dtype, device: torch.device) -> str:
    """Why the fused kernels of `torch_impl.cuda` cannot run a model here; empty where they can."""
    if device.type != "cuda":
        return f"this is {device.type}"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    if limits_of(device).capability < (8, 0):
        return f"{torch.cuda.get_device_name(device)} is older than they need (compute capability 8.0)"
    if dtype not in (torch.bfloat16, torch.float32):
        return f"they know no {DTYPE_NAMES[dtype]}"
    if spec.head_dim not in (32, 64, 128, 256) or spec.extra_head_dim > 16:
        return f"they know no attention heads of {spec.head_dim} or extra heads of {spec.extra_head_dim}"
    if c_compiler() is None:
        return NO_COMPILER
    return try_kernel(device)


def try_kernel(device: torch.device) -> str:
    """Build and launch one small kernel. Why that cannot be done, in one line; empty where it can."""
    try:
        from moshi_stt.models.torch_impl.cuda.elementwise import advance

        slots, fresh = torch.zeros(1, dtype=torch.int64, device=device), torch.ones(1, dtype=torch.uint8, device=device)
        advance(slots, fresh, torch.zeros(1, dtype=torch.int64, device=device))
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except Exception as error:  # whatever Triton, the C compiler, the assembler or the driver raise
        said = next(iter(str(error).splitlines()), "") or type(error).__name__
        return f"a first kernel could not be built or launched ({said})"
    return ""


def free_bytes(device: torch.device) -> int:
    """Memory of a CUDA device that this process can still take, cached memory of PyTorch's included."""
    reserved = torch.cuda.memory_reserved(device)
    free = torch.cuda.mem_get_info(device)[0]
    pretended = pretended_limits()
    if pretended is not None and pretended.memory_bytes is not None:
        free = min(free, pretended.memory_bytes - reserved)
    return max(0, free + reserved - torch.cuda.memory_allocated(device))


def hold_to_pretended_memory(device: torch.device) -> str:
    """Give this process no more memory than the pretended card has. What was pretended, for the log; empty where nothing is."""
    pretended = pretended_limits()
    if pretended is None:
        return ""
    if pretended.memory_bytes is not None and device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        total = torch.cuda.get_device_properties(index).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, pretended.memory_bytes / total), index)
    memory = "its own memory" if pretended.memory_bytes is None else f"{pretended.memory_bytes / 1e9:.0f} GB"
    return f"pretends compute capability {_dotted(pretended.capability)} and {memory} (MOSHI_STT_PRETEND_GPU)"


def _dotted(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"


def device_name(device: torch.device) -> str:
    """A name that people know the device by."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    if device.type == "mps":
        return "mps (Apple GPU)"
    return "cpu"
