"""`moshi-stt transcribe`: audio files to text, in this process or on a server.

stdout carries transcripts and nothing else; progress and complaints go to stderr.
"""

import argparse
import asyncio
import io
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AsyncExitStack, ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from moshi_stt.audio.selection import Channels, Selection, read_channels
from moshi_stt.cli.archive import Item, Manifest, Status, as_text, plan, read_list, recordings_of, write_whole
from moshi_stt.cli.formats import FORMATS, SUFFIXES, document, has_parquet
from moshi_stt.cli.places import common_folder, faults_of, is_url, local_copy, place
from moshi_stt.cli.transcribers import Source, Transcriber, build_transcriber
from moshi_stt.constants import KEY_VARIABLE, PUBLIC_KEY
from moshi_stt.errors import AudioError, MoshiSttError
from moshi_stt.server.runtime import run as run_loop
from moshi_stt.text.subtitles import TimedWord

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
    ray = parser.add_argument_group("Ray", "Whole archives on several GPUs or hosts, by Ray Data (docs/scale.md).")
    ray.add_argument("--ray", action="store_true", help="with -r or --manifest: an engine in each of several actors")
    ray.add_argument("--ray-address", metavar="ADDRESS", help="a Ray that runs (without: one on this host, for this run)")
    ray.add_argument("--ray-actors", type=_positive, metavar="N", help="actors (as many as there are GPUs, or cores for)")
    ray.add_argument("--cpus-per-actor", type=_share, metavar="N", help="cores for each (2; 1 where it has a GPU)")
    ray.add_argument("--gpus-per-actor", type=_share, metavar="N", help="GPUs for each (none)")
    parser.set_defaults(parser=parser)
    return parser


def run(args: argparse.Namespace) -> int:
    """Transcribe every file. Returns the exit status. Raises ConfigError, CheckpointError, EngineError or ServerError where no
    file can be done; SystemExit(2) on wrong usage."""
    check_usage(args)
    if isinstance(sys.stdout, io.TextIOWrapper):  # accents whatever the locale says; file names as they came
        sys.stdout.reconfigure(encoding="utf-8", errors="surrogateescape")
    names = [*args.files, *(read_list(place(args.manifest)) if args.manifest else [])]
    if args.ray:
        from moshi_stt.cli.archive_ray import run_on_ray

        return run_on_ray(args, names)
    if args.recursive:
        return run_loop(Archive(args, names).run())
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
    _check_ray(args)
    if args.recursive and not args.output:
        wrong("-r writes into a folder: add --output FOLDER")
    if args.recursive and "-" in args.files:
        wrong("-r takes files and folders, not standard input")
    if not args.recursive and any(is_url(name) for name in [*args.files, args.output or ""]):
        wrong("URLs are taken with -r alone")
    if args.recursive and not is_url(args.output) and Path(args.output).exists() and not Path(args.output).is_dir():
        wrong(f"--output {args.output} is a file: -r needs a folder")
    if "parquet" in args.format:
        if not args.output:
            wrong("parquet is not for standard output: add --output FOLDER")
        if not has_parquet():
            wrong("parquet needs pyarrow, which is not installed: scripts/install.sh --with ray")
    if len(args.format) > 1 and not args.output:
        wrong("several formats do not fit on standard output: add --output FOLDER")


def _check_ray(args: argparse.Namespace) -> None:
    """What goes with --ray, and what it implies."""
    wrong = args.parser.error
    others = {
        "--ray-address": args.ray_address,
        "--ray-actors": args.ray_actors,
        "--cpus-per-actor": args.cpus_per_actor,
        "--gpus-per-actor": args.gpus_per_actor,
    }
    if not args.ray:
        if given := [name for name, value in others.items() if value is not None]:
            wrong(f"{given[0]} is for archives on Ray: add --ray")
        return
    if args.url:
        wrong("--ray runs models in its own actors: leave out --url")
    if args.jobs:
        wrong("--jobs is for one process: with --ray, say how many --ray-actors")
    if not args.output:
        wrong("--ray writes into a folder: add --output FOLDER")
    args.recursive = True


def _share(text: str) -> float:
    number = float(text)
    if not 0 < number <= 1_024:
        raise argparse.ArgumentTypeError(f"{text}: expected more than 0; less than 1 shares a core or a GPU")
    return number


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


class Outcome(NamedTuple):
    """How a recording went. error: why it has no result. damage: what is wrong with it after what could be decoded.

    seconds: of audio. remarks: what is odd about it and no fault.
    """

    seconds: float
    error: str = ""
    damage: str = ""
    remarks: tuple[str, ...] = ()

    @property
    def status(self) -> Status:
        return "failed" if self.error else "damaged" if self.damage else "done"


async def hear(transcriber: Transcriber, item: Item, source: Source, on_progress: Callable[[float], None]) -> _Result:
    """A recording's words. What goes wrong is in the result."""
    words: list[TimedWord] | None = None
    error: Exception | None = None
    try:
        if is_url(item.path):
            with ExitStack() as stack:
                source.copy = await asyncio.to_thread(stack.enter_context, local_copy(item.path))
                words = await transcriber.words(source, on_progress)
        else:
            words = await transcriber.words(source, on_progress)
    except (MoshiSttError, OSError) as raised:
        error = raised
    return _Result(item, source, words, error)


def try_to_write(result: _Result) -> Exception | None:
    """Write one transcript to its files; what went wrong."""
    try:
        for name, path in result.item.outputs.items():
            write_whole(path, document(name, result.source.name, result.source.seconds, result.words or []))
    except (MoshiSttError, OSError) as error:
        return error
    return None


def outcome_of(result: _Result, error: Exception | None) -> Outcome:
    """error: what went wrong up to its end."""
    source, path = result.source, result.item.path
    if error is not None:
        return Outcome(source.seconds, _plain(error, path))
    remarks = list(source.remarks)
    if not result.words:
        remarks.append(f"no words: {source.silence or 'nothing was heard that this model understands'}")
    return Outcome(source.seconds, "", "" if source.fault is None else _plain(source.fault, path), tuple(remarks))


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
        for number, item in queue:
            source = Source(item.path, Selection(self.args.track, self.args.channels))
            self._running.add(source)
            result = await hear(transcriber, item, source, bar.update if self.counts_seconds else _ignore)
            self._running.discard(source)
            await self.take(number, result, bar)
            if not self.counts_seconds:
                bar.update(1)

    counts_seconds = True
    """Whether progress is seconds of audio, not files."""

    async def take(self, number: int, result: _Result, bar: "tqdm[Any]") -> None:
        """Write the results whose turn has come."""
        self._waiting[number] = result
        while (due := self._waiting.pop(self._turn, None)) is not None:
            self._turn += 1
            with bar.external_write_mode():
                self.failed += not self.report(due.item, outcome_of(due, due.error or self.try_to_write(due)))

    def try_to_write(self, result: _Result) -> Exception | None:
        """Write one transcript; what went wrong."""
        if result.item.outputs:
            return try_to_write(result)
        try:
            self.print(result)
        except BrokenPipeError:  # nobody reads our output any more: the command as a whole ends
            raise
        except (MoshiSttError, OSError) as error:
            return error
        return None

    def report(self, item: Item, outcome: Outcome) -> bool:
        """Say what there is to say. Returns whether all went well."""
        name = as_text(item.path)
        for remark in outcome.remarks:
            print(f"Warning: {name}: {remark}", file=sys.stderr)
        for fault in (outcome.error, outcome.damage):
            if fault:
                print(f"Error: {name}: {fault}", file=sys.stderr)
        return outcome.status == "done"

    def print(self, result: _Result) -> None:
        name = self.args.format[0]
        if len(self.items) > 1 and name != "json":
            print(f"==> {result.item.path} <==")
        sys.stdout.write(str(document(name, result.source.name, result.source.seconds, result.words or [])))
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


class Archive(_Files):
    """Every recording of folders, each into its place below the output folder, with a manifest."""

    counts_seconds = False

    def __init__(self, args: argparse.Namespace, names: Sequence[str]) -> None:
        out = place(args.output)
        self._manifest = Manifest(out)
        paths, self._others = recordings_of(names, out)
        roots = [name for name in args.files if _is_folder(name)]
        listed = read_list(place(args.manifest)) if args.manifest and not roots else []
        if listed and (folder := common_folder(listed)) is not None:
            roots = [folder]
        super().__init__(args, plan(paths, roots, out, args.format, self._manifest, args.skip_existing or args.overwrite))
        self._kept = 0
        self._done = 0
        self._seconds = 0.0
        self._wall = 0.0
        """Seconds that the run took, where it is worth telling."""

    def pending(self) -> Iterator[Item]:
        self._manifest.begin()
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

    async def take(self, number: int, result: _Result, bar: "tqdm[Any]") -> None:
        """Write a result at once, whatever its place, in a thread: the disk may be slow."""
        error = result.error or await asyncio.to_thread(self.try_to_write, result)
        self.settle(result.item, outcome_of(result, error), bar)

    def settle(self, item: Item, outcome: Outcome, bar: "tqdm[Any]") -> None:
        """Say how it went, count it, and note it in the manifest."""
        with bar.external_write_mode():
            went_well = self.report(item, outcome)
        with suppress(OSError):  # it may be the disk that is full; the recording is then done again
            self._manifest.add(item, outcome.status, outcome.seconds, outcome.error or outcome.damage)
        self.failed += not went_well
        self._done += went_well
        self._seconds += outcome.seconds

    def summarise(self) -> None:
        self._manifest.flush()
        if self.args.quiet:
            return
        parts = [f"{self._done} of {len(self.items)} recordings done, {self._seconds / 3_600:.2f} h of audio"]
        if self._wall:
            parts.append(f"{self._seconds / self._wall:.0f} h of audio an hour")
        if self._kept:
            parts.append(f"{self._kept} there already")
        if self.failed:
            parts.append(f"{self.failed} failed or damaged (see above, and manifest.jsonl)")
        if self._others:
            parts.append(f"{self._others} other files left out")
        print("; ".join(parts), file=sys.stderr)

    def progress_bar(self) -> "tqdm[Any]":
        return _bar(len(self.items), " files", sys.stderr.isatty() and not self.args.quiet, None)


def _is_folder(name: str) -> bool:
    with faults_of(name):
        return place(name).is_dir()


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
