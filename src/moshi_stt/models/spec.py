"""What a Kyutai speech-to-text model is, as frozen data, from a TOML `model` table or a repository's config.json.

Knows nothing of tensors, files or frameworks. What makes no sense is reported all at once, each thing by its key.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from moshi_stt.config import KyutaiModule, ModelConfig
from moshi_stt.constants import FRAME_RATE, FRAME_SAMPLES
from moshi_stt.errors import CheckpointError, ConfigError, MoshiSttError

MAX_CODEBOOKS = 32
"""Codebooks in the Mimi file: one semantic, 31 acoustic."""


@dataclass(frozen=True)
class ConvSpec:
    """One causal convolution of the encoder (contract section 5.1). `context` columns of its input are kept between frames."""

    name: str
    """Stem of its tensors in the Mimi file, e.g. `encoder.model.0`."""
    channels_in: int
    channels_out: int
    kernel: int
    stride: int = 1

    @property
    def context(self) -> int:
        return self.kernel - self.stride


@dataclass(frozen=True)
class MimiSpec:
    """The Mimi encoder. Only the number of codebooks varies; the rest is the one published file (contract section 5.1)."""

    codebooks: int = MAX_CODEBOOKS
    codebook_size: int = 2_048
    codebook_dim: int = 256
    dim: int = 512
    heads: int = 8
    layers: int = 8
    feedforward: int = 2_048
    context: int = 250
    """Window of the transformer in 25 Hz positions."""
    max_period: float = 10_000.0
    norm_eps: float = 1e-5
    channels: tuple[int, ...] = (64, 128, 256, 512, 1_024)
    strides: tuple[int, ...] = (4, 5, 6, 8)
    frame_samples: int = FRAME_SAMPLES

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads

    @property
    def positions_per_frame(self) -> int:
        """Transformer positions in one frame: 2 at 25 Hz."""
        return self.frame_samples // math.prod(self.strides)

    @property
    def first_conv(self) -> ConvSpec:
        return ConvSpec("encoder.model.0", 1, self.channels[0], 7)

    @property
    def stages(self) -> tuple[tuple[ConvSpec, ConvSpec, ConvSpec], ...]:
        """(residual conv 3, residual conv 1, strided conv) of each level, in order."""
        levels = []
        for i, stride in enumerate(self.strides):
            here, there = self.channels[i], self.channels[i + 1]
            block, conv = f"encoder.model.{3 * i + 1}.block", f"encoder.model.{3 * i + 3}"
            levels.append(
                (
                    ConvSpec(f"{block}.1", here, here // 2, 3),
                    ConvSpec(f"{block}.3", here // 2, here, 1),
                    ConvSpec(conv, here, there, 2 * stride, stride),
                )
            )
        return tuple(levels)

    @property
    def last_conv(self) -> ConvSpec:
        return ConvSpec(f"encoder.model.{3 * len(self.strides) + 2}", self.channels[-1], self.dim, 3)

    @property
    def downsample(self) -> ConvSpec:
        """No bias; its tensor is `downsample.conv.conv.conv.weight`."""
        return ConvSpec("downsample.conv", self.dim, self.dim, 2 * self.positions_per_frame, self.positions_per_frame)

    @property
    def convs(self) -> tuple[ConvSpec, ...]:
        """Every convolution in the order of the data, the downsampling last."""
        return (self.first_conv, *(conv for level in self.stages for conv in level), self.last_conv, self.downsample)


@dataclass(frozen=True)
class ConditionerSpec:
    """One entry of `model.conditioners` (contract sections 4.4 and 5.8)."""

    name: str
    kind: Literal["Lut", "ContinuousAttribute"]
    dim: int
    bins: int = 0
    possible_values: tuple[str, ...] = ()
    scale_factor: float = 1.0
    max_period: float = 10_000.0


@dataclass(frozen=True)
class Condition:
    """The one vector added to every step's input (contract section 5.8). value None: the conditioner's learnt padding."""

    conditioner: ConditionerSpec
    value: float | None = None


@dataclass(frozen=True)
class LMSpec:
    """The delayed-streams language model (contract section 5.2). The gate's hidden size is read from its tensor."""

    dim: int
    heads: int
    layers: int
    context: int
    """Positions attended to, the current one included."""
    max_period: float
    text_card: int
    """Text tokens that come out; the start token, text_card, goes in besides."""
    codebooks: int
    audio_card: int = 2_048
    """Codes of each codebook; the pad, audio_card, goes in besides."""
    extra_heads: int = 0
    extra_head_dim: int = 6
    conditioners: tuple[ConditionerSpec, ...] = ()
    norm_eps: float = 1e-8

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads

    @property
    def start_token(self) -> int:
        """Text id fed at a stream's first step."""
        return self.text_card

    @property
    def pad_code(self) -> int:
        """Audio id fed to every codebook at a stream's first step."""
        return self.audio_card

    def kv_bytes(self, element_bytes: int) -> int:
        """K and V of one slot in bytes."""
        return 2 * self.layers * self.context * self.dim * element_bytes


@dataclass(frozen=True)
class ModelSpec:
    """A whole model and how it is driven."""

    lm: LMSpec
    mimi: MimiSpec
    delay_frames: int
    """Frames between a sound and its token."""
    prefix_silence_seconds: float = 0.0
    """Silence that a file needs before its first sound (1 s for the 2.6B, contract section 7.4)."""
    condition: Condition | None = None
    temperature: float = 0.0
    notes: tuple[str, ...] = field(default=())
    """What was decided on the way, for the start-up log."""


def spec_from_module(module: KyutaiModule, config_json: Mapping[str, object] | None = None) -> ModelSpec:
    """The spec of a configured module.

    config_json: the parsed config.json of the model's repository. Needed where the module has no `model` table
    (`PyBatchedAsr`); elsewhere it only tells the silence prefix.
    Raises ConfigError for what the TOML says, CheckpointError for what config.json says, naming everything that is wrong.
    """
    if module.model is not None:
        lm = lm_spec_from_toml(module.model)
    elif config_json is not None:
        lm = lm_spec_from_json(config_json)
    else:
        raise ConfigError(
            f"modules.{module.name} has no [modules.{module.name}.model] table and the repository's config.json was not given"
        )
    delay, notes = _delay_frames(module)
    wrong: list[str] = []
    if not 0 <= delay <= lm.context:
        wrong.append(f"a delay of {delay} frames is outside 0 .. context = {lm.context}")
    if not math.isfinite(module.temperature):
        wrong.append(f"temperature = {module.temperature} is no number")
    _raise_all(ConfigError, f"modules.{module.name}", wrong)
    return ModelSpec(
        lm=lm,
        mimi=MimiSpec(codebooks=lm.codebooks),
        delay_frames=delay,
        prefix_silence_seconds=_prefix_silence(lm, config_json),
        condition=_condition(module, lm),
        temperature=module.temperature,
        notes=notes,
    )


def lm_spec_from_toml(model: ModelConfig) -> LMSpec:
    """The spec of `[modules.NAME.model]` (contract section 4.4). Raises ConfigError naming every key that cannot be used."""
    t = model.transformer
    wrong: list[str] = []

    def must(key: str, got: object, wanted: object) -> None:
        if got != wanted:
            wrong.append(f"transformer.{key} = {_toml(got)}: only {_toml(wanted)} is supported")

    must("causal", t.causal, True)
    must("norm_first", t.norm_first, True)
    must("bias_ff", t.bias_ff, False)
    must("bias_attn", t.bias_attn, False)
    must("use_conv_block", t.use_conv_block, False)
    must("kv_repeat", t.kv_repeat, 1)
    must("norm", t.norm, "RmsNorm")
    must("positional_embedding", t.positional_embedding, "Rope")
    must("gating", t.gating, "silu")
    must("layer_scale", t.layer_scale, None)
    must("cross_attention", t.cross_attention, False)
    must("shared_cross_attn", t.shared_cross_attn, False)
    if model.text_in_vocab_size != model.text_out_vocab_size + 1:
        wrong.append(
            f"text_in_vocab_size = {model.text_in_vocab_size} must be text_out_vocab_size + 1 = {model.text_out_vocab_size + 1}"
        )
    wrong += _shape_errors(
        "transformer.d_model", t.d_model, "transformer.num_heads", t.num_heads, "transformer.num_layers", t.num_layers
    )
    wrong += _common_errors(
        t.context, t.max_period, model.text_out_vocab_size, model.audio_codebooks, model.audio_vocab_size - 1, "transformer."
    )
    heads = model.extra_heads
    if heads is not None and (heads.num_heads < 1 or heads.dim < 1):
        wrong.append(f"extra_heads = {{num_heads = {heads.num_heads}, dim = {heads.dim}}} must be positive")
    conditioners = tuple(_conditioner(name, table, wrong) for name, table in sorted((model.conditioners or {}).items()))
    _raise_all(ConfigError, "the model table", wrong)
    return LMSpec(
        dim=t.d_model,
        heads=t.num_heads,
        layers=t.num_layers,
        context=t.context,
        max_period=float(t.max_period),
        text_card=model.text_out_vocab_size,
        codebooks=model.audio_codebooks,
        audio_card=model.audio_vocab_size - 1,
        extra_heads=heads.num_heads if heads else 0,
        extra_head_dim=heads.dim if heads else 6,
        conditioners=conditioners,
    )


_JSON_INTS = ("card", "n_q", "dim", "num_heads", "num_layers", "text_card", "context")
_JSON_FIXED: dict[str, tuple[object, ...]] = {
    "dep_q": (0,),
    "gating": ("silu",),
    "norm": ("rms_norm_f32",),
    "causal": (True,),
    "layer_scale": (None,),
    "positional_embedding": ("rope",),
    "cross_attention": (False,),
    "model_type": ("stt",),
}


def lm_spec_from_json(config: Mapping[str, object]) -> LMSpec:
    """The spec of a repository's config.json (contract section 6.4). Raises CheckpointError naming every key that is wrong."""
    wrong: list[str] = []
    ints: dict[str, int] = {}
    for key in _JSON_INTS:
        value = config.get(key)
        if isinstance(value, int) and not isinstance(value, bool):
            ints[key] = value
        else:
            wrong.append(f"{key} = {value!r}: a whole number is needed")
            ints[key] = 0
    for key, allowed in _JSON_FIXED.items():
        if key in config and config[key] not in allowed:
            wrong.append(f"{key} = {config[key]!r}: only {allowed[0]!r} is supported")
    delays = config.get("delays", [])
    if not isinstance(delays, list) or any(delays):
        wrong.append(f"delays = {delays!r}: only zeros are supported")
    if config.get("conditioners"):
        wrong.append("conditioners: only an empty table is supported in config.json; give them in the TOML `model` table")
    period = config.get("max_period")
    if isinstance(period, bool) or not isinstance(period, int | float):
        wrong.append(f"max_period = {period!r}: a number is needed")
        period = math.nan
    heads, head_dim = config.get("extra_heads_num_heads", 0), config.get("extra_heads_dim", 6)
    if not isinstance(heads, int) or not isinstance(head_dim, int) or heads < 0 or head_dim < 1:
        wrong.append(f"extra_heads_num_heads = {heads!r}, extra_heads_dim = {head_dim!r}: whole numbers are needed")
        heads, head_dim = 0, 6
    if not wrong:
        wrong += _shape_errors("dim", ints["dim"], "num_heads", ints["num_heads"], "num_layers", ints["num_layers"])
        wrong += _common_errors(ints["context"], period, ints["text_card"], ints["n_q"], ints["card"], "")
    _raise_all(CheckpointError, "config.json", wrong)
    return LMSpec(
        dim=ints["dim"],
        heads=ints["num_heads"],
        layers=ints["num_layers"],
        context=ints["context"],
        max_period=float(period),
        text_card=ints["text_card"],
        codebooks=ints["n_q"],
        audio_card=ints["card"],
        extra_heads=heads,
        extra_head_dim=head_dim,
    )


# ---- the parts -----------------------------------------------------------------------------------------------------------


def _shape_errors(dim_key: str, dim: int, heads_key: str, heads: int, layers_key: str, layers: int) -> list[str]:
    wrong = [
        f"{key} = {value} must be positive"
        for key, value in ((dim_key, dim), (heads_key, heads), (layers_key, layers))
        if value < 1
    ]
    if not wrong and (dim % heads or (dim // heads) % 2):
        wrong.append(f"{dim_key} = {dim} must be {heads_key} = {heads} times an even number")
    return wrong


def _common_errors(context: int, max_period: float, text_card: int, codebooks: int, audio_card: int, prefix: str) -> list[str]:
    wrong = []
    if context < 2:
        wrong.append(f"{prefix}context = {context} must be at least 2")
    if not (math.isfinite(max_period) and max_period > 1):
        wrong.append(f"{prefix}max_period = {max_period} must be above 1")
    if text_card < 4:
        wrong.append(f"a text vocabulary of {text_card} has no room for the padding token 3")
    if not 1 <= codebooks <= MAX_CODEBOOKS:
        wrong.append(f"{codebooks} audio codebooks: Mimi has 1 to {MAX_CODEBOOKS}")
    if audio_card != 2_048:
        wrong.append(
            f"an audio vocabulary of {audio_card} codes: Mimi's codebooks have 2048 (audio_vocab_size 2049, card 2048)"
        )
    return wrong


def _conditioner(name: str, table: Mapping[str, object], wrong: list[str]) -> ConditionerSpec:
    """One conditioner; what cannot be used is added to `wrong`."""
    kind = table.get("type")

    def number(key: str) -> float:
        value = table.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            wrong.append(f"conditioners.{name}.{key} = {value!r}: a number is needed")
            return 4.0
        return value

    dim = int(number("dim"))
    if dim < 4 or dim % 2:
        wrong.append(f"conditioners.{name}.dim = {dim} must be even and at least 4")
    if kind == "ContinuousAttribute":
        return ConditionerSpec(name, kind, dim, scale_factor=number("scale_factor"), max_period=number("max_period"))
    if kind != "Lut":
        wrong.append(f'conditioners.{name}.type = {kind!r}: must be "Lut" or "ContinuousAttribute"')
        return ConditionerSpec(name, "Lut", dim)
    values = table.get("possible_values")
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        wrong.append(f"conditioners.{name}.possible_values = {values!r}: a list of strings is needed")
        values = []
    return ConditionerSpec(name, kind, dim, bins=int(number("n_bins")), possible_values=tuple(values))


def _condition(module: KyutaiModule, lm: LMSpec) -> Condition | None:
    """The table of contract section 4.3: which condition the two `conditioning_*` keys mean."""
    if not lm.conditioners:
        return None  # both keys are without effect on the input, as in moshi-server
    where = f"modules.{module.name}: the model has conditioners, so"
    named = {conditioner.name: conditioner for conditioner in lm.conditioners}
    if "delay" not in named:
        raise ConfigError(f"{where} one named `delay` is needed; there are {', '.join(named)}")
    conditioner, learnt, value = named["delay"], module.conditioning_learnt_padding, module.conditioning_delay
    if value is None:
        if learnt and module.type != "Asr":
            return Condition(conditioner)
        wanted = "conditioning_delay" if module.type == "Asr" else "conditioning_delay or conditioning_learnt_padding = true"
        raise ConfigError(f"{where} {wanted} is needed")
    if learnt and module.type != "Asr":
        raise ConfigError(f"{where} conditioning_delay and conditioning_learnt_padding = true exclude each other")
    if conditioner.kind != "ContinuousAttribute":
        raise ConfigError(f"{where} conditioning_delay needs a ContinuousAttribute; `delay` is a {conditioner.kind}")
    return Condition(conditioner, -value)


def _delay_frames(module: KyutaiModule) -> tuple[int, tuple[str, ...]]:
    """The delay, and a note where `conditioning_delay` overrides the configured one (contract section 4.3)."""
    value = module.conditioning_delay
    if value is None or module.type != "BatchedAsr":
        return module.asr_delay_in_tokens, ()
    if not math.isfinite(value):
        raise ConfigError(f"modules.{module.name}: conditioning_delay = {value} is no number of seconds")
    delay = math.floor(value * FRAME_RATE) + 1
    if delay == module.asr_delay_in_tokens:
        return delay, ()
    return delay, (f"conditioning_delay = {value:g} makes the delay {delay} frames instead of {module.asr_delay_in_tokens}",)


def _prefix_silence(lm: LMSpec, config: Mapping[str, object] | None) -> float:
    """What config.json says; without one, what is published for the 2.6B's shape."""
    if config is not None and "stt_config" in config:
        return _stt_number(config, "audio_silence_prefix_seconds")
    return 1.0 if (lm.layers, lm.text_card) == (48, 4_000) else 0.0


def _stt_number(config: Mapping[str, object], key: str) -> float:
    table = config.get("stt_config")
    value = table.get(key, 0.0) if isinstance(table, Mapping) else 0.0
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 60:
        raise CheckpointError(f"config.json: stt_config.{key} = {value!r} must be seconds, 0 to 60")
    return float(value)


def _raise_all(error: type[MoshiSttError], where: str, wrong: list[str]) -> None:
    if wrong:
        raise error(f"{where}: " + "; ".join(wrong))


def _toml(value: object) -> str:
    if value is None:
        return "(absent)"
    return str(value).lower() if isinstance(value, bool) else f'"{value}"' if isinstance(value, str) else str(value)
