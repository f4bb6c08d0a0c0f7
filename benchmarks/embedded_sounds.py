"""Sound that is not speech, speech in noise and lone words, made from a seed: what the embedded model must not be misled by.

All sound is mono float32 at 24 kHz. Music is real: the files of Debian's `asterisk-moh-opsound-wav`. Voices for
babble are those of a folder of recordings.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from moshi_stt.audio.decode import read_file
from moshi_stt.constants import SAMPLE_RATE

Sound = NDArray[np.float32]
"""(S,) at 24 kHz."""

MUSIC = Path("/usr/share/asterisk/moh")
PIECE_SECONDS = 30.0
MINUTES = {"music": 12.0, "noise": 6.0, "tones": 4.0, "applause": 3.0, "breath": 3.0, "silence": 2.0}
"""30 minutes of sound without a voice; babble comes on top."""

BABBLE_MINUTES = 5.0
VOICES = (6, 12, 24)
LEVELS_DB = (-40.0, -14.0)
"""Loudness of a piece, drawn between these (RMS, full scale = 0)."""


class Piece(NamedTuple):
    kind: str
    name: str
    sound: Sound


def at_level(sound: Sound, decibels: float) -> Sound:
    """The sound at an RMS level, full scale = 0, without clipping."""
    loudness = float(np.sqrt(np.mean(np.square(sound, dtype=np.float64)))) or 1.0
    scaled = sound * (10 ** (decibels / 20) / loudness)
    return (scaled / max(1.0, float(np.abs(scaled).max()))).astype(np.float32)


def colored(rng: np.random.Generator, seconds: float, slope: float, low: float = 20.0, high: float = 12_000.0) -> Sound:
    """Gaussian noise whose power falls with frequency to the power of `slope`, within a band in Hz."""
    count = round(seconds * SAMPLE_RATE)
    spectrum = np.fft.rfft(rng.standard_normal(count))
    frequency = np.fft.rfftfreq(count, 1 / SAMPLE_RATE)
    weight = np.where((frequency >= low) & (frequency <= high), np.maximum(frequency, low) ** (-slope / 2), 0.0)
    sound = np.fft.irfft(spectrum * weight, count)
    return (sound / sound.std()).astype(np.float32)


def noise(rng: np.random.Generator, seconds: float) -> Sound:
    """White, pink or brown noise, a fan, a car, rain, or wind: hiss, rumble and gusts of seeded shape."""
    slope = float(rng.choice([0.0, 1.0, 2.0]))
    sound = colored(rng, seconds, slope, high=float(rng.uniform(2_000, 12_000)))
    time = np.arange(len(sound)) / SAMPLE_RATE
    shape = rng.integers(4)
    if shape == 1:  # a fan: hum and its harmonics
        hum = float(rng.uniform(45, 130))
        for harmonic in range(1, 6):
            sound += (1.5 / harmonic * np.sin(2 * np.pi * hum * harmonic * time + rng.uniform(0, 6))).astype(np.float32)
    elif shape == 2:  # gusts
        places = np.arange(0.0, seconds + 2.0, 0.7)
        gusts = np.exp(np.interp(time, places, rng.normal(0, 0.8, len(places))))
        sound *= gusts.astype(np.float32)
    elif shape == 3:  # knocks and clicks over it
        for _ in range(rng.poisson(2 * seconds)):
            knock = colored(rng, 0.05, 1.0, high=float(rng.uniform(500, 8_000))) * np.exp(-np.arange(1_200) / 200).astype(
                np.float32
            )
            start = int(rng.integers(max(1, len(sound) - len(knock))))
            sound[start : start + len(knock)] += (float(rng.uniform(2, 12)) * knock)[: len(sound) - start]
    return sound


TONES = {
    "dial": ((350.0, 440.0), (1.0,)),
    "dial eu": ((425.0,), (1.0,)),
    "ring": ((440.0, 480.0), (2.0, -4.0)),
    "ring eu": ((425.0,), (1.0, -4.0)),
    "ring uk": ((400.0, 450.0), (0.4, -0.2, 0.4, -2.0)),
    "busy": ((480.0, 620.0), (0.5, -0.5)),
    "information": ((950.0, 1_400.0, 1_800.0), (1.0, -1.0)),
    "fax": ((1_100.0,), (0.5, -3.0)),
    "beep": ((1_000.0,), (0.3, -0.7)),
}
"""Frequencies in Hz that sound together, and seconds of sound and, negative, of silence in turn."""

KEYS = ((697.0, 770.0, 852.0, 941.0), (1_209.0, 1_336.0, 1_477.0))


def tones(rng: np.random.Generator, seconds: float) -> Sound:
    """Tones of a telephone line, or keys being pressed, on a little hiss."""
    sound = 0.003 * colored(rng, seconds, 1.0)
    name = str(rng.choice([*TONES, "keys"]))
    position = 0
    while position < len(sound):
        if name == "keys":
            frequencies = tuple(float(rng.choice(row)) for row in KEYS)
            pattern: tuple[float, ...] = (float(rng.uniform(0.08, 0.3)), -float(rng.uniform(0.08, 0.8)))
        else:
            frequencies, pattern = TONES[name]
        for length in pattern:
            count = min(round(abs(length) * SAMPLE_RATE), len(sound) - position)
            if length > 0:
                time = np.arange(count) / SAMPLE_RATE
                sound[position : position + count] += sum(np.sin(2 * np.pi * f * time) for f in frequencies).astype(np.float32)
            position += count
    return sound


def applause(rng: np.random.Generator, seconds: float) -> Sound:
    """Claps of many hands, 15 to 120 a second, swelling and dying."""
    sound = 0.02 * colored(rng, seconds, 1.0)
    for _ in range(rng.poisson(float(rng.uniform(15, 120)) * seconds)):
        length = int(rng.uniform(0.008, 0.03) * SAMPLE_RATE)
        low = float(rng.uniform(400, 1_500))
        clap = colored(rng, length / SAMPLE_RATE, 0.5, low, low * 4) * np.exp(-np.arange(length) / (length / 5)).astype(
            np.float32
        )
        start = int(rng.integers(max(1, len(sound) - length)))
        sound[start : start + length] += float(rng.lognormal(0, 0.5)) * clap[: len(sound) - start]
    swell = np.interp(np.arange(len(sound)), np.linspace(0, len(sound), 8), rng.uniform(0.3, 1, 8))
    return (sound * swell).astype(np.float32)


def breath(rng: np.random.Generator, seconds: float) -> Sound:
    """Somebody breathing into a microphone: noise in the bands of a mouth, in and out, with touches of the microphone."""
    sound = 0.01 * colored(rng, seconds, 1.0)
    position = int(rng.uniform(0, 1) * SAMPLE_RATE)
    while position < len(sound):
        length = float(rng.uniform(0.4, 1.6))
        puff = sum(
            float(rng.uniform(0.3, 1)) * colored(rng, length, 1.0, center * 0.7, center * 1.4)
            for center in (float(rng.uniform(300, 700)), float(rng.uniform(1_000, 1_800)), float(rng.uniform(2_200, 4_000)))
        )
        puff = np.asarray(puff) * np.sin(np.linspace(0, np.pi, len(puff))) ** float(rng.uniform(0.7, 2))
        piece = puff[: len(sound) - position].astype(np.float32)
        sound[position : position + len(piece)] += piece
        position += int((length + float(rng.uniform(0.3, 2.0))) * SAMPLE_RATE)
    return sound


def silence(rng: np.random.Generator, seconds: float) -> Sound:
    """Digital silence, or the floor of a converter."""
    count = round(seconds * SAMPLE_RATE)
    return np.zeros(count, np.float32) if rng.integers(2) else (rng.standard_normal(count) * 3e-5).astype(np.float32)


def music(rng: np.random.Generator, seconds: float) -> Sound:
    """A place in one of the recorded pieces. Raises SystemExit with the command that installs them."""
    files = sorted(MUSIC.glob("*.wav"))
    if not files:
        raise SystemExit(f"no music in {MUSIC}: run `apt-get install asterisk-moh-opsound-wav`")
    whole = _read(files[int(rng.integers(len(files)))])
    start = int(rng.integers(max(1, len(whole) - round(seconds * SAMPLE_RATE))))
    return whole[start : start + round(seconds * SAMPLE_RATE)].copy()


_kept: dict[Path, Sound] = {}


def _read(path: Path) -> Sound:
    if path not in _kept:
        _kept[path] = read_file(path)
    return _kept[path]


def babble(rng: np.random.Generator, seconds: float, voices: Sequence[Sound], count: int) -> Sound:
    """So many voices at once, each at a place and a loudness of its own, none near."""
    total = np.zeros(round(seconds * SAMPLE_RATE), np.float32)
    for _ in range(count):
        voice = np.concatenate([voices[int(index)] for index in rng.permutation(len(voices))[:4]])
        start = int(rng.integers(len(voice)))
        voice = np.resize(np.roll(voice, -start), len(total))
        total += at_level(voice, -30.0 + float(rng.normal(0, 2)))
    return total


MAKERS = {"music": music, "noise": noise, "tones": tones, "applause": applause, "breath": breath, "silence": silence}


def without_voice(seed: int, minutes: float = 30.0) -> Iterator[Piece]:
    """Pieces of half a minute, by kind, in the shares of MINUTES."""
    for kind, share in MINUTES.items():
        for index in range(max(1, round(share * minutes / sum(MINUTES.values()) * 60 / PIECE_SECONDS))):
            rng = np.random.default_rng([seed, len(kind), ord(kind[0]), index])
            sound = MAKERS[kind](rng, PIECE_SECONDS)
            yield Piece(
                kind, f"{kind} {index}", sound if kind == "silence" else at_level(sound, float(rng.uniform(*LEVELS_DB)))
            )


def babbles(seed: int, voices: Sequence[Sound], minutes: float = BABBLE_MINUTES) -> Iterator[Piece]:
    for index in range(max(1, round(minutes * 60 / PIECE_SECONDS))):
        rng = np.random.default_rng([seed, 77, index])
        count = VOICES[index % len(VOICES)]
        sound = at_level(babble(rng, PIECE_SECONDS, voices, count), float(rng.uniform(-30, -16)))
        yield Piece("babble", f"babble {index} of {count}", sound)


def onsets(seed: int, count: int = 600) -> Iterator[Piece]:
    """Streams of 4 s of such sound; before every second one lies a second of silence, from which it sets in."""
    kinds = [kind for kind in MAKERS if kind != "silence"]
    for index in range(count):
        rng = np.random.default_rng([seed, 99, index])
        kind = kinds[index // 2 % len(kinds)]
        sound = at_level(MAKERS[kind](rng, 4.0), float(rng.uniform(*LEVELS_DB)))
        lead = SAMPLE_RATE if index % 2 else 0
        floor = (rng.standard_normal(lead) * 3e-5).astype(np.float32)
        yield Piece("after silence" if lead else "at once", f"{kind} {index}", np.concatenate([floor, sound]))


def in_noise(seed: int, speech: Sound, decibels: float, kind: str, voices: Sequence[Sound] = ()) -> Sound:
    """Speech with so many dB more energy than the noise (or babble of 12 voices) that is added."""
    rng = np.random.default_rng([seed, len(speech)])
    seconds = len(speech) / SAMPLE_RATE
    other = babble(rng, seconds, voices, 12) if kind == "babble" else noise(rng, seconds)
    level = 20 * np.log10(float(np.sqrt(np.mean(np.square(speech, dtype=np.float64)))) or 1e-9)
    other = np.resize(other, len(speech))
    loudness = float(np.sqrt(np.mean(np.square(other, dtype=np.float64))))
    mixed = speech + other * (10 ** ((level - decibels) / 20) / loudness)
    return (mixed / max(1.0, float(np.abs(mixed).max()))).astype(np.float32)


def lone_words(seed: int, digits: Path, count: int = 50) -> list[tuple[str, Sound]]:
    """Recorded digits, each alone between silence. digits: a folder of `{digit}_{speaker}_{index}.wav`."""
    names = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    rng = np.random.default_rng(seed)
    files = sorted(digits.glob("*.wav"))
    words: list[tuple[str, Sound]] = []
    for index in range(count):
        own = [path for path in files if path.name.startswith(f"{index % 10}_")]
        word = read_file(own[int(rng.integers(len(own)))])
        floor = (rng.standard_normal(2 * SAMPLE_RATE) * 1e-4).astype(np.float32)
        words.append(
            (names[index % 10], np.concatenate([floor[: SAMPLE_RATE // 2], at_level(word, -22.0), floor[SAMPLE_RATE // 2 :]]))
        )
    return words
