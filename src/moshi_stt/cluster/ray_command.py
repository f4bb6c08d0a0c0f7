"""How a Ray on this host alone is started, whoever needs it."""

import contextlib
import socket
from typing import Final

OBJECT_STORE_BYTES: Final = 128 << 20
"""Our actors, jobs and results are small; Ray takes no less than 75 MiB."""

PATIENCE: Final = {"RAY_raylet_start_wait_time_s": "110", "RAY_agent_register_timeout_ms": "110000"}
"""Environment. On a busy machine Ray's processes take longer than it waits for them by itself."""

_PORTS: Final = (
    "dashboard-agent-grpc-port",
    "dashboard-agent-listen-port",
    "runtime-env-agent-port",
    "metrics-export-port",
    "ray-client-server-port",
)
"""Given, they need not be waited for: on a busy machine Ray gives up after 30 s otherwise. The last is fixed if not given."""


def start_arguments(port: int, folder: str) -> list[str]:
    """What follows the name of the Python program: a head node that listens at `port` and keeps its files in `folder`."""
    ports = zip(_PORTS, free_ports(len(_PORTS)), strict=True)
    return [
        *("-m", "ray.scripts.scripts", "start", "--head", "--node-ip-address", "127.0.0.1", "--port", str(port)),
        *("--temp-dir", folder, "--include-dashboard", "false", "--disable-usage-stats"),
        *("--object-store-memory", str(OBJECT_STORE_BYTES)),
        *(word for name, number in ports for word in (f"--{name}", str(number))),
    ]


def free_ports(count: int) -> list[int]:
    """Ports of this host that nobody has at the moment."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [int(each.getsockname()[1]) for each in sockets]
