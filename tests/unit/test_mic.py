"""The microphone command with a sound library made for the test, and without one."""

import argparse
import asyncio
import io
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tests.support.media import noise
from tests.support.scripted_engine import ScriptedEngine, counting
from tests.support.serving import serving

from moshi_stt import engines
from moshi_stt.cli import main, mic
from moshi_stt.cli.mic import Captions, Live, Microphone, caption, device_lines
from moshi_stt.errors import ConfigError, EngineError
from moshi_stt.events import AnyEvent, EndWord, Ready, Step, Word
from moshi_stt.install import install_command


class PortAudioError(Exception):
    pass


class Sound:
    """As much of sounddevice as the command uses. `play` is called with the callback once the input is open."""

    PortAudioError = PortAudioError

    def __init__(self, play: Callable[[Callable[..., None]], None] = lambda callback: None, rate: float = 48_000.0) -> None:
        self.default = SimpleNamespace(device=(1, 0))
        self.devices = [
            {"name": "Speaker", "max_input_channels": 0, "default_samplerate": 48_000.0},
            {"name": "Built-in Microphone", "max_input_channels": 1, "default_samplerate": rate},
        ]
        self._play = play
        self.opened: dict[str, Any] = {}

    def query_devices(self, device: int | str | None = None, kind: str | None = None) -> Any:
        if kind is None:
            return self.devices
        found = [d for d in self.devices if d["max_input_channels"] and (device in (None, 1) or str(device) in d["name"])]
        if not found:
            raise ValueError(f"No input device matching {device!r}")
        return found[0]

    def InputStream(self, **options: Any) -> "Sound":
        self.opened = options
        return self

    def __enter__(self) -> "Sound":
        self._play(self.opened["callback"])
        return self

    def __exit__(self, *error: object) -> None: ...


class Ear(Live):
    """Says one word for each second it is fed; keeps what it heard."""

    def __init__(self, fail_after_seconds: float = 1e9) -> None:
        self.heard: list[np.ndarray] = []
        self.finished = asyncio.Event()
        self._events: asyncio.Queue[AnyEvent | None] = asyncio.Queue()
        self._events.put_nowait(Ready())
        self._words = 0
        self._fail_after = fail_after_seconds

    async def feed(self, pcm: np.ndarray) -> None:
        self.heard.append(pcm)
        seconds = sum(map(len, self.heard)) / 24_000
        if seconds > self._fail_after:
            raise EngineError("the model step failed")
        while self._words + 1 <= seconds:
            self._events.put_nowait(Word(f"w{self._words}", self._words + 0.25))
            self._events.put_nowait(EndWord(self._words + 0.75))
            self._words += 1

    async def finish(self) -> None:
        self._events.put_nowait(None)
        self.finished.set()

    async def events(self) -> AsyncIterator[AnyEvent]:
        while (event := await self._events.get()) is not None:
            yield event


def playing(seconds: float, rate: int, then: Callable[[], None]) -> Callable[[Callable[..., None]], None]:
    """Give the recording to the callback block by block, then call `then` on the loop."""

    def play(callback: Callable[..., None]) -> None:
        pcm = noise(seconds, rate)
        for start in range(0, len(pcm), rate // 25):
            block = pcm[start : start + rate // 25].reshape(-1, 1)
            callback(block, len(block), None, None)
            block[:] = 9  # PortAudio uses its buffer again
        asyncio.get_running_loop().call_soon(then)

    return play


async def run_caption(rate: int, format: str = "text", seconds: float = 3.2) -> tuple[str, Ear]:
    stop = asyncio.Event()
    sound = Sound(playing(seconds, rate, stop.set), rate)
    out = io.StringIO()
    ear = Ear()
    await caption(Microphone(sound, None), ear, Captions(out, format), stop)
    return out.getvalue(), ear


@pytest.mark.parametrize("rate", [24_000, 44_100, 48_000])
async def test_everything_said_is_fed_at_24_khz_and_shown(rate: int) -> None:
    shown, ear = await run_caption(rate)
    assert shown == "w0 w1 w2\n"
    heard = np.concatenate(ear.heard)
    assert abs(len(heard) - 3.2 * 24_000) <= 1
    assert ear.finished.is_set()
    assert np.abs(heard).max() < 1


async def test_words_with_their_times() -> None:
    shown, _ = await run_caption(24_000, "words")
    assert shown == "0.250\t0.750\tw0\n1.250\t1.750\tw1\n2.250\t2.750\tw2\n"


async def test_a_stream_that_fails_is_raised() -> None:
    stop = asyncio.Event()
    sound = Sound(playing(3.0, 24_000, lambda: None), 24_000.0)
    with pytest.raises(EngineError, match="the model step failed"):
        await caption(Microphone(sound, None), Ear(fail_after_seconds=1.5), Captions(io.StringIO(), "text"), stop)


async def test_a_model_slower_than_speech_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(mic, "HELD_SECONDS", 2.0)
    _, ear = await run_caption(24_000, seconds=5.0)
    assert abs(sum(map(len, ear.heard)) / 24_000 - 2.0) < 0.1
    assert "3 s left out" in capsys.readouterr().err


async def test_a_silent_microphone_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    """What macOS gives to a terminal that may not listen."""
    stop = asyncio.Event()

    def play(callback: Callable[..., None]) -> None:
        for _ in range(12 * 25):
            callback(np.zeros((960, 1), np.float32), 960, None, None)
        asyncio.get_running_loop().call_soon(stop.set)

    await caption(Microphone(Sound(play, 24_000.0), None), Ear(), Captions(io.StringIO(), "text"), stop)
    assert "nothing but zeros in the first 10 s" in capsys.readouterr().err


def test_devices_are_listed() -> None:
    assert device_lines(Sound()) == ["*  1  Built-in Microphone  (48000 Hz)"]


def test_no_microphone_and_no_such_microphone() -> None:
    sound = Sound()
    with pytest.raises(ConfigError, match="--list-devices"):
        Microphone(sound, "Headset")
    assert Microphone(sound, "Built-in").name == "Built-in Microphone"
    assert Microphone(sound, "1").rate == 48_000
    sound.devices.pop()
    with pytest.raises(ConfigError, match="no microphone found"):
        Microphone(sound, None)


async def test_an_input_that_cannot_be_opened() -> None:
    sound = Sound()

    def refuse(**options: Any) -> Any:
        raise PortAudioError("Device unavailable")

    sound.InputStream = refuse  # type: ignore[method-assign]
    with pytest.raises(ConfigError, match="cannot be opened: Device unavailable"):
        await caption(Microphone(sound, None), Ear(), Captions(io.StringIO(), "text"), asyncio.Event())


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_lines_break_at_the_terminals_edge_and_at_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "12")
    out = Terminal()
    captions = Captions(out, "text")
    for start, text in enumerate(["one", "two", "three", "four", "a-very-long-word", "end"]):
        captions.show(Word(text, float(start)))
        captions.show(Step(start, (), 0))
        captions.show(EndWord(start + 0.5))
    captions.show(Word("later", 9.0))
    captions.close()
    assert out.getvalue() == "one two\nthree four\na-very-long-word\nend\nlater\n"


def test_nothing_said_prints_nothing() -> None:
    out = io.StringIO()
    Captions(out, "text").close()
    assert out.getvalue() == ""


def test_the_extra_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "sounddevice", None)
    assert main(["mic"]) == 1
    assert capsys.readouterr().err == (f"Error: the microphone needs the package sounddevice: run `{install_command('mic')}`\n")


def test_portaudio_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    class Finder:
        def find_spec(self, name: str, path: object = None, target: object = None) -> None:
            if name == "sounddevice":
                raise OSError("PortAudio library not found")

    monkeypatch.delitem(sys.modules, "sounddevice", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])
    assert main(["mic", "--list-devices"]) == 1
    error = capsys.readouterr().err
    assert "PortAudio library, which is not here" in error
    assert "`" in error


@pytest.mark.parametrize(
    "args", [["--url", "x", "--cpu"], ["--url", "x", "--config", "y"], ["--url", "x", "--quantize", "int4"], ["--key", "k"]]
)
def test_wrong_usage(args: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["mic", *args])
    assert caught.value.code == 2


def test_listing_prints_the_devices(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    module = ModuleType("sounddevice")
    module.__dict__.update(
        query_devices=Sound().query_devices, default=Sound().default, PortAudioError=PortAudioError, __spec__=None
    )
    monkeypatch.setitem(sys.modules, "sounddevice", module)
    assert main(["mic", "--list-devices"]) == 0
    assert capsys.readouterr() == ("*  1  Built-in Microphone  (48000 Hz)\n", "")


def interrupting(seconds: float) -> Sound:
    """A recording, and then Ctrl-C."""
    return Sound(playing(seconds, 24_000, lambda: os.kill(os.getpid(), signal.SIGINT)), 24_000.0)


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_the_whole_command_in_process(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The last word comes behind Ctrl-C: the engine is 20 frames late."""
    engine = ScriptedEngine(counting(10), delay_frames=20)
    monkeypatch.setattr(mic, "load_library", lambda: interrupting(1.6))
    monkeypatch.setattr(engines, "build_engine", lambda *args, **more: engine)
    assert main(["mic"]) == 0
    out, err = capsys.readouterr()
    assert out == " ".join(f"w{n}" for n in range(10)) + "\n"
    assert err == "loading the model …\nlistening to Built-in Microphone at 24000 Hz; Ctrl-C ends\n"
    assert engine.used_slots == 0


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_the_models_silence_comes_first(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    engine = ScriptedEngine(counting(10), delay_frames=2, prefix_silence_seconds=0.4)
    monkeypatch.setattr(mic, "load_library", lambda: interrupting(1.6))
    monkeypatch.setattr(engines, "build_engine", lambda *args, **more: engine)
    assert main(["mic", "--format", "words"]) == 0
    assert sum(engine.samples) == round((0.4 + 1.6) * 24_000)
    assert capsys.readouterr().out.splitlines()[4].endswith("\tw4")


@pytest.mark.skipif(os.name != "posix", reason="signals")
async def test_the_whole_command_on_a_server(capsys: pytest.CaptureFixture[str]) -> None:
    async with serving(ScriptedEngine(counting(10), delay_frames=20)) as running:
        args = argparse.ArgumentParser()
        parsed = mic.add_parser(args.add_subparsers()).parse_args(["--url", running.ws])
        assert await mic._run(parsed, Microphone(interrupting(1.6), None)) == 0
    assert capsys.readouterr().out == " ".join(f"w{n}" for n in range(10)) + "\n"


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_the_first_interrupt_ends_the_recording_and_the_second_the_program() -> None:
    code = """
import asyncio, os, signal
from moshi_stt.cli.mic import _ending_with_sigint
from moshi_stt.install import install_command
async def main():
    stop = asyncio.Event()
    with _ending_with_sigint(stop.set):
        os.kill(os.getpid(), signal.SIGINT)
        await stop.wait()
        print("written down", flush=True)
        os.kill(os.getpid(), signal.SIGINT)
        await asyncio.Event().wait()
try:
    asyncio.run(main())
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout == "written down\ninterrupted\n"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
