"""A cluster under load, while one part after the other is killed: who notices, and how long it takes.

Two replicas of the embedded model with six streams, and three of random weights of Kyutai's architecture with 24.
"""

import asyncio
import json
import os
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray

pytest.importorskip("ray", reason="Ray is not installed: the extra `ray`")

from tests.support.clusters import DEADLINE, Caller, Cluster, all_ready, alone, kill

from moshi_stt.audio.decode import read_file
from moshi_stt.cluster import own_ray, process
from moshi_stt.cluster.balancer import Running
from moshi_stt.config_load import shipped_text
from moshi_stt.data import SAMPLE, data_file

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1_800)]

LIMITS = "drain_seconds = 200.0\nidle_seconds = 600.0"
"""Above the longest stream, also where the machine is busy; and clients may wait for each other."""
ROOT = Path(__file__).parents[2]


HELD_SECONDS = 3.0
"""The end of each stream's recording, which is spoken after the kill: each is in the middle of its recording then."""


class Setting(NamedTuple):
    """seconds: of each recording."""

    config: str
    replicas: int
    streams: int
    seconds: int


SETTINGS = [Setting("embedded", 2, 6, 20), Setting("tiny", 3, 24, 8)]


@pytest.fixture(scope="module", params=SETTINGS, ids=lambda setting: setting.config)
def setting(request: pytest.FixtureRequest) -> Setting:
    chosen: Setting = request.param
    return chosen


@pytest.fixture(scope="module")
def config(setting: Setting, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The configuration that the cluster serves."""
    if setting.config == "tiny":
        pytest.importorskip("torch", reason="the model runs on PyTorch: pip install -e '.[torch]'")
        tiny: Path = request.getfixturevalue("tiny")
        text = (tiny / "moshi-server.toml").read_text() + "\n[modules.asr.moshi_stt]\nthreads = 1\n"
    else:
        text = shipped_text(setting.config)
    config = tmp_path_factory.mktemp("cluster") / "served.toml"
    config.write_text(text.replace("[modules.asr]", f"[moshi_stt]\n{LIMITS}\n\n[modules.asr]"))
    return config


@pytest.fixture(scope="module")
def cluster(setting: Setting, config: Path) -> Iterator[Cluster]:
    made = Cluster(str(config), "--worker-flags", f"--batch-size {setting.streams}")
    try:
        made.up("--replicas", str(setting.replicas))
        yield made
    finally:
        made.down()


@pytest.fixture(scope="module")
def recordings(setting: Setting) -> list[NDArray[np.float32]]:
    """Real speech, each stream's another stretch of it."""
    sample, cities = read_file(data_file(SAMPLE)), read_file(ROOT / "tests" / "data" / "two_cities.flac")
    pause = np.zeros(24_000, np.float32)
    whole = np.concatenate([sample, pause, cities, pause, sample])
    return [whole[start * 6_000 :][: setting.seconds * 24_000] for start in range(setting.streams)]


@pytest.fixture(scope="module")
def expected(cluster: Cluster, recordings: list[NDArray[np.float32]]) -> list[list[Any]]:
    """What a replica hears of each when nothing is killed."""
    at_once = asyncio.Semaphore(4)

    async def hear_one(pcm: NDArray[np.float32]) -> list[Any]:
        async with at_once:
            return await alone(cluster.url, pcm)

    async def hear() -> list[list[Any]]:
        return list(await asyncio.gather(*map(hear_one, recordings)))

    return asyncio.run(hear())


async def callers(cluster: Cluster, recordings: list[NDArray[np.float32]]) -> list[Caller]:
    """Streams on all replicas, as many on each, in the middle of their recordings. They wait for `go_on`."""
    await cluster.until("all replicas ready and free", lambda state: all_ready(cluster.replicas)(state) and used(state) == 0)
    made = []
    for pcm in recordings:
        made.append(Caller(cluster.url, pcm, stops=(0.0, len(pcm) / 24_000 - HELD_SECONDS)))
        await made[-1].greeted.wait()  # or HAProxy would not know yet that this replica has one more
    go_on(made)
    async with asyncio.timeout(DEADLINE):
        for caller in made:
            await caller.has_heard.wait()
            await caller.is_held.wait()
            assert not caller.done.done(), caller.outcome.error
    shares = Counter(caller.outcome.replica for caller in made)
    assert shares == {f"r{number}": len(made) // cluster.replicas for number in range(cluster.replicas)}
    return made


def go_on(made: list[Caller]) -> None:
    for caller in made:
        caller.go_on()


def used(state: Any) -> int:
    return sum(report.used for report in state.fleet.reports)


async def all_are_whole(cluster: Cluster, made: list[Caller], expected: list[list[Any]]) -> None:
    """Each stream was told what an undisturbed one is told, and has left its slot."""
    for number, (caller, events) in enumerate(zip(made, expected, strict=True)):
        outcome = await caller.done
        assert not outcome.error, f"stream {number} on {outcome.replica}: {outcome.error}"
        assert outcome.events == events, f"stream {number} on {outcome.replica}"
    await all_are_free(cluster)


async def all_are_free(cluster: Cluster) -> None:
    await cluster.until("every slot free", lambda state: all_ready(cluster.replicas)(state) and used(state) == 0)


@asynccontextmanager
async def unbroken(cluster: Cluster) -> AsyncIterator[None]:
    """No client has to come back to its stream meanwhile."""
    before = await cluster.resumed()
    yield
    assert await cluster.resumed() == before, "a connection was broken"


def told(what: str, since: float) -> None:
    print(f"{what} after {time.monotonic() - since:.2f} s")


async def answers(cluster: Cluster, what: str, since: float) -> None:
    """Wait until the address does."""
    await cluster.answers()
    told(f"\n{what} killed: the address answers", since)


async def strike(cluster: Cluster, made: list[Caller], pid: int, what: str) -> float:
    """Kill a process, let the streams go on, and wait for the address. Returns when it was killed."""
    killed = kill(pid)
    go_on(made)
    await answers(cluster, what, killed)
    return killed


async def test_kill_the_worker_of_a_replica(
    cluster: Cluster, recordings: list[NDArray[np.float32]], expected: list[list[Any]]
) -> None:
    """Streams of the others do not change by one event; those of the dead one end with an error: start a new one."""
    made = await callers(cluster, recordings)
    before = await cluster.reports()
    async with unbroken(cluster):
        killed = await strike(cluster, made, before["r0"].pid, "a worker")
        await cluster.until(
            "another worker",
            lambda state: all_ready(cluster.replicas)(state) and state.fleet.reports[0].pid != before["r0"].pid,
        )
        told("its replica is ready again", killed)
        lost = 0
        for caller, events in zip(made, expected, strict=True):
            outcome = await caller.done
            if outcome.replica == "r0":
                lost += 1
                assert "start a new one" in outcome.error or "was lost" in outcome.error, outcome.error
            else:
                assert (outcome.error, outcome.events) == ("", events)
        print(f"streams ended with an error: {lost}; the others: {len(made) - lost}, unchanged to the event")
        assert lost == len(made) // cluster.replicas
        await all_are_free(cluster)


async def test_kill_the_actor_of_a_replica(
    cluster: Cluster, recordings: list[NDArray[np.float32]], expected: list[list[Any]]
) -> None:
    made = await callers(cluster, recordings)
    before = await cluster.reports()
    async with unbroken(cluster):
        killed = await strike(cluster, made, before["r0"].actor_pid, "an actor")
        await cluster.until(
            "another actor",
            lambda state: all_ready(cluster.replicas)(state) and state.fleet.reports[0].actor_pid != before["r0"].actor_pid,
        )
        told("another one reports", killed)
        assert (await cluster.reports())["r0"].pid == before["r0"].pid, "the worker outlives its actor"
        await all_are_whole(cluster, made, expected)


async def test_kill_haproxy(cluster: Cluster, recordings: list[NDArray[np.float32]], expected: list[list[Any]]) -> None:
    """Everybody's connection breaks; who resumes hears all of it."""
    made = await callers(cluster, recordings)
    resumed = await cluster.resumed()
    before = (await cluster.state()).haproxy_pid
    killed = kill(before)
    go_on(made)
    await cluster.until("another HAProxy", lambda state: state.haproxy_pid not in (0, before))
    await answers(cluster, "HAProxy", killed)
    await all_are_whole(cluster, made, expected)
    assert await cluster.resumed() - resumed >= len(made)


async def test_kill_the_front(cluster: Cluster, recordings: list[NDArray[np.float32]], expected: list[list[Any]]) -> None:
    made = await callers(cluster, recordings)
    before = await cluster.state()
    pid = json.loads(cluster.paths.front.read_text())["pid"]
    async with unbroken(cluster):
        killed = await strike(cluster, made, pid, "the front")
        await cluster.until("another front", lambda state: json.loads(cluster.paths.front.read_text())["pid"] != pid)
        told("another one is there", killed)
        assert (await cluster.state()).haproxy_pid == before.haproxy_pid, "HAProxy outlives the front"
        await all_are_whole(cluster, made, expected)


async def test_kill_the_controller(cluster: Cluster, recordings: list[NDArray[np.float32]], expected: list[list[Any]]) -> None:
    made = await callers(cluster, recordings)
    fleet = (await cluster.state()).fleet
    assert fleet is not None
    async with unbroken(cluster):
        killed = await strike(cluster, made, fleet.controller_pid, "the controller")
        await cluster.until(
            "another controller",
            lambda state: all_ready(cluster.replicas)(state) and state.fleet.controller_pid != fleet.controller_pid,
        )
        told("another one reports", killed)
        after = await cluster.reports()
        assert {name: report.pid for name, report in after.items()} == {report.name: report.pid for report in fleet.reports}
        await all_are_whole(cluster, made, expected)


async def test_kill_ray(cluster: Cluster, recordings: list[NDArray[np.float32]], expected: list[list[Any]]) -> None:
    """Workers, HAProxy and the front outlive Ray: no stream notices, and new ones are taken meanwhile."""
    made = await callers(cluster, recordings)
    before = await cluster.reports()
    own = own_ray.find(cluster.paths)
    assert own is not None
    async with unbroken(cluster):
        killed = time.monotonic()
        for pid, started in own_ray.with_descendants(own).items():
            process.send(pid, started, signal.SIGKILL)
        go_on(made)
        await answers(cluster, "Ray", killed)
        assert await alone(cluster.url, recordings[0]) == expected[0], "the address takes new streams without Ray"
        await cluster.until(
            "another Ray",
            lambda state: (
                all_ready(cluster.replicas)(state)
                and {r.actor_pid for r in state.fleet.reports}.isdisjoint(r.actor_pid for r in before.values())
            ),
            3 * own_ray.START_SECONDS,  # on a busy machine Ray may take several attempts
        )
        told("the cluster is watched again", killed)
        after = await cluster.reports()
        assert {name: report.pid for name, report in after.items()} == {name: report.pid for name, report in before.items()}
        await all_are_whole(cluster, made, expected)


async def test_a_rolling_restart_under_load(
    cluster: Cluster, recordings: list[NDArray[np.float32]], expected: list[list[Any]]
) -> None:
    """No connection is refused, no stream is cut, every transcript is that of a single server."""
    await cluster.until("all replicas ready", all_ready(cluster.replicas))
    before = await cluster.reports()
    restarting = await asyncio.create_subprocess_exec(
        *cluster.command("restart"), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    ended = asyncio.create_task(restarting.communicate())
    count = 0

    async def keep_calling(number: int) -> None:
        """One call after the other, until the restart is over; each hears all of it."""
        nonlocal count
        while not ended.done():
            outcome = await Caller(cluster.url, recordings[number], pace=2.0, resume=False).done
            assert not outcome.error, f"{outcome.error}{cluster.logs()}"
            assert outcome.events == expected[number]
            count += 1

    await asyncio.gather(*(keep_calling(number) for number in range(4)))
    output, _ = await ended
    assert restarting.returncode == 0, output.decode() + cluster.logs()
    after = await cluster.reports()
    assert {report.pid for report in after.values()}.isdisjoint({report.pid for report in before.values()})
    assert {report.revision for report in after.values()} == {2}
    print(f"\nrolling restart: {count} calls, none refused, none cut, all as of a single server")


def test_down_leaves_nothing(cluster: Cluster) -> None:
    """No process and no file."""
    own = own_ray.find(cluster.paths)
    assert own is not None
    records = [json.loads(path.read_text()) for path in (cluster.paths.front, cluster.paths.haproxy)]
    records += [json.loads(path.read_text()) for path in cluster.folder.glob("r[0-9]*.json")]
    assert len(records) == 2 + cluster.replicas
    running = [Running(record["pid"], record["started"]) for record in records]
    running += [Running(pid, started) for pid, started in own_ray.with_descendants(own).items()]
    assert all(process.is_alive(each.pid, each.started) for each in running)
    cluster.run("down", "--now")
    assert not any(process.is_alive(each.pid, each.started) for each in running)
    assert not cluster.folder.exists()
    assert not os.path.lexists(own.folder)
