"""Who turns a recording into words: a model in this process, or a server."""

import asyncio
import contextlib
import functools
import io
import logging
import os
import select
import shutil
import sys
import tempfile
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal, Self, cast

import numpy as np
from numpy.typing import NDArray

from moshi_stt.audio.decode import AudioInfo, decode_file, probe
from moshi_stt.audio.level import LevelMeter
from moshi_stt.audio.selection import Selection
from moshi_stt.config import EmbeddedModule, LimitsConfig, Module, with_quantize
from moshi_stt.constants import SAMPLE_RATE
from moshi_stt.cores import usable_cores
from moshi_stt.engine.engine import SilentObserver
from moshi_stt.engine.language import foreign_message
from moshi_stt.errors import AudioError, ConfigError
from moshi_stt.events import Warning  # noqa: A004 - the event
from moshi_stt.text.subtitles import TimedWord

WAITING_FILES = 32
"""Files that are being decoded or wait for a slot, beyond those that have one."""

FILES_SWITCH_SECONDS = 0.0001
"""The device waits while the model thread waits for the interpreter, and here nobody waits for the event loop."""

MOST_JOBS = 8
"""Of models that take a recording as one stream."""

Progress = Callable[[float], None]


# ---- one recording -------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Source:
    """One recording. What is said of it below the line is known when its audio has been iterated."""

    name: str
    selection: Selection = field(default_factory=Selection)
    stop: threading.Event = field(default_factory=threading.Event)
    copy: Path | None = None
    """Where its bytes lie, if not under its name."""
    # ----
    seconds: float = 0.0
    fault: AudioError | None = None
    """What is wrong with it after the audio that could be decoded."""
    remarks: list[str] = field(default_factory=list)
    silence: str = ""
    """Why there can be no words in it, where its level says so."""

    @property
    def is_stdin(self) -> bool:
        return self.name == "-"

    @property
    def path(self) -> Path:
        return self.copy or Path("stdin" if self.is_stdin else self.name)

    @property
    def stem(self) -> str:
        return self.path.stem or self.path.name

    def probe(self) -> AudioInfo:
        """What its header says. Raises AudioError or OSError."""
        if self.is_stdin:
            raise AudioError("a pipe cannot be looked at twice")
        return probe(self.path, self.selection.track)

    def audio(self) -> Iterator[NDArray[np.float32]]:
        """float32 (S,) arrays. Raises AudioError or OSError where nothing can be decoded."""
        meter = LevelMeter()
        try:
            for pcm in decode_file(self._open() if self.is_stdin else self.path, self.selection, self.remarks):
                meter.hear(pcm)
                self.seconds = meter.samples / SAMPLE_RATE
                yield pcm
                if self.stop.is_set():
                    return
        except AudioError as error:
            if not self.seconds:
                raise
            self.fault = error
        self.silence = meter.reason()

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

    other_language: str = ""
    """What to tell the user where speech does not sound like a language of the model."""
    jobs: int = 1
    """Recordings at once that make sense, unless the command line says otherwise."""

    @property
    def is_broken(self) -> bool:
        """Whether it fails at everything from now on."""
        return False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        return None

    @abstractmethod
    async def one(self, source: Source, on_progress: Progress) -> list[TimedWord]:
        """Every word of one channel. on_progress: seconds done since the last call. Raises MoshiSttError or OSError."""

    async def words(self, source: Source, on_progress: Progress) -> list[TimedWord]:
        """Every word; where channels are to be kept apart, each one's as if it were alone, labelled, in order of time."""
        if source.selection.channels != "split":
            return await self.one(source, on_progress)
        async with AsyncExitStack() as stack:
            if source.is_stdin:
                stack.enter_context(_spooled(source))
            channels = (await asyncio.to_thread(source.probe)).channels
            if channels == 1:
                source.selection = replace(source.selection, channels=1)
                return await self.one(source, on_progress)
            sources = [
                Source(source.name, replace(source.selection, channels=number), source.stop, source.copy)
                for number in range(1, channels + 1)
            ]
            report = functools.partial(_share, on_progress, channels)
            tasks = [asyncio.create_task(self.one(each, report)) for each in sources]
            try:
                heard = await asyncio.gather(*tasks)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
            first = sources[0]
            source.seconds, source.fault, source.remarks = first.seconds, first.fault, first.remarks
            source.silence = first.silence if all(each.silence for each in sources) else ""
        labelled = [word._replace(channel=number) for number, words in enumerate(heard, 1) for word in words]
        return sorted(labelled, key=lambda word: word.start)


def _share(on_progress: Progress, parts: int, seconds: float) -> None:
    on_progress(seconds / parts)


@contextlib.contextmanager
def _spooled(source: Source) -> Iterator[None]:
    """Standard input as a file for a while: it is read once for each channel."""
    with tempfile.NamedTemporaryFile() as file:
        shutil.copyfileobj(source._open(), file)
        file.flush()
        name, source.name = source.name, file.name
        try:
            yield
        finally:
            source.name = name


class OnServer(Transcriber):
    """A server's model."""

    def __init__(self, url: str, key: str | None, prefix_seconds: float) -> None:
        self._url, self._key, self._prefix_seconds = url, key, prefix_seconds

    async def one(self, source: Source, on_progress: Progress) -> list[TimedWord]:
        from moshi_stt.client import Client

        told = 0.0

        def progress(seconds: float) -> None:
            nonlocal told
            on_progress(max(0.0, seconds - told))
            told = max(told, seconds)

        def warned(warning: Warning) -> None:
            if warning.code == "language":
                self.other_language = warning.message

        async with Client(self._url, self._key, on_warning=warned) as client:
            return await client.transcribe(source.audio(), silence_before_seconds=self._prefix_seconds, on_progress=progress)


class _LanguageObserver(SilentObserver):
    """Notes that speech is in another language, which the user is told once and not by the log."""

    def __init__(self, transcriber: "InProcess") -> None:
        self._transcriber = transcriber

    def foreign(self) -> None:
        command = "moshi-stt transcribe --config stt-1b-en_fr FILE"
        self._transcriber.other_language = foreign_message(self._transcriber.languages, command)


def _is_not_of_language(record: logging.LogRecord) -> bool:
    return not getattr(record, "foreign", False)


class InProcess(Transcriber):
    """A model in this process; with many slots, decoding is done by other processes."""

    def __init__(self, module: Module, prefix_seconds: float | None, *, limits: LimitsConfig, force_cpu: bool) -> None:
        from moshi_stt.engine.recording import RecordingOptions
        from moshi_stt.engines import build_engine

        self._engine = build_engine(module, limits, _LanguageObserver(self), force_cpu=force_cpu)
        logging.getLogger("moshi_stt.engine.segment").addFilter(_is_not_of_language)
        self._options = RecordingOptions(prefix_seconds=prefix_seconds)
        self._stack = AsyncExitStack()
        self._pool: Any = None

    async def __aenter__(self) -> Self:
        await self._engine.start()
        self._stack.push_async_callback(self._engine.stop)
        from moshi_stt.audio.decode_pool import POOL_SLOTS

        try:
            slots = self._engine.total_slots
            if self._engine.cuts_speech:
                self.jobs = min(usable_cores(), MOST_JOBS, slots)
            elif slots < POOL_SLOTS:
                self.jobs = slots
            else:
                self.jobs = slots + WAITING_FILES
                await self._start_pool(slots)
        except BaseException:
            await self._stack.aclose()
            raise
        return self

    @property
    def is_broken(self) -> bool:
        return self._engine.failure is not None

    @property
    def languages(self) -> tuple[str, ...]:
        return self._engine.info.languages

    async def _start_pool(self, slots: int) -> None:
        from moshi_stt.audio.decode_pool import DecodePool, decoders_for
        from moshi_stt.server.runtime import tune_interpreter

        tune_interpreter(FILES_SWITCH_SECONDS)  # a model thread and an event loop of a thousand streams, as in the server
        if decoders := decoders_for(slots):
            self._pool = await self._stack.enter_async_context(DecodePool(decoders, slots, self._options.cut))

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    async def one(self, source: Source, on_progress: Progress) -> list[TimedWord]:
        from moshi_stt.audio.decode_pool import Decoded
        from moshi_stt.engine.recording import transcribe_recording

        if self._pool is None or source.is_stdin:
            return await transcribe_recording(self._engine, source.audio(), self._options, on_progress=on_progress)
        decoded = Decoded()
        pieces = self._pool.pieces(os.fspath(source.path), source.selection, decoded)
        words = await transcribe_recording(self._engine, pieces, self._options, on_progress=on_progress)
        source.seconds, source.remarks, source.silence = decoded.seconds, decoded.remarks, decoded.silence
        if isinstance(decoded.fault, OSError) or (decoded.fault is not None and not decoded.seconds):
            raise decoded.fault
        source.fault = decoded.fault
        return words


def build_transcriber(args: Any) -> Transcriber:
    """From --url, --config and their like. Raises ConfigError."""
    if args.url:
        return OnServer(args.url, args.key or None, args.prefix_seconds or 0.0)
    module, limits = load_module(args.config, args.batch_size, args.quantize)
    return InProcess(module, args.prefix_seconds, limits=limits, force_cpu=args.cpu)


def load_module(
    config_name: str | None, batch_size: int | None = None, quantize: Literal["none", "int8", "int4"] | None = None
) -> tuple[Module, LimitsConfig]:
    """The first speech-to-text module of a configuration, and the limits. Raises ConfigError."""
    import msgspec

    from moshi_stt.config_load import embedded_config, load_config

    config = load_config(config_name).config if config_name else embedded_config()
    if not config.modules:
        raise ConfigError(f"{config_name}: there is no [modules.NAME] table, so there is no model. Add a module.")
    module = config.modules[0]
    if batch_size is None and isinstance(module, EmbeddedModule) and module.batch_size == "auto":
        batch_size = MOST_JOBS  # nobody waits for files in real time
    if batch_size is not None:
        module = msgspec.structs.replace(module, batch_size=batch_size)
    return module if quantize is None else with_quantize(module, quantize), config.limits
