"""`moshi-stt advise`: would Kyutai's 1B keep up with live speech here, and with which weights?"""

import argparse
import os
import shutil
import subprocess
import sys
from typing import Any, Literal, NamedTuple

from moshi_stt.constants import FRAME_SECONDS

MODEL = "stt-1b-en_fr"

BUDGET_SECONDS = 0.75 * FRAME_SECONDS
"""What a step may take: the rest is for everything else on the machine."""

APPLE_PLAIN_BYTES = 12 << 30
"""From this memory on, Apple silicon runs the weights as they are."""

GPU_BYTES = 5 << 30
"""Memory of a GPU that holds the model, its state and PyTorch."""

SMI_SECONDS = 30.0


class Advice(NamedTuple):
    """quantize: the setting to use, None where the model would not keep up. text: why, for a person."""

    quantize: Literal["none", "int8", "int4"] | None
    text: str


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "advise",
        help="say whether Kyutai's 1B model would keep up here",
        description=f"Say whether {MODEL} (English and French) would keep up with live speech on this machine, and with which "
        "weights. Measures for some seconds; needs neither the weights nor PyTorch.",
        epilog="Exit status: 0 it would, 1 it would not.",
    )
    parser.add_argument("--plain", action="store_true", help="print none, int8, int4 (for --quantize) or no, and nothing else")
    return parser


def run(args: argparse.Namespace) -> int:
    found = advise()
    if args.plain:
        print(found.quantize or "no")
    else:
        print(f"{MODEL}: {found.text}")
    return 0 if found.quantize else 1


def advise() -> Advice:
    """Look at the GPU first, then measure the CPU."""
    gpu = gpu_bytes()
    if gpu >= GPU_BYTES:
        return Advice("none", f"would keep up on the GPU ({gpu / (1 << 30):.0f} GB)")
    from moshi_stt.engines import on_apple_silicon

    if on_apple_silicon():
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        quantize: Literal["none", "int8"] = "none" if memory >= APPLE_PLAIN_BYTES else "int8"
        return Advice(quantize, f"should keep up on Apple silicon ({memory / (1 << 30):.0f} GB of memory); not measured")
    return from_cpu()


def from_cpu() -> Advice:
    """The most exact weights whose step fits the budget."""
    from moshi_stt.engines import missing_packages
    from moshi_stt.models.estimate import step_seconds

    if missing_packages(("onnxruntime",)):
        return Advice(None, "not measured, as onnxruntime is not installed")
    seconds = 0.0
    for quantize in ("int8", "int4"):
        seconds = step_seconds(quantize)
        if seconds <= BUDGET_SECONDS:
            text = f"would keep up with {quantize} weights: about {1000 * seconds:.0f} of 80 ms a step on this CPU"
            return Advice(quantize, text)
    return Advice(None, f"would not keep up with live speech: about {1000 * seconds:.0f} ms a step on this CPU, 80 at most")


def gpu_bytes() -> int:
    """Memory of the largest NVIDIA GPU, 0 where there is none."""
    smi = shutil.which("nvidia-smi") if sys.platform != "darwin" else None
    if smi is None:
        return 0
    command = [smi, "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=SMI_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return 0
    sizes = [int(line) for line in done.stdout.split() if line.isdecimal()] if done.returncode == 0 else []
    return max(sizes, default=0) << 20
