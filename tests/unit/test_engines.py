"""From a configured module to its engine: what is chosen, and what is said where it cannot be had."""

from collections.abc import Callable
from typing import Literal

import msgspec
import pytest

from moshi_stt import engines
from moshi_stt.config import EngineConfig, KyutaiModule, LimitsConfig
from moshi_stt.config_load import embedded_config, load_config
from moshi_stt.engine.batch import BatchEngine
from moshi_stt.engines import build_engine, build_engines, framework_of, languages_of, processes_for
from moshi_stt.errors import ConfigError
from moshi_stt.install import install_command


@pytest.fixture
def lacking(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Call it with names of packages: these, and no others, are missing from then on."""

    def lack(*names: str) -> None:
        monkeypatch.setattr(engines, "missing_packages", lambda wanted: [name for name in wanted if name in names])

    return lack


def one_b(**engine: object) -> KyutaiModule:
    (module,) = load_config("stt-1b-en_fr").config.modules
    assert isinstance(module, KyutaiModule)
    return msgspec.structs.replace(module, engine=EngineConfig(**engine))  # type: ignore[arg-type]


def test_the_embedded_engine() -> None:
    built = build_engines(embedded_config())
    assert list(built) == ["asr"]
    assert built["asr"].total_slots == 64
    assert not built["asr"].ready


def test_a_missing_wheel_of_the_embedded_model(lacking: Callable[..., None]) -> None:
    lacking("onnxruntime")
    with pytest.raises(
        ConfigError, match=r"needs onnxruntime, not installed here\. Run `\S*scripts/install\.sh`, or serve Kyu"
    ):
        build_engines(embedded_config())


def test_kyutais_engine_is_not_loaded_before_it_is_started(lacking: Callable[..., None]) -> None:
    lacking()
    engine = build_engine(one_b(), LimitsConfig())
    assert isinstance(engine, BatchEngine)
    assert not engine.ready
    assert engine.info.model == "hf://kyutai/stt-1b-en_fr-candle/model.safetensors"


def test_token_logs_need_a_folder(lacking: Callable[..., None]) -> None:
    """Every module's are in `log_dir`; a recording that is transcribed has none."""
    lacking()
    module = msgspec.structs.replace(one_b(), log_frequency_s=10.0)
    config = msgspec.structs.replace(load_config("stt-1b-en_fr").config, modules=(module,))
    assert list(build_engines(config)) == ["asr"]
    with pytest.raises(ConfigError, match=r"\[modules\.asr\] log_frequency_s: token logs need a log_dir"):
        build_engines(msgspec.structs.replace(config, log_dir=None))
    assert not build_engine(module, LimitsConfig()).ready


def test_a_missing_extra_is_a_sentence_with_the_command(lacking: Callable[..., None]) -> None:
    lacking("torch", "mlx", "sentencepiece")
    with pytest.raises(ConfigError) as raised:
        build_engine(one_b(device="cuda"), LimitsConfig())
    assert str(raised.value) == (
        f"Kyutai's models need torch, sentencepiece, not installed here: run `{install_command('torch')}`"
    )
    with pytest.raises(ConfigError, match=r"need mlx, sentencepiece, .*scripts/install\.sh --with mlx`"):
        build_engine(one_b(device="mlx"), LimitsConfig())


@pytest.mark.parametrize(
    ("device", "apple", "absent", "framework"),
    [
        ("auto", False, (), "torch"),
        ("auto", True, (), "mlx"),
        ("auto", True, ("mlx",), "torch"),
        ("auto", False, ("torch",), "mlx"),
        ("auto", False, ("torch", "mlx"), "torch"),
        ("cuda", True, ("torch",), "torch"),
        ("mps", True, (), "torch"),
        ("mlx", False, ("mlx",), "mlx"),
    ],
)
def test_which_framework(
    monkeypatch: pytest.MonkeyPatch,
    lacking: Callable[..., None],
    device: str,
    apple: bool,
    absent: tuple[str, ...],
    framework: str,
) -> None:
    lacking(*absent)
    monkeypatch.setattr(engines, "on_apple_silicon", lambda: apple)
    assert framework_of(one_b(device=device)) == framework


@pytest.mark.parametrize(
    ("name", "languages"),
    [
        ("hf://kyutai/stt-1b-en_fr-candle/model.safetensors", ("en", "fr")),
        ("/models/stt-2.6b-en/model.safetensors", ("en",)),
        ("/models/mine/model.safetensors", ()),
    ],
)
def test_languages(name: str, languages: tuple[str, ...]) -> None:
    assert languages_of(name) == languages


@pytest.mark.parametrize(
    ("streams", "cores", "setting", "processes"),
    [
        (64, 16, "auto", 0),
        (127, 16, "auto", 0),
        (128, 16, "auto", 2),
        (1_024, 16, "auto", 8),
        (1_024, 4, "auto", 2),
        (1_024, 1, "auto", 0),
        (2_048, 64, "auto", 8),
        (1, 1, 3, 3),
        (2_048, 64, 0, 0),
    ],
)
def test_socket_processes(
    monkeypatch: pytest.MonkeyPatch, streams: int, cores: int, setting: Literal["auto"] | int, processes: int
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 128)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(cores), raising=False)  # of a container that may use fewer
    assert processes_for(streams, setting) == processes
    monkeypatch.setattr("sys.platform", "darwin")
    assert processes_for(streams, setting) == (0 if setting == "auto" else processes)


def test_a_system_that_cannot_hand_sockets_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Windows: `auto` does without, a number is refused."""
    monkeypatch.delattr("socket.send_fds", raising=False)
    assert processes_for(1_024, "auto") == 0
    config = load_config("stt-1b-en_fr").config
    limits = msgspec.structs.replace(config.limits, socket_processes=2)
    with pytest.raises(ConfigError, match="socket_processes = 2: this system cannot hand sockets to other processes; use 0"):
        build_engines(msgspec.structs.replace(config, limits=limits))
