"""`CudaBackend` against `TorchBackend`: the same streams on the same weights, codes and tokens equal."""

from dataclasses import replace

import numpy as np
import pytest
from tests.support.graphs import NoGraphs
from tests.support.triton_twins import DEVICE, QUIET, kernels_run, torch  # noqa: F401

from moshi_stt.models.spec import Condition, ConditionerSpec, LMSpec, MimiSpec, ModelSpec
from moshi_stt.models.torch_impl.backend import BackendState, TorchBackend
from moshi_stt.models.torch_impl.build import Options, make_state, plain_backend
from moshi_stt.models.torch_impl.cuda.backend import CudaBackend
from moshi_stt.models.torch_impl.cuda.lm import FusedLM
from moshi_stt.models.torch_impl.cuda.mimi import PRECISIONS, FusedMimi
from moshi_stt.models.torch_impl.graphs import CudaGraphs
from moshi_stt.models.torch_impl.loader import allocate_lm
from moshi_stt.models.weights import mimi_table

pytestmark = [*QUIET, pytest.mark.usefixtures("kernels_run")]

SLOTS = 7
SAMPLES = 96
SPEC = ModelSpec(
    lm=LMSpec(64, 2, 1, 5, 1e5, 40, 3, extra_heads=2),
    mimi=MimiSpec(
        codebooks=3,
        codebook_size=64,
        codebook_dim=64,
        dim=64,
        heads=2,
        layers=1,
        feedforward=128,
        context=6,
        channels=(16, 32, 32, 32, 32),
        strides=(2, 2, 2, 6),
        frame_samples=SAMPLES,
    ),
    delay_frames=2,
)
"""As small as the kernels allow; the rings are past their end after a few frames."""


def draw(tensor: torch.Tensor, name: str) -> None:
    fan_in = max(1, tensor[0].numel())
    tensor.copy_(torch.randn(tensor.shape) * (fan_in**-0.5 if tensor.dim() > 1 and "emb" not in name else 1.0))
    if "norm" in name or name.endswith("cluster_usage"):
        tensor.abs_().add_(0.5)


def poison(state: BackendState) -> None:
    for ring in (*state.lm.rings, *state.mimi.rings):
        for tensor in ring:
            if tensor is not None:
                tensor.view(torch.uint8).fill_(0xFF)


def lm_params(spec: ModelSpec) -> dict[str, torch.Tensor]:
    params, destinations = allocate_lm(spec.lm, 96, torch.float32, DEVICE)
    for name, tensor in destinations.items():
        draw(tensor, name)
    return params


def pair(spec: ModelSpec, *, zero_start: bool = False) -> tuple[TorchBackend, CudaBackend]:
    torch.manual_seed(0)
    params = lm_params(spec)
    mimi_params = {param.name: torch.empty(param.shape, device=DEVICE) for param in mimi_table(spec.mimi)}
    for name, tensor in mimi_params.items():
        draw(tensor, name)
    condition, seed = spec.condition, 3
    with torch.inference_mode():
        lm = FusedLM(spec.lm, params, condition, temperature=spec.temperature, seed=seed)
        mimi = FusedMimi(spec.mimi, mimi_params, PRECISIONS["f32"], zero_start=zero_start)
    states = [make_state(spec, SLOTS, torch.float32, DEVICE) for _ in range(2)]
    for state in states:
        poison(state)
    graphs = NoGraphs() if DEVICE.type == "cpu" else CudaGraphs(DEVICE)
    ours = CudaBackend(spec, lm, mimi, states[0], graphs=graphs, buckets=(2, 4))
    plain = plain_backend(spec, dict(params), mimi_params, states[1], Options(seed=seed, zero_start=zero_start))
    return plain, ours


def step_both(backends: tuple[TorchBackend, CudaBackend], rng: np.random.Generator, rows: list[int], fresh: list[int]) -> None:
    pcm = torch.from_numpy((rng.standard_normal((len(rows), SAMPLES)) * 0.3).astype(np.float32)).to(DEVICE)
    pcm[0, 3] = float("nan")
    slots = torch.tensor(rows, device=DEVICE)
    begins = torch.tensor([slot in fresh for slot in rows], device=DEVICE)
    with torch.inference_mode():
        plain = backends[0].step_rows(pcm, slots, begins).cpu()
        ours = backends[1].step_rows(lambda: pcm, slots, begins).cpu()
    torch.testing.assert_close(ours[:, 0], plain[:, 0], rtol=0, atol=0)
    torch.testing.assert_close(ours[:, 1:], plain[:, 1:], rtol=1e-4, atol=1e-4)
    for name in ("codes", "text", "frames"):
        torch.testing.assert_close(getattr(backends[1].state, name)[slots], getattr(backends[0].state, name)[slots], msg=name)


def test_joins_leaves_and_reuse_give_the_same_tokens_and_codes() -> None:
    """One row (the thin products), two, and many; the rings overflow; one slot begins again."""
    backends = pair(SPEC)
    rng = np.random.default_rng(0)
    step_both(backends, rng, [4], [4])
    step_both(backends, rng, [4, 0, 2, 6, 1], [0, 2, 6, 1])
    for _ in range(3):
        step_both(backends, rng, [2, 4], [])
    step_both(backends, rng, [1, 2, 4, 3], [1, 3])


def test_condition_temperature_and_zero_start() -> None:
    conditioner = ConditionerSpec("delay", "ContinuousAttribute", 8)
    spec = replace(
        SPEC,
        lm=replace(SPEC.lm, conditioners=(conditioner,)),
        condition=Condition(conditioner, 2.0),
        temperature=0.7,
    )
    backends = pair(spec, zero_start=True)
    rng = np.random.default_rng(1)
    step_both(backends, rng, [5, 1, 3], [5, 1, 3])
    step_both(backends, rng, [3, 5], [])


def test_float16_mimi_gives_the_plain_codes_whatever_the_other_rows() -> None:
    """Rings and all: codes as in float32, and those of a row alone equal, to the last bit of its state, those in company."""
    torch.manual_seed(0)
    params = {param.name: torch.empty(param.shape, device=DEVICE) for param in mimi_table(SPEC.mimi)}
    for name, tensor in params.items():
        draw(tensor, name)
    sound = torch.randn(12, 4, SAMPLES, device=DEVICE) * 0.3

    def encode(rows: list[int]) -> tuple[list[torch.Tensor], BackendState]:
        mimi = FusedMimi(SPEC.mimi, params, PRECISIONS["f16"])
        state = make_state(SPEC, SLOTS, torch.float32, DEVICE, torch.float16)
        poison(state)
        slots = torch.tensor(rows, device=DEVICE)
        codes = []
        for n, frame in enumerate(sound):
            mimi.step(state.mimi, frame[slots].contiguous(), torch.full_like(slots, n), slots, state.codes)
            codes.append(state.codes.clone())
        return codes, state

    with torch.inference_mode():
        together, crowded = encode([2, 0, 3, 1])
        alone, single = encode([3])
        plain_state = make_state(SPEC, SLOTS, torch.float32, DEVICE)
        plain = plain_backend(SPEC, lm_params(SPEC), params, plain_state, Options()).mimi
        same = 0
        every = torch.arange(4, device=DEVICE)
        for n, frame in enumerate(sound):
            wanted = plain.step(plain_state.mimi, frame, torch.full_like(every, n), every)
            same += int((together[n][:4] == wanted).sum())
    assert same >= 0.95 * 12 * 4 * SPEC.mimi.codebooks
    assert all(torch.equal(a[3], b[3]) for a, b in zip(together, alone, strict=True))
    assert torch.equal(crowded.mimi.conv[3], single.mimi.conv[3])
    for one, other in zip(crowded.mimi.rings, single.mimi.rings, strict=True):
        assert one.k.dtype is torch.float16
        assert torch.equal(one.k[3], other.k[3])
        assert torch.equal(one.v[3], other.v[3])


def test_a_slot_goes_on_in_another() -> None:
    _, ours = pair(SPEC)
    rng = np.random.default_rng(2)
    frames = [torch.from_numpy((rng.standard_normal((1, SAMPLES)) * 0.3).astype(np.float32)).to(DEVICE) for _ in range(2)]

    def step(slot: int, frame: torch.Tensor, fresh: bool = False) -> list[float]:
        with torch.inference_mode():
            out = ours.step_rows(lambda: frame, torch.tensor([slot], device=DEVICE), torch.tensor([fresh], device=DEVICE))
        return list(out[0].tolist())

    step(2, frames[0], fresh=True)
    ours.copy(2, 5)
    alone = [step(2, frame) for frame in frames[1:]]
    assert [step(5, frame) for frame in frames[1:]] == alone


class Recorder:
    """Keeps the codes of the last step."""

    def start(self) -> None: ...

    def record(self, slots: np.ndarray, fresh: np.ndarray, text: np.ndarray, codes: np.ndarray) -> None:
        self.slots, self.text, self.codes = slots.copy(), text.copy(), codes.copy()

    def stop(self) -> None: ...


def test_a_recorder_hears_tokens_and_codes_of_every_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where there are more rows than the largest bucket holds; all else stays as it is."""
    monkeypatch.setattr("moshi_stt.models.torch_impl.graphs.FRAME_SAMPLES", SAMPLES)
    plain, ours = pair(SPEC)
    recorder = Recorder()
    ours.record_to(recorder)
    rng = np.random.default_rng(4)
    for rows in ([4, 0, 2, 6, 1], [2], [1, 4, 0]):
        pcm = (rng.standard_normal((len(rows), SAMPLES)) * 0.3).astype(np.float32)
        slots, fresh = np.array(rows), np.full(len(rows), len(rows) == 5)
        expected, output = (backend.step(pcm, slots, fresh) for backend in (plain, ours))
        np.testing.assert_array_equal(output.text_token, expected.text_token)
        np.testing.assert_allclose(output.pause, expected.pause, atol=1e-4)
        np.testing.assert_array_equal(recorder.slots, slots)
        np.testing.assert_array_equal(recorder.text, expected.text_token)
        np.testing.assert_array_equal(recorder.codes, plain.state.codes[torch.from_numpy(slots).to(DEVICE)].cpu().numpy())


def test_resized_it_steps_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """More slots than it was made with, over the same weights; the rows of the graphs' inputs grow with them."""
    monkeypatch.setattr("moshi_stt.models.torch_impl.graphs.FRAME_SAMPLES", SAMPLES)
    plain, ours = pair(SPEC)
    ours._buckets = None
    ours.state = make_state(SPEC, SLOTS, torch.float32, DEVICE, torch.float16)
    ours.resize(4)
    assert ours.state.mimi.rings[0].k.dtype is torch.float16, "resized, its tensors are of the dtypes they were of"
    ours.state = make_state(SPEC, SLOTS, torch.float32, DEVICE)
    for slots in (3, 12):
        ours.resize(slots)
        assert (ours.slots, len(ours.inputs.slots), len(ours.state.frames)) == (slots, slots, slots + 1)
    rng = np.random.default_rng(5)
    pcm = (rng.standard_normal((1, SAMPLES)) * 0.3).astype(np.float32)
    expected = plain.step(pcm, np.array([2]), np.array([True]))
    output = ours.step(pcm, np.array([11]), np.array([True]))
    np.testing.assert_array_equal(output.text_token, expected.text_token)
    np.testing.assert_array_equal(ours.state.codes[11].cpu(), plain.state.codes[2].cpu())
