"""Angles of positions of any size, against float64."""

import numpy as np
import pytest
import torch

from moshi_stt.models.torch_impl.rope import RotaryTable, rotate

PLACES = [0, 1, 10, 749, 16_383, 16_384, 1_000_003, 9_999_999, 10_000_000, 123_456_789, 2**28 - 1]


@pytest.mark.parametrize(("head_dim", "period"), [(128, 100_000.0), (64, 10_000.0)])
def test_angles_are_exact(head_dim: int, period: float) -> None:
    """Position 10 000 000 is as good as position 10: a few units in the last place of float32, at every frequency."""
    cos, sin = RotaryTable(head_dim, period, torch.device("cpu"))(torch.tensor(PLACES))
    thetas = period ** (-2 * np.arange(head_dim // 2) / head_dim)
    angles = np.array(PLACES)[:, None] * thetas
    error = np.maximum(np.abs(cos.numpy() - np.cos(angles)), np.abs(sin.numpy() - np.sin(angles))).max(axis=1)
    assert error[:5].max() < 6.1e-8, "small positions: rounded once"
    assert error[5:].max() < 2.5e-7, dict(zip(PLACES, error, strict=True))
    plain = (torch.tensor(PLACES, dtype=torch.float32)[:, None] * torch.from_numpy(thetas).float()).cos()
    assert np.abs(plain.numpy() - np.cos(angles)).max() > 0.1, "float32 angles, the usual way, are this far off"
    assert (cos[0] == 1).all()
    assert (sin[0] == 0).all()


def test_attention_sees_only_distance() -> None:
    """A query and a key some positions apart give the same score at the start of a stream and after ten million positions."""
    table = RotaryTable(128, 100_000.0, torch.device("cpu"))
    q, k = torch.randn(2, 128, generator=torch.Generator().manual_seed(0))

    def score(at: int) -> float:
        turned = [rotate(x, *table(torch.tensor(p))) for x, p in ((q, at), (k, at - 700))]
        return float((turned[0] * turned[1]).sum())

    near = score(700)
    assert [score(at) for at in (9_999_999, 50_000_000, 200_000_000)] == pytest.approx([near] * 3, abs=1e-4)


def test_pairs_are_interleaved() -> None:
    """(x_2k, x_2k+1) turn together (contract section 5.3)."""
    x = torch.tensor([1.0, 0.0, 0.0, 1.0])
    angle = torch.tensor([0.5, 0.25])
    turned = rotate(x, angle.cos(), angle.sin())
    expected = [np.cos(0.5), np.sin(0.5), -np.sin(0.25), np.cos(0.25)]
    np.testing.assert_allclose(turned, expected, atol=1e-7)
