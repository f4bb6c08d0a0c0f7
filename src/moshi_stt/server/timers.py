"""How long a connection waits for its client: told what happened, with the time, it says what is due.

Only time in which we really wait for the client counts: not while its socket is left unread because its inbox is full, and
not while we still have its audio to work on.
"""

from dataclasses import dataclass

from moshi_stt.config import LimitsConfig
from moshi_stt.server import framing

FULL_SECONDS = 10.0
"""How long the spool may be full before the stream ends: less than clients wait for an answer to their pings."""

CLOSE_SECONDS = 5.0
"""How long the client has to answer our Close, counted again from whatever else still comes of it before."""

LONGEST_CLOSE_SECONDS = 30.0
"""How long at most."""


TOTAL = "total"
"""Kind of the verdict on a stream that has lasted as long as it may."""


def total_sentence(limits: LimitsConfig) -> str:
    """Why a stream that has lasted as long as it may ends."""
    return f"the stream has lasted {limits.stream_seconds:g} s, which is all that stream_seconds allows: start a new one"


@dataclass(frozen=True)
class Verdict:
    """Why a connection must end. kind: label of the error count. code: WebSocket status."""

    kind: str
    sentence: str
    code: int


class ConnectionTimers:
    """Those of one connection until our Close is sent."""

    def __init__(self, limits: LimitsConfig, now: float, *, may_idle: bool = False, opened: float | None = None) -> None:
        """may_idle: the client may do nothing for as long as it likes, if only it answers pings. opened: when the stream
        began, where that was before now: its client has come back to it.
        """
        self._limits = limits
        self._opened = now if opened is None else opened
        self._may_idle = may_idle
        self._heard = now
        """When anything at all came last."""
        self._active = now
        """When a binary message came or went last, or we were busy."""
        self._pinged = now
        self._stuck: float | None = None
        """Since when the send buffer has been full without shrinking."""
        self._unsent = 0
        self._full: float | None = None
        """Since when the spool has had no room."""
        self._ahead = 0

    def pinged(self, now: float) -> None:
        self._pinged = now

    def ping_due(self, now: float) -> bool:
        return now - self._pinged >= self._limits.ping_seconds

    def note(self, now: float, *, heard: bool, active: bool, unsent: int | None, ahead: int | None = None) -> None:
        """Since the last call: whether the client was heard (or could not be), whether it was active (or we busy).

        unsent: bytes in the send buffer while it is too full to be written to, else None. ahead: bytes that wait for
        recognition while the spool has no room for more, else None.
        """
        if heard:
            self._heard = now
        if active:
            self._active = now
        if unsent is None:
            self._stuck = None
        elif self._stuck is None or unsent < self._unsent:
            self._stuck = now
        self._unsent = unsent or 0
        if ahead is None:
            self._full = None
        elif self._full is None:
            self._full = now
        self._ahead = ahead or 0

    def judge(self, now: float, *, half_closed: bool, finishing: bool = False) -> Verdict | None:
        """What the connection must be ended for, if anything.

        half_closed: the client can say no more, and need not. finishing: nothing more is taken of it, and what it sent has
        `drain_seconds` more to be transcribed.
        """
        limits = self._limits
        if 0 < limits.stream_seconds <= now - self._opened - (limits.drain_seconds if finishing else 0.0):
            return Verdict(TOTAL, total_sentence(limits), framing.POLICY)
        if self._full is not None and now - self._full >= FULL_SECONDS:
            held = (
                f"{self._ahead} bytes of audio wait for recognition, which is all that spool_bytes and spool_total_bytes allow"
            )
            return Verdict("ahead", f"{held}: send more slowly", framing.POLICY)
        if self._stuck is not None and now - self._stuck >= limits.stuck_seconds:
            sentence = f"nothing was read for {limits.stuck_seconds:g} s: read the socket while you write to it"
            return Verdict("stuck", sentence, framing.POLICY)
        if half_closed:
            if now - self._active >= limits.idle_seconds:
                return Verdict("idle", "the rest of the transcript did not come in time", framing.INTERNAL)
            return None
        if now - self._heard >= limits.silent_seconds:
            sentence = f"nothing came from the client for {limits.silent_seconds:g} s, not even an answer to a ping"
            return Verdict("silent", sentence, framing.POLICY)
        if now - self._active >= limits.idle_seconds and not self._may_idle:
            return Verdict("idle", f"no audio, marker or init came for {limits.idle_seconds:g} s", framing.POLICY)
        return None


class ClosingTimer:
    """How long the client has for its answer to our Close."""

    def __init__(self) -> None:
        self._deadline = self._last_deadline = float("inf")

    def start(self, now: float) -> None:
        self._deadline = now + CLOSE_SECONDS
        self._last_deadline = now + LONGEST_CLOSE_SECONDS

    def expired(self, now: float, *, heard: bool) -> bool:
        """heard: whether anything came since the last call: a client amid an upload sees our Close when it has sent it."""
        if heard:
            self._deadline = min(now + CLOSE_SECONDS, self._last_deadline)
        return now >= self._deadline


def tick_seconds(limits: LimitsConfig) -> float:
    """How often the clocks are looked at: an eighth of the shortest limit, between 20 ms and 1 s."""
    total = limits.stream_seconds or limits.idle_seconds
    shortest = min(limits.ping_seconds, limits.silent_seconds, limits.idle_seconds, limits.stuck_seconds, total)
    return min(1.0, max(0.02, shortest / 8))
