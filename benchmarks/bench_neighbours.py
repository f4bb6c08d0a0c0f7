#!/usr/bin/env python3
"""How often neighbours change what a stream says, and what a step costs that lets none.

    bench_neighbours.py CHECKPOINT [--speech FOLDER] [--frames 100000] [--streams 16] [--device cuda]
    bench_neighbours.py --shape 1b --rows 256 [--frames 100000] [--kv auto,fp8] [--mimi f16] [--device cuda]

The second form needs no files, and steps a crowd of up to `rows` streams by two schedules that share nothing but the streams
(`crowd.py`), and then one row a step: how many tokens, probabilities and codes differ, to the last bit. The first:

Codes and tokens of streams stepped together against the same streams stepped alone, over `frames` frames in all: as this
program does it on the device, under `fixed_shapes`, and, on a CPU, with plain products instead of repacked ones, without and
with `fixed_shapes`.

CHECKPOINT as shared/goldens/make_checkpoint.py or `bench_server.py --checkpoint` write it. FOLDER holds recordings; without one
it is noise. Prints a table and, as its last line, one JSON document. With random weights the figures are of arithmetic, not of
accuracy.
"""

import argparse
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import report
import torch
from numpy.typing import NDArray

from moshi_stt.config import EngineConfig, KyutaiModule
from moshi_stt.config_load import load_config
from moshi_stt.constants import FRAME_SAMPLES
from moshi_stt.models.spec import MimiSpec, ModelSpec
from moshi_stt.models.spec_tables import lm_spec_from_json, spec_from_module
from moshi_stt.models.torch_impl import linear
from moshi_stt.models.torch_impl.backend import TorchBackend
from moshi_stt.models.torch_impl.build import load_backend

Pcm = NDArray[np.float32]


def load(
    checkpoint: Path,
    slots: int,
    dtype: str | None = None,
    *,
    device: str = "cpu",
    fixed_shapes: bool = False,
    quantize: str = "none",
    threads: int = 0,
    kv: str = "auto",
) -> TorchBackend:
    toml = checkpoint / "worker.toml"
    if toml.exists():
        module = load_config(str(toml)).config.modules[0]
        assert isinstance(module, KyutaiModule)
        spec = spec_from_module(module, None)
    else:
        lm = lm_spec_from_json(msgspec.json.decode((checkpoint / "config.json").read_bytes()))
        spec = ModelSpec(lm, MimiSpec(codebooks=lm.codebooks), 6)
        module = KyutaiModule(
            name="asr",
            path="/",
            type="BatchedAsr",
            batch_size=slots,
            lm_model_file="",
            text_tokenizer_file="",
            audio_tokenizer_file="",
            asr_delay_in_tokens=6,
            model=None,
        )
    engine = EngineConfig(  # type: ignore[arg-type]
        device=device, fixed_shapes=fixed_shapes, quantize=quantize, threads=threads, kv_dtype=kv
    )
    module = msgspec.structs.replace(module, dtype_override=dtype, engine=engine)
    backend = load_backend(module, checkpoint / "model.safetensors", checkpoint / "mimi.safetensors", spec, slots)
    backend.warm_up()
    return backend


def sound(folder: Path | None, frames: int, streams: int) -> Pcm:
    """float32 (streams, frames, 1920): the recordings one behind the other, each stream from another place, or noise."""
    rng = np.random.default_rng(0)
    if folder is None:
        level = rng.uniform(0, 0.3, (streams, frames, 1)).astype(np.float32)
        return rng.standard_normal((streams, frames, FRAME_SAMPLES), np.float32) * level
    from moshi_stt.audio.decode import read_file  # wants PyAV, which noise does without

    files = sorted(path for path in folder.iterdir() if path.suffix in {".wav", ".flac", ".mp3", ".ogg", ".opus"})
    whole = np.concatenate([read_file(path) for path in files])
    rows = [np.roll(whole, -int(rng.integers(len(whole)))) for _ in range(streams)]
    return np.stack([np.resize(row, frames * FRAME_SAMPLES).reshape(frames, FRAME_SAMPLES) for row in rows])


# ---- neighbours ----------------------------------------------------------------------------------------------------------


@contextmanager
def plain_products() -> Iterator[None]:
    """Weights as they are in the file instead of repacked ones."""
    can_pack = linear.can_pack
    linear.can_pack = lambda device, dtype: False
    try:
        yield
    finally:
        linear.can_pack = can_pack


def flips(backend: TorchBackend, pcm: Pcm, frames: int) -> dict[str, Any]:
    """Step streams together and alone over pcm (streams, T, 1920), again and again from another place, until `frames` frames
    have been compared. Mimi's state does not depend on codes, so that every differing code is a near tie of its own; tokens
    that differ are counted for each frame."""
    streams, length = pcm.shape[:2]
    slots, offset = np.arange(streams), streams
    compared = codes = tokens = changed = 0
    level = np.zeros(backend.spec.mimi.codebooks, np.int64)
    while compared < frames:
        hit = np.zeros(streams, bool)
        shift = compared // streams % length
        for n in range(min(length, -(-(frames - compared) // streams))):
            block = pcm[:, (n + shift) % length]
            fresh = np.full(streams, n == 0)
            together = backend.step(block, slots, fresh)
            alone = [backend.step(block[i : i + 1], slots[i : i + 1] + offset, fresh[:1]) for i in range(streams)]
            differing = (backend.state.codes[:streams] != backend.state.codes[offset : 2 * offset]).numpy(force=True)
            differing_tokens = together.text_token != np.concatenate([output.text_token for output in alone])
            codes += int(differing.sum())
            level += differing.sum(0)
            tokens += int(differing_tokens.sum())
            hit |= differing_tokens
            compared += streams
        changed += int(hit.sum())
    return {"frames": compared, "codes": codes, "tokens": tokens, "streams_changed": changed, "by_level": level.tolist()}


def cost(backend: TorchBackend, pcm: Pcm) -> dict[str, float]:
    """Median milliseconds of a step at 1, 4 and 16 rows."""
    results = {}
    for rows in (1, 4, 16):
        times = []
        for n in range(12):
            block, slots = pcm[np.arange(rows) % len(pcm), n % pcm.shape[1]], np.arange(rows)
            start = time.perf_counter()
            backend.step(block, slots, np.full(rows, n == 0))
            times.append(time.perf_counter() - start)
        results[str(rows)] = float(np.median(times[2:]) * 1e3)
    return results


def neighbours(args: argparse.Namespace) -> dict[str, Any]:
    pcm = sound(args.speech, min(600, -(-args.frames // args.streams)), args.streams)
    slots = max(2 * args.streams, 16)
    kinds = [("default", False, False), ("fixed_shapes", False, True)]
    if args.device == "cpu":
        kinds += [("plain", True, False), ("plain, fixed_shapes", True, True)]
    results = []
    print(f"{'products':22}{'frames':>9}{'codes':>7}{'tokens':>8}{'streams':>9}   step ms at 1, 4, 16 rows", flush=True)
    for name, is_plain, is_fixed in kinds:
        with plain_products() if is_plain else nullcontext():
            backend = load(args.checkpoint, slots, device=args.device, fixed_shapes=is_fixed)
        counts = flips(backend, pcm, args.frames // (20 if is_fixed else 1))
        milliseconds = cost(backend, pcm)
        backend.close()
        results.append({"name": name, **counts, "step_ms": milliseconds})
        columns = f"{counts['frames']:9}{counts['codes']:7}{counts['tokens']:8}{counts['streams_changed']:9}"
        print(f"{name:22}{columns}   " + ", ".join(f"{ms:.1f}" for ms in milliseconds.values()), flush=True)
    return {"streams": args.streams, "results": results}


def crowds(args: argparse.Namespace) -> dict[str, Any]:
    """A crowd by two schedules, and alone, for each dtype of keys and values."""
    from bench_step import build, release
    from crowd import Crowd, compare

    from moshi_stt.models.torch_impl.device import choose_device

    device, _ = choose_device(args.device)
    begun, results = time.monotonic(), []
    for kv in args.kv.split(","):
        backend = build(args.shape, device, args.rows, kv=kv, mimi=args.mimi)
        crowd = Crowd(backend, args.rows)
        first, told = crowd.run(args.frames, seed=1)
        for name, rows, frames in (("another schedule", 0, args.frames), ("one row a step", 1, args.frames // 20)):
            if time.monotonic() - begun > args.seconds:
                print("the time is up", flush=True)
                break
            second, told_second = crowd.run(frames, seed=2, rows=rows)
            found = compare(first, second)
            results.append({"kv": kv, "against": name, **found, "first": told, "second": told_second})
            print(
                f"{kv:5} {told['rows']} rows against {name}: {found['frames']} frames of both, {told['steps']} and "
                f"{told_second['steps']} steps, {told['joins']} streams; differ: {found['tokens']} tokens, "
                f"{found['logprobs']} probabilities, {found['codes']} frames' codes",
                flush=True,
            )
        backend.close()
        del crowd, backend
        release(device)
    return {"rows": args.rows, "mimi": args.mimi, "results": results}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, nargs="?")
    parser.add_argument("--shape", help="random weights of this shape, and no files")
    parser.add_argument("--rows", type=int, default=256, help="the most rows of a step, with --shape")
    parser.add_argument("--kv", default="auto", help="dtypes of keys and values, with --shape")
    parser.add_argument("--mimi", default="f16", help="Mimi's precision, with --shape")
    parser.add_argument("--seconds", type=float, default=300.0, help="begin nothing more after so many, with --shape")
    parser.add_argument("--speech", type=Path, help="a folder of recordings")
    parser.add_argument("--frames", type=int, default=100_000)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="a file for the JSON")
    args = parser.parse_args()
    if (args.checkpoint is None) == (args.shape is None):
        parser.error("a CHECKPOINT, or --shape")
    result = crowds(args) if args.shape else neighbours(args)
    name = torch.cuda.get_device_name() if args.device.startswith("cuda") else args.device
    document = {
        "device": name,
        "weights": "random",
        "checkpoint": args.shape or args.checkpoint.name,
        "torch": torch.__version__,
        **result,
    }
    report.finish("neighbours", document, args.out)


if __name__ == "__main__":
    main()
