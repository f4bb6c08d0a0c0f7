"""Jobs on Ray of which one ends its actor: `python -m tests.support.ray_jobs COUNT NUMBER`. Prints the results as JSON."""

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import AsyncIterator

from moshi_stt.cluster.archive import Pool, connected, run

POISON = "poison"


class Worker:
    async def work(self, job: str) -> str:
        if job == POISON:
            os.kill(os.getpid(), signal.SIGKILL)
        await asyncio.sleep(0)
        return job.upper()


@contextlib.asynccontextmanager
async def make() -> AsyncIterator[Worker]:
    yield Worker()


def main(count: int, poisoned: int) -> None:
    from tests.support import ray_jobs  # actors know it by this name, not as __main__

    pool = Pool(actors=2, cpus_per_actor=0.5)
    jobs = [POISON if number == poisoned else f"job {number}" for number in range(count)]
    with connected(pool):
        results = list(run(ray_jobs.make, jobs, pool))
    print(json.dumps(results))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
