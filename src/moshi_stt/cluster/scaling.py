"""How many replicas there should be: free slots and lag decide, with hysteresis. No I/O, no clock of its own."""

import math
from collections.abc import Sequence
from typing import NamedTuple

USUAL_LOAD = 0.6
"""Share of the slots that are in use after a change: what the number of replicas aims at."""

HIGH_LOAD = 0.8
"""Beyond it there are too few replicas."""

LOW_LOAD = 0.5
"""Below it, counted over one replica fewer, there are too many. So far below HIGH_LOAD that what goes does not come back."""

LAG_SECONDS = 2.0
"""A replica whose events come later than this has more streams than it can carry, whatever its slots say."""


class Load(NamedTuple):
    """One replica that takes new streams. total: 0 while its slots are not known yet."""

    used: int
    total: int
    lag_seconds: float = 0.0


class Scaler:
    """Feed it the load now and then. It asks for more after `up_after` seconds without a break in which there were too few, and
    for one fewer after `down_after` seconds in which there were too many.
    """

    def __init__(self, minimum: int, maximum: int, up_after: float, down_after: float) -> None:
        """Seconds. minimum, maximum: replicas."""
        self.minimum, self.maximum = minimum, maximum
        self._up_after, self._down_after = up_after, down_after
        self._high_since: float | None = None
        self._low_since: float | None = None

    def target(self, now: float, current: int, loads: Sequence[Load]) -> int:
        """Replicas that there should be.

        now: seconds of a clock that never goes back. current: the target so far. loads: the replicas that are ready. As long as
        fewer are ready than there should be, nothing is added: those that are on their way count as help that comes.
        """
        if not self.minimum <= current <= self.maximum:
            self._high_since = self._low_since = None
            return min(max(current, self.minimum), self.maximum)
        used, total = sum(load.used for load in loads), sum(load.total for load in loads)
        if not total:
            self._high_since = self._low_since = None
            return current
        each = total / len(loads)
        late = sum(load.lag_seconds > LAG_SECONDS for load in loads)
        is_high = used > HIGH_LOAD * total or 2 * late > len(loads)
        is_low = not late and used <= LOW_LOAD * (total - each)
        self._high_since = _since(self._high_since, is_high, now)
        self._low_since = _since(self._low_since, is_low, now)
        if self._high_since is not None and now - self._high_since >= self._up_after:
            if len(loads) < current or current >= self.maximum:
                return current
            self._high_since = None
            return min(self.maximum, max(current + 1, math.ceil(used / (USUAL_LOAD * each))))
        if self._low_since is not None and now - self._low_since >= self._down_after and len(loads) >= current > self.minimum:
            self._low_since = now  # the next one goes after as long again
            return current - 1
        return current


def _since(since: float | None, is_so: bool, now: float) -> float | None:
    if not is_so:
        return None
    return now if since is None else since
