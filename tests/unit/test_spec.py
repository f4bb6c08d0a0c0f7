"""Specs from the TOML `model` table and from config.json, and every value that makes no sense, named."""

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from moshi_stt.config import KyutaiModule, ModelConfig
from moshi_stt.errors import CheckpointError, ConfigError
from moshi_stt.models.spec import LMSpec
from moshi_stt.models.spec_tables import lm_spec_from_json, lm_spec_from_toml, spec_from_module

TRANSFORMER: dict[str, Any] = {
    "d_model": 2048,
    "num_heads": 16,
    "num_layers": 16,
    "dim_feedforward": 8192,
    "causal": True,
    "norm_first": True,
    "bias_ff": False,
    "bias_attn": False,
    "context": 750,
    "max_period": 100000,
    "use_conv_block": False,
    "use_conv_bias": True,
    "gating": "silu",
    "norm": "RmsNorm",
    "positional_embedding": "Rope",
    "conv_layout": False,
    "conv_kernel_size": 3,
    "kv_repeat": 1,
    "max_seq_len": 40960,
}
MODEL: dict[str, Any] = {
    "text_in_vocab_size": 8001,
    "text_out_vocab_size": 8000,
    "audio_vocab_size": 2049,
    "audio_codebooks": 32,
    "extra_heads": {"num_heads": 4, "dim": 6},
}
ONE_B = LMSpec(dim=2048, heads=16, layers=16, context=750, max_period=100_000.0, text_card=8_000, codebooks=32, extra_heads=4)
JSON: dict[str, Any] = {
    "card": 2048,
    "n_q": 32,
    "dep_q": 0,
    "delays": [0] * 33,
    "dim": 2048,
    "num_heads": 32,
    "num_layers": 48,
    "text_card": 4000,
    "existing_text_padding_id": 3,
    "hidden_scale": 4.125,
    "gating": "silu",
    "norm": "rms_norm_f32",
    "causal": True,
    "layer_scale": None,
    "context": 375,
    "max_period": 100000.0,
    "positional_embedding": "rope",
    "conditioners": {},
    "cross_attention": False,
    "stt_config": {"audio_delay_seconds": 2.5, "audio_silence_prefix_seconds": 1.0},
    "model_type": "stt",
}

CONTINUOUS = {"delay": {"type": "ContinuousAttribute", "dim": 8, "scale_factor": 2.0, "max_period": 100}}


def model(transformer: dict[str, Any] | None = None, **fields: Any) -> ModelConfig:
    table = MODEL | fields | {"transformer": TRANSFORMER | (transformer or {})}
    return msgspec.convert(table, ModelConfig)


def module(**fields: Any) -> KyutaiModule:
    base: dict[str, Any] = {
        "name": "asr",
        "path": "/api/asr-streaming",
        "type": "BatchedAsr",
        "batch_size": 64,
        "lm_model_file": "lm",
        "text_tokenizer_file": "tok",
        "audio_tokenizer_file": "mimi",
        "asr_delay_in_tokens": 6,
        "model": model(),
    }
    return KyutaiModule(**(base | fields))


def test_published_1b() -> None:
    spec = spec_from_module(module())
    assert spec.lm == ONE_B
    assert (spec.mimi.codebooks, spec.delay_frames, spec.prefix_silence_seconds) == (32, 6, 0.0)
    assert (spec.lm.head_dim, spec.lm.start_token, spec.lm.pad_code) == (128, 8_000, 2_048)


def test_published_2_6b_from_json() -> None:
    spec = spec_from_module(module(model=None, type="PyBatchedAsr", asr_delay_in_tokens=32), JSON)
    assert (spec.lm.layers, spec.lm.heads, spec.lm.head_dim, spec.lm.text_card) == (48, 32, 64, 4_000)
    assert (spec.lm.context, spec.lm.extra_heads, spec.delay_frames, spec.prefix_silence_seconds) == (375, 0, 32, 1.0)


def test_2_6b_from_toml_knows_its_silence() -> None:
    """The TOML cannot say it, so it is known by the published shape."""
    table = model({"num_heads": 32, "num_layers": 48, "context": 375}, text_in_vocab_size=4001, text_out_vocab_size=4000)
    assert spec_from_module(module(model=table, asr_delay_in_tokens=32)).prefix_silence_seconds == 1.0


def test_mimi_table_of_the_contract() -> None:
    """Section 5.1: 11 526 floats of convolution context, two positions a frame."""
    mimi = spec_from_module(module()).mimi
    assert sum(conv.context * conv.channels_in for conv in mimi.convs) == 11_526
    assert mimi.positions_per_frame == 2
    assert [conv.name for conv in mimi.convs][-2:] == ["encoder.model.14", "downsample.conv"]


def test_goldens_agree(shared: Path) -> None:
    """The checkpoints' TOML and config.json describe the same model."""
    source = (shared / "goldens/make_checkpoint.py").read_text()
    namespace: dict[str, Any] = {"__name__": "made", "__file__": str(shared / "goldens/make_checkpoint.py")}
    exec(compile(source, "make_checkpoint.py", "exec"), namespace)
    import tomllib

    for size in namespace["SIZES"].values():
        table = tomllib.loads(namespace["toml"](size, Path("/ckpt")))["modules"]["asr"]["model"]
        assert lm_spec_from_toml(msgspec.convert(table, ModelConfig)) == lm_spec_from_json(namespace["config_json"](size))


@pytest.mark.parametrize(
    ("transformer", "fields", "named"),
    [
        ({"causal": False}, {}, "transformer.causal = false"),
        ({"norm_first": False}, {}, "transformer.norm_first"),
        ({"bias_ff": True}, {}, "transformer.bias_ff"),
        ({"bias_attn": True}, {}, "transformer.bias_attn"),
        ({"use_conv_block": True}, {}, "transformer.use_conv_block"),
        ({"kv_repeat": 2}, {}, "transformer.kv_repeat = 2"),
        ({"norm": "LayerNorm"}, {}, 'transformer.norm = "LayerNorm"'),
        ({"positional_embedding": "Sin"}, {}, "transformer.positional_embedding"),
        ({"gating": None}, {}, 'transformer.gating: expected "silu" (the key is absent)'),
        ({"cross_attention": True}, {}, "transformer.cross_attention"),
        ({"layer_scale": 0.1}, {}, "transformer.layer_scale"),
        ({"context": 1}, {}, "context = 1"),
        ({"context": 0}, {}, "context = 0"),
        ({"max_period": 0}, {}, "max_period = 0"),
        ({"num_heads": 0}, {}, "num_heads = 0"),
        ({"num_layers": -1}, {}, "num_layers = -1"),
        ({"num_heads": 15}, {}, "num_heads = 15"),
        ({"d_model": 48, "num_heads": 16}, {}, "an even head size"),
        ({}, {"text_in_vocab_size": 8000}, "text_in_vocab_size = 8000"),
        ({}, {"audio_codebooks": 33}, "audio_codebooks = 33: expected 1 to 32"),
        ({}, {"audio_codebooks": 0}, "audio_codebooks = 0"),
        ({}, {"audio_vocab_size": 2048}, "audio_vocab_size = 2048: expected 2049"),
        ({}, {"text_in_vocab_size": 3, "text_out_vocab_size": 2}, "text_out_vocab_size = 2: expected at least 4"),
        ({}, {"extra_heads": {"num_heads": 0, "dim": 6}}, "extra_heads"),
        ({}, {"conditioners": {"delay": CONTINUOUS["delay"] | {"dim": 7}}}, "conditioners.delay.dim = 7"),
    ],
)
def test_nonsense_in_the_table(transformer: dict[str, Any], fields: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError) as error:
        lm_spec_from_toml(model(transformer, **fields))
    assert named in str(error.value)


def test_everything_wrong_is_named_at_once() -> None:
    with pytest.raises(ConfigError) as error:
        lm_spec_from_toml(model({"causal": False, "context": 0, "kv_repeat": 4}, audio_codebooks=99))
    for named in ("causal", "context", "kv_repeat", "audio_codebooks = 99"):
        assert named in str(error.value)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"dep_q": 8}, "dep_q = 8"),
        ({"delays": [0, 1]}, "delays"),
        ({"norm": "rms_norm"}, "norm"),
        ({"model_type": "hibiki"}, "model_type"),
        ({"dim": "2048"}, "Expected `int`, got `str` - at `$.dim`"),
        ({"context": None}, "missing required field `context`"),
        ({"max_period": "no"}, "max_period"),
        ({"num_heads": 31}, "num_heads = 31"),
        ({"conditioners": {"delay": {}}}, "conditioners"),
        ({"extra_heads_num_heads": -1}, "extra_heads_num_heads"),
        ({"n_q": 40}, "n_q = 40"),
        ({"card": 1024}, "card = 1024"),
    ],
)
def test_nonsense_in_config_json(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(CheckpointError) as error:
        lm_spec_from_json(JSON | fields)
    assert named in str(error.value)


@pytest.mark.parametrize("prefix", [-1, "1", 1e9, True])
def test_nonsense_silence(prefix: object) -> None:
    broken = JSON | {"stt_config": {"audio_silence_prefix_seconds": prefix}}
    with pytest.raises(CheckpointError, match="audio_silence_prefix_seconds"):
        spec_from_module(module(model=None), json.loads(json.dumps(broken)))


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"asr_delay_in_tokens": 750}, "delay of 750"),
        ({"asr_delay_in_tokens": -1}, "delay of -1"),
        ({"conditioning_delay": 100.0}, "delay of 1251"),
        ({"conditioning_delay": float("nan")}, "conditioning_delay"),
        ({"temperature": float("inf")}, "temperature"),
        ({"model": None}, "model] table"),
    ],
)
def test_nonsense_in_the_module(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError) as error:
        spec_from_module(module(**fields))
    assert named in str(error.value)


def test_conditioning_delay_overrides_the_delay() -> None:
    """BatchedAsr: floor(1.0 * 12.5) + 1 = 13, without conditioners too; Asr keeps its own (contract section 4.3)."""
    spec = spec_from_module(module(conditioning_delay=1.0))
    assert (spec.delay_frames, spec.condition) == (13, None)
    assert "13 frames" in spec.notes[0]
    assert spec_from_module(module(conditioning_delay=1.0, type="Asr")).delay_frames == 6


@pytest.mark.parametrize(
    ("type", "delay", "learnt", "value"),
    [
        ("BatchedAsr", 0.4, False, -0.4),
        ("BatchedAsr", None, True, None),
        ("BatchedAsr", 0.4, True, ConfigError),
        ("BatchedAsr", None, False, ConfigError),
        ("Asr", 0.4, False, -0.4),
        ("Asr", 0.4, True, -0.4),
        ("Asr", None, True, ConfigError),
        ("Asr", None, False, ConfigError),
    ],
)
def test_conditioning(type: str, delay: float | None, learnt: bool, value: Any) -> None:
    """The whole table of contract section 4.3, with a conditioner."""
    configured = module(
        type=type, model=model(conditioners=CONTINUOUS), conditioning_delay=delay, conditioning_learnt_padding=learnt
    )
    if value is ConfigError:
        with pytest.raises(ConfigError, match="conditioning"):
            spec_from_module(configured)
        return
    condition = spec_from_module(configured).condition
    assert condition is not None
    assert (condition.conditioner.name, condition.conditioner.scale_factor, condition.value) == ("delay", 2.0, value)


def test_conditioning_without_conditioners_is_inert() -> None:
    """The published configurations set conditioning_learnt_padding and have no conditioner."""
    assert spec_from_module(module(conditioning_learnt_padding=True)).condition is None


def test_conditioner_of_another_name() -> None:
    other = model(conditioners={"speed": CONTINUOUS["delay"]})
    with pytest.raises(ConfigError, match='named "delay"'):
        spec_from_module(module(model=other, conditioning_learnt_padding=True))
