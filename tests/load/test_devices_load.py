"""Two model processes of a small Kyutai model and 32 streams of real speech; one process is killed (`bench_devices.py`).

With the model `phrases`, which comes with the package, and with random weights of the published layout.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="the model runs on PyTorch: pip install -e '.[torch]'")

ROOT = Path(__file__).parents[2]
SPEECH = ROOT / "tests" / "data" / "two_cities.flac"


@pytest.fixture(params=["phrases", "tiny"])
def config(request: pytest.FixtureRequest) -> str:
    """What `worker --config` takes."""
    if request.param == "tiny":
        tiny: Path = request.getfixturevalue("tiny")
        return str(tiny / "moshi-server.toml")
    return str(request.param)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system does not let a process choose its cores")
def test_the_streams_of_the_other_process_do_not_change(config: str) -> None:
    """Half of the streams end with Error, the others are what they are without the kill, and the slots come back."""
    cores = sorted(os.sched_getaffinity(0))[:2]
    if len(cores) < 2:
        pytest.skip("this process may use one core alone")
    command = [sys.executable, str(ROOT / "benchmarks" / "bench_devices.py"), "--seconds", "4", "--audio", str(SPEECH)]
    command += ["--config", config, "--devices", ",".join(f"cpu:{core}" for core in cores)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1_200)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["streams"], found["ended"], found["others"], found["unchanged"]) == (32, 16, 16, 16)
    assert found["errors_undisturbed"] == 0
    assert found["errors"] == ["Error(message='the process that ran the model has ended: start a new stream', close_code=None)"]
    assert found["words_of_others"] > 0
