"""Files, precisions and settings that a backend can or cannot be made of, and what its report says."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file as save_torch
from tests.support.checkpoints import Checkpoint, Tensors, module, save, small_spec, small_tensors
from tests.support.stepping import drive, noise

from moshi_stt.errors import CheckpointError, ConfigError
from moshi_stt.models.spec import Condition, ConditionerSpec, LMSpec, ModelSpec
from moshi_stt.models.torch_impl.build import load_backend
from moshi_stt.models.torch_impl.device import choose_device, choose_dtype, choose_kv_dtype, choose_threads
from moshi_stt.models.weights import lm_table

FRAMES = 20


def tokens(checkpoint: Checkpoint, spec: ModelSpec | None = None, **settings: object) -> list[int]:
    backend = load_backend(module(**settings), checkpoint.lm_file, checkpoint.mimi_file, spec or checkpoint.spec, 2)
    output = drive(backend, noise(FRAMES, seed=3))
    backend.close()
    return output.tokens.tolist()


def test_mlx_naming_is_the_same_model(small: Checkpoint, tmp_path: Path) -> None:
    """The MLX repository's names and flat norms load to the same tokens."""
    lm, mimi = small_tensors(small.spec)
    renamed = {param.mlx_name: lm[param.name].reshape(param.mlx_shape) for param in lm_table(small.spec.lm, 40)}
    assert tokens(save(tmp_path, small.spec, renamed, mimi)) == tokens(small)


def test_bf16_file_is_widened_exactly(small: Checkpoint, tmp_path: Path) -> None:
    """A bf16 file run in float32 is what the same numbers in a float32 file are."""
    lm, mimi = small_tensors(small.spec)
    narrow = {name: torch.from_numpy(tensor).bfloat16() for name, tensor in lm.items()}
    rounded: Tensors = {name: tensor.float().numpy() for name, tensor in narrow.items()}
    wide = save(tmp_path, small.spec, rounded, mimi)
    expected = tokens(wide)
    save_torch(narrow, wide.lm_file)
    assert tokens(wide) == expected


def test_no_heads(small: Checkpoint) -> None:
    """A configuration without extra heads ignores those of the file, gives no pauses and the same tokens."""
    spec = dataclasses.replace(small.spec, lm=dataclasses.replace(small.spec.lm, extra_heads=0))
    backend = load_backend(module(), small.lm_file, small.mimi_file, spec, 2)
    output = drive(backend, noise(FRAMES, seed=3))
    assert (backend.pause_heads, output.pause.shape) == (0, (FRAMES, 0))
    assert output.tokens.tolist() == tokens(small)


def test_conditions(tmp_path: Path) -> None:
    """A condition is added at every step: the learnt vector as it is, a continuous one by the formula of section 5.8."""
    conditioner = ConditionerSpec("delay", "ContinuousAttribute", 8, scale_factor=2.0, max_period=100.0)
    plain = small_spec()
    spec = dataclasses.replace(plain, lm=dataclasses.replace(plain.lm, conditioners=(conditioner,)))
    lm, mimi = small_tensors(spec)
    at = "condition_provider.conditioners.delay."
    checkpoint = save(tmp_path, spec, lm, mimi)
    angles = -0.4 * 2.0 / 100.0 ** (np.arange(4) / 3)
    continuous = lm[at + "output_proj.weight"] @ np.concatenate([np.cos(angles), np.sin(angles)])
    unconditioned = tokens(checkpoint)
    for condition, vector in (
        (Condition(conditioner), lm[at + "learnt_padding"].ravel()),
        (Condition(conditioner, -0.4), continuous),
    ):
        conditioned = dataclasses.replace(spec, condition=condition)
        added = lm | {"text_emb.weight": lm["text_emb.weight"] + vector.astype(np.float32)}
        (tmp_path / "added").mkdir(exist_ok=True)
        by_hand = save(tmp_path / "added", spec, added, mimi)
        assert tokens(checkpoint, conditioned) == tokens(by_hand)
        assert tokens(checkpoint, conditioned) != unconditioned


@pytest.mark.parametrize(
    ("name", "value", "part"),
    [
        ("out_norm.alpha", None, "missing: out_norm.alpha"),
        ("text_linear.weight", np.zeros((41, 48), np.float32), "text_linear.weight is [41, 48], expected [40, 48]"),
        ("text_linear.weight", np.zeros((40, 48), np.int32), "text_linear.weight is I32"),
        ("in_proj_bias", np.zeros(3, np.float32), "unknown: in_proj_bias [3]"),
    ],
)
def test_broken_language_model(small: Checkpoint, tmp_path: Path, name: str, value: np.ndarray | None, part: str) -> None:
    lm, mimi = small_tensors(small.spec)
    broken = {key: tensor for key, tensor in lm.items() if key != name} | ({} if value is None else {name: value})
    checkpoint = save(tmp_path, small.spec, broken, mimi)
    with pytest.raises(CheckpointError) as error:
        tokens(checkpoint)
    assert part in str(error.value)


def test_truncated_files(small: Checkpoint, tmp_path: Path) -> None:
    for which in ("model.safetensors", "mimi.safetensors"):
        checkpoint = save(tmp_path, small.spec, *small_tensors(small.spec))
        file = tmp_path / which
        file.write_bytes(file.read_bytes()[:-50])
        with pytest.raises(CheckpointError, match=f"{which} is cut short"):
            tokens(checkpoint)


def test_report(small: Checkpoint) -> None:
    backend = load_backend(module(engine_threads=2), small.lm_file, small.mimi_file, small.spec, 3)
    report = backend.report
    assert report is not None
    assert (report.device, report.dtype, backend.slots) == ("cpu (2 threads)", "f32", 3)
    lm, mimi = small_tensors(small.spec)
    assert report.weight_bytes == 4 * sum(tensor.size for tensor in (*lm.values(), *mimi.values()))
    lm_spec = small.spec.lm
    rings = 4 * (2 * lm_spec.layers * lm_spec.context * lm_spec.dim + 2 * 2 * 20 * 32)
    assert rings < report.slot_bytes < rings + 30_000
    backend.warm_up()
    backend.close()


def test_dtypes() -> None:
    cpu, cuda, mps = (torch.device(kind) for kind in ("cpu", "cuda", "mps"))
    assert [choose_dtype(None, device) for device in (cpu, cuda, mps)] == [torch.float32, torch.bfloat16, torch.bfloat16]
    assert choose_dtype("f64", cpu) is torch.float64
    with pytest.raises(ConfigError, match="Metal has no float64"):
        choose_dtype("f64", mps)
    assert choose_kv_dtype("auto", torch.float64, "", cpu) is torch.float64
    assert choose_kv_dtype("bf16", torch.float32, "", cpu) is torch.bfloat16
    with pytest.raises(ConfigError, match=r"fp8.*this is cpu"):
        choose_kv_dtype("fp8", torch.float32, "this is cpu", cpu)


def test_narrow_keys_and_values(small: Checkpoint) -> None:
    """`kv_dtype = "bf16"` beside float32 weights: a little rounding, mostly the same tokens."""
    same = np.mean(np.array(tokens(small, engine_kv_dtype="bf16")) == np.array(tokens(small)))
    assert same > 0.7


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not there is said, with the reason and what to do."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    device, notes = choose_device("auto")
    assert (device.type, notes) == ("cpu", ("this PyTorch is built for CUDA 13.0 but finds no GPU: running on the CPU",))
    assert choose_device("cpu") == (torch.device("cpu"), ())
    with pytest.raises(ConfigError, match=re.escape("built for CUDA 13.0 but finds no GPU")):
        choose_device("cuda")
    with pytest.raises(ConfigError, match="no Metal"):
        choose_device("mps")
    for nonsense in ("tpu", "cuda:x", "cpu:", ""):
        with pytest.raises(ConfigError, match="none that PyTorch runs on"):
            choose_device(nonsense)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert choose_device("auto") == (torch.device("cpu"), ())
    with pytest.raises(ConfigError, match="built without CUDA"):
        choose_device("cuda:0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("auto") == (torch.device("cuda"), ())
    assert choose_device("cuda:1") == (torch.device("cuda:1"), ())
    with pytest.raises(ConfigError, match="there are 2 GPUs"):
        choose_device("cuda:2")


@pytest.mark.parametrize(("setting", "text"), [(1, "1 thread"), (2, "2 threads"), (4, "4 threads")])
def test_threads_change_nothing(small: Checkpoint, setting: int, text: str) -> None:
    """How the work is split over threads is not heard."""
    beside = choose_threads(setting)
    assert str(beside) == text
    beside.close()
    assert tokens(small, engine_threads=setting) == tokens(small)


MEASURE = """
import resource, sys
from pathlib import Path
import torch
from moshi_stt.models.spec import LMSpec, MimiSpec
from moshi_stt.models.torch_impl.loader import allocate_lm, fill, read_tensors
from moshi_stt.models.weights import plan_lm
spec = LMSpec(dim=1024, heads=8, layers=8, context=50, max_period=1e5, text_card=64, codebooks=2, extra_heads=4)
plan, hidden = plan_lm(Path(sys.argv[1]), spec)
list(read_tensors(plan))[0][1].sum()  # whatever the first use costs
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
params, destinations = allocate_lm(spec, hidden, getattr(torch, sys.argv[2]), torch.device("cpu"))
fill(plan, destinations)
print(peak() - before, sum(t.numel() * t.element_size() for t in params.values()))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="getrusage is not there")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_memory_while_loading(tmp_path: Path, dtype: str) -> None:
    """A file of 400 MB: beside the tensors asked for, loading holds only a part of the map at a time."""
    spec = LMSpec(dim=1024, heads=8, layers=8, context=50, max_period=1e5, text_card=64, codebooks=2, extra_heads=4)
    big = {param.name: torch.ones(param.shape, dtype=torch.bfloat16) for param in lm_table(spec, 5_632)}
    save_torch(big, tmp_path / "big.safetensors")
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "big.safetensors"), dtype]
    peak, tensors = map(int, subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())
    assert peak < 1.2 * tensors + (64 << 20)
