"""Resampling and conversion: any pieces give what the whole gives; every sample type means the same sound."""

import numpy as np
import pytest
import soxr
from tests.support.media import noise, shift_of

from moshi_stt.audio.resample import StreamingResampler, to_mono_float
from moshi_stt.errors import AudioError

RATES = [8_000, 11_025, 16_000, 22_050, 24_000, 32_000, 44_100, 48_000, 96_000]


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("size", [1, 7, 240, 1_920, 10**6])
def test_pieces_equal_the_whole(rate: int, size: int) -> None:
    pcm = noise(0.31, rate)
    resampler = StreamingResampler(rate)
    pieces = [resampler.feed(pcm[start : start + size]) for start in range(0, len(pcm), size)]
    got = np.concatenate([*pieces, resampler.finish()])
    np.testing.assert_array_equal(got, soxr.resample(pcm, rate, 24_000, quality="HQ"))
    assert abs(len(got) - len(pcm) * 24_000 / rate) <= 1


@pytest.mark.parametrize("rate", RATES)
def test_nothing_moves_in_time(rate: int) -> None:
    resampler = StreamingResampler(rate)
    got = np.concatenate([resampler.feed(noise(1.0, rate, seed=3)), resampler.finish()])
    assert shift_of(got, noise(1.0, 24_000, seed=3)) == 0


@pytest.mark.parametrize("rate", RATES)
def test_little_is_held_back(rate: int) -> None:
    resampler = StreamingResampler(rate)
    assert 24_000 - len(resampler.feed(noise(1.0, rate))) <= 0.07 * 24_000


@pytest.mark.parametrize("rate", [0, -1, 999, 768_001])
def test_a_rate_that_is_none_is_refused(rate: int) -> None:
    with pytest.raises(AudioError, match=f"sample rate {rate} Hz"):
        StreamingResampler(rate)


def test_a_finished_resampler_takes_nothing_more() -> None:
    resampler = StreamingResampler(48_000)
    resampler.finish()
    with pytest.raises(ValueError, match="finished"):
        resampler.feed(np.zeros(1, np.float32))


def test_only_float32_of_one_channel_is_fed() -> None:
    with pytest.raises(ValueError, match=r"float64 of shape \(3,\)"):
        StreamingResampler(48_000).feed(np.zeros(3))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("samples", "expected"),
    [
        (np.array([-32_768, 0, 16_384], np.int16), [-1, 0, 0.5]),
        (np.array([-(2**31), 2**30], np.int32), [-1, 0.5]),
        (np.array([-128, 64], np.int8), [-1, 0.5]),
        (np.array([0, 128, 192], np.uint8), [-1, 0, 0.5]),
        (np.array([0.5, -2.0], np.float64), [0.5, -2]),
        (np.array([0.5], np.float16), [0.5]),
        (np.array([[1e300, -1e300], [np.inf, 0]], np.float64), [np.nan, np.inf]),
        (np.array([[1.0, 0.0], [0.5, 0.25]], np.float32), [0.5, 0.375]),
        (np.array([[16_384], [0]], np.int16), [0.5, 0]),
        (np.array([0.5, 0.25, 0.125], np.float32)[::2], [0.5, 0.125]),
    ],
)
def test_every_sample_type_means_the_same_sound(samples: np.ndarray, expected: list[float]) -> None:
    got = to_mono_float(samples)
    assert got.dtype == np.float32
    assert got.flags.c_contiguous
    np.testing.assert_array_equal(got, np.array(expected, np.float32))


@pytest.mark.parametrize(
    "samples", [np.zeros(2, bool), np.zeros(2, np.complex64), np.zeros((1, 1, 1), np.float32), np.zeros((), "f4")]
)
def test_what_is_no_pcm_is_refused(samples: np.ndarray) -> None:
    with pytest.raises(AudioError, match="expected"):
        to_mono_float(samples)
