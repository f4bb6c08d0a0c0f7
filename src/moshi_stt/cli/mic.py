"""`moshi-stt mic`: live captions from the microphone, by a model in this process or on a server. Knows no model.

stdout carries the captions and nothing else. Ctrl-C ends the recording; what was said until then is still written down.
"""

import argparse
import asyncio
import contextlib
import shutil
import signal
import sys
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from types import ModuleType
from typing import Any, TextIO

import numpy as np
from numpy.typing import NDArray

from moshi_stt.audio.resample import StreamingResampler, to_mono_float
from moshi_stt.audio.watch import AudioWatch
from moshi_stt.cli.transcribers import load_module
from moshi_stt.constants import KEY_VARIABLE, PUBLIC_KEY, SAMPLE_RATE
from moshi_stt.engine.commands import Audio, Finish
from moshi_stt.engine.recording import moved
from moshi_stt.errors import ConfigError, MoshiSttError
from moshi_stt.events import AnyEvent, EndWord, Marker, Word
from moshi_stt.install import install_command
from moshi_stt.text.subtitles import PARAGRAPH_SECONDS

BLOCK_SECONDS = 0.04
HELD_SECONDS = 60.0
"""Audio that waits for a model slower than speech; what comes then is left out, and said."""


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "mic",
        help="write down what is said into the microphone",
        description="Write down what is said into the microphone, word by word. Ctrl-C ends it. "
        "Without --config and --url: with the English model that comes with the package.",
    )
    parser.add_argument("--device", metavar="NAME", help="number or part of the name of an input (the system's default)")
    parser.add_argument("--list-devices", action="store_true", help="show the inputs and end")
    parser.add_argument("--format", choices=["text", "words"], default="text", help="words: start, end and word on a line each")
    parser.add_argument("--url", metavar="URL", help="server, for instance ws://127.0.0.1:8080; moshi-server too")
    parser.add_argument("--key", help=f"the server's key (default: ${KEY_VARIABLE}, else {PUBLIC_KEY})")
    parser.add_argument(
        "--config", "--model", metavar="FILE", help="TOML file or name of a shipped one (see `moshi-stt configs`)"
    )
    parser.add_argument("--cpu", action="store_true", help="run the model on the CPU, whatever else is there")
    parser.add_argument("--quantize", choices=["none", "int8", "int4"], help="quantized weights (the configuration's)")
    parser.set_defaults(parser=parser)
    return parser


def run(args: argparse.Namespace) -> int:
    """Caption until Ctrl-C. Returns 0. Raises MoshiSttError naming what is missing."""
    if args.url and (args.config or args.cpu or args.quantize):
        args.parser.error("--url runs the model on the server: leave out --config, --cpu and --quantize")
    if args.key and not args.url:
        args.parser.error("--key is the key of a server: add --url")
    library = load_library()
    if args.list_devices:
        print("\n".join(device_lines(library)))
        return 0
    microphone = Microphone(library, args.device)
    return asyncio.run(_run(args, microphone))


# ---- the microphone ------------------------------------------------------------------------------------------------------


def load_library() -> ModuleType:
    """sounddevice, with PortAudio behind it. Raises ConfigError with the command to run."""
    try:
        import sounddevice
    except ImportError:
        raise ConfigError(f"the microphone needs the package sounddevice: run `{install_command('mic')}`") from None
    except OSError as error:  # what sounddevice raises without PortAudio
        install = {
            "linux": "run `sudo apt-get install libportaudio2` (Fedora: `sudo dnf install portaudio`)",
            "darwin": "run `brew install portaudio`",
        }.get(sys.platform, "install PortAudio")
        raise ConfigError(f"the microphone needs the PortAudio library, which is not here ({error}): {install}") from None
    found: ModuleType = sounddevice
    return found


def device_lines(library: Any) -> list[str]:
    """The inputs, one a line, the default marked. Raises ConfigError where there is none."""
    inputs = [(n, device) for n, device in enumerate(library.query_devices()) if device["max_input_channels"] > 0]
    if not inputs:
        raise ConfigError("no microphone found: plug one in, or allow this terminal to use it in the system's settings")
    default = library.default.device[0]
    return [
        f"{'*' if number == default else ' '} {number:2}  {device['name']}  ({device['default_samplerate']:.0f} Hz)"
        for number, device in inputs
    ]


class Microphone:
    """One input, at its own rate, mono. Its callback runs in PortAudio's thread."""

    def __init__(self, library: Any, device: str | None) -> None:
        """Raises ConfigError where there is no such input."""
        self._library = library
        self._device: int | str | None = int(device) if device is not None and device.isdigit() else device
        device_lines(library)
        try:
            info = library.query_devices(self._device, "input")
        except (ValueError, library.PortAudioError) as error:
            raise ConfigError(f"no such microphone ({error}): `moshi-stt mic --list-devices` shows them") from None
        self.name: str = info["name"]
        self.rate = round(info["default_samplerate"])
        self.lost_seconds = 0.0
        """Left out because the model was slower than speech."""

    async def blocks(self, stop: asyncio.Event) -> AsyncIterator[NDArray[np.float32]]:
        """float32 (S,) at `rate`, until `stop`. Raises ConfigError where the input cannot be opened."""
        loop = asyncio.get_running_loop()
        held: deque[NDArray[np.float32]] = deque()
        most = round(HELD_SECONDS / BLOCK_SECONDS)
        news = asyncio.Event()

        def take(block: NDArray[np.float32]) -> None:
            if len(held) < most:
                held.append(block)
            else:
                self.lost_seconds += len(block) / self.rate
            news.set()

        def callback(data: NDArray[np.float32], frames: int, time: object, status: object) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closing
                loop.call_soon_threadsafe(take, to_mono_float(data.copy()))

        try:
            stream = self._library.InputStream(
                device=self._device,
                samplerate=self.rate,
                channels=1,
                dtype="float32",
                blocksize=round(self.rate * BLOCK_SECONDS),
                callback=callback,
            )
        except (ValueError, self._library.PortAudioError) as error:
            raise ConfigError(f"the microphone {self.name!r} cannot be opened: {error}") from None
        with stream:
            stopping = asyncio.create_task(stop.wait())
            stopping.add_done_callback(lambda _: news.set())
            try:
                while not stop.is_set():
                    while held:
                        yield held.popleft()
                    news.clear()
                    if not stop.is_set():
                        await news.wait()
            finally:
                stopping.cancel()
        while held:
            yield held.popleft()


# ---- who writes it down --------------------------------------------------------------------------------------------------


class Live(ABC):
    """A live stream, here or on a server."""

    @abstractmethod
    async def feed(self, pcm: NDArray[np.float32]) -> None:
        """float32 (S,) at 24 kHz."""

    @abstractmethod
    async def finish(self) -> None:
        """No more audio; `events` then ends by itself."""

    @abstractmethod
    def events(self) -> AsyncIterator[AnyEvent]:
        """Raises MoshiSttError where the stream fails."""


@asynccontextmanager
async def open_live(args: argparse.Namespace) -> AsyncIterator[Live]:
    """The stream that the command line asks for. Raises MoshiSttError."""
    if args.url:
        from moshi_stt.client import Client

        async with Client(args.url, args.key or None) as client:
            yield _OnServer(client)
        return
    from moshi_stt.engines import build_engine

    module, limits = load_module(args.config, 1, args.quantize)
    engine = build_engine(module, limits, force_cpu=args.cpu)
    print("loading the model …", file=sys.stderr)
    await engine.start()
    try:
        stream = engine.open()
        try:
            prefix_seconds = engine.info.prefix_silence_seconds
            await stream.send(Audio(np.zeros(round(prefix_seconds * SAMPLE_RATE), np.float32)))
            yield _InProcess(stream, prefix_seconds)
        finally:
            stream.close()
    finally:
        await engine.stop()


class _OnServer(Live):
    def __init__(self, client: Any) -> None:
        self._client = client

    async def feed(self, pcm: NDArray[np.float32]) -> None:
        await self._client.send_audio(pcm)

    async def finish(self) -> None:
        await self._client.send_audio(np.zeros(SAMPLE_RATE, np.float32))
        await self._client.mark(0)
        await self._client.send_audio(np.zeros(3 * SAMPLE_RATE, np.float32))  # moshi-server brings no marker back without

    async def events(self) -> AsyncIterator[AnyEvent]:
        async for event in self._client:
            if isinstance(event, Marker):
                return
            yield event


class _InProcess(Live):
    def __init__(self, stream: Any, prefix_seconds: float = 0.0) -> None:
        """prefix_seconds: silence that the stream had before, to be taken out of the times."""
        self._stream = stream
        self._prefix_seconds = prefix_seconds

    async def feed(self, pcm: NDArray[np.float32]) -> None:
        await self._stream.send(Audio(pcm))

    async def finish(self) -> None:
        await self._stream.send(Finish())

    async def events(self) -> AsyncIterator[AnyEvent]:
        async for event in self._stream:
            if (word := moved(event, -self._prefix_seconds)) is not None:
                yield word


# ---- the display ---------------------------------------------------------------------------------------------------------


class Captions:
    """Words as they come, a new line at a pause, and on a terminal none cut at its edge."""

    def __init__(self, out: TextIO, format: str) -> None:
        self._out = out
        self._format = format
        self._width = shutil.get_terminal_size().columns if out.isatty() else sys.maxsize
        self._column = 0
        self._word: Word | None = None
        self._end = 0.0

    def show(self, event: AnyEvent) -> None:
        if isinstance(event, Word):
            self._flush_word(event.start_time)
            self._word = event
            if self._format == "text":
                self._write(event)
        elif isinstance(event, EndWord):
            self._end = max(self._end, event.stop_time)
            self._flush_word(event.stop_time)

    def close(self) -> None:
        """End the last line."""
        self._flush_word(self._end)
        if self._column:
            self._out.write("\n")
            self._out.flush()
            self._column = 0

    def _write(self, word: Word) -> None:
        text = " ".join(word.text.split())
        if (self._column and word.start_time - self._end >= PARAGRAPH_SECONDS) or self._column + 1 + len(text) > self._width:
            self._out.write("\n" if self._column else "")
            self._column = 0
        self._out.write(f" {text}" if self._column else text)
        self._out.flush()
        self._column += len(text) + bool(self._column)
        self._end = max(self._end, word.start_time)

    def _flush_word(self, end: float) -> None:
        if self._word is not None and self._format == "words":
            text = " ".join(self._word.text.split())
            start = self._word.start_time
            self._out.write(f"{start:.3f}\t{max(start, end):.3f}\t{text}\n")
            self._out.flush()
        self._word = None


# ---- all of it -----------------------------------------------------------------------------------------------------------


async def _run(args: argparse.Namespace, microphone: Microphone) -> int:
    stop = asyncio.Event()
    with _ending_with_sigint(stop.set):
        async with open_live(args) as live:
            print(f"listening to {microphone.name} at {microphone.rate} Hz; Ctrl-C ends", file=sys.stderr)
            await caption(microphone, live, Captions(sys.stdout, args.format), stop)
    return 0


async def caption(microphone: Microphone, live: Live, captions: Captions, stop: asyncio.Event) -> None:
    """Microphone to stream to display, until `stop` and everything said before it is shown. Raises MoshiSttError."""
    watch = AudioWatch()
    words = 0
    feeder = asyncio.create_task(_feed(microphone, live, stop, watch))
    feeder.add_done_callback(lambda _: stop.set())
    try:
        async for event in live.events():
            words += isinstance(event, Word)
            captions.show(event)
        stop.set()
        await feeder
    finally:
        feeder.cancel()
        results = await asyncio.gather(feeder, return_exceptions=True)
        captions.close()
    if isinstance(results[0], MoshiSttError):
        raise results[0]
    for warning in watch.without_words() if not words else ():
        print(f"Warning: {warning}", file=sys.stderr)


async def _feed(microphone: Microphone, live: Live, stop: asyncio.Event, watch: AudioWatch) -> None:
    resampler = StreamingResampler(microphone.rate)
    said_lost = 0.0
    try:
        async for block in microphone.blocks(stop):
            pcm = resampler.feed(block)
            for warning in watch.feed(pcm):
                print(f"\nWarning: {warning}", file=sys.stderr)
            await live.feed(pcm)
            if microphone.lost_seconds >= said_lost + 1:
                said_lost = microphone.lost_seconds
                print(f"\nWarning: the model is slower than speech: {said_lost:.0f} s left out", file=sys.stderr)
        await live.feed(resampler.finish())
    finally:
        await live.finish()


@contextlib.contextmanager
def _ending_with_sigint(stop: Callable[[], None]) -> Iterator[None]:
    """The first Ctrl-C calls `stop`, the second interrupts."""
    loop = asyncio.get_running_loop()
    before = signal.getsignal(signal.SIGINT)

    def handle(number: int, frame: object) -> None:
        signal.signal(signal.SIGINT, before)
        loop.call_soon_threadsafe(stop)

    signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
