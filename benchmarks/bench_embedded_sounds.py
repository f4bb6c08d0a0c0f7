#!/usr/bin/env python3
"""What the embedded model says of sound that is not speech, of speech in noise, and of lone short words.

    bench_embedded_sounds.py FOLDER [DIGITS] [--only KIND ...] [--minutes 30] [--onsets 600] [--seed 1] [--plain]
                             [--save JSON] [--before JSON] [--memory FILE] [--verbose]

FOLDER: recordings with a MANIFEST.tsv (as for bench_wer.py). DIGITS: `{digit}_{speaker}_{index}.wav`, one spoken digit each.
Sound is made from the seed (embedded_sounds.py); the segmenter hears it in audio time, so a busy machine changes nothing.

Prints, by kind: false words a minute of sound without speech and of babble, with phrases that were said twice running; how many
onsets of 4 s say anything; lone words recognised; and for speech in noise and babble at 0 and 10 dB the word error, and how
many right and wrong words are sent and not marked as doubtful, next to those of --before (what --save kept of an older version,
--plain where that has no confidence). The last line is one JSON document.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import report
from bench_wer import Recording, normalise, read_folder
from embedded_sounds import Sound, babbles, in_noise, lone_words, onsets, without_voice
from embedded_trace import MeteredRecogniser, metered, trace
from report import EMBEDDED

from moshi_stt.constants import SAMPLE_RATE
from moshi_stt.events import Word
from moshi_stt.text.word_errors import word_errors

DOUBTFUL = 0.5
"""Words of a confidence below this are marked as doubtful: more likely wrong than right."""

KINDS = ("sounds", "babble", "onsets", "lone", "noise 0", "babble 0", "noise 10", "babble 10")
PHRASE = 3
"""A phrase of so many words or more that is said twice running is a loop."""

VOICE_SECONDS = 5.0
"""Recordings at least so long lend their voices to babble."""


def hits(reference: Sequence[str], heard: Sequence[str]) -> list[bool]:
    """Of each word heard, whether the best alignment to the reference finds it right."""
    rows, columns = len(reference), len(heard)
    cost = np.zeros((rows + 1, columns + 1), int)
    cost[:, 0], cost[0] = np.arange(rows + 1), np.arange(columns + 1)
    for row in range(1, rows + 1):
        for column in range(1, columns + 1):
            change = cost[row - 1, column - 1] + (reference[row - 1] != heard[column - 1])
            cost[row, column] = min(cost[row - 1, column] + 1, cost[row, column - 1] + 1, change)
    right = [False] * columns
    row, column = rows, columns
    while row and column:
        same = reference[row - 1] == heard[column - 1]
        if cost[row, column] == cost[row - 1, column - 1] + (not same):
            row, column = row - 1, column - 1
            right[column] = same
        elif cost[row, column] == cost[row, column - 1] + 1:
            column -= 1
        else:
            row -= 1
    return right


def said_twice(text: str) -> int:
    """Phrases of PHRASE words or more that are said twice running."""
    words, count, start = normalise(text), 0, 0
    while start < len(words):
        length = next(
            (
                n
                for n in range(PHRASE, (len(words) - start) // 2 + 1)
                if words[start : start + n] == words[start + n : start + 2 * n]
            ),
            0,
        )
        count += bool(length)
        start += length or 1
    return count


class Bench:
    def __init__(self, recogniser: MeteredRecogniser, args: argparse.Namespace) -> None:
        self.recogniser, self.args = recogniser, args
        self.texts: dict[str, str] = {}
        self.result: dict[str, Any] = {}
        self.before: dict[str, Any] = json.loads(args.before.read_text()) if args.before else {}

    def hear(self, name: str, sound: Sound) -> list[tuple[str, float]]:
        """The words, and the confidence in each (1 where there is none)."""
        heard = trace(self.recogniser, sound, extras=not self.args.plain)
        words = [(e.text, 1.0 if self.args.plain else e.confidence or 0.0) for _, e in heard.events if isinstance(e, Word)]
        self.texts[name] = " ".join(text for text, _ in words)
        if self.args.verbose and words:
            print(f"    {name}: " + " ".join(text if sure >= DOUBTFUL else f"[{text}]" for text, sure in words))
        return words

    def report(self, name: str, **values: float) -> None:
        """Print the values, each after that of the older version, and keep them."""
        self.result[name] = values
        old = self.before.get("result", {}).get(name, {})
        shown = (f"{key} " + (f"{old[key]:.4g} → " if key in old else "") + f"{value:.4g}" for key, value in values.items())
        print(f"{name:<16}" + "   ".join(shown), flush=True)

    def sounds(self, pieces: Iterator[Any]) -> None:
        by_kind: dict[str, list[tuple[float, int, int]]] = {}
        for piece in pieces:
            words = self.hear(piece.name, piece.sound)
            counts = (len(piece.sound) / SAMPLE_RATE / 60, len(words), said_twice(self.texts[piece.name]))
            by_kind.setdefault(piece.kind, []).append(counts)
        for kind, rows in by_kind.items():
            minutes, words_said, twice = (sum(column) for column in zip(*rows, strict=True))
            self.report(kind, minutes=minutes, words=words_said, words_a_minute=words_said / minutes, phrases_twice=twice)

    def onsets(self, count: int) -> None:
        speaking: dict[str, list[bool]] = {}
        for piece in onsets(self.args.seed, count):
            speaking.setdefault(piece.kind, []).append(bool(self.hear(f"onset {piece.name}", piece.sound)))
        for kind, said in speaking.items():
            self.report(f"onset {kind}", streams=len(said), speaking=sum(said), percent=100 * sum(said) / len(said))

    def lone(self, digits: Path) -> None:
        right = 0
        words = lone_words(self.args.seed, digits)
        for index, (word, sound) in enumerate(words):
            heard = [text for text, _ in self.hear(f"lone {index} {word}", sound)]
            right += normalise(" ".join(heard)) == [word]
        self.report("lone words", words=len(words), right=right)

    def noisy(self, recordings: Sequence[Recording], kind: str, decibels: float) -> None:
        voices = voices_of(recordings)
        wrong_words = reference_words = 0
        sent = {True: 0, False: 0}
        plain = {True: 0, False: 0}
        for recording in recordings:
            others = [voice for voice in voices if voice is not recording.pcm]
            sound = in_noise(self.args.seed, recording.pcm, decibels, kind, others)
            words = self.hear(f"{kind} {decibels:g} {recording.name}", sound)
            pieces = [(piece, sure) for text, sure in words for piece in normalise(text)]
            heard = [piece for piece, _ in pieces]
            reference_words += len(recording.reference)
            wrong_words += word_errors(recording.reference, heard)
            for right, (_, sure) in zip(hits(recording.reference, heard), pieces, strict=True):
                sent[right] += 1
                plain[right] += sure >= DOUBTFUL
        self.report(
            f"{kind} {decibels:g} dB",
            word_error=100 * wrong_words / reference_words,
            right=sent[True],
            wrong=sent[False],
            right_unmarked=plain[True],
            wrong_unmarked=plain[False],
        )


def voices_of(recordings: Sequence[Recording]) -> list[Sound]:
    return [recording.pcm for recording in recordings if len(recording.pcm) >= VOICE_SECONDS * SAMPLE_RATE]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("digits", type=Path, nargs="?")
    parser.add_argument("--only", nargs="+", choices=KINDS, default=KINDS, metavar="KIND", help=", ".join(KINDS))
    parser.add_argument("--minutes", type=float, default=30.0, help="of sound without a voice; of babble a sixth of it")
    parser.add_argument("--onsets", type=int, default=600, metavar="N")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="every Nth recording in noise (default all)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--plain", action="store_true", help="the version has no confidence")
    parser.add_argument("--save", type=Path)
    parser.add_argument("--before", type=Path)
    parser.add_argument("--memory", type=Path, help="keep recogniser results here from run to run")
    parser.add_argument("--verbose", action="store_true", help="print what was said; doubtful words in brackets")
    args = parser.parse_args()
    recordings = read_folder(args.folder)
    recogniser = metered(args.memory)
    bench = Bench(recogniser, args)
    for kind in args.only:
        if kind == "sounds":
            bench.sounds(without_voice(args.seed, args.minutes))
        elif kind == "babble":
            bench.sounds(babbles(args.seed, voices_of(recordings), args.minutes / 6))
        elif kind == "onsets":
            bench.onsets(args.onsets)
        elif kind == "lone":
            if args.digits:
                bench.lone(args.digits)
        else:
            name, decibels = kind.split()
            bench.noisy(recordings[:: args.every], name, float(decibels))
        recogniser.save()
    recogniser.close()
    earlier = json.loads(args.save.read_text()) if args.save and args.save.exists() else {"result": {}, "texts": {}}
    result = {**EMBEDDED, "seed": args.seed, "result": earlier["result"] | bench.result}
    report.finish("embedded_sounds", result, args.save, texts=earlier["texts"] | bench.texts)


if __name__ == "__main__":
    main()
