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


def headings(path: Path) -> set[str]:
    """The anchors that a page's headings get."""
    names = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
    plain = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", name.strip().lower()) for name in names]
    return {re.sub(r"[^\w\- ]", "", name).replace(" ", "-") for name in plain}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_to_headings(path: Path) -> None:
    for target, anchor in re.findall(r"\]\(([^)#\s]*)#([^)]+)\)", path.read_text()):
        page = path.parent / target if target else path
        if "://" not in target and page.suffix == ".md":
            assert anchor in headings(page), f"{path.name} links to {target}#{anchor}, and there is no such heading"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_commands_and_scripts_are_there(path: Path) -> None:
    text = path.read_text()
    for code in re.findall(r"`([^`\n]+)`", text) + re.findall(r"^ *(moshi-st[^\n]*)", text, re.MULTILINE):
        for command in re.findall(r"moshi-stt ([a-z]+)\b", code):
            assert command in COMMANDS, f"{path.name} names the command {command}"
    for script in re.findall(r"\b(?:scripts|benchmarks|examples)/[A-Za-z0-9_./-]+\.(?:sh|py|service|plist)\b", text):
        assert (ROOT / script).exists(), f"{path.name} names {script}, which is not there"


def test_every_page_is_in_the_table_of_contents() -> None:
    contents = (ROOT / "docs" / "README.md").read_text()
    for page in sorted((ROOT / "docs").glob("**/*.md")):
        name = page.relative_to(ROOT / "docs").as_posix()
        assert name == "README.md" or f"({name})" in contents, f"docs/README.md does not list {name}"
