"""The name table against the published counts, and every way in which a file can be wrong, named."""

import json
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from moshi_stt.errors import CheckpointError
from moshi_stt.models.spec import ConditionerSpec, LMSpec, MimiSpec
from moshi_stt.models.weights import (
    codebook_stems,
    lm_table,
    make_plan,
    mimi_ignored,
    mimi_table,
    plan_lm,
    plan_mimi,
    read_header,
)

ONE_B = LMSpec(dim=2048, heads=16, layers=16, context=750, max_period=100_000.0, text_card=8_000, codebooks=32, extra_heads=4)
TINY = LMSpec(dim=16, heads=2, layers=2, context=4, max_period=100.0, text_card=8, codebooks=3, extra_heads=2)
HIDDEN = 24

Entry = dict[str, Any]


def write(path: Path, entries: dict[str, tuple[str, tuple[int, ...]]], cut: int = 0) -> Path:
    """A safetensors file of zeros with these dtypes and shapes, `cut` bytes short."""
    width = {"F32": 4, "BF16": 2, "U32": 4, "I64": 8, "F16": 2, "F8_E4M3": 1}
    header: dict[str, Entry] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in entries.items():
        size = width[dtype]
        for length in shape:
            size *= length
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    path.write_bytes((struct.pack("<Q", len(text)) + text + bytes(end))[: 8 + len(text) + end - cut])
    return path


def tiny_entries(spec: LMSpec = TINY, naming: str = "file") -> dict[str, tuple[str, tuple[int, ...]]]:
    table = lm_table(spec, HIDDEN)
    if naming == "mlx":
        return {param.mlx_name: ("BF16", param.mlx_shape) for param in table}
    return {param.name: ("BF16", param.shape) for param in table}


def test_published_counts() -> None:
    """135 tensors and 989 253 632 parameters in the candle 1B; 323 in the 2.6B; 175 of Mimi's 318 (contract section 6)."""
    table = lm_table(ONE_B, 5_632)
    assert len(table) == 135
    assert sum(_size(param.shape) for param in table) == 989_253_632
    big = replace(ONE_B, heads=32, layers=48, text_card=4_000, extra_heads=0)
    assert len(lm_table(big, 5_632)) == 323
    assert sum(_size(param.shape) for param in lm_table(big, 5_632)) == 2_617_118_720
    assert len(mimi_table(MimiSpec())) == 175


def test_names_are_unique_in_every_naming() -> None:
    spec = replace(
        TINY, conditioners=(ConditionerSpec("delay", "ContinuousAttribute", 8), ConditionerSpec("tone", "Lut", 8, 3))
    )
    for table in (lm_table(spec, HIDDEN), mimi_table(MimiSpec())):
        for names in ([p.name for p in table], [p.mlx_name for p in table]):
            assert len(set(names)) == len(names)


def test_both_namings() -> None:
    """The rows of contract section 6.2."""
    table = {param.name: param for param in lm_table(ONE_B, 5_632)}
    attention = table["transformer.layers.3.self_attn.in_proj_weight"]
    assert attention.mlx_name == "transformer.layers.3.self_attn.in_proj.weight"
    out = table["transformer.layers.3.self_attn.out_proj.weight"]
    assert out.mlx_name == out.name
    assert (table["emb.31.weight"].mlx_name, table["emb.31.weight"].shape) == ("audio_embs.31.weight", (2_049, 2_048))
    norm = table["transformer.layers.0.norm1.alpha"]
    assert (norm.shape, norm.mlx_name, norm.mlx_shape) == ((1, 1, 2_048), "transformer.layers.0.norm1.weight", (2_048,))
    assert table["out_norm.alpha"].mlx_name == "out_norm.weight"


def test_published_mimi_file(shared: Path) -> None:
    """Every one of the 318 names is either needed, with its shape, or ignored on purpose."""
    manifest = json.loads((shared / "goldens/mimi_manifest.json").read_text())
    table = {param.name: param.shape for param in mimi_table(MimiSpec())}
    assert {name: tuple(shape) for name, shape in manifest.items() if name in table} == table
    ignored = [name for name in manifest if any(rule.matches(name) for rule in mimi_ignored(MimiSpec()))]
    assert (len(manifest), len(ignored)) == (318, 143)
    assert not set(ignored) & set(table)
    eight = MimiSpec(codebooks=8)
    assert all(
        name in {p.name for p in mimi_table(eight)} or any(r.matches(name) for r in mimi_ignored(eight)) for name in manifest
    )


def test_codebook_order() -> None:
    stems = codebook_stems(MimiSpec())
    assert len(stems) == 32
    assert stems[0].startswith("quantizer.rvq_first.")
    assert stems[31] == "quantizer.rvq_rest.vq.layers.30._codebook"


@pytest.mark.parametrize("naming", ["file", "mlx"])
def test_whole_file(tmp_path: Path, naming: str) -> None:
    plan, hidden = plan_lm(write(tmp_path / "lm.safetensors", tiny_entries(naming=naming)), TINY)
    assert (plan.naming, hidden, len(plan.sources), plan.ignored, plan.packed) == (
        naming,
        HIDDEN,
        len(lm_table(TINY, 1)),
        (),
        False,
    )
    assert [source.info.start for source in plan.sources] == sorted(source.info.start for source in plan.sources)


def test_ignored_on_purpose(tmp_path: Path) -> None:
    """Audio output, and heads and conditioners that are not configured."""
    extra = {
        "depformer.0.linear_in.weight": ("BF16", (2, 2)),
        "depformer_in.0.weight": ("BF16", (2, 2)),
        "depformer_text_emb.weight": ("BF16", (2, 2)),
        "linears.0.weight": ("BF16", (2, 2)),
        "condition_provider.conditioners.delay.learnt_padding": ("F32", (1, 1, 16)),
    }
    path = write(tmp_path / "lm.safetensors", tiny_entries() | extra)
    plan, _ = plan_lm(path, replace(TINY, extra_heads=0))
    assert set(plan.ignored) == {*extra, "extra_heads.0.weight", "extra_heads.1.weight"}


def test_attention_of_the_module_hook(tmp_path: Path) -> None:
    """Kyutai's loader also takes `in_proj.weight`."""
    entries = {name.replace("in_proj_weight", "in_proj.weight"): entry for name, entry in tiny_entries().items()}
    plan, _ = plan_lm(write(tmp_path / "lm.safetensors", entries), TINY)
    assert plan.naming == "file"


def test_older_codebook_names(tmp_path: Path) -> None:
    spec = MimiSpec(codebooks=2)
    entries = {param.name: ("F32", param.shape) for param in mimi_table(spec)}
    old = {
        name.replace("cluster_usage", "cluster_size").replace("embedding_sum", "embed_sum"): e for name, e in entries.items()
    }
    old["quantizer.rvq_first.vq.layers.0._codebook.inited"] = ("F32", (1,))
    plan = plan_mimi(write(tmp_path / "mimi.safetensors", old), spec)
    assert len(plan.sources) == len(entries)


@pytest.mark.parametrize(("bits", "group"), [(8, 64), (4, 32)])
def test_mlx_packing(tmp_path: Path, bits: int, group: int) -> None:
    """`.q8` and `.q4` files: a packed matrix is three tensors, and the hidden size comes from the rows of `linear_in`."""
    spec = replace(TINY, dim=128)
    entries = {}
    for param in lm_table(spec, 192):
        entries[param.mlx_name] = ("BF16", param.mlx_shape)
        if len(param.shape) == 2:
            rows, columns = param.shape
            stem = param.mlx_name.removesuffix(".weight")
            entries[param.mlx_name] = ("U32", (rows, columns * bits // 32))
            entries |= {f"{stem}.{part}": ("BF16", (rows, columns // group)) for part in ("scales", "biases")}
    plan, hidden = plan_lm(write(tmp_path / "lm.q.safetensors", entries), spec)
    assert (plan.packed, hidden) == (True, 192)
    packings = {(s.packing.bits, s.packing.group_size) for s in plan.sources if s.packing}
    assert packings == {(bits, group)}
    del entries["text_linear.biases"]
    with pytest.raises(CheckpointError, match="text_linear"):
        plan_lm(write(tmp_path / "broken.safetensors", entries), spec)


def _drop(name: str) -> Callable[[dict[str, Any]], None]:
    return lambda entries: entries.__delitem__(name)


def _put(name: str, dtype: str, *shape: int) -> Callable[[dict[str, Any]], None]:
    return lambda entries: entries.__setitem__(name, (dtype, shape))


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (_drop("out_norm.alpha"), ["missing: out_norm.alpha [1, 1, 16]"]),
        (_drop("emb.2.weight"), ["missing: emb.2.weight [2049, 16]"]),
        (_drop("extra_heads.1.weight"), ["missing: extra_heads.1.weight [6, 16]"]),
        (_put("text_linear.weight", "BF16", 9, 16), ["wrong shape: text_linear.weight is [9, 16], expected [8, 16]"]),
        (_put("text_emb.weight", "BF16", 9), ["text_emb.weight is [9], expected [9, 16]"]),
        (_put("out_norm.alpha", "BF16", 16), ["out_norm.alpha is [16], expected [1, 1, 16]"]),
        (_put("text_linear.weight", "U32", 8, 16), ["wrong dtype: text_linear.weight is U32"]),
        (_put("text_linear.weight", "F8_E4M3", 8, 16), ["text_linear.weight is F8_E4M3, expected one of BF16, F16, F32"]),
        (
            _put("transformer.layers.0.self_attn.in_proj_bias", "BF16", 48),
            ["unknown: transformer.layers.0.self_attn.in_proj_bias [48]"],
        ),
        (_put("transformer.layers.2.norm1.alpha", "BF16", 1, 1, 16), ["unknown: transformer.layers.2.norm1.alpha"]),
        (_put("transformer.layers.1.self_attn.in_proj.weight", "BF16", 48, 16), ["doubled: ", "in_proj_weight and "]),
        (_put("transformer.layers.0.gating.linear_out.weight", "BF16", 16), ["linear_out.weight has shape [16]"]),
        (_drop("transformer.layers.0.gating.linear_out.weight"), ["it is no language model"]),
        (lambda entries: entries.clear(), ["it is no language model"]),
    ],
)
def test_broken_tensors(tmp_path: Path, change: Callable[[dict[str, Any]], None], parts: list[str]) -> None:
    entries = tiny_entries()
    change(entries)
    path = write(tmp_path / "lm.safetensors", entries)
    with pytest.raises(CheckpointError) as error:
        plan_lm(path, TINY)
    assert str(path) in str(error.value)
    for part in parts:
        assert part in str(error.value)


def test_all_that_is_wrong_is_named_and_long_lists_are_cut(tmp_path: Path) -> None:
    entries = {name: entry for name, entry in tiny_entries().items() if "layers.1." not in name and "emb" not in name}
    entries["surprise"] = ("F32", (3,))
    with pytest.raises(CheckpointError, match=r"missing: .* and 2 more; unknown: surprise \[3\]"):
        plan_lm(write(tmp_path / "lm.safetensors", entries), TINY)


def test_a_mimi_file_is_no_language_model(tmp_path: Path) -> None:
    """The two files swapped: said as such, not as a hundred missing names."""
    spec = MimiSpec(codebooks=1)
    path = write(tmp_path / "mimi.safetensors", {param.name: ("F32", param.shape) for param in mimi_table(spec)})
    with pytest.raises(CheckpointError, match="no language model"):
        plan_lm(path, TINY)
    with pytest.raises(CheckpointError, match="missing"):
        plan_mimi(write(tmp_path / "lm.safetensors", tiny_entries()), spec)


@pytest.mark.parametrize("cut", [1, 100, 10_000])
def test_cut_short(tmp_path: Path, cut: int) -> None:
    with pytest.raises(CheckpointError, match="cut short"):
        plan_lm(write(tmp_path / "lm.safetensors", tiny_entries(), cut=cut), TINY)


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"", "no safetensors file"),
        (b"PK\x03\x04 a zip file, as torch.save makes", "no safetensors file"),
        (b"<!doctype html><title>404</title>", "no safetensors file"),
        (struct.pack("<Q", 50) + b'{"a":', "cut short inside its header"),
        (struct.pack("<Q", 5) + b"hello", "no JSON"),
        (struct.pack("<Q", 2) + b"[]", "malformed"),
        (struct.pack("<Q", 10) + b'{"a":true}', "malformed"),
        (struct.pack("<Q", 57) + b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}  ' + bytes(4), "malformed"),
        (
            struct.pack("<Q", 57) + b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}   ' + bytes(4),
            "has 4 bytes for F32",
        ),
    ],
)
def test_no_safetensors(tmp_path: Path, content: bytes, part: str) -> None:
    path = tmp_path / "lm.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as error:
        read_header(path)
    assert part in str(error.value)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="No such file"):
        read_header(tmp_path / "absent.safetensors")
    with pytest.raises(CheckpointError, match="directory"):
        read_header(tmp_path)


def test_an_empty_table_takes_nothing(tmp_path: Path) -> None:
    """A plan never passes over a tensor in silence."""
    header = read_header(write(tmp_path / "x.safetensors", {"a": ("F32", (1,))}))
    with pytest.raises(CheckpointError, match="unknown: a"):
        make_plan(header, "file", (), ())


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for length in shape:
        size *= length
    return size
