"""docs/mac.md names flags and places that there are; test_docs.py holds the rest."""

import argparse
import re
from pathlib import Path

from moshi_stt.cli.worker import add_parser

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "mac.md").read_text(encoding="utf-8")


def test_links_lead_somewhere() -> None:
    headings = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in re.findall(r"^## (.+)$", PAGE, re.M)}
    for target in re.findall(r"\]\(([^)]+)\)", PAGE):
        page, _, anchor = target.partition("#")
        if page.startswith("http"):
            continue
        assert not page or (ROOT / "docs" / page).is_file(), target
        assert page or anchor in headings, target


def test_flags_are_the_workers() -> None:
    worker = add_parser(argparse.ArgumentParser().add_subparsers())
    table = PAGE.partition("| `moshi-stt worker …` | |")[2].partition("\n\n")[0]
    flags = set(re.findall(r"--[a-z][a-z-]+", table))
    assert len(flags) >= 6
    assert flags <= set(worker._option_string_actions)
