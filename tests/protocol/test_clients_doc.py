"""docs/clients.md: its programs run as printed."""

import asyncio
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tests.support.media import encode, noise
from tests.support.scripted_engine import ScriptedEngine, counting
from tests.support.serving import DEADLINE, serving

ROOT = Path(__file__).parents[2]
DOC = (ROOT / "docs" / "clients.md").read_text(encoding="utf-8")
PROGRAMS = re.findall(r"```python\n(.*?)```", DOC, re.DOTALL)
OUTPUTS = [
    "  0.00   0.08 w0\n  0.16   0.24 w1\n",
    "w0 w1 w2 w3 w4\n5 words\n",
    "0.00 w0\nuntil 0.08\n0.16 w1\n",
    "2.0\n1\n00:00:00,000 --> ",
]


async def printed_by(url: str, folder: Path, *command: str) -> str:
    process = await asyncio.create_subprocess_exec(
        *command, cwd=folder, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    async with asyncio.timeout(DEADLINE):
        output, _ = await process.communicate()
    assert process.returncode == 0, output.decode()
    return output.decode()


@pytest.mark.parametrize("index", range(len(OUTPUTS)))
async def test_python_runs_as_printed(index: int, tmp_path: Path) -> None:
    assert len(PROGRAMS) == len(OUTPUTS)
    (tmp_path / "talk.wav").write_bytes(encode(noise(2.0), 24_000))
    async with serving(ScriptedEngine(counting(5), delay_frames=6)) as running:
        url = f"ws://127.0.0.1:{running.port}"
        assert "ws://127.0.0.1:8080" in PROGRAMS[index]
        code = PROGRAMS[index].replace("ws://127.0.0.1:8080", url)
        output = await printed_by(url, tmp_path, sys.executable, "-c", code)
    assert output.startswith(OUTPUTS[index])
    assert "w4" in output


def node() -> list[str] | None:
    """The command of a Node that has WebSocket, None where there is none."""
    path = shutil.which("node")
    if path is None:
        return None
    version = subprocess.run([path, "--version"], capture_output=True, text=True, check=False, timeout=30).stdout
    major = int(match[1]) if (match := re.match(r"v(\d+)", version)) else 0
    if major < 20:
        return None
    return [path] if major >= 22 else [path, "--no-warnings", "--experimental-websocket"]


async def test_javascript_runs_as_printed(tmp_path: Path) -> None:
    command = await asyncio.to_thread(node)
    if command is None:
        pytest.skip("no Node from version 20 on")
    (code,) = re.findall(r"```js\n(.*?)```", DOC, re.DOTALL)
    shutil.copy(ROOT / "src" / "moshi_stt" / "server" / "static" / "messagepack.js", tmp_path / "messagepack.js")
    (tmp_path / "package.json").write_text('{"type": "module"}')
    async with serving(ScriptedEngine(counting(5), delay_frames=6)) as running:
        url = f"ws://127.0.0.1:{running.port}"
        (tmp_path / "client.js").write_text(code.replace("ws://127.0.0.1:8080", url))
        assert await printed_by(url, tmp_path, *command, "client.js") == "w0 w1 w2 w3 w4\n"


CLI = "import sys; from moshi_stt.cli import main; sys.exit(main())"


def test_every_option_named_here_exists() -> None:
    known = ""
    for command in (["-c", CLI, "transcribe"], ["-c", CLI, "mic"], ["test_client.py"]):
        known += subprocess.run(
            [sys.executable, *command, "--help"], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
        ).stdout
    named = set(re.findall(r"(?<![\w-])(--[a-z][a-z-]+)", DOC)) - {"--data-binary", "--with"}  # of curl and scripts/install.sh
    assert {option for option in named if option not in known} == set()
