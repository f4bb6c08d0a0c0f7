"""Choice of tokens: argmax, temperature, and that noise belongs to a stream."""

import numpy as np
import torch
from tests.support.checkpoints import Checkpoint, module, save, small_spec, small_tensors
from tests.support.stepping import drive, noise, step_rows

from moshi_stt.models.torch_impl.backend import TorchBackend
from moshi_stt.models.torch_impl.build import load_backend
from moshi_stt.models.torch_impl.sampling import choose, gumbel


def test_argmax_takes_the_lowest_of_equals() -> None:
    logits = torch.tensor([[0.0, 2.0, 2.0, 1.0], [5.0, 5.0, 5.0, 5.0]])
    token, logprob = choose(logits, torch.tensor([0, 0]), 0.0, seed=0)
    assert token.tolist() == [1, 0]
    np.testing.assert_allclose(logprob.exp(), [logits[0].softmax(-1)[1], 0.25], rtol=1e-6)


def test_temperature_samples_the_distribution() -> None:
    """Over many positions tokens come as often as softmax(logits / temperature) says; logprob stays that of temperature 1."""
    logits, temperature, count = torch.tensor([2.0, 1.0, 0.0, -1.0, -30.0]), 0.7, 40_000
    token, logprob = choose(logits.expand(count, 5), torch.arange(count), temperature, seed=3)
    share = torch.bincount(token, minlength=5) / count
    np.testing.assert_allclose(share, (logits / temperature).softmax(-1), atol=0.01)
    np.testing.assert_allclose(logprob, logits.log_softmax(-1)[token], atol=1e-6)


def test_noise_is_finite_and_differs() -> None:
    noise = gumbel(1, torch.arange(2_000), 500)
    assert noise.isfinite().all()
    assert abs(float(noise.mean()) - 0.5772) < 0.01, "the mean of a standard Gumbel"
    assert abs(float(noise.var()) - np.pi**2 / 6) < 0.02
    assert len(set(gumbel(1, torch.arange(50), 1).flatten().tolist())) == 50
    assert not torch.equal(gumbel(1, torch.arange(5), 9), gumbel(2, torch.arange(5), 9))


def test_a_sampled_stream_does_not_hear_its_neighbours(tmp_path) -> None:  # type: ignore[no-untyped-def]
    """At temperature 0.9 too, a stream's tokens are those it gives alone; and other seeds give others."""
    spec = small_spec()
    small: Checkpoint = save(tmp_path, spec, *small_tensors(spec))

    def load(seed: int) -> TorchBackend:
        import dataclasses

        warm = dataclasses.replace(spec, temperature=0.9)
        return load_backend(module(temperature=0.9), small.lm_file, small.mimi_file, warm, 4, seed=seed)

    backend, frames = load(0), 25
    audio = [noise(frames, seed).reshape(frames, -1) for seed in range(3)]
    alone = [drive(backend, stream.reshape(-1)).tokens for stream in audio]
    together = [step_rows(backend, [stream[n] for stream in audio], [2, 0, 3], [n == 0] * 3).text_token for n in range(frames)]
    np.testing.assert_array_equal(np.stack(together, axis=1), np.stack(alone))
    assert (drive(load(1), audio[0].reshape(-1)).tokens != alone[0]).any()
