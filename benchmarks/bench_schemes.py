#!/usr/bin/env python3
"""Word error of a configured model of Kyutai's in float32, bf16, 8 and 4 bits, over a folder of speech, in one run.

    bench_schemes.py CONFIG FOLDER [--schemes f32,bf16,int8,int4] [--device cpu] [--verbose]

CONFIG is a TOML file or the name of a shipped configuration (stt-1b-en_fr); weights are fetched where they are not here yet.
FOLDER holds recordings and a MANIFEST.tsv with the columns file, language and transcript; the English ones are used. Each goes
through the engine as fast as it can, every scheme after the other. Prints for each: word error, words that differ from the
first scheme's, seconds of computing for a second of sound, memory of the weights; and, as its last line, one JSON document.
"""

import argparse
import asyncio
import json
import logging
import time
from pathlib import Path
from typing import Any

import msgspec
from bench_wer import Recording, errors, machine, normalise, read_folder

from moshi_stt.cli.engines import build_engine
from moshi_stt.config import KyutaiModule, ServerConfig
from moshi_stt.config_load import load_config
from moshi_stt.constants import SAMPLE_RATE
from moshi_stt.engine.recording import transcribe_recording

SCHEMES = ("f32", "bf16", "int8", "int4")
STREAMS = 2


def module_of(config: ServerConfig, name: str, scheme: str, device: str | None) -> KyutaiModule:
    """The configuration's model under a scheme, for a few recordings at once."""
    modules = [module for module in config.modules if isinstance(module, KyutaiModule)]
    if len(modules) != 1:
        raise SystemExit(f"{name} has {len(modules)} models of Kyutai's: give a configuration with one")
    is_packed = scheme.startswith("int")
    engine = msgspec.structs.replace(modules[0].engine, quantize=scheme if is_packed else "none")
    if device:
        engine = msgspec.structs.replace(engine, device=device)
    override = modules[0].dtype_override if is_packed else scheme
    return msgspec.structs.replace(modules[0], engine=engine, dtype_override=override, batch_size=STREAMS)


async def heard(
    module: KyutaiModule, config: ServerConfig, recordings: list[Recording]
) -> tuple[list[str], float, dict[str, str]]:
    """Each recording's text, seconds of computing, and what the engine says of itself."""
    engine = build_engine(module, config.limits)
    await engine.start()
    try:
        begun = time.monotonic()
        free = asyncio.Semaphore(STREAMS)

        async def one(recording: Recording) -> str:
            async with free:
                return " ".join(word.text for word in await transcribe_recording(engine, [recording.pcm]))

        texts = await asyncio.gather(*(one(recording) for recording in recordings))
        return list(texts), time.monotonic() - begun, dict(engine.info.details)
    finally:
        await engine.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--schemes", default=",".join(SCHEMES), help="which, the first to compare the others with")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda", "mps", "mlx"], help="instead of the configuration's")
    parser.add_argument("--verbose", action="store_true", help="print what was heard")
    args = parser.parse_args()
    unknown = set(args.schemes.split(",")) - set(SCHEMES)
    if unknown:
        parser.error(f"--schemes {', '.join(sorted(unknown))}: expected some of {', '.join(SCHEMES)}")
    logging.basicConfig(level=logging.ERROR)
    config = load_config(args.config).config
    recordings = read_folder(args.folder)
    words = sum(len(recording.reference) for recording in recordings)
    seconds = sum(len(recording.pcm) for recording in recordings) / SAMPLE_RATE
    print(f"{len(recordings)} recordings, {seconds:.0f} s, {words} words")
    print(f"{'':8}{'word error':>12}{'differ':>9}{'s per s':>9}{'weights':>12}")
    results: list[dict[str, Any]] = []
    first: list[list[str]] = []
    for scheme in args.schemes.split(","):
        texts, took, details = asyncio.run(heard(module_of(config, args.config, scheme, args.device), config, recordings))
        found = [normalise(text) for text in texts]
        first = first or found
        wrong = sum(errors(recording.reference, one) for recording, one in zip(recordings, found, strict=True))
        differ = sum(errors(a, b) for a, b in zip(first, found, strict=True))
        share = differ / max(sum(map(len, first)), 1)
        weights = details.get("weights", "")
        results.append(
            {"scheme": scheme, "wer": 100 * wrong / words, "differ": 100 * share, "rtf": took / seconds, "weights": weights}
        )
        print(f"{scheme:8}{wrong / words:12.2%}{share:9.2%}{took / seconds:9.3f}{weights:>12}", flush=True)
        for recording, text in zip(recordings, texts, strict=True) if args.verbose else ():
            print(f"    {recording.name}: {text}")
    document = {"benchmark": "schemes", **machine(), "device": args.device or "configured", "weights": args.config}
    print(json.dumps(document | {"words": words, "seconds": round(seconds, 1), "results": results}))


if __name__ == "__main__":
    main()
