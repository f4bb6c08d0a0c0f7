"""`moshi-stt size`: how many live streams each model carries on this machine, its memory, and what an hour of audio costs."""

import argparse
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from moshi_stt.constants import FRAME_SECONDS
from moshi_stt.cores import usable_cores
from moshi_stt.errors import MoshiSttError

RAPL = Path("/sys/class/powercap")
IDLE_SECONDS = 1.0
HOUR = 3_600.0
MEGABYTE = 1 << 20

MODEL_1B = "stt-1b-en_fr"
WEIGHT_BYTES = {"int8": 1.3e9, "int4": 0.9e9}
"""Of the 1B and its audio tokenizer (docs/mac.md)."""
STREAM_BYTES = 0.11e9


class Size(NamedTuple):
    """What a model needs here.

    core_seconds: of CPU time for an hour of one stream's audio. bytes: what the first stream takes, the model included.
    joules: for that hour, beyond what the idle machine draws; None where it could not be read. note: how it was found.
    """

    model: str
    streams: int
    core_seconds: float
    bytes: float
    joules: float | None
    note: str


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "size",
        help="measure how many live streams this machine carries",
        description="Measure how many live streams each model carries on this machine, its memory, and what an hour of audio "
        "costs. Needs neither weights nor PyTorch. Other programs that are running make the figures worse.",
        epilog="A GPU is measured when a server starts on it: its log says `real-time streams`.",
    )
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    return parser


def run(args: argparse.Namespace) -> int:
    from moshi_stt.cli.advise import gpu_bytes

    cores, sizes = usable_cores(), list(measured())
    if args.json:
        import msgspec

        print(msgspec.json.encode({"cores": cores, "models": [size._asdict() for size in sizes]}).decode())
        return 0
    from moshi_stt.cli.configs import table

    print(f"{cores} usable core{'s'[: cores != 1]}\n")
    rows = [("MODEL", "LIVE STREAMS", "MEMORY", "AN HOUR OF AUDIO COSTS", "HOW IT WAS FOUND")]
    print("\n".join(table([*rows, *map(row, sizes)])))
    if all(size.joules is None for size in sizes):
        print("\nEnergy: this machine shows no counter that this user may read.")
    if gpu_bytes():
        print("\nThere is an NVIDIA GPU: `moshi-stt worker --config stt-1b-en_fr --batch-size auto` measures it at start.")
    return 0


def row(size: Size) -> tuple[str, ...]:
    cost = f"{size.core_seconds:,.0f} s of a core" + ("" if size.joules is None else f", {size.joules / 1e3:,.1f} kJ")
    streams = str(size.streams) if size.streams else "none: too slow"
    return size.model, streams, f"{size.bytes / MEGABYTE:,.0f} MB", cost, size.note


def measured() -> Iterator[Size]:
    """Those models that can be measured with what is installed."""
    from moshi_stt.engines import EMBEDDED_PACKAGES, missing_packages

    if missing := missing_packages(EMBEDDED_PACKAGES):
        raise MoshiSttError(f"nothing can be measured without {', '.join(missing)}: run `moshi-stt doctor`")
    yield embedded()
    for quantize in ("int8", "int4"):
        yield kyutai(quantize)


def embedded() -> Size:
    """By recognising the shipped recording."""
    from moshi_stt.engine.segment import measure
    from moshi_stt.engine.segmenter import SegmentSettings
    from moshi_stt.models.embedded import load_embedded

    recogniser = load_embedded(1)
    try:
        recogniser.recognise(recogniser.sample())
        audio_seconds = len(recogniser.sample()) / 16_000
        cost, joules = with_energy(lambda: measure(recogniser, SegmentSettings()))
    finally:
        recogniser.close()
    return Size(
        "embedded",
        int(usable_cores() / cost),
        cost * HOUR,
        peak_bytes(),
        None if joules is None else joules / audio_seconds * HOUR,
        "measured: speech without pauses",
    )


def kyutai(quantize: str) -> Size:
    """By the matrix products of the 1B's shape with random weights; a step of one stream uses all cores."""
    from moshi_stt.models.estimate import step_seconds

    seconds = step_seconds(quantize)
    return Size(
        f"{MODEL_1B} {quantize}",
        int(FRAME_SECONDS / seconds),
        seconds / FRAME_SECONDS * usable_cores() * HOUR,
        WEIGHT_BYTES[quantize] + STREAM_BYTES,
        None,
        "estimated from its matrix products, memory from its shape",
    )


def with_energy(work: Callable[[], float]) -> tuple[float, float | None]:
    """What `work` returns, and the joules it took beyond an idle machine's; None where there is no counter."""
    before = joules_now()
    if before is None:
        return work(), None
    time.sleep(IDLE_SECONDS)
    idle = joules_now()
    begun = time.monotonic()
    result = work()
    after, seconds = joules_now(), time.monotonic() - begun
    if idle is None or after is None:
        return result, None
    watts = (idle - before) / IDLE_SECONDS
    return result, max(0.0, after - idle - watts * seconds)


def joules_now() -> float | None:
    """The sum of the processor packages' energy counters (Linux, RAPL); None where none can be read."""
    total = None
    for path in sorted(RAPL.glob("intel-rapl:?/energy_uj")):
        try:
            total = (total or 0.0) + int(path.read_text()) / 1e6
        except (OSError, ValueError):
            continue
    return total


def peak_bytes() -> float:
    """The most memory that this process has had."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(peak if sys.platform == "darwin" else peak * 1024)
