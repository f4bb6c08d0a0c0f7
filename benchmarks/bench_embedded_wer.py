#!/usr/bin/env python3
"""Word error, lag and cost of the embedded model in audio time, against an older version and the model called directly.

    bench_embedded_wer.py FOLDER [FOLDER ...] [--before JSON] [--save JSON] [--memory FILE] [--no-direct]

FOLDERs hold recordings and a MANIFEST.tsv (file, language, transcript); the English ones are heard. Prints the word error of
the three, the loss against the older version with its 95 % interval (bootstrap by file, 10,000 draws, fixed seed), and, for
1, 4, 8 and 12 live streams on two cores, the lag of words after their end and the cores in use, simulated from the cost of
each recogniser call (embedded_trace.py). --before: what --save kept of the older version. The last line is one JSON document.
"""

import argparse
import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import report
from bench_wer import Recording, direct, normalise, read_folder, read_pcm
from embedded_trace import metered, queue_lags, trace
from report import EMBEDDED

from moshi_stt.models.embedded import load_embedded
from moshi_stt.text.word_errors import word_errors

DRAWS, SEED = 10_000, 1
STREAMS = (1, 4, 8, 12)
NOTHING = "-"


def recordings_of(folder: Path) -> list[Recording]:
    """The English recordings that have a transcript; a manifest may write `-` for none."""
    with (folder / "MANIFEST.tsv").open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file, delimiter="\t") if row["language"] == "en"]
    if all("licence" in row and row["transcript"] != NOTHING for row in rows):
        return read_folder(folder)
    kept = [row for row in rows if row["transcript"] not in ("", NOTHING)]
    return [Recording(row["file"], read_pcm(folder / row["file"]), normalise(row["transcript"])) for row in kept]


def loss_interval(words: list[int], before: list[int], after: list[int]) -> tuple[float, float, float]:
    """Points of word error lost, and the 95 % interval, by drawing files."""
    counts = np.array([words, before, after], float)  # (3, files)
    picks = np.random.default_rng(SEED).integers(counts.shape[1], size=(DRAWS, counts.shape[1]))
    drawn = counts[:, picks].sum(axis=2)  # (3, draws)
    losses = 100 * (drawn[2] - drawn[1]) / drawn[0]
    low, high = np.percentile(losses, [2.5, 97.5])
    return 100 * float((counts[2] - counts[1]).sum() / counts[0].sum()), float(low), float(high)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--before", type=Path)
    parser.add_argument("--save", type=Path)
    parser.add_argument("--memory", type=Path, help="keep recogniser results here from run to run")
    parser.add_argument("--no-direct", action="store_true", help="do not call the model directly")
    args = parser.parse_args()
    recordings = [recording for folder in args.folders for recording in recordings_of(folder)]
    recogniser = metered(args.memory)
    traces = [trace(recogniser, recording.pcm) for recording in recordings]
    hypotheses = recogniser.calls / sum(item.seconds for item in traces)
    recogniser.save()
    recogniser.close()
    words = [len(recording.reference) for recording in recordings]
    wrong = [word_errors(r.reference, normalise(item.text)) for r, item in zip(recordings, traces, strict=True)]
    lags = [lag for item in traces for lag in item.lags]
    speech = [item for item, recording in zip(traces, recordings, strict=True) if item.seconds < 2 * len(recording.reference)]
    result: dict[str, Any] = {"files": len(recordings), "words": sum(words), "wer": 100 * sum(wrong) / sum(words)}
    result |= {
        "hypotheses_per_second": hypotheses,
        "lag_p50_s": float(np.median(lags)),
        "lag_p95_s": float(np.percentile(lags, 95)),
    }
    for streams in STREAMS:
        late, cores = queue_lags(speech, streams)
        result[f"streams_{streams}"] = {"p50": float(np.median(late)), "p95": float(np.percentile(late, 95)), "cores": cores}
    if not args.no_direct:
        model = load_embedded(1)
        alone = [word_errors(r.reference, normalise(direct(model, r.pcm))) for r in recordings]
        model.close()
        result["wer_direct"] = 100 * sum(alone) / sum(words)
    if args.before:
        old = json.loads(args.before.read_text())
        before = [word_errors(r.reference, normalise(old["texts"][r.name])) for r in recordings]
        loss, low, high = loss_interval(words, before, wrong)
        result |= {"wer_before": 100 * sum(before) / sum(words), "loss": loss, "loss_low": low, "loss_high": high}
        result["before"] = old["result"]
    for key, value in result.items():
        print(f"{key:<24}{value:.3f}" if isinstance(value, float) else f"{key:<24}{json.dumps(value)}")
    texts = {recording.name: item.text for recording, item in zip(recordings, traces, strict=True)}
    report.finish("embedded_wer", {**EMBEDDED, "result": result}, args.save, texts=texts)


if __name__ == "__main__":
    main()
