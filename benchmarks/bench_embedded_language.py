#!/usr/bin/env python3
"""How often the embedded model's language alarm goes off, on French, on English, and on sound without speech.

    bench_embedded_language.py FOLDER [--pieces 60] [--minutes 30] [--languages fr en] [--part report|tune] [--seed 1]
                               [--memory FILE]

Pieces of 15 s: of FOLDER's recordings (MANIFEST.tsv with file and language), and joined prompts of Debian's
`asterisk-core-sounds-fr-wav` and `asterisk-core-sounds-en-wav`. Recordings and prompts are split by file, half to tune on and
half to report; --pieces of each language are heard at most. The last line is one JSON document.
"""

import argparse
import csv
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import report
from bench_wer import read_pcm
from embedded_sounds import Sound, at_level, without_voice
from embedded_trace import metered, trace
from report import EMBEDDED

from moshi_stt.audio.decode import read_file
from moshi_stt.constants import SAMPLE_RATE
from moshi_stt.events import Warning  # noqa: A004 - the event

PROMPTS = {"fr": Path("/usr/share/asterisk/sounds/fr_CA_f_June"), "en": Path("/usr/share/asterisk/sounds/en_US_f_Allison")}
PIECE_SECONDS = 15.0
SHORTEST_PIECE_SECONDS = 10.0
SHORTEST_PROMPT_SECONDS = 0.8
LEVEL_DB = -22.0


class Piece(NamedTuple):
    language: str
    name: str
    sound: Sound


def half(names: list[Any], part: str, seed: int) -> list[Any]:
    """The half of the files that a part may hear."""
    order = np.random.default_rng(seed).permutation(len(names))
    return [names[int(index)] for index in (order[::2] if part == "tune" else order[1::2])]


def recorded(folder: Path, language: str, part: str, seed: int) -> list[Piece]:
    """The recordings in pieces; a shorter one is a piece if it is long enough to tell."""
    with (folder / "MANIFEST.tsv").open(encoding="utf-8") as file:
        names = [row["file"] for row in csv.DictReader(file, delimiter="\t") if row["language"] == language]
    pieces = []
    for name in half(names, part, seed):
        pcm = read_pcm(folder / name)
        size = round(PIECE_SECONDS * SAMPLE_RATE)
        starts = range(0, max(1, len(pcm) - round(SHORTEST_PIECE_SECONDS * SAMPLE_RATE)), size)
        pieces += [Piece(language, f"{name} {start // SAMPLE_RATE} s", pcm[start : start + size]) for start in starts]
    return [piece for piece in pieces if len(piece.sound) >= SHORTEST_PIECE_SECONDS * SAMPLE_RATE]


def prompted(language: str, part: str, seed: int, count: int) -> list[Piece]:
    """Prompts joined to pieces, with pauses of 0.25 to 0.8 s."""
    files = sorted(PROMPTS[language].glob("*.wav"))
    if not files:
        raise SystemExit(f"no prompts in {PROMPTS[language]}: run `apt-get install asterisk-core-sounds-{language}-wav`")
    rng = np.random.default_rng(seed)
    pieces: list[Piece] = []
    parts: list[Sound] = []
    for path in half(files, part, seed):
        prompt = read_file(path)
        if not SHORTEST_PROMPT_SECONDS * SAMPLE_RATE <= len(prompt) <= PIECE_SECONDS * SAMPLE_RATE or not prompt.any():
            continue
        floor = (rng.standard_normal(round(float(rng.uniform(0.25, 0.8)) * SAMPLE_RATE)) * 1e-4).astype(np.float32)
        parts += [at_level(prompt, LEVEL_DB), floor]
        if sum(map(len, parts)) >= PIECE_SECONDS * SAMPLE_RATE:
            pieces.append(
                Piece(language, f"prompts {len(pieces)}", np.concatenate(parts)[: round(PIECE_SECONDS * SAMPLE_RATE)])
            )
            parts = []
    return pieces[:count]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--pieces", type=int, default=60, metavar="N", help="of each language (default 60)")
    parser.add_argument("--languages", nargs="+", choices=("fr", "en"), default=("fr", "en"))
    parser.add_argument("--minutes", type=float, default=30.0, help="of sound without speech (default 30)")
    parser.add_argument("--part", choices=("tune", "report"), default="report")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--memory", type=Path, help="keep recogniser results here from run to run")
    args = parser.parse_args()
    recogniser = metered(args.memory)

    def warned(sound: Sound) -> bool:
        return any(isinstance(event, Warning) for _, event in trace(recogniser, sound, extras=True).events)

    result: dict[str, Any] = {}
    for language in args.languages:
        pieces = recorded(args.folder, language, args.part, args.seed)[: args.pieces]
        pieces += prompted(language, args.part, args.seed, args.pieces - len(pieces))
        alarms = [warned(piece.sound) for piece in pieces]
        odd = [piece.name for piece, alarm in zip(pieces, alarms, strict=True) if alarm != (language == "fr")]
        print(f"{language}: {sum(alarms)} of {len(pieces)} warned; against expectation: {', '.join(odd) or 'none'}", flush=True)
        result[language] = {"pieces": len(pieces), "warned": sum(alarms)}
        recogniser.save()
    sounds = [piece.name for piece in without_voice(args.seed, args.minutes) if warned(piece.sound)] if args.minutes else []
    print(f"sound without speech: {len(sounds)} warnings in {args.minutes:g} minutes; {', '.join(sounds) or 'none'}")
    result["sounds"] = {"minutes": args.minutes, "warned": len(sounds)}
    recogniser.save()
    report.finish("embedded_language", {**EMBEDDED, "part": args.part, "seed": args.seed, "result": result})


if __name__ == "__main__":
    main()
