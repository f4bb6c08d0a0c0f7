"""Clips on disk: shards of one Ogg Opus file each, with an index of what is where."""

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moshi_stt.cores import usable_cores
from training.voices import RATE, Clip, Timed

_GAP = RATE // 20
"""Silence between two clips of a shard, so that the codec does not carry one into the next."""


def write_shard(path: Path, clips: Sequence[Clip]) -> None:
    """path: without a suffix. The index is written last, so that a shard with an index is whole."""
    import soundfile

    pieces, index, at = [], [], 0
    for clip in clips:
        samples = np.clip(clip.samples * (0.5 / max(1e-4, float(np.abs(clip.samples).max()))), -1, 1)
        words = [[w.text, round(w.start, 3), round(w.end, 3)] for w in clip.words]
        index.append([at, len(samples), clip.text, clip.voice, clip.language, words])
        pieces += [samples, np.zeros(_GAP, np.float32)]
        at += len(samples) + _GAP
    path.parent.mkdir(parents=True, exist_ok=True)
    sound = np.concatenate(pieces)
    with soundfile.SoundFile(
        path.with_suffix(".ogg"), "w", RATE, 1, format="OGG", subtype="OPUS", compression_level=0.88
    ) as file:
        for start in range(0, len(sound), RATE):  # libsndfile's Opus writer needs a deep stack for long writes
            file.write(sound[start : start + RATE])
    path.with_suffix(".json").write_text(json.dumps(index, ensure_ascii=False), encoding="utf-8")


def read_shards(folder: Path) -> Iterator[Clip]:
    """Every clip of a folder, in the order of the names. Sound is decoded by as many threads as there are processors."""
    indexes = sorted(folder.rglob("*.json"))
    with ThreadPoolExecutor(usable_cores()) as pool:
        sounds = pool.map(_decoded, indexes)
        for index, samples in zip(indexes, sounds, strict=True):
            yield from _clips(index, samples)


def _decoded(index: Path) -> NDArray[np.float32]:
    import soundfile

    samples, rate = soundfile.read(index.with_suffix(".ogg"), dtype="float32")
    assert rate == RATE, f"{index}: {rate} Hz"
    return np.asarray(samples, np.float32)


def _clips(index: Path, samples: NDArray[np.float32]) -> Iterator[Clip]:
    for at, length, text, voice, language, words in json.loads(index.read_text(encoding="utf-8")):
        timed = tuple(Timed(*word) for word in words)
        yield Clip(samples[at : at + length].copy(), text, timed, voice, language)
