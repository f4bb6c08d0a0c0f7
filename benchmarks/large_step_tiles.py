"""Tiles of a large step's kernels on a GPU, for `bench_large_step.py`: both attentions, and Mimi's products in float16."""

import itertools
from collections.abc import Callable
from typing import Any

import torch
from bench_tiles import microseconds

from moshi_stt.models.spec import MimiSpec
from moshi_stt.models.torch_impl.attention import FP8, make_ring
from moshi_stt.models.torch_impl.cuda import attention as attentions
from moshi_stt.models.torch_impl.cuda import conv as kernels
from moshi_stt.models.torch_impl.cuda.attention import Tiling, choose_tiling, ring_attention
from moshi_stt.models.torch_impl.cuda.compile import Compiler, finish
from moshi_stt.models.torch_impl.cuda.elementwise import add_rms
from moshi_stt.models.torch_impl.cuda.limits import limits_of
from moshi_stt.models.torch_impl.cuda.product import Tile, joined_product, sliced_product


def _without_fallback() -> None:
    """A tile that cannot run raises, and PyTorch's own operations do not take the place of those after it."""
    for module in (attentions, kernels):
        module.attempt = lambda name, kernel, plain: kernel()  # type: ignore[attr-defined]


def attention(rows: int) -> dict[str, Any]:
    """Both attentions of a large step at other tilings: microseconds and TB/s of the ring."""
    _without_fallback()
    device = torch.device("cuda")
    result: dict[str, Any] = {}
    cases = {
        "Mimi f16": (8, 250, 64, 2, torch.float16, torch.float16),
        "Mimi f32": (8, 250, 64, 2, torch.float32, torch.float32),
        "LM fp8": (16, 750, 128, 1, FP8, torch.bfloat16),
    }
    for name, (heads, context, dim, t, kind, dtype) in cases.items():
        rings = [make_ring(rows, heads, context, dim, kind, device) for _ in range(3)]
        for ring in rings:
            for tensor in ring:
                if tensor is not None:
                    tensor.view(torch.uint8).zero_() if tensor.dtype is FP8 else tensor.fill_(0.01)
        for count in (rows, rows // 2):
            qkv = torch.randn(count, t, 3, heads, dim, device=device).to(dtype)
            cos = torch.ones(count, t, dim // 2, device=device)
            slots, at = torch.arange(count, device=device), torch.full((count,), 10 * context, device=device)
            chosen = choose_tiling(count, heads, context, dim, kind, limits_of(device))
            tilings = [chosen]
            if kind is not torch.float32:
                blocks, stages = ((32, 64, 128, 256), (1, 2, 3)) if t == 2 else ((32, 64, 128), (2, 3, 4, 5))
                tilings += [Tiling(1, b, w, s) for b, w, s in itertools.product(blocks, (1, 2, 4), stages)]
            compiler = Compiler(device)
            runs = {
                tiling: (lambda i, tiling=tiling, q=qkv, c=cos, s=slots, p=at, r=rings:
                         ring_attention(q, c, c, r[i % 3], s, p, tiling=tiling))
                for tiling in dict.fromkeys(tilings)
            }  # fmt: skip
            with torch.inference_mode():
                finish([future for run in runs.values() for future in compiler.read(lambda run=run: run(0))])
                lines = []
                for tiling, run in runs.items():
                    try:
                        us = microseconds(run, 3, device)
                    except Exception as error:
                        lines.append({"tiling": tiling, "error": str(error)[:100]})
                        continue
                    numbers = 2 * count * heads * context * dim * rings[0].k.element_size()
                    lines.append(
                        {"tiling": tiling, "us": round(us, 1), "TBps": round(numbers / us / 1e6, 2), "chosen": tiling == chosen}
                    )
            lines.sort(key=lambda line: line.get("us", 1e9))
            result[f"{name}, {count} rows"] = lines
            print(f"\n{name}, {count} rows (splits, block, warps, stages)")
            for line in [x for x in lines if x.get("chosen")] + lines[:6]:
                print(f"{line.get('us', 0):9.1f} us {line.get('TBps', 0):6.2f} TB/s  {tuple(line['tiling'])}"
                      + (" chosen" if line.get("chosen") else ""), flush=True)  # fmt: skip
            compiler.close()
        del rings, runs
        torch.cuda.empty_cache()
    return result


CONV_TILES = [
    (64, 64, 64, 4, 3), (64, 64, 64, 4, 4), (64, 128, 64, 4, 3), (128, 64, 64, 4, 3), (128, 64, 64, 4, 4), (128, 64, 32, 4, 4),
    (128, 128, 64, 4, 3), (128, 128, 64, 8, 3), (128, 128, 64, 8, 4), (128, 128, 32, 4, 4),
    (128, 256, 64, 8, 3), (256, 64, 64, 8, 3), (256, 128, 64, 8, 3), (128, 128, 128, 8, 2), (128, 64, 128, 4, 3),
]  # fmt: skip
RESIDUAL_TILES = [
    (64, 64, 64, 4, 3), (32, 64, 64, 4, 3), (64, 64, 32, 4, 3), (128, 64, 64, 4, 3), (128, 64, 64, 8, 3),
    (128, 64, 32, 4, 4), (64, 64, 64, 4, 2), (64, 64, 64, 2, 3), (64, 32, 64, 4, 3), (128, 32, 64, 8, 3), (64, 64, 64, 8, 3),
]  # fmt: skip


def convs(rows: int) -> dict[str, Any]:
    """Mimi's products at `rows` rows in float16: microseconds at each tile, and whether a bit differs from the chosen one's."""
    _without_fallback()
    device, half = torch.device("cuda"), torch.float16
    spec = MimiSpec()
    result: dict[str, Any] = {}
    cases: dict[str, tuple[Callable[[Any], torch.Tensor], list[tuple[int, ...]]]] = {}

    def draw(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, device=device) * 0.05).to(half)

    def add(name: str, t: int, stride: int, context: int, c: int, n: int, elu_in: bool, shortcut: bool) -> None:
        x, weight, bias = draw(rows, context + t * stride, c), draw(n, (context + stride) * c), torch.zeros(n, device=device)
        out, short = torch.empty(rows, t, n, dtype=half, device=device), draw(rows, t, n) if shortcut else None

        def run(tile: Any) -> torch.Tensor:
            kernels.conv(x, weight, bias, out, precision="tf32", stride=stride, elu_in=elu_in, shortcut=short, tile=tile)
            return out

        cases[name] = run, [tile for tile in CONV_TILES if n % tile[1] == 0 and weight.shape[1] % tile[2] == 0]

    steps = spec.frame_samples
    for level, stride in enumerate(spec.strides):
        c, n = spec.channels[level], spec.channels[level + 1]
        if c <= 128:
            x, w1, w2 = draw(rows, 2 + steps, c), draw(c // 2, 3 * c), draw(c, c // 2)
            b1, b2 = torch.zeros(c // 2, device=device), torch.zeros(c, device=device)
            out = torch.empty(rows, steps, c, dtype=half, device=device)

            def run(tile: Any, x=x, w1=w1, b1=b1, w2=w2, b2=b2, out=out) -> torch.Tensor:  # type: ignore[no-untyped-def]
                kernels.residual(x, w1, b1, w2, b2, out, precision="tf32", kept=0, tile=tile)
                return out

            cases[f"residual of {c}"] = run, RESIDUAL_TILES
        else:
            add(f"residual 3 of {c}", steps, 1, 2, c, c // 2, True, False)
            add(f"residual 1 of {c}", steps, 1, 0, c // 2, c, False, True)
        add(f"strided of {c}", steps // stride, stride, stride, c, n, False, False)
        steps //= stride
    add("last", 2, 1, 2, 1_024, 512, False, False)
    for name, (n, c) in {
        "in_proj": (1_536, 512),
        "out_proj": (512, 512),
        "linear1": (2_048, 512),
        "linear2": (512, 2_048),
    }.items():
        add(name, 2, 1, 0, c, n, False, False)
    compiler = Compiler(device)
    with torch.inference_mode():
        everything = [
            (name, run, None if tile is None else kernels.Tile(*tile))
            for name, (run, tiles) in cases.items()
            for tile in (None, *tiles)
        ]
        futures = [f for _, run, tile in everything for f in compiler.read(lambda run=run, tile=tile: run(tile))]
        finish(futures)
        wanted: dict[str, torch.Tensor] = {}
        for name, run, tile in everything:
            try:
                bits = run(tile).clone()
                us = microseconds(lambda i, run=run, tile=tile: run(tile), 3, device)
            except Exception as error:
                result.setdefault(name, []).append({"tile": tile, "error": str(error)[:100]})
                continue
            differ = int((bits != wanted.setdefault(name, bits)).sum())
            result.setdefault(name, []).append({"tile": tile, "us": round(us, 1), "differ": differ})
    for name, lines in result.items():
        good = sorted((line for line in lines if "us" in line), key=lambda line: line["us"])
        chosen = next((line["us"] for line in lines if line["tile"] is None and "us" in line), 0.0)
        print(f"{name:20} chosen {chosen:8.1f} us   best " + "   ".join(
            f"{line['us']:.1f} {'chosen' if line['tile'] is None else tuple(line['tile'])}"
            + (f" ({line['differ']} DIFFER)" if line["differ"] else "") for line in good[:4]))  # fmt: skip
    return result


JOINED_TILES = [
    Tile(128, 128, 64, 8, 4), Tile(128, 128, 64, 8, 3), Tile(128, 128, 64, 4, 3), Tile(128, 64, 64, 4, 4),
    Tile(64, 128, 64, 4, 4), Tile(128, 64, 64, 8, 4), Tile(64, 64, 64, 4, 5),
]  # fmt: skip


def slices(rows: int) -> dict[str, Any]:
    """The language model's sliced products with the norm that adds their parts up, against one program for all slices."""
    device = torch.device("cuda")
    result: dict[str, Any] = {}
    compiler = Compiler(device)
    for name, (n, k) in {"out_proj": (2_048, 2_048), "linear_out": (2_048, 5_632)}.items():
        weights = (torch.randn(8, n, k, device=device) * 0.02).bfloat16()
        for count in (rows, rows // 2):
            x, alpha = torch.randn(count, k, device=device).bfloat16(), torch.ones(n, device=device)
            carried = torch.zeros(count, n, device=device).bfloat16()
            runs: dict[str, Callable[[int], torch.Tensor]] = {
                "parts": lambda i, x=x, w=weights, c=carried, a=alpha: add_rms(c, sliced_product(x, w[i % 8]), a, 1e-8)
            }  # type: ignore[dict-item]
            for tile in JOINED_TILES:
                runs[str(tuple(tile))] = lambda i, x=x, w=weights, c=carried, a=alpha, tile=tile: add_rms(
                    c, joined_product(x, w[i % 8], tile), a, 1e-8
                )  # type: ignore[misc]
            finish([f for run in runs.values() for f in compiler.read(lambda run=run: run(0))])
            wanted: torch.Tensor | None = None
            lines = []
            for how, run in runs.items():
                try:
                    carried.zero_()
                    bits = run(0).clone()
                    us = microseconds(run, 8, device)
                except Exception as error:
                    lines.append({"how": how, "error": str(error)[:100]})
                    continue
                wanted = bits if wanted is None else wanted
                lines.append({"how": how, "us": round(us, 1), "differ": int((bits != wanted).sum())})
            result[f"{name}, {count} rows"] = lines
            print(f"{name:10} {count:5} rows, with the norm: " + "   ".join(
                f"{x['how']} {x['us']} us" + (f" ({x['differ']} DIFFER)" if x["differ"] else "") for x in lines if "us" in x),
                flush=True)  # fmt: skip
    return result
