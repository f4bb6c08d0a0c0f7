"""A kernel that cannot be built or launched is replaced by PyTorch's own; what a GPU has not is refused or fitted."""

import logging
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tests.parity.test_cuda_backend import SPEC, pair, step_both
from tests.support.triton_twins import QUIET, torch

from moshi_stt.config import EngineConfig
from moshi_stt.errors import ConfigError
from moshi_stt.models.torch_impl import build, device
from moshi_stt.models.torch_impl.attention import FP8
from moshi_stt.models.torch_impl.build import Options, fit_slots
from moshi_stt.models.torch_impl.cuda import attention, conv, launch, limits, product, quantiser
from moshi_stt.models.torch_impl.cuda.limits import Limits
from moshi_stt.models.torch_impl.cuda.toolchain import c_compiler

pytestmark = QUIET

KERNELS = {
    "product": (product, product._product),
    "gated product": (product, product._gated),
    "attention": (attention, attention._ring_attention),
    "convolution": (conv, conv._conv),
    "residual block": (conv, conv._residual),
    "quantiser": (quantiser, quantiser._level),
}


@pytest.fixture(autouse=True)
def nothing_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_replaced", {})


@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_that_cannot_be_launched_is_replaced_and_said_once(
    name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The tokens and codes stay those of the plain backend."""
    from triton.runtime.errors import OutOfResources

    module, broken = KERNELS[name]
    whole = module.launch
    failed = 0

    def refuse(kernel: Any, *arguments: Any, **options: Any) -> None:
        nonlocal failed
        if kernel is broken:
            failed += 1
            raise OutOfResources(147_456, 101_376, "shared memory")
        whole(kernel, *arguments, **options)

    monkeypatch.setattr(module, "launch", refuse)
    backends = pair(SPEC)
    rng = np.random.default_rng(0)
    with caplog.at_level(logging.WARNING):
        step_both(backends, rng, [4, 0, 2], [4, 0, 2])
        step_both(backends, rng, [0, 4], [])
    assert failed == 1, "it is not tried again"
    said = [line for line in caplog.messages if "cannot run on this GPU" in line]
    assert len(said) == 1
    assert f"the {name} kernel" in said[0]
    assert "147456" in said[0]


def test_memory_that_runs_out_is_no_reason_to_replace_a_kernel() -> None:
    def run_out() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        launch.attempt("product", run_out, lambda: None)
    launch.attempt("product", lambda: None, lambda: pytest.fail("the kernel was replaced"))


def test_without_a_c_compiler_there_are_plain_kernels(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.delenv("CC", raising=False)
    assert c_compiler()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert c_compiler() is None
    monkeypatch.setattr(device, "limits_of", lambda _: Limits((9, 0), 232_448))
    why = device.without_kernels(SPEC.lm, torch.bfloat16, torch.device("cuda"))
    assert why == "Triton needs a C compiler and finds none (install gcc, or set CC)"
    monkeypatch.setenv("CC", "/no/such/compiler -O2")
    assert c_compiler() is None


def test_a_triton_that_fails_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from moshi_stt.models.torch_impl.cuda import elementwise

    def fail(*arguments: Any, **options: Any) -> None:
        raise RuntimeError("fatal error: Python.h: No such file or directory\ncompilation terminated.")

    here = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    assert device.try_kernel(here) == "", "the GPU can, or else the interpreter"
    monkeypatch.setattr(elementwise, "launch", fail)
    why = device.try_kernel(here)
    assert why == "a first kernel could not be built or launched (fatal error: Python.h: No such file or directory)"


@pytest.mark.parametrize(("capability", "refused"), [((8, 0), True), ((8, 6), True), ((8, 9), False), ((12, 0), False)])
def test_eight_bit_floats_are_refused_where_there_are_none(
    capability: tuple[int, int], refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "limits_of", lambda _: Limits(capability, 101_376))
    monkeypatch.setattr(device, "device_name", lambda _: "cuda (NVIDIA A10)")
    if not refused:
        assert device.choose_kv_dtype("fp8", torch.bfloat16, "", torch.device("cuda")) is FP8
        return
    with pytest.raises(ConfigError, match=r"A10\) has compute capability 8\.[06].*begin with 8\.9.*use \"auto\""):
        device.choose_kv_dtype("fp8", torch.bfloat16, "", torch.device("cuda"))


def test_mimi_is_float16_where_nothing_is_set_and_our_kernels_run() -> None:
    assert EngineConfig().mimi_dtype == "auto"
    assert device.choose_mimi_dtype("auto") == Options().mimi_dtype == "f16"
    assert device.choose_mimi_kv_dtype("f16", fused=True) is torch.float16
    for setting in ("f32", "tf32", "bf16"):
        assert device.choose_mimi_dtype(setting) == setting
        assert device.choose_mimi_kv_dtype(setting, fused=True) is torch.float32
    assert device.choose_mimi_kv_dtype("f16", fused=False) is torch.float32, "PyTorch's own operations take float32"


@pytest.mark.parametrize("gigabytes", [12, 24])
def test_slots_are_as_many_as_the_card_has_room_for(gigabytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The 1B on cards of 12 and 24 GB, of which the weights have 2.2."""
    from tests.support.compile_kernels import MODELS

    from moshi_stt.models.spec import MimiSpec, ModelSpec

    lm, _ = MODELS["1b"]
    spec = ModelSpec(lm=lm, mimi=MimiSpec(codebooks=lm.codebooks), delay_frames=6)
    monkeypatch.setattr(build, "device_name", lambda _: "cuda")
    free = int((gigabytes - 2.2) * 1e9)
    cuda = torch.device("cuda")
    fitting, said = fit_slots(spec, 1_024, torch.bfloat16, cuda, fused=True, mimi_kv_dtype=torch.float16, free=free)
    slot_bytes = 2 * 16 * 16 * 750 * 128 * 2  # keys and values of every layer, in 16 bits
    assert 0.8 * free < fitting * slot_bytes < free
    assert said == (
        f"room for {fitting} of 1024 slots in the {free / 1e9:.1f} GB that are free beside the weights: all of them",
    )
    assert fit_slots(spec, 1_024, FP8, cuda, fused=True, mimi_kv_dtype=torch.float16, free=free)[0] > 1.7 * fitting
    assert fit_slots(spec, 16, torch.bfloat16, cuda, fused=True, mimi_kv_dtype=torch.float16, free=free) == (16, ())
    with pytest.raises(ConfigError, match=r"0\.9 GB free beside the weights.*smaller model"):
        fit_slots(spec, 16, torch.bfloat16, cuda, fused=True, mimi_kv_dtype=torch.float16, free=900_000_000)


def test_a_pretended_card_is_read_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    read = limits.pretended_limits.__wrapped__
    monkeypatch.setenv(limits.PRETEND_VARIABLE, "8.9:24")
    assert read() == Limits((8, 9), 101_376, 24_000_000_000)
    monkeypatch.setenv(limits.PRETEND_VARIABLE, "8.0")
    assert read() == Limits((8, 0), 166_912, None)
    monkeypatch.setenv(limits.PRETEND_VARIABLE, "4090")
    with pytest.raises(ConfigError, match=r"8\.9:24"):
        read()


def test_a_pretended_card_has_no_more_memory_than_it_would(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch is told a share of the real card's memory, by the device's number; what is free is counted within it."""
    told: list[tuple[float, int]] = []
    monkeypatch.setattr(device, "pretended_limits", lambda: Limits((8, 9), 101_376, 24_000_000_000))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(total_memory=96_000_000_000))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share, index: told.append((share, index)))
    said = device.hold_to_pretended_memory(torch.device("cuda"))
    assert said == "pretends compute capability 8.9 and 24 GB (MOSHI_STT_PRETEND_GPU)"
    device.hold_to_pretended_memory(torch.device("cuda:1"))
    assert told == [(0.25, 0), (0.25, 1)]
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 5_000_000_000)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 3_000_000_000)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (90_000_000_000, 96_000_000_000))
    assert device.free_bytes(torch.device("cuda")) == 21_000_000_000
    monkeypatch.setattr(device, "pretended_limits", lambda: None)
    assert device.free_bytes(torch.device("cuda")) == 92_000_000_000
    assert device.hold_to_pretended_memory(torch.device("cuda")) == ""


def test_kernels_are_loaded_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the compiler's threads and by a launch: each holds the lock, because Triton may mix up what two threads load."""
    from moshi_stt.models.torch_impl.cuda.compile import Compiler, finish
    from moshi_stt.models.torch_impl.cuda.launch import launch, loading

    held: list[bool] = []

    class Kernel:
        def warmup(self, *arguments: Any, **options: Any) -> "Kernel":
            return self

        def _init_handles(self) -> None:
            held.append(loading.locked())

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *arguments, **options: self._init_handles()

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    compiler = Compiler(torch.device("cpu"), threads=4)
    futures = compiler.read(lambda: [launch(Kernel(), (1,), number) for number in range(20)])
    finish(futures)
    compiler.close()
    launch(Kernel(), (1,))
    assert held == [True] * 21
    assert not loading.locked()
