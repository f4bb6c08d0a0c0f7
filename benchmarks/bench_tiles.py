#!/usr/bin/env python3
"""The tiles of the products on a GPU: what each takes at each number of rows, and whether a row's bits depend on them.

    bench_tiles.py [--rows 1,8,16,32,64,128,256,1024] [--layers 8] [--seconds 100] [--out FILE]

For each product of the 1B's language model: the library's product, and our kernel at the tile that is chosen and at others, in
microseconds a product, each over `layers` different weights in one CUDA graph, so that no cache holds them. `bits` is whether
row 0's result is that of the tile chosen for one row, to the last bit. Then the same bits, without times, for Mimi's
convolutions in TF32 and for its quantiser. Ends after `seconds`, with what was tried until then. Prints tables and, as its last
line, one JSON document.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import report
import torch
import torch.nn.functional as F
from bench_step import measured_on, time_call

from moshi_stt.models.torch_impl.cuda import conv as convs
from moshi_stt.models.torch_impl.cuda.compile import Compiler, finish
from moshi_stt.models.torch_impl.cuda.limits import limits_of
from moshi_stt.models.torch_impl.cuda.product import Tile, choose_tile, fitted, gated_product, product, sliced_product, slices
from moshi_stt.models.torch_impl.cuda.quantiser import make_books, quantise

SHAPES = {
    "in_proj": (6_144, 2_048),
    "out_proj": (2_048, 2_048),
    "gated": (5_632, 2_048),
    "linear_out": (2_048, 5_632),
    "head": (8_024, 2_048),
}
"""Name to output rows and columns of the weight."""

CANDIDATES = {
    16: [
        Tile(16, 16, 128, 2, 6), Tile(16, 16, 256, 2, 4), Tile(16, 16, 256, 4, 4), Tile(16, 16, 512, 4, 3),
        Tile(16, 32, 128, 4, 6), Tile(16, 32, 256, 4, 4), Tile(16, 64, 128, 4, 5), Tile(16, 64, 256, 4, 3),
    ],
    32: [Tile(32, 16, 128, 4, 6), Tile(32, 32, 128, 4, 5), Tile(32, 64, 128, 4, 4), Tile(32, 32, 256, 4, 3)],
    64: [
        Tile(64, 16, 128, 4, 5), Tile(64, 32, 128, 4, 4), Tile(64, 64, 128, 4, 4), Tile(64, 64, 64, 4, 6),
        Tile(64, 32, 64, 4, 6),
    ],
    128: [
        Tile(64, 64, 128, 4, 4), Tile(128, 64, 64, 4, 4), Tile(128, 64, 128, 4, 3), Tile(128, 64, 128, 8, 3),
        Tile(128, 32, 128, 4, 4), Tile(64, 32, 128, 4, 4),
    ],
    256: [
        Tile(128, 64, 64, 4, 4), Tile(128, 64, 128, 4, 3), Tile(128, 128, 64, 8, 4), Tile(128, 128, 64, 8, 3),
        Tile(64, 64, 128, 4, 4), Tile(64, 128, 64, 4, 4), Tile(128, 64, 128, 8, 3),
    ],
    1_024: [
        Tile(128, 128, 64, 8, 4), Tile(128, 256, 64, 8, 3), Tile(128, 128, 64, 8, 3), Tile(128, 128, 128, 8, 2),
        Tile(256, 64, 64, 8, 4), Tile(256, 128, 64, 8, 3),
    ],
}  # fmt: skip
"""Tiles to try, by the most rows they are tried for."""

CONVS = {
    "strided": (1_024, 8_192), "last": (512, 3_072), "in_proj": (1_536, 512), "out_proj": (512, 512), "linear1": (2_048, 512),
    "linear2": (512, 2_048),
}  # fmt: skip
"""Products of Mimi's with few outputs: columns out and in."""

CONV_TILES = [
    (16, 16, 256, 4, 3), (16, 16, 256, 4, 5), (16, 16, 256, 2, 5), (16, 16, 128, 4, 6), (16, 16, 128, 2, 8),
    (16, 32, 128, 4, 6), (16, 16, 512, 4, 3), (16, 16, 64, 2, 8),
    (16, 32, 64, 4, 6), (32, 32, 64, 4, 5), (32, 16, 128, 4, 4),
    (64, 32, 64, 4, 4),
]  # fmt: skip

Run = Callable[[int], torch.Tensor]


def runs(name: str, x: torch.Tensor, inner: torch.Tensor, weights: torch.Tensor, tile: Tile | None) -> Run:
    """One product with the weight of a layer, ours."""
    if name == "gated":
        return lambda i: gated_product(x, weights[i], tile=tile)
    if name in ("out_proj", "linear_out"):
        return lambda i: sliced_product(inner, weights[i], tile=tile)
    return lambda i: product(inner, weights[i], tile=tile)


def whole(result: torch.Tensor) -> torch.Tensor:
    """Row 0 of a result, its parts added as their reader adds them."""
    if result.dim() == 2:
        return result[0].clone()
    total = result[0, 0].clone()
    for part in result[1:, 0]:
        total += part
    return total.bfloat16()


def microseconds(run: Run, layers: int, device: torch.device) -> float:
    """Of one product, in a graph of `layers` of them."""
    stream = torch.cuda.Stream(device)
    torch.cuda.synchronize(device)
    with torch.cuda.stream(stream):
        for i in range(layers):
            run(i)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for i in range(layers):
            run(i)
    return 1e3 * time_call(graph.replay, device, times=9) / layers


def library(x: torch.Tensor, weights: torch.Tensor) -> Run:
    """PyTorch's own product, of a gate's two halves without the gate."""
    return lambda i: F.linear(x, weights[i])


def tried(rows: int) -> list[Tile]:
    return next(tiles for most, tiles in sorted(CANDIDATES.items()) if rows <= most or most == max(CANDIDATES))


def plan(rows: list[int]) -> list[tuple[str, int, Tile | None]]:
    """Every product at every number of rows: the chosen tile first."""
    found: list[tuple[str, int, Tile | None]] = []
    for count in rows:
        for name in SHAPES:
            found += [(name, count, None), *((name, count, tile) for tile in tried(count))]
    return found


def measure(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    begun = time.monotonic()
    generator = torch.Generator(device).manual_seed(0)
    limits = limits_of(device)

    def draw(*shape: int) -> torch.Tensor:
        return torch.empty(shape, device=device).uniform_(-0.05, 0.05, generator=generator).bfloat16()

    weights = {name: draw(args.layers, (2 if name == "gated" else 1) * n, k) for name, (n, k) in SHAPES.items()}
    rows = [int(part) for part in args.rows.split(",")]
    wide = {k: draw(max(rows), k) * 20 for _, k in SHAPES.values()}
    work = []
    for name, count, tile in plan(rows):
        n, k = SHAPES[name]
        cut = tile
        if tile is not None:
            share = k // (slices(n, k) if name in ("out_proj", "linear_out") else 1)
            cut = fitted(tile, share, 2, limits, weights=2 if name == "gated" else 1)
        work.append((name, count, cut, runs(name, wide[2_048][:count], wide[k][:count], weights[name], cut)))
    compiler = Compiler(device)
    small = small_convs(device, args.layers)
    futures = [future for _, _, _, run in small for future in compiler.read(lambda run=run: run(0))]  # type: ignore[misc]
    finish([future for _, _, _, run in work for future in compiler.read(lambda run=run: run(0))])  # type: ignore[misc]
    compiled = time.monotonic() - begun
    print(f"compiled {compiler.kernels} kernels in {compiled:.1f} s", flush=True)
    bits: dict[str, torch.Tensor] = {}
    found: list[dict[str, Any]] = []
    for name, count, tile, run in work:
        if time.monotonic() - begun > args.seconds:
            print("the time is up", flush=True)
            break
        try:
            result = whole(run(0))
            taken = microseconds(run, args.layers, device)
        except Exception as error:
            found.append({"product": name, "rows": count, "tile": tile, "error": str(error)[:200]})
            continue
        bits.setdefault(name, result)
        line: dict[str, Any] = {
            "product": name,
            "rows": count,
            "us": round(taken, 2),
            "bits": bool(torch.equal(bits[name], result)),
        }
        if tile is None:
            n, k = SHAPES[name]
            line["chosen"] = choose_tile(count, n, k, 2, limits, gated=name == "gated")
            line["library_us"] = round(microseconds(library(wide[k][:count], weights[name]), args.layers, device), 2)
        else:
            line["tile"] = tile
        found.append(line)
    finish(futures)
    for name, count, tile, run in small:
        try:
            taken = microseconds(run, args.layers, device)
        except Exception as error:
            print(f"mimi {name} {count} {tile}: {str(error)[:80]}", flush=True)
            continue
        found.append({"product": f"mimi {name}", "rows": count, "tile": tile, "us": round(taken, 2), "bits": True})
    return {"compile_seconds": round(compiled, 1), "products": found, "mimi": mimi_bits(device)}


def small_convs(device: torch.device, layers: int) -> list[tuple[str, int, tuple[int, ...], Run]]:
    """Mimi's products of few outputs, at every tile."""
    found: list[tuple[str, int, tuple[int, ...], Run]] = []
    for name, (n, k) in CONVS.items():
        weights = torch.randn(layers, n, k, device=device) * 0.02
        for count in (2, 16, 128):
            x, out = torch.randn(count, 1, k, device=device), torch.empty(count, 1, n, device=device)

            def run(i: int, tile: tuple[int, ...], x=x, out=out, weights=weights) -> torch.Tensor:  # type: ignore[no-untyped-def]
                convs.conv(x, weights[i], None, out, precision="tf32", tile=convs.Tile(*tile))
                return out

            tiles = [tile for tile in CONV_TILES if tile[0] <= 16 or count > 16]
            found += [(name, count, tile, partial(run, tile=tile)) for tile in tiles]
    return found


def mimi_bits(device: torch.device) -> dict[str, Any]:
    """Whether every tile gives a convolution's first output the same bits, and the quantiser the same codes, by dtype."""
    torch.manual_seed(0)
    found: dict[str, Any] = {}
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for channels, n, kernel in ((512, 1_024, 4), (128, 64, 3), (512, 2_048, 1)):
            x = torch.randn(8_192, kernel, channels, device=device).to(dtype)
            weight = (torch.randn(n, kernel * channels, device=device) * 0.05).to(dtype)
            first: torch.Tensor | None = None
            for m, cut_n, k, warps, stages in (
                (16, 16, 256, 4, 3), (16, 32, 128, 4, 4), (32, 64, 64, 4, 3), (64, 32, 64, 4, 4), (64, 64, 32, 4, 4),
                (64, 128, 32, 4, 4), (128, 64, 32, 4, 4), (128, 128, 32, 8, 3), (128, 256, 32, 8, 3), (64, 64, 32, 2, 3),
            ):  # fmt: skip
                if n % cut_n or (kernel * channels) % k:
                    continue
                name = f"{dtype} k {kernel * channels} n {n}: {m} x {cut_n} x {k}, {warps} warps"
                out = torch.empty(8_192, 1, n, device=device)
                try:
                    convs.conv(x, weight, None, out, precision="tf32", tile=convs.Tile(m, cut_n, k, warps, stages))
                except Exception as error:
                    found[name] = str(error)[:100]
                    continue
                first = out.clone() if first is None else first
                found[name] = f"{int((out != first).sum())} of {out.numel()} differ"
    books = make_books(torch.randn(8, 2_048, 256, device=device) * 0.4)
    latent = torch.randn(1_024, 512, device=device)
    every = torch.full((1_025, 8), -1, dtype=torch.int64, device=device)
    quantise(latent, books, every, torch.arange(1_024, device=device), precision="tf32x3")
    some = torch.full((1_025, 8), -1, dtype=torch.int64, device=device)
    for start in range(0, 1_024, 16):
        quantise(latent[start : start + 16], books, some, torch.arange(start, start + 16, device=device), precision="tf32x3")
    found["quantiser"] = f"{int((every != some).sum())} of {1_024 * 8} codes differ"
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", default="1,8,64,16,32,128,256,1024")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=100.0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    device = torch.device("cuda")
    result = {**measured_on(device), **measure(args, device)}
    for line in result["products"]:
        tile = line.get("tile") or line.get("chosen")
        said = line.get("error") or f"{line['us']:8.2f} us, bits {'same' if line['bits'] else 'DIFFER'}"
        print(f"{line['product']:10} {line['rows']:5} {'chosen' if 'chosen' in line else '':6} {tuple(tile)!s:28} {said}"
              + (f", library {line['library_us']:.2f}" if "library_us" in line else ""))  # fmt: skip
    for name, said in result["mimi"].items():
        print(f"{name}: {said}")
    report.finish("tiles", result, args.out)


if __name__ == "__main__":
    main()
