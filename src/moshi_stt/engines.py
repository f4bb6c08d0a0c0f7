"""Configured modules to engines that are not started yet: the one place that knows which model runs on which framework.

No framework is imported before an engine of it is asked for; weights are found, fetched and loaded when the engine starts.
"""

import importlib.util
import json
import logging
import os
import platform
import re
import socket
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from moshi_stt.config import EmbeddedModule, KyutaiModule, LimitsConfig, Module, ServerConfig, inbox_samples
from moshi_stt.cores import usable_cores
from moshi_stt.engine.batch import BatchEngine
from moshi_stt.engine.engine import Engine, EngineInfo, EngineObserver
from moshi_stt.engine.loaded import LoadedModel
from moshi_stt.engine.mute import MuteSettings, hears_speech
from moshi_stt.engine.slots import spare_slots
from moshi_stt.engine.stream import StreamLimits
from moshi_stt.errors import CheckpointError, ConfigError
from moshi_stt.install import install_command
from moshi_stt.models.spec_tables import delay_frames

if TYPE_CHECKING:
    from moshi_stt.models.mlx_impl.backend import MLXBackend
    from moshi_stt.models.report import LoadReport
    from moshi_stt.models.spec import LMSpec, ModelSpec
    from moshi_stt.models.token_log import TokenLog
    from moshi_stt.models.torch_impl.backend import TorchBackend
    from moshi_stt.models.torch_impl.cuda.backend import CudaBackend

    KyutaiBackend = TorchBackend | CudaBackend | MLXBackend

log = logging.getLogger(__name__)

EMBEDDED_PACKAGES = ("onnxruntime",)
"""What the embedded model cannot do without."""

Framework = Literal["torch", "mlx"]

FRAMEWORK_PACKAGES: dict[Framework, tuple[str, ...]] = {
    "torch": ("torch", "safetensors", "sentencepiece", "huggingface_hub"),
    "mlx": ("mlx", "sentencepiece", "huggingface_hub"),
}

MEGABYTE = 1 << 20

AUTO_MOST = 2_048
"""The most streams that `batch_size = "auto"` takes."""

STREAMS_A_PROCESS = 64
"""Of which `socket_processes = "auto"` has one for as many, from twice as many streams on: it keeps a tenth of a core busy."""

MOST_AUTO_PROCESSES = 8

AUTO_MEMORY_SHARE = 0.8
"""Of the free memory, what their state may take."""


def build_engines(config: ServerConfig, *, force_cpu: bool = False) -> dict[str, Engine]:
    """One engine for each module, by the module's name. Raises ConfigError where one cannot be had here."""
    logs = None if config.log_dir is None else Path(config.log_dir) / f"{config.instance_name}-asr"
    for module in config.modules:
        if logs is None and isinstance(module, KyutaiModule) and module.log_frequency_s is not None:
            raise ConfigError(
                f"[modules.{module.name}] log_frequency_s: token logs need a log_dir; give one, or leave the key out"
            )
    return {module.name: build_engine(module, config.limits, force_cpu=force_cpu, token_logs=logs) for module in config.modules}


def build_engine(
    module: Module,
    limits: LimitsConfig,
    observer: EngineObserver | None = None,
    force_cpu: bool = False,
    token_logs: Path | None = None,
) -> Engine:
    """An engine that is not started. Raises ConfigError where a package is missing or a setting cannot be had.

    token_logs: how the names of the module's token logs begin, where it has `log_frequency_s`; None writes none.
    """
    stream_limits = StreamLimits(
        inbox_samples=inbox_samples(limits), outbox_events=limits.outbox_events, stuck_seconds=limits.stuck_seconds
    )
    if isinstance(module, EmbeddedModule):
        return _embedded(module, stream_limits, observer)
    if force_cpu:
        module = msgspec.structs.replace(module, engine=msgspec.structs.replace(module.engine, device="cpu"))
    return _kyutai(module, stream_limits, observer, limits.socket_processes, token_logs)


def missing_packages(names: tuple[str, ...]) -> list[str]:
    """Which of these distributions cannot be imported."""
    return [name for name in names if importlib.util.find_spec(name.replace("-", "_")) is None]


def _embedded(module: EmbeddedModule, limits: StreamLimits, observer: EngineObserver | None) -> Engine:
    missing = missing_packages(EMBEDDED_PACKAGES)
    if missing:
        raise ConfigError(
            f"the embedded English model needs {', '.join(missing)}, not installed here. "
            f"Run `{install_command('', missing)}`, or serve Kyutai's model: `moshi-stt worker --config stt-1b-en_fr`"
        )
    from moshi_stt.engine.segment import SegmentEngine
    from moshi_stt.models.embedded import load_embedded

    return SegmentEngine(
        partial(load_embedded, module.threads),
        slots=None if module.batch_size == "auto" else module.batch_size,
        threads=module.threads,
        limits=limits,
        observer=observer,
    )


def _kyutai(
    module: KyutaiModule,
    limits: StreamLimits,
    observer: EngineObserver | None,
    processes: int | Literal["auto"],
    token_logs: Path | None,
) -> Engine:
    if processes not in ("auto", 0) and not hasattr(socket, "send_fds"):
        raise ConfigError(f"socket_processes = {processes}: this system cannot hand sockets to other processes; use 0")
    framework = framework_of(module)
    device = module.engine.device
    if module.engine.quantize != "none" and (device.startswith("cuda") or device == "mps"):
        raise ConfigError(
            f'[modules.{module.name}.moshi_stt] quantize = "{module.engine.quantize}" with device = "{device}": PyTorch runs '
            'quantized weights on the CPU alone; use "none", or device = "cpu"'
        )
    missing = missing_packages(FRAMEWORK_PACKAGES[framework])
    if missing:
        raise ConfigError(f"Kyutai's models need {', '.join(missing)}, not installed here: run `{install_command(framework)}`")
    return BatchEngine(
        partial(load_kyutai, module, framework, processes, token_logs),
        marker_wait_seconds=module.engine.marker_wait_seconds,
        mute=MuteSettings(module.engine.stall_seconds, hears_speech) if module.engine.stall_seconds else None,
        limits=limits,
        observer=observer,
        name=module.lm_model_file,
    )


def framework_of(module: KyutaiModule) -> Framework:
    """What runs a module: MLX on Apple silicon, PyTorch elsewhere, unless the device says which or only one is installed."""
    device = module.engine.device
    if device.startswith("cuda") or device == "mps":
        return "torch"
    first: Framework = "mlx" if device == "mlx" or on_apple_silicon() else "torch"
    second: Framework = "torch" if first == "mlx" else "mlx"
    only_second = missing_packages((first,)) and not missing_packages((second,))
    return second if only_second and device != "mlx" else first


def on_apple_silicon() -> bool:
    return sys.platform == "darwin" and platform.machine() == "arm64"


def processes_for(streams: int, setting: int | Literal["auto"]) -> int:
    """How many further processes carry the WebSockets of so many streams."""
    if setting != "auto":
        return setting
    if streams < 2 * STREAMS_A_PROCESS or not hasattr(socket, "send_fds") or sys.platform == "darwin":
        return 0  # macOS may lose a descriptor whose sender closes it before the receiver has it
    return min(streams // STREAMS_A_PROCESS, usable_cores() // 2, MOST_AUTO_PROCESSES)


def load_kyutai(
    module: KyutaiModule, framework: Framework, processes: int | Literal["auto"] = 0, token_logs: Path | None = None
) -> LoadedModel:
    """Find the files, fetch what is missing, and load the model. On the engine's model thread.

    processes: how many others will share it. token_logs: see `build_engine`.

    Raises ConfigError, CheckpointError or DownloadError.
    """
    from moshi_stt.models.hub import resolve
    from moshi_stt.models.spec_tables import spec_from_module
    from moshi_stt.text.tokenizer import TextTokenizer
    from moshi_stt.text.words import WordAssembler

    begun = time.monotonic()
    config_json = read_json(resolve(module.config_file)) if module.config_file else None
    lm_file, mimi_file = resolve(module.lm_model_file), resolve(module.audio_tokenizer_file)
    tokenizer = TextTokenizer(resolve(module.text_tokenizer_file))
    spec = spec_from_module(module, config_json)
    tokenizer.check(spec.lm.text_card)

    def slots_for(streams: int) -> int:
        return streams + spare_slots(streams, processes_for(streams, processes))

    streams = 1 if module.batch_size == "auto" else module.batch_size
    backend = _load_backend(module, framework, lm_file, mimi_file, spec, slots_for(streams))
    if module.batch_size == "auto":
        streams = fit_streams(backend, slots_for)
    while streams > 1 and slots_for(streams) > backend.slots:  # memory had room for fewer, and the report says so
        streams -= 1
    assert backend.report is not None
    info = EngineInfo(
        kind="py_batched_asr" if module.type == "PyBatchedAsr" else "batched_asr",
        model=str(lm_file),
        audio_tokenizer=str(mimi_file),
        languages=languages_of(module.lm_model_file),
        device=backend.report.device,
        dtype=backend.report.dtype,
        total_slots=streams,
        prefix_silence_seconds=spec.prefix_silence_seconds,
        details={"loaded in": f"{time.monotonic() - begun:.1f} s"} | _details(backend.report),
    )
    recorder = None
    if module.log_frequency_s is not None and token_logs is not None:
        recorder = make_token_log(token_logs, spec.lm, streams, module.log_frequency_s)
        backend.record_to(recorder)
    return LoadedModel(
        backend,
        partial(WordAssembler, tokenizer.decode, delay_frames(module)),
        info,
        streams,
        delay_frames(module),
        processes=processes_for(streams, processes),
        recorder=recorder,
    )


def _load_backend(
    module: KyutaiModule, framework: Framework, lm_file: Path, mimi_file: Path, spec: "ModelSpec", slots: int
) -> "KyutaiBackend":
    if framework == "mlx":
        from moshi_stt.models.mlx_impl.build import load_backend as load_mlx

        return load_mlx(module, lm_file, mimi_file, spec, slots)
    from moshi_stt.models.torch_impl.build import load_backend

    return load_backend(module, lm_file, mimi_file, spec, slots)


def _details(report: "LoadReport") -> dict[str, str]:
    """What a load came to, for the log."""
    details = {
        "weights": f"{report.weight_bytes / MEGABYTE:,.0f} MB",
        "state of a stream": f"{report.slot_bytes / MEGABYTE:,.1f} MB",
    }
    return details | {f"note {i}": note for i, note in enumerate(report.notes, 1)}


def make_token_log(base: Path, spec: "LMSpec", streams: int, seconds: float) -> "TokenLog":
    """One whose files bear the time, as moshi-server's do: seconds since 1970, and microseconds."""
    from moshi_stt.models.token_log import TokenLog

    whole, fraction = divmod(time.time_ns() // 1_000, 1_000_000)
    return TokenLog(base.with_name(f"{base.name}-{whole}-{fraction}"), spec, streams, seconds)


def fit_streams(backend: "KyutaiBackend", slots_for: Callable[[int], int]) -> int:
    """Give a loaded backend as many streams as memory and time allow here, and return how many those are.

    slots_for: slots that so many streams need.
    """
    from moshi_stt.models.autosize import sustained_streams

    report = backend.report
    assert report is not None
    most = max(1, min(AUTO_MOST, int(free_bytes(backend) * AUTO_MEMORY_SHARE / report.slot_bytes)))
    backend.resize(slots_for(most))
    backend.warm_up()
    streams = sustained_streams(backend, most)
    log.info('batch_size = "auto": room for %d streams, and time for %d', most, streams)
    if streams < most:
        backend.resize(slots_for(streams))
    return streams


def free_bytes(backend: "KyutaiBackend") -> int:
    """Memory for state: what is free on a CUDA device; elsewhere half of the machine's, which its programs share."""
    if backend.device.type == "cuda":
        import torch

        from moshi_stt.models.torch_impl.device import free_bytes as free_on

        return free_on(torch.device(str(backend.device)))
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def languages_of(lm_model_file: str) -> tuple[str, ...]:
    """`stt-1b-en_fr-candle/model.safetensors` → en, fr. Empty where the name tells nothing."""
    found = re.search(r"stt-[0-9.]+b-([a-z]{2}(?:_[a-z]{2})*)\b", lm_model_file)
    return tuple(found[1].split("_")) if found else ()


def read_json(path: Path) -> dict[str, Any]:
    """A repository's config.json. Raises CheckpointError for a file that is none."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise CheckpointError(f"{path}: not a readable config.json: {e}. Fetch it again.") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(data).__name__}")
    return data
