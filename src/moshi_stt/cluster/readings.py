"""What a replica's `/metrics` say of its slots and of how far it lags. No I/O."""

import math
import re
from typing import NamedTuple

LINE = re.compile(r"^(moshi_stt_(?:used_slots|total_slots|ready|lag_seconds_bucket))(?:\{(.*)\})? (\S+)$", re.M)
BOUND = re.compile(r'\ble="([^"]+)"')
SHARE = 0.95


class Readings(NamedTuple):
    """is_ready: every model is warm and not failed. buckets: events since the start that had at most so many seconds of lag."""

    is_ready: bool
    used: int
    total: int
    buckets: dict[float, float]


def parse(text: str) -> Readings:
    """Sums over all modules and devices."""
    used = total = 0
    ready: list[float] = []
    buckets: dict[float, float] = {}
    for name, labels, value in LINE.findall(text):
        number = float(value)
        if name == "moshi_stt_used_slots":
            used += int(number)
        elif name == "moshi_stt_total_slots":
            total += int(number)
        elif name == "moshi_stt_ready":
            ready.append(number)
        else:
            found = BOUND.search(labels)
            if found is not None:
                bound = math.inf if found[1] == "+Inf" else float(found[1])
                buckets[bound] = buckets.get(bound, 0.0) + number
    return Readings(bool(ready) and all(ready), used, total, buckets)


def lag(before: dict[float, float], now: dict[float, float]) -> float:
    """95th percentile, in seconds, of the lags between two readings: the upper bound of its bucket.

    It is 0 where there were no events, and beyond the last bound twice that bound. A server that was started again counts
    from 0.
    """
    counts = {bound: count - before.get(bound, 0.0) for bound, count in now.items()}
    if any(count < 0 for count in counts.values()):
        counts = now
    total = counts.get(math.inf, 0.0)
    if total <= 0:
        return 0.0
    finite = [bound for bound in sorted(counts) if math.isfinite(bound)]
    for bound in finite:
        if counts[bound] >= SHARE * total:
            return bound
    return 2 * finite[-1] if finite else 0.0
