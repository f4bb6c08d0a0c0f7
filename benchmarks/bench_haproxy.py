"""What HAProxy in front of a replica costs: messages a second and latency through it and directly, taking turns in one run.

The server is the whole one over an engine that does nothing, and HAProxy has the file that a cluster runs it with. "closed":
each connection sends when it has its answer; "paced": each sends a frame every 80 ms, as live streams do.

    python benchmarks/bench_haproxy.py --connections 64

Prints a table and, as its last line, one JSON document.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import report
from bench_protocol import Child

from moshi_stt.cluster.balancer import binary
from moshi_stt.cluster.haproxy import render
from moshi_stt.cluster.spec import MOST_REPLICAS, Server

START_SECONDS = 30.0


@contextmanager
def haproxy(port: int) -> Iterator[tuple[int, int]]:
    """A HAProxy in front of the replica on a port: its own port, and its process id."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        own = found.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "haproxy.cfg"
        replica = Server(name="r0", host="127.0.0.1", port=port, slots=1 << 16)
        path.write_text(render([replica], bind=("127.0.0.1", own), places=MOST_REPLICAS))
        running = subprocess.Popen([binary(), "-db", "-f", str(path)], stderr=subprocess.DEVNULL)
        try:
            deadline = time.monotonic() + START_SECONDS
            while not answers(own):
                if time.monotonic() > deadline:
                    raise TimeoutError("HAProxy did not start")
                time.sleep(0.05)
            yield own, running.pid
        finally:
            running.terminate()
            running.wait(10)


def answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=5) as answer:
            return bool(answer.status == 200)
    except (OSError, urllib.error.URLError):
        return False


def cpu_seconds(pid: int) -> float:
    """Of a process so far. Linux."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure(port: int, connections: int, paced: bool, seconds: float, pid: int) -> dict[str, float]:
    """Messages a second and the wait for an answer, as the load sees them; HAProxy's CPU time for each message."""
    clients = Child("--load", str(port), "--connections", str(connections), *(["--paced"] if paced else []))
    assert clients.line() == "connected"
    clients.ask()
    time.sleep(min(2.0, seconds / 3))
    count, began, used = int(clients.ask()), time.perf_counter(), cpu_seconds(pid)
    time.sleep(seconds)
    count, wall, used = int(clients.ask()) - count, time.perf_counter() - began, cpu_seconds(pid) - used
    waits: dict[str, float] = json.loads(clients.line())
    clients.process.wait(10)
    return {"messages_per_second": count / wall, "haproxy_us_per_message": used / count * 1e6, **waits}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--rounds", type=int, default=5, help="direct and through HAProxy take turns; the table shows medians")
    options = parser.parse_args()
    server = Child("--serve", "moshi-stt")
    port = int(server.line())
    rows: list[dict[str, Any]] = []
    with haproxy(port) as (through, pid):
        for paced in (False, True):
            results: dict[str, list[dict[str, float]]] = {"direct": [], "haproxy": []}
            for _ in range(options.rounds):
                for way, at in (("direct", port), ("haproxy", through)):
                    results[way].append(measure(at, options.connections, paced, options.seconds, pid))
            medians = {
                way: {key: statistics.median(each[key] for each in found) for key in found[0]} for way, found in results.items()
            }
            pairs = zip(results["direct"], results["haproxy"], strict=True)
            ratio = statistics.median(b["messages_per_second"] / a["messages_per_second"] for a, b in pairs)
            rows.append({"paced": paced, "connections": options.connections, "ratio": round(ratio, 3), **medians})
    server.end()
    print(f"{'load':8} {'way':8} {'msg/s':>8} {'p50 ms':>8} {'p99 ms':>8}")
    for row in rows:
        load = "paced" if row["paced"] else "closed"
        for way in ("direct", "haproxy"):
            each = row[way]
            print(f"{load:8} {way:8} {each['messages_per_second']:8.0f} {each['p50_ms']:8.2f} {each['p99_ms']:8.2f}")
        print(
            f"{load:8} HAProxy takes {row['haproxy']['haproxy_us_per_message']:.0f} µs of CPU time for a message and its answer"
        )
        added = [row["haproxy"][key] - row["direct"][key] for key in ("p50_ms", "p99_ms")]
        print(f"{load:8} through HAProxy {row['ratio']:.2f} of direct; added p50 {added[0]:.2f} ms, p99 {added[1]:.2f} ms")
    report.finish("haproxy", {"device": "cpu", "weights": "none", "rows": rows})


if __name__ == "__main__":
    main()
