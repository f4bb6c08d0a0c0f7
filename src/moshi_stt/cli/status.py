"""`moshi-stt status`: what a running server is doing, asked over HTTP. Knows the routes, not the server."""

import argparse
import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from http.client import HTTPException
from typing import Any, NamedTuple

from moshi_stt.constants import DEFAULT_PORT
from moshi_stt.errors import MoshiSttError

HTTP_SECONDS = 5.0
POLL_SECONDS = 0.2


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "status",
        help="show what a running server is doing",
        description="Show what a running server is doing. Exit status 0 when it is ready, 1 when not.",
    )
    parser.add_argument("--url", default=f"http://127.0.0.1:{DEFAULT_PORT}", help="the server (default %(default)s)")
    parser.add_argument("--pid", type=int, metavar="N", help="its process, for memory, processor and uptime")
    parser.add_argument(
        "--wait", type=float, metavar="SECONDS", help="wait so long for it to be ready; ends early if the process does"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--quiet", action="store_true", help="print nothing, only the exit status")
    return parser


def run(args: argparse.Namespace) -> int:
    url = args.url.rstrip("/")
    if "://" not in url:
        url = f"http://{url}"
    if args.wait is not None and not wait_until_ready(url, args.wait, args.pid):
        if not args.quiet:
            print(f"Error: {url} was not ready within {args.wait:g} s", file=sys.stderr)
        return 1
    report = read_status(url, args.pid)
    if not args.quiet:
        print(json.dumps(report, indent=2) if args.json else "\n".join(lines(report)))
    return 0 if report["ready"] else 1


class Answer(NamedTuple):
    status: int
    body: str


def get(url: str) -> Answer:
    """One GET. Raises MoshiSttError where nobody answers."""
    try:
        with urllib.request.urlopen(url, timeout=HTTP_SECONDS) as response:
            return Answer(response.status, response.read().decode("utf-8", "replace"))
    except urllib.error.HTTPError as e:
        with e:
            return Answer(e.code, e.read().decode("utf-8", "replace"))
    except (OSError, HTTPException, ValueError) as e:
        reason = getattr(e, "reason", None) or e
        raise MoshiSttError(f"no server answers at {url}: {reason}. Start one: moshi-stt worker") from None


def wait_until_ready(url: str, seconds: float, pid: int | None) -> bool:
    """Whether `/ready` said yes before the time was up and before the process `pid` ended."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            if get(f"{url}/ready").status == 200:
                return True
        except MoshiSttError:
            pass
        if time.monotonic() >= deadline or (pid is not None and not alive(pid)):
            return False
        time.sleep(POLL_SECONDS)


def alive(pid: int) -> bool:
    """Whether the process is there and no zombie."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return not ps(pid, "stat").startswith("Z")


def ps(pid: int, column: str) -> str:
    """One column of `ps` for a process, empty where there is none. Works on Linux and macOS."""
    done = subprocess.run(["ps", "-p", str(pid), "-o", f"{column}="], capture_output=True, text=True, check=False)
    return done.stdout.strip()


def read_status(url: str, pid: int | None) -> dict[str, Any]:
    """Everything that the server says of itself. Raises MoshiSttError where nobody answers."""
    ready = get(f"{url}/ready")
    health = get(f"{url}/health")
    report: dict[str, Any] = {"url": url, "ready": ready.status == 200, "healthy": health.status == 200}
    if ready.status != 200:
        report["why"] = ready.body.strip()[:500]
    modules = get(f"{url}/api/modules_info")
    report["modules"] = json.loads(modules.body) if modules.status == 200 else []
    metrics = parse_metrics(get(f"{url}/metrics").body)
    report["connections"] = int(metrics.get("asr_connect", 0))
    steps = metrics.get("asr_model_step_duration_count", 0)
    if steps:
        report["mean_step_ms"] = round(1000 * metrics["asr_model_step_duration_sum"] / steps, 1)
    if pid is not None:
        rss = ps(pid, "rss")
        report["process"] = {
            "pid": pid,
            "memory_mb": round(int(rss) / 1024) if rss.isdigit() else None,
            "cpu_percent": ps(pid, "%cpu"),
            "uptime": ps(pid, "etime"),
        }
    return report


def parse_metrics(text: str) -> dict[str, float]:
    """Sums of a Prometheus text over all labels, by sample name."""
    sums: dict[str, float] = {}
    for line in text.splitlines():
        if line and not line.startswith("#"):
            name, _, value = line.rpartition(" ")
            bare = name.split("{")[0]
            sums[bare] = sums.get(bare, 0.0) + float(value)
    return sums


def lines(report: dict[str, Any]) -> list[str]:
    """The report for a person."""
    state = "ready" if report["ready"] else "alive, not ready" if report["healthy"] else "failed"
    out = [f"{report['url']}: {state}" + (f" ({report['why']})" if report.get("why") else "")]
    for module in report["modules"]:
        slots = f"{module.get('used_slots', '?')} of {module.get('total_slots', '?')} streams"
        out.append(f"  {module.get('path')}: {module.get('type')}, {module.get('lm', '')}, {slots}")
    step = f", mean step {report['mean_step_ms']} ms" if "mean_step_ms" in report else ""
    out.append(f"  connections since start: {report['connections']}{step}")
    process = report.get("process")
    if process:
        out.append(
            f"  process {process['pid']}: {process['memory_mb']} MB, {process['cpu_percent']} % CPU, "
            f"up {process['uptime']} (days-hours:minutes:seconds)"
        )
    return out
