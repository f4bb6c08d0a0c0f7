"""Tiles of a large step's kernels on a GPU, for `bench_large_step.py`: attentions, quantiser, Mimi's products in float16."""

import itertools
from collections.abc import Callable
from typing import Any

import torch
from bench_tiles import microseconds

from moshi_stt.models.spec import MimiSpec
from moshi_stt.models.torch_impl.attention import FP8, make_ring
from moshi_stt.models.torch_impl.cuda import attention as attentions
from moshi_stt.models.torch_impl.cuda import conv as kernels
from moshi_stt.models.torch_impl.cuda import quantiser as quantisers
from moshi_stt.models.torch_impl.cuda.attention import Tiling, choose_tiling, ring_attention
from moshi_stt.models.torch_impl.cuda.compile import Compiler, finish
from moshi_stt.models.torch_impl.cuda.limits import limits_of
from moshi_stt.models.torch_impl.cuda.quantiser import make_books, quantise

DEVICE = torch.device("cuda")


def _without_fallback() -> None:
    """A tile that cannot run raises, and PyTorch's own operations do not take the place of those after it."""
    for module in (attentions, kernels, quantisers):
        module.attempt = lambda name, kernel, plain: kernel()  # type: ignore[attr-defined]


ATTENTIONS = {
    "Mimi f16": (8, 250, 64, 2, torch.float16, torch.float16),
    "LM fp8": (16, 750, 128, 1, FP8, torch.bfloat16),
    "LM bf16": (16, 750, 128, 1, torch.bfloat16, torch.bfloat16),
}
"""Heads, context, dim, positions a step, dtype of the ring and of the products."""

BLOCKS = ((32, 1), (32, 2), (64, 1), (64, 2), (64, 4))
"""Ring entries and warps."""


def _attend(name: str, counts: list[int], tilings: Callable[[int], list[Tiling]]) -> dict[int, list[dict[str, Any]]]:
    """Microseconds and TB/s of the ring for each count of rows at each of its tilings, the quickest first."""
    heads, context, dim, t, kind, dtype = ATTENTIONS[name]
    device, most = DEVICE, max(counts)
    rings = [make_ring(most, heads, context, dim, kind, device) for _ in range(3)]
    for ring in rings:
        for tensor in ring:
            if tensor is not None:
                tensor.view(torch.uint8).zero_() if tensor.dtype is FP8 else tensor.fill_(0.01)
    compiler = Compiler(device)
    runs: dict[tuple[int, Tiling], Callable[[int], torch.Tensor]] = {}
    for count in counts:
        qkv = torch.randn(count, t, 3, heads, dim, device=device).to(dtype)
        cos = torch.ones(count, t, dim // 2, device=device)
        slots, at = torch.arange(count, device=device), torch.full((count,), 10 * context, device=device)
        for tiling in dict.fromkeys(tilings(count)):
            runs[count, tiling] = (lambda i, tiling=tiling, q=qkv, c=cos, s=slots, p=at:  # type: ignore[misc]
                                   ring_attention(q, c, c, rings[i % 3], s, p, tiling=tiling))  # fmt: skip
    finish([future for run in runs.values() for future in compiler.read(lambda run=run: run(0))])  # type: ignore[misc]
    found: dict[int, list[dict[str, Any]]] = {count: [] for count in counts}
    for (count, tiling), run in runs.items():
        try:
            us = microseconds(run, 3, device)
        except Exception as error:
            found[count].append({"tiling": tiling, "error": str(error)[:100]})
            continue
        rate = 2 * count * heads * context * dim * rings[0].k.element_size() / us / 1e6
        chosen = tiling == choose_tiling(count, heads, context, dim, kind, limits_of(device))
        found[count].append({"tiling": tiling, "us": round(us, 1), "TBps": round(rate, 2), "chosen": chosen})
    compiler.close()
    for lines in found.values():
        lines.sort(key=lambda line: line.get("us", 1e9))
    return found


def attention(rows: int) -> dict[str, Any]:
    """Both attentions at the blocks that are chosen and at others, for few rows and many."""
    _without_fallback()
    counts = [n for n in (1, 2, 8, 32, 64, 128, 256, 512) if n < rows] + [rows]
    result: dict[str, Any] = {}
    for name, (heads, context, dim, _, kind, _) in ATTENTIONS.items():

        def tilings(count: int) -> list[Tiling]:
            found, chosen = [], attentions._BLOCKS[kind]  # noqa: B023
            for block in (chosen, *BLOCKS):
                attentions._BLOCKS[kind] = block  # noqa: B023
                tiling = choose_tiling(count, heads, context, dim, kind, limits_of(DEVICE))  # noqa: B023
                found += [tiling, *([tiling._replace(stages=stages) for stages in (2, 3)] if tiling.splits == 1 else [])]
            attentions._BLOCKS[kind] = chosen  # noqa: B023
            return found

        with torch.inference_mode():
            result[name] = _attend(name, counts, tilings)
        torch.cuda.empty_cache()
        print(f"{name}: us (splits, block, warps, stages), the chosen one first")
        for count, lines in result[name].items():
            lines = [line for line in lines if line.get("chosen")] + [line for line in lines if not line.get("chosen")]
            print(f"{count:5} " + "  ".join(f"{x['us']:.1f} {tuple(x['tiling'])}" for x in lines[:4] if "us" in x), flush=True)
    return result


def tilings(rows: int) -> dict[str, Any]:
    """All tilings of the attentions of a large step and of half of one."""
    _without_fallback()
    result: dict[str, Any] = {}
    for name, (heads, context, dim, t, kind, _) in ATTENTIONS.items():
        blocks, stages = ((32, 64, 128, 256), (1, 2, 3)) if t == 2 else ((32, 64, 128), (2, 3, 4, 5))
        tried = [Tiling(1, b, w, s) for b, w, s in itertools.product(blocks, (1, 2, 4), stages)]
        with torch.inference_mode():
            result[name] = _attend(
                name,
                [rows, rows // 2],
                lambda count: [choose_tiling(count, heads, context, dim, kind, limits_of(DEVICE)), *tried],  # noqa: B023
            )
        torch.cuda.empty_cache()
        for count, lines in result[name].items():
            print(f"{name}, {count} rows (splits, block, warps, stages)")
            for line in [x for x in lines if x.get("chosen")] + lines[:6]:
                print(f"{line.get('us', 0):9.1f} us {line.get('TBps', 0):6.2f} TB/s  {tuple(line['tiling'])}"
                      + (" chosen" if line.get("chosen") else ""), flush=True)  # fmt: skip
    return result


QUANTISER_TILES = [
    (64, 64, 32, 4, 3), (64, 64, 32, 8, 3), (64, 128, 32, 8, 3), (64, 128, 32, 8, 4), (128, 64, 32, 8, 3), (128, 64, 32, 8, 4),
    (128, 32, 32, 4, 3),
]  # fmt: skip
FEW_ROWS_TILES = [(16, 32, 128, 4, 2), (16, 32, 64, 4, 3), (16, 64, 64, 4, 3), (32, 64, 64, 4, 3), (64, 32, 64, 4, 3)]


def quantiser(rows: int) -> dict[str, Any]:
    """All 32 levels at other tiles, with books split ahead and on the way: microseconds, and whether a code differs."""
    _without_fallback()
    device = DEVICE
    books = make_books(torch.randn(32, 2_048, 256, device=device) * 0.4)
    compiler, result = Compiler(device), {}
    for count in [n for n in (1, 16, 64, 128, 256, 512) if n < rows] + [rows]:
        latent, slots = torch.randn(count, 512, device=device) * 4, torch.arange(count, device=device)
        codes = torch.zeros(count, 32, dtype=torch.int64, device=device)
        shapes = FEW_ROWS_TILES if count <= 64 else QUANTISER_TILES
        chosen = quantisers.choose_tile(count, 256, "tf32x3", limits_of(device))
        tiles = dict.fromkeys([chosen, *(quantisers.Tile(*shape, split) for shape in shapes for split in (False, True))])

        def run(tile: quantisers.Tile) -> None:
            quantise(latent, books, codes, slots, precision="tf32x3", tile=tile)  # noqa: B023

        with torch.inference_mode():
            finish([future for tile in tiles for future in compiler.read(lambda tile=tile: run(tile))])  # type: ignore[misc]
            lines: list[dict[str, Any]] = []
            wanted: torch.Tensor | None = None
            for tile in tiles:
                try:
                    run(tile)
                    heard = codes.clone()
                    us = microseconds(lambda i, tile=tile: run(tile), 1, device)  # type: ignore[misc]
                except Exception as error:
                    lines.append({"tile": tile, "error": str(error)[:100]})
                    continue
                wanted = heard if wanted is None else wanted
                lines.append({"tile": tile, "us": round(us, 1), "differ": int((heard != wanted).sum())})
        result[str(count)] = lines
        said = [lines[0], *sorted((line for line in lines[1:] if "us" in line), key=lambda line: line["us"])[:3]]
        for split in (False, True):  # the best of either kind at least
            said += sorted((x for x in lines if "us" in x and x["tile"].split is split), key=lambda line: line["us"])[:1]
        print(f"{count:5} " + "  ".join(f"{x.get('us', 0):.0f} {tuple(x['tile'])}" for x in said)
              + f"; codes that differ: {sum(x.get('differ', 0) for x in lines)}", flush=True)  # fmt: skip
    compiler.close()
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
    device, half = DEVICE, torch.float16
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
