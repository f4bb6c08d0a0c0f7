"""`moshi-stt worker`: configuration and flags to a running server. Knows neither sockets nor models."""

import argparse
import ipaddress
import logging
import os
import socket
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from moshi_stt.cli.arguments import port_number
from moshi_stt.config import (
    MOST_SOCKET_PROCESSES,
    EmbeddedModule,
    EngineConfig,
    KyutaiModule,
    Module,
    ServerConfig,
    WyomingConfig,
    with_quantize,
)
from moshi_stt.constants import DEFAULT_PORT, PUBLIC_KEY
from moshi_stt.errors import ConfigError

if TYPE_CHECKING:
    from moshi_stt.devices import Device
    from moshi_stt.engine.engine import Engine
    from moshi_stt.server.devices.pool import DevicePool
    from moshi_stt.server.takeover import Takeover

log = logging.getLogger(__name__)


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "worker",
        help="serve speech-to-text over WebSocket and HTTP",
        description="Serve speech-to-text over WebSocket and HTTP. Without --config: the embedded English model.",
    )
    parser.add_argument(
        "-l", "--log", default="info", metavar="LEVEL", help="off, error, warn, info (default), debug, trace; or 0 to 5"
    )
    parser.add_argument("-a", "--addr", default="0.0.0.0", metavar="IP", help="address to listen on (default 0.0.0.0)")
    parser.add_argument(
        "-p", "--port", type=port_number, default=DEFAULT_PORT, metavar="N", help="port, 0 for a free one (default 8080)"
    )
    parser.add_argument("--cpu", action="store_true", help="run the models on the CPU, whatever else is there")
    parser.add_argument(
        "--config", "--model", metavar="FILE", help="TOML file, or the name of a shipped one (see `moshi-stt configs`)"
    )
    parser.add_argument("--silent", action="store_true", help="no log on stdout, only in the log file")
    ours = parser.add_argument_group("not in moshi-server", "These override [modules.NAME.moshi_stt] of the file.")
    ours.add_argument("--device", choices=["auto", "cpu", "cuda", "mps", "mlx"], help="what runs the models")
    ours.add_argument(
        "--devices",
        metavar="LIST",
        help="one model process on each: all (every NVIDIA GPU), cuda:0,cuda:1, or sets of cores: cpu:0-3,cpu:4-7",
    )
    ours.add_argument("--quantize", choices=["none", "int8", "int4"], help="quantize the weights while loading")
    ours.add_argument("--batch-size", type=_batch_size, metavar="N", help="streams at once, of every module")
    ours.add_argument(
        "--socket-processes", type=_processes, metavar="N", help="further processes that carry WebSockets, or auto (default)"
    )
    ours.add_argument(
        "--trusted-proxy",
        action="append",
        default=[],
        metavar="IP",
        help="a proxy whose X-Real-IP is believed, as trusted_proxies",
    )
    ours.add_argument("--wyoming", metavar="URI", help="also serve Home Assistant's protocol, e.g. tcp://127.0.0.1:10300")
    ours.add_argument("--handover", metavar="PATH", help="Unix socket at which another worker may take this one's place")
    ours.add_argument(
        "--take-over",
        action="store_true",
        help="take the place of the worker that offers it at --handover, once the models here have passed the self-test",
    )
    ours.add_argument("--pid-file", metavar="PATH", help="write the process id here once connections are taken")
    return parser


def run(args: argparse.Namespace) -> int:
    """Serve until a signal or a failure. Returns the server's exit status; raises ConfigError before it has begun."""
    from moshi_stt.cli.logs import parse_level, set_up_logging
    from moshi_stt.config_load import LoadedConfig, embedded_config, load_config
    from moshi_stt.engines import build_engines

    name_process()
    level = parse_level(args.log)
    host = parse_address(args.addr)
    loaded = load_config(args.config) if args.config else LoadedConfig(embedded_config(), "the built-in configuration", [])
    config = override(loaded.config, args)
    if not config.modules:
        raise ConfigError(f"{loaded.source}: there is no [modules.NAME] table, so nothing would be served. Add a module.")
    set_up_logging(
        level,
        log_dir=config.log_dir,
        instance_name=config.instance_name,
        silent=args.silent,
        keys=config.authorized_ids,
    )
    log.info("configuration: %s", loaded.source)
    for warning in loaded.warnings + warnings_of(config, host):
        log.warning("%s", warning)
    devices = devices_of(args, config)
    if len(devices) == 1:
        config = use_device(config, devices[0])
    engines = build_engines(config, force_cpu=args.cpu)
    for name, engine in engines.items():
        log.info("loading %s%s", name, f": {engine.info.model}" if engine.info.model else "")

    from moshi_stt.server.app import serve

    pool = None
    if len(devices) > 1:
        from moshi_stt.server.devices.pool import DevicePool

        pool = DevicePool(config, devices, build_engines)
        engines = dict(pool.engines)
    takeover = takeover_of(args, config, engines, pool)
    pid_file = Path(args.pid_file) if args.pid_file else None
    return serve(packaged_page_if_missing(config), engines, host, args.port, takeover, pid_file, pool)


def devices_of(args: argparse.Namespace, config: ServerConfig) -> "Sequence[Device]":
    """Those of --devices, else of the configuration; empty where neither names any. Raises ConfigError."""
    wanted = config.limits.devices if args.devices is None else args.devices
    if not wanted:
        return ()
    if args.device is not None or args.cpu:
        flag = "--cpu" if args.cpu else f"--device {args.device}"
        raise ConfigError(f"{flag} and devices {wanted} contradict each other: give one of them")
    from moshi_stt.devices import parse_devices

    devices = parse_devices(wanted)
    gpu = next((device.name for device in devices if device.gpu is not None), None)
    if gpu is not None and any(isinstance(module, EmbeddedModule) for module in config.modules):
        raise ConfigError(
            f"--devices {wanted}: the embedded model runs on the CPU alone, not on {gpu}; choose Kyutai's by --config"
        )
    return devices


def use_device(config: ServerConfig, device: "Device") -> ServerConfig:
    """Let this process use this device alone, and its modules run on it."""
    from moshi_stt.server.devices.pool import on_device

    device.pin()
    os.environ.update(device.environment())
    return on_device(config, device)


def name_process() -> None:
    """Let `pgrep moshi-server` and `top` find this process by its name, however it was started. Linux alone."""
    if sys.platform != "linux":
        return
    import ctypes

    set_name = 15  # PR_SET_NAME
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(set_name, b"moshi-server", 0, 0, 0)


def takeover_of(
    args: argparse.Namespace, config: ServerConfig, engines: "Mapping[str, Engine]", pool: "DevicePool | None" = None
) -> "Takeover | None":
    """How this server replaces another and is replaced, by --handover and --take-over. Raises ConfigError."""
    if args.handover is None:
        if args.take_over:
            raise ConfigError("--take-over: say where the running server offers its place, by --handover PATH")
        return None
    if not hasattr(socket, "send_fds"):
        raise ConfigError("--handover: this system cannot hand sockets to other processes; leave it out")
    from moshi_stt.server.takeover import Takeover

    async def check() -> None:
        if pool is not None:
            await pool.self_test(self_test)
            return
        for module in config.modules:
            await self_test(module, engines[module.name])

    return Takeover(Path(args.handover), args.take_over, check)


async def self_test(module: Module, engine: "Engine") -> None:
    """Log what the self-test finds. Raises EngineError where it fails."""
    from moshi_stt.cli.selftest import line, publishes_words
    from moshi_stt.errors import EngineError
    from moshi_stt.selftest import check_engine

    checks = await check_engine(engine, publishes_words(module))
    for found in checks:
        log.info("self-test of %s: %s", module.name, line(found))
    failed = [f"{found.what}: {found.text}" for found in checks if found.passed is False]
    if failed:
        raise EngineError(f"module {module.name} failed its self-test ({'; '.join(failed)})")


def _batch_size(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} streams: expected a number, at least 1")
    return int(text)


def _processes(text: str) -> int | Literal["auto"]:
    if text == "auto":
        return "auto"
    if not text.isdecimal() or int(text) > MOST_SOCKET_PROCESSES:
        raise argparse.ArgumentTypeError(f"{text} processes: expected 0 to {MOST_SOCKET_PROCESSES}, or auto")
    return int(text)


def parse_address(text: str) -> str:
    """An IP address, or `localhost`, as an IP address. Raises ConfigError for anything else."""
    if text == "localhost":
        return "127.0.0.1"
    try:
        return str(ipaddress.ip_address(text))
    except ValueError:
        raise ConfigError(
            f"--addr {text}: expected an IP address: 127.0.0.1 for this machine alone, 0.0.0.0 for every interface"
        ) from None


def parse_proxy(text: str) -> str:
    """An IP address. Raises ConfigError for anything else."""
    try:
        return str(ipaddress.ip_address(text))
    except ValueError:
        raise ConfigError(f"--trusted-proxy {text}: expected the IP address of a proxy, such as 10.0.0.5") from None


def override(config: ServerConfig, args: argparse.Namespace) -> ServerConfig:
    """The configuration with the command line's device, quantisation and batch size put into every module."""
    if args.cpu and args.device not in (None, "cpu"):
        raise ConfigError(f"--cpu and --device {args.device} contradict each other: give one of them")
    device = "cpu" if args.cpu else args.device
    modules = []
    for module in config.modules:
        changed: Module = module
        if isinstance(changed, KyutaiModule) and device is not None:
            engine: EngineConfig = msgspec.structs.replace(changed.engine, device=device)
            changed = msgspec.structs.replace(changed, engine=engine)
        elif device not in (None, "auto", "cpu"):
            raise ConfigError(f"--device {device}: the embedded model runs on the CPU alone; choose Kyutai's by --config")
        if args.quantize is not None:
            changed = with_quantize(changed, args.quantize)
        if args.batch_size is not None:
            changed = msgspec.structs.replace(changed, batch_size=args.batch_size)
        modules.append(changed)
    limits = config.limits
    if args.socket_processes is not None:
        limits = msgspec.structs.replace(limits, socket_processes=args.socket_processes)
    for proxy in args.trusted_proxy:
        limits = msgspec.structs.replace(limits, trusted_proxies=(*limits.trusted_proxies, parse_proxy(proxy)))
    wyoming = config.wyoming
    if args.wyoming is not None:
        wyoming = msgspec.structs.replace(wyoming or WyomingConfig(), uri=args.wyoming)
        _ = wyoming.address  # raises ConfigError where it is none
    return msgspec.structs.replace(config, modules=tuple(modules), limits=limits, wyoming=wyoming)


def warnings_of(config: ServerConfig, host: str) -> list[str]:
    """What is legal and probably not meant."""
    found = []
    if not ipaddress.ip_address(host).is_loopback and PUBLIC_KEY in config.authorized_ids:
        found.append(
            f"{host} can be reached from other machines and the key is the well-known {PUBLIC_KEY!r}: anyone who reaches this "
            "port can use it. Put a key of your own into authorized_ids, or listen on 127.0.0.1 alone: --addr 127.0.0.1"
        )
    if config.static_dir is not None and not Path(config.static_dir).is_dir():
        found.append(f"static_dir = {config.static_dir!r} does not exist; serving the page that comes with the package")
    return found


def packaged_page_if_missing(config: ServerConfig) -> ServerConfig:
    """The configuration with a static_dir that does not exist taken out."""
    if config.static_dir is not None and not Path(config.static_dir).is_dir():
        return msgspec.structs.replace(config, static_dir=None)
    return config
