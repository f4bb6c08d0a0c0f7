#!/usr/bin/env python3
"""One step of many streams with full contexts: ours beside PyPI `moshi`, the same random weights' shape, in one run.

    bench_step.py [--shape 1b|2.6b|tiny] [--rows 1,8,64,256,512,1024] [--kv auto,fp8] [--mimi f16] [--steps 40]
                  [--device auto] [--no-reference] [--agreement [SETTINGS]] [--out FILE]

For each number of active streams: Mimi, the language model and the whole step, ours and the reference's (its own streaming
classes and CUDA graphs, bf16 language model, float32 Mimi; left out where `moshi` is not installed), and their ratio. A
whole step of ours goes from samples in host memory to tokens in host memory; the reference's from samples on the device.
`alone` is one active stream of an engine of one slot, beside one active stream of as many slots as the largest row count.

--agreement: codes and tokens against the plain PyTorch path in float32 without TF32, on the same weights: first the
float32 kernels, then each faster setting; language models are led, each fed the plain path's tokens and codes.

Prints tables and, as its last line, one JSON document. Random weights say nothing about accuracy, and are all this
compares: the arithmetic of two programs.
"""

import argparse
import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import report
import torch
from random_weights import SHAPES, model_spec, random_lm, random_mimi

from moshi_stt.constants import FRAME_SAMPLES
from moshi_stt.models.torch_impl.attention import FP8
from moshi_stt.models.torch_impl.backend import TorchBackend
from moshi_stt.models.torch_impl.build import Options, fused_backend, make_state, plain_backend
from moshi_stt.models.torch_impl.device import (
    MimiDtype,
    choose_device,
    choose_dtype,
    choose_mimi_kv_dtype,
    device_name,
    without_kernels,
)

KV_DTYPES = {"bf16": torch.bfloat16, "f32": torch.float32, "fp8": FP8}


# ---- ours ------------------------------------------------------------------------------------------------------------------


def build(
    shape: str,
    device: torch.device,
    slots: int,
    kv: str = "auto",
    mimi: MimiDtype = "f16",
    dtype: torch.dtype | None = None,
    buckets: tuple[int, ...] | None = None,
    plain: bool = False,
) -> Any:
    """A warm backend of random weights: fused where that can run, unless `plain`."""
    dtype = dtype or choose_dtype(None, device)
    spec = model_spec(shape)
    with torch.inference_mode():
        params, mimi_params = random_lm(shape, dtype, device), random_mimi(spec.mimi, device)
    fused = not (plain or without_kernels(spec.lm, dtype, device))
    mimi_kv = choose_mimi_kv_dtype(mimi, fused=fused)
    state = make_state(spec, slots, dtype if kv == "auto" else KV_DTYPES[kv], device, mimi_kv)
    options = Options(mimi_dtype=mimi)
    if fused:
        backend: Any = fused_backend(spec, params, mimi_params, state, options, buckets=buckets)
    else:
        backend = plain_backend(spec, params, mimi_params, state, options)
    backend.warm_up()
    return backend


def fill(backend: Any) -> None:
    """Random keys and values everywhere, as if every stream had spoken for long."""
    for ring in (*backend.state.lm.rings, *backend.state.mimi.rings):
        for tensor in ring[:2]:
            if tensor.dtype is FP8:
                tensor.view(torch.uint8).random_(0, 0x70)
            else:
                tensor.normal_()
        for scales in ring[2:]:
            if scales is not None:
                scales.fill_(0.01)
    backend.fill_context()


def time_ours(backend: Any, rows: int, steps: int) -> dict[str, float]:
    """Milliseconds: median and 95th percentile of the whole step, and the parts on their own."""
    pcm = (np.random.default_rng(rows).standard_normal((rows, FRAME_SAMPLES)) * 0.2).astype(np.float32)
    slots, fresh = np.arange(rows, dtype=np.int64), np.zeros(rows, np.bool_)
    for _ in range(3):
        backend.step(pcm, slots, fresh)
    backend.fill_context()
    taken = []
    for _ in range(steps):
        begun = time.perf_counter()
        backend.step(pcm, slots, fresh)
        taken.append(1e3 * (time.perf_counter() - begun))
    lm, mimi = parts(backend, pcm, slots)
    return {"mimi": mimi, "lm": lm, "total": float(np.median(taken)), "p95": float(np.percentile(taken, 95))}


def parts(backend: Any, pcm_host: np.ndarray, slots_host: np.ndarray) -> tuple[float, float]:
    """Milliseconds of the language model and of Mimi, each alone on the device."""
    state, device = backend.state, backend.device
    with torch.inference_mode():
        pcm, slots = torch.from_numpy(pcm_host).to(device), torch.from_numpy(slots_host).to(device)
        frames = torch.full_like(slots, 800)
        if isinstance(backend, TorchBackend):
            return (
                time_call(lambda: backend.step_lm(frames, slots), device),
                time_call(lambda: backend.mimi.step(state.mimi, pcm, frames, slots), device),
            )

        def lm() -> None:
            x = backend.lm.embed(frames, slots, state.text, state.codes)
            backend.lm.step(state.lm, x, frames, slots, state.text)

        def mimi() -> None:
            backend.mimi.step(state.mimi, pcm, frames, slots, state.codes)

        return time_graph(lm, device), time_graph(mimi, device)


def time_graph(run: Callable[[], None], device: torch.device, times: int = 7) -> float:
    """Median milliseconds of `run` as a CUDA graph."""
    stream = torch.cuda.Stream(device)
    torch.cuda.synchronize(device)
    with torch.cuda.stream(stream):
        run()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        run()
    return time_call(graph.replay, device, times)


def time_call(run: Callable[[], Any], device: torch.device, times: int = 7) -> float:
    """Median milliseconds of a call, the device's work included."""
    taken = []
    for turn in range(times + 2):
        synchronize(device)
        begun = time.perf_counter()
        run()
        synchronize(device)
        if turn > 1:
            taken.append(1e3 * (time.perf_counter() - begun))
    return float(np.median(taken))


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


# ---- the reference -----------------------------------------------------------------------------------------------------------


class Reference:
    """PyPI `moshi`: `MimiModel` and `LMGen`, streaming."""

    def __init__(self, shape: str, device: torch.device, dtype: torch.dtype) -> None:
        """Raises ImportError where the package is not installed."""
        from moshi.models import loaders

        spec, _ = SHAPES[shape]
        self.device, self.spec = device, spec
        self.mimi = loaders.get_mimi(None, device=device, num_codebooks=spec.codebooks)
        self.mimi.load_state_dict(random_mimi(model_spec(shape).mimi, device), strict=False)
        self.lm = loaders.get_moshi_lm(None, reference_config(shape), device=device, dtype=dtype)

    def times(self, rows: int, steps: int, within_seconds: float = float("inf")) -> dict[str, float]:
        """Median milliseconds of Mimi, of the language model, and of both, one after the other.

        within_seconds: after so long no further step is timed, however few were; one is.
        """
        from moshi.models import LMGen

        pcm = torch.randn(rows, 1, FRAME_SAMPLES, device=self.device) * 0.2
        generator = LMGen(self.lm, temp=0, temp_text=0, use_sampling=False)
        with torch.no_grad(), self.mimi.streaming(rows), generator.streaming(rows):
            taken = []
            started = time.perf_counter()
            for turn in range(steps + 4):
                if turn == 3:
                    self._age()
                synchronize(self.device)
                begun = time.perf_counter()
                codes = self.mimi.encode(pcm)
                synchronize(self.device)
                between = time.perf_counter()
                generator.step(codes)
                synchronize(self.device)
                if turn >= 4:
                    taken.append((1e3 * (between - begun), 1e3 * (time.perf_counter() - between)))
                    if time.perf_counter() - started > within_seconds:
                        break
        mimi, lm = np.array(taken).T
        return {"mimi": float(np.median(mimi)), "lm": float(np.median(lm)), "total": float(np.median(mimi + lm))}

    def _age(self) -> None:
        """Set every position beyond the context: all of every ring is attended to."""
        for module in (*self.mimi.modules(), *self.lm.modules()):
            state = getattr(module, "_streaming_state", None)
            for name in ("offset", "offsets"):
                if isinstance(value := getattr(state, name, None), torch.Tensor):
                    value.fill_(800)
            if (cache := getattr(state, "kv_cache", None)) is not None:
                cache.end_offset.fill_(800)


def reference_config(shape: str) -> dict[str, Any]:
    """What `get_moshi_lm` takes for a named shape."""
    spec, _ = SHAPES[shape]
    config: dict[str, Any] = {
        "card": spec.audio_card,
        "n_q": spec.codebooks,
        "dep_q": 0,
        "delays": [0] * (spec.codebooks + 1),
        "dim": spec.dim,
        "text_card": spec.text_card,
        "existing_text_padding_id": 3,
        "num_heads": spec.heads,
        "num_layers": spec.layers,
        "hidden_scale": 4.125,
        "causal": True,
        "layer_scale": None,
        "context": spec.context,
        "max_period": spec.max_period,
        "gating": "silu",
        "norm": "rms_norm_f32",
        "positional_embedding": "rope",
        "depformer_dim": 1024,
        "depformer_num_heads": 16,
        "depformer_num_layers": 6,
        "depformer_dim_feedforward": None,
        "depformer_multi_linear": True,
        "depformer_pos_emb": "none",
        "depformer_weights_per_step": True,
    }
    if spec.extra_heads:
        config |= {"extra_heads_num_heads": spec.extra_heads, "extra_heads_dim": spec.extra_head_dim}
    return config


# ---- agreement ---------------------------------------------------------------------------------------------------------------


def agreement(
    shape: str, device: torch.device, frames: int = 60, streams: int = 8, wanted: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Codes and tokens of every setting, or of those `wanted`, against the plain path in float32, over streams that join one
    after the other.
    """
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
    settings: dict[str, dict[str, Any]] = {"float32": {"dtype": torch.float32, "mimi": "f32"}}
    if device.type == "cuda":
        settings |= {
            "tf32 Mimi": {"dtype": torch.float32, "mimi": "tf32"},
            "f16 Mimi": {"dtype": torch.float32, "mimi": "f16"},
            "bf16 Mimi": {"dtype": torch.float32, "mimi": "bf16"},
            "bf16 LM": {"dtype": torch.bfloat16, "mimi": "f32"},
            "bf16 LM, fp8 K/V": {"dtype": torch.bfloat16, "mimi": "f32", "kv": "fp8"},
        }
    settings = {name: setting for name, setting in settings.items() if not wanted or name in wanted}
    buckets = (streams,)
    plain = build(shape, device, streams, dtype=torch.float32, plain=True)
    found: dict[str, Any] = {}
    for name, setting in settings.items():
        other = build(shape, device, streams, buckets=buckets, **setting)
        found[name] = compare(plain, other, frames, streams)
        other.close()
        release(device)
    plain.close()
    return found


def compare(plain: Any, other: Any, frames: int, streams: int) -> dict[str, Any]:
    """Agreement of two backends, the other led by the plain one's tokens and codes."""
    rng = np.random.default_rng(0)
    books = plain.spec.lm.codebooks
    same_codes, same_tokens, count, worst = np.zeros(books, np.int64), 0, 0, 0.0
    for frame in range(frames):
        slots = np.arange(min(streams, 1 + frame // 2), dtype=np.int64)
        fresh = slots == frame / 2
        fresh[0] = frame == 0
        pcm = (rng.standard_normal((len(slots), FRAME_SAMPLES)) * 0.2).astype(np.float32)
        a, b = plain.step(pcm, slots, fresh), other.step(pcm, slots, fresh)
        index = torch.from_numpy(slots).to(plain.device)
        with torch.inference_mode():
            same_codes += (plain.state.codes[index] == other.state.codes[index]).sum(0).cpu().numpy()
            other.state.codes.copy_(plain.state.codes)
            other.state.text.copy_(plain.state.text)
        synchronize(plain.device)
        same_tokens += int((a.text_token == b.text_token).sum())
        worst = max(worst, float(np.abs(a.logprob - b.logprob)[a.text_token == b.text_token].max(initial=0.0)))
        count += len(slots)
    return {
        "frames": count,
        "codes_by_level": [round(float(n) / count, 5) for n in same_codes],
        "codes": round(float(same_codes.sum()) / count / books, 5),
        "tokens": round(same_tokens / count, 5),
        "worst_logprob_difference": worst,
    }


# ---- main --------------------------------------------------------------------------------------------------------------------


def measure(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Every row count: the reference first, then ours, each setting in turn."""
    rows = [int(part) for part in args.rows.split(",")]
    dtype = choose_dtype(None, device)
    result: dict[str, Any] = {"reference": {}, "ours": {}}
    if args.reference:
        try:
            reference = Reference(args.shape, device, dtype)
        except ImportError as error:
            result["reference_missing"] = str(error)
        else:
            for count in rows:
                try:
                    result["reference"][count] = reference.times(count, args.steps)
                except torch.OutOfMemoryError as error:
                    result["reference"][count] = {"error": str(error).splitlines()[0]}
                release(device)
            del reference
            release(device)
    for kv in args.kv.split(","):
        for mimi in args.mimi.split(","):
            name = f"kv {kv}, mimi {mimi}"
            result["ours"][name] = ours(args, device, rows, kv, mimi)
    alone = build(args.shape, device, 1, kv=args.kv.split(",")[0], mimi=args.mimi.split(",")[0])
    fill(alone)
    result["alone"] = time_ours(alone, 1, args.steps)
    alone.close()
    release(device)
    return result


def ours(args: argparse.Namespace, device: torch.device, rows: list[int], kv: str, mimi: str) -> dict[Any, Any]:
    """Times by row count, of one backend with as many slots as the largest count that memory has room for."""
    found: dict[Any, Any] = {}
    left = list(rows)
    while left:
        try:
            backend = build(args.shape, device, max(left), kv=kv, mimi=mimi, buckets=tuple(left))
            break
        except torch.OutOfMemoryError as error:
            found[left.pop()] = {"error": str(error).splitlines()[0]}
            release(device)
    with torch.inference_mode():
        fill(backend)
    for count in left:
        found[count] = time_ours(backend, count, args.steps)
    found["slots"] = max(left)
    backend.close()
    release(device)
    return found


def show(result: dict[str, Any]) -> None:
    reference = result["reference"]
    for name, table in result["ours"].items():
        print(f"\n{result['shape']}, {name}, {table['slots']} slots, ms a step")
        print(
            f"{'rows':>6} | {'Mimi':>7} {'LM':>7} {'total':>7} {'p95':>7} | {'ref Mimi':>8} {'ref LM':>7} {'total':>7} | ratio"
        )
        for count, own in table.items():
            if count == "slots":
                continue
            other = reference.get(count, {})
            if "error" in own:
                print(f"{count:>6} | {own['error']}")
                continue
            line = f"{count:>6} | {own['mimi']:7.2f} {own['lm']:7.2f} {own['total']:7.2f} {own['p95']:7.2f} | "
            if "total" in other:
                line += f"{other['mimi']:8.2f} {other['lm']:7.2f} {other['total']:7.2f} | {other['total'] / own['total']:.2f}"
            print(line)
    if "alone" in result:
        print(f"\none stream of one slot: {result['alone']['total']:.2f} ms")
    for name, found in result.get("agreement", {}).items():
        print(f"{name}: codes {100 * found['codes']:.2f} %, tokens {100 * found['tokens']:.2f} % of {found['frames']} frames")
        print("   by level: " + " ".join(f"{100 * share:.1f}" for share in found["codes_by_level"]))


def measured_on(device: torch.device) -> dict[str, Any]:
    """What is measured, and on which device."""
    return {"device": device_name(device), "torch": torch.__version__, "weights": "random", "context": "full"}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=tuple(SHAPES), default="1b")
    parser.add_argument("--rows", default="1,8,64,256,512,1024")
    parser.add_argument("--kv", default="auto")
    parser.add_argument("--mimi", default="f16")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--no-reference", dest="reference", action="store_false")
    parser.add_argument("--no-times", dest="times", action="store_false")
    parser.add_argument("--agreement", nargs="?", const="", help="with names of settings, comma between: those alone")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    device, _ = choose_device(args.device)
    result: dict[str, Any] = {"shape": args.shape, **measured_on(device), "reference": {}, "ours": {}}
    if args.times:
        result |= measure(args, device)
    if args.agreement is not None:
        result["agreement"] = agreement(args.shape, device, wanted=tuple(filter(None, args.agreement.split(","))))
    show(result)
    report.finish("step", result, args.out)


if __name__ == "__main__":
    main()
