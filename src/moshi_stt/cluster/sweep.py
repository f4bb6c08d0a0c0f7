"""Ends what is left of a cluster on this host, by its state files: for `cluster down`, also where Ray is gone."""

import asyncio
import shutil

import msgspec

from moshi_stt.cluster import process
from moshi_stt.cluster.balancer import Running
from moshi_stt.cluster.spec import MOST_REPLICAS, Paths

END_SECONDS = 10.0


async def sweep(paths: Paths) -> None:
    """End the front, HAProxy and every worker, and remove the folder."""
    if not paths.folder.is_dir():
        return
    records = [paths.front, paths.haproxy, *(paths.record(f"r{number}") for number in range(MOST_REPLICAS))]
    found = []
    for path in records:
        try:
            found.append(msgspec.json.decode(path.read_bytes(), type=Running))
        except (OSError, msgspec.MsgspecError):
            continue
    for running in found[:1]:  # the front first, or it starts HAProxy again
        await process.end(running.pid, running.started, END_SECONDS)
    await asyncio.gather(*(process.end(running.pid, running.started, END_SECONDS) for running in found[1:]))
    shutil.rmtree(paths.folder, ignore_errors=True)
