"""Many recordings on Ray Data: a pool of actors, each with an engine, works through a list of jobs.

    with connected(pool):
        for number, result in run(make_worker, jobs, pool):
            ...

What a job is, is the caller's business: text goes to `Worker.work` in an actor, and text comes back. Each job is answered once.
Where an actor dies, its jobs are done again by another, so doing one twice must do no harm. A job that ends its actor every
time, also by itself, is answered by None.
"""

import asyncio
import contextlib
import logging
import math
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any, Final, Protocol

from moshi_stt.cluster.local_ray import local_ray
from moshi_stt.cores import limit_cores, usable_cores
from moshi_stt.errors import MoshiSttError

log = logging.getLogger(__name__)

CALLS_AT_ONCE: Final = 2
"""Batches that an actor has in work: while one ends, the engine is busy with the next."""

BATCHES_A_CALL: Final = 4
"""There are at least so many batches for each that is in work, so that the actors end at about the same time."""

MOST_IN_BATCH, MOST_IN_BATCH_ON_GPU = 8, 256
TASK_RETRIES: Final = 2
"""How often a batch is tried again whose actor died."""

START_SECONDS: Final = 600.0
"""Until the first actor has loaded its model."""


class Worker(Protocol):
    """Does jobs in an actor."""

    async def work(self, job: str) -> str:
        """Do one job. Called for several at the same time. What it raises ends the whole run."""


MakeWorker = Callable[[], AbstractAsyncContextManager[Worker]]
"""Loads what a worker needs. It travels to the actors by pickle."""


@dataclass(frozen=True)
class Pool:
    """How the work is spread. address: of a Ray that runs; None starts one on this host for the time of the run.

    actors: None takes one for each of the GPUs that there are, or else for each `cpus_per_actor` cores.
    """

    address: str | None = None
    actors: int | None = None
    cpus_per_actor: float = 2.0
    gpus_per_actor: float = 0.0


@contextlib.contextmanager
def connected(pool: Pool) -> Iterator[None]:
    """This process, which has not imported Ray yet, as a driver of Ray. Raises MoshiSttError where there is no Ray."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(sys.stderr))  # Ray prints on it what goes wrong with actors
        address = pool.address
        if address is None:
            cores = max(float(usable_cores()), (pool.actors or 1) * pool.cpus_per_actor)
            address = stack.enter_context(local_ray(math.ceil(cores)))
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # of this process: what Ray does about its own troubles
        import ray

        try:
            ray.init(address=address, log_to_driver=False, configure_logging=True, logging_level=logging.ERROR)
        except (ConnectionError, RuntimeError, ValueError, OSError) as error:
            raise MoshiSttError(f"Ray does not answer at {address}: {error}") from None
        stack.callback(ray.shutdown)
        yield


def count_actors(pool: Pool) -> int:
    """How many actors a connected Ray has room for, or as many as were asked for. Raises MoshiSttError where none fits."""
    import ray

    resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call,unused-ignore]
    room = int(resources.get("CPU", 0.0) / pool.cpus_per_actor)
    if pool.gpus_per_actor:
        room = min(room, int(resources.get("GPU", 0.0) / pool.gpus_per_actor))
    if (pool.actors or 1) > room:
        has = f"{resources.get('CPU', 0.0):g} CPUs and {resources.get('GPU', 0.0):g} GPUs"
        raise MoshiSttError(
            f"{pool.actors or 1} actors need {(pool.actors or 1) * pool.cpus_per_actor:g} CPUs and "
            f"{(pool.actors or 1) * pool.gpus_per_actor:g} GPUs, and Ray has {has}: ask for fewer actors, or for less an actor"
        )
    return pool.actors or room


def run(make: MakeWorker, jobs: Sequence[str], pool: Pool) -> Iterator[tuple[int, str | None]]:
    """The number of each job and its result, as they come; each once. Raises MoshiSttError where the actors cannot work."""
    actors = min(count_actors(pool), max(1, len(jobs)))
    missing = dict(enumerate(jobs))
    most = MOST_IN_BATCH_ON_GPU if pool.gpus_per_actor else MOST_IN_BATCH
    size = max(1, min(most, len(jobs) // (actors * CALLS_AT_ONCE * BATCHES_A_CALL)))
    for batch, calls in ((size, CALLS_AT_ONCE), (1, 1)):  # what was lost with others is then tried by itself
        if missing:
            for number, result in _pass(make, dict(missing), actors, batch, calls, pool):
                if missing.pop(number, None) is not None:
                    yield number, result
    for number in missing:
        yield number, None


def _pass(make: MakeWorker, jobs: dict[int, str], actors: int, size: int, calls: int, pool: Pool) -> Iterator[tuple[int, str]]:
    """All jobs once, `size` of them in a batch, `calls` batches at once in an actor."""
    import ray.data
    import ray.exceptions

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.max_errored_blocks = -1  # a batch whose actor died time and again; its jobs are missing afterwards
    context.wait_for_min_actors_s = int(START_SECONDS)
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # it would print the trace of each actor that dies
    warnings.filterwarnings("ignore", category=DeprecationWarning, module=__name__)  # of how options of actors are named

    batches = [
        {"batch": list(jobs)[first : first + size], "jobs": list(jobs.values())[first : first + size]}
        for first in range(0, len(jobs), size)
    ]
    data = ray.data.from_items(batches, override_num_blocks=len(batches)).map_batches(
        _Actor,
        fn_constructor_args=(make, max(1, round(pool.cpus_per_actor))),
        batch_size=None,
        batch_format="numpy",
        compute=ray.data.ActorPoolStrategy(
            size=actors,
            max_tasks_in_flight_per_actor=2 * calls,
            max_concurrent_calls_per_actor=calls,
            enable_true_multi_threading=True,
        ),
        num_cpus=pool.cpus_per_actor,
        num_gpus=pool.gpus_per_actor or None,
        max_restarts=-1,
        max_task_retries=TASK_RETRIES,
    )
    try:
        for row in data.iter_rows():
            yield int(row["number"]), str(row["result"])
    except ray.exceptions.RayError as error:
        raise MoshiSttError(f"the actors cannot work: {_last_line(error)}") from None


def _last_line(error: Exception) -> str:
    """Of an error with the traces of several processes in it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


class _Actor:
    """A worker and its event loop, in an actor. Called by threads of the actor, one batch each."""

    def __init__(self, make: MakeWorker, threads: int) -> None:
        limit_cores(threads)
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="worker", daemon=True).start()
        self._worker = asyncio.run_coroutine_threadsafe(self._enter(make), self._loop).result()

    async def _enter(self, make: MakeWorker) -> Worker:
        self._made = make()
        return await self._made.__aenter__()

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        numbers = [int(number) for row in batch["batch"] for number in row]
        jobs = [str(job) for row in batch["jobs"] for job in row]
        results = asyncio.run_coroutine_threadsafe(self._work(jobs), self._loop).result()
        return {"number": numbers, "result": results}

    async def _work(self, jobs: list[str]) -> list[str]:
        return await asyncio.gather(*(self._worker.work(job) for job in jobs))
