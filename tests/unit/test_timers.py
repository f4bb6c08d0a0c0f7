"""The clocks of a connection, on a clock of the test's own."""

import pytest

from moshi_stt.config import LimitsConfig
from moshi_stt.server.timers import ClosingTimer, ConnectionTimers, Verdict, tick_seconds

LIMITS = LimitsConfig(ping_seconds=10, silent_seconds=20, idle_seconds=120, stuck_seconds=30)


def run(
    seconds: int, *, heard: bool = False, active: bool = False, unsent: int | None = None, half_closed: bool = False
) -> Verdict | None:
    """The first verdict within these seconds, looked at once a second."""
    patience = ConnectionTimers(LIMITS, 0.0)
    for now in range(1, seconds + 1):
        patience.note(now, heard=heard, active=active, unsent=unsent)
        verdict = patience.judge(now, half_closed=half_closed)
        if verdict is not None:
            return verdict
    return None


def kind(verdict: Verdict | None) -> str | None:
    return verdict.kind if verdict else None


def test_silence_is_judged_at_its_limit() -> None:
    assert run(19) is None
    assert kind(run(20)) == "silent"


def test_pongs_alone_last_until_the_idle_limit() -> None:
    assert run(119, heard=True) is None
    assert kind(run(120, heard=True)) == "idle"


def test_work_of_ours_is_not_the_clients_idleness() -> None:
    assert run(1000, heard=True, active=True) is None


def test_half_closed_client_need_not_be_heard() -> None:
    """It can say nothing; only that its transcript stands still counts."""
    assert run(119, half_closed=True) is None
    assert kind(run(120, half_closed=True)) == "idle"
    assert run(1000, half_closed=True, active=True) is None


def test_send_buffer_that_does_not_shrink_is_stuck() -> None:
    assert run(30, heard=True, active=True, unsent=1000) is None
    assert kind(run(31, heard=True, active=True, unsent=1000)) == "stuck"


def test_send_buffer_that_shrinks_is_slow_and_not_stuck() -> None:
    patience = ConnectionTimers(LIMITS, 0.0)
    for now in range(1, 500):
        patience.note(now, heard=True, active=True, unsent=100_000 - 100 * now)
        assert patience.judge(now, half_closed=False) is None


def test_pings_come_at_their_time_whatever_else_happens() -> None:
    patience = ConnectionTimers(LIMITS, 0.0)
    pings = []
    for now in range(1, 36):
        patience.note(now, heard=True, active=True, unsent=None)
        if patience.ping_due(now):
            patience.pinged(now)
            pings.append(now)
    assert pings == [10, 20, 30]


@pytest.mark.parametrize(("shortest", "tick"), [(10.0, 1.0), (0.8, 0.1), (0.01, 0.02)])
def test_tick_follows_the_shortest_limit(shortest: float, tick: float) -> None:
    limits = LimitsConfig(ping_seconds=shortest, silent_seconds=20, idle_seconds=120, stuck_seconds=30)
    assert tick_seconds(limits) == pytest.approx(tick)


def test_client_that_answers_nothing_is_cut_after_the_close() -> None:
    timer = ClosingTimer()
    assert not timer.expired(1e9, heard=False)  # nothing was closed yet
    timer.start(100.0)
    assert not timer.expired(104.9, heard=False)
    assert timer.expired(105.0, heard=False)


def test_client_amid_an_upload_has_longer_but_not_for_ever() -> None:
    timer = ClosingTimer()
    timer.start(100.0)
    for now in range(101, 130):
        assert not timer.expired(float(now), heard=True)
    assert timer.expired(130.0, heard=True)


def test_client_that_may_idle_is_held_to_its_pongs_alone() -> None:
    limits = LimitsConfig()
    timers = ConnectionTimers(limits, 0.0, may_idle=True)
    now = 10 * limits.idle_seconds
    timers.note(now, heard=True, active=False, unsent=None)
    assert timers.judge(now, half_closed=False) is None
    verdict = timers.judge(now + limits.silent_seconds, half_closed=False)
    assert verdict is not None
    assert verdict.kind == "silent"
