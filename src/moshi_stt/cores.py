"""How many CPU cores this process may use: its affinity and the CPU quota of its container, whichever is less."""

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

ROOT = Path("/")
"""Where /proc and /sys are."""

CGROUPS = "proc/self/cgroup"
MOUNT = "sys/fs/cgroup"


_limit: int | None = None


def limit_cores(count: int | None) -> None:
    """Let this process take no more cores than so many, for it shares the machine with others like it; None lifts the limit."""
    global _limit
    _limit = count


def usable_cores() -> int:
    """Cores for threads that compute, at least 1.

    A quota of 2.5 cores counts as 2: a third thread would only be throttled.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = min(_quotas(ROOT), default=float(cores))
    return max(1, min(cores, int(quota), _limit or cores))


def _quotas(root: Path) -> Iterator[float]:
    """The CPU quotas, in cores, of this process's control group and of every group around it.

    In a container the path in /proc/self/cgroup may be the host's, of which nothing is mounted: the mount's own root is then
    the container's group.
    """
    try:
        lines = (root / CGROUPS).read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = (*line.split(":", 2), "", "")[:3]
        if not controllers:
            mounts = [root / MOUNT, root / MOUNT / "unified"]
        elif "cpu" in controllers.split(","):
            mounts = [root / MOUNT / controllers, root / MOUNT / "cpu"]
        else:
            continue
        groups = [PurePosixPath(path.lstrip("/")), *PurePosixPath(path.lstrip("/")).parents]
        for folder in {mount / group for mount in mounts for group in groups}:
            quota = _quota_v1(folder) if controllers else _quota_v2(folder)
            if quota is not None:
                yield quota


def _quota_v2(folder: Path) -> float | None:
    """`cpu.max` is `QUOTA PERIOD` in microseconds, or `max PERIOD`."""
    words = _words(folder / "cpu.max")
    return _ratio(words[0], words[1]) if len(words) == 2 else None


def _quota_v1(folder: Path) -> float | None:
    """`cpu.cfs_quota_us` is -1 where there is none."""
    quota, period = _words(folder / "cpu.cfs_quota_us"), _words(folder / "cpu.cfs_period_us")
    return _ratio(quota[0], period[0]) if quota and period else None


def _ratio(quota: str, period: str) -> float | None:
    if not quota.isdecimal() or not period.isdecimal() or int(period) == 0:
        return None
    return int(quota) / int(period)


def _words(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").split()
    except OSError:
        return []
