"""Two functions at once on a CPU, each with its own number of threads. Knows nothing of models.

OpenMP's threads wait for each other by spinning. Where something else runs on the same cores, a product split over all of them
takes several times as long as on one; so work is split by function first, and by threads only where cores are left over.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

A = TypeVar("A")
B = TypeVar("B")


class Beside:
    """Runs pairs of functions: the first on a thread of its own, the second on the caller's.

    first_threads, second_threads: how many OpenMP threads each side's kernels use, its own included. With first_threads = 0
    there is no second thread: one function follows the other, each with second_threads.
    """

    def __init__(self, first_threads: int, second_threads: int = 1) -> None:
        self.first_threads = first_threads
        self.second_threads = second_threads
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="model") if first_threads else None

    def __call__(self, first: Callable[[], A], second: Callable[[], B]) -> tuple[A, B]:
        """Both results. What either raises is raised, after both have ended."""
        _use_threads(self.second_threads)
        if self._pool is None:
            return first(), second()
        future = self._pool.submit(_run, first, self.first_threads)
        try:
            b = second()
        finally:
            a = future.result()
        return a, b

    @property
    def threads_of_first(self) -> int:
        """How many threads the first function's kernels have, whichever thread it runs on."""
        return self.first_threads or self.second_threads

    def __str__(self) -> str:
        if self._pool is None:
            return f"{self.second_threads} threads" if self.second_threads > 1 else "1 thread"
        return f"{self.first_threads + self.second_threads} threads"

    def close(self) -> None:
        """End the thread. Idempotent."""
        if self._pool is not None:
            self._pool.shutdown()


class RowShare:
    """How many rows of the second side's work the first side should take over once its own is done, from how long both took."""

    LEAST = 4
    """Rows that are worth a second call."""

    def __init__(self) -> None:
        self._own = self._other = 0.0  # seconds a row, averaged over the last steps

    def rows(self, count: int) -> int:
        """Of `count`; 0 until `learn` was called."""
        spare = int(count * (self._other - self._own) / (2 * self._other)) if self._other else 0
        return spare if spare >= self.LEAST else 0

    def learn(self, own: float, other: float) -> None:
        """Seconds a row of the first side's own work, and of the second's."""
        weight = 0.1 if self._other else 1.0
        self._own += weight * (own - self._own)
        self._other += weight * (other - self._other)


def _run(function: Callable[[], A], threads: int) -> A:
    _use_threads(threads)
    with torch.inference_mode():
        return function()


def _use_threads(count: int) -> None:
    """Give the calling thread's kernels `count` threads."""
    if torch.get_num_threads() != count:
        torch.set_num_threads(count)
