"""`moshi-stt selftest`: load a model, recognise shipped speech, and print a report that can be pasted."""

import argparse
import asyncio
import platform
import time
from pathlib import Path
from typing import Any

import msgspec

from moshi_stt import __version__
from moshi_stt.config import EmbeddedModule, EngineConfig, KyutaiModule, Module
from moshi_stt.cores import usable_cores
from moshi_stt.engine.engine import Engine
from moshi_stt.selftest import Check, check_engine, memory_check, passed


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "selftest",
        help="recognise shipped speech and say PASS or FAIL",
        description="Load a model, recognise shipped speech in the languages that it knows, and print PASS or FAIL for words, "
        "times and speed, memory, and a block to paste into a report.",
        epilog="Exit status: 0 PASS, 1 FAIL.",
    )
    parser.add_argument("--config", "--model", metavar="FILE", help="TOML file or name of a shipped one (default: embedded)")
    parser.add_argument("--cpu", action="store_true", help="run the model on the CPU, whatever else is there")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda", "mps", "mlx"], help="what runs the model")
    parser.add_argument("--quantize", choices=["none", "int8", "int4"], help="quantized weights (default: the configuration's)")
    return parser


def run(args: argparse.Namespace) -> int:
    """Returns 0 or 1. Raises ConfigError where the model cannot be had at all."""
    from moshi_stt.cli.transcribers import load_module
    from moshi_stt.engines import build_engine

    module, limits = load_module(args.config, 1, args.quantize)
    if isinstance(module, KyutaiModule) and args.device and not args.cpu:
        engine_config: EngineConfig = msgspec.structs.replace(module.engine, device=args.device)
        module = msgspec.structs.replace(module, engine=engine_config)
    engine = build_engine(module, limits, force_cpu=args.cpu)
    checks = asyncio.run(run_checks(engine, publishes_words(module)))
    for check in checks:
        print(line(check), flush=True)
    verdict = "PASS" if passed(checks) else "FAIL"
    print("\n----- to paste into a report -----")
    for text in machine(args.config or "embedded", engine):
        print(text)
    for check in checks:
        print(line(check))
    print(f"{verdict}\n----- end -----")
    return 0 if verdict == "PASS" else 1


async def run_checks(engine: Engine, judge_words: bool) -> list[Check]:
    """Start the engine, check it, stop it."""
    begun = time.monotonic()
    await engine.start()
    try:
        loaded = Check("load", True, f"{time.monotonic() - begun:.1f} s")
        return [loaded, *await check_engine(engine, judge_words), memory_check()]
    finally:
        await engine.stop()


def publishes_words(module: Module) -> bool:
    """Whether it is known what the module's weights understand: the embedded model's, and those that Kyutai publishes."""
    from moshi_stt.models.hub import PUBLISHED, parse_reference

    if isinstance(module, EmbeddedModule):
        return True
    file = parse_reference(module.lm_model_file)
    return file is not None and file.repo in PUBLISHED


def line(check: Check) -> str:
    """One check for a person."""
    mark = {True: "PASS", False: "FAIL", None: "-   "}[check.passed]
    return f"{mark}  {check.what}: {check.text}"


def machine(model: str, engine: Engine) -> list[str]:
    """What ran where."""
    info = engine.info
    return [
        f"moshi-stt {__version__}, Python {platform.python_version()}, {platform.platform()}",
        f"{processor()}, {usable_cores()} usable cores",
        f"model {model}: {info.kind}, {info.dtype} on {info.device}, languages {', '.join(info.languages) or 'not stated'}",
    ]


def processor() -> str:
    """The processor's name, as far as the system tells."""
    try:
        for text in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if text.startswith("model name"):
                return text.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
