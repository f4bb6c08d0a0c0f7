"""The scripts, in a copy of the checkout: what they say when something is missing, and the life of a server under them."""

import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "scripts").glob("*.sh"))
USER_SCRIPTS = [path.name for path in SCRIPTS if path.name != "common.sh"]

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the scripts are for macOS and Linux")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what the scripts need, so that nothing is installed into or started from the real checkout."""
    folder = tmp_path / "moshi-stt"
    shutil.copytree(ROOT / "scripts", folder / "scripts")
    for name in ("pyproject.toml", "constraints.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture
def installed(checkout: Path) -> Path:
    """The copy with an environment that has this test's own installation in it."""
    binaries = checkout / ".venv" / "bin"
    binaries.mkdir(parents=True)
    (binaries / "python").symlink_to(sys.executable)
    program = binaries / "moshi-stt"
    program.write_text(
        f"#!{sys.executable}\nimport sys\nfrom moshi_stt.cli import main\nsys.argv[0] = 'moshi-stt'\nsys.exit(main())\n"
    )
    program.chmod(0o755)
    return checkout


def run(folder: Path, script: str, *args: str, timeout: float = 90, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(folder / "scripts" / script), *args],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=os.environ | {"MOSHI_STT_UV": "0"} | env,
        stdin=subprocess.DEVNULL,
        check=False,
    )


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port


@pytest.mark.parametrize("path", [*SCRIPTS, ROOT / ".ci" / "run", ROOT / ".ci" / "check_wheel"], ids=lambda path: path.name)
def test_syntax(path: Path) -> None:
    done = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck() -> None:
    done = subprocess.run(["shellcheck", "-x", *map(str, SCRIPTS)], capture_output=True, text=True, check=False, cwd=ROOT)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_nothing_newer_than_the_bash_of_macos(path: Path) -> None:
    """bash 3.2 has no associative arrays, no mapfile, no ${x,,}, no |&; macOS has no timeout, setsid or readlink -f."""
    text = "\n".join(line for line in path.read_text().splitlines() if not line.lstrip().startswith("#"))
    found = re.search(
        r"declare -A|mapfile|readarray|\$\{\w+(,,|\^\^)|\|&|&>>|\b(timeout|setsid|pkill|killall)\b|readlink -f", text
    )
    assert found is None


@pytest.mark.parametrize("script", [name for name in USER_SCRIPTS if name != "test.sh"])
def test_help_and_usage(checkout: Path, script: str) -> None:
    shown = run(checkout, script, "--help")
    assert (shown.returncode, shown.stderr) == (0, "")
    assert shown.stdout.startswith(f"Usage: scripts/{script}")
    wrong = run(checkout, script, "--colour")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert "unknown argument --colour" in wrong.stderr


@pytest.mark.parametrize("port", ["eighty", "0", "65536", ""])
def test_a_port_that_is_none(checkout: Path, port: str) -> None:
    done = run(checkout, "start.sh", "--port", port)
    assert done.returncode == 2
    assert f"--port {port}: expected" in done.stderr


def test_start_before_install(checkout: Path) -> None:
    done = run(checkout, "start.sh")
    assert done.returncode == 1
    assert done.stderr == "Error: nothing is installed in .venv yet.\n  Next: scripts/install.sh\n"


def test_a_port_in_use(installed: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        started = run(installed, "start.sh", "--port", str(port))
        again = run(installed, "install.sh", "--port", str(port))
    assert started.returncode == again.returncode == 1
    sentence = rf"Error: port {port} on 127\.0\.0\.1 is in use by another program( \(.*\))?\.\n  Next: scripts/"
    assert re.match(sentence + rf"start\.sh --port {port + 1}\n\Z", started.stderr)
    assert re.match(sentence + rf"install\.sh --port {port + 1}\n\Z", again.stderr)


def test_an_old_python(checkout: Path, tmp_path: Path) -> None:
    """A PATH with the tools of the scripts and a Python of 2020."""
    binaries = tmp_path / "bin"
    binaries.mkdir()
    for tool in ("bash", "cat", "cut", "dirname", "grep", "head", "id", "mkdir", "ps", "rm", "sed", "tail", "uname", "wc"):
        found = shutil.which(tool)
        assert found, f"{tool} is not here"
        (binaries / tool).symlink_to(found)
    old = binaries / "python3"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo "Python 3.9.18" && exit 0\nexit 1\n')
    old.chmod(0o755)
    done = run(checkout, "install.sh", PATH=str(binaries))
    assert done.returncode == 1
    assert f"Error: Python 3.11 or newer is needed; found Python 3.9.18 at {old}.\n  Next: " in done.stderr
    old.unlink()
    assert "Error: Python 3.11 or newer is needed; found none." in run(checkout, "test.sh", PATH=str(binaries)).stderr


@pytest.mark.skipif(os.getuid() == 0, reason="root may write anywhere")
def test_a_folder_that_is_not_ours(checkout: Path) -> None:
    checkout.chmod(0o555)
    try:
        done = run(checkout, "install.sh")
    finally:
        checkout.chmod(0o755)
    assert done.returncode == 1
    assert f"this user may not write to {checkout}." in done.stderr


def test_no_network(checkout: Path) -> None:
    """The index is a port of this machine on which nobody listens."""
    nobody = f"http://127.0.0.1:{free_port()}/simple"
    done = run(checkout, "install.sh", "--port", str(free_port()), PIP_INDEX_URL=nobody, PIP_FIND_LINKS="", PIP_RETRIES="1")
    assert done.returncode == 1, done.stdout
    assert re.search(r"Error: the package index cannot be reached \(.+\)\.\n  Next: check the network", done.stderr)
    assert "Traceback" not in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("log", "package"),
    [
        ("ERROR: No matching distribution found for moonshine-voice==0.0.73", "moonshine-voice"),
        ("ERROR: Could not find a version\nERROR: No matching distribution found for pocketsphinx<6,>=5.1.1", "pocketsphinx"),
        ("The conflict is caused by:\n    The user requested (constraint) pocketsphinx==5.1.1\n\nTo fix this", "pocketsphinx"),
        ("  ERROR: Failed building wheel for pocketsphinx", "pocketsphinx"),
        (
            "  × No solution found\n  ╰─▶ Because moonshine-voice==0.0.73 has no wheels with a matching platform tag",
            "moonshine-voice",
        ),
        ("  × Because sphn==0.2.1 has no usable wheels and building is disabled", "sphn"),
        ("ERROR: something else altogether", ""),
    ],
)
def test_which_wheel_is_missing(checkout: Path, log: str, package: str) -> None:
    (checkout / "run").mkdir()
    (checkout / "run" / "install.log").write_text(log + "\n")
    code = f". '{checkout}/scripts/common.sh'; missing_wheel"
    done = subprocess.run(["bash", "-euc", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == package


def test_the_life_of_a_server(installed: Path) -> None:
    port = free_port()
    assert run(installed, "status.sh").stdout == "No server is running. Start one: scripts/start.sh\n"
    try:
        started = run(installed, "start.sh", "--port", str(port))
        assert started.returncode == 0, started.stderr
        assert f"Ready at http://127.0.0.1:{port} (WebSocket: ws://127.0.0.1:{port}/api/asr-streaming" in started.stdout
        again = run(installed, "start.sh", "--port", str(port))
        assert again.returncode == 0
        assert again.stdout.startswith("Already running (pid ")
        other = run(installed, "start.sh", "--port", str(port + 1))
        assert other.returncode == 1
        assert "a server is running already" in other.stderr
        status = run(installed, "stop.sh", "status")
        assert status.returncode == 0, status.stderr
        assert f"http://127.0.0.1:{port}: ready" in status.stdout
        assert re.search(r"/api/asr-streaming: .+, 0 of \d+ streams", status.stdout)
        assert re.search(r"process \d+: \d+ MB, [\d.,]+ % CPU, up [\d:-]+", status.stdout)
    finally:
        stopped = run(installed, "stop.sh")
    assert re.match(r"Stopped \(pid \d+\)\.\n\Z", stopped.stdout)
    assert run(installed, "stop.sh").stdout == "No server is running.\n"
    assert not (installed / "run" / "server.pid").exists()


def test_a_server_that_cannot_start_says_why(installed: Path) -> None:
    done = run(installed, "start.sh", "--port", str(free_port()), "--model", "stt-1b-enfr")
    assert done.returncode == 1
    assert (
        "Error: the server did not start: stt-1b-enfr: no such file, and no shipped configuration of that name; did you"
        in done.stderr
    )
    assert not (installed / "run" / "server.pid").exists()


def test_a_process_id_of_another_program_is_left_alone(installed: Path) -> None:
    (installed / "run").mkdir(exist_ok=True)
    (installed / "run" / "server.pid").write_text(f"{os.getpid()}\n")
    assert run(installed, "stop.sh").stdout == "No server is running.\n"


def test_the_service_files_run_a_command_that_there_is() -> None:
    """launchd's file is a property list, systemd's an INI file; both start the worker with flags that it has."""
    import argparse
    import configparser
    import plistlib

    from moshi_stt.cli.worker import add_parser

    folder = ROOT / "scripts" / "service"
    plist = plistlib.loads((folder / "moshi-stt.plist").read_bytes())
    unit = configparser.ConfigParser(strict=False)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read(folder / "moshi-stt.service")
    for command in (plist["ProgramArguments"], unit["Service"]["ExecStart"].split()):
        program, subcommand, *flags = command
        assert program.endswith("/.venv/bin/moshi-stt")
        assert subcommand == "worker"
        assert add_parser(argparse.ArgumentParser().add_subparsers()).parse_args(flags).addr == "127.0.0.1"
    assert unit["Service"]["Restart"] == "on-failure"
    assert plist["KeepAlive"] == {"SuccessfulExit": False}
