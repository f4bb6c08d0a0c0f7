"""From a configured module and its files to an `MLXBackend`: device, dtype, weights. Knows no server and no hub."""

import time
from pathlib import Path

import mlx.core as mx

from moshi_stt.config import KyutaiModule
from moshi_stt.models.affine import choose_scheme, left_unpacked
from moshi_stt.models.mlx_impl.backend import MLXBackend, make_state
from moshi_stt.models.mlx_impl.device import (
    DTYPE_NAMES,
    choose_device,
    choose_dtype,
    choose_kv_dtype,
    choose_mimi_precision,
    device_name,
    is_gpu,
    room_note,
    setting_notes,
)
from moshi_stt.models.mlx_impl.linear import is_row_independent
from moshi_stt.models.mlx_impl.lm import LanguageModel
from moshi_stt.models.mlx_impl.loader import Precision, load_lm_params, load_mimi_params, weight_bytes
from moshi_stt.models.mlx_impl.mimi import MimiEncoder
from moshi_stt.models.report import LoadReport
from moshi_stt.models.spec import ModelSpec
from moshi_stt.models.weights import plan_lm, plan_mimi

FIXED_ROWS = 16
"""Rows of every step under `fixed_shapes` where products depend on their number."""


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
) -> MLXBackend:
    """Check both files, load them, and make the state of `slots` slots. `backend.report` says what came of it.

    device: "cpu", "mlx" or "auto"; None takes the module's. zero_start: see `MimiEncoder`.
    Raises ConfigError for a device or dtype that cannot be, CheckpointError for files that do not fit the spec.
    """
    start = time.perf_counter()
    engine = module.engine
    target, notes = choose_device(device or engine.device)
    dtype = choose_dtype(module.dtype_override, target)
    kv_dtype = choose_kv_dtype(engine.kv_dtype, dtype)
    lm_plan, _ = plan_lm(lm_file, spec.lm)
    mimi_plan = plan_mimi(mimi_file, spec.mimi)
    scheme = choose_scheme(lm_plan, engine.quantize)
    notes += choose_mimi_precision(engine.mimi_dtype) + setting_notes(engine) + left_unpacked(lm_plan, scheme)
    # The CPU multiplies packed weights in float32 ten times as fast as in bfloat16.
    precision = Precision(dtype, dtype if is_gpu(target) else mx.float32, scheme)
    with mx.stream(target):
        lm_params = load_lm_params(lm_plan, spec.lm, precision)
        mimi_params = load_mimi_params(mimi_plan)
        lm = LanguageModel(spec.lm, lm_params, dtype, spec.condition)
        mimi = MimiEncoder(spec.mimi, mimi_params, zero_start=zero_start)
        state = make_state(spec, slots, kv_dtype)
        size = weight_bytes(lm_params) + weight_bytes(mimi_params)
        fixed_rows = _fixed_rows(target, lm, mimi) if engine.fixed_shapes else 0
    report = LoadReport(
        device=device_name(target),
        dtype=f"{scheme}, {DTYPE_NAMES[dtype]}" if scheme else DTYPE_NAMES[dtype],
        weight_bytes=size,
        slot_bytes=state.slot_bytes(),
        load_seconds=time.perf_counter() - start,
        notes=(*spec.notes, *notes, *room_note(target, state.slot_bytes(), slots, size)),
    )
    return MLXBackend(
        spec,
        lm,
        mimi,
        state,
        device=target,
        mimi_stream=None if is_gpu(target) else mx.new_stream(target),
        fixed_rows=fixed_rows,
        seed=seed,
        report=report,
    )


def rows_independent(lm: LanguageModel, mimi: MimiEncoder) -> bool:
    """Whether a row's result is the same to the last bit beside any other rows, as tried out on one product of each shape."""
    layer = lm.layers[0]
    of_lm = [layer.in_proj, layer.linear_in, layer.linear_out, lm.text_linear]
    of_mimi = [mimi.layers[0].linear1, mimi.quantizer.project, *(conv.product for conv in mimi.convs)]
    return all(is_row_independent(linear, lm.dtype) for linear in of_lm) and all(
        is_row_independent(linear, mx.float32) for linear in of_mimi
    )


def _fixed_rows(device: mx.Device, lm: LanguageModel, mimi: MimiEncoder) -> int:
    """Rows of every step under `fixed_shapes`; 0, any number, where rows are independent anyway."""
    if is_gpu(device):
        return FIXED_ROWS
    return 0 if rows_independent(lm, mimi) else 1
