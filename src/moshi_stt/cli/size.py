"""`moshi-stt size`: how many live streams each model carries on this machine, its memory, and what an hour of audio costs."""

import argparse
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from moshi_stt.config import EmbeddedModule, KyutaiModule
from moshi_stt.constants import FRAME_SECONDS
from moshi_stt.cores import usable_cores
from moshi_stt.errors import MoshiSttError

T = TypeVar("T")

RAPL = Path("/sys/class/powercap")
IDLE_SECONDS = 1.0
STEPPING_SECONDS = 3.0
"""How long a loaded model is stepped: a GPU's power is an average over some tenths of a second."""
BUSY_LOAD = 0.5
"""Of other programs, for each core: beyond it the figures are marked."""
HOUR = 3_600.0
MEGABYTE = 1 << 20

MODEL_1B = "stt-1b-en_fr"
WEIGHT_BYTES = {"int8": 1.3e9, "int4": 0.9e9}
"""Of the 1B and its audio tokenizer (docs/mac.md)."""
STREAM_BYTES = 0.11e9


class Size(NamedTuple):
    """What a model needs here.

    core_seconds: of CPU time for an hour of one stream's audio; None on a GPU, where gpu_seconds are those of the whole GPU.
    bytes: what the first stream takes, the model included. joules: for that hour, beyond what the idle machine draws; None
    where it could not be read. note: how it was found.
    """

    model: str
    streams: int
    core_seconds: float | None
    bytes: float
    joules: float | None
    note: str
    gpu_seconds: float | None = None


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "size",
        help="measure how many live streams this machine carries",
        description="Measure how many live streams each model carries on this machine, its memory, and what an hour of audio "
        "costs. Without --config neither weights nor PyTorch are needed: the embedded model is measured, and the 1B on the CPU "
        "estimated. Other programs that are running make the figures worse.",
    )
    parser.add_argument(
        "--config",
        "--model",
        metavar="FILE",
        help="load this configuration's model and measure it on the GPU or CPU that serves it",
    )
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    return parser


def run(args: argparse.Namespace) -> int:
    from moshi_stt.cli.advise import gpu_bytes

    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    cores, sizes = usable_cores(), list(installed(args.config) if args.config else measured())
    if args.json:
        import msgspec

        print(msgspec.json.encode({"cores": cores, "load": load, "models": [size._asdict() for size in sizes]}).decode())
        return 0
    from moshi_stt.cli.configs import table

    print(f"{cores} usable core{'s'[: cores != 1]}\n")
    rows = [("MODEL", "LIVE STREAMS", "MEMORY", "AN HOUR OF AUDIO COSTS", "HOW IT WAS FOUND")]
    print("\n".join(table([*rows, *map(row, sizes)])))
    if all(size.joules is None for size in sizes):
        print("\nEnergy: this machine shows no counter that this user may read.")
    if load > BUSY_LOAD * cores:
        print(f"\nThe machine was busy (load {load:.1f}): these figures are too bad. Run it again while nothing else runs.")
    if gpu_bytes() and not args.config:
        print("\nThere is an NVIDIA GPU: `moshi-stt size --config stt-1b-en_fr` measures it, with the model's weights.")
    return 0


def row(size: Size) -> tuple[str, ...]:
    cost = f"{size.gpu_seconds:,.1f} s of the GPU" if size.gpu_seconds is not None else f"{size.core_seconds:,.0f} s of a core"
    cost += "" if size.joules is None else f", {size.joules / 1e3:,.1f} kJ"
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


def installed(config: str) -> Iterator[Size]:
    """The models of a configuration, loaded as a server would load them, on the device that would run them.

    Raises ConfigError, CheckpointError or DownloadError.
    """
    from moshi_stt.config_load import load_config

    for module in load_config(config).config.modules:
        yield embedded() if isinstance(module, EmbeddedModule) else loaded(config, module)


def loaded(name: str, module: KyutaiModule) -> Size:
    """By steps of as many streams as are in real time here, with full contexts."""
    from moshi_stt.engine.timings import TURNS, measure, step_seconds
    from moshi_stt.engines import FRAMEWORK_PACKAGES, framework_of, load_kyutai, missing_packages
    from moshi_stt.install import install_command

    framework = framework_of(module)
    if missing := missing_packages(FRAMEWORK_PACKAGES[framework]):
        raise MoshiSttError(f"{name} needs {', '.join(missing)}, not installed here: run `{install_command(framework)}`")
    model = load_kyutai(module, framework)
    backend, report, frame_seconds = model.backend, getattr(model.backend, "report", None), model.frame_seconds
    assert report is not None
    try:
        backend.warm_up()
        streams = measure(backend, model.streams, model.frame_samples).rows_within(frame_seconds, model.streams)
        rows = max(1, streams)
        turns: list[float] = []

        def step() -> float:
            end = time.monotonic() + STEPPING_SECONDS
            while not turns or time.monotonic() < end:
                turns.append(step_seconds(backend, rows, model.frame_samples))
            return sorted(turns)[len(turns) // 2]

        on_gpu = model.info.device.startswith(("cuda", "mps", "mlx gpu"))
        seconds, joules = with_energy(step, nvidia=model.info.device.startswith("cuda"))
        audio_seconds = len(turns) * (TURNS + 1) * rows * frame_seconds
    finally:
        backend.close()
    busy = seconds / (rows * frame_seconds) * HOUR
    return Size(
        name,
        streams,
        None if on_gpu else busy * usable_cores(),
        float(report.weight_bytes + report.slot_bytes),
        None if joules is None else joules / audio_seconds * HOUR,
        f"measured with {model.info.dtype} on {model.info.device}, {rows} of {model.streams} streams at once",
        busy if on_gpu else None,
    )


def with_energy(work: Callable[[], float], nvidia: bool = False) -> tuple[float, float | None]:
    """What `work` returns, and the joules it took beyond an idle machine's; None where there is no counter.

    nvidia: read the first NVIDIA GPU's power, too.
    """
    if nvidia and shutil.which("nvidia-smi"):
        idle_watts, _ = with_watts(lambda: time.sleep(IDLE_SECONDS))
        begun = time.monotonic()
        watts, (result, joules) = with_watts(lambda: with_energy(work))
        if watts is None or idle_watts is None:
            return result, joules
        return result, (joules or 0.0) + max(0.0, watts - idle_watts) * (time.monotonic() - begun)
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


def with_watts(work: Callable[[], T]) -> tuple[float | None, T]:
    """Mean watts of the first NVIDIA GPU while `work` ran (None where they cannot be read), and what it returned."""
    query = ["nvidia-smi", "--query-gpu=power.draw", "--format=csv,noheader,nounits", "--id=0", "--loop-ms=100"]
    with subprocess.Popen(query, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as reader:
        try:
            result = work()
        finally:
            reader.terminate()
        lines = reader.communicate()[0].splitlines()
    try:
        readings = [float(line) for line in lines]
    except ValueError:
        return None, result
    return (sum(readings) / len(readings) if readings else None), result


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
