"""Our own clients against the whole server: the class for programs, `transcribe --url`, and test_client.py as a program."""

import asyncio
import contextlib
import importlib.util
import json
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from tests.support.media import encode, noise, shift_of
from tests.support.scripted_engine import ScriptedEngine, ScriptedWord, counting
from tests.support.serving import Running, serving, until
from tests.support.written import Reader, written

from moshi_stt.audio.opus import OpusEncoder
from moshi_stt.client import Client
from moshi_stt.engine.stream import StreamLimits
from moshi_stt.errors import ServerError
from moshi_stt.events import Marker, Ready, Step, Word

ROOT = Path(__file__).parents[2]
SECONDS = 120.0


async def run(*args: str) -> tuple[int | None, str, str]:
    """A program of this checkout."""
    program = await asyncio.create_subprocess_exec(
        sys.executable, *args, cwd=ROOT, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    async with asyncio.timeout(SECONDS):
        out, err = await program.communicate()
    return program.returncode, out.decode(), err.decode()


async def cli(*args: str) -> tuple[int | None, str, str]:
    return await run("-c", "import sys; from moshi_stt.cli import main; sys.exit(main())", *args)


async def test_test_client_prints_what_users_of_the_mac_installer_know(tmp_path: Path) -> None:
    path = tmp_path / "bonjour.wav"
    path.write_bytes(encode(noise(1.5, 48_000), 48_000, "wav"))
    engine = ScriptedEngine([ScriptedWord("Bonjour,", 21, 26)], delay_frames=6)
    async with serving(engine) as running:
        code, out, err = await run("test_client.py", str(path), "--url", f"ws://127.0.0.1:{running.port}")
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        "received: {'type': 'Ready'}",
        "received: {'type': 'Word', 'text': 'Bonjour,', 'start_time': 1.68}",
        "received: {'type': 'EndWord', 'stop_time': 2.08}",
        "received: {'type': 'Marker', 'id': 0}",
        "Received marker, stopping stream.",
        "exiting",
        "Transcription: Bonjour,",
    ]


async def test_test_client_with_all_its_options(tmp_path: Path) -> None:
    path = tmp_path / "talk.flac"
    path.write_bytes(encode(noise(1.0, 44_100), 44_100, "flac"))
    words = tmp_path / "words.json"
    async with serving(ScriptedEngine(counting(3))) as running:
        code, out, err = await run(
            *("test_client.py", str(path), "--url", running.ws, "--api-key", "public_token", "--rtf", "4", "--steps"),
            *("--json", str(words)),
        )
    assert (code, err) == (0, "")
    assert "received: {'type': 'Step'" in out
    assert json.loads(words.read_text())[1] == {"speaker": "SPEAKER_00", "text": "w1", "timestamp": [0.16, 0.24]}


async def test_test_client_says_what_went_wrong(
    tmp_path: Path, unused_tcp_port: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "talk.wav"
    path.write_bytes(encode(noise(0.1), 24_000))
    program = load_test_client()
    async with full_server() as running:
        for args, message in (
            ([str(path), "--url", f"ws://127.0.0.1:{unused_tcp_port}"], "cannot be reached"),
            ([str(path), "--url", running.ws, "--api-key", "wrong"], "answered 401 (wrong --api-key?)"),
            ([str(path), "--url", running.ws], "the server says: no free channels"),
            ([str(tmp_path / "none.wav")], "cannot be read: No such file or directory"),
            ([__file__], "cannot be read"),
        ):
            monkeypatch.setattr(sys, "argv", ["test_client.py", *args])
            assert await asyncio.to_thread(program.main) == 1
            error = capsys.readouterr().err
            assert error.startswith("Error: ")
            assert message in error
    monkeypatch.setattr(sys, "argv", ["test_client.py", str(path), "--rtf", "0"])
    with pytest.raises(SystemExit):
        program.main()
    assert "above 0" in capsys.readouterr().err


async def test_test_client_finds_a_sample_or_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = load_test_client()
    monkeypatch.setattr(program, "__file__", str(tmp_path / "test_client.py"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(program.ClientError, match="name a recording"):
        program.sample_path()
    for place in ("src/moshi_stt/data/speech/beckett.wav", "data/bonjour.wav"):
        path = tmp_path / place
        path.parent.mkdir(parents=True)
        path.write_bytes(b"")
        assert program.sample_path() == str(path)


async def test_test_client_says_when_the_server_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "talk.wav"
    path.write_bytes(encode(noise(0.5), 24_000))
    engine = ScriptedEngine(counting(3))
    engine.hold()
    monkeypatch.setattr(sys, "argv", ["test_client.py", str(path), "--url", "to be set"])
    async with serving(engine) as running:
        sys.argv[-1] = running.ws
        task = asyncio.create_task(asyncio.to_thread(load_test_client().main))
        await until(lambda: engine.queued_samples > 40_000, "the recording's arrival")
        engine.fail_next("the graphics card fell off")
        assert await task == 1
    assert "graphics card" in capsys.readouterr().err


@contextlib.asynccontextmanager
async def full_server() -> AsyncIterator[Running]:
    """Its one slot is taken."""
    engine = ScriptedEngine(slots=1)
    async with serving(engine) as running:
        engine.open()
        yield running


def load_test_client() -> ModuleType:
    """The program as a module, for the cases that need no process of their own."""
    spec = importlib.util.spec_from_file_location("test_client_program", ROOT / "test_client.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


async def test_transcribe_on_a_server(tmp_path: Path) -> None:
    times = [(n * 0.4 + 0.1, n * 0.4 + 0.4) for n in range(50)]
    path = tmp_path / "talk.wav"
    path.write_bytes(encode(written(times, 21.0), 24_000, "wav-float"))
    engine = ScriptedEngine(counting(50, 3))
    async with serving(engine) as running:
        code, out, err = await cli("transcribe", str(path), str(path), "--url", running.ws, "-f", "words")
        assert (code, err) == (0, "")
        assert [line.split("\t")[2] for line in out.splitlines() if "\t" in line] == [f"w{n}" for n in range(50)] * 2
        code, out, err = await cli("transcribe", str(path), "--url", running.ws, "--key", "wrong")
    assert (code, out) == (1, "")
    assert "does not know this key" in err


async def test_client_over_the_live_server() -> None:
    async with serving(ScriptedEngine(counting(10), delay_frames=6)) as running, Client(running.ws) as client:
        await client.send_audio(np.zeros(40_000, np.float32))
        await client.mark(9)
        events = []
        async for event in client:
            events.append(event)
            if isinstance(event, Marker):
                break
    assert events[0] == Ready()
    assert [event.text for event in events if isinstance(event, Word)] == [f"w{n}" for n in range(10)]
    assert events[-1] == Marker(9)
    assert any(isinstance(event, Step) for event in events)


async def test_several_markers_and_a_reset_in_one_session() -> None:
    async with serving(ScriptedEngine(counting(100))) as running, Client(running.ws) as client:
        seen: list[object] = []
        for number in range(3):
            await client.send_audio(np.zeros(19_200, np.float32))
            await client.mark(number)
        await client.init()
        await client.mark(3)
        async for event in client:
            if isinstance(event, Marker | Ready):
                seen.append(event)
            if event == Marker(3):
                break
    assert seen == [Ready(), Marker(0), Marker(1), Marker(2), Ready(), Marker(3)]


async def test_a_recording_larger_than_every_buffer_goes_through() -> None:
    """The server stops reading while its engine is behind; the client waits and loses nothing."""
    engine = ScriptedEngine(counting(1_500, 3), limits=StreamLimits(inbox_samples=48_000, outbox_events=64))
    async with serving(engine) as running, Client(running.ws) as client:
        words = await client.transcribe(np.zeros(1_500 * 3 * 1_920, np.float32), silence_after_seconds=0)
    assert [word.text for word in words] == [f"w{n}" for n in range(1_500)]


async def test_no_slot_and_a_failed_engine_are_errors() -> None:
    async with full_server() as running, Client(running.ws) as client:
        with pytest.raises(ServerError, match="no free channels"):
            await client.transcribe(noise(0.1))
    engine = ScriptedEngine(counting(3))
    async with serving(engine) as running, Client(running.ws) as client:
        await client.send_audio(noise(0.5))
        engine.fail_next("the graphics card fell off")
        with pytest.raises(ServerError, match="graphics card"):
            await client.transcribe(noise(0.5))
        with pytest.raises(ServerError, match=r"cannot serve now \(503\)"):
            await Client.connect(running.ws)


async def transcribed(url: str, pcm: np.ndarray, size: int, as_bin: bool) -> list[str]:
    async with Client(url, as_bin=as_bin) as client:
        pieces = (pcm[start : start + size] for start in range(0, len(pcm), size))
        return [f"{word.text} {word.start:.4f}" for word in await client.transcribe(pieces, silence_after_seconds=0)]


async def test_every_encoding_and_chunking_feeds_the_same_samples() -> None:
    """What the engine reads in the samples comes back as words, so one sample lost or doubled would show."""
    times = [(0.1, 0.3), (0.5, 0.52), (0.6, 1.0), (1.25, 1.5)]
    pcm = written(times, 1.6)
    expected = [f"w{n} {start:.4f}" for n, (start, _) in enumerate(times)]
    engine = Reader(files_only=False)
    async with serving(engine) as running:
        for size in (7, 240, 1_920, 24_000, len(pcm)):
            for as_bin in (False, True):
                assert await transcribed(running.ws, pcm, size, as_bin) == expected
        assert await transcribed(running.ws, pcm.astype(np.float64), 999, False) == expected
    for read in engine.read:
        np.testing.assert_array_equal(read, pcm)


async def test_opus_in_any_pieces_feeds_the_same_samples() -> None:
    pcm = noise(0.8)
    encoder = OpusEncoder()
    data = encoder.feed(pcm) + encoder.finish()
    engine = Reader(files_only=False)
    async with serving(engine) as running:
        for size in (1, 100, 4_096, len(data)):
            async with Client(running.ws, as_bin=size > 1) as client:
                for start in range(0, len(data), size):
                    await client.send_opus(data[start : start + size])
                await client.mark()
                async for event in client:
                    if isinstance(event, Marker):
                        break
    assert len(engine.read) == 4
    for read in engine.read:
        np.testing.assert_array_equal(read, engine.read[0])
    assert abs(shift_of(engine.read[0], pcm)) <= 1
