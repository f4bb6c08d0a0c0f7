"""What is written down about packages agrees: markers, constraints, requirements with hashes, licences."""

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXTRAS = ("base", "torch", "mlx", "mic", "ray")


def pins(path: Path) -> dict[str, set[str]]:
    """Versions by package of a constraints or requirements file; names as the index normalises them."""
    found: dict[str, set[str]] = {}
    for name, version in re.findall(r"^([A-Za-z0-9_.-]+)==([^ ;\\\n]+)", path.read_text(), re.M):
        found.setdefault(re.sub(r"[-_.]+", "-", name).lower(), set()).add(version)
    return found


@pytest.mark.parametrize("extra", EXTRAS)
def test_requirements_are_the_constraints_with_hashes(extra: str) -> None:
    constrained = pins(ROOT / "constraints.txt")
    text = (ROOT / "requirements" / f"{extra}.txt").read_text()
    found = pins(ROOT / "requirements" / f"{extra}.txt")
    for name, versions in found.items():
        if name in constrained:
            assert versions <= constrained[name], name
    for block in re.split(r"\n(?=\S)", text):
        if "==" in block.splitlines()[0]:
            assert "--hash=sha256:" in block, block[:80]
    assert "://" not in text, "a requirements file names an index"


@pytest.mark.parametrize("extra", EXTRAS)
def test_requirements_hold_what_pyproject_asks_for(extra: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + (project["optional-dependencies"][extra] if extra != "base" else [])
    names = {re.sub(r"[-_.]+", "-", re.match(r"[A-Za-z0-9_.-]+", text)[0]).lower() for text in wanted}  # type: ignore[index]
    assert names <= set(pins(ROOT / "requirements" / f"{extra}.txt"))


def test_every_dependency_has_a_lowest_and_a_highest_version() -> None:
    """A major version that is not out yet would reach the wheel's users before it reached a test."""
    whole = tomllib.loads((ROOT / "pyproject.toml").read_text())
    groups = [whole["build-system"]["requires"], whole["project"]["dependencies"]]
    groups += whole["project"]["optional-dependencies"].values()
    for text in (text for group in groups for text in group):
        assert re.fullmatch(r"[a-z0-9_-]+(\[[a-z,]+\])?>=[0-9.]+,<[0-9.]+", text.partition(";")[0]), text


def test_every_dependency_has_its_licence_written_down() -> None:
    page = dict(re.findall(r"^\| ([^ |]+) \| ([^|]+) \|", (ROOT / "docs" / "licences.md").read_text(), re.M))
    for extra in EXTRAS:
        for name in pins(ROOT / "requirements" / f"{extra}.txt"):
            assert name in page, f"{name}: run tools/licences.py"
            assert "not installed" not in page[name], name


def test_markers_of_the_kernels_name_are_of_text() -> None:
    """pip compares `platform_release` as a version where it can, and Linux's is none: `6.1.0-13-amd64` would be an error."""
    for name in ("pyproject.toml", "constraints.txt"):
        for text in re.findall(r"platform_release\s*(?:<|>=?|<=|==)\s*['\"]([^'\"]+)", (ROOT / name).read_text()):
            assert text.endswith("."), f"{name}: {text}"


def test_nothing_prints_a_command_that_installs_somebody_elses_package() -> None:
    """The name on the public index is not ours."""
    wrong = []
    for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("src/**/*.py"), *ROOT.glob("scripts/**/*.*")]:
        text = path.read_text(encoding="utf-8", errors="replace")
        assert ".venv/bin/pip" not in text, f"{path}: an environment that uv made has no pip in it"
        if re.search(r"pip install[^\n`]*['\" ]moshi-stt(\[|['\"`\s]|$)", text):
            wrong.append(str(path.relative_to(ROOT)))
    assert wrong == []
