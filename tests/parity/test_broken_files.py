"""Every kind of broken file and senseless setting, from the configuration's text to the sentence that a user reads.

On both frameworks, whose loaders share the checks. The details of each check have tables of their own: test_weights.py (names,
shapes, dtypes, headers), test_spec.py and test_config.py (settings), test_tokenizer.py, test_hub.py (transfers).
"""

import io
import json
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from tests.support.frameworks import FRAMEWORKS, need
from tests.support.local_hub import local_hub

from moshi_stt.config import KyutaiModule
from moshi_stt.config_load import parse_config, shipped_text
from moshi_stt.engine.backend import Backend
from moshi_stt.engines import Framework, load_kyutai
from moshi_stt.errors import CheckpointError, ConfigError, DownloadError, MoshiSttError
from moshi_stt.models.spec import LMSpec, MimiSpec
from moshi_stt.models.weights import lm_table, mimi_table

PIECES = 30
"""The letters, the blank, and three that every model has."""
LM = LMSpec(dim=16, heads=2, layers=1, context=8, max_period=100_000.0, text_card=PIECES, codebooks=2, extra_heads=1)
Shape = tuple[int, ...]
WIDTHS = {"F32": 4, "BF16": 2, "I32": 4, "U8": 1}


@pytest.fixture(scope="module")
def tokenizer() -> bytes:
    """A SentencePiece model of PIECES pieces."""
    sentencepiece = pytest.importorskip("sentencepiece", reason="sentencepiece comes with the model extras")
    made = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(["the quick brown fox jumps over the lazy dog", "pack my box with five dozen liquor jugs"] * 9),
        model_writer=made,
        vocab_size=PIECES,
        model_type="char",
        minloglevel=2,
    )
    return made.getvalue()


@dataclass
class Files:
    """A model before it is written.

    lm, mimi: dtype and shape by name. cut: bytes missing at a file's end; kept: all that is left of one.
    """

    folder: Path
    tokenizer: bytes
    lm: dict[str, tuple[str, Shape]] = field(default_factory=lambda: {p.name: ("BF16", p.shape) for p in lm_table(LM, 24)})
    mimi: dict[str, tuple[str, Shape]] = field(
        default_factory=lambda: {p.name: ("F32", p.shape) for p in mimi_table(MimiSpec(codebooks=2))}
    )
    cut: dict[str, int] = field(default_factory=dict)
    kept: dict[str, int] = field(default_factory=dict)
    settings: dict[str, object] = field(default_factory=dict)

    def load(self, framework: str) -> Backend:
        """Write and load it, as `worker` does."""
        self._write_tensors("lm", self.lm)
        self._write_tensors("mimi", self.mimi)
        (self.folder / "tokenizer").write_bytes(self.tokenizer[: len(self.tokenizer) - self.cut.get("tokenizer", 0)])
        (module,) = parse_config(self._toml(), "test.toml").config.modules
        assert isinstance(module, KyutaiModule)
        kind: Framework = "mlx" if framework == "mlx" else "torch"
        return load_kyutai(module, kind).backend

    def _write_tensors(self, name: str, tensors: dict[str, tuple[str, Shape]]) -> None:
        """Zeros, as a hole of the file: only headers differ here."""
        header, end = {}, 0
        for tensor, (dtype, shape) in tensors.items():
            start, end = end, end + WIDTHS[dtype]
            for length in shape:
                end = start + (end - start) * length
            header[tensor] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
        text = json.dumps(header).encode()
        with (self.folder / name).open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(self.kept.get(name, 8 + len(text) + end - self.cut.get(name, 0)))

    def _toml(self) -> str:
        """The 1B's configuration with this model's numbers and names, and with `settings` for the rest."""
        values: dict[str, object] = {
            "lm_model_file": str(self.folder / "lm"),
            "audio_tokenizer_file": str(self.folder / "mimi"),
            "text_tokenizer_file": str(self.folder / "tokenizer"),
            "batch_size": 1,
            "text_in_vocab_size": PIECES + 1,
            "text_out_vocab_size": PIECES,
            "audio_codebooks": LM.codebooks,
            "d_model": LM.dim,
            "num_heads": LM.heads,
            "num_layers": LM.layers,
            "context": LM.context,
        } | self.settings
        lines = []
        for line in shipped_text("stt-1b-en_fr").partition("[modules.asr.model.extra_heads]")[0].splitlines():
            key = line.partition(" = ")[0]
            lines.append(f"{key} = {json.dumps(values[key])}" if key in values else line)
        text = "\n".join(lines)
        return f"{text}\n[modules.asr.model.extra_heads]\nnum_heads = {LM.extra_heads}\ndim = {LM.extra_head_dim}\n"


Damage = Callable[[Files], object]
IN_PROJ = "transformer.layers.0.self_attn.in_proj_weight"
FIRST_CONV = "encoder.model.0.conv.conv.weight"


def settings(**values: object) -> Damage:
    return lambda files: files.settings.update(values)


BROKEN: dict[str, tuple[Damage, type[MoshiSttError], list[str]]] = {
    "language model truncated": (lambda f: f.cut.update(lm=100), CheckpointError, ["/lm is cut short: ", "fetch it again"]),
    "mimi truncated": (lambda f: f.cut.update(mimi=1), CheckpointError, ["/mimi is cut short: ", "fetch it again"]),
    "truncated within its header": (
        lambda f: f.kept.update(lm=100),
        CheckpointError,
        ["/lm is cut short inside its header: 100 bytes"],
    ),
    "tokenizer truncated": (
        lambda f: f.cut.update(tokenizer=len(f.tokenizer) // 2),
        CheckpointError,
        ["/tokenizer (", "is not a readable SentencePiece model", "Fetch it again"],
    ),
    "wrong dtype": (
        lambda f: f.lm.update({IN_PROJ: ("I32", (48, 16))}),
        CheckpointError,
        [f"wrong dtype: {IN_PROJ} is I32, expected one of BF16, F16, F32"],
    ),
    "wrong dtype in mimi": (
        lambda f: f.mimi.update({FIRST_CONV: ("U8", f.mimi[FIRST_CONV][1])}),
        CheckpointError,
        [f"wrong dtype: {FIRST_CONV} is U8"],
    ),
    "missing tensor": (lambda f: f.lm.pop(IN_PROJ), CheckpointError, [f"missing: {IN_PROJ} [48, 16]"]),
    "missing tensor in mimi": (lambda f: f.mimi.pop(FIRST_CONV), CheckpointError, [f"missing: {FIRST_CONV} [64, 1, 7]"]),
    "extra tensor": (
        lambda f: f.lm.update({"surprise.weight": ("F32", (3,))}),
        CheckpointError,
        ["/lm", "unknown: surprise.weight [3]"],
    ),
    "extra tensor in mimi": (
        lambda f: f.mimi.update({"encoder.model.99.weight": ("F32", (3,))}),
        CheckpointError,
        ["/mimi", "unknown: encoder.model.99.weight [3]"],
    ),
    "misshapen tensor": (
        lambda f: f.lm.update({IN_PROJ: ("BF16", (48, 8))}),
        CheckpointError,
        [f"wrong shape: {IN_PROJ} is [48, 8], expected [48, 16]"],
    ),
    "both files swapped": (
        lambda f: f.settings.update(lm_model_file=f"{f.folder}/mimi", audio_tokenizer_file=f"{f.folder}/lm"),
        CheckpointError,
        ["/mimi has no ", "it is no language model"],
    ),
    "vocabulary of another tokenizer": (
        settings(text_in_vocab_size=PIECES + 10, text_out_vocab_size=PIECES + 9),
        CheckpointError,
        [f"/tokenizer has {PIECES} pieces and the model has text_out_vocab_size = {PIECES + 9}", "from the same repository"],
    ),
    "delay past the context": (
        settings(asr_delay_in_tokens=8),
        ConfigError,
        ["asr_delay_in_tokens = 8: a delay of 8 frames makes no sense with a context of 8"],
    ),
    "negative delay": (settings(asr_delay_in_tokens=-1), ConfigError, ["asr_delay_in_tokens = -1: expected a whole number, 0"]),
    "context of one frame": (settings(context=1), ConfigError, ["a delay of 6 frames makes no sense with a context of 1"]),
    "context of one frame, and no delay": (settings(context=1, asr_delay_in_tokens=0), ConfigError, ["context = 1"]),
    "no context": (settings(context=0), ConfigError, ["context = 0: expected at least 2"]),
    "layers that the file has not": (settings(num_layers=2), CheckpointError, ["missing: transformer.layers.1."]),
    "codebooks that the file has not": (settings(audio_codebooks=3), CheckpointError, ["missing: emb.2.weight [2049, 16]"]),
}


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_it_loads_when_nothing_is_broken(framework: str, tokenizer: bytes, tmp_path: Path) -> None:
    need(framework)
    backend = Files(tmp_path, tokenizer).load(framework)
    assert backend.pause_heads == LM.extra_heads
    backend.close()


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("what", BROKEN)
def test_broken(what: str, framework: str, tokenizer: bytes, tmp_path: Path) -> None:
    """The kind of error, and in its sentence: which file or key, what is there, what was expected."""
    need(framework)
    damage, kind, parts = BROKEN[what]
    files = Files(tmp_path, tokenizer)
    damage(files)
    with pytest.raises(kind) as raised:
        files.load(framework)
    for part in parts:
        assert part in str(raised.value)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_wrong_hash(framework: str, tokenizer: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A download that is not what the hub promised is not loaded, and not kept."""
    need(framework)
    for name in ("HF_HUB_CACHE", "HF_HUB_OFFLINE", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # read when the library was imported
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    with local_hub() as hub:
        hub.files = {("someone/model", "model.safetensors"): b"weights" * 50_000}
        hub.wrong = True
        monkeypatch.setenv("HF_ENDPOINT", hub.address)
        files = Files(tmp_path, tokenizer, settings={"lm_model_file": "hf://someone/model/model.safetensors"})
        with pytest.raises(DownloadError, match=r"model\.safetensors.* has the SHA-256 ") as raised:
            files.load(framework)
    assert "expected" in str(raised.value)
    assert not [path for path in (tmp_path / "hf").rglob("*") if path.is_file() and path.stat().st_size >= 300_000]
