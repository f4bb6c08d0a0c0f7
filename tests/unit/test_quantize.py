"""Quantised checkpoints: the arithmetic, the file, and the command. Without a model framework."""

import struct
from pathlib import Path

import numpy as np
import pytest
from tests.support.checkpoints import small_spec, small_tensors

from moshi_stt.cli import main
from moshi_stt.models.affine import choose_packing, dequantize, levels_of, quantize
from moshi_stt.models.tensors import open_tensors, to_float32, to_stored, write_tensors
from moshi_stt.models.weights import Packing, plan_lm, read_header

INT8, INT4 = Packing(8, 64), Packing(4, 32)


def save(path: Path, tensors: dict[str, np.ndarray], dtype: str = "BF16") -> Path:
    shapes = {name: (dtype, values.shape) for name, values in tensors.items()}
    write_tensors(path, shapes, ((name, to_stored(values, dtype)) for name, values in tensors.items()), {})
    return path


@pytest.fixture
def original(tmp_path: Path) -> Path:
    lm, _ = small_tensors(small_spec(dim=64))
    return save(tmp_path / "model.safetensors", lm)


@pytest.mark.parametrize("packing", [INT8, INT4, Packing(4, 64), Packing(8, 32)])
def test_no_weight_is_off_by_more_than_a_step(packing: Packing) -> None:
    weight = np.random.default_rng(0).standard_normal((50, 256)).astype(np.float32)
    packed = quantize(weight, packing)
    groups = weight.reshape(50, -1, packing.group_size)
    step = (groups.max(-1) - groups.min(-1)) / ((1 << packing.bits) - 1)
    # Half a step, and what shifting the grid so that 0 lies on it can cost at its other end.
    assert (np.abs(dequantize(packed, packing) - weight).reshape(groups.shape) <= 1.01 * step[..., None]).all()
    assert np.sqrt(np.mean(np.square(dequantize(packed, packing) - weight))) < 0.4 * step.mean()
    assert packed.weight.shape == (50, 256 * packing.bits // 32)
    assert packed.scales.shape == packed.biases.shape == groups.shape[:2]


@pytest.mark.parametrize("packing", [INT8, INT4])
def test_constant_groups_are_exact(packing: Packing) -> None:
    weight = np.repeat(np.array([[0.0], [3.5], [-0.25], [1e-30]], np.float32), 64, axis=1)
    np.testing.assert_allclose(dequantize(quantize(weight, packing), packing), weight, atol=1e-7)


def test_zero_stays_zero() -> None:
    """A weight of exactly 0 comes back as 0, or as near as rounding of the scale's multiple allows."""
    weight = np.random.default_rng(1).standard_normal((20, 64)).astype(np.float32)
    weight[:, ::3] = 0
    assert np.abs(dequantize(quantize(weight, INT4), INT4)[:, ::3]).max() < 1e-6


def test_levels_lie_lowest_first() -> None:
    words = np.array([[0x76543210, 0xFEDCBA98]], np.uint32)
    assert levels_of(words, INT4).tolist() == [list(range(16))]
    assert levels_of(words[:, :1], INT8).tolist() == [[0x10, 0x32, 0x54, 0x76]]


def test_what_is_packed_how() -> None:
    layer, table = "transformer.layers.3.gating.linear_in.weight", "emb.4.weight"
    assert choose_packing(layer, (128, 64), "int4") == INT4
    assert choose_packing(layer, (128, 64), "int8") == choose_packing(table, (128, 64), "int4") == INT8
    assert choose_packing("text_linear.weight", (40, 96), "int4") == Packing(8, 32)
    assert choose_packing(layer, (128, 40), "int4") is None, "no group size divides 40"
    assert choose_packing("transformer.layers.3.norm1.alpha", (1, 1, 64), "int4") is None
    assert choose_packing("condition_provider.conditioners.delay.output_proj.weight", (64, 64), "int8") is None


def test_bfloat16_rounds_to_nearest_even() -> None:
    values = np.array([1.0, 1.00390625, 1.01171875, -3.1415926, 0.0, np.inf, np.nan, 3.4e38], np.float32)
    back = to_float32(to_stored(values, "BF16"), "BF16")
    np.testing.assert_array_equal(back[:7], [1.0, 1.0, 1.015625, -3.140625, 0.0, np.inf, np.nan])
    assert np.isinf(back[7]), "above the largest bfloat16"
    everything = np.arange(1 << 16, dtype=np.uint16)
    again = to_stored(to_float32(everything, "BF16"), "BF16")
    numbers = ~np.isnan(to_float32(everything, "BF16"))
    np.testing.assert_array_equal(again[numbers], everything[numbers])


@pytest.mark.parametrize(("bits", "dtype"), [(8, "BF16"), (4, "BF16"), (4, "F32"), (8, "F16")])
def test_command_writes_a_whole_model(tmp_path: Path, capsys: pytest.CaptureFixture[str], bits: int, dtype: str) -> None:
    """The file holds every tensor of the model in MLX naming, packed as it says, and stands for nearly the same weights."""
    spec = small_spec(dim=64)
    lm, _ = small_tensors(spec)
    source, target = save(tmp_path / "in.safetensors", lm, dtype), tmp_path / "out.safetensors"
    assert main(["quantize", str(source), str(target), "--bits", str(bits)]) == 0
    assert f'lm_model_file = "{target}"' in capsys.readouterr().out
    header = read_header(target)
    assert header.metadata["quantization"] == f"int{bits}"
    plan, _ = plan_lm(target, spec.lm)
    assert (plan.naming, plan.packed) == ("mlx", True)
    with open_tensors(header) as file:
        for found in plan.sources:
            wanted = to_float32(to_stored(lm[found.param.name], dtype), dtype).reshape(found.param.mlx_shape)
            if found.packing is None:
                np.testing.assert_array_equal(file.read_float32(found.name), wanted)
                continue
            stem = found.name.removesuffix(".weight")
            scales, biases = (file.read_float32(f"{stem}.{part}") for part in ("scales", "biases"))
            weight = file.read(found.name)
            packed = quantize(wanted, found.packing)._replace(scales=scales, biases=biases)
            np.testing.assert_array_equal(weight, packed.weight)
            error = dequantize(packed, found.packing) - wanted
            assert np.abs(error).max() < {8: 0.02, 4: 0.2}[found.packing.bits] * np.abs(wanted).max()


def test_mlx_naming_gives_the_same_file(original: Path, tmp_path: Path) -> None:
    """From the candle, PyTorch or MLX repository: the same weights."""
    plan, _ = plan_lm(original, small_spec(dim=64).lm)
    with open_tensors(plan.header) as file:
        renamed = {s.param.mlx_name: file.read_float32(s.name).reshape(s.param.mlx_shape) for s in plan.sources}
    renamed_file = save(tmp_path / "mlx.safetensors", renamed)
    outputs = []
    for source in (original, renamed_file):
        target = tmp_path / f"{source.stem}.q4.safetensors"
        assert main(["quantize", str(source), str(target), "--bits", "4", "--quiet"]) == 0
        outputs.append(target)
    first, second = (read_header(path) for path in outputs)
    assert first.tensors.keys() == second.tensors.keys()
    with open_tensors(first) as one, open_tensors(second) as other:
        for name in first.tensors:
            np.testing.assert_array_equal(one.read(name), other.read(name))


def test_conditioners_are_kept(tmp_path: Path) -> None:
    lm, _ = small_tensors(small_spec(dim=64))
    name = "condition_provider.conditioners.delay.learnt_padding"
    lm[name] = np.full((1, 1, 64), 0.5, np.float32)
    source, target = save(tmp_path / "in.safetensors", lm), tmp_path / "out.safetensors"
    assert main(["quantize", str(source), str(target)]) == 0
    with open_tensors(read_header(target)) as file:
        np.testing.assert_array_equal(file.read_float32(name), lm[name])


def test_refusals(original: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What cannot be done is said, and nothing is left behind."""
    packed, other = tmp_path / "packed.safetensors", tmp_path / "other.safetensors"
    save(other, {"a": np.zeros((2, 2), np.float32)})
    assert main(["quantize", str(original), str(packed)]) == 0
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(original.read_bytes()[:-10])
    cases = [
        (original, packed, "exists already"),
        (packed, tmp_path / "x", "quantised already"),
        (other, tmp_path / "x", "no language model"),
        (tmp_path / "absent.safetensors", tmp_path / "x", "absent.safetensors"),
        (cut, tmp_path / "x", "cut short"),
        (original, tmp_path / "nowhere" / "x", "no folder"),
        ("embedded", tmp_path / "x", "0 language models"),
    ]
    for source, target, part in cases:
        capsys.readouterr()
        assert main(["quantize", str(source), str(target)]) == 1
        assert part in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "cut.safetensors", "model.safetensors", "other.safetensors", "packed.safetensors",
    ]  # fmt: skip


def test_header_is_aligned(original: Path) -> None:
    """Readers that map the file want the numbers to begin at a multiple of 8."""
    (length,) = struct.unpack("<Q", original.read_bytes()[:8])
    assert length % 8 == 0
