"""Nothing that docs/compatibility.md promises may go. Additions are free; `--write` adds them to the snapshot:

python -m tests.unit.test_compatibility --write
"""

import argparse
import importlib
import json
import re
import sys
from pathlib import Path

import msgspec
import pytest

import moshi_stt
from moshi_stt import config, events
from moshi_stt.cli import COMMANDS
from moshi_stt.server.metrics import Metrics

SNAPSHOT = Path(__file__).parents[1] / "data" / "public.json"
PAGE = Path(__file__).parents[2] / "docs" / "compatibility.md"
DERIVED = {"name", "config_file"}
"""Fields of a module's struct that are no keys of its table."""


def surface() -> dict[str, list[str]]:
    """Everything public, by kind."""
    return {
        "names of the package": sorted(moshi_stt.__all__),
        "commands and flags": sorted(flags()),
        "keys of a configuration": sorted(keys()),
        "metrics": sorted(set(re.findall(r"^# TYPE (\S+) ", Metrics().render().decode(), re.M))),
        "events and their keys": sorted(messages()),
    }


def flags() -> list[str]:
    found = []
    for command in COMMANDS:
        module = importlib.import_module(f"moshi_stt.cli.{command}")
        parser: argparse.ArgumentParser = module.add_parser(argparse.ArgumentParser().add_subparsers())
        found.append(command)
        found += [f"{command} {option}" for action in parser._actions for option in action.option_strings]
    return found


def keys() -> list[str]:
    """As `Struct.field`; the loader reads them under these names."""
    structs = [each for each in vars(config).values() if isinstance(each, type) and issubclass(each, msgspec.Struct)]
    return [
        f"{struct.__name__.removesuffix('Config')}.{field.encode_name}"
        for struct in structs
        for field in msgspec.structs.fields(struct)
        if field.name not in DERIVED
    ]


def messages() -> list[str]:
    structs = [each for each in vars(events).values() if isinstance(each, type) and issubclass(each, events.Event)]
    return [
        f"{struct.__struct_config__.tag}.{field.encode_name}"
        for struct in structs
        if struct is not events.Event
        for field in msgspec.structs.fields(struct)
    ]


@pytest.mark.parametrize("kind", surface())
def test_nothing_public_has_gone(kind: str) -> None:
    gone = set(json.loads(SNAPSHOT.read_text())[kind]) - set(surface()[kind])
    assert gone == set(), f"{kind}: docs/compatibility.md says that these stay"


@pytest.mark.parametrize("kind", surface())
def test_the_page_names_each_kind(kind: str) -> None:
    assert kind in PAGE.read_text()


if __name__ == "__main__" and "--write" in sys.argv:
    SNAPSHOT.write_text(json.dumps(surface(), indent=1) + "\n")
