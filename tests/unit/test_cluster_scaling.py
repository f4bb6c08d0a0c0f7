"""The number of replicas by scripted loads, and the order in which replicas come and go."""

from collections.abc import Iterable

import pytest

from moshi_stt.cluster.plan import Deeds, Member, next_deeds
from moshi_stt.cluster.readings import lag, parse
from moshi_stt.cluster.scaling import Load, Scaler


def play(
    script: Iterable[tuple[float, list[Load]]], *, minimum: int = 1, maximum: int = 8, start: int = 1
) -> list[tuple[float, int]]:
    """Changes of the target, with their times. script: times and loads."""
    scaler, current, changes = Scaler(minimum, maximum, 3.0, 60.0), start, []
    for now, loads in script:
        target = scaler.target(now, current, loads)
        if target != current:
            changes.append((now, target))
            current = target
    return changes


def steady(seconds: int, *loads: Load) -> list[tuple[float, list[Load]]]:
    return [(float(now), list(loads)) for now in range(seconds)]


def test_a_short_peak_adds_nothing() -> None:
    peak = [(0.0, [Load(10, 10)]), (2.0, [Load(10, 10)]), (2.5, [Load(5, 10)]), (5.0, [Load(10, 10)]), (7.5, [Load(10, 10)])]
    assert play(peak) == []


def test_a_need_that_lasts_adds_as_many_as_it_takes() -> None:
    assert play(steady(10, Load(10, 10))) == [(3.0, 2)]
    assert play(steady(10, *[Load(10, 10)] * 4), start=4) == [(3.0, 7)]
    assert play(steady(10, *[Load(10, 10)] * 4), start=4, maximum=5) == [(3.0, 5)]


def test_replicas_on_their_way_count_as_help() -> None:
    assert play(steady(100, Load(10, 10)), start=2) == []


def test_lag_adds_where_slots_are_free() -> None:
    assert play(steady(10, Load(2, 10, lag_seconds=3.0))) == [(3.0, 2)]
    assert play(steady(10, Load(2, 10, lag_seconds=1.0))) == []
    assert play(steady(100, Load(2, 10, 3.0), Load(2, 10), Load(2, 10)), start=3) == [], (
        "one late of three: no reason to add or remove"
    )


def test_one_goes_at_a_time_and_never_below_the_minimum() -> None:
    idle = [(float(now), [Load(0, 10)] * (3 if now <= 60 else 2 if now <= 120 else 1)) for now in range(400)]
    assert play(idle, start=3) == [(60.0, 2), (120.0, 1)]
    assert play(steady(400, Load(0, 10), Load(0, 10)), start=2, minimum=2) == []


@pytest.mark.parametrize("used", range(81))
@pytest.mark.parametrize("replicas", [1, 2, 3, 8])
def test_a_steady_load_makes_no_replica_come_and_go(used: int, replicas: int) -> None:
    """Hysteresis: whatever the load, the number settles."""
    scaler, current, changes = Scaler(1, 8, 3.0, 60.0), replicas, 0
    for now in range(2_000):
        each = min(10.0, used / current)
        target = scaler.target(float(now), current, [Load(round(each), 10)] * current)
        changes += now > 1_000 and target != current
        current = target
    assert changes == 0


def test_other_bounds_count_at_once() -> None:
    assert play(steady(1, Load(1, 10)), minimum=3) == [(0.0, 3)]
    assert play(steady(1, *[Load(1, 10)] * 5), maximum=2, start=5) == [(0.0, 2)]


def ready(name: str, revision: int = 1, used: int = 0) -> Member:
    return Member(name, revision, "ready", used)


def test_replicas_come_with_the_lowest_free_names() -> None:
    assert next_deeds([], 1, 2) == Deeds(add=("r0", "r1"))
    assert next_deeds([ready("r0"), ready("r2")], 1, 3) == Deeds(add=("r1",))
    assert next_deeds([ready("r0")._replace(is_draining=True)], 1, 1) == Deeds(add=("r1",)), (
        "one that leaves keeps its name until it is gone"
    )


def test_who_is_missed_least_goes() -> None:
    three = [ready("r0", used=1), ready("r1", used=5), ready("r2", used=1)]
    assert next_deeds(three, 1, 2) == Deeds(drain=("r2",))
    assert next_deeds([*three, Member("r3", 1, "failing", 9)], 1, 3) == Deeds(drain=("r3",))
    assert next_deeds(three, 1, 3) == Deeds()


def roll(members: list[Member], target: int) -> list[str]:
    """The deeds of a rolling restart to revision 2, each done at once; checks that enough are ready all the time."""
    done = []
    for _ in range(50):
        deeds = next_deeds(members, 2, target)
        if deeds == Deeds():
            return done
        done += [*(f"+{name}" for name in deeds.add), *(f"-{name}" for name in deeds.drain)]
        members = [member for member in members if member.name not in deeds.drain] + [ready(name, 2) for name in deeds.add]
        assert len([member for member in members if member.phase == "ready"]) >= target
    raise AssertionError(done)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_a_rolling_restart_adds_before_it_removes(count: int) -> None:
    done = roll([ready(f"r{number}") for number in range(count)], count)
    assert [deed[0] for deed in done] == ["+", "-"] * count
    assert len({deed[1:] for deed in done if deed[0] == "-"}) == count


def test_a_new_replica_that_does_not_get_ready_stops_a_rolling_restart() -> None:
    members = [ready("r0"), ready("r1"), Member("r2", 2, "failing")]
    assert next_deeds(members, 2, 2) == Deeds()
    assert next_deeds([*members[:2], Member("r2", 2, "pending", pending_seconds=1.0)], 2, 2) == Deeds()


def test_without_room_for_one_more_an_old_one_makes_room() -> None:
    waiting = Member("r2", 2, "pending", pending_seconds=30.0)
    assert next_deeds([ready("r0"), ready("r1"), waiting], 2, 2, 30.0) == Deeds(drain=("r1",))
    leaving = ready("r1")._replace(is_draining=True)
    assert next_deeds([ready("r0"), leaving, waiting], 2, 2, 30.0) == Deeds()


METRICS = """\
# HELP moshi_stt_lag_seconds x
# TYPE moshi_stt_lag_seconds histogram
moshi_stt_lag_seconds_bucket{le="0.5"} 90
moshi_stt_lag_seconds_bucket{le="2"} 99
moshi_stt_lag_seconds_bucket{le="+Inf"} 100
moshi_stt_lag_seconds_sum 12
moshi_stt_lag_seconds_count 100
moshi_stt_ready{module="a"} 1
moshi_stt_ready{module="b"} 1
moshi_stt_total_slots{module="a"} 64
moshi_stt_total_slots{module="b"} 4
moshi_stt_used_slots{module="a"} 3
moshi_stt_used_slots{module="b"} 4
"""


def test_readings_are_sums_over_modules() -> None:
    found = parse(METRICS)
    assert (found.is_ready, found.used, found.total) == (True, 7, 68)
    assert not parse(METRICS.replace('ready{module="b"} 1', 'ready{module="b"} 0')).is_ready
    assert not parse("").is_ready


def test_lag_is_that_of_the_last_seconds() -> None:
    now = parse(METRICS).buckets
    assert lag({}, now) == 2.0
    assert lag(now, now) == 0.0
    later = {bound: count + more for (bound, count), more in zip(now.items(), (20, 20, 20), strict=True)}
    assert lag(now, later) == 0.5
    beyond = {bound: count + more for (bound, count), more in zip(now.items(), (0, 0, 20), strict=True)}
    assert lag(now, beyond) == 4.0
    assert lag(later, now) == 2.0, "a server that was started again counts from 0"
