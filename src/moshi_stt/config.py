"""The configuration: TOML in, frozen structs out. Knows nothing of engines, servers or frameworks.

The tables are those of moshi-server (contract section 4). What is ours alone lives in tables named `moshi_stt`, which
moshi-server ignores: `[moshi_stt]` for the server, `[modules.NAME.moshi_stt]` for a module.
"""

import ipaddress
import re
from typing import Literal

import msgspec

from moshi_stt.constants import SAMPLE_RATE
from moshi_stt.errors import ConfigError

GIB = 1 << 30

MOST_SOCKET_PROCESSES = 64


class LimitsConfig(msgspec.Struct, frozen=True, kw_only=True):
    """`[moshi_stt]`: bounds of the server."""

    max_upload_bytes: int = 1 * GIB
    """Largest POST body."""
    max_message_bytes: int = 64 << 20
    """Largest WebSocket message."""
    inbox_seconds: float = 20.0
    """Audio a stream may have waiting before its socket is no longer read."""
    outbox_events: int = 1_024
    stuck_seconds: float = 30.0
    """A reader that takes nothing for so long is closed."""
    ping_seconds: float = 10.0
    idle_seconds: float = 120.0
    """A client from which no audio, marker or init came for so long is closed."""
    silent_seconds: float = 20.0
    """A client from which nothing at all, not even a pong, came for so long is closed."""
    slot_wait_seconds: float = 100.0
    """How long a POST waits for a free slot."""
    allowed_origins: tuple[str, ...] = ()
    """Web pages, as `https://host[:port]`, that may use the server besides those of this machine (docs/operations.md)."""
    trusted_proxies: tuple[str, ...] = ()
    """IP addresses, besides this machine's own, of proxies whose X-Real-IP is the client's address."""
    connections_per_address: int = 4_096
    """WebSockets that one address may have open; 0 is no limit."""
    streams_per_key: int = 0
    """WebSockets that one API key may have open; 0 is no limit."""
    stream_seconds: float = 0.0
    """How long a stream may last, by WebSocket, by TCP or as a POST; 0 is no limit."""
    ahead_bytes: int = 1 << 20
    """Messages that a stream may have waiting in memory once its inbox is full; what comes after them goes to the spool."""
    spool_dir: str = "/var/tmp"
    """Folder of the nameless files in which messages wait that came ahead of recognition."""
    spool_bytes: int = 512 << 20
    """What one stream may have in the spool; 0 uses none."""
    spool_total_bytes: int | Literal["auto"] = "auto"
    """What all streams together may have; auto: a tenth of the free disk, at most 8 GB."""
    drain_seconds: float = 30.0
    """How long live streams may go on after SIGTERM."""
    resume_seconds: float = 15.0
    """How long a stream whose client asked for `resume` is kept after its socket broke; 0 keeps none."""
    max_uploads: int = 256
    """POST bodies that are received at once."""
    upload_bytes_per_second: int = 1_024
    """The least rate of a POST body, averaged from its second half minute on; 0 is no limit."""
    max_audio_seconds: float = 6 * 3600.0
    """Longest audio of a POST, decoded."""
    socket_processes: int | Literal["auto"] = "auto"
    """Further processes that carry the WebSockets of Kyutai's models; auto: none below 128 streams (docs/internals/gpu.md)."""
    devices: str = ""
    """Devices that run a model process each, as in `worker --devices`; empty: this process alone."""
    ignore_unsupported: bool = False
    """Take options of other protocols that a caller relies on and that this server cannot do, and ignore them."""


class TransformerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """`[modules.NAME.model.transformer]` (contract section 4.4)."""

    d_model: int
    num_heads: int
    num_layers: int
    dim_feedforward: int
    causal: bool
    norm_first: bool
    bias_ff: bool
    bias_attn: bool
    context: int
    max_period: float
    use_conv_block: bool
    use_conv_bias: bool
    norm: str
    positional_embedding: str
    conv_layout: bool
    conv_kernel_size: int
    kv_repeat: int
    max_seq_len: int
    gating: str | None = None
    layer_scale: float | None = None
    cross_attention: bool = False
    shared_cross_attn: bool = False


class ExtraHeadsConfig(msgspec.Struct, frozen=True, kw_only=True):
    num_heads: int
    dim: int


class LutConfig(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="Lut"):
    """`[modules.NAME.model.conditioners.NAME]` of type "Lut"."""

    n_bins: int
    dim: int
    possible_values: list[str]


class ContinuousConfig(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="ContinuousAttribute"):
    """`[modules.NAME.model.conditioners.NAME]` of type "ContinuousAttribute"."""

    dim: int
    scale_factor: float
    max_period: float


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True):
    """`[modules.NAME.model]` (contract section 4.4)."""

    text_in_vocab_size: int
    text_out_vocab_size: int
    audio_vocab_size: int
    audio_codebooks: int
    transformer: TransformerConfig
    extra_heads: ExtraHeadsConfig | None = None
    conditioners: dict[str, LutConfig | ContinuousConfig] | None = None


class EncoderConfig(msgspec.Struct, frozen=True, kw_only=True):
    """`[modules.NAME.moshi_stt.encoder]`: sizes of an audio encoder other than Mimi (docs/internals/phrases.md)."""

    channels: list[int]
    """Of the convolutions, from the first to the last."""
    dim: int
    """Width of the transformer."""
    heads: int
    layers: int
    feedforward: int
    codebook_size: int
    codebook_dim: int


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True):
    """`[modules.NAME.moshi_stt]`: how the model is run."""

    device: Literal["auto", "cpu", "cuda", "mps", "mlx"] = "auto"
    quantize: Literal["none", "int8", "int4"] = "none"
    kv_dtype: Literal["auto", "bf16", "f32", "fp8"] = "auto"
    mimi_dtype: Literal["auto", "tf32", "f32", "f16", "bf16"] = "auto"
    threads: int = 0
    """CPU threads of the model; 0 chooses."""
    fixed_shapes: bool = False
    """Compute rows in shapes that do not depend on the neighbours."""
    marker_wait_seconds: float = 0.25
    """When nothing followed a marker for so long, silence of the server's own answers it (docs/internals/engine.md)."""
    stall_seconds: float = 20.0
    """A stream with speech and no word for so long has its model state reset (docs/internals/engine.md); 0 never."""
    encoder: EncoderConfig | None = None
    """None: Mimi as published."""


class KyutaiModule(msgspec.Struct, frozen=True, kw_only=True):
    """`Asr`, `BatchedAsr` or `PyBatchedAsr`, resolved. File keys are after `$NAME` expansion, `hf://` still unresolved."""

    name: str
    path: str
    type: Literal["Asr", "BatchedAsr", "PyBatchedAsr"]
    batch_size: int | Literal["auto"]
    lm_model_file: str
    text_tokenizer_file: str
    audio_tokenizer_file: str
    asr_delay_in_tokens: int
    model: ModelConfig | None
    """None for `PyBatchedAsr`: the spec then comes from the repository's config.json, whose hf:// name is `config_file`."""
    config_file: str | None = None
    temperature: float = 0.0
    dtype_override: Literal["bf16", "f16", "f32", "f64"] | None = None
    conditioning_delay: float | None = None
    conditioning_learnt_padding: bool = False
    log_frequency_s: float | None = None
    engine: EngineConfig = EngineConfig()


class EmbeddedModule(msgspec.Struct, frozen=True, kw_only=True):
    """`Embedded`: the small English model that comes with the package."""

    name: str
    path: str
    batch_size: int | Literal["auto"] = "auto"
    """Streams at once; auto: as many as this machine recognises in real time, measured at start."""
    threads: int = 0
    """Recogniser threads; 0 takes one for each usable core."""


Module = KyutaiModule | EmbeddedModule


def with_quantize(module: Module, scheme: Literal["none", "int8", "int4"]) -> Module:
    """The module with `--quantize` put into it. Raises ConfigError for a model that has no other weights."""
    if isinstance(module, KyutaiModule):
        engine: EngineConfig = msgspec.structs.replace(module.engine, quantize=scheme)
        return msgspec.structs.replace(module, engine=engine)
    if scheme != "none":
        raise ConfigError(f"--quantize {scheme}: the embedded model has no other weights; choose Kyutai's by --config")
    return module


class WyomingConfig(msgspec.Struct, frozen=True, kw_only=True):
    """`[wyoming]`: Home Assistant's protocol, on a port of its own. It knows no keys."""

    uri: str = "tcp://127.0.0.1:10300"
    endpointing: bool = False
    """End a command after a pause by ourselves, for a Home Assistant that does not."""
    profanity_filter: bool = False

    @property
    def address(self) -> tuple[str, int]:
        """Host, as an IP address, and port. Raises ConfigError."""
        match = re.fullmatch(r"tcp://(\[[0-9A-Fa-f:]+\]|[^:/]+):(\d{1,5})", self.uri)
        host = "" if match is None else match[1].strip("[]")
        try:
            host = "127.0.0.1" if host == "localhost" else str(ipaddress.ip_address(host))
            if match is None or int(match[2]) > 65_535:
                raise ValueError
        except ValueError:
            raise ConfigError(
                f'wyoming: uri {self.uri!r}: expected an IP address and a port, such as "tcp://127.0.0.1:10300"'
            ) from None
        return host, int(match[2])


class ServerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """A whole file, checked."""

    static_dir: str | None
    """None serves the page that comes with the package."""
    log_dir: str | None
    """None writes no log file."""
    instance_name: str
    authorized_ids: frozenset[str]
    modules: tuple[Module, ...]
    limits: LimitsConfig = LimitsConfig()
    wyoming: WyomingConfig | None = None
    """None: not served."""


def inbox_samples(limits: LimitsConfig) -> int:
    """The inbox bound in samples."""
    return int(limits.inbox_seconds * SAMPLE_RATE)
