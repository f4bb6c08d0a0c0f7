"""Values of flags that several subcommands have."""

import argparse


def port_number(text: str) -> int:
    """A TCP port. Raises ArgumentTypeError, which argparse shows with the usage."""
    if not text.isdecimal() or int(text) > 65_535:
        raise argparse.ArgumentTypeError(f"{text} is not a port: expected 0 to 65535")
    return int(text)
