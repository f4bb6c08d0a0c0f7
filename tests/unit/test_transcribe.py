"""The transcribe command: what goes where, the exit status, and that it stops when told to."""

import io
import json
import os
import select
import signal
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tests.support.media import encode
from tests.support.written import Reader, written

from moshi_stt import engines
from moshi_stt.cli import main
from moshi_stt.cli.archive import Item
from moshi_stt.cli.transcribe import _Files, _Result
from moshi_stt.cli.transcribers import Source
from moshi_stt.config import EmbeddedModule, KyutaiModule, LimitsConfig, Module
from moshi_stt.engine.engine import Engine
from moshi_stt.errors import CheckpointError
from moshi_stt.sample import sample_path
from moshi_stt.text.subtitles import TimedWord

TIMES = [(0.5, 0.8), (1.0, 1.3), (1.5, 1.8)]


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> list[Module]:
    """Every engine is a `Reader`. Returns the modules that engines were built for."""
    built: list[Module] = []

    def build(module: Module, limits: LimitsConfig, observer: object = None, force_cpu: bool = False) -> Engine:
        built.append(module)
        return Reader()

    monkeypatch.setattr(engines, "build_engine", build)
    return built


Recording = Callable[..., Path]


@pytest.fixture
def recording(tmp_path: Path) -> Recording:
    """Make a recording whose words are w0, w1, w2 at `TIMES`."""

    def make(name: str = "talk.wav", times: list[tuple[float, float]] = TIMES, seconds: float = 2.5) -> Path:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(encode(written(times, seconds), 24_000, "wav-float"))
        return path

    return make


def test_text_goes_to_stdout_and_nothing_else(
    engine: list[Module], recording: Recording, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["transcribe", str(recording())]) == 0
    assert capsys.readouterr() == ("w0 w1 w2\n", "")
    assert isinstance(engine[0], EmbeddedModule)


@pytest.mark.parametrize(
    ("format", "expected"),
    [
        ("words", "0.500\t0.800\tw0\n1.000\t1.300\tw1\n1.500\t1.800\tw2\n"),
        ("srt", "1\n00:00:00,500 --> 00:00:01,800\nw0 w1 w2\n"),
        ("vtt", "WEBVTT\n\n00:00:00.500 --> 00:00:01.800\nw0 w1 w2\n"),
    ],
)
def test_formats(
    engine: list[Module], recording: Recording, capsys: pytest.CaptureFixture[str], format: str, expected: str
) -> None:
    assert main(["transcribe", "--format", format, str(recording())]) == 0
    assert capsys.readouterr() == (expected, "")


def test_json(engine: list[Module], recording: Recording, capsys: pytest.CaptureFixture[str]) -> None:
    path = recording()
    assert main(["transcribe", "-f", "json", str(path)]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["file"], document["duration"], document["text"]) == (str(path), 2.5, "w0 w1 w2")
    assert document["words"][1] == {"text": "w1", "start": 1.0, "end": 1.3}


def test_several_files_in_their_order(engine: list[Module], recording: Recording, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [str(recording(f"{n}.wav", TIMES[:n])) for n in (3, 1, 2)]
    assert main(["transcribe", *paths]) == 0
    expected = "".join(f"==> {path} <==\n{text}\n" for path, text in zip(paths, ["w0 w1 w2", "w0", "w0 w1"], strict=True))
    assert capsys.readouterr() == (expected, "")
    assert len(engine) == 1


def test_output_to_a_file_and_to_a_folder(
    engine: list[Module], recording: Recording, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = recording("one.wav"), recording("two.wav", TIMES[:1])
    assert main(["transcribe", str(one), "-o", str(tmp_path / "out.txt")]) == 0
    assert (tmp_path / "out.txt").read_text() == "w0 w1 w2\n"
    assert main(["transcribe", str(one), str(two), "-f", "srt", "-o", str(tmp_path / "new" / "folder")]) == 0
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == ["one.srt", "two.srt"]
    assert main(["transcribe", str(one), "-o", f"{tmp_path}/other/"]) == 0
    assert (tmp_path / "other" / "one.txt").read_text() == "w0 w1 w2\n"
    assert capsys.readouterr() == ("", "")


def test_files_of_one_stem_keep_apart(engine: list[Module], recording: Recording, tmp_path: Path) -> None:
    one, two = recording("talk.wav"), recording("talk.float.wav")
    other = one.with_suffix(".aif")
    other.write_bytes(one.read_bytes())
    assert main(["transcribe", str(one), str(two), str(other), "-o", str(tmp_path / "out")]) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["talk.aif.txt", "talk.float.txt", "talk.wav.txt"]


def test_a_result_in_a_folder_is_not_overwritten_unasked(
    engine: list[Module], recording: Recording, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The recording of another folder has the same name: its transcript used to take the place of the first one's."""
    one, out = recording("talk.wav"), tmp_path / "out"
    other = tmp_path / "other" / "talk.wav"
    other.parent.mkdir()
    other.write_bytes(recording("short.wav", TIMES[:1]).read_bytes())
    assert main(["transcribe", str(one), "-o", f"{out}/"]) == 0
    with pytest.raises(SystemExit) as raised:
        main(["transcribe", str(other), "-o", f"{out}/"])
    assert raised.value.code == 2
    said = capsys.readouterr().err
    assert f"{out / 'talk.txt'} is there already" in said
    assert "--overwrite" in said
    assert "--skip-existing" in said
    assert (out / "talk.txt").read_text() == "w0 w1 w2\n"
    assert main(["transcribe", str(other), "-o", str(out), "--skip-existing"]) == 0
    assert (out / "talk.txt").read_text() == "w0 w1 w2\n"
    assert main(["transcribe", str(other), "-o", str(out), "--overwrite"]) == 0
    assert (out / "talk.txt").read_text() == "w0\n"


def test_a_file_that_fails_does_not_stop_the_others(
    engine: list[Module], recording: Recording, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, missing, text = recording(), tmp_path / "missing.wav", tmp_path / "notes.txt"
    text.write_text("not audio " * 100)
    assert main(["transcribe", str(missing), str(good), str(text), str(tmp_path)]) == 1
    out, err = capsys.readouterr()
    assert out == f"==> {good} <==\nw0 w1 w2\n"
    lines = err.splitlines()
    assert lines[0] == f"Error: {missing}: No such file or directory"
    assert lines[1].startswith(f"Error: {text}: not an audio format that is known here")
    assert lines[2].startswith(f"Error: {tmp_path}: ")


def test_a_damaged_file_is_written_as_far_as_it_goes_and_counts_as_failed(
    engine: list[Module], recording: Recording, capsys: pytest.CaptureFixture[str]
) -> None:
    path = recording()
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 6 // 10])
    assert main(["transcribe", str(path)]) == 1
    out, err = capsys.readouterr()
    assert out == "w0 w1\n"
    assert "cut short" in err


def test_a_reader_that_has_gone_ends_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """As in `moshi-stt transcribe … | head -1`: no recording is at fault, and the others need not be transcribed."""

    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    run = _Files(Namespace(format=("text",)), [Item("a.wav")])
    monkeypatch.setattr(sys, "stdout", Gone())
    with pytest.raises(BrokenPipeError):
        run.try_to_write(_Result(run.items[0], Source("a.wav"), [TimedWord("one", 0.5, 0.75)], None))
    assert capsys.readouterr().err == ""


def test_an_unwritable_output_is_an_error(
    engine: list[Module], recording: Recording, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    blocked = tmp_path / "blocked"
    blocked.write_text("")
    assert main(["transcribe", str(recording()), "-o", str(blocked / "x" / "y.txt")]) == 1
    assert "blocked" in capsys.readouterr().err
    assert blocked.read_text() == ""


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "required: FILE (or --manifest FILE)"),
        (["a.wav", "--format", "doc"], "invalid choice: 'doc'"),
        (["a.wav", "--url", "ws://x", "--config", "y"], "leave out --config"),
        (["a.wav", "--key", "k"], "add --url"),
        (["-", "-"], "read once"),
        (["a.wav", "b.wav", "-f", "srt"], "add --output FOLDER"),
        (["a/t.wav", "b/t.wav", "-o", "out"], "same name"),
        (["a.wav", "-f", "text,json"], "several formats do not fit"),
        (["a", "-r"], "-r writes into a folder"),
        (["-", "-r", "-o", "out"], "not standard input"),
        (["a.wav", "--channels", "0"], "the number of a channel from 1"),
        (["a.wav", "--skip-existing", "--overwrite"], "not allowed with"),
        (["a.wav", "--jobs", "0"], "at least 1"),
        (["a.wav", "--prefix-seconds", "-1"], "expected 0 to 30 seconds"),
    ],
)
def test_wrong_usage(args: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["transcribe", *args])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_a_recording_is_not_overwritten(recording: Recording, capsys: pytest.CaptureFixture[str]) -> None:
    path = recording()
    before = path.read_bytes()
    with pytest.raises(SystemExit):
        main(["transcribe", str(path), "-o", str(path)])
    assert "overwrite" in capsys.readouterr().err
    assert path.read_bytes() == before


def test_an_engine_that_cannot_be_had_is_one_plain_sentence(
    monkeypatch: pytest.MonkeyPatch, recording: Recording, capsys: pytest.CaptureFixture[str]
) -> None:
    class Broken(Reader):
        async def start(self) -> None:
            raise CheckpointError("weights are missing: run `moshi-stt download`")

    monkeypatch.setattr(engines, "build_engine", lambda *args, **more: Broken())
    assert main(["transcribe", str(recording())]) == 1
    assert capsys.readouterr() == ("", "Error: weights are missing: run `moshi-stt download`\n")


def test_kyutais_models_get_long_recordings_in_pieces(
    engine: list[Module], recording: Recording, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    readers: list[Reader] = []

    def build(module: Module, limits: LimitsConfig, observer: object = None, force_cpu: bool = False) -> Engine:
        engine.append(module)
        readers.append(Reader(jitter_seconds=0.05))
        return readers[-1]

    monkeypatch.setattr(engines, "build_engine", build)
    times = [(n * 0.4 + 0.1, n * 0.4 + 0.4) for n in range(300)]
    path = recording("long.wav", times, 121.0)
    assert main(["transcribe", "--config", "stt-2.6b-en", "--cpu", "--batch-size", "8", str(path)]) == 0
    assert capsys.readouterr().out.split() == [f"w{n}" for n in range(300)]
    assert readers[0].streams >= 3
    assert engine[-1].batch_size == 8


def test_weights_of_fewer_bits_are_for_kyutais_models(
    engine: list[Module], recording: Recording, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(recording())
    for flags, quantize in (((), "none"), (("--quantize", "int4"), "int4"), (("--quantize", "none"), "none")):
        assert main(["transcribe", "--config", "stt-1b-en_fr", *flags, path]) == 0
        module = engine[-1]
        assert isinstance(module, KyutaiModule)
        assert module.engine.quantize == quantize
    assert main(["transcribe", "--quantize", "none", path]) == 0
    built = len(engine)
    capsys.readouterr()
    assert main(["transcribe", "--quantize", "int4", path]) == 1
    assert capsys.readouterr().err.startswith("Error: --quantize int4: the embedded model has no other weights")
    for flags in (("--quantize", "int2"), ("--url", "ws://127.0.0.1:1", "--quantize", "int4")):
        with pytest.raises(SystemExit) as end:
            main(["transcribe", *flags, path])
        assert end.value.code == 2
        assert "--quantize" in capsys.readouterr().err
    assert len(engine) == built


@pytest.mark.parametrize(
    ("flags", "seconds"), [((), 1.5), (("--prefix-seconds", "0.5"), 0.5), (("--prefix-seconds", "0"), 0.0)]
)
def test_silence_before_is_what_the_model_needs_or_what_is_asked(
    recording: Recording,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    flags: tuple[str, ...],
    seconds: float,
) -> None:
    """It reaches the model, and not the times."""
    reader = Reader(prefix_silence_seconds=1.5)
    monkeypatch.setattr(engines, "build_engine", lambda *args, **more: reader)
    assert main(["transcribe", "-f", "words", *flags, str(recording())]) == 0
    assert capsys.readouterr().out.startswith("0.500\t0.800\tw0\n")
    assert reader.samples == [round((2.5 + seconds) * 24_000)]


def test_no_bar_in_a_pipe_and_one_on_a_terminal(
    engine: list[Module], recording: Recording, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    assert main(["transcribe", str(recording())]) == 0
    assert "s of audio" in terminal.getvalue()
    assert capsys.readouterr().out == "w0 w1 w2\n"
    quiet = Terminal()
    monkeypatch.setattr(sys, "stderr", quiet)
    assert main(["transcribe", "--quiet", str(recording())]) == 0
    assert quiet.getvalue() == ""


# ---- in a process of its own ---------------------------------------------------------------------------------------------

PROGRAM = """
import sys
from moshi_stt import engines
from moshi_stt.cli import main
from tests.support.written import Reader
engines.build_engine = lambda *args, **more: Reader()
sys.exit(main(["transcribe", *sys.argv[1:]]))
"""


def start(*args: str, **more: object) -> "subprocess.Popen[bytes]":
    root = Path(__file__).parents[2]
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", PROGRAM, *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root), "LC_ALL": "C", "PYTHONUTF8": "0"},
        **more,  # type: ignore[call-overload]
    )


@pytest.mark.parametrize("format", ["wav-float", "flac", "m4a"])
def test_standard_input(format: str) -> None:
    """A container whose index is at its end comes through a pipe too."""
    pcm = written([(0.5, 1.0)], 2.0)
    program = start("-", "-f", "json", stdin=subprocess.PIPE)
    out, err = program.communicate(encode(pcm * 500, 24_000, format), timeout=60)
    document = json.loads(out)
    assert (program.returncode, err) == (0, b"")
    assert document["file"] == "-"
    assert abs(document["duration"] - 2.0) < 0.07


def test_accents_are_utf8_whatever_the_locale(tmp_path: Path) -> None:
    path = tmp_path / "été.wav"
    path.write_bytes(encode(written(TIMES, 2.5), 24_000, "wav-float"))
    program = start(str(path), "-f", "json")
    out, err = program.communicate(timeout=60)
    assert (program.returncode, err) == (0, b"")
    assert json.loads(out.decode("utf-8"))["file"] == str(path)


@pytest.mark.skipif(
    bool(engines.missing_packages(engines.EMBEDDED_PACKAGES)), reason="the packages of the embedded model are not here"
)
def test_the_embedded_model_leaves_standard_output_clean() -> None:
    code = "import sys; from moshi_stt.cli import main; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, "transcribe", "--format", "words", str(sample_path())],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    rows = [line.split("\t") for line in done.stdout.splitlines()]
    assert all(0 <= float(start) <= float(end) <= 10 for start, end, _ in rows)
    assert [word.strip(".,?").lower() for _, _, word in rows[:4]] == ["ever", "tried", "ever", "failed"]


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_an_interrupt_ends_it_at_once_while_it_waits_for_input() -> None:
    program = start("-", stdin=subprocess.PIPE)
    assert program.stdin is not None
    data = encode(np.tile(written(TIMES, 2.5), 40), 24_000, "wav-float")
    program.stdin.write(data[: len(data) // 2])  # far more than a pipe holds
    program.stdin.flush()
    wait_until_read(program)
    program.send_signal(signal.SIGINT)
    out, err = program.communicate(timeout=120)
    assert (program.returncode, out, err) == (130, b"", b"")


def wait_until_read(program: "subprocess.Popen[bytes]", seconds: float = 30.0) -> None:
    """Until nothing is left in the program's standard input."""
    import fcntl
    import struct
    import termios

    assert program.stdin is not None
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        (left,) = struct.unpack("i", fcntl.ioctl(program.stdin.fileno(), termios.FIONREAD, bytes(4)))
        if left == 0:
            return
        select.select([], [], [], 0.01)
    pytest.fail("standard input was not read")
