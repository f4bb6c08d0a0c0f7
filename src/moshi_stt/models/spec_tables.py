"""From a configuration to a model's spec: the TOML `model` table or a repository's config.json, and the law of both.

The law stands here alone: `config_load` reads types and asks `table_faults` and `driving_faults`. What makes no sense is
reported all at once, each thing by its key.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import msgspec

from moshi_stt.config import EncoderConfig, KyutaiModule, LutConfig, ModelConfig
from moshi_stt.constants import FRAME_RATE
from moshi_stt.errors import CheckpointError, ConfigError, MoshiSttError
from moshi_stt.models.spec import CODEBOOK_ENTRIES, MAX_CODEBOOKS, Condition, ConditionerSpec, LMSpec, MimiSpec, ModelSpec


class Fault(NamedTuple):
    """A value that cannot be used.

    table: names of the tables it stands in, below the module's (or below config.json). key: None means the table itself.
    expected: a sentence: what was expected, and what to do.
    """

    table: tuple[str, ...]
    key: str | None
    value: object
    expected: str

    def __str__(self) -> str:
        place = ".".join((*self.table, *([self.key] if self.key else [])))
        return f"{place} = {_shown(self.value)}: {self.expected}" if self.value is not None else f"{place}: {self.expected}"


def spec_from_module(module: KyutaiModule, config_json: Mapping[str, object] | None = None) -> ModelSpec:
    """The spec of a configured module.

    config_json: the parsed config.json of the model's repository. Needed where the module has no `model` table
    (`PyBatchedAsr`); elsewhere it only tells the silence prefix.
    Raises ConfigError for what the TOML says, CheckpointError for what config.json says, naming everything that is wrong.
    """
    if module.model is not None:
        lm = lm_spec_from_toml(module.model, module.engine.encoder)
    elif config_json is not None:
        lm = lm_spec_from_json(config_json)
    else:
        raise ConfigError(
            f"modules.{module.name} has no [modules.{module.name}.model] table and the repository's config.json was not given"
        )
    _raise_all(ConfigError, f"modules.{module.name}", driving_faults(module, lm.context, lm.conditioners))
    delay = delay_frames(module)
    given = module.asr_delay_in_tokens
    note = f"conditioning_delay = {module.conditioning_delay} makes the delay {delay} frames instead of {given}"
    return ModelSpec(
        lm=lm,
        mimi=mimi_spec(module.engine.encoder, lm.codebooks),
        delay_frames=delay,
        prefix_silence_seconds=_prefix_silence(lm, config_json),
        condition=_condition(module, lm),
        temperature=module.temperature,
        notes=() if delay == given else (note,),
    )


def mimi_spec(encoder: EncoderConfig | None, codebooks: int) -> MimiSpec:
    """The published encoder, or one of the sizes in `[modules.NAME.moshi_stt.encoder]`."""
    if encoder is None:
        return MimiSpec(codebooks=codebooks)
    return MimiSpec(
        codebooks=codebooks,
        codebook_size=encoder.codebook_size,
        codebook_dim=encoder.codebook_dim,
        dim=encoder.dim,
        heads=encoder.heads,
        layers=encoder.layers,
        feedforward=encoder.feedforward,
        channels=tuple(encoder.channels),
    )


def lm_spec_from_toml(model: ModelConfig, encoder: EncoderConfig | None = None) -> LMSpec:
    """The spec of `[modules.NAME.model]` (contract section 4.4). Raises ConfigError naming every key that cannot be used."""
    _raise_all(
        ConfigError, "the model table", (fault._replace(table=fault.table[1:]) for fault in table_faults(model, encoder))
    )
    heads = model.extra_heads
    return LMSpec(
        dim=model.transformer.d_model,
        heads=model.transformer.num_heads,
        layers=model.transformer.num_layers,
        context=model.transformer.context,
        max_period=float(model.transformer.max_period),
        text_card=model.text_out_vocab_size,
        codebooks=model.audio_codebooks,
        audio_card=model.audio_vocab_size - 1,
        extra_heads=heads.num_heads if heads else 0,
        extra_head_dim=heads.dim if heads else 6,
        conditioners=conditioner_specs(model),
    )


def lm_spec_from_json(config: Mapping[str, object]) -> LMSpec:
    """The spec of a repository's config.json (contract section 6.4). Raises CheckpointError naming every key that is wrong."""
    try:
        read = msgspec.convert({key: value for key, value in config.items() if value is not None}, _ConfigJson)
    except msgspec.ValidationError as error:
        raise CheckpointError(f"config.json: {error}") from None
    _raise_all(CheckpointError, "config.json", _json_faults(config, read))
    return LMSpec(
        dim=read.dim,
        heads=read.num_heads,
        layers=read.num_layers,
        context=read.context,
        max_period=read.max_period,
        text_card=read.text_card,
        codebooks=read.n_q,
        audio_card=read.card,
        extra_heads=read.extra_heads_num_heads,
        extra_head_dim=read.extra_heads_dim,
    )


def delay_frames(module: KyutaiModule) -> int:
    """Frames between a sound and its token: as configured, or what `conditioning_delay` makes it (contract section 4.3)."""
    seconds = module.conditioning_delay
    if seconds is None or module.type != "BatchedAsr":
        return module.asr_delay_in_tokens
    return math.floor(seconds * FRAME_RATE) + 1


# ---- the law -------------------------------------------------------------------------------------------------------------

_SUPPORTED = "No published speech-to-text model has another value, and this server cannot run one."
_TOML_FIXED: dict[str, object] = {
    "causal": True,
    "norm_first": True,
    "bias_ff": False,
    "bias_attn": False,
    "use_conv_block": False,
    "kv_repeat": 1,
    "norm": "RmsNorm",
    "positional_embedding": "Rope",
    "gating": "silu",
    "layer_scale": None,
    "cross_attention": False,
    "shared_cross_attn": False,
}
_JSON_FIXED: dict[str, object] = {
    "dep_q": 0,
    "gating": "silu",
    "norm": "rms_norm_f32",
    "causal": True,
    "layer_scale": None,
    "positional_embedding": "rope",
    "cross_attention": False,
    "model_type": "stt",
}


class _Shape(NamedTuple):
    """The numbers of a model, and of each where it stands: tables and key."""

    values: dict[str, float]
    places: dict[str, tuple[tuple[str, ...], str]]

    def fault(self, name: str, expected: str) -> Fault:
        table, key = self.places[name]
        return Fault(table, key, self.values[name], expected)


def table_faults(model: ModelConfig, encoder: EncoderConfig | None = None) -> list[Fault]:
    """Everything in `[modules.NAME.model]` and in the encoder's sizes that cannot be used. Tables begin with `model`."""
    t, top, inner = model.transformer, ("model",), ("model", "transformer")
    faults = [
        Fault(inner, key, got, f"expected {_wanted(value)}{'' if got is not None else ' (the key is absent)'}. {_SUPPORTED}")
        for key, value in _TOML_FIXED.items()
        if (got := getattr(t, key)) != value
    ]
    if t.dim_feedforward < 1:
        faults.append(Fault(inner, "dim_feedforward", t.dim_feedforward, "expected at least 1."))
    if model.text_in_vocab_size != model.text_out_vocab_size + 1:
        expected = f"expected text_out_vocab_size + 1 = {model.text_out_vocab_size + 1} (the last id is the start token)."
        faults.append(Fault(top, "text_in_vocab_size", model.text_in_vocab_size, expected))
    entries = CODEBOOK_ENTRIES if encoder is None else encoder.codebook_size
    if encoder is not None:
        faults += _encoder_faults(encoder)
    if model.audio_vocab_size != entries + 1:
        what = "Mimi has" if encoder is None else "the encoder's codebooks have"
        expected = f"expected {entries + 1}: {what} {entries} entries, the last id is the pad."
        faults.append(Fault(top, "audio_vocab_size", model.audio_vocab_size, expected))
    heads = model.extra_heads
    if heads is not None:
        wrong = [key for key in ("num_heads", "dim") if getattr(heads, key) < 1]
        faults += [Fault(("model", "extra_heads"), key, getattr(heads, key), "expected at least 1.") for key in wrong]
    for name, conditioner in (model.conditioners or {}).items():
        if conditioner.dim < 4 or conditioner.dim % 2:
            faults.append(Fault(("model", "conditioners", name), "dim", conditioner.dim, "expected an even number, 4 or more."))
    numbers = {
        "dim": (t.d_model, inner, "d_model"),
        "heads": (t.num_heads, inner, "num_heads"),
        "layers": (t.num_layers, inner, "num_layers"),
        "context": (t.context, inner, "context"),
        "max_period": (t.max_period, inner, "max_period"),
        "text_card": (model.text_out_vocab_size, top, "text_out_vocab_size"),
        "codebooks": (model.audio_codebooks, top, "audio_codebooks"),
    }
    return faults + _shape_faults(_shape(numbers))


ENCODER_SIZES = ("dim", "heads", "layers", "feedforward", "codebook_size", "codebook_dim")


def _encoder_faults(encoder: EncoderConfig) -> list[Fault]:
    """What is wrong with the sizes of an encoder of the configuration's own."""
    table = ("moshi_stt", "encoder")
    levels = len(MimiSpec().strides) + 1
    faults = []
    if len(encoder.channels) != levels or not all(width >= 2 and width % 2 == 0 for width in encoder.channels):
        faults.append(Fault(table, "channels", encoder.channels, f"expected {levels} even numbers, one for each level."))
    wrong = [key for key in ENCODER_SIZES if getattr(encoder, key) < 1]
    faults += [Fault(table, key, getattr(encoder, key), "expected at least 1.") for key in wrong]
    if not faults and (encoder.dim % encoder.heads or (encoder.dim // encoder.heads) % 2):
        expected = f"expected a divisor of dim = {encoder.dim} that leaves an even head size."
        faults.append(Fault(table, "heads", encoder.heads, expected))
    return faults


class _ConfigJson(msgspec.Struct):
    """The keys of config.json that the model needs; the rest is looked at in `_json_faults`."""

    card: int
    n_q: int
    dim: int
    num_heads: int
    num_layers: int
    text_card: int
    context: int
    max_period: float
    extra_heads_num_heads: int = 0
    extra_heads_dim: int = 6


def _json_faults(config: Mapping[str, object], read: _ConfigJson) -> list[Fault]:
    faults = [
        Fault((), key, config[key], f"expected {_wanted(value)}. {_SUPPORTED}")
        for key, value in _JSON_FIXED.items()
        if key in config and config[key] != value
    ]
    delays = config.get("delays", [])
    if not isinstance(delays, list) or any(delays):
        faults.append(Fault((), "delays", delays, "expected only zeros."))
    if config.get("conditioners"):
        faults.append(Fault((), "conditioners", None, "expected an empty table; give them in the TOML `model` table."))
    if read.card != CODEBOOK_ENTRIES:
        faults.append(Fault((), "card", read.card, f"expected {CODEBOOK_ENTRIES}, the entries of Mimi's codebooks."))
    for key, least in (("extra_heads_num_heads", 0), ("extra_heads_dim", 1)):
        if getattr(read, key) < least:
            faults.append(Fault((), key, getattr(read, key), f"expected at least {least}."))
    keys = {
        "dim": "dim",
        "heads": "num_heads",
        "layers": "num_layers",
        "context": "context",
        "max_period": "max_period",
        "text_card": "text_card",
        "codebooks": "n_q",
    }
    return faults + _shape_faults(_shape({name: (getattr(read, key), (), key) for name, key in keys.items()}))


def _shape(numbers: Mapping[str, tuple[float, tuple[str, ...], str]]) -> _Shape:
    return _Shape(
        {name: value for name, (value, _, _) in numbers.items()},
        {name: (table, key) for name, (_, table, key) in numbers.items()},
    )


def _shape_faults(shape: _Shape) -> list[Fault]:
    """What holds of every model, wherever its numbers come from."""
    dim, heads, _, context, max_period, text_card, codebooks = shape.values.values()
    faults = [shape.fault(name, "expected at least 1.") for name in ("dim", "heads", "layers") if shape.values[name] < 1]
    if not faults and (dim % heads or (dim // heads) % 2):
        faults.append(
            shape.fault("heads", f"expected a divisor of {shape.places['dim'][1]} = {dim} that leaves an even head size.")
        )
    if context < 2:
        faults.append(shape.fault("context", "expected at least 2."))
    if not (math.isfinite(max_period) and max_period > 1):
        faults.append(shape.fault("max_period", "expected a number above 1, usually 100000."))
    if text_card < 4:
        faults.append(shape.fault("text_card", "expected at least 4: token 3 is the padding."))
    if not 1 <= codebooks <= MAX_CODEBOOKS:
        faults.append(shape.fault("codebooks", f"expected 1 to {MAX_CODEBOOKS}, the codebooks that Mimi has."))
    return faults


def driving_faults(module: KyutaiModule, context: int, conditioners: Sequence[ConditionerSpec]) -> list[Fault]:
    """What is wrong with how the module drives a model of this context and these conditioners (contract section 4.3)."""
    faults: list[Fault] = []
    seconds, learnt = module.conditioning_delay, module.conditioning_learnt_padding

    def wrong(key: str | None, value: object, expected: str) -> None:
        faults.append(Fault((), key, value, expected))

    if not math.isfinite(module.temperature):
        wrong("temperature", module.temperature, "expected a number.")
    if seconds is not None and not (math.isfinite(seconds) and seconds >= 0):
        wrong("conditioning_delay", seconds, "expected seconds, 0 or more.")
    elif not 0 <= delay_frames(module) < context:
        key = "asr_delay_in_tokens" if delay_frames(module) == module.asr_delay_in_tokens else "conditioning_delay"
        wrong(
            key,
            getattr(module, key),
            f"a delay of {delay_frames(module)} frames makes no sense with a context of {context}; "
            "expected less than the context. It is 6 for the 1B model and 32 for the 2.6B.",
        )
    if not conditioners:
        return faults  # both keys are without effect on the input, as in moshi-server
    named = {conditioner.name: conditioner for conditioner in conditioners}
    either = module.type != "Asr"
    if "delay" not in named:
        wrong(None, None, 'model.conditioners has no conditioner named "delay"; it is the only one that this server can set.')
    elif seconds is None and not (learnt and either):
        also = " or conditioning_learnt_padding = true" if either else ""
        wrong(
            "conditioning_delay", None, f"the model has conditioners, so expected conditioning_delay = SECONDS{also}. Add it."
        )
    elif seconds is not None and learnt and either:
        wrong(
            "conditioning_delay", seconds, "expected either this or conditioning_learnt_padding = true, not both. Remove one."
        )
    elif seconds is not None and named["delay"].kind != "ContinuousAttribute":
        expected = 'the conditioner named "delay" is of type "Lut"; expected "ContinuousAttribute".'
        wrong("conditioning_delay", seconds, expected)
    return faults


def conditioner_specs(model: ModelConfig) -> tuple[ConditionerSpec, ...]:
    """The conditioners of a `model` table, by name."""
    specs = []
    for name, c in sorted((model.conditioners or {}).items()):
        if isinstance(c, LutConfig):
            specs.append(ConditionerSpec(name, "Lut", c.dim, bins=c.n_bins, possible_values=tuple(c.possible_values)))
        else:
            specs.append(
                ConditionerSpec(name, "ContinuousAttribute", c.dim, scale_factor=c.scale_factor, max_period=c.max_period)
            )
    return tuple(specs)


def _condition(module: KyutaiModule, lm: LMSpec) -> Condition | None:
    """Which condition the two `conditioning_*` keys mean; the law has been checked."""
    if not lm.conditioners:
        return None
    (conditioner,) = (conditioner for conditioner in lm.conditioners if conditioner.name == "delay")
    return Condition(conditioner, None if module.conditioning_delay is None else -module.conditioning_delay)


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


def _raise_all(error: type[MoshiSttError], where: str, faults: Iterable[Fault]) -> None:
    if found := [str(fault) for fault in faults]:
        raise error(f"{where}: " + "; ".join(found))


def _wanted(value: object) -> str:
    return "the key to be absent" if value is None else _shown(value)


def _shown(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else f'"{value}"' if isinstance(value, str) else str(value)
