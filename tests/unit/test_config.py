"""The TOML files: Kyutai's load unchanged, broken ones are refused with a message that names the place and the remedy."""

# ruff: noqa: E501  (a row of a table reads best on one line)

import math
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from moshi_stt.config import EmbeddedModule, EncoderConfig, EngineConfig, KyutaiModule, LimitsConfig
from moshi_stt.config_load import embedded_config, expand, load_config, parse_config, shipped_names, shipped_text
from moshi_stt.constants import DEFAULT_PATH, FRAME_RATE
from moshi_stt.errors import ConfigError
from moshi_stt.models.spec_tables import delay_frames

ROOT = Path(__file__).parents[2]
ONE_B = shipped_text("stt-1b-en_fr")

EMBEDDED = """\
static_dir = ""
log_dir = ""
instance_name = "test"
authorized_ids = ["secret"]
[modules.asr]
type = "Embedded"
path = "/api/asr-streaming"
"""

PY_BATCHED = """\
static_dir = "./static/"
log_dir = "logs"
instance_name = "test"
authorized_ids = ["secret"]
[modules.asr]
type = "PyBatchedAsr"
path = "/api/asr-streaming"
batch_size = 8
text_tokenizer_file = "hf://kyutai/stt-1b-en_fr/tokenizer_en_fr_audio_8000.model"
asr_delay_in_tokens = 6
[modules.asr.py]
hf_repo = "kyutai/stt-1b-en_fr"
temp = 0
device = "cuda:0"
"""


def replaced(old: str, new: str, text: str = ONE_B) -> str:
    assert old in text, f"{old!r} is not in the configuration"
    return text.replace(old, new, 1)


def kyutai(text: str) -> KyutaiModule:
    (module,) = parse_config(text, "test.toml").config.modules
    assert isinstance(module, KyutaiModule)
    return module


# ---- what loads ------------------------------------------------------------------------------------------------------


def test_the_1b_file_loads_unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    loaded = load_config("stt-1b-en_fr")
    config = loaded.config
    assert loaded.warnings == []
    assert loaded.source == "stt-1b-en_fr (shipped)"
    assert (config.static_dir, config.log_dir, config.instance_name) == ("./static/", "/home/me/tmp/tts-logs", "tts")
    assert config.authorized_ids == {"public_token"}
    assert config.limits == LimitsConfig()
    (module,) = config.modules
    assert isinstance(module, KyutaiModule)
    assert (module.name, module.path, module.type, module.batch_size) == ("asr", DEFAULT_PATH, "BatchedAsr", 64)
    assert module.lm_model_file == "hf://kyutai/stt-1b-en_fr-candle/model.safetensors"
    assert module.audio_tokenizer_file == "hf://kyutai/stt-1b-en_fr-candle/mimi-pytorch-e351c8d8@125.safetensors"
    assert (module.asr_delay_in_tokens, module.temperature, module.dtype_override) == (6, 0.0, None)
    assert module.engine == EngineConfig()
    model = module.model
    assert model is not None
    assert (model.text_in_vocab_size, model.audio_codebooks) == (8001, 32)
    assert (model.transformer.context, model.transformer.num_heads) == (750, 16)
    assert model.extra_heads is not None
    assert (model.extra_heads.num_heads, model.extra_heads.dim) == (4, 6)


def test_the_2_6b_file_loads_unchanged() -> None:
    loaded = load_config("stt-2.6b-en.toml")
    (module,) = loaded.config.modules
    assert isinstance(module, KyutaiModule)
    assert module.model is not None
    assert loaded.warnings == []
    assert (module.batch_size, module.asr_delay_in_tokens, module.temperature) == (16, 32, 0.0)
    assert (module.model.transformer.num_layers, module.model.transformer.context) == (48, 375)
    assert module.model.extra_heads is None


def test_the_embedded_file_is_what_is_served_without_a_file() -> None:
    assert load_config("embedded").config == embedded_config()


def test_every_shipped_configuration_loads_without_a_warning() -> None:
    assert shipped_names() == ["embedded", "phrases", "stt-1b-en_fr", "stt-2.6b-en"]
    assert [load_config(name).warnings for name in shipped_names()] == [[], [], [], []]


def test_the_file_at_the_root_is_the_1b_configuration() -> None:
    assert load_config(str(ROOT / "moshi-stt.toml")).config == load_config("stt-1b-en_fr").config


def test_a_file_goes_before_a_shipped_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("embedded").write_text(EMBEDDED)
    assert load_config("embedded").config.instance_name == "test"


def test_variables_are_replaced_and_unset_ones_become_nothing_with_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WHERE", "/data")
    monkeypatch.delenv("NOWHERE", raising=False)
    assert expand("$WHERE/x-$NOWHERE.y ${WHERE} $1") == "/data/x-.y ${WHERE} $1"
    text = replaced('"$HOME/tmp/tts-logs"', '"$NOWHERE/logs"')
    text = replaced('"hf://kyutai/stt-1b-en_fr-candle/model.safetensors"', '"$WHERE/model.safetensors"', text)
    loaded = parse_config(text, "test.toml")
    assert loaded.config.log_dir == "/logs"
    assert kyutai(text).lm_model_file == "/data/model.safetensors"
    assert loaded.warnings == ["test.toml: log_dir: $NOWHERE is not set in the environment and becomes empty text"]


def test_hub_names_are_not_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WHO", "me")
    text = replaced("hf://kyutai/stt-1b-en_fr-candle/model.safetensors", "hf://$WHO/repo/a/b.safetensors")
    assert kyutai(text).lm_model_file == "hf://$WHO/repo/a/b.safetensors"


def test_asr_needs_no_batch_size() -> None:
    text = replaced('"BatchedAsr"', '"Asr"').replace("batch_size = 64\n", "")
    assert kyutai(text).batch_size == 16


def test_batch_size_may_be_measured() -> None:
    assert kyutai(replaced("batch_size = 64", 'batch_size = "auto"')).batch_size == "auto"


def test_py_batched_asr_is_the_same_model_by_its_repository() -> None:
    module = kyutai(PY_BATCHED)
    assert module.model is None
    assert module.lm_model_file == "hf://kyutai/stt-1b-en_fr/model.safetensors"
    assert module.config_file == "hf://kyutai/stt-1b-en_fr/config.json"
    assert module.audio_tokenizer_file == "hf://kyutai/stt-1b-en_fr/mimi-pytorch-e351c8d8@125.safetensors"
    assert (module.engine.device, module.temperature, module.asr_delay_in_tokens) == ("cuda", 0.0, 6)


def test_py_strings_are_resolved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEIGHTS", "/weights")
    text = replaced("temp = 0", 'moshi_weight = "$WEIGHTS/lm.safetensors"\nasr_delay_in_tokens = 32', PY_BATCHED)
    loaded = parse_config(text, "test.toml")
    assert kyutai(text).lm_model_file == "/weights/lm.safetensors"
    assert loaded.warnings == [
        "test.toml: [modules.asr.py] asr_delay_in_tokens: is 32, and 6 in the module's table; the module's is used"
    ]


def test_our_own_tables() -> None:
    text = ONE_B + '[modules.asr.moshi_stt]\nquantize = "int8"\nthreads = 2\n[moshi_stt]\ninbox_seconds = 5\n'
    loaded = parse_config(text, "test.toml")
    assert loaded.warnings == []
    assert loaded.config.limits.inbox_seconds == 5.0
    assert (kyutai(text).engine.quantize, kyutai(text).engine.threads) == ("int8", 2)


def test_embedded_module() -> None:
    (module,) = parse_config(EMBEDDED + "batch_size = 3\nthreads = 1\n", "test.toml").config.modules
    assert module == EmbeddedModule(name="asr", path=DEFAULT_PATH, batch_size=3, threads=1)


# ---- conditioning ----------------------------------------------------------------------------------------------------

CONDITIONER = (
    '[modules.asr.model.conditioners.delay]\ntype = "ContinuousAttribute"\ndim = 16\nscale_factor = 10\nmax_period = 1e4\n'
)
LEARNT = "conditioning_learnt_padding = true"


@pytest.mark.parametrize("seconds", [0.0, 0.5, 1.0, 2.56])
def test_conditioning_delay_sets_the_delay_of_a_batched_module(seconds: float) -> None:
    text = replaced(LEARNT, f"conditioning_delay = {seconds}")
    assert delay_frames(kyutai(text)) == math.floor(seconds * FRAME_RATE) + 1
    assert delay_frames(kyutai(text.replace('"BatchedAsr"', '"Asr"'))) == 6


@pytest.mark.parametrize(
    ("kind", "keys", "problem"),
    [
        ("BatchedAsr", "conditioning_delay = 0.5", None),
        ("BatchedAsr", LEARNT, None),
        ("BatchedAsr", f"{LEARNT}\nconditioning_delay = 0.5", "not both"),
        ("BatchedAsr", "", "or conditioning_learnt_padding = true"),
        ("Asr", "conditioning_delay = 0.5", None),
        ("Asr", f"{LEARNT}\nconditioning_delay = 0.5", None),
        ("Asr", LEARNT, "expected conditioning_delay = SECONDS. Add it."),
        ("Asr", "", "expected conditioning_delay = SECONDS. Add it."),
    ],
)
def test_the_rules_of_conditioning(kind: str, keys: str, problem: str | None) -> None:
    text = replaced(LEARNT, keys).replace('"BatchedAsr"', f'"{kind}"') + CONDITIONER
    if problem is None:
        assert kyutai(text).model is not None
    else:
        with pytest.raises(ConfigError, match=r"test\.toml: \[modules\.asr\] conditioning_delay.*") as raised:
            parse_config(text, "test.toml")
        assert problem in str(raised.value)


def test_without_conditioners_the_keys_are_free() -> None:
    assert kyutai(replaced(LEARNT, f"{LEARNT}\nconditioning_delay = 0.5")).conditioning_delay == 0.5


# ---- warnings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "warning"),
    [
        ("batch_size = 64", "batch_size = 64\nbatchsize = 2", '[modules.asr] batchsize: unknown key, ignored; did you mean "batch_size"?'),
        ("temperature = 0.0", "Temperature = 1.0", '[modules.asr] Temperature: unknown key, ignored; did you mean "temperature"?'),
        ("instance_name", 'xyzzy = 1\ninstance_name', "xyzzy: unknown key, ignored"),
        ("context = 750", "context = 750\nmax_periods = 3", '[modules.asr.model.transformer] max_periods: unknown key, ignored; did you mean "max_period"?'),
        ("num_heads = 4", 'num_heads = 4\n"odd key" = 1', "[modules.asr.model.extra_heads] odd key: unknown key, ignored"),
        ("$HOME/tmp", "~/tmp", "log_dir: ~ is not expanded; write $HOME"),
        ("$HOME/tmp", "${HOME}/tmp", "log_dir: ${NAME} is not expanded, only $NAME is"),
        ('["public_token"]', "[]", "authorized_ids: the list is empty, so no client can connect; add a key"),
    ],
)  # fmt: skip
def test_what_is_odd_is_a_warning(old: str, new: str, warning: str) -> None:
    assert parse_config(replaced(old, new), "test.toml").warnings == [f"test.toml: {warning}"]


def test_our_tables_are_checked_too() -> None:
    text = ONE_B + "[modules.asr.moshi_stt]\nquantise = 1\n[moshi_stt]\nping_second = 3\n"
    assert parse_config(text, "test.toml").warnings == [
        'test.toml: [moshi_stt] ping_second: unknown key, ignored; did you mean "ping_seconds"?',
        'test.toml: [modules.asr.moshi_stt] quantise: unknown key, ignored; did you mean "quantize"?',
    ]


def test_a_file_without_modules_warns() -> None:
    (warning,) = parse_config(EMBEDDED.split("[modules")[0], "test.toml").warnings
    assert "there is no module" in warning


# ---- errors ----------------------------------------------------------------------------------------------------------


def change(old: str, new: str, text: str = ONE_B) -> Callable[[], str]:
    return lambda: replaced(old, new, text)


def add(text: str) -> Callable[[], str]:
    return lambda: ONE_B + text


BROKEN: list[tuple[Callable[[], str], str]] = [
    (lambda: "static_dir = ", "not valid TOML: Invalid value"),
    (change('static_dir = "./static/"\n', ""), "static_dir: the key is missing; expected text in quotes."),
    (change("log_dir", "logdir"), 'log_dir: the key is missing; expected text in quotes. There is "logdir"'),
    (change('log_dir = "$HOME/tmp/tts-logs"', "log_dir = 3"), "log_dir = 3: expected text in quotes."),
    (change('"$HOME/tmp/tts-logs"', '"hf://a/b/c"'), 'log_dir = "hf://a/b/c": hf:// names a file on a model hub'),
    (change('"tts"', '"a/b"'), 'instance_name = "a/b": it becomes part of the log file\'s name'),
    (change('["public_token"]', '"public_token"'), 'authorized_ids = "public_token": expected a list of text in quotes.'),
    (change('["public_token"]', '["a", 1]'), 'authorized_ids = ["a", 1]: expected a list of text in quotes.'),
    (change('["public_token"]', '["a"]\nmodules = 5', ONE_B.split("[modules")[0]), "modules = 5: expected a table."),
    (change("[modules.asr]", "[modules]\nx = 1\n[modules.asr]"), "[modules] x = 1: expected a table."),
    # the module
    (change('type = "BatchedAsr"\n', ""), "[modules.asr] type: the key is missing; expected text in quotes. Expected one of"),
    (change('"BatchedAsr"', '"Batchedasr"'), 'type = "Batchedasr": expected one of "Asr", "BatchedAsr", "PyBatchedAsr", "Embedded"; did you mean "BatchedAsr"?'),
    *((change('"BatchedAsr"', f'"{kind}"'), f'[modules.asr] type = "{kind}": this server does speech-to-text only')
      for kind in ("Tts", "Lm", "Mimi", "Py", "PyPost")),
    (change('path = "/api/asr-streaming"\n', ""), "[modules.asr] path: the key is missing"),
    (change('"/api/asr-streaming"', '"api/asr"'), 'path = "api/asr": expected a route that begins with "/". Write "/api/asr".'),
    (change('"/api/asr-streaming"', '"/a b"'), "expected a plain route"),
    (change('"/api/asr-streaming"', '"/api/{id}"'), "expected a plain route"),
    (change('"/api/asr-streaming"', '"/metrics"'), 'path = "/metrics": the server itself answers there'),
    (lambda: ONE_B + replaced("asr", "two", EMBEDDED[EMBEDDED.index("[modules") :]), '[modules.two] path = "/api/asr-streaming": [modules.asr] has the same path'),
    (change("batch_size = 64\n", ""), "[modules.asr] batch_size: the key is missing; expected a whole number, 0 or more. Give the number of streams"),
    (change("batch_size = 64", "batch_size = 0"), "[modules.asr] batch_size = 0: expected at least 1"),
    (change("batch_size = 64", "batch_size = -1"), "[modules.asr] batch_size = -1: expected a whole number, 0 or more"),
    (change("batch_size = 64", "batch_size = 64.0"), "[modules.asr] batch_size = 64.0: expected a whole number"),
    (change("batch_size = 64", "batch_size = true"), "[modules.asr] batch_size = true: expected a whole number"),
    (change("batch_size = 64", 'batch_size = "64"'), '[modules.asr] batch_size = "64": expected a whole number'),
    (lambda: EMBEDDED + "batch_size = 0\n", "[modules.asr] batch_size = 0: expected at least 1"),
    (change("hf://kyutai/stt-1b-en_fr-candle/model.safetensors", "hf://kyutai/model.safetensors"), 'lm_model_file = "hf://kyutai/model.safetensors": expected "hf://OWNER/REPOSITORY/FILE"'),
    (change("hf://kyutai/stt-1b-en_fr-candle/model.safetensors", "hf://kyutai//model.safetensors"), 'expected "hf://OWNER/REPOSITORY/FILE"'),
    (change("hf://kyutai/stt-1b-en_fr-candle/model.safetensors", "$UNSET_FOR_THIS_TEST"), 'expected a path or "hf://OWNER/REPOSITORY/FILE", found nothing'),
    (change("model.safetensors", "model.q8.gguf"), "gguf files are not supported; use the .safetensors file"),
    (change("asr_delay_in_tokens = 6\n", ""), "asr_delay_in_tokens: the key is missing"),
    (change("asr_delay_in_tokens = 6", "asr_delay_in_tokens = 6.5"), "asr_delay_in_tokens = 6.5: expected a whole number"),
    (change("asr_delay_in_tokens = 6", "asr_delay_in_tokens = 750"), "a delay of 750 frames makes no sense with a context of 750"),
    (change("temperature = 0.0", "conditioning_delay = 100"), "conditioning_delay = 100: a delay of 1251 frames makes no sense"),
    (change("temperature = 0.0", "conditioning_delay = -1"), "conditioning_delay = -1: expected seconds, 0 or more"),
    (change("temperature = 0.0", "conditioning_delay = nan"), "conditioning_delay = NaN: expected a number."),
    (change("temperature = 0.0", "temperature = inf"), "temperature = Infinity: expected a number."),
    (change("temperature = 0.0", "log_frequency_s = 0"), "log_frequency_s = 0: expected seconds between two token logs, 0.1 to 86400"),
    (change("temperature = 0.0", "log_frequency_s = inf"), "log_frequency_s = Infinity: expected a number."),
    (change("temperature = 0.0", 'temperature = "hot"'), 'temperature = "hot": expected a number.'),
    (change("temperature = 0.0", 'dtype_override = "int8"'), 'dtype_override = "int8": expected one of "bf16", "f16", "f32", "f64".'),
    (change("conditioning_learnt_padding = true", "conditioning_learnt_padding = 1"), "conditioning_learnt_padding = 1: expected true or false."),
    # the model
    (lambda: ONE_B.split("[modules.asr.model]")[0], "[modules.asr] model: the key is missing; expected a table."),
    (lambda: ONE_B.split("[modules.asr.model.transformer]")[0], "[modules.asr.model] transformer: the key is missing"),
    (change("text_in_vocab_size = 8001", "text_in_vocab_size = 8000"), "expected text_out_vocab_size + 1 = 8001"),
    (change("audio_vocab_size = 2049", "audio_vocab_size = 2048"), "audio_vocab_size = 2048: expected 2049"),
    (change("audio_codebooks = 32", "audio_codebooks = 33"), "audio_codebooks = 33: expected 1 to 32"),
    (change("audio_codebooks = 32", "audio_codebooks = 0"), "audio_codebooks = 0: expected 1 to 32"),
    (change("audio_codebooks = 32", "audio_codebooks = 32\ndepformer = {}"), "[modules.asr.model] depformer = a table: speech-to-text models have none"),
    (change("d_model = 2048\n", ""), "[modules.asr.model.transformer] d_model: the key is missing"),
    *((change(line, new), f"[modules.asr.model.transformer] {new}: expected {line.split(' = ')[1]}. No published")
      for line, new in (("causal = true", "causal = false"), ("norm_first = true", "norm_first = false"), ("use_conv_block = false", "use_conv_block = true"),
                        ("kv_repeat = 1", "kv_repeat = 2"), ('positional_embedding = "Rope"', 'positional_embedding = "Sin"'),
                        ('norm = "RmsNorm"', 'norm = "LayerNorm"'), ("bias_ff = false", "bias_ff = true"), ('gating = "silu"', 'gating = "gelu"'))),
    (change('gating = "silu"\n', ""), 'gating: expected "silu" (the key is absent)'),
    (change("causal = true", "causal = true\nlayer_scale = 0.1"), "layer_scale = 0.1: expected the key to be absent"),
    (change("causal = true", "causal = true\ncross_attention = true"), "cross_attention = true: expected false"),
    (change("num_heads = 16", "num_heads = 15"), "num_heads = 15: expected a divisor of d_model = 2048"),
    (change("num_layers = 16", "num_layers = 0"), "num_layers = 0: expected at least 1."),
    (change("context = 750", "context = 0"), "context = 0: expected at least 2."),
    (change("max_period = 100000", "max_period = 1"), "max_period = 1: expected a number above 1"),
    (change("dim = 6", "dim = 0"), "[modules.asr.model.extra_heads] dim = 0: expected at least 1."),
    (add('[modules.asr.model.conditioners.x]\ntype = "Lut"\nn_bins = 2\ndim = 4\npossible_values = ["a"]\n'), 'no conditioner named "delay"'),
    (add('[modules.asr.model.conditioners.delay]\ntype = "Table"\n'), 'type = "Table": expected one of "Lut", "ContinuousAttribute".'),
    (add('[modules.asr.model.conditioners.delay]\ntype = "Lut"\n'), "[modules.asr.model.conditioners.delay] n_bins: the key is missing"),
    (lambda: replaced(LEARNT, "conditioning_delay = 1") + '[modules.asr.model.conditioners.delay]\ntype = "Lut"\nn_bins = 2\ndim = 4\npossible_values = ["a"]\n',
     'the conditioner named "delay" is of type "Lut"'),
    # PyBatchedAsr
    (lambda: PY_BATCHED.split("[modules.asr.py]")[0], "[modules.asr] py: the key is missing; expected a table."),
    (change('hf_repo = "kyutai/stt-1b-en_fr"\n', "", PY_BATCHED), "[modules.asr.py] hf_repo: the key is missing; expected the repository"),
    (change('"kyutai/stt-1b-en_fr"', '"stt-1b-en_fr"', PY_BATCHED), 'hf_repo = "stt-1b-en_fr": expected "OWNER/REPOSITORY"'),
    (change('"cuda:0"', '"tpu"', PY_BATCHED), '[modules.asr.py] device = "tpu": expected "cuda" or "cpu".'),
    # ours
    (add('[modules.asr.moshi_stt]\ndevice = "gpu"\n'), '[modules.asr.moshi_stt] device = "gpu": expected one of "auto", "cpu", "cuda", "mps", "mlx".'),
    (add("[modules.asr.moshi_stt]\nstall_seconds = 2\n"), "[modules.asr.moshi_stt] stall_seconds = 2: expected seconds from 5 to 120, or 0 for never."),
    (add("[modules.asr.moshi_stt]\nmarker_wait_seconds = -1\n"), "[modules.asr.moshi_stt] marker_wait_seconds = -1: expected seconds from 0 to 60."),
    (add("[moshi_stt]\ninbox_seconds = 0\n"), "[moshi_stt] inbox_seconds = 0: expected a number above 0"),
    (add("[moshi_stt]\ninbox_seconds = 0.01\n"), "[moshi_stt] inbox_seconds = 0.01: expected at least one frame"),
    (
        add("[moshi_stt]\nsocket_processes = 65\n"),
        '[moshi_stt] socket_processes = 65: expected 0 to 64, or "auto"',
    ),
    (
        add('[moshi_stt]\nsocket_processes = "many"\n'),
        '[moshi_stt] socket_processes = "many": expected a whole number, 0 or more or "auto"',
    ),
    (add("[moshi_stt]\nping_seconds = 20\n"), "[moshi_stt] ping_seconds = 20: expected less than silent_seconds (20)"),
    (add("[moshi_stt]\noutbox_events = 1.5\n"), "[moshi_stt] outbox_events = 1.5: expected a whole number"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "message"), BROKEN, ids=[message[:60] for _, message in BROKEN])
def test_a_broken_file_is_refused_by_name_and_remedy(text: Callable[[], str], message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        parse_config(text(), "test.toml")
    assert str(raised.value).startswith("test.toml: ")
    assert message in str(raised.value)


def test_everything_wrong_with_a_model_is_named_at_once() -> None:
    text = replaced("causal = true", "causal = false", replaced("asr_delay_in_tokens = 6", "asr_delay_in_tokens = 750"))
    with pytest.raises(ConfigError) as raised:
        parse_config(replaced("audio_codebooks = 32", "audio_codebooks = 99", text), "test.toml")
    lines = str(raised.value).splitlines()
    assert [line.split(":")[1] for line in lines] == [
        " [modules.asr.model.transformer] causal = false",
        " [modules.asr.model] audio_codebooks = 99",
        " [modules.asr] asr_delay_in_tokens = 750",
    ]


def as_documented(default: object) -> str:
    if isinstance(default, str):
        return f'`"{default}"`'
    if isinstance(default, bool):
        return str(default).lower()
    if isinstance(default, tuple):
        return f"`{list(default)}`"
    assert isinstance(default, int | float)
    if default == 1 << 30:
        return "1 GiB"
    return f"{default >> 20} MiB" if isinstance(default, int) and default and not default % (1 << 20) else f"{default:g}"


def test_every_key_is_documented() -> None:
    text = (ROOT / "docs" / "configuration.md").read_text()
    for struct in (LimitsConfig, EngineConfig, EncoderConfig, KyutaiModule, EmbeddedModule):
        for key in set(struct.__struct_fields__) - {"name", "config_file", "engine", "encoder", "model"}:
            assert f"`{key}`" in text, f"docs/configuration.md does not say what {key} is"
    for struct in (LimitsConfig, EngineConfig):
        for field in msgspec.structs.fields(struct):
            if field.name == "encoder":
                continue  # a table of its own
            row = f"| `{field.name}` | {as_documented(field.default)} |"
            assert row in text, f"docs/configuration.md has another default for {field.name}"


def test_names_that_are_no_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match='no shipped configuration of that name; did you mean "stt-1b-en_fr"'):
        load_config("stt-1b-enfr")
    with pytest.raises(ConfigError, match="is a directory; expected a TOML file"):
        load_config(str(tmp_path))
    with pytest.raises(ConfigError, match=r"Unknown config: tts\.py"):
        shipped_text("tts.py")
    binary = tmp_path / "x.toml"
    binary.write_bytes(b"a = '\xff'")
    with pytest.raises(ConfigError, match="byte 5 is not UTF-8"):
        load_config(str(binary))
