"""The command line: `moshi-stt`, and `moshi-server` as its second name. Knows which module has which subcommand, no more.

A subcommand's module is imported when it is asked for, so that `--help` is instant. It has `add_parser(subparsers)`, which
returns the parser it added, and `run(args) -> int`, which returns the exit status. Errors: `Error: MESSAGE` on stderr and
status 1; wrong usage 2; interrupted 130.
"""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from moshi_stt import __version__
from moshi_stt.errors import MoshiSttError

COMMANDS = {
    "worker": "serve speech-to-text over WebSocket and HTTP",
    "cluster": "serve from several hosts at one address",
    "wyoming": "serve Home Assistant's protocol",
    "transcribe": "write down what is said in audio files",
    "mic": "write down what is said into the microphone",
    "validate": "check configuration files and the weights they name",
    "configs": "list the shipped configurations, or print one",
    "download": "fetch the weights of a configuration",
    "quantize": "write a checkpoint of 8 or 4 bits",
    "status": "show what a running server is doing",
    "advise": "say whether Kyutai's 1B model would keep up here",
    "size": "measure how many live streams this machine carries",
    "selftest": "recognise shipped speech and say PASS or FAIL",
    "doctor": "name what is missing on this machine",
    "sample": "print the path of a recording of speech to try",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand and return its exit status. Raises SystemExit(2) on wrong usage."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        status = _run(argv)
        sys.stdout.flush()  # here, where a reader that has gone can be dealt with, and not at exit
        return status
    except MoshiSttError as e:
        print(f"Error: {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output has gone, as in `moshi-stt configs | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _run(argv: list[str]) -> int:
    chosen = next((a for a in argv if not a.startswith("-")), None)
    parser = argparse.ArgumentParser(prog="moshi-stt", description="A streaming speech-to-text server and its clients.")
    parser.add_argument("--version", action="version", version=f"moshi-stt {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    module, chosen_parser = None, parser
    for name, help_text in COMMANDS.items():
        if name == chosen:
            module = importlib.import_module(f"moshi_stt.cli.{name}")
            chosen_parser = module.add_parser(subparsers)
        else:
            subparsers.add_parser(name, help=help_text, add_help=False)
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        chosen_parser.error(f"unrecognized arguments: {' '.join(unknown)}")  # with its usage, not that of moshi-stt
    if module is None:  # parse_args has ended the program: no command, --help, --version or an unknown name
        parser.error("expected a command")
    status: int = module.run(args)
    return status
