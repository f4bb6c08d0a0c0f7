"""The end of every benchmark: where and of what it was measured, and the result as one line of JSON."""

import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

EMBEDDED = {"device": "cpu", "weights": "embedded (moonshine tiny-en)"}
"""What benchmarks of the embedded model measure."""


def machine() -> dict[str, Any]:
    """The machine, and the commit of this checkout. COMMIT in the environment names it where there is no git."""
    return {
        "machine": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "commit": os.environ.get("COMMIT") or _git_commit(),
    }


def _git_commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def finish(name: str, result: dict[str, Any], out: Path | None = None, **kept: Any) -> None:
    """Print the result and where it was measured. out: a file that gets the same, and what is kept besides, if anything."""
    document = {"benchmark": name, **machine(), **result}
    if out is not None:
        out.write_text(json.dumps(document | kept) + "\n", encoding="utf-8")
    print(json.dumps(document), flush=True)
