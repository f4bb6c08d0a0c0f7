"""Recordings that measure the small model: held-out clips joined at known times, and sounds without words for it."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from training.compose import FRAME, FRAME_RATE, Bank, Mix, Plan, Planner, music, render, targets
from training.train import DELAY_FRAMES, held_out_tests
from training.voices import RATE, Clip

TAIL_FRAMES = 25
"""Of silence that `servers.send` adds."""
LEVEL = 0.06
NOISE_FLOOR = 3e-4

Sound = NDArray[np.float32]


@dataclass(frozen=True)
class Row:
    """A recording at 24 kHz. said: (word, start, end) in seconds. pauses: bool (T, heads), the tail's frames included."""

    pcm: Sound
    said: tuple[tuple[str, float, float], ...]
    pauses: NDArray[np.bool_]


SETS = {
    "human-unseen": "digits, human speaker never heard",
    "human-seen": "digits, training speakers, other takes",
    "en": "English, held-out synthetic voices",
    "fr": "French, held-out synthetic voices",
}


@functools.cache
def _tests(folder: Path) -> dict[str, list[Clip]]:
    return held_out_tests(folder)


def speech_rows(
    clips: Path, pieces: dict[str, list[int]], rows: int, seconds: float, seed: int, turns: float | None = None
) -> dict[str, list[Row]]:
    """So many rows of each set of `SETS` that there are clips of. turns: as in `Mix`; None: pauses that are drawn evenly."""
    drawn = speech_plans(clips, pieces, rows, seconds, seed, turns)
    return {name: _rows(plan, bank, pieces, seed + list(SETS).index(name)) for name, (plan, bank) in drawn.items()}


def speech_plans(
    clips: Path, pieces: dict[str, list[int]], rows: int, seconds: float, seed: int, turns: float | None = None
) -> dict[str, tuple[Plan, Bank]]:
    """What is said when in the rows of `speech_rows`, and the clips that say it."""
    tests = _tests(clips)
    drawn = {}
    for i, name in enumerate(SETS):
        if name not in tests:
            continue
        bank = Bank(tests[name], torch.device("cpu"))
        kinds = [kind for kind, voices in bank.voices.items() if voices]
        digits = 0.999 if kinds == ["digit"] else 0.3 if "digit" in kinds else 0.0
        french = 0.999 if "fr" in kinds and "en" not in kinds else 0.0
        mix = Mix(digits=digits, french=french, human=0.5, empty=0.0, split=0.2, turns=turns)
        drawn[name] = Planner(bank, pieces, DELAY_FRAMES, mix, seed + i).plan(rows, round(seconds * FRAME_RATE)), bank
    return drawn


def pauses_of(said: Sequence[tuple[str, float, float]], frames: int, pieces: dict[str, list[int]]) -> NDArray[np.bool_]:
    """bool (T, heads) of a row of so many frames and the tail after it."""
    return targets(said, frames + TAIL_FRAMES, pieces, DELAY_FRAMES)[1]


def _rows(plan: Plan, bank: Bank, pieces: dict[str, list[int]], seed: int) -> list[Row]:
    rows, frames = plan.tokens.shape
    generator = torch.Generator().manual_seed(seed)
    sound = render(plan, bank, rows, frames, generator, change=False)
    sound = sound / sound.square().mean(1, keepdim=True).sqrt().clamp(min=1e-3) * LEVEL
    sound = sound + NOISE_FLOOR * torch.randn(sound.shape, generator=generator)
    return [
        Row(pcm.numpy().copy(), tuple(words), pauses_of(words, frames, pieces))
        for pcm, words in zip(sound, plan.said, strict=True)
    ]


def noisy(row: Row, decibels: float, seed: int) -> Row:
    """The row with white noise so far below the power of its words."""
    spoken = np.concatenate([row.pcm[round(start * RATE) : round(end * RATE)] for _, start, end in row.said] or [row.pcm])
    size = float(np.sqrt(np.mean(np.square(spoken)))) * 10 ** (-decibels / 20)
    noise = np.random.default_rng(seed).standard_normal(len(row.pcm)).astype(np.float32)
    return Row(row.pcm + np.float32(size) * noise, row.said, row.pauses)


def wordless(clips: Path, rows: int, seconds: float, seed: int) -> dict[str, list[Sound]]:
    """Silence, noise, music, and babble of eight voices at once; so many rows of each."""
    rng = np.random.default_rng(seed)
    size = round(seconds * FRAME_RATE) * FRAME
    babble = [clip.samples for name, found in _tests(clips).items() if name in ("en", "fr") for clip in found]
    tunes = music(rows, size, torch.Generator().manual_seed(seed), torch.device("cpu")).numpy()

    def noise() -> Sound:
        spectrum = np.fft.rfft(rng.standard_normal(size))
        hertz = np.linspace(0, RATE / 2, len(spectrum))
        return _at(np.fft.irfft(spectrum * np.maximum(hertz, 50) ** rng.uniform(-1.2, 0.0), size), rng.uniform(-40, -15))

    def many() -> Sound:
        return _at(np.sum([_joined(babble, size, rng) for _ in range(8)], axis=0), rng.uniform(-35, -20))

    kinds: dict[str, Callable[[int], Sound]] = {
        "silence": lambda i: (10 ** rng.uniform(-6, -3) * rng.standard_normal(size)).astype(np.float32),
        "noise": lambda i: noise(),
        "music": lambda i: np.asarray(tunes[i] * 10 ** rng.uniform(-0.7, 0.5), np.float32),
        "babble": lambda i: many(),
    }
    return {kind: [make(i) for i in range(rows)] for kind, make in kinds.items()}


def _joined(clips: Sequence[Sound], size: int, rng: np.random.Generator) -> Sound:
    pieces: list[Sound] = []
    while sum(map(len, pieces)) < size:
        pieces += [clips[int(rng.integers(len(clips)))], np.zeros(int(rng.integers(RATE // 3)), np.float32)]
    return np.concatenate(pieces)[:size]


def _at(sound: NDArray[np.float64] | Sound, decibels: float) -> Sound:
    return (sound * (10 ** (decibels / 20) / np.sqrt(np.mean(np.square(sound))))).astype(np.float32)


def turn_rows(clips: Path, count: int, seed: int) -> list[tuple[str, float, float, Sound]]:
    """(hold or eot, start and end of the silence, recording): so many of each, of English and French held-out voices.

    A hold: a pause of 0.2 to 2 s, log-uniform, between two words of a phrase. An end: 4.5 s after a phrase. Pauses are filled
    with the same noise floor that lies under the words.
    """
    rng = np.random.default_rng(seed)
    tests = _tests(clips)
    phrases = [clip for name in ("en", "fr") for clip in tests.get(name, []) if len(clip.words) >= 3]
    found = []
    for number in range(2 * count):
        clip = phrases[int(rng.integers(len(phrases)))]
        sound = clip.samples * (LEVEL * 2.5 / np.sqrt(np.mean(np.square(clip.samples))))
        end = min(len(sound), round((clip.words[-1].end + 0.03) * RATE))
        before = np.zeros(round(rng.uniform(1.0, 1.6) * RATE), np.float32)
        if number % 2:
            label, seconds, cut, after = "eot", 4.5, end, sound[:0]
        else:
            label, seconds = "hold", float(np.exp(rng.uniform(np.log(0.2), np.log(2.0))))
            cut = round(clip.words[int(rng.integers(1, len(clip.words)))].start * RATE)
            after = sound[cut:end]
        pause = np.zeros(round(seconds * RATE), np.float32)
        pcm = np.concatenate([before, sound[:cut], pause, after]).astype(np.float32)
        pcm += NOISE_FLOOR * rng.standard_normal(len(pcm)).astype(np.float32)
        start = (len(before) + cut) / RATE
        found.append((label, start, start + seconds, pcm))
    return found
