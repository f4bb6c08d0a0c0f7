#!/usr/bin/env python3
"""What weights of fewer bits cost: in agreement with float32, and in word errors on speech.

    bench_quantized.py agreement CHECKPOINT [--device mlx|cpu] [--schemes bf16,f16,int8,int4] [--speech FOLDER]
                       [--frames 400] [--reference-python PYTHON]
    bench_quantized.py wer CONFIG FOLDER [--device mlx|cpu] [--schemes f32,bf16,int8,int4] [--language en] [--seconds 600]

agreement: tokens, words and pause values of each scheme, and of PyPI `moshi` (0.2.13, in the interpreter PYTHON), against ours
in float32 on the same device: free running, where one different token changes all that follow, and `led`, where every scheme
is fed float32's tokens. `first`: the first frame whose token differs. `words`: of float32's words, those that come in the same
order, free and led. `paused`: pause values on the same side of one half, led; `pause`: their largest and mean difference.
`codes`: Mimi's. `weights`: what lies in memory, of both models. CHECKPOINT as shared/goldens/make_checkpoint.py writes it;
random weights tell of arithmetic, not of accuracy.

wer: the one to run with published weights. CONFIG is a TOML file or the name of a shipped one (stt-1b-en_fr), whose weights are
found or fetched. FOLDER holds recordings and a MANIFEST.tsv with the columns file, language and transcript. Each recording goes
through the whole engine, one after the other. FOLDER may also hold pairs NAME.wav (flac, mp3, …) and NAME.txt instead.

int8 and int4 are quantised while loading. Prints a table and, as its last line, one JSON document.
"""

import argparse
import asyncio
import csv
import difflib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import report
from bench_wer import normalise, read_pcm
from numpy.typing import NDArray

from moshi_stt.config import EngineConfig, KyutaiModule, LimitsConfig
from moshi_stt.config_load import load_config
from moshi_stt.constants import FRAME_SAMPLES, SAMPLE_RATE
from moshi_stt.engine.commands import Audio, Finish
from moshi_stt.engines import build_engine, framework_of
from moshi_stt.events import Word
from moshi_stt.models.spec import MimiSpec, ModelSpec
from moshi_stt.models.spec_tables import lm_spec_from_json
from moshi_stt.text.tokenizer import TextTokenizer
from moshi_stt.text.word_errors import word_errors
from moshi_stt.text.words import WordAssembler

SOUNDS = {".wav", ".flac", ".mp3", ".ogg", ".opus", ".m4a", ".raw"}
PAUSE_THRESHOLD = 0.5
DELAY_FRAMES = 6
ORACLE = Path(__file__).parents[1] / "tests" / "parity" / "oracle_moshi.py"


def with_scheme(module: KyutaiModule, scheme: str, device: str) -> KyutaiModule:
    """A module run on a device as f32, bf16, int8 or int4."""
    quantize = scheme if scheme in ("int8", "int4") else "none"
    dtype = scheme if quantize == "none" else module.dtype_override
    engine = msgspec.structs.replace(module.engine, device=device, quantize=quantize)
    return msgspec.structs.replace(module, dtype_override=dtype, engine=engine)


# ---- agreement -----------------------------------------------------------------------------------------------------------


class Said(NamedTuple):
    """Of one stream: tokens (T,), pause (T, H), codes (T, K)."""

    tokens: NDArray[np.int64]
    pause: NDArray[np.float32]
    codes: NDArray[np.int64]


def load(checkpoint: Path, scheme: str, device: str) -> Any:
    lm = lm_spec_from_json(msgspec.json.decode((checkpoint / "config.json").read_bytes()))
    module = KyutaiModule(
        name="asr",
        path="/",
        type="BatchedAsr",
        batch_size=1,
        lm_model_file="",
        text_tokenizer_file="",
        audio_tokenizer_file="",
        asr_delay_in_tokens=DELAY_FRAMES,
        model=None,
        engine=EngineConfig(),
    )
    module = with_scheme(module, scheme, device)
    if framework_of(module) == "mlx":
        from moshi_stt.models.mlx_impl.build import load_backend
    else:
        from moshi_stt.models.torch_impl.build import load_backend  # type: ignore[assignment]
    files = checkpoint / "model.safetensors", checkpoint / "mimi.safetensors"
    return load_backend(module, *files, ModelSpec(lm, MimiSpec(codebooks=lm.codebooks), DELAY_FRAMES), 1)


def listen(backend: Any, pcm: NDArray[np.float32], lead: NDArray[np.int64] | None = None) -> Said:
    """One stream, pcm (T, 1920). lead (T,): tokens that it is fed instead of its own."""
    tokens, pauses, codes = [], [], []
    for n, frame in enumerate(pcm):
        output = backend.step(frame[None], np.array([0]), np.array([n == 0]))
        tokens.append(int(output.text_token[0]))
        pauses.append(output.pause[0])
        codes.append(np.asarray(backend.state.codes[0]).copy())
        if lead is not None:
            backend.state.text[0] = int(lead[n])
    return Said(np.array(tokens), np.stack(pauses), np.stack(codes))


def reference(python: str, checkpoint: Path, pcm: NDArray[np.float32], dtype: str, lead: NDArray[np.int64] | None) -> Said:
    """The same of PyPI `moshi`."""
    with tempfile.TemporaryDirectory() as folder:
        paths = [str(Path(folder) / name) for name in ("pcm.npy", "out.npz", "lead.npy")]
        np.save(paths[0], pcm.reshape(-1))
        command = [python, str(ORACLE), str(checkpoint), *paths[:2], dtype]
        if lead is not None:
            np.save(paths[2], lead)
            command.append(paths[2])
        one_thread = os.environ | {"OMP_NUM_THREADS": "1"}  # several wait for each other by spinning, on busy cores for long
        subprocess.run(command, check=True, env=one_thread)
        with np.load(paths[1]) as out:
            return Said(out["tokens"], out["pause"], out["codes"])


def sound(folder: Path | None, frames: int) -> NDArray[np.float32]:
    """float32 (T, 1920): the recordings one behind the other, again and again, or noise."""
    if folder is None:
        rng = np.random.default_rng(0)
        level = rng.uniform(0, 0.3, (frames, 1)).astype(np.float32)
        return rng.standard_normal((frames, FRAME_SAMPLES), np.float32) * level
    whole = np.concatenate([read_pcm(path) for path in sorted(folder.iterdir()) if path.suffix in SOUNDS])
    return np.resize(whole, (frames, FRAME_SAMPLES))


class Exact:
    """What float32 says, and how far others are from it."""

    def __init__(self, said: Said, decode: Callable[[Sequence[int]], str]) -> None:
        self.said = said
        self._decode = decode
        self.words = self._words(said)

    def compare(self, name: str, free: Said, led: Said) -> dict[str, Any]:
        said = self.said
        off = np.abs(led.pause - said.pause)
        return {
            "name": name,
            "free": float((free.tokens == said.tokens).mean()),
            "led": float((led.tokens == said.tokens).mean()),
            "first_difference": next(iter(np.flatnonzero(free.tokens != said.tokens).tolist()), None),
            "words_free": self._shared_words(free),
            "words_led": self._shared_words(led),
            "paused_led": float(((led.pause > PAUSE_THRESHOLD) == (said.pause > PAUSE_THRESHOLD)).mean()) if off.size else None,
            "pause_error": float(np.nanmax(off, initial=0)),
            "pause_mean_error": float(np.nanmean(off)) if off.size else 0.0,
            "codes": float((free.codes == said.codes).mean()),
        }

    def _words(self, said: Said) -> list[str]:
        assembler = WordAssembler(self._decode, DELAY_FRAMES)
        events = [event for token in said.tokens for event in assembler.push(int(token))] + list(assembler.flush())
        return [event.text for event in events if isinstance(event, Word)]

    def _shared_words(self, said: Said) -> float:
        """The share of float32's words that are found, in the same order."""
        matcher = difflib.SequenceMatcher(None, self.words, self._words(said), autojunk=False)
        return sum(block.size for block in matcher.get_matching_blocks()) / max(len(self.words), 1)


def line(result: dict[str, Any]) -> str:
    """A row of the table that `agreement` prints."""
    first = "-" if result["first_difference"] is None else result["first_difference"]
    paused = "-" if result["paused_led"] is None else f"{result['paused_led']:.2%}"
    shares = f"{result['free']:9.2%}{result['led']:9.2%}{first:>7}{result['words_free']:9.2%}{result['words_led']:9.2%}"
    pause = f"{paused:>9}{result['pause_error']:9.1e}{result['pause_mean_error']:8.1e}"
    weights = f"{result['weight_mb']:7} MB" if "weight_mb" in result else ""
    return f"{result['name']:24}{shares}{pause}{result['codes']:9.2%}{weights}"


def agreement(args: argparse.Namespace) -> dict[str, Any]:
    pcm = sound(args.speech, args.frames)
    backend = load(args.source, "f32", args.device)
    device = backend.report.device
    exact = Exact(listen(backend, pcm), TextTokenizer(args.source / "tokenizer.model").decode)
    backend.close()
    print(f"{device}, {len(pcm)} frames, {len(exact.words)} words; against moshi-stt f32, free and led")
    columns = f"{'tokens':>9}{'led':>9}{'first':>7}{'words':>9}{'led':>9}{'paused':>9}{'pause':>17}{'codes':>9}{'weights':>10}"
    print(f"{'':24}{columns}", flush=True)
    results = []
    for scheme in args.schemes.split(","):
        backend = load(args.source, scheme, args.device)
        size = {"weight_mb": round(backend.report.weight_bytes / 1e6)}
        free, led = listen(backend, pcm), listen(backend, pcm, exact.said.tokens)
        results.append(exact.compare(f"moshi-stt {scheme}", free, led) | size)
        backend.close()
        print(line(results[-1]), flush=True)
    for dtype in ("float32", "bfloat16") if args.reference_python else ():
        free, led = (reference(args.reference_python, args.source, pcm, dtype, lead) for lead in (None, exact.said.tokens))
        results.append(exact.compare(f"moshi 0.2.13 {dtype}", free, led))
        print(line(results[-1]), flush=True)
    return {"device": device, "frames": len(pcm), "words": len(exact.words), "weights": "random", "results": results}


# ---- word errors ---------------------------------------------------------------------------------------------------------


def recordings(folder: Path, language: str, seconds: float) -> list[tuple[str, NDArray[np.float32], list[str]]]:
    """Name, pcm (S,) and reference words of each recording, up to so many seconds in all."""
    manifest = folder / "MANIFEST.tsv"
    if manifest.is_file():
        with manifest.open(encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file, delimiter="\t") if row["language"] == language and row["transcript"]]
        pairs = [(folder / row["file"], row["transcript"]) for row in rows]
    else:
        sounds = sorted(path for path in folder.iterdir() if path.suffix in SOUNDS and path.with_suffix(".txt").is_file())
        pairs = [(path, path.with_suffix(".txt").read_text(encoding="utf-8")) for path in sounds]
    found, left = [], seconds
    for path, transcript in pairs:
        pcm = read_pcm(path)
        if left <= 0:
            break
        left -= len(pcm) / SAMPLE_RATE
        found.append((path.name, pcm, normalise(transcript)))
    if not found:
        raise SystemExit(f"{folder} has neither a MANIFEST.tsv with {language} nor recordings with a .txt beside them")
    return found


async def transcribe_all(module: KyutaiModule, sounds: Sequence[NDArray[np.float32]]) -> tuple[list[str], float, Any]:
    """Every text, the seconds it took without loading, and what the engine says of itself."""
    engine = build_engine(module, LimitsConfig())
    await engine.start()
    begun, texts = time.monotonic(), []
    try:
        for pcm in sounds:
            stream = engine.open(live=False)
            feeding = asyncio.create_task(feed(stream, pcm))
            texts.append(" ".join([event.text async for event in stream if isinstance(event, Word)]))
            await feeding
            stream.close()
    finally:
        await engine.stop()
    return texts, time.monotonic() - begun, engine.info


async def feed(stream: Any, pcm: NDArray[np.float32]) -> None:
    for start in range(0, len(pcm), SAMPLE_RATE):
        await stream.send(Audio(pcm[start : start + SAMPLE_RATE]))
    await stream.send(Finish())


def wer(args: argparse.Namespace) -> dict[str, Any]:
    modules = [module for module in load_config(str(args.source)).config.modules if isinstance(module, KyutaiModule)]
    if len(modules) != 1:
        raise SystemExit(f"{args.source} has {len(modules)} modules of Kyutai's models: give one with a single one")
    module = msgspec.structs.replace(modules[0], batch_size=1)
    speech = recordings(args.folder, args.language, args.seconds)
    total, seconds = sum(len(words) for _, _, words in speech), sum(len(pcm) for _, pcm, _ in speech) / SAMPLE_RATE
    print(f"{len(speech)} recordings, {seconds:.0f} s, {total} words")
    print(f"{'scheme':8}{'word error':>12}{'x real time':>13}  device")
    results = []
    for scheme in args.schemes.split(","):
        texts, took, info = asyncio.run(transcribe_all(with_scheme(module, scheme, args.device), [pcm for _, pcm, _ in speech]))
        wrong = [word_errors(reference, normalise(text)) for (_, _, reference), text in zip(speech, texts, strict=True)]
        result = {
            "scheme": scheme,
            "wer": 100 * sum(wrong) / max(1, total),
            "x_real_time": seconds / took,
        }
        results.append(result | {"device": info.device, "dtype": info.dtype})
        print(
            f"{scheme:8}{result['wer']:11.2f}%{result['x_real_time']:13.2f}  {info.device}, {info.dtype}",
            flush=True,
        )
        if args.verbose:
            for (name, _, _), text, count in zip(speech, texts, wrong, strict=True):
                print(f"    {name}, {count} wrong: {text}")
    return {"config": str(args.source), "recordings": len(speech), "words": total, "results": results}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, schemes in (("agreement", "bf16,f16,int8,int4"), ("wer", "f32,bf16,int8,int4")):
        command = commands.add_parser(name)
        command.add_argument("source", type=Path, metavar="CHECKPOINT" if name == "agreement" else "CONFIG")
        command.add_argument("--device", choices=["auto", "mlx", "cpu", "cuda"], default="auto")
        command.add_argument("--schemes", default=schemes)
        if name == "agreement":
            command.add_argument("--speech", type=Path, help="a folder of recordings; without one it is noise")
            command.add_argument("--frames", type=int, default=400)
            command.add_argument("--reference-python", help="an interpreter that has moshi 0.2.13")
        else:
            command.add_argument("folder", type=Path)
            command.add_argument("--language", default="en")
            command.add_argument("--seconds", type=float, default=600, help="of sound at most")
            command.add_argument("--verbose", action="store_true", help="print what was heard")
    args = parser.parse_args()
    result = {"agreement": agreement, "wer": wer}[args.command](args)
    report.finish(f"quantized_{args.command}", result)


if __name__ == "__main__":
    sys.exit(main())
