"""`moshi-stt transcribe`: audio files to text, in this process or on a server.

stdout carries transcripts and nothing else; progress and complaints go to stderr.
"""

import argparse
import asyncio
import io
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from moshi_stt.audio.selection import Channels, Selection, read_channels
from moshi_stt.cli.archive import Item, Manifest, Status, as_text, plan, read_list, recordings_of, write_whole
from moshi_stt.cli.transcribers import Source, Transcriber, build_transcriber
from moshi_stt.constants import KEY_VARIABLE, PUBLIC_KEY
from moshi_stt.errors import AudioError, MoshiSttError
from moshi_stt.server.runtime import run as run_loop
from moshi_stt.text.subtitles import FORMATS, SUFFIXES, TimedWord, format_json

if TYPE_CHECKING:
    from tqdm import tqdm

_FAILED, _DONE = 1, 0


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "transcribe",
        help="write down what is said in audio files",
        description="Write down what is said in audio or video files of any common format. "
        "Without --config and --url: with the English model that comes with the package.",
        epilog="Exit status: 0 all files done, 1 some failed or were damaged, 2 wrong usage, 130 interrupted.",
    )
    parser.add_argument("files", nargs="*", metavar="FILE", help="audio file; - is standard input; with -r also a folder")
    parser.add_argument("-r", "--recursive", action="store_true", help="every recording below the folders, into --output")
    parser.add_argument(
        "-f", "--format", type=_formats, default=("text",), metavar="FORMAT", help=f"{', '.join(FORMATS)}; several with commas"
    )
    parser.add_argument(
        "-o", "--output", metavar="PATH", help="file to write; for several FILEs, or with a / at its end, a folder"
    )
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument("--skip-existing", action="store_true", help="leave out what has a result already")
    existing.add_argument(
        "--overwrite", action="store_true", help="write results again that are there; with -r: do everything again"
    )
    parser.add_argument("--manifest", metavar="FILE", help="read FILEs from a list, or from an earlier run's manifest.jsonl")
    parser.add_argument(
        "--channels", type=_channels, default="mix", metavar="mix|split|N", help="mix them, keep each apart, or take one"
    )
    parser.add_argument("--track", type=_positive, metavar="N", help="audio track of a file that has several")
    parser.add_argument("--jobs", type=_positive, metavar="N", help="files at once (as many as keep the model busy)")
    parser.add_argument("--quiet", action="store_true", help="no progress bar and no summary")
    where = parser.add_argument_group("where", "In this process, or on a running server with --url.")
    where.add_argument("--url", metavar="URL", help="server, for instance ws://127.0.0.1:8080; moshi-server too")
    where.add_argument("--key", help=f"the server's key (default: ${KEY_VARIABLE}, else {PUBLIC_KEY})")
    where.add_argument(
        "--config", "--model", metavar="FILE", help="TOML file or name of a shipped one (see `moshi-stt configs`)"
    )
    where.add_argument("--cpu", action="store_true", help="run the model on the CPU, whatever else is there")
    where.add_argument("--quantize", choices=["none", "int8", "int4"], help="quantized weights (the configuration's)")
    where.add_argument("--batch-size", type=_positive, metavar="N", help="pieces of a recording at once (the configuration's)")
    where.add_argument(
        "--prefix-seconds", type=_seconds, metavar="S", help="silence before each recording (what the model needs)"
    )
    parser.set_defaults(parser=parser)
    return parser


def run(args: argparse.Namespace) -> int:
    """Transcribe every file. Returns the exit status. Raises ConfigError, CheckpointError, EngineError or ServerError where no
    file can be done; SystemExit(2) on wrong usage."""
    check_usage(args)
    if isinstance(sys.stdout, io.TextIOWrapper):  # accents whatever the locale says; file names as they came
        sys.stdout.reconfigure(encoding="utf-8", errors="surrogateescape")
    names = [*args.files, *(read_list(Path(args.manifest)) if args.manifest else [])]
    if args.recursive:
        return run_loop(_Archive(args, names).run())
    items = [Item(name, outputs) for name, outputs in zip(names, plan_outputs(args, names), strict=True)]
    return run_loop(_Files(args, items).run())


def check_usage(args: argparse.Namespace) -> None:
    """Ends with SystemExit(2) for what contradicts itself."""
    wrong = args.parser.error
    if not args.files and not args.manifest:
        wrong("the following arguments are required: FILE (or --manifest FILE)")
    if args.url and (args.config or args.cpu or args.quantize or args.batch_size):
        wrong("--url runs the model on the server: leave out --config, --cpu, --quantize and --batch-size")
    if args.key and not args.url:
        wrong("--key is the key of a server: add --url")
    if args.files.count("-") > 1:
        wrong("standard input (-) can be read once")
    if args.recursive and not args.output:
        wrong("-r writes into a folder: add --output FOLDER")
    if args.recursive and "-" in args.files:
        wrong("-r takes files and folders, not standard input")
    if args.recursive and Path(args.output).exists() and not Path(args.output).is_dir():
        wrong(f"--output {args.output} is a file: -r needs a folder")
    if len(args.format) > 1 and not args.output:
        wrong("several formats do not fit on standard output: add --output FOLDER")


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


def _channels(text: str) -> Channels:
    try:
        return read_channels(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: expected mix, split, or the number of a channel from 1") from None


def _formats(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(text.split(",")))
    for name in names:
        if name not in FORMATS:
            raise argparse.ArgumentTypeError(f"invalid choice: {name!r} (choose from {', '.join(FORMATS)})")
    return names


def plan_outputs(args: argparse.Namespace, names: Sequence[str]) -> list[dict[str, Path]]:
    """Where each file's transcripts go, by format; nothing for stdout. Ends with SystemExit(2) where two would be one."""
    if args.output is None:
        if len(names) > 1 and args.format[0] in ("srt", "vtt"):
            args.parser.error(f"several files as {args.format[0]} do not fit on standard output: add --output FOLDER")
        return [{} for _ in names]
    target = Path(args.output)
    sources = [Source(name) for name in names]
    outputs: list[dict[str, Path]]
    if len(names) == 1 and len(args.format) == 1 and not target.is_dir() and not args.output.endswith(("/", os.sep)):
        outputs = [{args.format[0]: target}]
    else:
        if target.exists() and not target.is_dir():
            args.parser.error(f"--output {target} is a file: {len(names) * len(args.format)} transcripts need a folder")
        stems = [source.stem for source in sources]
        own = [stem if stems.count(stem) == 1 else source.path.name for stem, source in zip(stems, sources, strict=True)]
        outputs = [{name: target / f"{stem}{SUFFIXES[name]}" for name in args.format} for stem in own]
    paths = [path for each in outputs for path in each.values()]
    if len(set(paths)) < len(paths):
        args.parser.error("two files of the same name would be written to one: use -r, or transcribe them one after the other")
    recordings = [source.path for source in sources if not source.is_stdin and source.path.exists()]
    for path in paths:
        if path.exists() and any(path.samefile(recording) for recording in recordings):
            args.parser.error(f"--output {path} would overwrite the recording")
    there = [path for path in paths if path.exists()]
    if there and target.is_dir() and not (args.overwrite or args.skip_existing):
        others = f" and {len(there) - 1} more" if len(there) > 1 else ""
        args.parser.error(
            f"{there[0]}{others} is there already, perhaps from another recording of that name: "
            "--overwrite writes it again, --skip-existing keeps it"
        )
    return outputs


# ---- the run -------------------------------------------------------------------------------------------------------------


class _Result(NamedTuple):
    """A recording that is through: its words, or what went wrong before there were any."""

    item: Item
    source: Source
    words: list[TimedWord] | None
    error: Exception | None


class _Files:
    """Recordings named one by one: transcripts in their order, on standard output or in files."""

    def __init__(self, args: argparse.Namespace, items: Sequence[Item]) -> None:
        self.args = args
        self.items = items
        self.failed = 0
        self._running: set[Source] = set()
        self._waiting: dict[int, _Result] = {}
        """Results whose turn on standard output has not come, by their place."""
        self._turn = 0

    async def run(self) -> int:
        args = self.args
        async with AsyncExitStack() as stack:
            if not args.url and sys.stderr.isatty() and not args.quiet:
                print("loading the model …", file=sys.stderr)
            transcriber = await stack.enter_async_context(build_transcriber(args))
            bar = self.progress_bar()
            stack.callback(bar.close)
            queue = enumerate(self.pending())
            jobs = max(1, min(args.jobs or transcriber.jobs, len(self.items)))
            workers = [asyncio.create_task(self._work(queue, transcriber, bar)) for _ in range(jobs)]
            try:
                await asyncio.gather(*workers)
            finally:
                for source in self._running:
                    source.stop.set()
                for worker in workers:
                    worker.cancel()
                await asyncio.gather(*workers, return_exceptions=True)
        if transcriber.other_language:
            print(f"Warning: {transcriber.other_language}", file=sys.stderr)
        self.summarise()
        return _FAILED if self.failed else _DONE

    def pending(self) -> Iterator[Item]:
        """What is to be done."""
        for item in self.items:
            if not (self.args.skip_existing and item.outputs and item.is_written):
                yield item

    async def _work(self, queue: Iterator[tuple[int, Item]], transcriber: Transcriber, bar: "tqdm[Any]") -> None:
        for place, item in queue:
            source = Source(item.path, Selection(self.args.track, self.args.channels))
            self._running.add(source)
            words: list[TimedWord] | None = None
            error: Exception | None = None
            try:
                words = await transcriber.words(source, bar.update if self.counts_seconds else _ignore)
            except (MoshiSttError, OSError) as raised:
                error = raised
            self._running.discard(source)
            await self.take(place, _Result(item, source, words, error), bar)
            if not self.counts_seconds:
                bar.update(1)

    counts_seconds = True
    """Whether progress is seconds of audio, not files."""

    async def take(self, place: int, result: _Result, bar: "tqdm[Any]") -> None:
        """Write the results whose turn has come."""
        self._waiting[place] = result
        while (due := self._waiting.pop(self._turn, None)) is not None:
            self._turn += 1
            with bar.external_write_mode():
                self.failed += not self.report(due, due.error or self.try_to_write(due))

    def try_to_write(self, result: _Result) -> Exception | None:
        """Write one transcript; what went wrong."""
        try:
            self.write(result)
        except BrokenPipeError:  # nobody reads our output any more: the command as a whole ends
            raise
        except (MoshiSttError, OSError) as error:
            return error
        return None

    def report(self, result: _Result, error: Exception | None) -> bool:
        """Say what there is to say. Returns whether all went well."""
        if error is not None:
            self.complain(result, error)
            return False
        self.remark(result)
        if result.source.fault is not None:
            self.complain(result, result.source.fault)
        return result.source.fault is None

    def complain(self, result: _Result, error: Exception) -> None:
        print(f"Error: {as_text(result.item.path)}: {_plain(error, result.item.path)}", file=sys.stderr)

    def remark(self, result: _Result) -> None:
        """What is odd about a recording and no fault."""
        remarks = list(result.source.remarks)
        if not result.words:
            remarks.append(f"no words: {result.source.silence or 'nothing was heard that this model understands'}")
        for remark in remarks:
            print(f"Warning: {as_text(result.item.path)}: {remark}", file=sys.stderr)

    def write(self, result: _Result) -> None:
        words = result.words or []
        for name, path in result.item.outputs.items():
            write_whole(path, document(name, result.source, words))
        if not result.item.outputs:
            name = self.args.format[0]
            if len(self.items) > 1 and name != "json":
                print(f"==> {result.item.path} <==")
            sys.stdout.write(document(name, result.source, words))
            sys.stdout.flush()

    def summarise(self) -> None:
        """After the last one."""

    def progress_bar(self) -> "tqdm[Any]":
        """On a terminal, of seconds of audio. Without a total where one recording does not say how long it is."""
        shown = sys.stderr.isatty() and not self.args.quiet
        lengths = [_expected_seconds(item) for item in self.items] if shown else []
        total = None if None in lengths else sum(length for length in lengths if length is not None)
        bar_format = "{percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f} s of audio [{elapsed}<{remaining}]" if total else None
        return _bar(total or None, " s of audio", shown, bar_format)


class _Archive(_Files):
    """Every recording of folders, each into its place below the output folder, with a manifest."""

    counts_seconds = False

    def __init__(self, args: argparse.Namespace, names: Sequence[str]) -> None:
        out = Path(args.output)
        self._manifest = Manifest(out)
        paths, self._others = recordings_of(names, out)
        listed = [Path(name).parent for name in read_list(Path(args.manifest))] if args.manifest else []
        folders = [Path(name) for name in args.files if Path(name).is_dir()]
        roots = folders or ([Path(os.path.commonpath([each.absolute() for each in listed]))] if listed else [])
        super().__init__(args, plan(paths, roots, out, args.format, self._manifest, args.skip_existing or args.overwrite))
        self._kept = 0
        self._done = 0
        self._seconds = 0.0

    def pending(self) -> Iterator[Item]:
        for item in self.items:
            settled = item.is_written if self.args.skip_existing else self._manifest.is_settled(item)
            if self.args.overwrite or not settled:
                yield item
                continue
            self._kept += 1
            if item.path not in self._manifest.lines:  # written, and then the program was killed
                self._manifest.add(item, "done", 0.0, "written by an earlier run")
            if damage := self._manifest.was_damaged(item):
                self.failed += 1
                print(f"Error: {as_text(item.path)}: {damage} (in an earlier run)", file=sys.stderr)

    async def take(self, place: int, result: _Result, bar: "tqdm[Any]") -> None:
        """Write a result at once, whatever its place, in a thread: the disk may be slow."""
        error = result.error or await asyncio.to_thread(self.try_to_write, result)
        with bar.external_write_mode():
            went_well = self.report(result, error)
        source, fault = result.source, error or result.source.fault
        status: Status = "done" if fault is None else "damaged" if error is None else "failed"
        with suppress(OSError):  # it may be the disk that is full; the recording is then done again
            self._manifest.add(result.item, status, source.seconds, "" if fault is None else _plain(fault, source.name))
        self.failed += not went_well
        self._done += went_well
        self._seconds += source.seconds

    def summarise(self) -> None:
        if self.args.quiet:
            return
        parts = [f"{self._done} of {len(self.items)} recordings done, {self._seconds / 3_600:.2f} h of audio"]
        if self._kept:
            parts.append(f"{self._kept} there already")
        if self.failed:
            parts.append(f"{self.failed} failed or damaged (see above, and manifest.jsonl)")
        if self._others:
            parts.append(f"{self._others} other files left out")
        print("; ".join(parts), file=sys.stderr)

    def progress_bar(self) -> "tqdm[Any]":
        return _bar(len(self.items), " files", sys.stderr.isatty() and not self.args.quiet, None)


def document(name: str, source: Source, words: list[TimedWord]) -> str:
    """A transcript in a format."""
    if name == "json":
        return format_json(words, file=source.name, duration=round(source.seconds, 3))
    return FORMATS[name](words)


def _ignore(seconds: float) -> None: ...


def _expected_seconds(item: Item) -> float | None:
    """What the header says, None where it says nothing or cannot be read."""
    try:
        return Source(item.path).probe().duration_seconds
    except (AudioError, OSError):
        return None


def _plain(error: Exception, name: str) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror if error.filename in (None, name) else f"{as_text(error.filename)}: {error.strerror}"
    return str(error) or type(error).__name__


def _bar(total: float | None, unit: str, shown: bool, bar_format: str | None) -> "tqdm[Any]":
    from tqdm import tqdm

    tqdm.monitor_interval = 0  # no thread of its own
    return tqdm(total=total, unit=unit, file=sys.stderr, disable=not shown, bar_format=bar_format, leave=False)
