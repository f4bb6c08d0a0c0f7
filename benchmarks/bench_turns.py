"""End of turn, as eot-bench scores it: false cut-offs and latency of the turn detector, with a plain silence timer beside it.

A hold is a pause of 0.2 to 2 s put into a sentence, at the border of two words that do not end it; an end is 4 s or more
after a sentence's end. Both are filled with the recording's own noise floor. Lengths of holds are log-uniform, as those of
speech are skewed to short ones; the seed is fixed. Nothing but the audio goes to the detector: words, which guard dictated
numbers, do not enter.

    python benchmarks/bench_turns.py FOLDER --score eot_score.py    FOLDER: recordings of speech, WAV, FLAC, MP3 or Ogg

FOLDER may have a MANIFEST.tsv that names the files of one language (columns `file` and `language`). Word borders come from the
embedded model. --score: the scorer whose `summary(spans)` gives the four numbers. Prints a table and, as its last line, JSON.
"""

import argparse
import asyncio
import csv
import importlib.util
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import report
from numpy.typing import NDArray

from moshi_stt.audio.decode import read_file
from moshi_stt.config_load import embedded_config
from moshi_stt.constants import FRAME_SAMPLES, FRAME_SECONDS, SAMPLE_RATE
from moshi_stt.engine.recording import transcribe_recording
from moshi_stt.engine.turns import SpeechDetector, TurnDetector
from moshi_stt.engines import build_engines
from moshi_stt.errors import AudioError
from moshi_stt.events import Pause
from moshi_stt.text.subtitles import TimedWord

SHORTEST_HOLD, LONGEST_HOLD = 0.2, 2.0
END_SECONDS = 4.5
CONTEXT_SECONDS = 6.0
"""Speech before the pause that the detector hears."""
AFTER_SECONDS = 0.5
SENTENCE_END = (".", "?", "!", "…")

Span = dict[str, Any]


def recordings(folder: Path, language: str) -> list[Path]:
    manifest = folder / "MANIFEST.tsv"
    if manifest.is_file():
        with manifest.open(encoding="utf-8") as file:
            rows = csv.DictReader(file, delimiter="\t")
            return [folder / row["file"] for row in rows if row.get("language") in (language, None)]
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in (".wav", ".flac", ".mp3", ".ogg"))


async def with_words(paths: list[Path]) -> list[tuple[str, NDArray[np.float32], list[TimedWord]]]:
    """(name, audio, words) of each file that is speech."""
    engine = build_engines(embedded_config())["asr"]
    await engine.start()
    found = []
    try:
        for path in paths:
            try:
                pcm = read_file(path)
            except AudioError:
                continue
            words = await transcribe_recording(engine, [pcm])
            if len(words) >= 4:
                found.append((path.name, pcm, words))
    finally:
        await engine.stop()
    return found


def noise_floor(pcm: NDArray[np.float32], samples: int, generator: np.random.Generator) -> NDArray[np.float32]:
    """So many samples of the recording's quietest fifth of a second, one after the other in random places."""
    size = SAMPLE_RATE // 5
    total = np.concatenate([[0.0], np.cumsum(np.square(pcm, dtype=np.float64))])
    starts = np.arange(0, len(pcm) - size, size // 8)
    start = int(starts[(total[starts + size] - total[starts]).argmin()])
    quiet = pcm[start : start + size]
    pieces = [np.roll(quiet, int(generator.integers(size))) for _ in range(samples // size + 1)]
    noise: NDArray[np.float32] = np.concatenate(pieces)[:samples]
    return noise


def quietest(pcm: NDArray[np.float32], start: float, end: float) -> int:
    """The quietest sample position between two times."""
    low, high = round(start * SAMPLE_RATE), max(round(end * SAMPLE_RATE), round(start * SAMPLE_RATE) + SAMPLE_RATE // 50)
    window = np.square(pcm[low:high], dtype=np.float64)
    smooth = np.convolve(window, np.ones(SAMPLE_RATE // 200), "same")
    return low + int(smooth.argmin())


def made(
    sources: list[tuple[str, NDArray[np.float32], list[TimedWord]]], count: int, seed: int
) -> Iterator[tuple[Span, NDArray[np.float32]]]:
    """`count` holds and as many ends: the span without its events, and the audio."""
    generator = np.random.default_rng(seed)
    borders = [
        (name, pcm, left, right)
        for name, pcm, words in sources
        for left, right in itertools.pairwise(words)
        if not left.text.endswith(SENTENCE_END) and right.start - left.end < 0.3 and left.start > 1.0
    ]
    ends = [
        (name, pcm, left, right)
        for name, pcm, words in sources
        for left, right in zip(words, [*words[1:], None], strict=True)
        if (right is None or left.text.endswith(SENTENCE_END)) and left.start > 1.0
    ]
    for label, places in (("hold", borders), ("eot", ends)):
        for number in range(count):
            name, pcm, left, right = places[int(generator.integers(len(places)))]
            following = len(pcm) / SAMPLE_RATE if right is None else right.start
            cut = quietest(pcm, left.end, max(following, left.end + 0.02))
            log_length = generator.uniform(np.log(SHORTEST_HOLD), np.log(LONGEST_HOLD))
            seconds = float(np.exp(log_length)) if label == "hold" else END_SECONDS
            before = pcm[max(0, cut - round(CONTEXT_SECONDS * SAMPLE_RATE)) : cut]
            pause = noise_floor(pcm, round(seconds * SAMPLE_RATE), generator)
            after = pcm[cut : cut + round(AFTER_SECONDS * SAMPLE_RATE)] if label == "hold" else pcm[:0]
            start = len(before) / SAMPLE_RATE
            span = {"id": f"{name}-{label}-{number}", "label": label, "start": start, "end": start + len(pause) / SAMPLE_RATE}
            yield span, np.concatenate([before, pause, after])


def scored(pcm: NDArray[np.float32]) -> list[tuple[float, float]]:
    """(seconds, confidence) after each 80 ms, as a stream's turn detector has it."""
    detector, turns = SpeechDetector(), TurnDetector()
    events = []
    for number in range(len(pcm) // FRAME_SAMPLES):
        silence = detector.push(pcm[number * FRAME_SAMPLES : (number + 1) * FRAME_SAMPLES])
        time = (number + 1) * FRAME_SECONDS
        turns.take(Pause(time, time, silence))
        events.append((round(time, 3), turns.confidence))
    return events


def scorer(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location("eot_score", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--score", type=Path, required=True, help="eot_score.py, the rules of eot-bench")
    parser.add_argument("--language", default="en")
    parser.add_argument("--count", type=int, default=200, help="holds, and ends, each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--spans", type=Path, help="also write the spans here, one JSON object a line")
    args = parser.parse_args()
    sources = asyncio.run(with_words(recordings(args.folder, args.language)))
    spans = [{**span, "events": scored(pcm)} for span, pcm in made(sources, args.count, args.seed)]
    if args.spans is not None:
        args.spans.write_text("".join(json.dumps(span) + "\n" for span in spans), encoding="utf-8")
    result = scorer(args.score).summary(spans)
    print(f"{len(sources)} recordings, {result['holds']} holds of {SHORTEST_HOLD} to {LONGEST_HOLD} s, {result['eots']} ends")
    print(f"{'':24}{'detector':>12}{'silence only':>14}")
    for name, unit in (("cutoff_at_300ms", "%"), ("cutoff_at_600ms", "%"), ("latency_at_5pct", "s"), ("latency_at_10pct", "s")):
        row = [result[who][name] for who in ("model", "silence_only")]
        shown = ["–" if value is None else f"{value * 100:.1f} %" if unit == "%" else f"{value:.3f} s" for value in row]
        print(f"{name.replace('_', ' '):24}{shown[0]:>12}{shown[1]:>14}")
    report.finish("turns", {"seed": args.seed, "recordings": len(sources), **result})


if __name__ == "__main__":
    main()
