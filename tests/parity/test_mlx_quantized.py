"""8 and 4 bits on MLX: the products, published files, quantising at load, and what `moshi-stt quantize` writes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support.checkpoints import Checkpoint, save, small_spec, small_tensors
from tests.support.frameworks import loader
from tests.support.stepping import drive, noise, to_numpy

from moshi_stt.cli.quantize import quantize_file
from moshi_stt.errors import ConfigError
from moshi_stt.models.affine import SCHEMES, dequantize, quantize
from moshi_stt.models.tensors import to_float32, to_stored
from moshi_stt.models.weights import Packing, lm_table

mx = pytest.importorskip("mlx.core", reason="mlx not installed")

FRAMES = 30
HIDDEN = 64


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A small model whose every matrix can be packed, in bfloat16, as published models are."""
    spec = small_spec(dim=64)
    lm, mimi = small_tensors(spec, hidden=HIDDEN)
    rounded = {name: to_float32(to_stored(values, "BF16"), "BF16") for name, values in lm.items()}
    return save(tmp_path_factory.mktemp("wide"), spec, rounded, mimi)


def load(checkpoint: Checkpoint, lm_file: Path | None = None, **settings: object) -> Any:
    return loader("mlx")(lm_file or checkpoint.lm_file, checkpoint.mimi_file, checkpoint.spec, 2, settings=settings)


def as_mlx(array: np.ndarray, dtype: str) -> Any:
    return mx.array(array).astype({"F32": mx.float32, "BF16": mx.bfloat16, "F16": mx.float16}[dtype])


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
@pytest.mark.parametrize("packing", [Packing(8, 64), Packing(4, 32), Packing(4, 64)])
def test_the_quantiser_equals_mlx(packing: Packing, dtype: str) -> None:
    """NumPy's words, scales and biases are those of `mx.quantize`, to the last bit, for weights of any dtype."""
    weight = np.random.default_rng(0).standard_normal((200, 256)).astype(np.float32) * 0.05
    weight[3], weight[4, :64], weight[5, ::2] = 0, 0.25, 0
    weight = to_float32(to_stored(weight, dtype), dtype)
    ours = quantize(weight, packing)
    words, scales, biases = mx.quantize(as_mlx(weight, dtype), group_size=packing.group_size, bits=packing.bits)
    np.testing.assert_array_equal(ours.weight, to_numpy(words))
    for part, theirs in ((ours.scales, scales), (ours.biases, biases)):
        np.testing.assert_array_equal(to_float32(to_stored(part, dtype), dtype), to_numpy(theirs.astype(mx.float32)))


@pytest.mark.parametrize("packing", [Packing(8, 64), Packing(4, 32)])
def test_products_equal_dequantise_then_multiply(packing: Packing) -> None:
    from moshi_stt.models.mlx_impl.linear import PackedWeight, make_linear

    rng = np.random.default_rng(1)
    weight, x = rng.standard_normal((96, 256)).astype(np.float32), rng.standard_normal((5, 256)).astype(np.float32)
    words, scales, biases = quantize(weight, packing)
    packed = PackedWeight(mx.array(words), mx.array(scales), mx.array(biases), packing)
    plain = dequantize(quantize(weight, packing), packing)
    np.testing.assert_allclose(to_numpy(packed.unpacked()), plain, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(to_numpy(make_linear(packed)(mx.array(x))), x @ plain.T, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(to_numpy(packed.rows(mx.array([3, 3, 90]))), to_numpy(packed.unpacked())[[3, 3, 90]])


def published(checkpoint: Checkpoint, path: Path, packing: Packing) -> Path:
    """A file as Kyutai's MLX repositories hold them: every matrix packed in one way, written by MLX itself."""
    from safetensors.numpy import load_file

    tensors = load_file(checkpoint.lm_file)
    arrays = {}
    for param in lm_table(checkpoint.spec.lm, HIDDEN):
        values = as_mlx(tensors[param.name], "BF16").reshape(param.mlx_shape)
        stem = param.mlx_name.removesuffix(".weight")
        if len(param.shape) == 2:
            parts = mx.quantize(values, group_size=packing.group_size, bits=packing.bits)
            arrays |= dict(zip((param.mlx_name, f"{stem}.scales", f"{stem}.biases"), parts, strict=True))
        else:
            arrays[param.mlx_name] = values
    mx.save_safetensors(str(path), arrays)
    return path


def unpacked(checkpoint: Checkpoint, packed: Path, folder: Path) -> Checkpoint:
    """The same weights as plain float32 ones, in the naming of candle files."""
    from safetensors.numpy import load_file, save_file

    from moshi_stt.models.weights import plan_lm

    plan, _ = plan_lm(packed, checkpoint.spec.lm)
    arrays, tensors = mx.load(str(packed)), {}
    for source in plan.sources:
        values = arrays[source.name]
        if source.packing is not None:
            stem = source.name.removesuffix(".weight")
            scales, biases = (arrays[f"{stem}.{part}"].astype(mx.float32) for part in ("scales", "biases"))
            values = mx.dequantize(values, scales, biases, group_size=source.packing.group_size, bits=source.packing.bits)
        tensors[source.param.name] = to_numpy(values.astype(mx.float32)).reshape(source.param.shape)
    save_file(tensors, folder / "model.safetensors")
    save_file(load_file(checkpoint.mimi_file), folder / "mimi.safetensors")
    return Checkpoint(folder, checkpoint.spec)


@pytest.mark.parametrize(("name", "packing"), [("q8", Packing(8, 64)), ("q4", Packing(4, 32))])
def test_published_files(wide: Checkpoint, tmp_path: Path, name: str, packing: Packing) -> None:
    """A `.q8` or `.q4` file of every matrix, embeddings and heads included, gives what its weights written out give."""
    file = published(wide, tmp_path / f"model.{name}.safetensors", packing)
    pcm = noise(FRAMES, seed=4)
    packed, plain = load(wide, file), load(unpacked(wide, file, tmp_path))
    assert packed.report.dtype == f"int{packing.bits}, f32"
    ours, exact = drive(packed, pcm), drive(plain, pcm)
    np.testing.assert_array_equal(ours.tokens, exact.tokens)
    np.testing.assert_allclose(ours.logits, exact.logits, atol=1e-4)
    np.testing.assert_allclose(ours.pause, exact.pause, atol=1e-5)


@pytest.mark.parametrize("bits", [8, 4])
def test_written_files_equal_quantising_at_load(wide: Checkpoint, tmp_path: Path, bits: int) -> None:
    """One set of numbers whichever way, and that of the weights written out."""
    file = tmp_path / "written.safetensors"
    quantize_file(wide.lm_file, file, SCHEMES[bits])
    pcm = noise(FRAMES, seed=5)
    at_load, written = drive(load(wide, engine_quantize=SCHEMES[bits]), pcm), drive(load(wide, file), pcm)
    np.testing.assert_array_equal(at_load.logits, written.logits)
    np.testing.assert_array_equal(at_load.tokens, written.tokens)
    np.testing.assert_allclose(drive(load(unpacked(wide, file, tmp_path)), pcm).logits, written.logits, atol=1e-4)


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_what_it_costs(wide: Checkpoint, scheme: str) -> None:
    """Fewer bytes, and logits near those of float32 for the same input: 8 bits nearer than 4."""
    pcm = noise(4, seed=6)
    exact, packed = load(wide), load(wide, engine_quantize=scheme)
    assert packed.report.weight_bytes < exact.report.weight_bytes
    ours, theirs = drive(packed, pcm), drive(exact, pcm)
    np.testing.assert_array_equal(ours.codes, theirs.codes)
    off = np.abs(ours.logits[0] - theirs.logits[0]).max() / np.abs(theirs.logits[0]).max()
    assert 0 < off < {"int8": 0.03, "int4": 0.4}[scheme]


def test_bf16_activations(wide: Checkpoint) -> None:
    """Quantised weights under bfloat16, as on a Mac's GPU."""
    backend = load(wide, engine_quantize="int4", dtype_override="bf16")
    assert backend.report.dtype == "int4, bf16"
    assert np.isfinite(drive(backend, noise(20, 7)).logits).all()


def test_a_file_of_other_bits_is_refused(wide: Checkpoint, tmp_path: Path) -> None:
    file = tmp_path / "written.safetensors"
    quantize_file(wide.lm_file, file, "int4")
    with pytest.raises(ConfigError, match=r"weights of 4 bits already, but quantize = \"int8\""):
        load(wide, file, engine_quantize="int8")
    assert load(wide, file, engine_quantize="int4").report.dtype == "int4, f32"
