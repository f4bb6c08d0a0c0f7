"""The examples of docs/doors.md, run as they stand but for the ports."""

import asyncio
import re
import sys
from pathlib import Path

import pytest
from tests.clients.conftest import DEADLINE, SAID, bare

from moshi_stt.server.app import Server

PAGE = (Path(__file__).parents[2] / "docs" / "doors.md").read_text(encoding="utf-8")
PYTHON = dict(re.findall(r"```python\n# recipe: ([a-z-]+)\n(.*?)```", PAGE, re.DOTALL))
CURL = re.findall(r"^(curl .*)$", PAGE, re.MULTILINE)
RUN_HERE = {"openai": "openai", "openai-realtime": "openai", "deepgram": "deepgram", "gradium": "gradium", "wyoming": "wyoming"}
"""Recipes and the packages that they need; the others are run with their clients, in environments of their own."""


async def run(server: Server, folder: Path, speech_file: Path, *command: str) -> str:
    """A command's output, run where speech.wav is, with this server's ports."""
    (folder / "speech.wav").symlink_to(speech_file)
    ports = {":8080": f":{server.port}", ":10300": f":{server.listeners.ports['wyoming']}"}
    shown = [re.sub(":8080|:10300", lambda match: ports[match[0]], part) for part in command]
    process = await asyncio.create_subprocess_exec(
        *shown, cwd=folder, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    out, err = await asyncio.wait_for(process.communicate(), DEADLINE)
    assert process.returncode == 0, err.decode()
    return out.decode()


@pytest.mark.parametrize("name", RUN_HERE)
async def test_python(server: Server, tmp_path: Path, speech_file: Path, name: str) -> None:
    pytest.importorskip(RUN_HERE[name], reason="not installed: pip install -e '.[clients]'")
    assert bare(await run(server, tmp_path, speech_file, sys.executable, "-c", PYTHON[name])) == SAID


@pytest.mark.parametrize("command", CURL)
async def test_curl(server: Server, tmp_path: Path, speech_file: Path, command: str) -> None:
    out = await run(server, tmp_path, speech_file, "sh", "-c", command)
    assert SAID in bare(out.replace(",", " ").replace(".", " "))


def test_every_recipe_is_run_somewhere() -> None:
    elsewhere = (Path(__file__).parents[1] / "full" / "voice_agents.py").read_text(encoding="utf-8")
    for name, code in PYTHON.items():
        assert name in RUN_HERE or all(line.split("(")[0] in elsewhere for line in re.findall(r"= (\w[\w.]*\()", code)), name
