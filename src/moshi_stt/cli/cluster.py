"""`moshi-stt cluster`: several servers as one, on several hosts, by Ray and HAProxy (docs/scale.md)."""

import argparse
import asyncio
import importlib.util
import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from moshi_stt.cli.worker import parse_address
from moshi_stt.constants import DEFAULT_PORT
from moshi_stt.errors import ConfigError, MoshiSttError

if TYPE_CHECKING:
    from moshi_stt.cluster.actors import Remote
    from moshi_stt.cluster.front import State
    from moshi_stt.cluster.spec import ClusterSpec, Fleet, Paths, Server

NAME = "moshi-stt"
POLL_SECONDS = 0.5
WAIT_SECONDS = 600.0
LONGEST_SOCKET_FOLDER = 80
"""Bytes of the state folder's path: HAProxy's sockets lie in it, and a socket's path may have 97."""


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "cluster",
        help="serve from several devices or hosts at one address",
        description="Serve from several hosts at one address: replicas under Ray, HAProxy in front. See docs/scale.md.",
    )
    deeds = parser.add_subparsers(dest="deed", metavar="COMMAND", required=True)
    up = _deed(deeds, "up", "start replicas, or change a running cluster to what is given here", _up)
    up.add_argument("config", metavar="CONFIG", help="TOML file, or the name of a shipped one (see `moshi-stt configs`)")
    _add_counts(up)
    up.add_argument("--gpus-per-replica", type=_amount, default=0.0, metavar="G", help="GPUs of each (default 0)")
    up.add_argument("--cpus-per-replica", type=_amount, default=0.01, metavar="C", help="CPUs that Ray sets aside for each")
    up.add_argument("-a", "--addr", default="127.0.0.1", metavar="IP", help="address of all clients (default 127.0.0.1)")
    up.add_argument("-p", "--port", type=_port, default=DEFAULT_PORT, metavar="N", help=f"its port (default {DEFAULT_PORT})")
    up.add_argument("--start-seconds", type=_amount, default=600.0, metavar="S", help="how long models may load (default 600)")
    up.add_argument(
        "--up-after", type=_amount, default=3.0, metavar="S", help="add replicas after S seconds of need (default 3)"
    )
    up.add_argument("--down-after", type=_amount, default=60.0, metavar="S", help="remove one after S seconds (default 60)")
    up.add_argument("--worker-flags", default="", metavar="FLAGS", help="further flags of `moshi-stt worker`, in one string")
    status = _deed(deeds, "status", "show the replicas; exit status 0 when all are ready", _status)
    status.add_argument("--json", action="store_true", help="print one JSON document")
    scale = _deed(deeds, "scale", "change the number of replicas", _scale)
    scale.add_argument("replicas", nargs="?", type=_count, metavar="N", help="so many, whatever the load")
    _add_counts(scale, with_replicas=False)
    restart = _deed(deeds, "restart", "replace each replica by a new one, without cutting a stream", _restart)
    restart.add_argument("config", nargs="?", metavar="CONFIG", help="the configuration of the new ones (default: the same)")
    down = _deed(deeds, "down", "drain and end everything", _down)
    down.add_argument("--now", action="store_true", help="do not wait for live streams")
    haproxy = deeds.add_parser("haproxy", help="print HAProxy's file for replicas that are run in another way")
    haproxy.set_defaults(function=_haproxy)
    haproxy.add_argument("servers", nargs="+", metavar="HOST:PORT", help="the replicas, r0 first")
    haproxy.add_argument("--slots", type=_count, required=True, metavar="N", help="streams at once of each replica")
    haproxy.add_argument("-a", "--addr", default="0.0.0.0", metavar="IP", help="address of the clients (default 0.0.0.0)")
    haproxy.add_argument(
        "-p", "--port", type=_port, default=DEFAULT_PORT, metavar="N", help=f"its port (default {DEFAULT_PORT})"
    )
    return parser


def _deed(deeds: Any, name: str, help: str, function: Callable[[argparse.Namespace], int]) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = deeds.add_parser(name, help=help, description=f"{help[0].upper()}{help[1:]}.")
    parser.set_defaults(function=function)
    parser.add_argument("--name", default=NAME, help="the cluster (default %(default)s)")
    parser.add_argument("--state-dir", metavar="DIR", help="its folder (default ~/.local/state/moshi-stt/NAME)")
    if name != "status":
        parser.add_argument(
            "--address", metavar="RAY", help="Ray's address (default: RAY_ADDRESS, else a Ray of its own on this host)"
        )
        parser.add_argument("--wait", type=_amount, default=WAIT_SECONDS, metavar="S", help="how long to wait (default 600)")
    return parser


def _add_counts(parser: argparse.ArgumentParser, with_replicas: bool = True) -> None:
    if with_replicas:
        parser.add_argument("--replicas", type=_count, metavar="N", help="so many replicas, whatever the load (default 1)")
    parser.add_argument("--min", type=_count, metavar="A", help="at least so many, and as many as the load needs …")
    parser.add_argument("--max", type=_count, metavar="B", help="… but no more than these")


def run(args: argparse.Namespace) -> int:
    function: Callable[[argparse.Namespace], int] = args.function
    return function(args)


# ---- the commands ------------------------------------------------------------------------------------------------------


def _up(args: argparse.Namespace) -> int:
    need_ray()
    minimum, maximum = _bounds(args.replicas, args.min, args.max)
    spec = _spec(args, minimum, maximum)
    paths = _paths(args)
    paths.make()
    from moshi_stt.cluster.balancer import binary

    binary()
    _connect(args, paths, start=True)
    from moshi_stt.cluster.actors import Remote

    controller = Remote.find(spec.name)
    if controller is None:
        if not paths.fleet.exists():
            _need_free_port(spec.host, spec.port)
        controller = Remote.start(spec, paths.folder)
    else:
        need_same_address(controller.fleet().spec, spec)
    controller.configure(spec)
    fleet = _wait_settled(controller, args.wait)
    print("\n".join(table(fleet)))
    return 0


def _status(args: argparse.Namespace) -> int:
    from moshi_stt.cluster.front import tell

    paths = _paths(args)
    state = asyncio.run(tell(paths, "GET"))
    if args.json:
        print(msgspec.json.format(msgspec.json.encode(state), indent=2).decode())
    else:
        print("\n".join(state_lines(state)))
    fleet = state.fleet
    is_ready = fleet is not None and sum(report.phase == "ready" for report in fleet.reports) >= fleet.target
    return 0 if is_ready and not state.why else 1


def _scale(args: argparse.Namespace) -> int:
    need_ray()
    if args.replicas is None and args.min is None and args.max is None:
        raise ConfigError("cluster scale: expected a number of replicas, or --min and --max")
    minimum, maximum = _bounds(args.replicas, args.min, args.max)
    controller = _controller(args)
    controller.scale(minimum, maximum)
    print("\n".join(table(_wait_settled(controller, args.wait))))
    return 0


def _restart(args: argparse.Namespace) -> int:
    need_ray()
    config = text = drain_seconds = None
    if args.config is not None:
        from moshi_stt.config_load import load_config

        loaded = load_config(args.config).config
        drain_seconds = loaded.limits.drain_seconds
        config, text = args.config, _text_of(args.config)
    controller = _controller(args)
    if config is not None:
        known = controller.fleet().spec
        wyoming = loaded.wyoming.address if loaded.wyoming is not None else None
        need_same_address(known, msgspec.structs.replace(known, wyoming=wyoming))
    controller.restart(config, text, drain_seconds)
    print("\n".join(table(_wait_settled(controller, args.wait))))
    return 0


def _down(args: argparse.Namespace) -> int:
    need_ray()
    from moshi_stt.cluster import own_ray, sweep

    paths = _paths(args)
    own = own_ray.find(paths)
    has_other_ray = bool(args.address or os.environ.get("RAY_ADDRESS"))
    if has_other_ray or (own is not None and own_ray.is_running(own)):
        _connect(args, paths, start=False)
        from moshi_stt.cluster.actors import Remote, sweep_hosts

        controller = Remote.find(args.name)
        if controller is not None:
            controller.down(args.now)
            _wait(controller.has_ended, args.wait, "the cluster has not ended")
            controller.remove()
        sweep_hosts(args.name, paths.folder)
        own_ray.disconnect()
    asyncio.run(sweep.sweep(paths))  # the front first: it would start Ray again
    if own is not None:
        own_ray.end(own)
    print("ended: nothing of the cluster is left on this host")
    return 0


def _haproxy(args: argparse.Namespace) -> int:
    from moshi_stt.cluster import haproxy

    print(
        haproxy.render([_server(n, each, args.slots) for n, each in enumerate(args.servers)], bind=(args.addr, args.port)),
        end="",
    )
    return 0


# ---- helpers -----------------------------------------------------------------------------------------------------------


def need_ray() -> None:
    """Raises MoshiSttError where Ray is not installed, with the command that installs it."""
    if importlib.util.find_spec("ray") is None:
        raise MoshiSttError("Ray is not installed here. To add it: scripts/install.sh --with ray")


def need_same_address(known: "ClusterSpec", wanted: "ClusterSpec") -> None:
    """Raises ConfigError where a running cluster would have to listen somewhere else: its connections would be lost."""
    for what, here, there in (
        ("address", f"{known.host}:{known.port}", f"{wanted.host}:{wanted.port}"),
        ("[wyoming]", known.wyoming, wanted.wyoming),
    ):
        if here != there:
            raise ConfigError(
                f"{what}: the running cluster has {here or 'none'}, not {there or 'none'}: `moshi-stt cluster down` first"
            )


def _spec(args: argparse.Namespace, minimum: int, maximum: int) -> "ClusterSpec":
    import shlex

    from moshi_stt.cluster.spec import ClusterSpec
    from moshi_stt.config_load import load_config

    config = load_config(args.config).config
    return ClusterSpec(
        name=args.name,
        config=args.config,
        config_text=_text_of(args.config),
        minimum=minimum,
        maximum=maximum,
        cpus=args.cpus_per_replica,
        gpus=args.gpus_per_replica,
        host=parse_address(args.addr),
        port=args.port,
        wyoming=config.wyoming.address if config.wyoming is not None else None,
        drain_seconds=config.limits.drain_seconds,
        start_seconds=args.start_seconds,
        up_after_seconds=args.up_after,
        down_after_seconds=args.down_after,
        worker_flags=tuple(shlex.split(args.worker_flags)),
        folder=str(Path.cwd()),
    )


def _text_of(config: str) -> str | None:
    path = Path(config)
    return path.read_text(encoding="utf-8") if path.is_file() else None


def _bounds(replicas: int | None, minimum: int | None, maximum: int | None) -> tuple[int, int]:
    from moshi_stt.cluster.spec import MOST_REPLICAS

    if replicas is not None and (minimum is not None or maximum is not None):
        raise ConfigError("give a number of replicas, or --min and --max, not both")
    if replicas is not None:
        minimum = maximum = replicas
    low = minimum if minimum is not None else 1
    high = maximum if maximum is not None else low
    if not 1 <= low <= high <= MOST_REPLICAS:
        raise ConfigError(f"{low} to {high} replicas: expected 1 to {MOST_REPLICAS}, the smaller number first")
    return low, high


def _paths(args: argparse.Namespace) -> "Paths":
    from moshi_stt.cluster.spec import Paths

    home = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    folder = Path(args.state_dir) if args.state_dir else home / "moshi-stt" / args.name
    folder = folder.absolute()
    if len(os.fsencode(folder)) > LONGEST_SOCKET_FOLDER:
        raise ConfigError(f"{folder}: the path is too long for the sockets in it; give a shorter one by --state-dir")
    return Paths(folder)


def _connect(args: argparse.Namespace, paths: "Paths", start: bool) -> None:
    """Connect to Ray, or start one. Raises MoshiSttError."""
    from moshi_stt.cluster import own_ray

    address = args.address or os.environ.get("RAY_ADDRESS")
    if address is None:
        own = own_ray.start(paths) if start else own_ray.find(paths)
        if own is None:
            raise MoshiSttError(
                f"no cluster was started from {paths.folder}: give --address, or start one: moshi-stt cluster up"
            )
        own_ray.connect(own.address, own)
    else:
        own_ray.connect(address)


def _controller(args: argparse.Namespace) -> "Remote":
    _connect(args, _paths(args), start=False)
    from moshi_stt.cluster.actors import Remote

    found = Remote.find(args.name)
    if found is None:
        raise MoshiSttError(f"there is no cluster {args.name} under this Ray: start one by `moshi-stt cluster up`")
    return found


def _need_free_port(host: str, port: int) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            tried.bind((host, port))
        except OSError as error:
            raise ConfigError(f"port {port} on {host} cannot be used ({error.strerror}): take another by --port") from None


def _wait_settled(controller: "Remote", seconds: float) -> "Fleet":
    """What there is, once all replicas are of the newest revision and as many as there should be are ready."""
    shown = ""

    def settled() -> bool:
        nonlocal shown
        fleet = controller.fleet()
        now = ", ".join(f"{report.name} {report.phase}{f' ({report.why})' if report.why else ''}" for report in fleet.reports)
        if now != shown:
            print(now, file=sys.stderr)
            shown = now
        is_ready = sum(report.phase == "ready" for report in fleet.reports) >= fleet.target
        return is_ready and not fleet.note and len(fleet.reports) == fleet.target

    _wait(settled, seconds, "the cluster is not as it should be yet")
    return controller.fleet()


def _wait(done: Callable[[], bool], seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        if time.monotonic() >= deadline:
            raise MoshiSttError(f"{what} after {seconds:g} s: it goes on; see `moshi-stt cluster status`")
        time.sleep(POLL_SECONDS)


def table(fleet: "Fleet") -> list[str]:
    """The replicas for a person."""
    spec = fleet.spec
    many = f"{fleet.target}" if spec.minimum == spec.maximum else f"{fleet.target} ({spec.minimum} to {spec.maximum})"
    lines = [f"{spec.name}: {spec.config} at http://{spec.host}:{spec.port}/, replicas: {many}"]
    if fleet.note:
        lines.append(fleet.note)
    rows = [("replica", "state", "address", "streams", "lag", "revision", "restarts", "")]
    rows += [
        (
            report.name,
            report.phase,
            f"{report.host}:{report.port}" if report.port else "-",
            f"{report.used}/{report.total}",
            f"{report.lag_seconds:.2f} s",
            str(report.revision),
            str(report.restarts),
            report.why,
        )
        for report in fleet.reports
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [*lines, *("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)]


def state_lines(state: "State") -> list[str]:
    """What the front says, for a person."""
    lines = table(state.fleet) if state.fleet is not None else ["the cluster is starting"]
    balancer = f"HAProxy: {state.why}" if state.why else f"HAProxy: running (pid {state.haproxy_pid})"
    lines.append(f"{balancer}, started again {state.haproxy_restarts} times")
    if state.controller_seconds < 0 or state.controller_seconds > 10:
        lines.append("the controller is away: streams go on, nothing is replaced. `moshi-stt cluster up` starts it again")
    return lines


def _server(number: int, text: str, slots: int) -> "Server":
    from moshi_stt.cluster.spec import Server

    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65_535:
        raise ConfigError(f"{text}: expected HOST:PORT of a replica")
    return Server(name=f"r{number}", host=host.strip("[]"), port=int(port), slots=slots)


def _port(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 65_535:
        raise argparse.ArgumentTypeError(f"{text} is not a port: expected 1 to 65535")
    return int(text)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected a number, at least 1")
    return int(text)


def _amount(text: str) -> float:
    try:
        amount = float(text)
    except ValueError:
        amount = -1.0
    if not 0 <= amount < 1e9:
        raise argparse.ArgumentTypeError(f"{text}: expected a number, 0 or more")
    return amount
