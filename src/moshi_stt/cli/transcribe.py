"""`moshi-stt transcribe`: audio files to text, in this process or on a server. Knows files, formats and exit codes, no model.

stdout carries transcripts and nothing else; progress and complaints go to stderr.
"""

import argparse
import asyncio
import io
import os
import select
import sys
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, Literal, Self, cast

import numpy as np
from numpy.typing import NDArray

from moshi_stt.audio.decode import decode_file, probe
from moshi_stt.config import EmbeddedModule, Module, with_quantize
from moshi_stt.constants import PUBLIC_KEY, SAMPLE_RATE
from moshi_stt.cores import usable_cores
from moshi_stt.errors import AudioError, MoshiSttError
from moshi_stt.text.subtitles import FORMATS, SUFFIXES, TimedWord, format_json

if TYPE_CHECKING:
    from tqdm import tqdm

KEY_VARIABLE = "MOSHI_STT_KEY"

_USAGE, _FAILED, _DONE = 2, 1, 0


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "transcribe",
        help="write down what is said in audio files",
        description="Write down what is said in audio or video files of any common format. "
        "Without --config and --url: with the English model that comes with the package.",
        epilog="Exit status: 0 all files done, 1 some failed or were damaged, 2 wrong usage, 130 interrupted.",
    )
    parser.add_argument("files", nargs="+", metavar="FILE", help="audio file; - is standard input")
    parser.add_argument("-f", "--format", choices=list(FORMATS), default="text", help="what to write (default %(default)s)")
    parser.add_argument(
        "-o", "--output", metavar="PATH", help="file to write; for several FILEs, or with a / at its end, a folder"
    )
    parser.add_argument("--jobs", type=_positive, metavar="N", help="files at once (one for each processor, at most 8)")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    where = parser.add_argument_group("where", "In this process, or on a running server with --url.")
    where.add_argument("--url", metavar="URL", help="server, for instance ws://127.0.0.1:8080; moshi-server too")
    where.add_argument("--key", help=f"the server's key (default: ${KEY_VARIABLE}, else {PUBLIC_KEY})")
    where.add_argument(
        "--config", "--model", metavar="FILE", help="TOML file or name of a shipped one (see `moshi-stt configs`)"
    )
    where.add_argument("--cpu", action="store_true", help="run the model on the CPU, whatever else is there")
    where.add_argument("--quantize", choices=["none", "int8", "int4"], help="weights of fewer bits (the configuration's)")
    where.add_argument("--batch-size", type=_positive, metavar="N", help="pieces of a recording at once (the configuration's)")
    where.add_argument(
        "--prefix-seconds", type=_seconds, metavar="S", help="silence before each recording (1 for the 2.6B model, else 0)"
    )
    parser.set_defaults(parser=parser)
    return parser


def run(args: argparse.Namespace) -> int:
    """Transcribe every file. Returns the exit status. Raises ConfigError, CheckpointError, EngineError or ServerError where no
    file can be done; SystemExit(2) on wrong usage."""
    if args.url and (args.config or args.cpu or args.quantize or args.batch_size):
        args.parser.error("--url runs the model on the server: leave out --config, --cpu, --quantize and --batch-size")
    if args.key and not args.url:
        args.parser.error("--key is the key of a server: add --url")
    sources = [Source(name) for name in args.files]
    if sum(source.is_stdin for source in sources) > 1:
        args.parser.error("standard input (-) can be read once")
    outputs = plan_outputs(args, sources)
    if isinstance(sys.stdout, io.TextIOWrapper):  # accents whatever the locale says; file names as they came
        sys.stdout.reconfigure(encoding="utf-8", errors="surrogateescape")
    return asyncio.run(_run_all(args, sources, outputs))


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number}: expected at least 1")
    return number


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 <= seconds <= 30:
        raise argparse.ArgumentTypeError(f"{text}: expected 0 to 30 seconds")
    return seconds


def plan_outputs(args: argparse.Namespace, sources: Sequence["Source"]) -> list[Path | None]:
    """Where each file's transcript goes; None is stdout. Ends with SystemExit(2) where two would go to one place."""
    if args.output is None:
        if len(sources) > 1 and args.format in ("srt", "vtt"):
            args.parser.error(f"several files as {args.format} do not fit on standard output: add --output FOLDER")
        return [None] * len(sources)
    target = Path(args.output)
    suffix = SUFFIXES[args.format]
    if len(sources) == 1 and not target.is_dir() and not args.output.endswith(("/", os.sep)):
        paths = [target]
    else:
        if target.exists() and not target.is_dir():
            args.parser.error(f"--output {target} is a file: {len(sources)} transcripts need a folder")
        stems = [source.stem for source in sources]
        paths = [
            target / f"{stem if stems.count(stem) == 1 else source.path.name}{suffix}"
            for source, stem in zip(sources, stems, strict=True)
        ]
        if len(set(paths)) < len(paths):
            args.parser.error("two files of the same name would be written to one: transcribe them one after the other")
    recordings = [source.path for source in sources if not source.is_stdin and source.path.exists()]
    for path in paths:
        if path.exists() and any(path.samefile(recording) for recording in recordings):
            args.parser.error(f"--output {path} would overwrite the recording")
    return list(paths)


# ---- one recording -------------------------------------------------------------------------------------------------------


@dataclass
class Source:
    """One recording named on the command line. `seconds` and `fault` are known when its audio has been iterated."""

    name: str
    seconds: float = 0.0
    fault: AudioError | None = None
    """What is wrong with it behind the audio that could be decoded."""
    stop: threading.Event = field(default_factory=threading.Event)

    @property
    def is_stdin(self) -> bool:
        return self.name == "-"

    @property
    def path(self) -> Path:
        return Path("stdin" if self.is_stdin else self.name)

    @property
    def stem(self) -> str:
        return self.path.stem or self.path.name

    def expected_seconds(self) -> float | None:
        """What the header says, None where it says nothing or cannot be read."""
        try:
            return None if self.is_stdin else probe(self.path).duration_seconds
        except (AudioError, OSError):
            return None

    def audio(self) -> Iterator[NDArray[np.float32]]:
        """float32 (S,) arrays. Raises AudioError or OSError where nothing can be decoded."""
        try:
            for pcm in decode_file(self._open() if self.is_stdin else self.path):
                self.seconds += len(pcm) / SAMPLE_RATE
                yield pcm
                if self.stop.is_set():
                    return
        except AudioError as error:
            if not self.seconds:
                raise
            self.fault = error

    def _open(self) -> IO[bytes]:
        if sys.stdin.isatty():
            raise AudioError("standard input is a terminal: pipe a recording into it")
        if os.name != "posix":
            return sys.stdin.buffer
        return cast("IO[bytes]", _InterruptibleFile(sys.stdin.fileno(), self.stop))


class _InterruptibleFile(io.RawIOBase):
    """Standard input that stops waiting when told to: a thread that blocks in `read` could not be ended by Ctrl-C."""

    def __init__(self, descriptor: int, stop: threading.Event) -> None:
        self._descriptor = descriptor
        self._stop = stop

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        while not self._stop.is_set():
            if select.select([self._descriptor], [], [], 0.1)[0]:
                return os.read(self._descriptor, size if size > 0 else 1 << 16)
        return b""


# ---- who transcribes -----------------------------------------------------------------------------------------------------


class Transcriber(ABC):
    """Turns recordings into words. Use as an async context manager."""

    jobs: int
    """Recordings at once that make sense, unless the command line says otherwise."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        return None

    @abstractmethod
    async def words(self, source: Source, on_progress: Callable[[float], None]) -> list[TimedWord]:
        """Every word. on_progress: seconds done since the last call. Raises MoshiSttError or OSError."""


class OnServer(Transcriber):
    def __init__(self, url: str, key: str, prefix_seconds: float) -> None:
        self.jobs = 1
        self._url, self._key, self._prefix_seconds = url, key, prefix_seconds

    async def words(self, source: Source, on_progress: Callable[[float], None]) -> list[TimedWord]:
        from moshi_stt.client import Client

        told = 0.0

        def progress(seconds: float) -> None:
            nonlocal told
            on_progress(max(0.0, seconds - told))
            told = max(told, seconds)

        async with Client(self._url, self._key) as client:
            return await client.transcribe(source.audio(), silence_before_seconds=self._prefix_seconds, on_progress=progress)


class InProcess(Transcriber):
    def __init__(self, module: Module, prefix_seconds: float | None, *, limits: Any, force_cpu: bool) -> None:
        from moshi_stt.engines import build_engine

        self._module = module
        self._engine = build_engine(module, limits, force_cpu=force_cpu)
        embedded = isinstance(module, EmbeddedModule)
        self.jobs = min(usable_cores(), 8) if embedded else 1
        self._prefix_seconds = prefix_seconds

    async def __aenter__(self) -> Self:
        await self._engine.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._engine.stop()

    async def words(self, source: Source, on_progress: Callable[[float], None]) -> list[TimedWord]:
        from moshi_stt.engine.recording import RecordingOptions, transcribe_recording

        options = RecordingOptions(prefix_seconds=self._prefix_seconds)
        return await transcribe_recording(self._engine, source.audio(), options, on_progress=on_progress)


def build_transcriber(args: argparse.Namespace) -> Transcriber:
    """From --url, --config and their like. Raises ConfigError. Also used by `mic`."""
    if args.url:
        key = args.key or os.environ.get(KEY_VARIABLE) or PUBLIC_KEY
        return OnServer(args.url, key, args.prefix_seconds or 0.0)
    module, limits = load_module(args.config, args.batch_size, args.quantize)
    return InProcess(module, args.prefix_seconds, limits=limits, force_cpu=args.cpu)


def load_module(
    config_name: str | None, batch_size: int | None = None, quantize: Literal["none", "int8", "int4"] | None = None
) -> tuple[Module, Any]:
    """The first speech-to-text module of a configuration, and the limits. Raises ConfigError."""
    import msgspec

    from moshi_stt.config_load import embedded_config, load_config
    from moshi_stt.errors import ConfigError

    config = load_config(config_name).config if config_name else embedded_config()
    if not config.modules:
        raise ConfigError(f"{config_name}: there is no [modules.NAME] table, so there is no model. Add a module.")
    module = config.modules[0]
    if batch_size is not None:
        module = msgspec.structs.replace(module, batch_size=batch_size)
    return module if quantize is None else with_quantize(module, quantize), config.limits


# ---- all of them ---------------------------------------------------------------------------------------------------------


async def _run_all(args: argparse.Namespace, sources: Sequence[Source], outputs: Sequence[Path | None]) -> int:
    failed = 0
    waiting = deque(zip(sources, outputs, strict=True))
    running: deque[tuple[Source, Path | None, asyncio.Task[list[TimedWord]]]] = deque()
    async with AsyncExitStack() as stack:
        if not args.url and sys.stderr.isatty() and not args.quiet:
            print("loading the model …", file=sys.stderr)
        transcriber = await stack.enter_async_context(build_transcriber(args))
        bar = _progress_bar(args, sources)
        stack.callback(bar.close)
        try:
            while waiting or running:
                while waiting and len(running) < (args.jobs or transcriber.jobs):
                    source, output = waiting.popleft()
                    task = asyncio.create_task(transcriber.words(source, bar.update))
                    running.append((source, output, task))
                source, output, task = running[0]
                await asyncio.wait([task])
                running.popleft()
                with bar.external_write_mode():
                    failed += not _report(args, source, output, task, several=len(sources) > 1)
        finally:
            for source, _, task in running:
                source.stop.set()
                task.cancel()
            await asyncio.gather(*(task for _, _, task in running), return_exceptions=True)
    return _FAILED if failed else _DONE


def _report(
    args: argparse.Namespace, source: Source, output: Path | None, task: "asyncio.Task[list[TimedWord]]", *, several: bool
) -> bool:
    """Write one transcript. Returns whether all went well."""
    try:
        words = task.result()
        _write(args.format, source, output, words, several=several)
    except BrokenPipeError:  # nobody reads our output any more: the command as a whole ends
        raise
    except (MoshiSttError, OSError) as error:
        print(f"Error: {source.name}: {_plain(error, source.name)}", file=sys.stderr)
        return False
    if source.fault is not None:
        print(f"Error: {source.name}: {source.fault}", file=sys.stderr)
    return source.fault is None


def _write(format: str, source: Source, output: Path | None, words: list[TimedWord], *, several: bool) -> None:
    if format == "json":
        document = format_json(words, file=source.name, duration=round(source.seconds, 3))
    else:
        document = FORMATS[format](words)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(document, encoding="utf-8", newline="\n")
        return
    if several and format != "json":
        print(f"==> {source.name} <==")
    sys.stdout.write(document)
    sys.stdout.flush()


def _plain(error: Exception, name: str) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror if error.filename in (None, name) else f"{error.filename}: {error.strerror}"
    return str(error) or type(error).__name__


def _progress_bar(args: argparse.Namespace, sources: Sequence[Source]) -> "tqdm[Any]":
    """On a terminal, of seconds of audio. Without a total where one recording does not say how long it is."""
    from tqdm import tqdm

    tqdm.monitor_interval = 0  # no thread of its own
    shown = sys.stderr.isatty() and not args.quiet
    lengths = [source.expected_seconds() for source in sources] if shown else []
    total = None if None in lengths else sum(length for length in lengths if length is not None)
    bar_format = "{percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f} s of audio [{elapsed}<{remaining}]" if total else None
    return tqdm(total=total or None, unit=" s of audio", file=sys.stderr, disable=not shown, bar_format=bar_format, leave=False)
