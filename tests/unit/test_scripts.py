"""The scripts, in a copy of the checkout: what they say when something is missing, and the life of a server under them."""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from tests.support.ports import free_port
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from moshi_stt import protocol

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
    for name in ("moshi-stt", "moshi-server"):
        program = binaries / name
        program.write_text(
            f"#!{sys.executable}\nimport sys\nfrom moshi_stt.cli import main\nsys.argv[0] = {name!r}\nsys.exit(main())\n"
        )
        program.chmod(0o755)
    return checkout


def run(folder: Path, script: str, *args: str, timeout: float = 600, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(folder / "scripts" / script), *args],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=os.environ | {"MOSHI_STT_UV": "0", "HOME": str(folder.parent)} | env,
        stdin=subprocess.DEVNULL,
        check=False,
    )


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


def test_the_next_command_keeps_the_flags_that_were_given(installed: Path) -> None:
    """Another port used to be offered without the model, the address and the worker's flags."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        started = run(installed, "start.sh", "--model", "my own.toml", "--port", str(port), "--wait", "9", "--", "--cpu")
        again = run(installed, "install.sh", "--with", "mic", "--port", str(port), "--addr", "127.0.0.1", "--yes")
    assert started.stderr.endswith(f"Next: scripts/start.sh --port {port + 1} --model my\\ own.toml --wait 9 -- --cpu\n")
    assert again.stderr.endswith(f"Next: scripts/install.sh --port {port + 1} --with mic --addr 127.0.0.1 --yes\n")


TOOLS = (
    "awk", "bash", "cat", "cksum", "cp", "cut", "date", "dirname", "basename", "grep", "head", "id", "ln", "mkdir", "mv", "ps",
         "readlink", "rm", "sed", "sleep", "sort", "tail", "uname", "wc", "getconf", "kill", "nohup", "sh",
)  # fmt: skip


@pytest.fixture
def bare_path(tmp_path: Path) -> Path:
    """A PATH with the tools of the scripts and no Python."""
    binaries = tmp_path / "bin"
    binaries.mkdir()
    for tool in TOOLS:
        found = shutil.which(tool)
        if found is not None:
            (binaries / tool).symlink_to(found)
    return binaries


def program(folder: Path, name: str, text: str) -> Path:
    """A shell program in a folder of PATH."""
    path = folder / name
    path.unlink(missing_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def old_python(folder: Path, name: str = "python3", version: str = "3.9") -> Path:
    """An interpreter that tells its version and can do nothing else."""
    return program(
        folder,
        name,
        f'[ "$1" = --version ] && echo "Python {version}.18" && exit 0\n[ "$1" = -c ] && echo {version} && exit 0\nexit 1',
    )


def test_an_old_python(checkout: Path, bare_path: Path) -> None:
    old = old_python(bare_path)
    done = run(checkout, "install.sh", PATH=str(bare_path))
    assert done.returncode == 1
    assert f"Error: Python 3.11, 3.12, 3.13 or 3.14 is needed; found Python 3.9.18 at {old}, and uv could not" in done.stderr
    old.unlink()
    assert "is needed; found none, and uv could not bring one." in run(checkout, "test.sh", PATH=str(bare_path)).stderr


def chosen(checkout: Path, path: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """What `make_venv` does with what is on a PATH."""
    (checkout / "run").mkdir(exist_ok=True)
    code = f". '{checkout}/scripts/common.sh'; make_venv '{checkout}/.venv'"
    env = os.environ | {"PATH": str(path), "MOSHI_STT_PYTHON": ""} | env
    return subprocess.run(["bash", "-euc", code], capture_output=True, text=True, timeout=60, env=env, check=False)


PYTHON_OF = """case "$1" in
  -c) echo {version} ;;
  --version) echo "Python {version}.1" ;;
  -m) mkdir -p "$3/bin" && ln -s "$0" "$3/bin/python" ;;
esac"""


@pytest.mark.parametrize(
    ("versions", "best"),
    [
        (["3.11"], "3.11"),
        (["3.12", "3.11"], "3.11"),
        (["3.14", "3.13"], "3.13"),
        (["3.14"], "3.14"),
        (["3.12"], "3.12"),
        (["3.15", "3.12"], "3.12"),
        (["3.10"], None),
        (["3.15"], None),
    ],
)
def test_the_python_that_has_everything_is_taken(
    checkout: Path, bare_path: Path, versions: list[str], best: str | None
) -> None:
    """Without uv. The first of the versions is what `python3` is."""
    for version in versions:
        program(bare_path, f"python{version}", PYTHON_OF.format(version=version))
    program(bare_path, "python3", PYTHON_OF.format(version=versions[0]))
    done = chosen(checkout, bare_path, MOSHI_STT_UV="0")
    if best is None:
        assert done.returncode == 1
        assert f"found Python {versions[0]}.1" in done.stderr
    else:
        assert done.returncode == 0, done.stderr
        assert f"with Python {best}.1" in done.stdout


UV = """[ "$1" = venv ] || exit 2
while [ $# -gt 1 ]; do [ "$1" = --python ] && version=$2; shift; done
[ "$version" = 3.13 ] || exit 1
mkdir -p "$1/bin" && ln -s {python} $1/bin/python"""


@pytest.mark.parametrize("versions", [[], ["3.14"], ["3.9"]])
def test_uv_brings_a_python_where_the_machine_has_none_that_has_everything(
    checkout: Path, bare_path: Path, versions: list[str]
) -> None:
    for version in versions:
        program(bare_path, "python3", PYTHON_OF.format(version=version))
    fetched = program(checkout, "fetched", PYTHON_OF.format(version="3.13"))
    program(bare_path, "uv", UV.format(python=fetched))
    done = chosen(checkout, bare_path, MOSHI_STT_UV="1")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "Made an environment in .venv with Python 3.13.1, by uv.\n"


@pytest.mark.parametrize(
    ("system", "machine", "told"),
    [
        ("Darwin", "x86_64", "Intel Macs are not supported: onnxruntime and PyTorch no longer publish packages for them."),
        ("Linux", "armv7l", "Linux armv7l is not supported: onnxruntime and PyAV have no packages for it."),
        ("Linux", "x86_64", "glibc 2.17 is too old: onnxruntime and PyAV need glibc 2.28 (2018) or newer."),
        ("Darwin", "arm64", "macOS 12.7 is too old: onnxruntime and PyAV need macOS 13 or newer."),
        ("Linux", "aarch64", "this Linux has no glibc (musl, as in Alpine?): onnxruntime has no packages for it."),
    ],
)
def test_a_machine_that_cannot_is_refused_before_anything_is_done(
    checkout: Path, bare_path: Path, system: str, machine: str, told: str
) -> None:
    answers = f'case "$1" in -s) echo {system} ;; -m) echo {machine} ;; *) echo {system} {machine} ;; esac'
    program(bare_path, "uname", answers)
    program(bare_path, "getconf", "echo glibc 2.17" if machine == "x86_64" else "exit 1")
    program(bare_path, "sw_vers", "echo 12.7")
    program(bare_path, "sysctl", "exit 1")
    done = run(checkout, "install.sh", PATH=str(bare_path))
    assert done.returncode == 1
    assert done.stderr.startswith(f"Error: {told}\n  Next: ")
    assert done.stdout == ""
    assert not (checkout / "run").exists()


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
    pytest.importorskip("ensurepip", reason="this Python cannot make an environment by itself")
    nobody = f"http://127.0.0.1:{free_port()}/simple"
    env = {"MOSHI_STT_PYTHON": sys.executable, "PIP_INDEX_URL": nobody, "PIP_FIND_LINKS": "", "PIP_RETRIES": "1"}
    done = run(checkout, "install.sh", "--port", str(free_port()), **env)
    assert done.returncode == 1, done.stdout
    assert re.search(r"Error: the package index cannot be reached \(.+\)\.\n  Next: check the network", done.stderr)
    assert re.search(r"install\.sh --port \d+\n\Z", done.stderr), "the flags that were given"
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


def test_start_remembers_what_was_started_and_the_process_is_found_by_name(installed: Path) -> None:
    """Port and flags of the first start hold for the next one; `pgrep moshi-server` finds it without -f."""
    port = free_port()
    try:
        started = run(installed, "start.sh", "--port", str(port), "--", "--batch-size", "3")
        assert started.returncode == 0, started.stderr
        assert run(installed, "stop.sh").returncode == 0
        again = run(installed, "start.sh")
        assert again.returncode == 0, again.stderr
        assert f"Ready at http://127.0.0.1:{port} " in again.stdout
        assert "0 of 3 streams" in run(installed, "status.sh", COLUMNS="60").stdout  # ps cuts its lines to that width
        pid = (installed / "run" / "server.pid").read_text().strip()
        if shutil.which("pgrep"):
            found = subprocess.run(["pgrep", "moshi-server"], capture_output=True, text=True, check=False)
            assert pid in found.stdout.split()
        if sys.platform == "linux":
            named = subprocess.run(["ps", "-p", pid, "-o", "comm="], capture_output=True, text=True, check=True)
            assert named.stdout.strip() == "moshi-server"
    finally:
        run(installed, "stop.sh")


def test_stop_now_does_not_wait_for_live_streams(installed: Path) -> None:
    """A client that goes on sending would hold the drain; it gets what was recognised, and 1001."""
    port = free_port()
    try:
        assert run(installed, "start.sh", "--port", str(port)).returncode == 0
        headers = {"kyutai-api-key": "public_token"}
        over = threading.Event()
        with connect(f"ws://127.0.0.1:{port}/api/asr-streaming", additional_headers=headers) as client:

            def send() -> None:
                with contextlib.suppress(ConnectionClosed):
                    while not over.wait(0.05):
                        client.send(protocol.encode_audio(np.zeros(1_200, np.float32)))

            sending = threading.Thread(target=send)
            sending.start()
            try:
                assert client.recv(timeout=90)
                stopped = run(installed, "stop.sh", "--now")
            finally:
                over.set()
                sending.join()
        assert re.match(
            r"(The server did not end within 3 s; ending it by force\.\n)?Stopped \(pid \d+\)\.\n\Z", stopped.stdout
        )
        assert "SIGINT: shutting down" in (installed / "run" / "server.log").read_text()
    finally:
        run(installed, "stop.sh")


def test_a_start_that_fails_is_not_remembered(installed: Path) -> None:
    port = free_port()
    try:
        assert run(installed, "start.sh", "--port", str(port)).returncode == 0
        run(installed, "stop.sh")
        assert run(installed, "start.sh", "--model", "stt-1b-enfr", "--port", str(free_port())).returncode == 1
        assert f"port={port}\n" in (installed / "run" / "server.settings").read_text()
        assert "model=embedded\n" in (installed / "run" / "server.settings").read_text()
    finally:
        run(installed, "stop.sh")


def linked(checkout: Path, home: Path, path: str = "/usr/bin:/bin") -> str:
    code = f". '{checkout}/scripts/common.sh'; link_commands; command_name; echo; say_path"
    env = {"HOME": str(home), "PATH": path}
    return subprocess.run(["bash", "-euc", code], capture_output=True, text=True, check=True, timeout=60, env=env).stdout


def test_the_commands_are_linked_and_what_is_not_ours_stays(installed: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    links = home / ".local" / "bin"
    told = linked(installed, home)
    assert (links / "moshi-stt").readlink() == installed / ".venv" / "bin" / "moshi-stt"
    assert (links / "moshi-server").readlink() == installed / ".venv" / "bin" / "moshi-server"
    assert told.startswith(f"{installed}/.venv/bin/moshi-stt\n")
    assert 'export PATH="$HOME/.local/bin:$PATH"' in told
    assert linked(installed, home, f"{links}:/usr/bin:/bin") == "moshi-stt\n"
    (links / "moshi-server").unlink()
    (links / "moshi-server").write_text("the program of somebody else")
    assert f"{links}/moshi-server is not from this checkout and stays as it is" in linked(installed, home)
    assert (links / "moshi-server").read_text() == "the program of somebody else"
    (links / "moshi-stt").unlink()
    (links / "moshi-stt").symlink_to("/gone/moshi-stt/.venv/bin/moshi-stt")
    linked(installed, home)
    assert (links / "moshi-stt").readlink() == installed / ".venv" / "bin" / "moshi-stt"


def test_pip_goes_on_where_uv_cannot_reach_the_index(checkout: Path, bare_path: Path) -> None:
    """uv brings certificates of its own, and companies' proxies have others."""
    program(bare_path, "uv", 'echo "error: invalid peer certificate: UnknownIssuer" >&2; exit 2')
    (checkout / ".venv" / "bin").mkdir(parents=True)
    program(checkout / ".venv" / "bin", "python", f'echo "$*" >> {checkout}/asked')
    (checkout / "run").mkdir()
    code = f". '{checkout}/scripts/common.sh'; pip_install '{checkout}/.venv' something"
    env = {"PATH": str(bare_path), "HOME": str(checkout)}
    done = subprocess.run(["bash", "-euc", code], capture_output=True, text=True, timeout=60, env=env, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "uv cannot reach the package index; trying pip.\n"
    assert re.search(r"^-m pip install .* something$", (checkout / "asked").read_text(), re.M)


def test_ctrl_c_ends_pip_too(checkout: Path, bare_path: Path, tmp_path: Path) -> None:
    """A background process of a script ignores SIGINT: the installation used to go on by itself."""
    (checkout / ".venv" / "bin").mkdir(parents=True)
    (checkout / "run").mkdir()
    told = tmp_path / "told"
    os.mkfifo(told)
    program(checkout / ".venv" / "bin", "python", f"echo $$ > {told}; exec sleep 600")
    code = f". '{checkout}/scripts/common.sh'; pip_install '{checkout}/.venv' something; echo went on"
    env = {"PATH": str(bare_path), "HOME": str(checkout), "MOSHI_STT_UV": "0"}
    script = subprocess.Popen(["bash", "-euc", code], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)
    try:
        pid = int(told.read_text())
        script.send_signal(signal.SIGINT)
        output, _ = script.communicate(timeout=60)
    finally:
        script.kill()
    assert (script.returncode, output) == (130, "")
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


@pytest.mark.parametrize("extras", ["microphone", "mic,nothing"])
def test_an_extra_that_is_none(checkout: Path, extras: str) -> None:
    done = run(checkout, "install.sh", "--with", extras)
    assert done.returncode == 2
    assert f"--with {extras.split(',')[-1]}: expected torch, mlx, mic, ray or dev" in done.stderr


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
    own_unit = configparser.ConfigParser(strict=False)
    own_unit.optionxform = str  # type: ignore[assignment,method-assign]
    own_unit.read(folder / "moshi-stt-user.service")
    assert own_unit["Service"]["Restart"] == "on-failure"
    assert int(own_unit["Service"]["TimeoutStopSec"]) >= 60
    for command in (
        plist["ProgramArguments"],
        unit["Service"]["ExecStart"].split(),
        own_unit["Service"]["ExecStart"].split(),
    ):
        program, subcommand, *flags = command
        assert program.endswith("/.venv/bin/moshi-stt")
        assert subcommand == "worker"
        assert add_parser(argparse.ArgumentParser().add_subparsers()).parse_args(flags).addr == "127.0.0.1"
    assert unit["Service"]["Restart"] == "on-failure"
    assert plist["KeepAlive"] == {"SuccessfulExit": False}
