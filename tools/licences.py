"""Writes docs/licences.md: every package that requirements/*.txt names, with its licence as its own metadata states it.

    python tools/licences.py        # in an environment with everything installed: -e '.[torch,mlx,mic,ray]'

A package that is not installed here keeps the line that the page has.
"""

import importlib.metadata
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "licences.md"
HEAD = """# Licences of the dependencies

Every package that `requirements/*.txt` names, with the licence that its metadata states. `tools/licences.py` writes this page;
releases also carry a software bill of materials (CycloneDX) for the base install and each extra. The files that ship inside the
package are listed in [src/moshi_stt/data](../src/moshi_stt/data/README.md).

| package | licence | needed for |
|---|---|---|
"""


def names(path: Path) -> list[str]:
    """The packages of a requirements file."""
    return re.findall(r"^([A-Za-z0-9_.-]+)==", path.read_text(), re.M)


def licence(name: str) -> str | None:
    """What a package says of its licence, None where it is not installed."""
    try:
        data = importlib.metadata.metadata(name)
    except importlib.metadata.PackageNotFoundError:
        return None
    stated = data.get("License-Expression")
    classifiers = [c.rpartition(" :: ")[2] for c in data.get_all("Classifier") or [] if c.startswith("License ::")]
    short = (data.get("License") or "").strip()
    return stated or (short if 0 < len(short) < 60 and "\n" not in short else None) or ", ".join(classifiers) or "not stated"


def main() -> None:
    known = dict(re.findall(r"^\| ([^ |]+) \| ([^|]+) \|", PAGE.read_text(), re.M)) if PAGE.is_file() else {}
    needed: dict[str, list[str]] = {}
    base = names(ROOT / "requirements" / "base.txt")
    for extra in ("base", "torch", "mlx", "mic", "ray"):
        for name in names(ROOT / "requirements" / f"{extra}.txt"):
            if extra == "base" or name not in base:
                needed.setdefault(name, []).append(extra)
    rows = []
    for name in sorted(needed, key=str.lower):
        text = licence(name) or known.get(name, "").strip() or "not installed here"
        rows.append(f"| {name} | {text} | {', '.join(dict.fromkeys(needed[name]))} |")
    PAGE.write_text(HEAD + "\n".join(rows) + "\n")


if __name__ == "__main__":
    main()
