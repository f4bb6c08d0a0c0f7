"""What is said of odd audio, and that nothing is said of good audio."""

from pathlib import Path

import numpy as np
import pytest
import soxr
from tests.support.media import noise

from moshi_stt.audio.decode import read_file
from moshi_stt.audio.watch import AudioWatch

RATE = 24_000


def heard(pcm: np.ndarray, size: int = 1_920) -> list[str]:
    watch = AudioWatch()
    said: list[str] = []
    for start in range(0, len(pcm), size):
        said += watch.feed(pcm[start : start + size])
    return said


def voice(hz: float, seconds: float) -> np.ndarray:
    """A vowel-like sound: harmonics that fall off, on and off like syllables."""
    time = np.arange(round(seconds * RATE)) / RATE
    period = np.arange(8_192) / 8_192
    table = sum(np.sin(2 * np.pi * n * period) / n for n in range(1, int(9_000 / hz)))
    tone = np.interp(hz * time % 1, period, table, period=1)
    pcm = 0.1 * tone * (0.55 + 0.45 * np.sin(2 * np.pi * 4 * time))
    return (pcm + 1e-4 * np.random.default_rng(0).standard_normal(len(pcm))).astype(np.float32)


@pytest.mark.parametrize("hz", [90, 120, 210, 330])
def test_a_voice_at_its_right_rate_says_nothing(hz: float) -> None:
    assert heard(voice(hz, 20)) == []


@pytest.mark.parametrize("hz", [60, 105, 220, 410])
def test_pitch_is_found(hz: float) -> None:
    watch = AudioWatch()
    watch.feed(voice(hz, 0.08))
    assert watch.median_pitch_hz == pytest.approx(hz, rel=0.03)


def test_noise_has_no_pitch() -> None:
    watch = AudioWatch()
    watch.feed((0.1 * np.random.default_rng(0).standard_normal(1_920)).astype(np.float32))
    watch.feed(np.zeros(1_920, np.float32))
    assert watch.median_pitch_hz is None


@pytest.mark.parametrize(("hz", "word"), [(55, "slow"), (64, "slow"), (600, "fast")])
def test_a_voice_that_no_one_has_is_said_once(hz: float, word: str) -> None:
    said = heard(voice(hz, 20))
    assert len(said) == 1
    assert f"runs {word}" in said[0]


@pytest.mark.parametrize("size", [7, 240, 1_920, 24_000, 10**7])
def test_the_warnings_do_not_depend_on_the_chunks(size: int) -> None:
    pcm = voice(60, 12)
    assert heard(pcm, size) == heard(pcm)


def test_integers_sent_as_they_are() -> None:
    said = heard(noise(1.0) * 32_768)
    assert len(said) == 1
    assert "divided by 32768" in said[0]


def test_a_little_over_full_scale_is_no_mistake() -> None:
    assert heard(noise(1.0) * 12) == []


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_no_number(value: float) -> None:
    pcm = noise(1.0)
    pcm[5] = value
    said = heard(pcm)
    assert len(said) == 1
    assert "not numbers" in said[0]


def test_next_to_nothing_is_said() -> None:
    said = heard(noise(30.0) * 1e-5)
    assert len(said) == 1
    assert "next to silent" in said[0]


def test_zeros_from_the_start() -> None:
    assert heard(np.zeros(9 * RATE, np.float32)) == []
    said = heard(np.zeros(200 * RATE, np.float32))
    assert len(said) == 1
    assert "nothing but zeros in the first 10 s" in said[0]


def test_the_silence_that_clients_send_at_the_end_is_no_mistake() -> None:
    """One second before and 35 s behind, as Kyutai's client does."""
    second = np.zeros(RATE, np.float32)
    assert heard(np.concatenate([second, noise(3.0), *[second] * 40])) == []


def test_a_microphone_that_goes_off_is_said() -> None:
    said = heard(np.concatenate([noise(3.0), np.zeros(200 * RATE, np.float32)]))
    assert len(said) == 1
    assert "60 s of nothing but zeros" in said[0]


def test_telephone_audio_is_told() -> None:
    narrow = soxr.resample(soxr.resample(voice(120, 20), RATE, 7_600), 7_600, RATE)
    said = heard(narrow.astype(np.float32))
    assert len(said) == 1
    assert "telephone" in said[0]


def test_voice_without_words_is_said_when_asked() -> None:
    watch = AudioWatch()
    pcm = voice(120, 30)
    watch.feed(pcm)
    said = watch.without_words()
    assert len(said) == 1
    assert "not one word" in said[0]
    assert watch.without_words() == []


@pytest.mark.slow
def test_real_speech_at_its_right_rate_says_nothing(shared: Path) -> None:
    for path in sorted((shared / "audio").iterdir()):
        if path.suffix in (".wav", ".mp3", ".flac", ".ogg"):
            pcm = read_file(path)
            assert heard(np.tile(pcm, -(-20 * RATE // len(pcm)))) == [], path.name


@pytest.mark.parametrize("name", ["en_austen_0870.wav", "en_two_cities.wav", "fr_fleurs_004.mp3"])
def test_a_man_sent_at_48_khz_is_said(shared: Path, name: str) -> None:
    said = heard(soxr.resample(read_file(shared / "audio" / name), 24_000, 48_000))
    assert "runs slow" in said[0]


@pytest.mark.parametrize("name", ["en_bria.mp3", "en_ls1088.wav", "fr_fleurs_010.mp3"])
def test_a_woman_sent_at_8_khz_is_said(shared: Path, name: str) -> None:
    pcm = read_file(shared / "audio" / name)
    said = heard(soxr.resample(np.tile(pcm, 2), 24_000, 8_000))
    assert "runs fast" in said[0]


def test_real_telephone_audio_is_told(shared: Path) -> None:
    recordings = sorted((shared / "digits" / "recordings").glob("*_jackson_1*.wav"))
    said = heard(np.concatenate([read_file(path) for path in recordings]))
    assert [line.split(":")[0] for line in said] == ["nothing above 4 kHz"]
