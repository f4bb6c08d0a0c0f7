"""examples/: each runs as its first lines say, on recordings of minutes too, and none ends in a traceback."""

import asyncio
import json
import signal
import sys
from pathlib import Path

import pytest
from tests.support.media import encode, noise
from tests.support.scripted_engine import ScriptedEngine, counting
from tests.support.serving import serving

from moshi_stt.constants import FRAME_SECONDS

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
SECONDS = 120.0
MINUTES = 5
WORDS = [f"w{i}" for i in range(int(60 * MINUTES / FRAME_SECONDS / 2) - 10)]


async def run(*command: str) -> tuple[int | None, str, str]:
    program = await asyncio.create_subprocess_exec(
        *command, cwd=ROOT, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    async with asyncio.timeout(SECONDS):
        out, err = await program.communicate()
    return program.returncode, out.decode(), err.decode()


@pytest.fixture(scope="module")
def minutes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five minutes of sound."""
    path = tmp_path_factory.mktemp("recording") / "minutes.wav"
    path.write_bytes(encode(noise(60.0 * MINUTES), 24_000))
    return path


@pytest.mark.parametrize("example", ["raw_websocket.py", "transcribe_file.py", "utterances.py"])
async def test_five_minutes(example: str, minutes: Path) -> None:
    if example == "raw_websocket.py":
        pytest.importorskip("websockets")
    async with serving(ScriptedEngine(counting(len(WORDS)))) as running:
        code, out, err = await run(sys.executable, str(EXAMPLES / example), str(minutes), f"ws://127.0.0.1:{running.port}")
    assert (code, err) == (0, "")
    assert [word for word in out.split() if word.startswith("w")] == WORDS


async def test_five_minutes_by_curl(minutes: Path) -> None:
    engine = ScriptedEngine(counting(len(WORDS)))
    engine.cuts_speech = True  # the recording is one stream, and not cut into pieces
    async with serving(engine) as running:
        code, out, err = await run("sh", str(EXAMPLES / "post.sh"), str(minutes), running.http)
    assert (code, err) == (0, "")
    assert [event["text"] for event in json.loads(out) if event["type"] == "Word"] == WORDS


PROGRAMS = [*sorted(EXAMPLES.glob("*.py")), ROOT / "test_client.py"]


async def interrupted(program: asyncio.subprocess.Process) -> None:
    """Ctrl-C ends it with status 130 and not a word.

    Python itself loses an interrupt that meets a destructor, and says so: then Ctrl-C is pressed again.
    """
    assert program.stdout is not None
    assert program.stderr is not None
    reading = asyncio.create_task(program.stdout.read())
    program.send_signal(signal.SIGINT)
    async with asyncio.timeout(SECONDS):
        line = await program.stderr.readline()
        if line.startswith(b"Exception ignored"):
            while not line.startswith(b"KeyboardInterrupt"):
                assert line, "it has ended"
                line = await program.stderr.readline()
            program.send_signal(signal.SIGINT)
            line = await program.stderr.readline()
        assert line == b""
        assert await program.wait() == 130
        await reading


@pytest.mark.skipif(sys.platform == "win32", reason="Ctrl-C is another thing there")
@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.name)
async def test_ctrl_c_while_a_server_does_not_answer(path: Path, minutes: Path) -> None:
    called = asyncio.Event()

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        called.set()
        await reader.read()
        writer.close()

    async with await asyncio.start_server(silent, "127.0.0.1", 0) as server:
        program = await start(path, minutes, server.sockets[0].getsockname()[1])
        async with asyncio.timeout(SECONDS):
            await called.wait()
        await interrupted(program)


@pytest.mark.skipif(sys.platform == "win32", reason="Ctrl-C is another thing there")
@pytest.mark.parametrize("path", [path for path in PROGRAMS if path.name != "utterances.py"], ids=lambda path: path.name)
async def test_ctrl_c_among_the_words(path: Path, minutes: Path) -> None:
    async with serving(ScriptedEngine(counting(len(WORDS)), step_seconds=0.2)) as running:
        program = await start(path, minutes, running.port)
        assert program.stdout is not None
        async with asyncio.timeout(SECONDS):
            while b"w" not in await program.stdout.read(1):
                assert program.returncode is None
        await interrupted(program)


async def start(path: Path, recording: Path, port: int) -> asyncio.subprocess.Process:
    url = f"ws://127.0.0.1:{port}"
    arguments = ["--url", url] if path.name == "test_client.py" else [url]
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-u",
        str(path),
        str(recording),
        *arguments,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )


@pytest.mark.parametrize("example", sorted(path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".sh")))
async def test_without_arguments_and_without_a_server(example: str, tmp_path: Path, unused_tcp_port: int) -> None:
    program = ["sh"] if example.endswith(".sh") else [sys.executable]
    code, _, err = await run(*program, str(EXAMPLES / example))
    assert code not in (0, None)
    assert example in err, "the usage is shown"
    sound = tmp_path / "sound.wav"
    sound.write_bytes(encode(noise(0.1), 24_000))
    scheme = "http" if example.endswith(".sh") else "ws"
    for path in (sound, tmp_path / "absent.wav"):
        code, _, err = await run(*program, str(EXAMPLES / example), str(path), f"{scheme}://127.0.0.1:{unused_tcp_port}")
        assert code not in (0, None)
        assert err
        assert "Traceback" not in err
