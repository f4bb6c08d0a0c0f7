"""Speaks the vocabulary with every synthetic voice there is, into shards of clips. Seeded.

python -m training.synthesise OUT --engines espeak,flite,festival,hibari,pico,shifted --seed 1 [--scale 0.1]

`shifted` comes last: it makes other timbres of the clips that are in OUT by then, people's too.
"""

import argparse
import random
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from training.alignment import Reading, align, reading_of
from training.clips import read_shards, write_shard
from training.vocabulary import DIGITS, ENGLISH, FRENCH
from training.voices import (
    ESPEAK_ENGLISH,
    ESPEAK_FRENCH,
    ESPEAK_VARIANTS,
    FESTIVAL,
    FLITE,
    PICO,
    Clip,
    Espeak,
    Hibari,
    festival,
    flite,
    pico,
    shift,
)

SHARD = 100
"""Clips of one shard."""


def espeak_clips(rng: random.Random, scale: float) -> Iterator[Clip]:
    """Each variant with several accents, rates and pitches."""
    espeak = Espeak()
    for variant in ESPEAK_VARIANTS:
        for _ in range(max(1, round(4 * scale))):
            accent = rng.choice(ESPEAK_ENGLISH)
            for text in DIGITS:
                yield espeak.say(text, accent, variant, rng.randint(110, 210), rng.randint(25, 75), rng.randint(20, 90))
        for _ in range(max(1, round(45 * scale))):
            accent, text = rng.choice(ESPEAK_ENGLISH), rng.choice(ENGLISH)
            yield espeak.say(text, accent, variant, rng.randint(120, 190), rng.randint(25, 75), rng.randint(30, 80))
        for _ in range(max(1, round(30 * scale))):
            accent, text = rng.choice(ESPEAK_FRENCH), rng.choice(FRENCH)
            yield espeak.say(text, accent, variant, rng.randint(120, 185), rng.randint(25, 75), rng.randint(30, 80))


def flite_clips(rng: random.Random, scale: float) -> Iterator[Clip]:
    espeak = Espeak()
    for voice in FLITE:
        for text in [*DIGITS * max(1, round(6 * scale)), *rng.sample(ENGLISH, max(1, round(len(ENGLISH) * min(1, scale))))]:
            yield align(flite(text, voice, rng.uniform(0.85, 1.4)), _reading(espeak, text, "en-us"))


def festival_clips(rng: random.Random, scale: float) -> Iterator[Clip]:
    espeak = Espeak()
    for voice in FESTIVAL:
        for _ in range(max(1, round(4 * scale))):
            texts = [*DIGITS, *rng.sample(ENGLISH, max(1, round(len(ENGLISH) * min(1, scale) / 3)))]
            for clip in festival(texts, voice, rng.uniform(0.85, 1.4)):
                yield align(clip, _reading(espeak, clip.text, "en-us"))


def hibari_clips(rng: random.Random, scale: float) -> Iterator[Clip]:
    espeak, hibari = Espeak(), Hibari()
    for text in [*DIGITS * max(1, round(12 * scale)), *ENGLISH]:
        yield align(hibari.say(text, rng.uniform(0.75, 1.3)), _reading(espeak, text, "en-us"))


def pico_clips(rng: random.Random, scale: float) -> Iterator[Clip]:
    espeak = Espeak()
    for language in PICO:
        phrases = FRENCH if language == "fr-FR" else ENGLISH
        digits = () if language == "fr-FR" else DIGITS * max(1, round(8 * scale))
        for text in [*digits, *phrases * max(1, round(2 * scale))]:
            clip = pico(text, language, rng.randint(70, 130), rng.randint(75, 130))
            yield align(clip, _reading(espeak, text, "fr-fr" if clip.language == "fr" else "en-us"))


def shifted_clips(rng: random.Random, scale: float, clips: Path) -> Iterator[Clip]:
    """Clips of training voices with other pitches and formants; of people's most, of espeak-ng's, which are many, few."""
    spoken = [clip for part in sorted(clips.iterdir()) if part.name in SHIFTS for clip in read_shards(part)]
    spoken = [clip for clip in spoken if clip.words and not clip.held_out and rng.random() < scale * _shift_share(clip)]
    rng.shuffle(spoken)
    for clip in spoken:
        first = rng.randrange(len(TIMBRES))
        yield from shift(clip, [(which, *TIMBRES[which]) for which in (first, (first + 5) % len(TIMBRES))])


def _shift_share(clip: Clip) -> float:
    return 0.12 if clip.voice.startswith("espeak:") else 1.0


SHIFTS = ("human-train", "hibari", "flite", "festival", "pico", "espeak")
TIMBRES = tuple(
    (pitch, formants)
    for formants, pitches in (
        (0.85, (0.6, 0.8, 1.0)),
        (0.93, (0.75, 0.95, 1.2)),
        (1.08, (0.85, 1.1, 1.5)),
        (1.17, (1.0, 1.3, 1.8)),
    )
    for pitch in pitches
)
"""Pitch and formants of the voices that are made of each voice, as factors."""


def _reading(espeak: Espeak, text: str, accent: str) -> Reading:
    return reading_of(espeak.say(text, accent, "", 150, 50, 50))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--engines", default="espeak,flite,festival,hibari,pico,shifted")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--scale", type=float, default=1.0)
    args = parser.parse_args()
    for engine in args.engines.split(","):
        synthesise(args.out, engine, args.seed, args.scale)


ENGINES = {
    "espeak": espeak_clips,
    "flite": flite_clips,
    "festival": festival_clips,
    "hibari": hibari_clips,
    "pico": pico_clips,
}


def synthesise(out: Path, engine: str, seed: int, scale: float) -> int:
    """All clips of one engine into `out`/ENGINE. Returns how many there are."""
    rng = random.Random(f"{seed} {engine}")
    clips = shifted_clips(rng, scale, out) if engine == "shifted" else ENGINES[engine](rng, scale)
    count, number = 0, 0
    while shard := list(islice(clips, SHARD)):
        write_shard(out / engine / f"{number:04}", shard)
        count, number = count + len(shard), number + 1
        print(f"{engine}: {count} clips", flush=True)
    return count


if __name__ == "__main__":
    main()
