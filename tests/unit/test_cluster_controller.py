"""The controller over replicas of a script: what it starts, drains and finds again, and what it tells the front."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest

from moshi_stt.cluster import controller as module
from moshi_stt.cluster import front
from moshi_stt.cluster.controller import Controller
from moshi_stt.cluster.front import State
from moshi_stt.cluster.spec import ClusterSpec, Fleet, Paths, Report
from moshi_stt.errors import MoshiSttError

SPEC = ClusterSpec(config="embedded", minimum=2, maximum=2, drain_seconds=1.0)


class Script:
    """Replicas that become ready when they are asked for the first time. silent: those that do not answer."""

    def __init__(self) -> None:
        self.reports: dict[str, Report] = {}
        self.silent: set[str] = set()
        self.log: list[str] = []
        self.started = asyncio.Event()

    def find(self) -> list[str]:
        return list(self.reports)

    def start(self, name: str, spec: ClusterSpec, node: str) -> None:
        self.log.append(f"+{name}@{node}")
        self.started.set()
        port = 4000 + len(self.log)
        self.reports[name] = Report(
            name=name, revision=spec.revision, phase="ready", node="10.0.0.7", host="10.0.0.7", port=port, total=4
        )

    def has_room(self, spec: ClusterSpec) -> bool:
        return True

    async def report(self, name: str) -> Report | None:
        return None if name in self.silent else self.reports.get(name)

    async def stop(self, name: str, drain_seconds: float) -> None:
        self.log.append(f"stop {name} {drain_seconds:g}")
        self.change(name, phase="gone")

    def remove(self, name: str) -> None:
        self.log.append(f"-{name}")
        self.reports.pop(name, None)

    def change(self, name: str, **fields: object) -> None:
        self.reports[name] = msgspec.structs.replace(self.reports[name], **fields)


class Told:
    """Stands for the front. fleets: all that it was told."""

    def __init__(self) -> None:
        self.fleets: list[Fleet] = []
        self.is_gone = False
        self.ended = False
        self.news = asyncio.Event()

    async def tell(self, paths: Paths, method: str, fleet: Fleet | None = None) -> State:
        if self.is_gone:
            raise MoshiSttError("gone")
        if method == "DELETE":
            self.ended = True
        if fleet is not None:
            self.fleets.append(fleet)
            self.news.set()
        return State(fleet=fleet, haproxy_pid=1, haproxy_restarts=0, why="", controller_seconds=0.0)

    async def until(self, holds: object) -> Fleet:
        """The first fleet for which something holds."""
        assert callable(holds)
        async with asyncio.timeout(60):
            seen = 0
            while True:
                while seen < len(self.fleets):
                    seen += 1
                    if holds(self.fleets[seen - 1]):
                        return self.fleets[seen - 1]
                self.news.clear()
                await self.news.wait()


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Told:
    made = Told()
    monkeypatch.setattr(front, "tell", made.tell)
    monkeypatch.setattr(module, "TICK_SECONDS", 0.02)
    monkeypatch.setattr(module, "SETTLE_SECONDS", 0.0)
    return made


def names(fleet: Fleet) -> list[str]:
    return [server.name for server in fleet.servers]


def draining(fleet: Fleet) -> list[str]:
    return [server.name for server in fleet.servers if server.draining]


@asynccontextmanager
async def at_work(controller: Controller, told: Told) -> AsyncIterator[Fleet]:
    """The controller runs; what it told first of two replicas. It is down at the end."""
    running = asyncio.create_task(controller.run())
    yield await told.until(lambda fleet: names(fleet) == ["r0", "r1"])
    controller.down(now=True)
    async with asyncio.timeout(60):
        await running


async def scale_down_under_load(controller: Controller, script: Script, told: Told) -> None:
    """Both replicas have streams, r1 fewer, and one replica alone is wanted."""
    script.change("r1", used=1)
    script.change("r0", used=2)
    await told.until(lambda fleet: sum(report.used for report in fleet.reports) == 3)
    controller.scale(1, 1)


async def test_replicas_are_started_told_and_ended(told: Told, tmp_path: Path) -> None:
    script = Script()
    async with at_work(Controller(SPEC, Paths(tmp_path / "c"), script), told) as fleet:
        assert [server.slots for server in fleet.servers] == [4, 4]
    assert told.ended
    assert script.reports == {}
    assert script.log[-2:] == ["-r0", "-r1"] or script.log[-2:] == ["-r1", "-r0"]


async def test_streams_end_before_their_worker_is_told_to(told: Told, tmp_path: Path) -> None:
    script = Script()
    controller = Controller(msgspec.structs.replace(SPEC, drain_seconds=1_000.0), Paths(tmp_path / "c"), script)
    async with at_work(controller, told):
        await scale_down_under_load(controller, script, told)
        await told.until(lambda fleet: draining(fleet) == ["r1"])
        count = len(told.fleets)
        await told.until(lambda fleet: len(told.fleets) > count + 5)
        assert not any(line.startswith("stop") for line in script.log)
        script.change("r1", used=0)
        await told.until(lambda fleet: names(fleet) == ["r0"])
        assert script.log[-2:] == ["stop r1 1000", "-r1"]
        script.change("r0", used=0)


async def test_streams_that_stay_are_ended_when_their_time_is_over(told: Told, tmp_path: Path) -> None:
    script = Script()
    controller = Controller(msgspec.structs.replace(SPEC, drain_seconds=0.2), Paths(tmp_path / "c"), script)
    async with at_work(controller, told):
        await scale_down_under_load(controller, script, told)
        await told.until(lambda fleet: names(fleet) == ["r0"])
        assert script.log[-2:] == ["stop r1 0", "-r1"]


async def test_a_rolling_restart_has_always_as_many_servers(told: Told, tmp_path: Path) -> None:
    script = Script()
    controller = Controller(SPEC, Paths(tmp_path / "c"), script)
    async with at_work(controller, told):
        first = len(told.fleets)
        controller.restart("other.toml", "text", 2.0)
        await told.until(
            lambda fleet: not fleet.note and fleet.spec.revision == 2 and {r.revision for r in fleet.reports} == {2}
        )
        assert min(len(names(fleet)) - len(draining(fleet)) for fleet in told.fleets[first:]) == 2
        assert controller.spec.config_text == "text"
        assert all(fleet.spec.config_text is None for fleet in told.fleets), "keys stay out of the front's file"


async def test_another_controller_finds_everything_again(told: Told, tmp_path: Path) -> None:
    """One of Ray's two replicas is lost with Ray: it is asked for on the host where it was. What was draining still is."""
    script, paths = Script(), Paths(tmp_path / "c")
    first = Controller(SPEC, paths, script)
    running = asyncio.create_task(first.run())
    await told.until(lambda fleet: names(fleet) == ["r0", "r1"])
    script.change("r1", used=1)
    await told.until(lambda fleet: any(report.used for report in fleet.reports))
    first.scale(1, 1)
    await told.until(lambda fleet: draining(fleet) == ["r0"] or draining(fleet) == ["r1"])
    script.change("r0", used=1)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    lost = script.reports.pop("r1")
    script.silent.add("r0")
    script.log.clear()
    script.started.clear()
    told.fleets.clear()

    second = Controller(SPEC, paths, script)
    running = asyncio.create_task(second.run())
    async with asyncio.timeout(60):
        await script.started.wait()
    assert script.log == ["+r1@10.0.0.7"]
    assert told.fleets == [], "HAProxy is told nothing before the replicas have answered"
    script.reports["r1"] = lost
    script.silent.clear()
    fleet = await told.until(lambda fleet: "r1" in names(fleet))
    assert second.spec.minimum == 1, "the file says what shall be, not the call that started the first one"
    assert fleet.target == 1
    second.down(now=True)
    async with asyncio.timeout(60):
        await running


async def test_a_front_that_is_gone_is_started(told: Told, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from moshi_stt.cluster.balancer import Running

    def start(paths: Paths) -> Running:
        told.is_gone = False
        return Running(1, "never")

    monkeypatch.setattr(front, "start", start)
    told.is_gone = True
    async with at_work(Controller(SPEC, Paths(tmp_path / "c"), Script()), told):
        assert not told.is_gone
