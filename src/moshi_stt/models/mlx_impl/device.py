"""Where and in what precision a model runs: device, dtypes, memory. Knows no model.

Every choice that was not asked for and that its user should know of comes back as a note for the start-up log.
"""

import os
import platform
import sys

import mlx.core as mx

from moshi_stt.config import EngineConfig
from moshi_stt.errors import ConfigError
from moshi_stt.models.report import memory_note

DTYPES = {"bf16": mx.bfloat16, "f16": mx.float16, "f32": mx.float32}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def choose_device(wanted: str) -> tuple[mx.Device, tuple[str, ...]]:
    """The device for a setting, and what its user should know of the choice: the GPU where MLX has one.

    Raises ConfigError for what MLX does not run on.
    """
    if wanted == "cpu":
        return mx.Device(mx.cpu), ()
    if wanted not in ("auto", "mlx"):
        raise ConfigError(f'device = "{wanted}" is none that MLX runs on: mlx, or cpu')
    if mx.is_available(mx.gpu):
        return mx.Device(mx.gpu), ()
    slow = ", where PyTorch is many times faster" if sys.platform == "linux" else ""
    return mx.Device(mx.cpu), (f"this MLX finds no GPU: running on the CPU{slow}",)


def is_gpu(device: mx.Device) -> bool:
    return device.type == mx.gpu


def choose_dtype(override: str | None, device: mx.Device) -> mx.Dtype:
    """The language model's dtype (contract section 4.3): bf16 on a GPU, f32 on a CPU, unless overridden."""
    if override == "f64":
        raise ConfigError('dtype_override = "f64": Metal has no float64; use "f32"')
    return DTYPES[override] if override else mx.bfloat16 if is_gpu(device) else mx.float32


def choose_kv_dtype(setting: str, dtype: mx.Dtype) -> mx.Dtype:
    """The dtype of the language model's keys and values: the model's own unless set."""
    if setting == "fp8":
        raise ConfigError('kv_dtype = "fp8" needs a CUDA device with Triton; MLX takes "auto", "bf16" or "f32"')
    return dtype if setting == "auto" else DTYPES[setting]


def choose_mimi_precision(setting: str) -> tuple[str, ...]:
    """Mimi is float32 here. `auto`, as `tf32`, lets the matrix units of recent chips round its products' inputs.

    MLX reads the variable at its first product, so this holds for the process.
    """
    if setting not in ("auto", "tf32"):
        os.environ["MLX_ENABLE_TF32"] = "0"
    return (f'mimi_dtype = "{setting}": Mimi runs in float32 on MLX',) if setting in ("f16", "bf16") else ()


def setting_notes(engine: EngineConfig) -> tuple[str, ...]:
    """Settings that have no meaning here."""
    return (f"threads = {engine.threads} is for PyTorch; MLX chooses its own",) if engine.threads else ()


def device_name(device: mx.Device) -> str:
    """A name that people know the device by."""
    if is_gpu(device):
        return f"mlx gpu ({mx.device_info(device).get('device_name', platform.machine())})"
    return "mlx cpu"


def room_note(device: mx.Device, slot_bytes: int, slots: int, weights: int) -> tuple[str, ...]:
    """Memory is taken as streams fill it: a warning where all slots together would not fit."""
    if not is_gpu(device):
        return memory_note(slot_bytes, slots)
    usable = mx.device_info(device).get("max_recommended_working_set_size")
    return memory_note(slot_bytes, slots, int(usable) - weights) if usable else ()
