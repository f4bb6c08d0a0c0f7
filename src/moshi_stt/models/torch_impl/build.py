"""From a configured module and its files to a `TorchBackend`: device, dtype, weights. Knows no server and no hub."""

import os
import time
from collections.abc import Mapping
from pathlib import Path

import torch

from moshi_stt.config import KyutaiModule
from moshi_stt.errors import ConfigError
from moshi_stt.models.spec import ModelSpec
from moshi_stt.models.torch_impl.attention import RingAttention, ring_attention, ring_attention_rows
from moshi_stt.models.torch_impl.backend import BackendState, LoadReport, TorchBackend
from moshi_stt.models.torch_impl.beside import Beside
from moshi_stt.models.torch_impl.linear import can_pack
from moshi_stt.models.torch_impl.lm import LanguageModel, LMState
from moshi_stt.models.torch_impl.loader import allocate_lm, fill, load_mimi_params
from moshi_stt.models.torch_impl.mimi import MimiEncoder, MimiState
from moshi_stt.models.weights import plan_lm, plan_mimi

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32, "f64": torch.float64}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def load_backend(
    module: KyutaiModule,
    lm_file: Path,
    mimi_file: Path,
    spec: ModelSpec,
    slots: int,
    device: str | None = None,
    *,
    zero_start: bool = False,
    seed: int = 0,
) -> TorchBackend:
    """Check both files, load them, and make the state of `slots` slots. `backend.report` says what came of it.

    device: "cpu", "cuda", "cuda:1", "mps" or "auto"; None takes the module's. zero_start: see `MimiEncoder`.
    Raises ConfigError for a device or dtype that cannot be, CheckpointError for files that do not fit the spec.
    """
    start = time.perf_counter()
    notes: list[str] = []
    target = choose_device(device or module.engine.device, notes)
    dtype = choose_dtype(module.dtype_override, target)
    lm_plan, hidden = plan_lm(lm_file, spec.lm)
    mimi_plan = plan_mimi(mimi_file, spec.mimi)
    attention: RingAttention = ring_attention_rows if target.type == "cpu" else ring_attention
    with torch.inference_mode():
        params, destinations = allocate_lm(spec.lm, hidden, dtype, target)
        fill(lm_plan, destinations)
        destinations.clear()  # so that `LanguageModel` can free what it repacks
        weight_bytes = _bytes(params)
        lm = LanguageModel(spec.lm, params, attention, spec.condition)
        mimi_params = load_mimi_params(mimi_plan, target)
        weight_bytes += _bytes(mimi_params)
        mimi = MimiEncoder(spec.mimi, mimi_params, attention, zero_start=zero_start)
        state = make_state(spec, slots, choose_kv_dtype(module.engine.kv_dtype, dtype, target), target)
    report = LoadReport(
        device=device_name(target),
        dtype=_NAMES[dtype],
        lm_parameters=lm_plan.parameters,
        weight_bytes=weight_bytes,
        slot_bytes=state.slot_bytes(),
        load_seconds=time.perf_counter() - start,
        notes=(*spec.notes, *notes),
    )
    return TorchBackend(
        spec,
        lm,
        mimi,
        state,
        beside=choose_threads(module.engine.threads) if target.type == "cpu" else None,
        fixed_rows=_fixed_rows(module.engine.fixed_shapes, target, dtype),
        seed=seed,
        report=report,
    )


def make_state(spec: ModelSpec, slots: int, kv_dtype: torch.dtype, device: torch.device) -> BackendState:
    """State of `slots` slots and the scratch slot."""
    count = slots + 1
    return BackendState(
        lm=LMState(spec.lm, count, kv_dtype, device),
        mimi=MimiState(spec.mimi, count, device),
        frames=torch.zeros(count, dtype=torch.int64, device=device),
        text=torch.zeros(count, dtype=torch.int64, device=device),
        codes=torch.zeros(count, spec.lm.codebooks, dtype=torch.int64, device=device),
    )


def choose_device(wanted: str, notes: list[str]) -> torch.device:
    """The device for a setting. What the user should know of the choice is added to `notes`.

    Raises ConfigError when a device was asked for that is not there.
    """
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    kind = wanted.partition(":")[0]
    if kind == "auto":
        if not cuda and not mps and torch.version.cuda:
            notes.append(f"this PyTorch is built for CUDA {torch.version.cuda} but finds no GPU: running on the CPU")
        return torch.device("cuda" if cuda else "mps" if mps else "cpu")
    if kind == "cuda" and not cuda:
        built = (
            f"is built for CUDA {torch.version.cuda} but finds no GPU (see nvidia-smi)"
            if torch.version.cuda
            else "is built without CUDA"
        )
        raise ConfigError(f'device = "{wanted}", but this PyTorch {built}; install a matching PyTorch, or use --cpu')
    if kind == "mps" and not mps:
        raise ConfigError(f'device = "{wanted}", but this PyTorch finds no Metal device; use device = "cpu"')
    if kind not in ("cpu", "cuda", "mps"):
        raise ConfigError(f'device = "{wanted}" is none that PyTorch runs here on: auto, cpu, cuda or mps')
    return torch.device(wanted)


def choose_threads(setting: int) -> Beside:
    """How a CPU is shared between the language model and Mimi.

    setting: threads in all; 0 takes every core up to four, beyond which one stream gains nothing. From two on, Mimi has one of
    them and the language model the others.
    """
    threads = setting or min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, 4)
    return Beside(threads - 1, 1)


def _fixed_rows(wanted: bool, device: torch.device, dtype: torch.dtype) -> int:
    """Rows of every step where `fixed_shapes` is set; repacked weights on a CPU need no fixed number for it."""
    if not wanted or can_pack(device, dtype):
        return 0
    return 1 if device.type == "cpu" else 16


def choose_dtype(override: str | None, device: torch.device) -> torch.dtype:
    """The language model's dtype (contract section 4.3): bf16 on a GPU, f32 on a CPU, unless overridden."""
    if override == "f64" and device.type == "mps":
        raise ConfigError('dtype_override = "f64": Metal has no float64; use "f32"')
    return DTYPES[override] if override else torch.float32 if device.type == "cpu" else torch.bfloat16


def choose_kv_dtype(setting: str, dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype of the language model's keys and values: the model's own unless set."""
    if setting == "fp8":
        raise ConfigError(f'kv_dtype = "fp8" needs a CUDA device with Triton; this is {device.type}')
    return dtype if setting == "auto" else DTYPES[setting]


def _bytes(tensors: Mapping[str, torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def device_name(device: torch.device) -> str:
    """A name that people know the device by."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    if device.type == "mps":
        return "mps (Apple GPU)"
    return f"cpu ({torch.get_num_threads()} threads)"
