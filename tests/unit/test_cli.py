"""The command line: what is printed where, and the exit status."""

import argparse
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from moshi_stt import __version__
from moshi_stt.cli import COMMANDS, main
from moshi_stt.cli.worker import add_parser, override, parse_address, warnings_of
from moshi_stt.config import KyutaiModule, ServerConfig
from moshi_stt.config_load import embedded_config, load_config, shipped_text
from moshi_stt.errors import ConfigError


def cli(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    code = "import sys; from moshi_stt.cli import main; sys.exit(main())"
    return subprocess.run(
        [sys.executable, "-c", code, *args],
        capture_output=True,
        text=True,
        timeout=60,
        stdin=subprocess.DEVNULL,
        env=os.environ | {"COLUMNS": "200"} | env,
        check=False,
    )


def worker_args(*args: str):  # type: ignore[no-untyped-def]
    import argparse

    return add_parser(argparse.ArgumentParser().add_subparsers()).parse_args(args)


def test_help_names_every_command() -> None:
    done = cli("--help")
    assert (done.returncode, done.stderr) == (0, "")
    for name, text in COMMANDS.items():
        assert name in done.stdout
        assert text in done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str) -> None:
    done = cli(command, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"usage: moshi-stt {command}")


def test_version() -> None:
    done = cli("--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"moshi-stt {__version__}\n", "")


@pytest.mark.parametrize(
    ("args", "status", "message"),
    [
        ((), 2, "moshi-stt: error: the following arguments are required: COMMAND"),
        (("serve",), 2, "moshi-stt: error: argument COMMAND: invalid choice: 'serve'"),
        (("worker", "--port", "http"), 2, "error: argument -p/--port: http is not a port: expected 0 to 65535"),
        (("worker", "--port", "70000"), 2, "error: argument -p/--port: 70000 is not a port: expected 0 to 65535"),
        (
            ("worker", "--socket-processes", "65"),
            2,
            "error: argument --socket-processes: 65 processes: expected 0 to 64, or auto",
        ),
        (("worker", "--batch-size", "0"), 2, "error: argument --batch-size: 0 streams: expected a number, at least 1"),
        (("worker", "--colour"), 2, "error: unrecognized arguments: --colour"),
        (
            ("worker", "--log", "loud"),
            1,
            "Error: --log loud: expected one of off, error, warn, info, debug, trace, or 0 to 5\n",
        ),
        (("worker", "--log", "6"), 1, "Error: --log 6: expected one of"),
        (
            ("worker", "--addr", "example.org"),
            1,
            "Error: --addr example.org: expected an IP address: 127.0.0.1 for this machine",
        ),
        (
            ("worker", "--cpu", "--device", "cuda"),
            1,
            "Error: --cpu and --device cuda contradict each other: give one of them\n",
        ),
        (
            ("worker", "--device", "cuda"),
            1,
            "Error: --device cuda: the embedded model runs on the CPU alone; choose Kyutai's",
        ),
        (
            ("worker", "--quantize", "int4"),
            1,
            "Error: --quantize int4: the embedded model has no other weights; choose Kyutai's",
        ),
        (
            ("worker", "--config", "nowhere.toml"),
            1,
            "Error: nowhere.toml: no such file, and no shipped configuration of that name",
        ),
        (("configs", "tts.py"), 1, "Error: Unknown config: tts.py (there are embedded, phrases, stt-1b-en_fr, stt-2.6b-en)\n"),
        (("validate",), 2, "moshi-stt validate: error: the following arguments are required: FILE"),
        (("validate", "nowhere.toml"), 1, "Error: nowhere.toml: no such file"),
        (("status", "--url", "http://127.0.0.1:1"), 1, "Error: no server answers at http://127.0.0.1:1/ready: "),
    ],
)
def test_wrong_usage(args: tuple[str, ...], status: int, message: str) -> None:
    done = cli(*args)
    assert (done.returncode, done.stdout) == (status, "")
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_broken_file_is_an_error_on_stderr(tmp_path: Path) -> None:
    path = tmp_path / "broken.toml"
    path.write_text(shipped_text("embedded").replace('batch_size = "auto"', "batch_size = 0"))
    done = cli("worker", "--config", str(path))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        f"Error: {path}: [modules.asr] batch_size = 0: expected at least 1. "
        "Give the number of streams to serve at once, for example 64.\n"
    )


def test_a_file_without_modules_is_not_served(tmp_path: Path) -> None:
    path = tmp_path / "empty.toml"
    path.write_text(shipped_text("embedded").split("[modules")[0])
    done = cli("worker", "--config", str(path))
    assert done.returncode == 1
    assert done.stderr.startswith(f"Error: {path}: there is no [modules.NAME] table, so nothing would be served.")


def test_a_log_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    path = tmp_path / "x.toml"
    path.write_text(shipped_text("embedded").replace('log_dir = ""', f'log_dir = "{tmp_path}/file/logs"'))
    done = cli("worker", "--config", str(path), "--port", "0")
    assert done.returncode == 1
    assert done.stderr.startswith(f"Error: log_dir = '{tmp_path}/file/logs': cannot write a log file there: Not a directory.")


POSITIONAL = {"transcribe": ("a.wav",), "validate": ("a.toml",), "quantize": ("a", "b")}


@pytest.mark.parametrize("words", [(command, *POSITIONAL.get(command, ())) for command in COMMANDS if command != "cluster"])
def test_an_unknown_flag_shows_the_subcommands_own_usage(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        main([*words, "--nope"])
    assert raised.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith(f"usage: moshi-stt {words[0]} ")
    assert said.endswith(f"moshi-stt {words[0]}: error: unrecognized arguments: --nope\n")


@pytest.mark.parametrize(
    ("command", "rest"),
    [("worker", []), ("transcribe", ["a.wav"]), ("mic", []), ("selftest", []), ("wyoming", []), ("size", [])],
)
def test_model_means_what_config_means(command: str, rest: list[str]) -> None:
    module = importlib.import_module(f"moshi_stt.cli.{command}")
    parser = module.add_parser(argparse.ArgumentParser().add_subparsers())
    assert parser.parse_args(["--model", "x", *rest]).config == parser.parse_args(["--config", "x", *rest]).config == "x"


def test_configs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["configs"]) == 0
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split() == ["NAME", "LANGUAGES", "DELAY", "TO", "DOWNLOAD", "NEEDS"]
    assert [row.split()[0] for row in rows] == ["embedded", "phrases", "stt-1b-en_fr", "stt-2.6b-en"]
    assert [cell.strip() for cell in rows[2].split("  ") if cell][1:4] == ["English, French", "0.5 s", "2.4 GB"]
    assert [cell.strip() for cell in rows[1].split("  ") if cell][1:4] == ["some phrases, for tests", "0.5 s", "nothing"]
    assert main(["configs", "stt-2.6b-en"]) == 0
    assert capsys.readouterr().out == shipped_text("stt-2.6b-en")


def test_output_into_a_closed_pipe() -> None:
    code = "import sys; from moshi_stt.cli import main; sys.exit(main(['configs', 'stt-1b-en_fr']))"
    done = subprocess.run(
        ["bash", "-c", f'{{ "{sys.executable}" -c "{code}"; echo "status $?" >&2; }} | true'],
        capture_output=True,
        text=True,
        check=False,
    )
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr


def test_an_interrupt_is_clean(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import moshi_stt.config_load

    def interrupt() -> list[str]:
        raise KeyboardInterrupt

    monkeypatch.setattr(moshi_stt.config_load, "shipped_names", interrupt)
    assert main(["configs"]) == 130
    assert capsys.readouterr().err == ""


def test_moshi_servers_flags_and_their_defaults() -> None:
    args = worker_args()
    assert (args.log, args.addr, args.port, args.cpu, args.config, args.silent) == ("info", "0.0.0.0", 8080, False, None, False)
    args = worker_args("-l", "3", "-a", "127.0.0.1", "-p", "8081", "--cpu", "--config", "moshi-stt.toml", "--silent")
    assert (args.log, args.addr, args.port, args.cpu) == ("3", "127.0.0.1", 8081, True)
    assert (args.config, args.silent) == ("moshi-stt.toml", True)


def test_flags_override_the_file() -> None:
    config = load_config("stt-1b-en_fr").config
    (module,) = override(config, worker_args("--quantize", "int8", "--device", "mlx", "--batch-size", "2")).modules
    assert isinstance(module, KyutaiModule)
    assert (module.engine.quantize, module.engine.device, module.batch_size) == ("int8", "mlx", 2)
    (module,) = override(config, worker_args("--cpu")).modules
    assert isinstance(module, KyutaiModule)
    assert module.engine.device == "cpu"
    assert override(config, worker_args("--socket-processes", "3")).limits.socket_processes == 3
    assert override(config, worker_args("--socket-processes", "auto")).limits.socket_processes == "auto"
    proxies = worker_args("--trusted-proxy", "10.0.0.5", "--trusted-proxy", "::1")
    assert override(config, proxies).limits.trusted_proxies == ("10.0.0.5", "::1")
    with pytest.raises(ConfigError, match="--trusted-proxy balancer: expected the IP address"):
        override(config, worker_args("--trusted-proxy", "balancer"))
    assert override(config, worker_args()) == config
    assert override(embedded_config(), worker_args("--cpu")) == embedded_config()
    assert override(embedded_config(), worker_args("--device", "cpu")) == embedded_config()


@pytest.mark.parametrize(("text", "address"), [("localhost", "127.0.0.1"), ("::", "::"), ("0.0.0.0", "0.0.0.0")])
def test_addresses(text: str, address: str) -> None:
    assert parse_address(text) == address


@pytest.mark.parametrize("text", ["", "localhost:80", "1.2.3", "::g"])
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(ConfigError, match="expected an IP address"):
        parse_address(text)


def test_the_well_known_key_on_an_open_address_is_a_warning(tmp_path: Path) -> None:
    public = embedded_config()
    private = ServerConfig(
        static_dir=str(tmp_path),
        log_dir=None,
        instance_name="x",
        authorized_ids=frozenset({"mine"}),
        modules=public.modules,
    )
    (warning,) = warnings_of(public, "0.0.0.0")
    assert "can be reached from other machines" in warning
    assert "public_token" in warning
    assert warnings_of(public, "127.0.0.1") == warnings_of(public, "::1") == []
    assert warnings_of(private, "0.0.0.0") == []


def test_a_page_that_is_not_there_is_a_warning() -> None:
    config = load_config("stt-1b-en_fr").config
    assert warnings_of(config, "127.0.0.1") == [
        "static_dir = './static/' does not exist; serving the page that comes with the package"
    ]
