#!/usr/bin/env python3
"""The embedded model's pause probabilities as end-of-turn scores, by the rules of eot-bench, next to a timer of silence.

    bench_embedded_turns.py FOLDER SCORER [--spans 200] [--seed 1] [--head 2] [--save SPANS.jsonl] [--calibration]

FOLDER: recordings with a MANIFEST.tsv (as for bench_wer.py). SCORER: a Python file with `summary(spans)` by eot-bench's rules.
Holds and ends are made from the recordings: a hold is a pause of 0.2 to 2 s put into a sentence at a word border that is not
its end, an end is 4 s after a sentence's last word, both of the recording's own noise floor. Only the detector hears them.

--calibration prints how often no speech came within each horizon where the score said so. The last line is one JSON document.
"""

import argparse
import importlib.util
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import report
from bench_wer import read_folder
from embedded_sounds import Sound
from embedded_trace import metered, trace
from report import EMBEDDED

from moshi_stt.constants import FRAME_SECONDS, SAMPLE_RATE
from moshi_stt.engine.pauses import HORIZONS_SECONDS
from moshi_stt.engine.recogniser import Hypothesis
from moshi_stt.events import EndWord, Step, Word

HOLD_SECONDS = (0.2, 2.0)
END_SECONDS = 4.0
CONTEXT_SECONDS = (1.0, 6.0)
"""Speech before a span, and after a hold, at most."""

SENTENCE_ENDS = ".?!"
MARGIN_SECONDS = 0.06
FLOOR_SECONDS = 0.05


def noise_floor(rng: np.random.Generator, speech: Sound, seconds: float) -> Sound:
    """Noise as loud as, and with the spectrum of, the quietest stretches of the recording."""
    size = round(FLOOR_SECONDS * SAMPLE_RATE)
    frames = speech[: len(speech) // size * size].reshape(-1, size)
    energy = np.square(frames).mean(axis=1)
    quiet = frames[np.argsort(energy)[: max(2, len(frames) // 20)]]
    count = round(seconds * SAMPLE_RATE)
    spectrum = np.sqrt(np.mean(np.abs(np.fft.rfft(quiet, axis=1)) ** 2, axis=0))
    white = np.fft.rfft(rng.standard_normal(count))
    shape = np.interp(np.linspace(0, 1, len(white)), np.linspace(0, 1, len(spectrum)), spectrum)
    noise = np.fft.irfft(white * shape, count)
    level = float(np.sqrt(np.square(quiet).mean()))
    return (noise * (level / (float(noise.std()) or 1.0))).astype(np.float32)


class Borders:
    """Where words meet in the recordings, from the recogniser's own times."""

    def __init__(self, name: str, speech: Sound, words: list[tuple[str, float, float]]) -> None:
        self.name, self.speech, self.words = name, speech, words

    def inside(self) -> list[float]:
        """Seconds of borders between words of one sentence."""
        return [
            (stop + after) / 2
            for (text, _, stop), (_, after, _) in zip(self.words, self.words[1:], strict=False)
            if text[-1] not in SENTENCE_ENDS + "," and after - stop < 0.15 and stop > CONTEXT_SECONDS[0]
        ]

    def ends(self) -> list[float]:
        """Seconds at which sentences end and nothing follows at once."""
        following = [start for _, start, _ in self.words[1:]] + [len(self.speech) / SAMPLE_RATE]
        return [
            stop + MARGIN_SECONDS
            for (text, _, stop), after in zip(self.words, following, strict=True)
            if text[-1] in SENTENCE_ENDS and after - stop > MARGIN_SECONDS and stop > CONTEXT_SECONDS[0]
        ]


def span(rng: np.random.Generator, where: Borders, border: float, label: str) -> tuple[Sound, float, float]:
    """Sound around a border with silence put in, and when the silence starts and ends."""
    seconds = float(rng.uniform(*HOLD_SECONDS)) if label == "hold" else END_SECONDS
    at = round(border * SAMPLE_RATE)
    before = where.speech[max(0, at - round(CONTEXT_SECONDS[1] * SAMPLE_RATE)) : at]
    after = where.speech[at : at + round(CONTEXT_SECONDS[0] * SAMPLE_RATE)] if label == "hold" else before[:0]
    sound = np.concatenate([before, noise_floor(rng, where.speech, seconds), after])
    start = len(before) / SAMPLE_RATE
    return sound, start, start + seconds


class Listener:
    """The segmenter without its recogniser: the detector, and the steps."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def recognise(self, *_: Any) -> Any:
        return Hypothesis([])


def load_scorer(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location("scorer", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def calibration(spans: list[dict[str, Any]]) -> list[str]:
    """For each horizon and tenth of the score, how often no speech came within the horizon."""
    lines = []
    for index, horizon in enumerate(HORIZONS_SECONDS):
        scores, silent = [], []
        for item in spans:
            for time, values in item["steps"]:
                known = item["label"] == "hold" or time + horizon <= item["end"]
                if item["start"] < time < item["end"] and known:
                    scores.append(values[index])
                    silent.append(time + horizon <= item["end"])
        bins = np.digitize(scores, np.arange(0.1, 1.0, 0.1))
        cells = [
            f"{np.mean(np.array(scores)[bins == b]):.2f}→{np.mean(np.array(silent)[bins == b]):.2f}"
            for b in range(10)
            if (bins == b).sum() > 50
        ]
        lines.append(f"{horizon:g} s: " + " ".join(cells))
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("scorer", type=Path)
    parser.add_argument("--spans", type=int, default=200, metavar="N", help="of each kind (default 200)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--head", type=int, help="score this head alone (default all)")
    parser.add_argument("--save", type=Path)
    parser.add_argument("--memory", type=Path, help="keep recogniser results here from run to run")
    parser.add_argument("--calibration", action="store_true")
    args = parser.parse_args()
    scorer = load_scorer(args.scorer)
    recogniser = metered(args.memory)
    places = []
    for recording in read_folder(args.folder):
        heard = [event for _, event in trace(recogniser, recording.pcm).events]
        words = [event for event in heard if isinstance(event, Word)]
        stops = [event.stop_time for event in heard if isinstance(event, EndWord)]
        timed = [(word.text, word.start_time, stop) for word, stop in zip(words, stops, strict=True)]
        places.append(Borders(recording.name, recording.pcm, timed))
    recogniser.save()
    rng = np.random.default_rng(args.seed)
    spans: list[dict[str, Any]] = []
    for label in ("hold", "eot"):
        borders = [(where, at) for where in places for at in (where.inside() if label == "hold" else where.ends())]
        if len(borders) < args.spans:
            warnings.warn(f"only {len(borders)} borders for {label}: some are used again, with other pauses", stacklevel=1)
        order = [int(index) for _ in range(args.spans // len(borders) + 1) for index in rng.permutation(len(borders))]
        for index in order[: args.spans]:
            where, at = borders[index]
            sound, start, end = span(rng, where, at, label)
            steps = [
                ((event.step_idx + 1) * FRAME_SECONDS, event.prs)
                for _, event in trace(Listener(recogniser), sound).events  # type: ignore[arg-type]
                if isinstance(event, Step)
            ]
            spans.append({"id": where.name, "label": label, "start": start, "end": end, "steps": steps})
    result: dict[str, Any] = {}
    for head, horizon in enumerate(HORIZONS_SECONDS):
        if args.head in (None, head):
            rows = [{**item, "events": [(time, values[head]) for time, values in item["steps"]]} for item in spans]
            result[f"head {horizon:g} s"] = scorer.summary(rows)
            print(f"head {horizon:g} s   {json.dumps(result[f'head {horizon:g} s'])}")
            if args.save:
                args.save.write_text("".join(json.dumps({k: v for k, v in row.items() if k != "steps"}) + "\n" for row in rows))
    if args.calibration:
        print("\n".join(calibration(spans)))
    report.finish("embedded_turns", {**EMBEDDED, "seed": args.seed, "spans": args.spans, "result": result})


if __name__ == "__main__":
    main()
