"""From a configured module and its files to a backend: device, dtype, weights. Knows no server and no hub."""

import logging
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from moshi_stt.config import KyutaiModule
from moshi_stt.errors import ConfigError
from moshi_stt.models import affine
from moshi_stt.models.affine import Scheme
from moshi_stt.models.report import LoadReport, memory_note
from moshi_stt.models.spec import ModelSpec
from moshi_stt.models.torch_impl.attention import RingAttention, ring_attention, ring_attention_rows
from moshi_stt.models.torch_impl.backend import BackendState, TorchBackend, make_state
from moshi_stt.models.torch_impl.beside import Beside
from moshi_stt.models.torch_impl.device import (
    DTYPE_NAMES,
    MimiDtype,
    choose_device,
    choose_dtype,
    choose_kv_dtype,
    choose_mimi_dtype,
    choose_mimi_kv_dtype,
    choose_threads,
    device_name,
    free_bytes,
    hold_to_pretended_memory,
    keep_freed_memory,
    without_kernels,
)
from moshi_stt.models.torch_impl.linear import QuantizedWeights
from moshi_stt.models.torch_impl.lm import LanguageModel
from moshi_stt.models.torch_impl.loader import allocate_lm, fill, load_mimi_params, load_quantized_lm
from moshi_stt.models.torch_impl.mimi import MimiEncoder
from moshi_stt.models.weights import Plan, plan_lm, plan_mimi

if TYPE_CHECKING:
    from moshi_stt.models.torch_impl.cuda.backend import CudaBackend

log = logging.getLogger(__name__)

FUSED_NOTE = "runs on its own kernels, each step one CUDA graph"


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
) -> "TorchBackend | CudaBackend":
    """Check both files, load them, and make the state of `slots` slots. `backend.report` says what came of it.

    device: "cpu", "cuda", "cuda:1", "mps" or "auto"; None takes the module's. zero_start: see `MimiEncoder`.
    Raises ConfigError for a device or dtype that cannot be, CheckpointError for files that do not fit the spec.
    """
    start = time.perf_counter()
    target, notes = choose_device(device or module.engine.device)
    if pretends := hold_to_pretended_memory(target):
        notes += (pretends,)
    dtype = choose_dtype(module.dtype_override, target)
    lm_plan, hidden = plan_lm(lm_file, spec.lm)
    mimi_plan = plan_mimi(mimi_file, spec.mimi)
    checked = time.perf_counter()
    why_plain = without_kernels(spec.lm, dtype, target)
    tried = time.perf_counter()
    kv_dtype = choose_kv_dtype(module.engine.kv_dtype, dtype, why_plain, target)
    scheme = choose_scheme(lm_plan, module, target)
    beside = choose_threads(module.engine.threads) if target.type == "cpu" else None
    with torch.inference_mode():
        params, quantized = load_lm(lm_plan, spec, hidden, dtype, target, scheme, beside)
        mimi_params = load_mimi_params(mimi_plan, target)
        read = time.perf_counter()
        weight_bytes = _bytes(params) + _bytes(mimi_params) + _quantized_bytes(quantized)
    mimi_dtype = choose_mimi_dtype(module.engine.mimi_dtype)
    mimi_kv_dtype = choose_mimi_kv_dtype(mimi_dtype, fused=not why_plain)
    if target.type == "cuda":
        slots, said = fit_slots(spec, slots, kv_dtype, target, fused=not why_plain, mimi_kv_dtype=mimi_kv_dtype)
        notes += said
    state = make_state(spec, slots, kv_dtype, target, mimi_kv_dtype)
    notes += quantized_notes(quantized, lm_plan, scheme)
    if target.type == "cuda":
        notes += (f"runs on PyTorch's kernels, several times slower than its own: {why_plain}" if why_plain else FUSED_NOTE,)
    report = LoadReport(
        device=device_name(target) if beside is None else f"cpu ({beside})",
        dtype=f"{scheme}, {DTYPE_NAMES[dtype]}" if scheme else DTYPE_NAMES[dtype],
        weight_bytes=weight_bytes,
        slot_bytes=state.slot_bytes(),
        load_seconds=0.0,
        notes=(*spec.notes, *notes, *(memory_note(state.slot_bytes(), slots) if target.type == "cpu" else ())),
    )
    options = Options(mimi_dtype, module.engine.fixed_shapes, seed, zero_start)
    backend: TorchBackend | CudaBackend
    if why_plain:
        backend = plain_backend(spec, params, mimi_params, state, options, beside=beside, quantized=quantized, dtype=dtype)
    else:
        backend = fused_backend(spec, params, mimi_params, state, options)
    if target.type == "cpu":
        keep_freed_memory()
    done = time.perf_counter()
    parts = checked - start, tried - checked, read - tried, done - read
    log.info("start: device and files %.1f s, a first kernel %.1f s, weights %.1f s, state and model %.1f s", *parts)
    backend.report = replace(report, load_seconds=done - start)  # repacking and compiling included
    return backend


RESERVED_BYTES = 700 << 20
"""Of a GPU's memory, for what is no state: the context, kernels, graphs and libraries."""


def fit_slots(
    spec: ModelSpec,
    slots: int,
    kv_dtype: torch.dtype,
    device: torch.device,
    *,
    fused: bool,
    mimi_kv_dtype: torch.dtype,
    free: int | None = None,
) -> tuple[int, tuple[str, ...]]:
    """As many of `slots` as the device has memory for beside the weights, and what to say where that is fewer.

    free: bytes that can be had; None asks the device. Raises ConfigError where there is no room for two slots: a stream's, and
    one to answer its markers with.
    """
    free = free_bytes(device) if free is None else free
    with torch.inference_mode():
        slot = make_state(spec, 1, kv_dtype, torch.device("meta"), mimi_kv_dtype).slot_bytes()
    each = slot + step_bytes(spec, slot, fused=fused)
    most = (free - RESERVED_BYTES - (split_bytes(spec) if fused else 0)) // each - 1  # one is scratch
    if most >= slots:
        return slots, ()
    if most < 2:
        raise ConfigError(
            f"{device_name(device)} has {free / 1e9:.1f} GB free beside the weights, and a stream needs {each / 1e9:.2f} GB of "
            f"{spec.lm.context} positions: free memory on it, or use a smaller model"
        )
    return most, (f"room for {most} of {slots} slots in the {free / 1e9:.1f} GB that are free beside the weights: all of them",)


def split_bytes(spec: ModelSpec) -> int:
    """Of Mimi's codebooks in two parts, which our quantiser keeps next to them (`cuda.quantiser.Books`)."""
    return 2 * 4 * spec.mimi.codebooks * spec.mimi.codebook_size * spec.mimi.codebook_dim


def step_bytes(spec: ModelSpec, slot_bytes: int, *, fused: bool) -> int:
    """About how much memory a row of the largest step takes while it runs."""
    steps, floats = spec.mimi.frame_samples, 0
    for conv in spec.mimi.convs:
        floats += 2 * (conv.context + steps) * conv.channels_in
        steps //= conv.stride
    language = 16 * spec.lm.dim + 2 * spec.lm.text_card
    gathered = 0 if fused else 4 * slot_bytes // spec.lm.layers  # PyTorch's own operations copy a layer's ring
    return 4 * (floats + language) + gathered


def choose_scheme(plan: Plan, module: KyutaiModule, device: torch.device) -> Scheme | None:
    """As `affine.choose_scheme`; raises ConfigError off the CPU too."""
    scheme = affine.choose_scheme(plan, module.engine.quantize)
    if scheme is not None and device.type != "cpu":
        what = (
            f"{plan.header.path} holds weights of {scheme.removeprefix('int')} bits"
            if plan.packed
            else f'quantize = "{scheme}" is set'
        )
        raise ConfigError(
            f"{what}, which PyTorch runs on the CPU alone, not on {device}: "
            + ("use the unquantised file" if plan.packed else 'use "none"')
            + ' (dtype_override = "bf16" halves float32), or device = "cpu"'
        )
    return scheme


def load_lm(
    plan: Plan,
    spec: ModelSpec,
    hidden: int,
    dtype: torch.dtype,
    device: torch.device,
    scheme: Scheme | None,
    beside: Beside | None,
) -> tuple[dict[str, Tensor], QuantizedWeights | None]:
    """The language model's weights, as `LanguageModel` takes them."""
    if scheme is not None:
        return load_quantized_lm(
            plan, spec.lm, None if plan.packed else scheme, dtype, beside.threads_of_first if beside else 1
        )
    params, destinations = allocate_lm(spec.lm, hidden, dtype, device)
    fill(plan, destinations)
    return params, None


def quantized_notes(quantized: QuantizedWeights | None, plan: Plan, scheme: Scheme | None) -> tuple[str, ...]:
    """What was quantised, and what was not although it was asked for."""
    if quantized is None:
        return ()
    names = [source.param.name for source in plan.sources if len(source.param.shape) == 2]
    left = sum(name.startswith(("transformer.", "text_linear.")) for name in names) - len(quantized.products)
    how = "as the file has them" if plan.packed else "packed while loading, which `moshi-stt quantize` does once for all"
    notes = (f"{len(quantized.products)} matrices of {scheme}, {how}; products by ONNX Runtime",)
    return (*notes, f"{left} matrices are left as they are: no multiple of 32 wide") if left else notes


class Options(NamedTuple):
    """mimi_dtype: see `device.choose_mimi_dtype`. fixed_shapes: see `config.EngineConfig`. seed: of the noise where the
    temperature is above 0. zero_start: see `MimiEncoder`.
    """

    mimi_dtype: MimiDtype = "f16"
    fixed_shapes: bool = False
    seed: int = 0
    zero_start: bool = False


def plain_backend(
    spec: ModelSpec,
    params: dict[str, Tensor],
    mimi_params: dict[str, Tensor],
    state: BackendState,
    options: Options,
    report: LoadReport | None = None,
    beside: Beside | None = None,
    quantized: QuantizedWeights | None = None,
    dtype: torch.dtype | None = None,
) -> TorchBackend:
    """On any device, from filled params (`loader`). quantized, dtype: see `LanguageModel`."""
    attention: RingAttention = ring_attention_rows if state.frames.device.type == "cpu" else ring_attention
    with torch.inference_mode():
        lm = LanguageModel(spec.lm, params, attention, spec.condition, quantized, dtype)
        mimi = MimiEncoder(spec.mimi, mimi_params, attention, zero_start=options.zero_start)
    fixed_rows = _fixed_rows(state.frames.device, lm, mimi) if options.fixed_shapes else 0
    return TorchBackend(spec, lm, mimi, state, beside=beside, fixed_rows=fixed_rows, seed=options.seed, report=report)


def fused_backend(
    spec: ModelSpec,
    params: dict[str, Tensor],
    mimi_params: dict[str, Tensor],
    state: BackendState,
    options: Options,
    report: LoadReport | None = None,
    buckets: tuple[int, ...] | None = None,
) -> "CudaBackend":
    """On a GPU where `device.without_kernels` finds nothing, from filled params. buckets: see `CudaBackend`."""
    from moshi_stt.models.torch_impl.cuda.backend import CudaBackend
    from moshi_stt.models.torch_impl.cuda.lm import FusedLM
    from moshi_stt.models.torch_impl.cuda.mimi import PRECISIONS, FusedMimi

    with torch.inference_mode():
        lm = FusedLM(spec.lm, params, spec.condition, temperature=spec.temperature, seed=options.seed)
        mimi = FusedMimi(spec.mimi, mimi_params, PRECISIONS[options.mimi_dtype], zero_start=options.zero_start)
    return CudaBackend(spec, lm, mimi, state, fixed_shapes=options.fixed_shapes, report=report, buckets=buckets)


def rows_independent(lm: LanguageModel, mimi: MimiEncoder) -> bool:
    """Whether a row's result is the same to the last bit beside any other rows: on a CPU with repacked or quantised weights,
    as tried out on one product of each shape."""
    layer = lm.layers[0]
    products = [layer.in_proj, layer.linear_in, layer.linear_out, lm.text_linear, mimi.quantizer.distances[0]]
    products += [mimi.layers[0].linear1, *(conv.product for conv in mimi.convs)]
    return all(hasattr(product, "rows_independent") and product.rows_independent() for product in products)


def _fixed_rows(device: torch.device, lm: LanguageModel, mimi: MimiEncoder) -> int:
    """Rows of every step under `fixed_shapes`; 0, any number, where rows are independent anyway."""
    if device.type == "cpu":
        return 0 if rows_independent(lm, mimi) else 1
    return 16


def _quantized_bytes(quantized: QuantizedWeights | None) -> int:
    parts = [] if quantized is None else [*quantized.products.values(), quantized.table]
    return sum(getattr(part, "nbytes", 0) for part in parts)


def _bytes(tensors: Mapping[str, torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
