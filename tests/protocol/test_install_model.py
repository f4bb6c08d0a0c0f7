"""`scripts/install.sh` fetches the larger model while the embedded one serves, and the new server takes over.

The hub is on this machine, and a small checkpoint stands for the 1B. Packages are this test's own: pip does nothing.
"""

import asyncio
import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from tests.support.checkpoints import shared_checkpoint
from tests.support.local_hub import LocalHub, local_hub
from tests.support.ports import free_port

from moshi_stt.audio.decode import read_file
from moshi_stt.client import Client
from moshi_stt.constants import SAMPLE_RATE
from moshi_stt.data import SAMPLE, data_file
from moshi_stt.events import Marker, Word

pytest.importorskip("torch", reason="serves a model of Kyutai's shape: torch")
pytest.importorskip("huggingface_hub", reason="huggingface_hub comes with the model extras")
pytestmark = [
    pytest.mark.skipif(sys.platform == "win32", reason="the scripts are for macOS and Linux"),
    pytest.mark.timeout(2_000),
]

ROOT = Path(__file__).parents[2]
REPO = "someone/small"
DEADLINE = 900.0

PROGRAM = """#!{python}
import sys
sys.path.insert(0, {source!r})
import moshi_stt.models.estimate
moshi_stt.models.estimate.step_seconds = lambda quantize: 0.04
import moshi_stt.selftest
moshi_stt.selftest.SLOWEST = 1e9  # a machine that runs tests is too busy to be judged by its speed
from moshi_stt.cli import main
sys.argv[0] = {name!r}
sys.exit(main())
"""

PYTHON = """#!/bin/sh
if [ "$1 $2" = "-m pip" ]; then echo "pip $*" >> {log}; exit 0; fi
exec {python} "$@"
"""


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[LocalHub]:
    """Serves the files of a small checkpoint."""
    tiny = shared_checkpoint("tiny", ROOT.parent / "shared")
    text = (tiny / "moshi-server.toml").read_text()
    with local_hub() as running:
        for path in re.findall(r'_file = "([^"]+)"', text):
            running.files[(REPO, Path(path).name)] = Path(path).read_bytes()
            text = text.replace(path, f"hf://{REPO}/{Path(path).name}")
        (tmp_path / "small.toml").write_text(text)
        yield running


@pytest.fixture
def checkout(tmp_path: Path, hub: LocalHub) -> Iterator[Path]:
    """A checkout whose stt-1b-en_fr is the small model, installed by what this test runs in."""
    folder = tmp_path / "moshi-stt"
    shutil.copytree(ROOT / "scripts", folder / "scripts")
    shutil.copytree(ROOT / "src", folder / "src", copy_function=os.link)
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, folder / name)
    config = folder / "src" / "moshi_stt" / "configs" / "stt-1b-en_fr.toml"
    config.unlink()
    shutil.copy(tmp_path / "small.toml", config)
    binaries = folder / ".venv" / "bin"
    binaries.mkdir(parents=True)
    source = str(folder / "src")
    for name in ("moshi-stt", "moshi-server"):
        (binaries / name).write_text(PROGRAM.format(python=sys.executable, source=source, name=name))
    (binaries / "python").write_text(PYTHON.format(log=tmp_path / "pip.log", python=sys.executable))
    for path in binaries.iterdir():
        path.chmod(0o755)
    yield folder
    subprocess.run(["bash", str(folder / "scripts" / "stop.sh")], check=False, timeout=60, capture_output=True)


def environment(tmp_path: Path, hub: LocalHub) -> dict[str, str]:
    home = tmp_path / "home"
    home.mkdir(exist_ok=True)
    left_out = {"HF_HUB_OFFLINE", "HF_HOME", "HF_HUB_CACHE", "HF_TOKEN", "MOSHI_STT_PYTHON"}
    kept = {key: value for key, value in os.environ.items() if key not in left_out}
    return kept | {"HOME": str(home), "HF_ENDPOINT": hub.address, "MOSHI_STT_UV": "0"}


async def install(checkout: Path, env: dict[str, str], *flags: str) -> tuple[int, str, str]:
    process = await asyncio.create_subprocess_exec(
        "bash", str(checkout / "scripts" / "install.sh"), *flags,
        env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    async with asyncio.timeout(DEADLINE):
        out, error = await process.communicate()
    return process.returncode or 0, out.decode(), error.decode()


async def speak(port: int, done: asyncio.Event) -> list[str]:
    """One stream from the embedded server's first moment on, held until `done`: its words."""
    audio = read_file(data_file(SAMPLE))
    while True:
        try:
            client = Client(f"ws://127.0.0.1:{port}")
            await client.__aenter__()
            break
        except Exception:
            await asyncio.sleep(0.1)
    try:
        pause = int(6.2 * SAMPLE_RATE)
        await client.send_audio(audio[:pause])
        while not done.is_set():  # a client that sends nothing for two minutes is closed
            await client.send_audio(np.zeros(SAMPLE_RATE // 10, np.float32))
            await asyncio.sleep(1)
        await client.send_audio(audio[pause:])
        await client.mark(1)
        words = []
        async for event in client:
            if isinstance(event, Word):
                words.append(event.text)
            if isinstance(event, Marker):
                break
        return words
    finally:
        await client.__aexit__(None, None, None)


async def test_yes_ends_with_the_larger_model_on_the_same_port_and_the_open_stream_whole(
    tmp_path: Path, checkout: Path, hub: LocalHub
) -> None:
    port, done = free_port(), asyncio.Event()
    speaking = asyncio.create_task(speak(port, done))
    status, out, error = await install(checkout, environment(tmp_path, hub), "--yes", "--port", str(port))
    done.set()
    async with asyncio.timeout(DEADLINE):
        words = await speaking
    assert status == 0, out + error
    assert " ".join(words).lower().startswith("ever tried")
    assert words[-1].lower().startswith("better")
    assert "Weights: int8" in out
    assert "It has taken over from pid" in out
    assert f"The server is running at http://127.0.0.1:{port} (stt-1b-en_fr)." in out
    status_script = ["bash", str(checkout / "scripts" / "status.sh")]
    shown = await asyncio.to_thread(subprocess.run, status_script, capture_output=True, text=True, timeout=60, check=False)
    assert shown.returncode == 0
    assert "batched_asr" in shown.stdout
    log = (tmp_path / "pip.log").read_text()
    assert "huggingface_hub" in log
    assert ".[torch]" in log
    settings = (checkout / "run" / "server.settings").read_text()
    assert "model=stt-1b-en_fr\n" in settings
    assert "flag=--quantize\nflag=int8\n" in settings


async def test_a_hub_that_is_cut_leaves_the_embedded_model_serving_and_is_resumed(
    tmp_path: Path, checkout: Path, hub: LocalHub
) -> None:
    port, env = free_port(), environment(tmp_path, hub)
    first = hub.files[(REPO, "model.safetensors")]
    hub.cut_after = 2 * len(first) // 3  # the library keeps whole chunks of 10 MB
    hub.cuts = 1
    hub.status_after_cuts = 503  # the library goes on by itself after a cut, unless the hub is gone
    status, out, error = await install(checkout, env, "--model", "stt-1b-en_fr", "--port", str(port))
    assert status == 1, out + error
    assert f"The embedded model keeps serving at http://127.0.0.1:{port}." in error
    assert re.search(
        r"Error: the weights of stt-1b-en_fr could not be downloaded \(see above\)\.\n  Next: .*install\.sh", error
    )
    assert f"--model stt-1b-en_fr --port {port}" in error
    assert "Traceback" not in out + error
    hub.cut_after = hub.status = None
    hub.requests.clear()
    status, out, error = await install(checkout, env, "--model", "stt-1b-en_fr", "--port", str(port))
    assert status == 0, out + error
    digest = hashlib.sha256(first).hexdigest()
    assert any(ranged for ranged in hub.asked("GET", digest)), "it began again instead of going on"


async def test_without_a_hub_nothing_is_installed_for_it(tmp_path: Path, checkout: Path, hub: LocalHub) -> None:
    env = environment(tmp_path, hub) | {"HF_ENDPOINT": f"http://127.0.0.1:{free_port()}"}
    port = free_port()
    status, out, error = await install(checkout, env, "--model", "stt-1b-en_fr", "--port", str(port))
    assert status == 1, out + error
    assert "cannot be downloaded now" in error
    assert "torch" not in (tmp_path / "pip.log").read_text()
