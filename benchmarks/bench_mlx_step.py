#!/usr/bin/env python3
"""One step on this machine's MLX: milliseconds by precision and rows, what empty slots cost, and memory. Random weights.

    bench_mlx_step.py [--device mlx|cpu] [--shape 1b|2.6b|tiny] [--schemes f32,bf16,int8,int4] [--rows 1,4,16] [--frames 30]

For each scheme (int8 and int4 with the device's usual activations) a model of that shape is made on the device, and stepped:
`slots N` has one active stream among N slots, at its full context; then 4 and 16 streams step together. Memory is MLX's own
count: at rest, after the first frame, and with one stream at its full context. Prints a table, then one line of JSON.
"""

import argparse
import sys
import time
from typing import Any

import mlx.core as mx
import numpy as np
import report

from moshi_stt.constants import FRAME_SAMPLES
from moshi_stt.models.affine import choose_packing
from moshi_stt.models.mlx_impl.backend import MLXBackend
from moshi_stt.models.mlx_impl.build import make_state
from moshi_stt.models.mlx_impl.device import DTYPES, choose_device, choose_dtype, device_name, is_gpu
from moshi_stt.models.mlx_impl.linear import PackedWeight, Weight
from moshi_stt.models.mlx_impl.lm import LanguageModel
from moshi_stt.models.mlx_impl.mimi import MimiEncoder
from moshi_stt.models.spec import LMSpec, MimiSpec, ModelSpec
from moshi_stt.models.weights import lm_table, mimi_table

SHAPES = {
    "1b": (LMSpec(2_048, 16, 16, 750, 100_000.0, 8_000, 32, extra_heads=4), 5_632),
    "2.6b": (LMSpec(2_048, 32, 48, 375, 100_000.0, 4_000, 32), 5_632),
    "tiny": (LMSpec(256, 4, 4, 50, 100_000.0, 64, 8, extra_heads=4), 704),
}


def make_backend(spec: ModelSpec, hidden: int, slots: int, scheme: str, device: mx.Device) -> MLXBackend:
    """A model of random weights. scheme: a dtype, or int8 or int4."""
    dtype = DTYPES.get(scheme) or choose_dtype(None, device)
    params: dict[str, Weight] = {}

    def add(name: str, table_name: str, shape: tuple[int, ...]) -> None:
        is_matrix = len(shape) == 2
        scale = shape[-1] ** -0.5 if is_matrix else 0.0
        values = (mx.random.normal(shape) * scale + (not is_matrix)).astype(dtype if is_matrix else mx.float32)
        packing = choose_packing(table_name, shape, scheme) if scheme in ("int8", "int4") else None  # type: ignore[arg-type]
        if packing is None:
            params[name] = values
        else:
            packed = mx.quantize(values, group_size=packing.group_size, bits=packing.bits)
            precision = dtype if is_gpu(device) else mx.float32
            params[name] = PackedWeight(packed[0], packed[1].astype(precision), packed[2].astype(precision), packing)
        mx.eval([part for part in params[name] if isinstance(part, mx.array)] if packing else params[name])

    with mx.stream(device):
        lm = spec.lm
        add("embeddings", "emb.0.weight", (lm.text_card + 1 + lm.codebooks * (lm.audio_card + 1), lm.dim))
        if lm.extra_heads:
            add("extra_heads", "extra_heads.0.weight", (lm.extra_heads * lm.extra_head_dim, lm.dim))
        for param in lm_table(lm, hidden):
            if not param.name.startswith(("emb.", "text_emb.", "extra_heads.")):
                add(param.name, param.name, param.shape)
        mimi = {param.name: mx.random.normal(param.shape) * 0.05 + 0.01 for param in mimi_table(spec.mimi)}
        mx.eval(mimi)
        made = MLXBackend(
            spec,
            LanguageModel(lm, params, dtype),
            MimiEncoder(spec.mimi, mimi),
            make_state(spec, slots, dtype),
            device=device,
            mimi_stream=None if is_gpu(device) else mx.new_stream(device),
        )
        mx.clear_cache()
    return made


def fill(backend: MLXBackend, rows: int) -> None:
    """Put streams where their windows are full."""
    state, spec = backend.state, backend.spec
    state.frames[:rows] = max(spec.lm.context, spec.mimi.context)
    with mx.stream(backend.device):
        for ring in state.rings:
            for slot in range(rows):
                ring.entries[slot] = mx.zeros((2, ring.heads, ring.context, ring.head_dim), ring.dtype)
        mx.eval([ring.entries[:rows] for ring in state.rings])


def step_ms(backends: list[MLXBackend], rows: int, frames: int) -> list[float]:
    """Median milliseconds of each backend's step of so many streams whose windows are full. The backends take turns."""
    rng, times = np.random.default_rng(0), np.zeros((frames + 2, len(backends)))
    for backend in backends:
        fill(backend, rows)
    for n in range(frames + 2):
        pcm = rng.uniform(-0.3, 0.3, (rows, FRAME_SAMPLES)).astype(np.float32)
        for i, backend in enumerate(backends):
            start = time.perf_counter()
            backend.step(pcm, np.arange(rows), np.zeros(rows, bool))
            times[n, i] = time.perf_counter() - start
    return (np.median(times[2:], axis=0) * 1e3).tolist()


def measure(spec: ModelSpec, hidden: int, scheme: str, device: mx.Device, rows: list[int], frames: int) -> dict[str, Any]:
    one = make_backend(spec, hidden, 1, scheme, device)
    memory = [mx.get_active_memory()]
    one.step(np.zeros((1, FRAME_SAMPLES), np.float32), np.array([0]), np.array([True]))
    memory.append(mx.get_active_memory())
    fill(one, 1)
    memory.append(mx.get_active_memory())
    with mx.stream(device):
        many = MLXBackend(
            spec,
            one.lm,
            one.mimi,
            make_state(spec, max(64, *rows), one.lm.dtype),
            device=device,
            mimi_stream=None if is_gpu(device) else mx.new_stream(device),
        )
    slots_ms = dict(zip(("1", "64"), step_ms([one, many], 1, frames), strict=True))
    rows_ms = {str(count): step_ms([many], count, frames)[0] for count in rows if count > 1}
    one.close()
    many.close()
    names = ("rest_mb", "first_frame_mb", "full_stream_mb")
    return {
        "scheme": scheme,
        "slots_ms": slots_ms,
        "rows_ms": rows_ms,
        **{name: round(value / 1e6) for name, value in zip(names, memory, strict=True)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["mlx", "cpu"], default="mlx")
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--schemes", default="f32,bf16,int8,int4")
    parser.add_argument("--rows", default="1,4,16")
    parser.add_argument("--frames", type=int, default=30)
    args = parser.parse_args()
    device, notes = choose_device(args.device)
    lm, hidden = SHAPES[args.shape]
    spec, rows = ModelSpec(lm, MimiSpec(codebooks=lm.codebooks), 6), [int(count) for count in args.rows.split(",")]
    print(f"{device_name(device)}, mlx {mx.__version__}, {args.shape}, ms a step at full context", *notes, sep="; ")
    together = "".join(f"{f'rows {count}':>10}" for count in rows if count > 1)
    print(f"{'scheme':8}{'slots 1':>10}{'slots 64':>10}{together}   MB at rest, first frame, full stream")
    results = []
    for scheme in args.schemes.split(","):
        result = measure(spec, hidden, scheme, device, rows, args.frames)
        results.append(result)
        times = [*result["slots_ms"].values(), *result["rows_ms"].values()]
        sizes = [str(result[name]) for name in ("rest_mb", "first_frame_mb", "full_stream_mb")]
        print(f"{scheme:8}" + "".join(f"{ms:10.1f}" for ms in times) + "   " + ", ".join(sizes), flush=True)
    result = {
        "device": device_name(device),
        "mlx": mx.__version__,
        "shape": args.shape,
        "weights": "random",
        "results": results,
    }
    report.finish("mlx_step", result)


if __name__ == "__main__":
    sys.exit(main())
