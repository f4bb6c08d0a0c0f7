"""What to do next so that the replicas become what they shall be. No I/O: members in, deeds out, asked again and again."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from moshi_stt.cluster.spec import MOST_REPLICAS, Phase, number_of


class Member(NamedTuple):
    """A replica as the controller sees it. pending_seconds: how long Ray has been looking for a place."""

    name: str
    revision: int
    phase: Phase
    used: int = 0
    is_draining: bool = False
    pending_seconds: float = 0.0


class Deeds(NamedTuple):
    """add: names of new replicas. drain: names of those that shall take nothing new, and go."""

    add: tuple[str, ...] = ()
    drain: tuple[str, ...] = ()


def next_deeds(members: Sequence[Member], revision: int, target: int, place_seconds: float = math.inf) -> Deeds:
    """The deeds that are due now. place_seconds: how long a replica may wait for a place before an old one makes room for it.

    Replicas of an older revision are replaced one at a time: a new one first, and when it is ready an old one goes.
    """
    staying = [member for member in members if not member.is_draining]
    old = [member for member in staying if member.revision < revision]
    new = [member for member in staying if member.revision >= revision]
    surplus = len(staying) - target
    if not old:
        if surplus < 0:
            return Deeds(add=_free_names(members, -surplus))
        return Deeds(drain=_leaving(staying, surplus))
    if surplus > 1:
        return Deeds(drain=_leaving(old, min(surplus - 1, len(old))))
    unready = [member for member in new if member.phase not in ("ready", "away")]
    if unready:
        stuck = all(member.phase == "pending" and member.pending_seconds >= place_seconds for member in unready)
        is_any_leaving = len(staying) < len(members)
        return Deeds(drain=_leaving(old, 1)) if stuck and surplus > 0 and not is_any_leaving else Deeds()
    if surplus > 0:
        return Deeds(drain=_leaving(old, 1))
    return Deeds(add=_free_names(members, 1 - surplus if surplus < 0 else 1))


def _leaving(members: Sequence[Member], count: int) -> tuple[str, ...]:
    """Those that are missed least: not ready ones first, then those with the fewest streams, then the newest."""
    ranked = sorted(members, key=lambda member: (member.phase == "ready", member.used, -number_of(member.name)))
    return tuple(member.name for member in ranked[:count])


def _free_names(members: Sequence[Member], count: int) -> tuple[str, ...]:
    taken = {member.name for member in members}
    names = (f"r{number}" for number in range(MOST_REPLICAS))
    return tuple([name for name in names if name not in taken][:count])
