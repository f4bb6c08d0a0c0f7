"""How many live streams a server holds, by a public rule: which trial comes next, whether it passed, and what came of all.

The rule, fixed before the first run. A trial is N streams of equal length, each from a seeded place in a long recording,
arriving within 10 s, fed in real time, none replaced, in a fresh process with every context full. It passes if it was not
aborted (a stream more than 3 s behind), at most 0.1 % of the chunks of 80 ms were late, and 95 % of the streams had their last
word within 1 s of their end. The search: 60 s trials at N x 1.25 until one fails; halving the gap until it is within 5 %; then
120 s trials from the best N downward, 10 % less each time, at most 5. The answer is the largest N at which every trial passed,
one of 120 s among them. No load and no server is known here.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ARRIVAL_SECONDS = 10.0
ABORT_SECONDS = 3.0
MOST_LATE_SHARE = 0.001
MOST_FINAL_MS = 1_000.0
LONG, SHORT = 120, 60
MOST_STEPS = 5


@dataclass
class Trial:
    """One trial. late: chunks whose step came more than 80 ms after they were complete, of `chunks`. final_ms: percentiles of
    the time from a stream's end to its last word. more: whatever else was measured."""

    streams: int
    seconds: int
    seed: int
    aborted: str = ""
    late: int = 0
    chunks: int = 0
    final_ms: dict[str, float] = field(default_factory=dict)
    more: dict[str, Any] = field(default_factory=dict)

    @property
    def failed(self) -> str:
        """The rule that failed; empty where the trial passed."""
        if self.aborted:
            return f"aborted: {self.aborted}"
        if self.late > MOST_LATE_SHARE * self.chunks:
            return f"{self.late} of {self.chunks} chunks late ({self.late / self.chunks:.2%})"
        if not self.chunks:
            return "no chunk was heard"
        if self.final_ms.get("p95", 0.0) > MOST_FINAL_MS:
            return f"last words after {self.final_ms['p95']:.0f} ms (p95)"
        return ""


@dataclass
class Search:
    """The state of a search: its settings and its trials so far."""

    start: int
    settings: dict[str, Any]
    trials: list[Trial] = field(default_factory=list)

    def next(self) -> tuple[int, int] | None:
        """Streams and seconds of the next trial; None when the search is over."""
        passed, failed = self._short()
        if not self._short_is_over():
            if not passed and not failed:
                return self.start, SHORT
            if not passed:
                return max(1, int(min(failed) / 1.25)), SHORT
            if not failed:
                return -(-max(passed) * 5 // 4), SHORT
            return (max(passed) + min(failed)) // 2, SHORT
        long = [trial for trial in self.trials if trial.seconds == LONG]
        if not passed or any(not trial.failed for trial in long) or len(long) == MOST_STEPS:
            return None
        return max(1, int(max(passed) * 0.9 ** len(long))), LONG

    def _short(self) -> tuple[set[int], set[int]]:
        """The N whose 60 s trials all passed, below the first that failed; and those of which one failed."""
        short = [trial for trial in self.trials if trial.seconds == SHORT]
        failed = {trial.streams for trial in short if trial.failed}
        least = min(failed, default=1 << 62)
        return {trial.streams for trial in short if trial.streams < least}, failed

    def _short_is_over(self) -> bool:
        passed, failed = self._short()
        if not passed:
            return len(failed) >= MOST_STEPS
        return bool(failed) and (min(failed) - max(passed) <= max(1, 0.05 * max(passed)))

    def answer(self) -> int | None:
        """The largest N at which every trial passed, one of 120 s among them; None where there is none yet."""
        whole = [
            n for n in {trial.streams for trial in self.trials} if all(not t.failed for t in self.trials if t.streams == n)
        ]
        return max((n for n in whole if any(t.seconds == LONG for t in self.trials if t.streams == n)), default=None)

    def without_late(self, seconds: int) -> int | None:
        """The largest N with a trial of so many seconds that passed without a late chunk."""
        return max((t.streams for t in self.trials if t.seconds == seconds and not t.failed and not t.late), default=None)

    def table(self) -> str:
        """Every trial, and the answer."""
        lines = [f"{'streams':>7} {'s':>4} {'late / chunks':>20} {'final p50':>9} {'p95':>6}  "]
        for trial in self.trials:
            share = f"{trial.late} / {trial.chunks}"
            times = f"{trial.final_ms.get('p50', 0):9.0f} {trial.final_ms.get('p95', 0):6.0f}"
            lines.append(f"{trial.streams:7} {trial.seconds:4} {share:>20} {times}  {trial.failed or 'passed'}")
        following = self.next()
        if following is None:
            answer = self.answer()
            said = "no N held" if answer is None else f"{answer} streams, without the accuracy gate"
            lines.append(
                f"C120: {said}; without a late chunk: {self.without_late(SHORT)} (60 s), {self.without_late(LONG)} (120 s)"
            )
        else:
            lines.append(f"next: {following[0]} streams, {following[1]} s")
        return "\n".join(lines)

    def save(self, path: Path) -> None:
        document = asdict(self) | {"failed": [trial.failed for trial in self.trials], "answer": self.answer()}
        path.write_text(json.dumps(document, indent=1) + "\n")


def load(path: Path, start: int, settings: dict[str, Any]) -> Search:
    """The search in a file; a new one where there is none. Raises ValueError where the file's was made with other settings."""
    if not path.exists():
        return Search(start, settings)
    document = json.loads(path.read_text())
    if document["settings"] != settings:
        raise ValueError(f"{path} is a search with {document['settings']}, not with {settings}: name another file")
    return Search(document["start"], settings, [Trial(**trial) for trial in document["trials"]])
