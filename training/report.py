"""What the small model can do, measured through the server's WebSocket, frame by frame; writes the card's table.

    python -m training.report --clips DATA/clips [--card MODEL_CARD.md] [--eot-score eot_score.py]
    python -m training.report --clips DATA/clips --variants all [--card MODEL_CARD.md]

Word errors on held-out clips joined at known times, without and with noise; errors of word times; the pause heads' areas under
the ROC, and what can be foreseen at most; turns found, and scored as eot-bench does; words heard in silence, noise, music and
babble.
"""

import argparse
import importlib.util
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moshi_stt.config_load import shipped_text
from moshi_stt.engine.turns import HeadPauses, TurnDetector
from moshi_stt.events import EndOfTurn, EndWord, Pause, Word
from training.compose import FRAME_RATE, HORIZONS, TRAINING
from training.emulate import EMULATED
from training.foresight import foreseen
from training.material import SETS, Row, noisy, speech_rows, turn_rows, wordless
from training.score import pairs
from training.servers import Session, ask, our_server
from training.tokenizer import pieces_of

DELAY_SECONDS = 6 / FRAME_RATE
NOISE_DB = 10.0
TOGETHER = 48
MARK, VARIANTS_MARK = "<!-- measured -->", "<!-- variants -->"
Lines = list[tuple[str, str]]

VARIANTS = {
    "bf16": 'dtype_override = "bf16"',
    "int8": 'quantize = "int8"',
    "int4": 'quantize = "int4"',
    "kv bf16": 'kv_dtype = "bf16"',
}
"""Lines of a module's configuration, by what they change. What needs a GPU is emulated: see `training.emulate`."""
AS_SHIPPED = "as shipped"


def variant(name: str, folder: Path) -> str:
    """A configuration file of `phrases` with one thing changed."""
    line, text = VARIANTS[name], shipped_text("phrases")
    if line.startswith("dtype_override"):
        text = text.replace("temperature = 0.0", f"temperature = 0.0\n{line}")
    else:
        text = text.replace(
            "[modules.asr.moshi_stt.encoder]", f"[modules.asr.moshi_stt]\n{line}\n\n[modules.asr.moshi_stt.encoder]"
        )
    path = folder / "variant.toml"
    path.write_text(text)
    return str(path)


def word_error(rows: Sequence[Row], sessions: Sequence[Session]) -> float:
    wrong = total = 0
    for row, session in zip(rows, sessions, strict=True):
        matched = pairs([word for word, _, _ in row.said], session.text)
        right = sum(row.said[i][0] == session.text[j] for i, j in matched)
        wrong += len(row.said) + len(session.text) - len(matched) - right
        total += len(row.said)
    return wrong / max(1, total)


def time_errors(rows: Sequence[Row], sessions: Sequence[Session]) -> tuple[list[float], list[float]]:
    """Seconds by which right words start and end late."""
    starts, ends = [], []
    for row, session in zip(rows, sessions, strict=True):
        for i, j in pairs([word for word, _, _ in row.said], session.text):
            (said, start, end), (heard, began, ended) = row.said[i], session.words[j]
            if said == heard:
                starts.append(began - start)
                if ended is not None:
                    ends.append(ended - end)
    return starts, ends


def roc_area(scores: np.ndarray[Any, Any], truth: np.ndarray[Any, Any]) -> float:
    from scipy.stats import rankdata

    positive = int(truth.sum())
    ranks = float(rankdata(scores)[truth].sum())
    return (ranks - positive * (positive + 1) / 2) / (positive * (len(truth) - positive))


def pause_areas(rows: Sequence[Row], scores: Sequence[np.ndarray[Any, Any]]) -> str:
    """For each head, over all frames of all rows. scores: (T, heads) of each row."""
    heads = np.concatenate([some[: len(row.pauses)] for row, some in zip(rows, scores, strict=True)])
    truth = np.concatenate([row.pauses[: len(some)] for row, some in zip(rows, scores, strict=True)])
    return ", ".join(f"{roc_area(heads[:, i], truth[:, i]):.3f}" for i in range(len(HORIZONS)))


def pause_line(
    args: argparse.Namespace, what: str, sets: dict[str, list[Row]], sessions: Sequence[Session], turns: float | None
) -> tuple[str, str]:
    """The heads' areas, and those of a listener who hears every word perfectly. turns: as the rows were drawn."""
    rows = list(chain(*sets.values()))
    listener = foreseen(args.clips, pieces_of(args.tokenizer), rows, args.seconds, turns)
    heads = pause_areas(rows, [np.array(session.pauses) for session in sessions])
    horizons = ", ".join(f"{horizon:g}" for horizon in HORIZONS)
    return f"pause heads ({horizons} s), area under the ROC, {what}", f"{heads}; perfect hearing: {pause_areas(rows, listener)}"


class Moment(NamedTuple):
    """After one step. time: seconds heard. silence: since somebody spoke, by the pause heads. ended: the turn, here."""

    time: float
    silence: float
    confidence: float
    ended: bool


def moments(session: Session) -> Iterator[Moment]:
    """What the server makes of each step."""
    heads, turns = HeadPauses(), TurnDetector()
    for number, (pause, words) in enumerate(zip(session.pauses, session.said_at, strict=True)):
        time = (number + 1) / FRAME_RATE
        for text, start, end in words:
            turns.take(Word(text, start) if end is None else EndWord(end))
        silence = heads.push(pause)
        events = turns.take(Pause(round(time, 3), max(0.0, time - DELAY_SECONDS), silence, tuple(pause)))
        yield Moment(round(time, 3), silence, turns.confidence, any(isinstance(event, EndOfTurn) for event in events))


def ends_found(turns: Sequence[tuple[str, float, float, Any]], sessions: Sequence[Session]) -> Lines:
    """How many ends are found within 0.3 s of the end of speech + 0.5 s + the model's delay, by two rules."""
    rules: dict[str, Callable[[Moment], bool]] = {
        "by 0.5 s of silence of the pause heads": lambda moment: 0.5 <= moment.silence < np.inf,
        "by the turn detector": lambda moment: moment.ended,
    }
    ends = [(turn[1], list(moments(session))) for turn, session in zip(turns, sessions, strict=True) if turn[0] == "eot"]
    lines: Lines = []
    for name, holds in rules.items():
        late = np.array([next((m.time - start for m in steps if m.time > start and holds(m)), np.inf) for start, steps in ends])
        share = np.mean(late <= 0.5 + DELAY_SECONDS + 0.3)
        lines.append(
            (
                f"ends of turns found in time, {name}",
                f"{share:.0%} of {len(ends)}; {np.median(late):.2f} s after the end in the median",
            )
        )
    return lines


def eot_scores(turns: Sequence[tuple[str, float, float, Any]], sessions: Sequence[Session], scorer: Path) -> Lines:
    spec = importlib.util.spec_from_file_location("eot_score", scorer)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def spans(head: int | None) -> list[dict[str, Any]]:
        return [
            {
                "id": str(i),
                "label": label,
                "start": start,
                "end": end,
                "events": [
                    (moment.time, moment.confidence if head is None else session.pauses[n][head])
                    for n, moment in enumerate(moments(session))
                ],
            }
            for i, ((label, start, end, _), session) in enumerate(zip(turns, sessions, strict=True))
        ]

    lines: Lines = []
    for name, head in (("turn detector", None), *((f"pause head {h:g} s alone", i) for i, h in enumerate(HORIZONS[:3]))):
        result = module.summary(spans(head))
        lines.append((f"end of turn, {name}", four(result["model"])))
    return [*lines, ("end of turn, silence only", four(result["silence_only"]))]


def four(numbers: dict[str, float | None]) -> str:
    def show(key: str, scale: float, unit: str) -> str:
        value = numbers[key]
        return "–" if value is None else f"{value * scale:.0f} {unit}"

    cut = f"{show('cutoff_at_300ms', 100, '%')} / {show('cutoff_at_600ms', 100, '%')} cut off at 300 / 600 ms"
    return f"{cut}, {show('latency_at_5pct', 1_000, 'ms')} / {show('latency_at_10pct', 1_000, 'ms')} at 5 / 10 %"


def speech_lines(url: str, sets: dict[str, list[Row]], decibels: float | None) -> tuple[Lines, dict[str, list[Session]]]:
    names = list(sets)
    rows = [row if decibels is None else noisy(row, decibels, i) for i, row in enumerate(list(chain(*sets.values())))]
    sessions = ask(url, [row.pcm for row in rows], TOGETHER)
    found: dict[str, list[Session]] = {}
    lines: Lines = []
    for name in names:
        found[name], sessions = sessions[: len(sets[name])], sessions[len(sets[name]) :]
        words = sum(len(row.said) for row in sets[name])
        what = f"{SETS[name]} ({words} words)" if decibels is None else f"{SETS[name]}, noise {decibels:g} dB below"
        lines.append((what, f"{word_error(sets[name], found[name]):.1%} word errors"))
    return lines, found


def time_lines(sets: dict[str, list[Row]], found: dict[str, list[Session]]) -> Lines:
    rows, sessions = list(chain(*sets.values())), list(chain(*found.values()))
    lines = []
    for name, errors in zip(("starts", "ends"), time_errors(rows, sessions), strict=True):
        off = np.abs(errors)
        lines.append(
            (
                f"word {name}",
                f"{np.median(off) * 1e3:.0f} ms off in the median, {np.mean(off <= 2 / FRAME_RATE):.0%} within two frames",
            )
        )
    return lines


def measure_speech(args: argparse.Namespace, url: str) -> Lines:
    sets = speech_rows(args.clips, pieces_of(args.tokenizer), args.rows, args.seconds, args.seed)
    lines, found = speech_lines(url, sets, None)
    show(lines)
    timed = time_lines(sets, found)
    show(timed)
    loud, _ = speech_lines(url, sets, NOISE_DB)
    show(loud)
    return lines + loud + timed + measure_pauses(args, url, sets, list(chain(*found.values())))


def measure_pauses(args: argparse.Namespace, url: str, even: dict[str, list[Row]], sessions: Sequence[Session]) -> Lines:
    """even: rows whose pauses were drawn evenly, with their sessions."""
    turns = TRAINING.turns
    like = speech_rows(args.clips, pieces_of(args.tokenizer), args.rows, args.seconds, args.seed, turns)
    answers = ask(url, [row.pcm for row in chain(*like.values())], TOGETHER)
    lines = [
        pause_line(args, "pauses like people's", like, answers, turns),
        pause_line(args, "pauses drawn evenly up to 4 s", even, sessions, None),
    ]
    show(lines)
    return lines


def measure_turns(args: argparse.Namespace, url: str) -> Lines:
    turns = turn_rows(args.clips, args.turns, args.seed)
    sessions = ask(url, [turn[3] for turn in turns], TOGETHER)
    lines = ends_found(turns, sessions)
    if args.eot_score is not None:
        lines += eot_scores(turns, sessions, args.eot_score)
    show(lines)
    return lines


def measure_wordless(args: argparse.Namespace, url: str) -> Lines:
    kinds = wordless(args.clips, args.noise_rows, 30.0, args.seed)
    sessions = ask(url, list(chain(*kinds.values())), TOGETHER)
    minutes = args.noise_rows / 2
    lines: Lines = []
    for kind in kinds:
        here, sessions = sessions[: args.noise_rows], sessions[args.noise_rows :]
        words = sum(len(session.words) for session in here)
        lines.append((f"words in {minutes:g} minutes of {kind}", f"{words / minutes:.1f} a minute"))
    show(lines)
    return lines


PARTS = {"speech": measure_speech, "turns": measure_turns, "wordless": measure_wordless}


def measure(args: argparse.Namespace, folder: Path) -> Lines:
    with our_server("phrases", folder) as url:
        return [line for part in args.parts.split(",") for line in PARTS[part](args, url)]


def measure_variants(args: argparse.Namespace, folder: Path) -> list[list[str]]:
    """For each variant its name and the word errors of each set."""
    sets = speech_rows(args.clips, pieces_of(args.tokenizer), args.rows, args.seconds, args.seed)
    names = [AS_SHIPPED, *VARIANTS, *EMULATED] if args.variants == "all" else args.variants.split(",")
    table: list[list[str]] = [["", *(f"{SETS[kind]} ({sum(len(row.said) for row in sets[kind])} words)" for kind in sets)]]
    for name in names:
        config = variant(name, folder) if name in VARIANTS else "phrases"
        emulated = name if name in EMULATED else ""
        with our_server(config, folder, emulated=emulated) as url:
            found, _ = speech_lines(url, sets, None)
        label = f"{name} (emulated)" if emulated else name
        table.append([label, *(text.removesuffix(" word errors") for _, text in found)])
        print(" | ".join(table[-1]), flush=True)
    return table


def show(lines: Lines) -> None:
    for what, value in lines:
        print(f"{what}: {value}", flush=True)


def write_card(path: Path, mark: str, rows: Sequence[Sequence[str]]) -> None:
    """Put a table after one of the card's marks, in place of the one that stands there. rows: the first is the head."""
    before, found, after = path.read_text(encoding="utf-8").partition(mark)
    if not found:
        raise SystemExit(f"{path} has no line {mark} after which the table could stand: add one")
    rest = after.lstrip("\n").splitlines(keepends=True)
    while rest and rest[0].startswith("|"):
        del rest[0]
    head, *body = ["| " + " | ".join(row) + " |" for row in rows]
    table = "\n".join([head, "|---" * len(rows[0]) + "|", *body])
    path.write_text(f"{before}{mark}\n\n{table}\n{''.join(rest)}", encoding="utf-8")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, default=Path("src/moshi_stt/data/phrases/tokenizer.model"))
    parser.add_argument("--rows", type=int, default=12, help="of each set")
    parser.add_argument("--seconds", type=float, default=16.0, help="of each row")
    parser.add_argument("--turns", type=int, default=48, help="holds, and ends, each")
    parser.add_argument("--noise-rows", type=int, default=15, help="of 30 s, of each kind of sound")
    parser.add_argument("--seed", type=int, default=11)
    parser.add_argument("--eot-score", type=Path, help="the scorer whose `summary(spans)` gives eot-bench's four numbers")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--card", type=Path, help="write the table into this file")
    names = ", ".join([AS_SHIPPED, *VARIANTS, *EMULATED])
    parser.add_argument("--variants", help=f"word errors of these alone, or of all: {names}")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        if args.variants:
            table = measure_variants(args, Path(folder))
            if args.card is not None:
                write_card(args.card, VARIANTS_MARK, table)
            return
        lines = measure(args, Path(folder))
    if args.card is not None:
        write_card(args.card, MARK, [("measured", ""), *lines])
    print(json.dumps(dict(lines), ensure_ascii=False))


if __name__ == "__main__":
    main()
