"""The number of replicas follows the load, up and down, and no stream loses a word."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("ray", reason="Ray is not installed: the extra `ray`")

from tests.support.clusters import Caller, Cluster, all_ready, alone

from moshi_stt.audio.decode import read_file
from moshi_stt.config_load import shipped_text
from moshi_stt.data import SAMPLE, data_file

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1_800)]

ROOT = Path(__file__).parents[2]
SLOTS = 2


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    config = tmp_path_factory.mktemp("cluster") / "served.toml"
    config.write_text(shipped_text("embedded").replace("[modules.asr]", "[moshi_stt]\ndrain_seconds = 300.0\n\n[modules.asr]"))
    made = Cluster(str(config), "--worker-flags", f"--batch-size {SLOTS}", "--up-after", "1", "--down-after", "5")
    try:
        made.up("--min", "1", "--max", "3")
        yield made
    finally:
        made.down()


async def test_replicas_follow_the_load(cluster: Cluster) -> None:
    sample, cities = read_file(data_file(SAMPLE)), read_file(ROOT / "tests" / "data" / "two_cities.flac")
    pcm = np.concatenate([sample, cities] * 4)[: 60 * 24_000]
    expected = await alone(cluster.url, pcm)
    await cluster.until("one replica", all_ready(1))
    made: list[Caller] = []
    for replicas in (2, 3):
        while len(made) < SLOTS * (replicas - 1):
            made.append(Caller(cluster.url, pcm, pace=0.5))
            await made[-1].greeted.wait()
            assert made[-1].outcome.replica, made[-1].outcome.error
        seconds = await cluster.until(f"{replicas} replicas", all_ready(replicas))
        print(f"\n{len(made)} streams: {replicas} replicas after {seconds:.0f} s")
    outcomes = await asyncio.gather(*(caller.done for caller in made))
    assert {outcome.replica for outcome in outcomes} > {"r0"}
    assert [(outcome.error, outcome.events) for outcome in outcomes] == [("", expected)] * len(made)
    seconds = await cluster.until("one replica", all_ready(1))
    print(f"\nno streams: 1 replica after {seconds:.0f} s")
