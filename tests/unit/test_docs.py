"""The documents: their links lead somewhere, the commands they name are there, and they name no place but the project's own."""

import re
from pathlib import Path

import pytest

from moshi_stt.cli import COMMANDS

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", path.read_text()):
        if "://" not in target:
            assert (path.parent / target).exists(), f"{path.name} links to {target}, which is not there"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_commands_and_scripts_are_there(path: Path) -> None:
    text = path.read_text()
    for code in re.findall(r"`([^`\n]+)`", text) + re.findall(r"^ *(moshi-st[^\n]*)", text, re.MULTILINE):
        for command in re.findall(r"moshi-stt ([a-z]+)\b", code):
            assert command in COMMANDS, f"{path.name} names the command {command}"
    for script in re.findall(r"\b(?:scripts|benchmarks|examples)/[A-Za-z0-9_./-]+\.(?:sh|py|service|plist)\b", text):
        assert (ROOT / script).exists(), f"{path.name} names {script}, which is not there"
