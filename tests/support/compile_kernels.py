"""Compile every Triton kernel for GPUs that are not there, at every tile that would be chosen on them.

    python -m tests.support.compile_kernels 8.0 8.9 [--all] [--threads 2]

The published models' steps are run on the meta device, where nothing is computed, and their launches read. Each distinct one is
compiled as Triton would compile it at its first launch: the same types, the same constants, the same divisibility. Prints one
line of JSON for each: capability, kernel, its constants, bytes of shared memory, loops; `limit` is what the card has. Without
--all only the launch of each kernel that asks for most, and that with most columns at once. To be run in a process of its own,
since Triton decides at import whether it interprets.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from moshi_stt.models.spec import LMSpec, MimiSpec, ModelSpec
from moshi_stt.models.torch_impl.attention import FP8
from moshi_stt.models.torch_impl.backend import make_state
from moshi_stt.models.torch_impl.cuda import limits as limits_module
from moshi_stt.models.torch_impl.cuda.compile import identity, lighter
from moshi_stt.models.torch_impl.cuda.elementwise import advance
from moshi_stt.models.torch_impl.cuda.launch import Launch, instead
from moshi_stt.models.torch_impl.cuda.limits import SHARED_BYTES, Limits
from moshi_stt.models.torch_impl.cuda.lm import FusedLM
from moshi_stt.models.torch_impl.cuda.mimi import PRECISIONS, FusedMimi
from moshi_stt.models.torch_impl.device import MimiDtype, choose_mimi_kv_dtype
from moshi_stt.models.torch_impl.graphs import bucket_sizes
from moshi_stt.models.torch_impl.loader import allocate_lm
from moshi_stt.models.weights import mimi_table

META = torch.device("meta")

MODELS = {
    "1b": (LMSpec(2048, 16, 16, 750, 1e5, 8000, 32, extra_heads=4), 5632),
    "2.6b": (LMSpec(2048, 32, 48, 375, 1e5, 4000, 32), 5632),
    "phrases": (LMSpec(256, 4, 4, 125, 1e5, 448, 8, 256, extra_heads=4), 672),
}
"""Language models, the two published ones and that of the package, and their gates' hidden sizes."""

ENCODERS = {"phrases": MimiSpec(8, 256, 64, 128, 2, 3, 512, channels=(16, 32, 64, 128, 256))}
"""Where it is not Mimi as published."""


class Absent:
    """Stands for the driver of a GPU that is not there."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch

    def get_current_stream(self, device: int) -> int:
        return 0


def launches(
    model: str, *, dtype: torch.dtype, kv: torch.dtype, mimi: MimiDtype, limits: Limits, most: int = 2_048
) -> Iterator[Launch]:
    """Every launch of a step of each bucket up to `most` rows, on a GPU of these limits. One layer stands for all."""
    lm_spec, hidden = MODELS[model]
    lm_spec = replace(lm_spec, layers=2)
    encoder = ENCODERS.get(model, MimiSpec(codebooks=lm_spec.codebooks))
    spec = ModelSpec(lm=lm_spec, mimi=encoder, delay_frames=6)
    params, _ = allocate_lm(lm_spec, hidden, dtype, META)
    lm = FusedLM(lm_spec, params)
    shapes = {param.name: param.shape for param in mimi_table(spec.mimi)}
    fused = FusedMimi(spec.mimi, {name: torch.empty(shape, device=META) for name, shape in shapes.items()}, PRECISIONS[mimi])
    state = make_state(spec, 8, kv, META, choose_mimi_kv_dtype(mimi, fused=True))
    found: list[Launch] = []
    limits_module.pretended_limits = lambda: limits  # type: ignore[assignment]
    for rows in bucket_sizes(most):
        with torch.inference_mode(), instead(found.append):
            slots, fresh = torch.empty(rows, dtype=torch.int64, device=META), torch.empty(rows, dtype=torch.uint8, device=META)
            frames = advance(slots, fresh, state.frames)
            x = lm.embed(frames, slots, state.text, state.codes)
            pcm = torch.empty(rows, spec.mimi.frame_samples, device=META)
            fused.step(state.mimi, pcm, frames, slots, state.codes)
            lm.step(state.lm, x, frames, slots, state.text)
    yield from found


def size(launch: Launch) -> int:
    """How much a launch asks for, as far as its constants tell: to find the largest."""
    options = launch.options
    stages = options.get("STAGES", options.get("num_stages", 1))
    block = max(1, options.get("BLOCK", 1)) * options.get("D", 1)
    tile = (options.get("BM", options.get("BR", 0)) + options.get("BN", 0)) * options.get("BK", 1)
    return int(stages * (block + tile))


def depth(launch: Launch) -> int:
    """Columns that a launch multiplies at once."""
    return int(launch.options.get("BK", 0))


def thinness(launch: Launch) -> int:
    """The least side of a launch's blocks, negated."""
    return -min((launch.options[name] for name in ("BM", "BR", "BN", "BK", "HIDDEN", "D") if name in launch.options), default=0)


def chosen(limits: Limits, *, every: bool) -> list[Launch]:
    """The distinct launches on a GPU: all, or each kernel's largest, deepest and thinnest by its first argument's dtype."""
    found: dict[tuple[Any, ...], Launch] = {}
    kinds = [torch.bfloat16, torch.float32, *([FP8] if limits.capability >= (8, 9) else [])]
    for model in MODELS:
        for kv in kinds:
            for mimi in ("f16", "tf32", "bf16", "f32"):
                if mimi != "f16" and kv is not torch.bfloat16:
                    continue
                dtype = torch.float32 if kv is torch.float32 else torch.bfloat16
                for launch in launches(model, dtype=dtype, kv=kv, mimi=mimi, limits=limits):
                    found.setdefault(identity(launch), launch)
    if every:
        return list(found.values())
    most: dict[tuple[Any, ...], Launch] = {}
    for measure in (size, depth, thinness):
        for launch in found.values():
            key = launch.kernel, str(launch.arguments[0].dtype), measure
            if key not in most or measure(launch) > measure(most[key]):
                most[key] = launch
    return list({identity(launch): launch for launch in most.values()}.values())


def compile_launch(launch: Launch) -> tuple[int, int]:
    """Bytes of shared memory of the compiled kernel, and the loops that it has."""
    launch = lighter(launch)
    kernel = launch.kernel.warmup(*launch.arguments, grid=launch.grid, **launch.options)
    return int(kernel.metadata.shared), kernel.asm["ttir"].count("scf.for")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("capability", nargs="+")
    parser.add_argument("--all", action="store_true", dest="every")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    failed = 0
    for text in args.capability:
        major, minor = (int(part) for part in text.split("."))
        limits = Limits((major, minor), SHARED_BYTES[major, minor])
        driver.set_active(Absent(GPUTarget("cuda", 10 * major + minor, 32)))
        work = chosen(limits, every=args.every)
        with ThreadPoolExecutor(args.threads) as pool:
            for launch, done in [(launch, pool.submit(compile_launch, launch)) for launch in work]:
                line: dict[str, Any] = {"capability": text, "kernel": launch.kernel.__name__, "limit": limits.shared_bytes}
                line["constants"] = {name: str(value) for name, value in launch.options.items()}
                try:
                    line["shared"], line["loops"] = done.result()
                    failed += line["shared"] > limits.shared_bytes
                except Exception as error:
                    line["error"] = f"{type(error).__name__}: {error}"[:500]
                    failed += 1
                print(json.dumps(line), flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    assert triton.__version__
    sys.exit(main())
