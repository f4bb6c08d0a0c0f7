"""Plans of rows, drawn by processes of their own while the device works."""

import argparse
import itertools
import multiprocessing
import queue
from collections.abc import Iterator, Sequence
from typing import Any

from training.compose import Bank, Mix, Plan, Planner

DEPTH = 3
"""Plans that each process keeps ready."""
_WAIT_SECONDS = 120.0
Sizes = Sequence[tuple[int, int]]


def add_shape_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--frames", type=int, default=125)
    parser.add_argument(
        "--long", type=int, default=1, help="every second batch has rows so many times as long, and so many fewer"
    )
    parser.add_argument("--planners", type=int, default=1, help="processes that draw what is said")


def shapes(args: argparse.Namespace) -> list[tuple[int, int]]:
    """Rows and frames of the batches, in turn."""
    short = (args.rows, args.frames)
    return [short] if args.long <= 1 else [short, (max(1, args.rows // args.long), args.frames * args.long)]


def plans(
    bank: Bank, pieces_of: dict[str, list[int]], delay: int, mix: Mix, sizes: Sizes, seed: int, processes: int
) -> Iterator[Plan]:
    """Endless plans of the sizes in turn; the same ones for the same arguments.

    The processes are forked at once: before the bank's sound is moved to a device. They end with this one.
    """
    context = multiprocessing.get_context("fork")
    queues = [context.Queue(DEPTH) for _ in range(processes)]
    for number, ready in enumerate(queues):
        planner = Planner(bank, pieces_of, delay, mix, 1_000 * seed + number)
        context.Process(target=_draw, args=(planner, sizes, number, processes, ready), daemon=True).start()
    return _taken(queues)


def _draw(planner: Planner, sizes: Sizes, number: int, processes: int, ready: "multiprocessing.Queue[Plan]") -> None:
    for index in itertools.count(number, processes):
        ready.put(planner.plan(*sizes[index % len(sizes)]))


def _taken(queues: Sequence[Any]) -> Iterator[Plan]:
    for ready in itertools.cycle(queues):
        try:
            yield ready.get(timeout=_WAIT_SECONDS)
        except queue.Empty:
            raise RuntimeError(f"no plan for {_WAIT_SECONDS:.0f} s: the process that draws them has died") from None
