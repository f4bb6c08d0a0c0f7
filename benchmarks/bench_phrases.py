#!/usr/bin/env python3
"""Live streams of real speech through the real server, with the small model that ships: late frames, lag and word errors.

    bench_phrases.py CLIPS [--streams 64] [--seconds 120] [--config phrases] [--out FILE]

CLIPS holds what `training.synthesise` and `training.human` wrote; only held-out clips are played. First one stream alone, then
all of them at once, the first one among them; each sends 80 ms every 80 ms, at its own moment. A frame is late when its `Step`
comes back more than 80 ms after its last sample was due. The processor time of the server and of this client is given in cores:
on a machine that is busy otherwise it says more than the lag. Prints a table and, as its last line, one JSON document.
"""

import argparse
import asyncio
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import report

sys.path.insert(0, str(Path(__file__).parents[1]))

from training.material import SETS, Row, speech_rows
from training.report import word_error
from training.servers import FRAME_RATE, Session, our_server, send
from training.tokenizer import pieces_of

LATE_SECONDS = 0.08
TOKENIZER = Path(__file__).parents[1] / "src/moshi_stt/data/phrases/tokenizer.model"


def recordings(clips: Path, streams: int, seconds: float, seed: int) -> list[Row]:
    """One recording for each stream, of every kind of speech in turn."""
    sets = speech_rows(clips, pieces_of(TOKENIZER), -(-streams // len(SETS)), seconds, seed)
    return [row for rows in zip(*sets.values(), strict=True) for row in rows][:streams]


async def live(url: str, rows: Sequence[Row], seed: int) -> list[Session]:
    """Every recording at the pace of speech, beginning within the first second."""
    rng = np.random.default_rng(seed)

    async def one(row: Row, wait: float) -> Session:
        await asyncio.sleep(wait)
        return await send(url, row.pcm, live=True)

    return await asyncio.gather(*(one(row, float(rng.uniform(0, 1))) for row in rows))


def played(url: str, rows: Sequence[Row], seed: int) -> tuple[list[Session], dict[str, float]]:
    """The sessions of `live`, and the cores that server and client used meanwhile."""
    begun, server, client = time.monotonic(), server_seconds(), time.process_time()
    sessions = asyncio.run(live(url, rows, seed))
    wall = time.monotonic() - begun
    used = {"server": server_seconds() - server, "client": time.process_time() - client}
    return sessions, {name: round(seconds / wall, 3) for name, seconds in used.items()}


def server_seconds() -> float:
    """Processor time of the processes that this one started, and of theirs, so far; 0 where there is no /proc."""
    parents, seconds = {}, {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        parents[int(path.parent.name)] = int(fields[1])
        seconds[int(path.parent.name)] = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    ours = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in ours} - ours:
        ours |= more
    return sum(seconds[pid] for pid in ours - {os.getpid()})


def lags(sessions: Sequence[Session]) -> np.ndarray:
    """Milliseconds from when a frame's last sample was due to its `Step`, of all streams."""
    pairs = [(arrived, due) for s in sessions for arrived, due in zip(s.arrived, s.sent, strict=False)]
    arrived, due = np.array(pairs).T
    return 1e3 * (arrived - due)


def summary(rows: Sequence[Row], sessions: Sequence[Session], cores: dict[str, float]) -> dict[str, Any]:
    """cores: those that were used meanwhile."""
    found = lags(sessions)
    return {
        "streams": len(rows),
        "frames": len(found),
        "late": int((found > 1e3 * LATE_SECONDS).sum()),
        "lag_ms": {f"p{share}": round(float(np.percentile(found, share)), 1) for share in (50, 95, 99, 100)},
        "words": sum(len(row.said) for row in rows),
        "word_error": round(word_error(rows, sessions), 4),
        "cores": cores,
    }


def line(name: str, result: dict[str, Any]) -> str:
    lag = result["lag_ms"]
    return (
        f"{name}: {result['late']} of {result['frames']} frames late; lag {lag['p50']:.0f} ms in the median, "
        f"{lag['p99']:.0f} ms at 99 %, {lag['p100']:.0f} ms at most; "
        f"{result['word_error']:.1%} errors in {result['words']} words; "
        f"the server used {result['cores']['server']:.2f} cores, this client {result['cores']['client']:.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clips", type=Path)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--config", default="phrases")
    parser.add_argument("--seed", type=int, default=21)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows = recordings(args.clips, args.streams, args.seconds, args.seed)
    with tempfile.TemporaryDirectory() as folder, our_server(args.config, Path(folder)) as url:
        alone, one = played(url, rows[:1], args.seed)
        together, all_of_them = played(url, rows, args.seed)
    result = {
        "seconds": args.seconds,
        "seconds_sent": round(len(together[0].pauses) / FRAME_RATE, 1),
        "alone": summary(rows[:1], alone, one),
        "the_same_among_all": summary(rows[:1], together[:1], all_of_them),
        "all": summary(rows, together, all_of_them),
        "same_words": together[0].words == alone[0].words,
        "same_pauses": together[0].pauses == alone[0].pauses,
    }
    print(line("one stream alone", result["alone"]))
    print(line(f"the same among {args.streams}", result["the_same_among_all"]))
    print(line(f"all {args.streams} streams", result["all"]))
    equal = "equal" if result["same_words"] and result["same_pauses"] else "NOT EQUAL"
    print(f"words, times and pause values of the first stream, alone and among {args.streams}: {equal}")
    report.finish("phrases_live", result, args.out)


if __name__ == "__main__":
    main()
