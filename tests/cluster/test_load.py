"""The number of replicas follows the load, up and down, and no stream loses a word."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import numpy as np
import pytest

pytest.importorskip("ray", reason="Ray is not installed: the extra `ray`")

from tests.support.clusters import DEADLINE, Caller, Cluster, all_ready, alone

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


async def test_everything_goes_through_the_address(cluster: Cluster) -> None:
    """The page, POST of two protocols, a WebSocket beyond the slots, and what the fleet says of itself."""
    http = f"http://127.0.0.1:{cluster.port}"
    sample = data_file(SAMPLE).read_bytes()
    timeout = aiohttp.ClientTimeout(total=DEADLINE)
    headers = {"kyutai-api-key": "public_token"}
    await asyncio.to_thread(cluster.run, "scale", "1")
    async with aiohttp.ClientSession(timeout=timeout) as session:
        async with session.get(f"{http}/") as answer:
            assert "<html" in await answer.text()
        async with session.post(http + cluster.path, data=sample, headers=headers) as answer:
            words = [event["text"] for event in await answer.json() if event["type"] == "Word"]
        assert "matter," in words
        form = aiohttp.FormData({"model": "whisper-1"})
        form.add_field("file", sample, filename="sample.flac")
        bearer = {"Authorization": "Bearer public_token"}
        async with session.post(f"{http}/v1/audio/transcriptions", data=form, headers=bearer) as answer:
            assert (await answer.json())["text"].split() == words
        async with session.get(f"{http}/api/modules_info") as answer:
            (module,) = await answer.json()
        assert module["total_slots"] == str(SLOTS)
        async with session.get(f"{http}/metrics") as answer:
            assert 'moshi_stt_used_slots{replica="r0",module="asr"} 0' in (await answer.text()).splitlines()
        for path in ("/health", "/ready"):
            async with session.get(http + path) as answer:
                assert answer.status == 200
    silent = [Caller(cluster.url, np.zeros(24_000 * 60, np.float32)) for _ in range(SLOTS)]
    for caller in silent:
        await caller.greeted.wait()
        assert caller.outcome.replica == "r0"
    refused = await Caller(cluster.url, np.zeros(24_000, np.float32)).done
    assert "no free channels" in refused.error, "the replica's own words"
    for caller in silent:
        caller.done.cancel()
    await asyncio.gather(*(caller.done for caller in silent), return_exceptions=True)
    await cluster.until("no streams", lambda state: sum(report.used for report in state.fleet.reports) == 0)  # type: ignore[union-attr]


async def test_replicas_follow_the_load(cluster: Cluster) -> None:
    await asyncio.to_thread(cluster.run, "scale", "--min", "1", "--max", "3")
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
