"""8 and 4 bits in PyTorch on a CPU: the products, quantising at load, and files of `moshi-stt quantize` and of MLX's kind."""

import asyncio
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.support.batch import steps_of, transcribe, without_timing
from tests.support.checkpoints import Checkpoint, module, save, small_spec, small_tensors
from tests.support.frameworks import poison
from tests.support.stepping import drive, noise, step_rows

from moshi_stt.cli.quantize import quantize_file
from moshi_stt.config import LimitsConfig
from moshi_stt.constants import FRAME_SAMPLES
from moshi_stt.engine.batch import BatchEngine
from moshi_stt.engine.engine import EngineInfo
from moshi_stt.engine.loaded import LoadedModel
from moshi_stt.engine.slots import spare_slots
from moshi_stt.engine.stream import StreamLimits
from moshi_stt.engines import build_engine
from moshi_stt.errors import CheckpointError, ConfigError
from moshi_stt.models.affine import SCHEMES, Packed, Scheme, dequantize, quantize
from moshi_stt.models.tensors import open_tensors, to_float32, to_stored, write_tensors
from moshi_stt.models.torch_impl import onnx_node
from moshi_stt.models.torch_impl.backend import TorchBackend
from moshi_stt.models.torch_impl.beside import Beside
from moshi_stt.models.torch_impl.build import choose_scheme, load_backend, rows_independent
from moshi_stt.models.torch_impl.quantized import QuantizedLinear, packed_linear, packed_table
from moshi_stt.models.weights import Packing, plan_lm, read_header
from moshi_stt.text.words import WordAssembler

FRAMES = 30
HIDDEN = 64
ALL = [Packing(8, 64), Packing(8, 32), Packing(8, 128), Packing(4, 32), Packing(4, 64), Packing(4, 128)]


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A small model whose every matrix can be packed."""
    spec = small_spec(dim=64)
    return save(tmp_path_factory.mktemp("wide"), spec, *small_tensors(spec, hidden=HIDDEN))


def load(
    checkpoint: Checkpoint, quantize: str = "none", lm_file: Path | None = None, slots: int = 2, **more: object
) -> TorchBackend:
    settings = module(engine_quantize=quantize, **more)
    backend = load_backend(settings, lm_file or checkpoint.lm_file, checkpoint.mimi_file, checkpoint.spec, slots)
    assert isinstance(backend, TorchBackend)
    return backend


def matrix(rows: int = 96, columns: int = 256, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32) * 0.05


def off(product: QuantizedLinear, plain: np.ndarray) -> float:
    """The root mean square difference to a plain product, over that of the results."""
    x = matrix(17, plain.shape[1], seed=7) * 20
    expected = x @ plain.T
    found = product(torch.from_numpy(x)).numpy()
    return float(np.sqrt(np.square(found - expected).mean() / np.square(expected).mean()))


@pytest.mark.parametrize("packing", ALL)
def test_product_equals_dequantise_then_multiply(packing: Packing) -> None:
    """Within what rounding the activations to 8 bits of their largest in a group costs."""
    packed = quantize(matrix(), packing)
    assert off(QuantizedLinear(packed, packing), dequantize(packed, packing)) < 0.01


@pytest.mark.parametrize("packing", ALL)
def test_scales_as_bf16_files_have_them(packing: Packing) -> None:
    """A zero that is no whole number of levels, which ONNX Runtime cannot say, still counts."""
    words, scales, biases = quantize(matrix(), packing)
    packed = Packed(words, *(to_float32(to_stored(part, "BF16"), "BF16") for part in (scales, biases)))
    assert off(QuantizedLinear(packed, packing), dequantize(packed, packing)) < 0.01


@pytest.mark.parametrize("packing", [Packing(8, 64), Packing(4, 32)])
def test_groups_without_a_zero(packing: Packing) -> None:
    """Groups that are all of one sign, far from 0, or flat."""
    weight = matrix()
    weight[:20] += 3.0
    weight[20:30] -= 3.0
    weight[30:40, :64] = 0.25
    weight[40:50] = 0.0
    words, scales, biases = quantize(weight, packing)
    for flat in (scales, np.where(np.arange(96)[:, None] == 41, np.float32(0), scales)):
        packed = Packed(words, flat, biases)
        assert off(QuantizedLinear(packed, packing), dequantize(packed, packing)) < 0.01


@pytest.mark.parametrize("packing", ALL)
@pytest.mark.parametrize("stored", ["F32", "BF16"])
def test_rows_do_not_depend_on_each_other(packing: Packing, stored: str) -> None:
    words, scales, biases = quantize(matrix(), packing)
    packed = Packed(words, *(to_float32(to_stored(part, stored), stored) for part in (scales, biases)))
    product = QuantizedLinear(packed, packing)
    assert product.rows_independent()
    x = torch.from_numpy(matrix(5, 256, seed=3))
    expected = product(x)[:1].clone()
    x[1:] *= 1e6
    assert torch.equal(product(x)[:1], expected)


@pytest.mark.parametrize("packing", [Packing(8, 64), Packing(4, 32)])
def test_threads_change_nothing(packing: Packing) -> None:
    packed, x = quantize(matrix(512, 512), packing), torch.from_numpy(matrix(3, 512))
    assert torch.equal(QuantizedLinear(packed, packing, 2)(x), QuantizedLinear(packed, packing)(x))


def test_a_packing_that_onnx_runtime_lacks_is_unpacked() -> None:
    packing = Packing(8, 16)
    packed = quantize(matrix(), packing)
    product = packed_linear(packed, packing, 1)
    assert not isinstance(product, QuantizedLinear)
    x = matrix(2, 256)
    np.testing.assert_allclose(product(torch.from_numpy(x)).numpy(), x @ dequantize(packed, packing).T, atol=1e-4)


def test_dtypes_and_shapes_of_activations() -> None:
    product = QuantizedLinear(quantize(matrix(), Packing(4, 32)), Packing(4, 32))
    x = torch.from_numpy(matrix(6, 256)).view(2, 3, 256).bfloat16()
    y = product(x)
    assert (y.shape, y.dtype) == ((2, 3, 96), torch.bfloat16)
    assert torch.equal(y, product(x.float()).bfloat16())


def test_table() -> None:
    """Tables of several packings one below the other are looked up as the numbers that they stand for."""
    packings = [Packing(8, 64), Packing(4, 32), Packing(8, 32)]
    parts = [(quantize(matrix(5, 64, seed), packing), packing) for seed, packing in enumerate(packings)]
    plain = np.concatenate([dequantize(*part) for part in parts])
    table = packed_table(parts)
    index = torch.tensor([[0, 14, 7], [5, 5, 9]])
    np.testing.assert_array_equal(table[index].numpy(), plain[index.numpy()])


def test_old_onnx_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it says where the product is not there, and what to do."""
    node = onnx_node._field
    monkeypatch.setattr(onnx_node, "_field", lambda number, value: node(number, "NoSuch" if value == "MatMulNBits" else value))
    with pytest.raises(ConfigError, match=r"cannot multiply by weights of 4 bits in groups of 32 .*install 1\.22 or later"):
        QuantizedLinear(quantize(matrix(), Packing(4, 32)), Packing(4, 32))


# ---- whole models --------------------------------------------------------------------------------------------------------


def plain_copy(checkpoint: Checkpoint, packed_file: Path, path: Path) -> Path:
    """What a packed file stands for, in float32."""
    plan, _ = plan_lm(packed_file, checkpoint.spec.lm)
    tensors = {}
    with open_tensors(plan.header) as file:
        for source in plan.sources:
            values = file.read_float32(source.name) if source.packing is None else None
            if source.packing is not None:
                stem = source.name.removesuffix(".weight")
                scales, biases = (file.read_float32(f"{stem}.{part}") for part in ("scales", "biases"))
                values = dequantize(Packed(file.read(source.name).view(np.uint32), scales, biases), source.packing)
            assert values is not None
            tensors[source.param.name] = values.reshape(source.param.shape)
    shapes = {name: ("F32", values.shape) for name, values in tensors.items()}
    write_tensors(path, shapes, tensors.items(), {})
    return path


def logits_led(backend: TorchBackend, pcm: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Logits (T, V) where every step is fed another model's tokens, so that one that differs changes none that follow."""
    logits, step = [], backend.lm.step

    def record(*args: Any) -> Any:
        output = step(*args)
        logits.append(output.logits[0].numpy().copy())
        return output

    backend.lm.step = record  # type: ignore[method-assign]
    for n, frame in enumerate(pcm.reshape(len(tokens), -1)):
        backend.step(frame[None], np.array([0]), np.array([n == 0]))
        backend.state.text[0] = int(tokens[n])
    del backend.lm.step
    return np.stack(logits)


@pytest.mark.parametrize("scheme", ["int8", "int4"])
@pytest.mark.parametrize("stored", ["F32", "BF16"])
def test_a_file_that_moshi_stt_quantize_wrote(wide: Checkpoint, tmp_path: Path, scheme: Scheme, stored: str) -> None:
    """It loads without its original, to what its numbers stand for; where scales are not rounded, to the tokens of
    quantising at load, bit for bit."""
    source = wide.lm_file
    if stored == "BF16":
        lm, _ = small_tensors(wide.spec, hidden=HIDDEN)
        source = tmp_path / "bf16.safetensors"
        shapes = {name: ("BF16", values.shape) for name, values in lm.items()}
        write_tensors(source, shapes, ((name, to_stored(values, "BF16")) for name, values in lm.items()), {})
    packed = tmp_path / "packed.safetensors"
    quantize_file(source, packed, scheme)
    backend = load(wide, lm_file=packed)
    report = backend.report
    assert report is not None
    assert report.dtype == f"{scheme}, f32"
    assert any("as the file has them" in note for note in report.notes)
    found = drive(backend, noise(FRAMES, 3))
    plain = load(wide, lm_file=plain_copy(wide, packed, tmp_path / "plain.safetensors"))
    expected = drive(plain, noise(FRAMES, 3))
    plain.close()
    led = logits_led(backend, noise(FRAMES, 3), expected.tokens)
    backend.close()
    assert np.sqrt(np.square(led - expected.logits).mean() / np.square(expected.logits).mean()) < 0.05
    assert (led.argmax(-1) == expected.tokens).mean() > 0.8
    if stored == "F32":
        at_load = load(wide, scheme)
        same = drive(at_load, noise(FRAMES, 3))
        at_load.close()
        np.testing.assert_array_equal(found.logits, same.logits)
        np.testing.assert_array_equal(found.tokens, same.tokens)


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_memory_falls(wide: Checkpoint, scheme: str) -> None:
    """The originals are gone, the report counts what is left, and says what was done."""
    plain, backend = load(wide), load(wide, scheme)
    assert plain.report is not None
    assert backend.report is not None
    mimi = sum(tensor.size * 4 for tensor in small_tensors(wide.spec)[1].values())
    share = 0.55 if scheme == "int8" else 0.5  # a small part of so small a model is layers
    assert backend.report.weight_bytes - mimi < share * (plain.report.weight_bytes - mimi)
    assert any(f"13 matrices of {scheme}, packed while loading" in note for note in backend.report.notes)
    layer = backend.lm.layers[0]
    for product in (layer.in_proj, layer.out_proj, layer.linear_in, layer.linear_out, backend.lm.text_linear):
        assert isinstance(product, QuantizedLinear)
    plain.close()
    backend.close()


def test_bf16_activations(wide: Checkpoint) -> None:
    backend = load(wide, "int8", dtype_override="bf16")
    assert backend.report is not None
    assert backend.report.dtype == "int8, bf16"
    assert backend.state.lm.rings[0][0].dtype is torch.bfloat16
    assert len(drive(backend, noise(4, 1)).tokens) == 4
    backend.close()


def test_widths_that_cannot_be_packed(small: Checkpoint) -> None:
    """48 is no multiple of 32: such matrices stay, and the report says so."""
    backend = load(small, "int4")
    assert backend.report is not None
    assert any("13 matrices are left as they are" in note for note in backend.report.notes)
    plain = load(small)
    np.testing.assert_array_equal(drive(backend, noise(8, 2)).tokens, drive(plain, noise(8, 2)).tokens)
    plain.close()
    backend.close()


@pytest.mark.parametrize("scheme", ["int8", "int4"])
@pytest.mark.parametrize("threads", [1, 2])
def test_slots_are_independent(wide: Checkpoint, scheme: str, threads: int) -> None:
    """Streams that join one after the other, in dirty slots: every token, log-probability and pause as alone, bit for bit."""
    backend = load(wide, scheme, slots=8, engine_threads=threads)
    assert rows_independent(backend.lm, backend.mimi)
    audio = [noise(FRAMES, seed).reshape(FRAMES, FRAME_SAMPLES) for seed in range(6)]
    alone = [drive(backend, stream.reshape(-1), slot=7 - n) for n, stream in enumerate(audio)]
    poison(backend)
    for n in range(FRAMES + 5):
        rows = [i for i in range(6) if 0 <= n - i < FRAMES]
        output = step_rows(backend, [audio[i][n - i] for i in rows], rows, [n == i for i in rows])
        for row, i in enumerate(rows):
            assert output.text_token[row] == alone[i].tokens[n - i]
            assert output.logprob[row] == alone[i].logprob[n - i]
            assert (output.pause[row] == alone[i].pause[n - i]).all()
    backend.close()


@pytest.mark.parametrize("scheme", ["int8", "int4"])
async def test_end_to_end(wide: Checkpoint, scheme: str) -> None:
    """Two streams at once through the engine: every frame is answered, and both say what each says alone."""
    streams = 3

    def model() -> LoadedModel:
        backend = load(wide, scheme, slots=streams + spare_slots(streams))
        info = EngineInfo("batched_asr", "packed", "mimi", (), "cpu", scheme, streams, {})
        return LoadedModel(backend, partial(WordAssembler, lambda ids: " ".join(map(str, ids)), 6), info, streams, 6)

    engine = BatchEngine(model, marker_wait_seconds=1.0, limits=StreamLimits(inbox_samples=10**7))
    await engine.start()
    try:
        pcm = [noise(FRAMES, seed) for seed in range(2)]
        together = await asyncio.gather(*(transcribe(engine, one) for one in pcm))
        alone = [await transcribe(engine, one) for one in pcm]
        assert [steps_of(events) for events in together] == [steps_of(events) for events in alone]
        assert steps_of(together[0]) >= FRAMES
        assert [without_timing(events) for events in together] == [without_timing(events) for events in alone]
    finally:
        await engine.stop()


# ---- what cannot be ------------------------------------------------------------------------------------------------------


def test_not_on_a_gpu(wide: Checkpoint, tmp_path: Path) -> None:
    packed = tmp_path / "packed.safetensors"
    quantize_file(wide.lm_file, packed, "int8")
    cuda = torch.device("cuda")
    plan, _ = plan_lm(wide.lm_file, wide.spec.lm)
    with pytest.raises(ConfigError, match='quantize = "int4" is set, which PyTorch runs on the CPU alone, not on cuda'):
        choose_scheme(plan, module(engine_quantize="int4"), cuda)
    plan, _ = plan_lm(packed, wide.spec.lm)
    with pytest.raises(ConfigError, match=r"weights of 8 bits, which PyTorch runs on the CPU alone.*use the unquantised file"):
        choose_scheme(plan, module(), cuda)
    for device in ("cuda", "mps"):
        with pytest.raises(ConfigError, match=rf'quantize = "int8" with device = "{device}"'):
            build_engine(module(engine_quantize="int8", engine_device=device), LimitsConfig())


def test_another_scheme_than_the_file_has(wide: Checkpoint, tmp_path: Path) -> None:
    packed = tmp_path / "packed.safetensors"
    quantize_file(wide.lm_file, packed, "int4")
    with pytest.raises(ConfigError, match='holds weights of 4 bits already, but quantize = "int8" is set'):
        load(wide, "int8", lm_file=packed)
    backend = load(wide, "int4", lm_file=packed)
    backend.close()


def test_bits_that_no_one_reads(wide: Checkpoint, tmp_path: Path) -> None:
    """A file of MLX's 2 bits."""
    source = read_header(wide.lm_file)
    packed = tmp_path / "packed.safetensors"
    quantize_file(wide.lm_file, packed, "int8")
    header = read_header(packed)
    with open_tensors(header) as file:
        tensors = {name: file.read(name) for name in header.tensors}
    name = "transformer.layers.0.self_attn.out_proj.weight"
    tensors[name] = np.zeros((64, 4), np.uint32)
    shapes = {key: (header.tensors[key].dtype, values.shape) for key, values in tensors.items()}
    write_tensors(tmp_path / "two.safetensors", shapes, tensors.items(), {})
    assert name in source.tensors
    with pytest.raises(CheckpointError, match="holds weights of 2 bits, and this program reads 4 and 8"):
        load(wide, lm_file=tmp_path / "two.safetensors")


def test_without_onnx_runtime(wide: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "moshi_stt.models.torch_impl.quantized", None)
    with pytest.raises(ConfigError, match=r"need onnxruntime on a CPU .*pip install onnxruntime"):
        load(wide, "int8")


def test_threads_of_the_products(wide: Checkpoint) -> None:
    """The language model's products get the language model's threads, never Mimi's besides."""
    for first, second, threads in ((0, 1, 1), (1, 1, 1), (3, 1, 3)):
        beside = Beside(first, second)
        assert beside.threads_of_first == threads
        beside.close()
    assert set(SCHEMES.values()) == {"int8", "int4"}
