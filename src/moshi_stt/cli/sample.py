"""`moshi-stt sample`: a recording of real speech that came with an installed package. Knows where it lies."""

import argparse
from typing import Any


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "sample",
        help="print the path of a recording of speech to try",
        description='Print the path of a recording of real English speech, for `moshi-stt transcribe "$(moshi-stt sample)"`.',
    )
    return parser


def run(args: argparse.Namespace) -> int:
    from moshi_stt.sample import sample_path

    print(sample_path())
    return 0
