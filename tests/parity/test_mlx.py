"""MLX against PyTorch, number for number, and what is MLX's own: rings that grow and are shared, padding, what Metal lacks."""

import ast
import dataclasses
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tests.support.checkpoints import Checkpoint
from tests.support.frameworks import loader, poison
from tests.support.stepping import Outputs, drive, noise, step_rows, to_numpy

from moshi_stt.errors import ConfigError
from moshi_stt.models.spec import MimiSpec, ModelSpec
from moshi_stt.models.spec_tables import lm_spec_from_json

mx = pytest.importorskip("mlx.core", reason="mlx not installed")

SOURCES = Path(__file__).parents[2] / "src/moshi_stt/models/mlx_impl"

WITHOUT_METAL = {"Cholesky", "Eig", "Eigh", "Inverse", "LUF", "QRF", "SVD", "Load", "DistPrimitive"}
"""Operations that MLX has for the CPU alone."""


def load(small: Checkpoint, slots: int = 4, framework: str = "mlx", spec: ModelSpec | None = None, **settings: object) -> Any:
    return loader(framework)(small.lm_file, small.mimi_file, spec or small.spec, slots, settings=settings)


def test_small_model_equals_torch(small: Checkpoint) -> None:
    """Every logit too; both rings overflow several times."""
    pcm = noise(60, seed=1)
    ours, theirs = drive(load(small), pcm), drive(load(small, framework="torch"), pcm)
    np.testing.assert_array_equal(ours.codes, theirs.codes)
    np.testing.assert_array_equal(ours.tokens, theirs.tokens)
    np.testing.assert_allclose(ours.logits, theirs.logits, atol=2e-5)
    np.testing.assert_allclose(ours.logprob, theirs.logprob, atol=2e-5)
    np.testing.assert_allclose(ours.pause, theirs.pause, atol=2e-6)


def test_300_frames_of_speech_equal_torch(tiny: Path, speech: NDArray[np.float32]) -> None:
    """The real Mimi's shape, 24 s: past its window of 10 s and the language model's."""
    lm = lm_spec_from_json(json.loads((tiny / "config.json").read_text()))
    spec = ModelSpec(lm, MimiSpec(codebooks=lm.codebooks), delay_frames=6)
    pcm = np.resize(speech, 300 * 1_920)

    def run(framework: str) -> Outputs:
        backend = loader(framework)(tiny / "model.safetensors", tiny / "mimi.safetensors", spec, 1)
        said = drive(backend, pcm, slot=0)
        backend.close()
        return said

    ours, theirs = run("mlx"), run("torch")
    np.testing.assert_array_equal(ours.codes, theirs.codes)
    np.testing.assert_array_equal(ours.tokens, theirs.tokens)
    np.testing.assert_allclose(ours.pause, theirs.pause, atol=1e-5)


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_other_precisions_follow(small: Checkpoint, dtype: str) -> None:
    """Same codes; logits as near as the precision allows, for the tokens that were fed."""
    pcm = noise(30, seed=1)
    ours, exact = drive(load(small, dtype_override=dtype), pcm), drive(load(small), pcm)
    np.testing.assert_array_equal(ours.codes, exact.codes)
    same = int(np.argmax(np.append(ours.tokens != exact.tokens, True))) + 1  # steps until other tokens were fed
    assert same >= 3
    assert np.abs(ours.logits[:same] - exact.logits[:same]).max() < {"bf16": 0.5, "f16": 0.05}[dtype]


def test_temperature_draws_the_same_noise(small: Checkpoint) -> None:
    """The noise is the same function of seed, position and token in both frameworks."""
    import torch

    from moshi_stt.models.mlx_impl.sampling import choose, gumbel
    from moshi_stt.models.torch_impl.sampling import gumbel as torch_gumbel

    positions = [0, 1, 77, 2**31 + 5]
    for seed in (0, 3, 2**40 + 1):
        np.testing.assert_allclose(
            to_numpy(gumbel(seed, positions, 500)), torch_gumbel(seed, torch.tensor(positions), 500), rtol=2e-5, atol=2e-6
        )
    warm = dataclasses.replace(small.spec, temperature=0.9)
    pcm = noise(25, seed=2)
    np.testing.assert_array_equal(
        drive(load(small, spec=warm), pcm).tokens, drive(load(small, spec=warm, framework="torch"), pcm).tokens
    )
    token, _ = choose(mx.array([[0.0, 2.0, 2.0, 1.0], [5.0, 5.0, 5.0, 5.0]]), [0, 0], 0.0, 0)
    assert token.tolist() == [1, 0], "the lowest of equals"


def test_padding_changes_nothing(small: Checkpoint) -> None:
    """Rows padded to a fixed number, more rows than that in several blocks: bit for bit the same as one alone."""
    audio = [noise(30, seed).reshape(30, -1) for seed in range(3)]
    backend = load(small)
    alone = [drive(backend, stream.reshape(-1)) for stream in audio]
    backend.fixed_rows = 2
    poison(backend)
    for n in range(30):
        said = step_rows(backend, [stream[n] for stream in audio], [3, 0, 2], [n == 0] * 3)
        for row, expected in enumerate(alone):
            assert said.text_token[row] == expected.tokens[n]
            np.testing.assert_array_equal(said.logprob[row], expected.logprob[n])
            np.testing.assert_array_equal(said.pause[row], expected.pause[n])


def test_fixed_shapes(small: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where rows are independent anyway, as tried out at load, nothing is padded; else each row is stepped alone."""
    assert load(small, engine_fixed_shapes=True).fixed_rows == 0
    monkeypatch.setattr("moshi_stt.models.mlx_impl.build.rows_independent", lambda lm, mimi: False)
    assert load(small, engine_fixed_shapes=True).fixed_rows == 1
    monkeypatch.setattr("moshi_stt.models.mlx_impl.build.is_gpu", lambda device: True)
    from moshi_stt.models.mlx_impl.build import _fixed_rows

    backend = load(small)
    backend.fixed_rows = _fixed_rows(backend.device, backend.lm, backend.mimi)
    padded = []
    for slots in (1, 64):
        backend.resize(slots)
        padded.append(backend.padded_rows)
    assert padded == [1, 16]


def test_rings_grow_with_the_stream(small: Checkpoint) -> None:
    """Nobody's slot has no keys and values; a stream's have as many as it has positions, doubling, and end at the window."""
    from moshi_stt.models.mlx_impl.attention import Ring

    backend = load(small)
    drive(backend, noise(3, 0), slot=2)
    assert [[entry is not None for entry in ring.entries] for ring in backend.state.rings] == [
        [False, False, True, False, False] for _ in backend.state.rings
    ]
    ring, rng = Ring(2, heads=1, context=200, head_dim=2, dtype=mx.float32), np.random.default_rng(0)
    numbers = rng.standard_normal((450, 2)).astype(np.float32)
    rooms = []
    for position, number in enumerate(numbers):
        kv = mx.array(np.broadcast_to(number, (2, 1, 1, 2)))
        ours = ring.write(1, position, kv)
        rooms.append(ours.shape[2])
        if position % 50 == 49:
            held = to_numpy(ours)[0, 0, : ring.held(position + 1)]
            expected = sorted(numbers[max(0, position - 199) : position + 1].tolist())
            assert sorted(held.tolist()) == expected
    assert sorted(set(rooms)) == [64, 128, 200]


def test_copies_share_until_one_is_written(small: Checkpoint) -> None:
    """Copying a slot takes no memory: its rings are the same numbers until either stream goes on."""
    backend = load(small)
    drive(backend, noise(12, 0), slot=0)
    before = mx.get_active_memory()
    backend.copy(0, 3)
    assert mx.get_active_memory() - before < backend.state.slot_bytes() / 4
    first = backend.state.lm.rings[0]
    kept = to_numpy(first.entries[0])
    step_rows(backend, [noise(1, 5)], [3], [False])
    np.testing.assert_array_equal(to_numpy(first.entries[0]), kept)
    assert (to_numpy(first.entries[3]) != kept).any()


@pytest.mark.parametrize("settings", [{}, {"engine_quantize": "int8"}, {"dtype_override": "bf16"}])
def test_a_step_has_no_operation_that_metal_lacks(small: Checkpoint, settings: dict[str, object]) -> None:
    """Walk the graph of a whole step, temperature and a part filled ring included."""
    backend = load(small, spec=dataclasses.replace(small.spec, temperature=0.5), **settings)
    drive(backend, noise(2, 0), slot=2)
    packed = backend.step_rows(mx.zeros((2, 1_920)), np.array([0, 2]), [1, 2])
    drawn = io.StringIO()
    mx.export_to_dot(drawn, packed)
    operations = set(re.findall(r'label ?= ?"(\w+)"', drawn.getvalue()))
    assert {"Matmul", "Softmax", "ArgReduce", "SliceUpdate"} <= operations, "the graph was not drawn"
    assert not operations & WITHOUT_METAL


def test_nothing_is_float64_or_of_the_cpu_alone() -> None:
    """On the device, that is: NumPy, on the host, may. MLX makes float64 only when told to, so it must not be named."""
    for path in SOURCES.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "mx":
                assert node.attr not in ("float64", "complex64", "linalg", "fft"), f"{path.name}:{node.lineno}"
                assert node.attr != "cpu" or path.name == "device.py", f"{path.name}:{node.lineno}"
    assert mx.array(np.zeros(2)).dtype == mx.float32


def test_no_compiler_is_needed(small: Checkpoint, tmp_path: Path) -> None:
    """Where there is none on the PATH, as on most Macs, a step works all the same."""
    code = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from pathlib import Path
from tests.support.checkpoints import small_spec
from tests.support.frameworks import loader
from tests.support.stepping import drive, noise
backend = loader("mlx")(Path({str(small.lm_file)!r}), Path({str(small.mimi_file)!r}), small_spec(), 1)
print(drive(backend, noise(8, 1), slot=0).tokens.tolist())
"""
    environment = os.environ | {"PATH": str(tmp_path), "TMPDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[0] == str(drive(load(small), noise(8, 1)).tokens.tolist())


@pytest.mark.skipif(shutil.which("g++") is None, reason="no compiler")
def test_fused_functions_equal_plain_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU computes in one kernel, compiled here for the CPU."""
    from moshi_stt.models.mlx_impl import lm, mimi, rope

    rng = np.random.default_rng(0)
    for function, count in ((rope._turn, 4), (lm.gated, 2), (mimi.elu, 1), (mimi.gelu, 1)):
        for shape in ((3, 5), (1, 7, 2)):
            arrays = [mx.array(rng.standard_normal(shape).astype(np.float32) * 4) for _ in range(count)]
            plain = function(*arrays)
            with monkeypatch.context() as patch:
                patch.setattr("mlx.core.gpu", mx.cpu)  # what `fused` asks for
                fused = function(*arrays)
            mx.eval(plain, fused)
            for ours, theirs in zip(as_tuple(fused), as_tuple(plain), strict=True):
                np.testing.assert_allclose(to_numpy(ours), to_numpy(theirs), rtol=1e-5, atol=1e-6)


def as_tuple(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def test_rotary_angles_far_out() -> None:
    """Exact at positions of a stream of years."""
    from moshi_stt.models.mlx_impl.rope import RotaryTable

    positions = np.array([0, 1, 750, 10_000_000, 3_000_000_000])
    cos, sin = (to_numpy(part) for part in RotaryTable(64, 100_000.0)(positions))
    thetas = np.longdouble(100_000.0) ** (-2 * np.arange(32, dtype=np.longdouble) / 64)
    angles = positions[:, None].astype(np.longdouble) * thetas
    np.testing.assert_allclose(cos, np.cos(angles).astype(float), atol=3e-6)
    np.testing.assert_allclose(sin, np.sin(angles).astype(float), atol=3e-6)
    assert (cos[0] == 1).all()
    assert (sin[0] == 0).all()


def test_report(small: Checkpoint) -> None:
    backend = load(small, engine_threads=3, engine_mimi_dtype="bf16")
    report = backend.report
    assert (report.device.split()[0], report.dtype, backend.slots, backend.pause_heads) == ("mlx", "f32", 4, 4)
    spec = small.spec
    conv = sum(conv.context * conv.channels_in for conv in spec.mimi.convs)
    rings = 4 * sum(2 * part.layers * part.context * part.dim for part in (spec.lm, spec.mimi))
    assert report.slot_bytes == rings + 4 * conv
    notes = " / ".join(report.notes)
    assert "threads = 3" in notes
    assert "Mimi runs in float32" in notes
    backend.warm_up()
    backend.close()


@pytest.mark.parametrize(("setting", "rounds"), [("auto", True), ("tf32", True), ("f32", False), ("f16", False)])
def test_mimi_may_round_as_matrix_units_do_where_nothing_else_is_set(
    setting: str, rounds: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moshi_stt.models.mlx_impl.device import choose_mimi_precision

    monkeypatch.setenv("MLX_ENABLE_TF32", "1")
    notes = choose_mimi_precision(setting)
    assert (os.environ["MLX_ENABLE_TF32"] == "1") is rounds
    assert bool(notes) is (setting == "f16")


def test_settings_that_cannot_be(small: Checkpoint) -> None:
    cases = [
        ({"engine_device": "cuda"}, "none that MLX runs on"),
        ({"dtype_override": "f64"}, "no float64"),
        ({"engine_kv_dtype": "fp8"}, "needs a CUDA device"),
    ]
    for settings, part in cases:
        with pytest.raises(ConfigError, match=part):
            load(small, **settings)
    assert load(small, engine_device="cpu").report.device == "mlx cpu"
    narrow = load(small, engine_kv_dtype="bf16")
    assert narrow.report.slot_bytes < load(small).report.slot_bytes
    assert len(drive(narrow, noise(20, 1)).tokens) == 20
