"""The command that installs what is missing, for messages: it must run as printed."""

import importlib.metadata
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

SCRIPT = "scripts/install.sh"


def checkout() -> Path | None:
    """The checkout that this package runs from, None for an installed wheel."""
    root = Path(__file__).parents[2]
    return root if (root / SCRIPT).is_file() else None


def install_command(extra: str = "", names: Sequence[str] = ()) -> str:
    """What installs an extra (`torch`, `mlx`, `mic`) or, without one, the packages `names`.

    In a checkout the script, by its full path; otherwise pip with the packages' own names.
    """
    root = checkout()
    if root is not None:
        script = shlex.quote(str(root / SCRIPT))
        return f"{script} --with {extra}" if extra else script
    wanted = names or requirements(extra)
    return "pip install " + " ".join(shlex.quote(name) for name in wanted)


def requirements(extra: str) -> list[str]:
    """What the base install ("") or an extra requires: `torch>=2.6`. Requirements of some platforms only are left out."""
    found = []
    for text in importlib.metadata.requires("moshi-stt") or []:
        requirement, _, marker = text.partition(";")
        named = re.search(r"extra == ['\"]([a-z]+)['\"]", marker)
        if (named[1] if named else "") == extra and not re.search(r"sys_platform|python_version", marker):
            found.append(requirement.strip())
    return found
