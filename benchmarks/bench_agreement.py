#!/usr/bin/env python3
"""How often precisions, and neighbours, change what a stream says.

    bench_agreement.py precision CHECKPOINT [--reference-python PYTHON] [--speech FOLDER] [--frames 400]
    bench_agreement.py neighbours CHECKPOINT [--speech FOLDER] [--frames 100000] [--streams 16] [--device cuda]

precision: text tokens, words and pause values of float32, bf16, f16, 8 and 4 bits, ours and those of PyPI `moshi` (0.2.13, in
the interpreter PYTHON), against ours in float32: free running, where one different token changes all that follow, and led,
where every model is fed float32's tokens. `words`: of float32's words, those that come in the same order, free and led.
`paused`: pause values on the same side of one half, led; `pause`: their largest and mean difference. Mimi is float32
throughout: its codes are compared with the reference's. `weights` is what lies in memory, of both models.

neighbours: codes and tokens of streams stepped together against the same streams stepped alone, over `frames` frames in all,
and what a step costs: as this program does it on the device, under `fixed_shapes`, and, on a CPU, with plain products
instead of repacked ones, without and with `fixed_shapes`.

CHECKPOINT as shared/goldens/make_checkpoint.py writes it. FOLDER holds recordings; without one it is noise. Prints a table
and, as its last line, one JSON document. With random weights the figures are of arithmetic, not of accuracy.
"""

import argparse
import difflib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray

from moshi_stt.audio.decode import read_file
from moshi_stt.config import EngineConfig, KyutaiModule
from moshi_stt.constants import FRAME_SAMPLES
from moshi_stt.events import Word
from moshi_stt.models.spec import MimiSpec, ModelSpec, lm_spec_from_json
from moshi_stt.models.torch_impl import linear
from moshi_stt.models.torch_impl.backend import TorchBackend
from moshi_stt.models.torch_impl.build import load_backend
from moshi_stt.text.tokenizer import TextTokenizer
from moshi_stt.text.words import WordAssembler

Pcm = NDArray[np.float32]

ORACLE = Path(__file__).parents[1] / "tests" / "parity" / "oracle_moshi.py"


def load(
    checkpoint: Path,
    slots: int,
    dtype: str | None = None,
    *,
    quantize: str = "none",
    device: str = "cpu",
    fixed_shapes: bool = False,
) -> TorchBackend:
    lm = lm_spec_from_json(msgspec.json.decode((checkpoint / "config.json").read_bytes()))
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
        dtype_override=dtype,  # type: ignore[arg-type]
        engine=EngineConfig(device=device, fixed_shapes=fixed_shapes, quantize=quantize),  # type: ignore[arg-type]
    )
    files = checkpoint / "model.safetensors", checkpoint / "mimi.safetensors"
    return load_backend(module, *files, ModelSpec(lm, MimiSpec(codebooks=lm.codebooks), 6), slots)


def sound(folder: Path | None, frames: int, streams: int) -> Pcm:
    """float32 (streams, frames, 1920): the recordings one behind the other, each stream from another place, or noise."""
    rng = np.random.default_rng(0)
    if folder is None:
        level = rng.uniform(0, 0.3, (streams, frames, 1)).astype(np.float32)
        return rng.standard_normal((streams, frames, FRAME_SAMPLES), np.float32) * level
    files = sorted(path for path in folder.iterdir() if path.suffix in {".wav", ".flac", ".mp3", ".ogg", ".opus"})
    whole = np.concatenate([read_file(path) for path in files])
    rows = [np.roll(whole, -int(rng.integers(len(whole)))) for _ in range(streams)]
    return np.stack([np.resize(row, frames * FRAME_SAMPLES).reshape(frames, FRAME_SAMPLES) for row in rows])


# ---- precision -----------------------------------------------------------------------------------------------------------


class Said(NamedTuple):
    """Of one stream: tokens (T,), pause (T, H), codes (T, K)."""

    tokens: NDArray[np.int64]
    pause: NDArray[np.float32]
    codes: NDArray[np.int64]


def run(backend: TorchBackend, pcm: Pcm, lead: NDArray[np.int64] | None = None) -> Said:
    """One stream, pcm (T, 1920). lead (T,): tokens that it is fed instead of its own."""
    tokens, pauses, codes = [], [], []
    for n, frame in enumerate(pcm):
        output = backend.step(frame[None], np.array([0]), np.array([n == 0]))
        tokens.append(int(output.text_token[0]))
        pauses.append(output.pause[0])
        codes.append(backend.state.codes[0].numpy().copy())
        if lead is not None:
            backend.state.text[0] = int(lead[n])
    return Said(np.array(tokens), np.stack(pauses), np.stack(codes))


def reference(python: str, checkpoint: Path, pcm: Pcm, dtype: str, lead: NDArray[np.int64] | None = None) -> Said:
    """The same of PyPI `moshi`."""
    with tempfile.TemporaryDirectory() as folder:
        paths = [str(Path(folder) / name) for name in ("pcm.npy", "out.npz", "lead.npy")]
        np.save(paths[0], pcm.reshape(-1))
        command = [python, str(ORACLE), str(checkpoint), *paths[:2], dtype]
        if lead is not None:
            np.save(paths[2], lead)
            command.append(paths[2])
        subprocess.run(command, check=True)
        with np.load(paths[1]) as out:
            return Said(out["tokens"], out["pause"], out["codes"])


def words(tokens: NDArray[np.int64], decode: Callable[[Sequence[int]], str], delay_frames: int) -> list[str]:
    """What a stream's tokens say."""
    assembler = WordAssembler(decode, delay_frames)
    events = [event for token in tokens for event in assembler.push(int(token))] + list(assembler.flush())
    return [event.text for event in events if isinstance(event, Word)]


def shared_words(expected: list[str], found: list[str]) -> float:
    """The share of the expected words that are found, in the same order."""
    matcher = difflib.SequenceMatcher(None, expected, found, autojunk=False)
    return sum(block.size for block in matcher.get_matching_blocks()) / max(len(expected), 1)


def precision(args: argparse.Namespace) -> dict[str, Any]:
    pcm = sound(args.speech, args.frames, 1)[0]
    python, checkpoint = args.reference_python, args.checkpoint
    decode = TextTokenizer(checkpoint / "tokenizer.model").decode
    backend = load(checkpoint, 1, "f32")
    delay = backend.spec.delay_frames
    ours = run(backend, pcm)
    backend.close()
    said = words(ours.tokens, decode, delay)
    results = []
    print(f"against moshi-stt f32, {len(pcm)} frames, {len(said)} words: tokens and words equal, free and led")
    print(
        f"{'':24}{'tokens':>9}{'led':>9}{'first':>7}{'words':>9}{'led':>9}{'paused':>9}{'pause':>17}{'codes':>9}{'weights':>10}"
    )

    def compare(name: str, free: Said, led: Said, weight_bytes: int | None = None) -> None:
        differing = np.flatnonzero(free.tokens != ours.tokens)
        off = np.abs(led.pause - ours.pause)
        result: dict[str, Any] = {
            "name": name,
            "free": float((free.tokens == ours.tokens).mean()),
            "led": float((led.tokens == ours.tokens).mean()),
            "first_difference": int(differing[0]) if len(differing) else None,
            "words_free": shared_words(said, words(free.tokens, decode, delay)),
            "words_led": shared_words(said, words(led.tokens, decode, delay)),
            "paused_led": float(((led.pause > 0.5) == (ours.pause > 0.5)).mean()) if off.size else None,
            "pause_error": float(np.nanmax(off, initial=0)),
            "pause_mean_error": float(np.nanmean(off)) if off.size else 0.0,
            "codes": float((free.codes == ours.codes).mean()),
            "weight_bytes": weight_bytes,
        }
        results.append(result)
        first = str(differing[0]) if len(differing) else "-"
        shares = f"{result['free']:9.2%}{result['led']:9.2%}{first:>7}{result['words_free']:9.2%}{result['words_led']:9.2%}"
        paused = f"{result['paused_led']:9.2%}" if off.size else f"{'-':>9}"
        pause = f"{result['pause_error']:8.1e} {result['pause_mean_error']:8.1e}"
        weights = "" if weight_bytes is None else f"{weight_bytes / 1e6:7.0f} MB"
        print(f"{name:24}{shares}{paused}{pause}{result['codes']:9.2%}{weights}", flush=True)

    for name in ("bf16", "f16", "int8", "int4"):
        is_packed = name.startswith("int")
        backend = load(checkpoint, 1, "f32" if is_packed else name, quantize=name if is_packed else "none")
        assert backend.report is not None
        compare(f"moshi-stt {name}", run(backend, pcm), run(backend, pcm, ours.tokens), backend.report.weight_bytes)
        backend.close()
    for dtype in ("float32", "bfloat16") if python else ():
        free, led = (reference(python, checkpoint, pcm, dtype, lead) for lead in (None, ours.tokens))
        compare(f"moshi 0.2.13 {dtype}", free, led)
    return {"frames": len(pcm), "words": len(said), "results": results}


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["precision", "neighbours"])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--reference-python", help="an interpreter that has moshi 0.2.13")
    parser.add_argument("--speech", type=Path, help="a folder of recordings")
    parser.add_argument("--frames", type=int)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--device", default="cpu", help="of `neighbours`")
    args = parser.parse_args()
    args.frames = args.frames or {"precision": 400, "neighbours": 100_000}[args.what]
    result = {"precision": precision, "neighbours": neighbours}[args.what](args)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    document = {
        "benchmark": f"agreement_{args.what}",
        "machine": f"{platform.machine()} {platform.system()}, {os.cpu_count()} cores",
        "device": args.device,
        "weights": "random",
        "checkpoint": args.checkpoint.name,
        "torch": torch.__version__,
        "commit": commit.stdout.strip(),
        **result,
    }
    print(json.dumps(document))


if __name__ == "__main__":
    sys.exit(main())
