"""Every command and program that README and the docs print: those that can run are run, the others say why not and are parsed.

Runs in a folder with recordings of the names that the pages use, against a server on a port of its own.
"""

import argparse
import asyncio
import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from tests.full.follow_readme import as_printed, reasons, steps
from tests.support.media import encode
from tests.support.scripted_engine import ScriptedEngine, counting
from tests.support.serving import serving

from moshi_stt.audio.decode import read_file
from moshi_stt.cli import COMMANDS
from moshi_stt.constants import SAMPLE_RATE
from moshi_stt.data import SAMPLE, data_file

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the commands are for a POSIX shell")

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
WHOLE = [ROOT / "README.md", ROOT / "docs" / "use.md"]
"""Pages whose programs are run here."""

SHELL = ("", "sh", "bash", "console")
PROGRAMS = {
    "moshi-stt",
    "moshi-server",
    "curl",
    "ffmpeg",
    "uv",
    "bash",
    "pip",
    "brew",
    "sudo",
    "git",
    "python",
    "docker",
    "systemctl",
}

NOT_RUN = {
    r"^scripts/|\bscripts/\w+\.sh": "installs, or starts a server: tests/unit/test_scripts.py, and CI runs README's two",
    r"^bash \.ci/": "this is what runs the tests",
    r" mic\b": "needs a microphone: tests/unit/test_mic.py",
    r"^ffmpeg|\| jq": "needs ffmpeg, jq and a network",
    r" (--config|--model) (stt|moshi-stt)| quantize stt| validate my": "needs Kyutai's weights",
    r" --ray\b": "needs Ray, and for the others a cluster: .ci/full ray",
    r" cluster (up|status|scale|restart|down)\b": "starts Ray and HAProxy: tests/cluster",
    r" worker\b| wyoming\b": "serves until it is stopped: tests/protocol/test_worker.py",
    r"^uv run": "fetches packages: tests/protocol/test_live_clients.py runs the program",
    r"/v1/audio|/v1/listen": "the recipes of that page have a test of their own",
    r"benchmarks/": "a benchmark",
    r"^(sudo|brew|pip|git|docker|systemctl|loginctl|launchctl) ": "changes the machine, or needs a network",
}

PYTHON_RUN_BY = {
    "docs/clients.md": "tests/protocol/test_clients_doc.py",
    "docs/protocol.md": "tests/protocol/test_protocol_doc.py",
    "docs/doors.md": "tests",
}


class Command(NamedTuple):
    page: str
    text: str


def blocks(path: Path) -> Iterator[tuple[str, str]]:
    """(language, text) of each fenced block."""
    for found in re.finditer(r"^ *```([a-z]*)\n(.*?)^ *```", path.read_text(encoding="utf-8"), re.M | re.S):
        yield found[1], found[2]


def commands() -> list[Command]:
    """Each line of a block marked `sh`, and of other blocks those whose first word is a program; without comments."""
    found = []
    for path in PAGES:
        for language, text in blocks(path):
            for line in text.replace("\\\n", " ").splitlines() if language in SHELL else ():
                bare = re.sub(r"\s+#\s.*", "", line).strip().removeprefix("$ ")
                first = bare.split(" ")[0].removeprefix(".venv/bin/")
                known = first in PROGRAMS or first.startswith("scripts/") or bare.startswith(".venv/bin/")
                if known or (language in ("sh", "bash") and bare and not bare.startswith("#")):
                    found.append(Command(path.relative_to(ROOT).as_posix(), bare))
    return found


def reason(command: str) -> str | None:
    return next((why for pattern, why in NOT_RUN.items() if re.search(pattern, command)), None)


ALL = commands()
RUN = [command for command in ALL if reason(command.text) is None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Recordings of every name that the pages use, two seconds each."""
    made = tmp_path_factory.mktemp("docs")
    pcm = read_file(data_file(SAMPLE))[: 2 * SAMPLE_RATE]
    names = {match for command in ALL for match in re.findall(r"[\w-]+\.(?:m4a|webm|mp3|mp4|wav|flac)\b", command.text)}
    for name in names | {"one.mp4", "two.mp4", "calls/monday.wav", "interviews/first.wav"}:
        path = made / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(encode(pcm, SAMPLE_RATE))  # WAV: the content decides, not the ending
    (made / "scripts").symlink_to(ROOT / "scripts")
    for name in (".config/systemd/user", "Library/LaunchAgents"):  # of the home folder, which this is, too
        (made / name).mkdir(parents=True)
    binaries = made / ".venv" / "bin"
    binaries.mkdir(parents=True)
    for name in ("moshi-stt", "moshi-server"):
        code = f"#!{sys.executable}\nimport sys\nfrom moshi_stt.cli import main\nsys.argv[0] = {name!r}\nsys.exit(main())\n"
        (binaries / name).write_text(code)
        (binaries / name).chmod(0o755)
    return made


def test_there_are_commands() -> None:
    assert len(ALL) > 25
    assert len(RUN) > 5
    assert {command.page for command in ALL} >= {"README.md", "docs/clients.md", "docs/mac.md"}


@pytest.mark.parametrize("command", RUN, ids=lambda command: command.text[:70])
async def test_a_command_runs_as_printed(command: Command, folder: Path, tmp_path: Path) -> None:
    """Each in a copy of its own: no two commands find each other's results."""
    folder = shutil.copytree(folder, tmp_path / "docs", symlinks=True)
    if command.text.startswith("curl") and shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    async with serving(ScriptedEngine(counting(5))) as running:
        text = command.text.replace("127.0.0.1:8080", f"127.0.0.1:{running.port}")
        done: list[subprocess.CompletedProcess[str]] = []

        def run() -> None:
            env = os.environ | {"PATH": f"{folder}/.venv/bin:{os.environ['PATH']}", "HOME": str(folder)}
            done.append(
                subprocess.run(
                    ["bash", "-euc", text], cwd=folder, env=env, capture_output=True, text=True, timeout=240, check=False
                )
            )

        await asyncio.to_thread(run)
    assert done[0].returncode == 0, f"{command}: {done[0].stderr}"
    assert "Traceback" not in done[0].stderr


@pytest.mark.parametrize("command", [c for c in ALL if c not in RUN], ids=lambda command: command.text[:70])
def test_a_command_that_is_not_run_has_flags_that_exist(command: Command) -> None:
    for part in re.split(r"\s*(?:\||&&|;)\s*", command.text.split(" >")[0]):
        words = shlex.split(part)
        program = words[0].removeprefix(".venv/bin/")
        if program in ("moshi-stt", "moshi-server"):
            assert words[1] in COMMANDS, command
            module = importlib.import_module(f"moshi_stt.cli.{words[1]}")
            module.add_parser(argparse.ArgumentParser().add_subparsers()).parse_args(words[2:])
        elif program.startswith("scripts/"):
            script = ROOT / program
            assert script.is_file(), command
            shown = subprocess.run(
                ["bash", str(script), "--help"], capture_output=True, text=True, timeout=60, check=False, cwd=ROOT
            ).stdout
            flags = [word for word in words[1 : words.index("--") if "--" in words else None] if word.startswith("--")]
            assert shown.startswith(f"Usage: {program}")
            assert all(flag in shown for flag in flags), command


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_a_page_with_python_is_run_by_a_test(path: Path) -> None:
    name = path.relative_to(ROOT).as_posix()
    if not any(language == "python" for language, _ in blocks(path)) or path in WHOLE:
        return
    files = [ROOT / PYTHON_RUN_BY[name]] if (ROOT / PYTHON_RUN_BY[name]).is_file() else (ROOT / "tests").rglob("test_*.py")
    assert any(path.name in file.read_text(encoding="utf-8") for file in files if file.name != Path(__file__).name)


def test_readme_can_be_followed() -> None:
    """tests/full/follow_readme.py does so; here only that it finds what there is to do, and no reason without a command."""
    page = WHOLE[0].read_text(encoding="utf-8")
    found = list(steps(page))
    assert [step.kind for step in found[:3]] == ["command", "address", "command"]
    assert found[0].text == "scripts/install.sh"
    assert found[2].shown.startswith("1\n00:00:00,")
    assert sum(step.kind == "python" for step in found) == 2
    assert set(reasons(page)) < {step.text for step in found}


def test_output_is_compared_with_what_readme_shows() -> None:
    assert as_printed("a\n…\nd\n", "a\nb\nc\nd\n")
    assert as_printed("…\nd\n…\n", "d\n")
    assert not as_printed("a\n…\nd\n", "a\nb\n")
    assert not as_printed("a\n", "a\nb\n")


PROGRAMS_OF_PAGES = [
    pytest.param(text, id=f"{path.name}-{number}")
    for path in WHOLE
    for number, text in enumerate(text for language, text in blocks(path) if language == "python")
]


@pytest.mark.parametrize("program", PROGRAMS_OF_PAGES)
async def test_a_program_of_a_page_runs(program: str, folder: Path) -> None:
    if needed := re.match(r"# pip install (\w+)", program):
        pytest.importorskip(needed[1], reason=f"{needed[1]} is not installed: pip install -e '.[clients]'")
    async with serving(ScriptedEngine(counting(5))) as running:
        text = program.replace("127.0.0.1:8080", f"127.0.0.1:{running.port}")
        done = await asyncio.to_thread(
            subprocess.run, [sys.executable, "-c", text], cwd=folder, capture_output=True, text=True, timeout=120, check=False
        )
    assert done.returncode == 0, done.stderr
    assert "w0" in done.stdout
