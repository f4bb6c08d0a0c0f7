"""Every kernel compiled for GPUs that are not there: `tests.support.compile_kernels` in a process of its own.

The default run takes each kernel's largest, deepest and thinnest tile on two chips, with MOSHI_STT_FULL=1 every tile that can
be chosen on every kind of chip from Ampere on.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

FULL = os.environ.get("MOSHI_STT_FULL") == "1"

SUMS = {"_product", "_gated", "_conv", "_residual", "_level"}
"""Kernels whose sums over columns must not depend on the tile."""

if importlib.util.find_spec("triton") is None or importlib.util.find_spec("torch") is None:
    pytest.skip("Triton is not installed (PyTorch brings it on Linux, with CUDA)", allow_module_level=True)


@pytest.mark.timeout(7_200 if FULL else 1_200)
@pytest.mark.parametrize("capability", ["8.0", "8.6", "8.9", "9.0", "10.0", "12.0"] if FULL else ["8.0", "8.9"])
def test_every_kernel_fits(capability: str, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "tests.support.compile_kernels", capability, *(["--all"] if FULL else [])]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    wrong = [line for line in lines if "error" in line or line["shared"] > line["limit"]]
    assert not wrong, wrong
    assert done.returncode == 0, done.stderr[-2_000:]
    folded = [line for line in lines if line["kernel"] in SUMS and not line["loops"]]
    assert not folded, "all columns at once: the compiler then sums in another order than at other tiles"
    names = {line["kernel"] for line in lines}
    wanted = {
        "_product",
        "_gated",
        "_conv",
        "_residual",
        "_level",
        "_ring_attention",
        "ring_attention_16",
        "_combine",
        "_choose",
    }
    assert wanted <= names
    assert ("ring_attention_fp8" in names) == (float(capability) >= 8.9)
