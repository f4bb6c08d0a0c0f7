"""The controller: makes the replicas what `cluster up`, `scale` and `restart` asked for, and tells the front.

Ray is in `actors.py`. The controller holds nothing that it could not find again: what shall be is in a file, and what there is
it asks the replicas. So it may die at any time.
"""

import asyncio
import logging
import os
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

import msgspec

from moshi_stt.cluster import front, plan, process
from moshi_stt.cluster.balancer import Running
from moshi_stt.cluster.replica import GRACE_SECONDS
from moshi_stt.cluster.scaling import Load, Scaler
from moshi_stt.cluster.spec import ClusterSpec, Fleet, Paths, Report, Server, number_of, write_json
from moshi_stt.errors import MoshiSttError

log = logging.getLogger(__name__)

TICK_SECONDS = 0.5
RECOVERY_SECONDS = 15.0
"""After its start it waits so long for the replicas that it knows of to report, before it tells the front what there is."""

SETTLE_SECONDS = 1.0
"""Between HAProxy's sending nothing more to a replica and the signal that ends its worker."""

FORCE_SECONDS = 30.0
"""Beyond what a draining replica may take, for its actor to say that it is gone."""

PLACE_SECONDS = 300.0
"""A replica of a new revision for which Ray has found no place in this time gets that of an old one."""

FULL_SECONDS = 10.0
"""The same where Ray has not the GPUs or CPUs left that it takes."""

FRONT_HANG_SECONDS = 45.0


class Replicas(Protocol):
    """How replicas come and go. `RayReplicas` in `actors.py`; tests have their own."""

    def find(self) -> list[str]:
        """Names of those that exist."""

    def start(self, name: str, spec: ClusterSpec, node: str) -> None:
        """Start one, on the host of this address if it is not empty and has room."""

    def has_room(self, spec: ClusterSpec) -> bool:
        """Whether there is anywhere what one more takes."""

    async def report(self, name: str) -> Report | None:
        """What one says of itself; None where it does not answer."""

    async def stop(self, name: str, drain_seconds: float) -> None:
        """Ask one to end its worker. Does not wait for it."""

    def remove(self, name: str) -> None:
        """Let one be forgotten."""


class Desired(msgspec.Struct, frozen=True, kw_only=True):
    """What is in the file: `nodes` are the hosts of the replicas, by name."""

    spec: ClusterSpec
    target: int
    nodes: dict[str, str] = {}
    draining: tuple[str, ...] = ()


@dataclass
class Member:
    """A replica that there is, or that has been asked for."""

    name: str
    report: Report
    began: float
    was_ready: bool = False
    slots: int = 0
    draining_since: float | None = None
    is_told: bool = False
    """Whether the front knows that it is draining."""
    is_known: bool = False
    """Whether it has reported since this controller started."""


class Controller:
    """Used on one event loop. `run` until `down`."""

    def __init__(self, spec: ClusterSpec, paths: Paths, replicas: Replicas) -> None:
        self._paths, self._replicas = paths, replicas
        self.spec = spec
        self.target = spec.minimum
        self._members: dict[str, Member] = {}
        self._saved: Desired | None = None
        self._front_lost: float | None = None
        self._began = time.monotonic()
        self._is_ending = False
        self.ended = asyncio.Event()
        self._scaler = Scaler(spec.minimum, spec.maximum, spec.up_after_seconds, spec.down_after_seconds)

    # ---- what is asked of it -----------------------------------------------------------------------------------------

    def configure(self, spec: ClusterSpec) -> None:
        """Take another specification. A newer revision replaces the replicas one by one."""
        self.spec = spec
        self._scaler = Scaler(spec.minimum, spec.maximum, spec.up_after_seconds, spec.down_after_seconds)
        self.target = min(max(self.target, spec.minimum), spec.maximum)
        self._save()

    def scale(self, minimum: int, maximum: int) -> None:
        self.configure(msgspec.structs.replace(self.spec, minimum=minimum, maximum=maximum))

    def restart(self, config: str | None = None, text: str | None = None, drain_seconds: float | None = None) -> None:
        """Replace every replica, one by one, with another configuration if there is one."""
        spec = msgspec.structs.replace(self.spec, revision=self.spec.revision + 1)
        if config is not None:
            spec = msgspec.structs.replace(
                spec, config=config, config_text=text, drain_seconds=drain_seconds or spec.drain_seconds
            )
        self.configure(spec)

    def fleet(self) -> Fleet:
        """What the front is told."""
        members = sorted(self._members.values(), key=lambda member: number_of(member.name))
        settled = not any(
            member.draining_since is not None or member.report.revision < self.spec.revision for member in members
        )
        return Fleet(
            spec=msgspec.structs.replace(self.spec, config_text=None),
            target=self.target,
            servers=tuple(server for member in members if (server := _server(member)) is not None),
            reports=tuple(_shown(member) for member in members),
            note="ending" if self._is_ending else "" if settled else "replacing or removing replicas",
            controller_pid=os.getpid(),
        )

    def down(self, now: bool) -> None:
        """End everything; `ended` is set when that is done. now: streams are not waited for."""
        self._is_ending = True
        self._drain_seconds = 0.0 if now else self.spec.drain_seconds
        for member in self._members.values():
            self._drain(member)

    # ---- its life ----------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Until `down` is done."""
        self._paths.make()
        self._recover()
        self._save()
        while not self.ended.is_set():
            began = time.monotonic()
            await self._poll()
            if not self._is_ending:
                self._decide()
            await self._tell_front()
            await self._end_drained()
            self._save()
            if self._is_ending and not self._members:
                await self._finish()
                return
            await asyncio.sleep(max(0.05, TICK_SECONDS - (time.monotonic() - began)))

    def _recover(self) -> None:
        """Find what a predecessor left: its specification in the file, its replicas by name."""
        with suppress(OSError, msgspec.MsgspecError):
            desired = msgspec.json.decode(self._paths.cluster.read_bytes(), type=Desired)
            if desired.spec.revision >= self.spec.revision:
                self.configure(desired.spec)
            self.target = min(max(desired.target, self.spec.minimum), self.spec.maximum)
            there = set(self._replicas.find())
            for name, node in desired.nodes.items():
                if name not in there:
                    self._replicas.start(name, self.spec, node)
                self._take(name, is_draining=name in desired.draining)
        for name in self._replicas.find():
            if name not in self._members:
                self._take(name)
        if self._members:
            log.info("goes on with %s", ", ".join(self._members))

    def _take(self, name: str, is_draining: bool = False) -> None:
        member = Member(name, Report(name=name, revision=self.spec.revision, phase="pending"), time.monotonic())
        self._members[name] = member
        if is_draining:
            self._drain(member)

    def _drain(self, member: Member) -> None:
        if member.draining_since is None:
            log.info("%s: is drained", member.name)
            member.draining_since = time.monotonic()

    async def _poll(self) -> None:
        """Ask all replicas how they are."""
        names = list(self._members)
        for name, report in zip(names, await asyncio.gather(*map(self._replicas.report, names)), strict=True):
            member = self._members[name]
            if report is None:
                if member.is_known:
                    member.report = msgspec.structs.replace(member.report, phase="away")
                continue
            member.report, member.is_known = report, True
            if report.phase == "ready":
                member.was_ready, member.slots = True, report.total or member.slots

    def _decide(self) -> None:
        now = time.monotonic()
        staying = [member for member in self._members.values() if member.draining_since is None]
        if self._is_recovering(now):
            return
        if all(member.report.revision >= self.spec.revision for member in staying):
            loads = [
                Load(member.report.used, member.report.total, member.report.lag_seconds)
                for member in staying
                if member.report.phase == "ready"
            ]
            target = self._scaler.target(now, self.target, loads)
            if target != self.target:
                log.info("replicas: %d instead of %d", target, self.target)
                self.target = target
        seen = [
            plan.Member(
                member.name,
                member.report.revision,
                member.report.phase,
                member.report.used,
                member.draining_since is not None,
                (now - member.began) if member.report.phase == "pending" else 0.0,
            )
            for member in self._members.values()
        ]
        deeds = plan.next_deeds(seen, self.spec.revision, self.target, self._place_seconds(seen))
        for name in deeds.add:
            log.info("%s: is added", name)
            self._replicas.start(name, self.spec, "")
            self._take(name)
        for name in deeds.drain:
            self._drain(self._members[name])

    def _place_seconds(self, seen: list[plan.Member]) -> float:
        """How long to wait for a place for a replica: less where Ray has nothing left to give."""
        if not any(member.pending_seconds > FULL_SECONDS for member in seen):
            return PLACE_SECONDS
        return PLACE_SECONDS if self._replicas.has_room(self.spec) else FULL_SECONDS

    def _is_recovering(self, now: float) -> bool:
        return now - self._began < RECOVERY_SECONDS and not all(member.is_known for member in self._members.values())

    async def _end_drained(self) -> None:
        now = time.monotonic()
        drain_seconds = self._drain_seconds if self._is_ending else self.spec.drain_seconds
        for member in list(self._members.values()):
            since, report = member.draining_since, member.report
            if since is None:
                continue
            waited = now - since
            overdue = waited > 2 * drain_seconds + GRACE_SECONDS + 2 * FORCE_SECONDS
            if report.phase == "gone" or overdue or (report.phase == "pending" and not member.was_ready):
                if overdue:
                    log.error("%s: did not end in time", member.name)
                self._replicas.remove(member.name)
                del self._members[member.name]
            elif report.phase != "stopping" and self._may_end(member, waited, drain_seconds):
                # Whoever came in the last moment may go on; those who are still there after all that time may not.
                await self._replicas.stop(member.name, 0.0 if waited >= drain_seconds else drain_seconds)

    def _may_end(self, member: Member, waited: float, drain_seconds: float) -> bool:
        """Whether a draining replica's worker may be told to end.

        Nothing new comes to it any more, and its streams have ended, or their time has. As long as it is not told, its clients
        can come back to it after a lost connection.
        """
        if waited >= drain_seconds + (0.0 if member.is_told else FORCE_SECONDS):
            return True
        return member.is_told and waited >= SETTLE_SECONDS and not member.report.used

    async def _tell_front(self) -> None:
        """Tell the front what there is, and start it where it is gone."""
        if self._is_recovering(time.monotonic()):
            return
        fleet = self.fleet()
        try:
            await front.tell(self._paths, "PUT", fleet)
        except MoshiSttError as error:
            await self._mend_front(error)
            return
        self._front_lost = None
        drained = {server.name for server in fleet.servers if server.draining}
        for member in self._members.values():
            member.is_told = member.name in drained or _server(member) is None

    async def _mend_front(self, error: MoshiSttError) -> None:
        now = time.monotonic()
        self._front_lost = self._front_lost or now
        try:
            running = msgspec.json.decode(self._paths.front.read_bytes(), type=Running)
        except (OSError, msgspec.MsgspecError):
            running = Running(0, "")
        if process.is_alive(running.pid, running.started):
            if now - self._front_lost < FRONT_HANG_SECONDS:
                return
            log.error("%s: it is ended", error)
            await process.end(running.pid, running.started, 2.0)
        log.info("starts the front")
        self._front_lost = None
        try:
            write_json(self._paths.front, await asyncio.to_thread(front.start, self._paths))
            await asyncio.sleep(TICK_SECONDS)
        except MoshiSttError as failure:
            log.error("%s", failure)

    async def _finish(self) -> None:
        try:
            await front.tell(self._paths, "DELETE")
        except MoshiSttError as error:
            log.error("%s", error)
        self.ended.set()

    def _save(self) -> None:
        desired = Desired(
            spec=self.spec,
            target=self.target,
            nodes={member.name: member.report.node for member in self._members.values()},
            draining=tuple(member.name for member in self._members.values() if member.draining_since is not None),
        )
        if desired != self._saved:
            write_json(self._paths.cluster, desired)
            self._saved = desired


def _server(member: Member) -> Server | None:
    """A replica that has been ready once stays in HAProxy, which looks for itself whether it is now."""
    report = member.report
    if not member.was_ready or not report.port or report.phase == "gone":
        return None
    return Server(
        name=member.name,
        host=report.host,
        port=report.port,
        slots=member.slots,
        wyoming_port=report.wyoming_port,
        draining=member.draining_since is not None,
    )


def _shown(member: Member) -> Report:
    if member.draining_since is not None and member.report.phase in ("ready", "starting", "failing"):
        return msgspec.structs.replace(member.report, phase="stopping")
    return member.report
