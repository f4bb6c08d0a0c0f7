"""`moshi-stt transcribe --ray`: an archive on Ray Data, planned, named, noted and written as without it."""

import argparse
import asyncio
import contextlib
import functools
import importlib.util
import json
import os
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import TYPE_CHECKING, Any

from moshi_stt.audio.selection import Selection
from moshi_stt.cli.archive import Item
from moshi_stt.cli.places import place
from moshi_stt.cli.transcribe import Archive, Outcome, hear, outcome_of, try_to_write
from moshi_stt.cli.transcribers import Source, Transcriber, build_transcriber
from moshi_stt.errors import MoshiSttError

if TYPE_CHECKING:
    from tqdm import tqdm

    from moshi_stt.cluster.archive import Pool

CPUS_PER_ACTOR, CPUS_PER_ACTOR_ON_GPU = 2.0, 1.0
LINE_SECONDS = 60.0
"""From one line on progress to the next, where standard error is no terminal."""

_BROKEN = 70


def run_on_ray(args: argparse.Namespace, names: Sequence[str]) -> int:
    """Transcribe an archive. Returns the exit status. Raises MoshiSttError, also where Ray is not installed."""
    if not has_ray():
        raise MoshiSttError("--ray needs Ray, which is not installed: scripts/install.sh --with ray")
    return _RayArchive(args, names).transcribe()


def has_ray() -> bool:
    """Whether Ray Data is installed."""
    return importlib.util.find_spec("ray") is not None and importlib.util.find_spec("pyarrow") is not None


def pool_of(args: argparse.Namespace) -> "Pool":
    from moshi_stt.cluster.archive import Pool

    gpus = args.gpus_per_actor or 0.0
    cpus = args.cpus_per_actor or (CPUS_PER_ACTOR_ON_GPU if gpus else CPUS_PER_ACTOR)
    if gpus == 0 and args.ray_address is None and args.cpus_per_actor is None:
        from moshi_stt.cores import usable_cores

        cpus = min(cpus, float(usable_cores()))
    return Pool(args.ray_address, args.ray_actors, cpus, gpus)


class _RayArchive(Archive):
    """The driver: plans, hands recordings to the actors, and notes what they say."""

    def transcribe(self) -> int:
        from moshi_stt.cluster.archive import connected, run

        items = list(self.pending())
        if items:
            pool, jobs = pool_of(self.args), [_job(item) for item in items]
            warnings = set[str]()
            if sys.stderr.isatty() and not self.args.quiet:
                print("starting Ray and loading the model …", file=sys.stderr)
            with contextlib.ExitStack() as stack:
                stack.enter_context(connected(pool))
                bar = self.progress_bar()
                stack.callback(bar.close)
                begun = time.monotonic()
                next_line = begun + LINE_SECONDS
                for number, result in run(functools.partial(recordings, _settings(self.args)), jobs, pool):
                    self._take(items[number], result, warnings, bar)
                    now = time.monotonic()
                    rate = f"{self._seconds / 3_600:.2f} h of audio, {self._seconds / max(1e-3, now - begun):.0f} h an hour"
                    bar.set_postfix_str(rate)
                    bar.update(1)
                    if now >= next_line and not sys.stderr.isatty() and not self.args.quiet:
                        next_line = now + LINE_SECONDS
                        print(f"{self._done + self.failed} of {len(self.items)} recordings, {rate}", file=sys.stderr)
                self._wall = time.monotonic() - begun
            for warning in sorted(warnings):
                print(f"Warning: {warning}", file=sys.stderr)
        self.summarise()
        return 1 if self.failed else 0

    def _take(self, item: Item, result: str | None, warnings: set[str], bar: "tqdm[Any]") -> None:
        if result is None:
            outcome = Outcome(0.0, "the process that transcribed it ended every time it was tried")
        else:
            said = json.loads(result)
            outcome = Outcome(said["seconds"], said["error"], said["damage"], tuple(said["remarks"]))
            if said["warning"]:
                warnings.add(said["warning"])
        self.settle(item, outcome, bar)


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """What an actor needs of the command line."""
    names = ("config", "batch_size", "quantize", "prefix_seconds", "cpu", "track", "channels")
    return {name: getattr(args, name) for name in names}


def _job(item: Item) -> str:
    """A recording and where its results go. (Bytes of names that are no UTF-8 become escapes.)"""
    return json.dumps({"path": item.path, "outputs": {name: str(path) for name, path in item.outputs.items()}})


# ---- in an actor ---------------------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def recordings(settings: dict[str, Any]) -> AsyncIterator["Recordings"]:
    """A model that is loaded."""
    async with build_transcriber(argparse.Namespace(url=None, key=None, **settings)) as transcriber:
        yield Recordings(transcriber, Selection(settings["track"], settings["channels"]))


class Recordings:
    """Transcribes recordings into their files, as many at once as keep the model busy."""

    def __init__(self, transcriber: Transcriber, selection: Selection, end: Callable[[int], Any] = os._exit) -> None:
        """end: how the process ends when the model is broken; its recordings are then done by another."""
        self._transcriber = transcriber
        self._selection = selection
        self._at_once = asyncio.Semaphore(transcriber.jobs)
        self._end = end

    async def work(self, job: str) -> str:
        """Do one, `_job`'s text. Returns its `Outcome`, and a warning that is said once for the whole archive."""
        told = json.loads(job)
        item = Item(told["path"], {name: place(path) for name, path in told["outputs"].items()})
        async with self._at_once:
            result = await hear(self._transcriber, item, Source(item.path, self._selection), _ignore)
            if self._transcriber.is_broken:
                self._end(_BROKEN)
            error = result.error or await asyncio.to_thread(try_to_write, result)
        outcome = outcome_of(result, error)
        return json.dumps(outcome._asdict() | {"warning": self._transcriber.other_language})


def _ignore(seconds: float) -> None: ...
