"""A TOML file, or the name of a shipped one, to a checked `ServerConfig`. Fetches nothing and starts nothing.

Types are read here; what a model table may say is the law of `models/spec_tables.py`.

The tables are read as moshi-server reads them (contract section 4). Where that server panics, hangs or looks the other way,
this one says what is wrong; what is merely odd is a warning.
"""

import os
import re
import tomllib
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

from moshi_stt.config import (
    MOST_SOCKET_PROCESSES,
    ContinuousConfig,
    EmbeddedModule,
    EncoderConfig,
    EngineConfig,
    ExtraHeadsConfig,
    KyutaiModule,
    LimitsConfig,
    LutConfig,
    ModelConfig,
    Module,
    ServerConfig,
    TransformerConfig,
    WyomingConfig,
)
from moshi_stt.config_table import Table, did_you_mean, show
from moshi_stt.constants import DEFAULT_PATH, FRAME_RATE, PUBLIC_KEY
from moshi_stt.errors import ConfigError
from moshi_stt.models.spec_tables import conditioner_specs, driving_faults, table_faults
from moshi_stt.origins import is_ip, normal_origin

OTHER_KINDS = ("Tts", "Lm", "Mimi", "Py", "PyPost")
"""What else moshi-server can load."""

FIXED_ROUTES = ("/api/build_info", "/api/modules_info", "/metrics", "/health", "/ready")

ASR_SLOTS = 16
"""Streams at once of a module of type `Asr`, which has no `batch_size` of its own."""

MIMI_FILE = "mimi-pytorch-e351c8d8@125.safetensors"
"""Name of the audio tokenizer in every published repository."""


PACKAGE = "package:"
"""A file key that begins so names a file that comes with this package."""


class LoadedConfig(NamedTuple):
    """config: the checked file. source: its path, or `NAME (shipped)`. warnings: what stops nothing but should be known."""

    config: ServerConfig
    source: str
    warnings: list[str]


def embedded_config() -> ServerConfig:
    """What `worker` serves without a file: the embedded model, the well-known key, no log file."""
    module = EmbeddedModule(name="asr", path=DEFAULT_PATH)
    return ServerConfig(
        static_dir=None, log_dir=None, instance_name="moshi-stt", authorized_ids=frozenset({PUBLIC_KEY}), modules=(module,)
    )


def shipped_names() -> list[str]:
    """Names of the configurations that come with the package."""
    folder = resources.files("moshi_stt") / "configs"
    return sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml"))


def shipped_text(name: str) -> str:
    """Text of a shipped configuration. Raises ConfigError for a name that is none."""
    bare = name.removesuffix(".toml")
    names = shipped_names()
    if bare not in names:
        raise ConfigError(f"Unknown config: {name}{did_you_mean(bare, names)} (there are {', '.join(names)})")
    return (resources.files("moshi_stt") / "configs" / f"{bare}.toml").read_text(encoding="utf-8")


def load_config(name: str) -> LoadedConfig:
    """Load a TOML file by its path, or a shipped configuration by its name (a file of that name goes first).

    Raises ConfigError that names file, table, key, what came, what was expected and what to do.
    """
    path = Path(name)
    if path.is_file():
        return parse_config(_read(path), name)
    if "/" not in name and "\\" not in name and name.removesuffix(".toml") in shipped_names():
        return parse_config(shipped_text(name), f"{name.removesuffix('.toml')} (shipped)")
    if path.is_dir():
        raise ConfigError(f"{name}: is a directory; expected a TOML file")
    names = shipped_names()
    raise ConfigError(
        f"{name}: no such file, and no shipped configuration of that name{did_you_mean(path.stem, names)} "
        f"(there are {', '.join(names)}). Give the path of a TOML file, or one of these names."
    )


def parse_config(text: str, file: str) -> LoadedConfig:
    """Check the text of a configuration. `file` is what messages call it. Raises ConfigError."""
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as e:
        raise ConfigError(f"{file}: not valid TOML: {e}. Mend that line and try again.") from None
    top = Table(file, "", data, [])
    static_dir = _plain(top, "static_dir")
    log_dir = _plain(top, "log_dir")
    instance_name = _plain(top, "instance_name")
    if "/" in instance_name:
        top.fail("instance_name", "it becomes part of the log file's name; expected a name without a slash.")
    keys = top.get("authorized_ids", list[str], hint=f'Give the keys that clients may use, for example ["{PUBLIC_KEY}"].')
    if not keys:
        top.warn("authorized_ids", "the list is empty, so no client can connect; add a key")
    limits = _limits(top.table("moshi_stt"))
    wyoming = _wyoming(top.table("wyoming"))
    modules = _modules(top)
    top.warn_unknown()
    config = ServerConfig(
        static_dir=static_dir or None,
        log_dir=log_dir or None,
        instance_name=instance_name,
        authorized_ids=frozenset(keys),
        modules=modules,
        limits=limits,
        wyoming=wyoming,
    )
    return LoadedConfig(config, file, top.warnings)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as e:
        raise ConfigError(f"{path}: not valid TOML: byte {e.start} is not UTF-8. Save the file as UTF-8.") from None
    except OSError as e:
        raise ConfigError(f"{path}: cannot be read: {e.strerror}. Check the file's permissions.") from None


# ---- strings ---------------------------------------------------------------------------------------------------------


def expand(text: str, missing: Callable[[str], None] = lambda name: None) -> str:
    """Replace every `$NAME` by the environment's value, or by nothing where it is unset (`missing` is then told)."""

    def value(match: re.Match[str]) -> str:
        name = match[1]
        if name not in os.environ:
            missing(name)
        return os.environ.get(name, "")

    return re.sub(r"\$([A-Za-z_][A-Za-z0-9_]*)", value, text)


def _plain(table: Table, key: str) -> str:
    """A string with `$NAME` expanded, that may not be on a hub."""
    text = table.get(key, str)
    if text.startswith("hf://"):
        table.fail(key, "hf:// names a file on a model hub; expected a plain name or path here.")
    return _expanded(table, key, text)


def _expanded(table: Table, key: str, text: str) -> str:
    if "${" in text:
        table.warn(key, "${NAME} is not expanded, only $NAME is")
    if text.startswith("~"):
        table.warn(key, "~ is not expanded; write $HOME")
    return expand(text, lambda name: table.warn(key, f"${name} is not set in the environment and becomes empty text"))


def _file(table: Table, key: str, text: str | None = None) -> str:
    """A file key: `hf://` names keep their form, after a check; `package:` names become paths; paths have `$NAME` expanded."""
    if text is None:
        text = cast(str, table.get(key, str, hint='Give a path, or "hf://OWNER/REPOSITORY/FILE".'))
    if text.startswith("hf://"):
        parts = text.removeprefix("hf://").split("/")
        if len(parts) < 3 or not all(parts):
            table.fail(key, 'expected "hf://OWNER/REPOSITORY/FILE", at least three names with a slash between them.')
    elif text.startswith(PACKAGE):
        text = str(resources.files("moshi_stt") / text.removeprefix(PACKAGE))
    else:
        text = _expanded(table, key, text)
        if not text:
            table.fail(key, 'expected a path or "hf://OWNER/REPOSITORY/FILE", found nothing (after $NAME expansion).')
    if text.endswith(".gguf"):
        table.fail(key, "gguf files are not supported; use the .safetensors file of the same model.")
    return text


# ---- tables ----------------------------------------------------------------------------------------------------------


MAY_BE_ZERO = frozenset(
    (
        "socket_processes",
        "connections_per_address",
        "streams_per_key",
        "stream_seconds",
        "spool_bytes",
        "spool_total_bytes",
        "drain_seconds",
        "resume_seconds",
        "upload_bytes_per_second",
    )
)
"""Bounds of the server for which 0 has a meaning of its own."""


def _limits(table: Table | None) -> LimitsConfig:
    if table is None:
        return LimitsConfig()
    limits = table.struct(LimitsConfig)
    for key in LimitsConfig.__struct_fields__:
        value = getattr(limits, key)
        if isinstance(value, int | float) and not isinstance(value, bool) and value <= 0 and key not in MAY_BE_ZERO:
            table.fail(key, "expected a number above 0. Leave the key out for the default.")
    for origin in limits.allowed_origins:
        if normal_origin(origin) is None:
            table.fail("allowed_origins", f'"{origin}" is not an origin; expected for example "https://captions.example.org".')
    for proxy in limits.trusted_proxies:
        if not is_ip(proxy):
            table.fail("trusted_proxies", f'"{proxy}" is not an IP address; expected for example "10.0.0.5".')
    if limits.socket_processes != "auto" and limits.socket_processes > MOST_SOCKET_PROCESSES:
        table.fail("socket_processes", f'expected 0 to {MOST_SOCKET_PROCESSES}, or "auto".')
    if limits.inbox_seconds < 1 / FRAME_RATE:
        table.fail("inbox_seconds", f"expected at least one frame of audio, {1 / FRAME_RATE:g} s.")
    if limits.ping_seconds >= limits.silent_seconds:
        table.fail(
            "ping_seconds", f"expected less than silent_seconds ({limits.silent_seconds:g}); a ping keeps a quiet client."
        )
    return limits


def _wyoming(table: Table | None) -> WyomingConfig | None:
    if table is None:
        return None
    config = table.struct(WyomingConfig)
    try:
        _ = config.address
    except ConfigError:
        table.fail("uri", 'expected an IP address and a port, such as "tcp://127.0.0.1:10300".')
    return config


def _modules(top: Table) -> tuple[Module, ...]:
    tables = top.table("modules")
    modules: list[Module] = []
    for name in tables.data if tables else ():
        assert tables is not None
        table = tables.table(name)
        assert table is not None
        module = _module(table, name)
        for other in modules:
            if other.path == module.path:
                table.fail(
                    "path", f"[modules.{other.name}] has the same path; two modules cannot share one. Change one of them."
                )
        modules.append(module)
    if not modules:
        top.warn("modules", "there is no module, so nothing would be served; add one (`moshi-stt configs embedded` shows how)")
    return tuple(modules)


def _module(table: Table, name: str) -> Module:
    readers: dict[str, Callable[[Table, str, str], Module]] = {
        "Asr": _batched,
        "BatchedAsr": _batched,
        "PyBatchedAsr": _py_batched,
        "Embedded": _embedded,
    }
    one_of = f"expected one of {', '.join(show(k) for k in readers)}"
    kind = table.get("type", str, hint=f"{one_of[0].upper()}{one_of[1:]}.")
    if kind in OTHER_KINDS:
        table.fail("type", f"this server does speech-to-text only; {one_of}. Remove the module, or run it with moshi-server.")
    if kind not in readers:
        table.fail("type", f"{one_of}{did_you_mean(kind, readers)}")
    module = readers[kind](table, name, _path(table))
    table.warn_unknown()
    return module


def _path(table: Table) -> str:
    path = cast(str, table.get("path", str, hint=f'Give the HTTP route, usually "{DEFAULT_PATH}".'))
    if not path.startswith("/"):
        table.fail("path", f'expected a route that begins with "/". Write "/{path}".')
    if re.search(r"[\s?#{}*]", path):
        table.fail("path", "expected a plain route, without spaces and without ? # { } *.")
    if path in FIXED_ROUTES or path == "/":
        table.fail("path", f'the server itself answers there. Take another route, usually "{DEFAULT_PATH}".')
    return path


def _batch_size(table: Table, default: Any = ...) -> int:
    size = table.get("batch_size", int, default, hint="Give the number of streams to serve at once, for example 64.")
    if size < 1:
        table.fail("batch_size", "expected at least 1. Give the number of streams to serve at once, for example 64.")
    return cast(int, size)


def _batch_size_or_auto(table: Table, default: Any = ...) -> int | Literal["auto"]:
    if table.has("batch_size") and table.data["batch_size"] == "auto":
        return "auto"
    return _batch_size(table, default)


def _embedded(table: Table, name: str, path: str) -> EmbeddedModule:
    batch_size = _batch_size_or_auto(table) if table.has("batch_size") else "auto"
    return table.struct(EmbeddedModule, name=name, path=path, batch_size=batch_size)


def _engine(table: Table) -> EngineConfig:
    ours = table.table("moshi_stt")
    if not ours:
        return EngineConfig()
    encoder = ours.table("encoder")
    engine = ours.struct(EngineConfig, encoder=encoder.struct(EncoderConfig) if encoder else None)
    if not 0 <= engine.marker_wait_seconds <= 60:
        ours.fail("marker_wait_seconds", "expected seconds from 0 to 60. Leave the key out for the default.")
    if engine.stall_seconds and not 5 <= engine.stall_seconds <= 120:
        ours.fail("stall_seconds", "expected seconds from 5 to 120, or 0 for never. Leave the key out for the default.")
    return engine


def _batched(table: Table, name: str, path: str) -> KyutaiModule:
    """`Asr` and `BatchedAsr`."""
    kind = table.data["type"]
    model_table = table.table("model", required=True)
    assert model_table is not None
    model = _model(model_table)
    delay = cast(int, table.get("asr_delay_in_tokens", int, hint="6 for the 1B model, 32 for the 2.6B."))
    conditioning_delay = table.get("conditioning_delay", float, None)
    learnt_padding = table.get("conditioning_learnt_padding", bool, False)
    module = KyutaiModule(
        name=name,
        path=path,
        type=kind,
        batch_size=_batch_size_or_auto(table, ASR_SLOTS if kind == "Asr" else ...),
        lm_model_file=_file(table, "lm_model_file"),
        text_tokenizer_file=_file(table, "text_tokenizer_file"),
        audio_tokenizer_file=_file(table, "audio_tokenizer_file"),
        asr_delay_in_tokens=delay,
        model=model,
        temperature=table.get("temperature", float, 0.0),
        dtype_override=table.get("dtype_override", Literal["bf16", "f16", "f32", "f64"], None),
        conditioning_delay=conditioning_delay,
        conditioning_learnt_padding=learnt_padding,
        log_frequency_s=_log_frequency(table),
        engine=_engine(table),
    )
    _check_law(table, module, model)
    return module


def _log_frequency(table: Table) -> float | None:
    seconds: float | None = table.get("log_frequency_s", float, None)
    if seconds is not None and not 0.1 <= seconds <= 86_400:
        table.fail("log_frequency_s", "expected seconds between two token logs, 0.1 to 86400. Leave the key out for none.")
    return seconds


def _check_law(table: Table, module: KyutaiModule, model: ModelConfig) -> None:
    """Raise ConfigError for every value that no model can have, each at its place."""
    faults = [
        *table_faults(model, module.engine.encoder),
        *driving_faults(module, model.transformer.context, conditioner_specs(model)),
    ]
    if not faults:
        return
    messages = []
    for fault in faults:
        at: Table | None = table
        for name in fault.table:
            assert at is not None
            at = at.table(name)
        assert at is not None
        messages.append(at.message(fault.key, fault.expected))
    raise ConfigError("\n".join(messages))


# ---- PyBatchedAsr ----------------------------------------------------------------------------------------------------


class _Py(NamedTuple):
    """The `py` table, as the script that comes with moshi-server reads it."""

    lm: str
    mimi: str
    config: str
    device: Literal["auto", "cpu", "cuda"]
    temperature: float


def _py_batched(table: Table, name: str, path: str) -> KyutaiModule:
    py_table = table.table("py", required=True)
    assert py_table is not None
    if table.has("script"):
        table.warn("script", "scripts are not run: this server's own engine runs the model of [py] instead")
    delay = cast(int, table.get("asr_delay_in_tokens", int, hint="6 for the 1B model, 32 for the 2.6B."))
    py = _read_py(py_table, delay)
    engine = _engine(table)
    if engine.device == "auto" and py.device != "auto":
        engine = EngineConfig(**{f: getattr(engine, f) for f in engine.__struct_fields__} | {"device": py.device})
    return KyutaiModule(
        name=name,
        path=path,
        type="PyBatchedAsr",
        batch_size=_batch_size_or_auto(table),
        lm_model_file=py.lm,
        text_tokenizer_file=_file(table, "text_tokenizer_file"),
        audio_tokenizer_file=py.mimi,
        asr_delay_in_tokens=delay,
        model=None,
        config_file=py.config,
        temperature=py.temperature,
        engine=engine,
    )


def _read_py(py: Table, delay: int) -> _Py:
    repo = py.get("hf_repo", str, None)
    if repo is None and not (py.has("moshi_weight") and py.has("mimi_weight") and py.has("config_path")):
        py.fail("hf_repo", 'the key is missing; expected the repository of the model, for example "kyutai/stt-1b-en_fr".')
    if repo is not None and (repo.count("/") != 1 or not all(repo.split("/"))):
        py.fail("hf_repo", 'expected "OWNER/REPOSITORY", for example "kyutai/stt-1b-en_fr".')

    def file(key: str, published: str) -> str:
        return _file(py, key) if py.has(key) else f"hf://{repo}/{published}"

    for unused in ("log_folder", "tokenizer", "debug"):
        py.has(unused)
    own_delay = py.get("asr_delay_in_tokens", int, delay)
    if own_delay != delay:
        py.warn("asr_delay_in_tokens", f"is {own_delay}, and {delay} in the module's table; the module's is used")
    device = py.get("device", str, "auto").split(":")[0]
    if device not in ("auto", "cuda", "cpu"):
        py.fail("device", 'expected "cuda" or "cpu".')
    read = _Py(
        lm=file("moshi_weight", "model.safetensors"),
        mimi=file("mimi_weight", MIMI_FILE),
        config=file("config_path", "config.json"),
        device=cast(Any, device),
        temperature=py.get("temp", float, 0.0),
    )
    py.warn_unknown()
    return read


# ---- the model -------------------------------------------------------------------------------------------------------


def _model(table: Table) -> ModelConfig:
    if table.has("depformer"):
        table.fail("depformer", "speech-to-text models have none. Remove the table.")
    transformer_table = table.table("transformer", required=True)
    assert transformer_table is not None
    heads_table = table.table("extra_heads")
    heads = heads_table.struct(ExtraHeadsConfig) if heads_table else None
    return table.struct(
        ModelConfig,
        transformer=transformer_table.struct(TransformerConfig),
        extra_heads=heads,
        conditioners=_conditioners(table.table("conditioners")),
    )


def _conditioners(table: Table | None) -> dict[str, LutConfig | ContinuousConfig] | None:
    if table is None:
        return None
    read: dict[str, LutConfig | ContinuousConfig] = {}
    for name in table.data:
        conditioner = table.table(name)
        assert conditioner is not None
        kind = conditioner.get("type", Literal["Lut", "ContinuousAttribute"])
        read[name] = conditioner.struct(LutConfig) if kind == "Lut" else conditioner.struct(ContinuousConfig)
    return read
