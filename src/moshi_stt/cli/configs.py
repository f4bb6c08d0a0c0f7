"""`moshi-stt configs`: the shipped configurations. Knows where they are, not what they say."""

import argparse
from typing import Any


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "configs",
        help="list the shipped configurations, or print one",
        description="Print a shipped configuration, or list their names.",
    )
    parser.add_argument("which", nargs="?", metavar="NAME", help="print this one; without it, list the names")
    return parser


def run(args: argparse.Namespace) -> int:
    from moshi_stt.config_load import shipped_names, shipped_text

    if args.which is None:
        print("\n".join(shipped_names()))
    else:
        print(shipped_text(args.which), end="")
    return 0
