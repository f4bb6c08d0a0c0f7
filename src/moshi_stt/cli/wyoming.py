"""`moshi-stt wyoming`: a worker for Home Assistant alone, started as Wyoming's own servers are."""

import argparse
from typing import Any

from moshi_stt.cli import worker

DEFAULT_URI = "tcp://127.0.0.1:10300"


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "wyoming",
        help="serve Home Assistant's protocol",
        description="Serve Home Assistant's protocol (Wyoming). The HTTP port of `moshi-stt worker` then listens on this "
        "machine alone, on any free port.",
    )
    parser.add_argument("--uri", default=DEFAULT_URI, metavar="URI", help=f"address to listen on (default {DEFAULT_URI})")
    parser.add_argument(
        "--config", "--model", metavar="FILE", help="TOML file, or the name of a shipped one (default: the embedded model)"
    )
    parser.add_argument("--debug", action="store_true", help="log more")
    return parser


def run(args: argparse.Namespace) -> int:
    """Serve until a signal or a failure. Raises ConfigError before it has begun."""
    flags = ["worker", "--addr", "127.0.0.1", "--port", "0", "--wyoming", args.uri]
    if args.config:
        flags += ["--config", args.config]
    if args.debug:
        flags += ["--log", "debug"]
    parser = argparse.ArgumentParser()
    worker.add_parser(parser.add_subparsers())
    return worker.run(parser.parse_args(flags))
