"""Whole archives: which recordings there are, where each result goes, and what has been done before.

A result appears whole or not at all, no two recordings share one, and a run that was interrupted is taken up by starting it
again: `manifest.jsonl` in the output folder has a line for each recording that is settled.
"""

import json
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any, Literal

from moshi_stt.audio.decode import probe
from moshi_stt.cli.formats import SUFFIXES
from moshi_stt.cli.places import below, faults_of, is_url, join, place, walk_url, write_url
from moshi_stt.errors import AudioError, ConfigError

MANIFEST = "manifest.jsonl"

REWRITE_SECONDS, REWRITE_SHARE = 10.0, 0.05
"""A manifest in a store that cannot append is written again so often at most, and takes such a share of the time at most."""

SOUND_SUFFIXES = frozenset(
    f".{name}"
    for name in (
        *(
            "3gp",
            "aac",
            "ac3",
            "aif",
            "aifc",
            "aiff",
            "amr",
            "ape",
            "au",
            "avi",
            "caf",
            "dts",
            "flac",
            "flv",
            "m4a",
            "m4b",
            "m4v",
        ),
        *(
            "mka",
            "mkv",
            "mov",
            "mp2",
            "mp3",
            "mp4",
            "mpc",
            "mpeg",
            "mpg",
            "oga",
            "ogg",
            "ogv",
            "opus",
            "qt",
            "ra",
            "spx",
            "tak",
        ),
        *("ts", "tta", "voc", "w64", "wav", "weba", "webm", "wma", "wmv", "wv"),
    )
)
"""A file of such a name that cannot be read has failed; one of another name is none of ours."""

Status = Literal["done", "damaged", "failed"]


@dataclass
class Item:
    """A recording, and where its results go. outputs: by format. stored: what a store had at first; None for a folder."""

    path: str
    outputs: dict[str, Path] = field(default_factory=dict)
    stored: frozenset[str] | None = None

    @property
    def size(self) -> int | None:
        try:
            with faults_of(self.path):
                return place(self.path).stat().st_size
        except OSError:
            return None

    @property
    def is_written(self) -> bool:
        """Whether there is a result in every format; each is whole."""
        if self.stored is not None:  # to ask a store for each would take as long as to transcribe it
            return all(str(path) in self.stored for path in self.outputs.values())
        return all(path.exists() for path in self.outputs.values())


def as_text(path: str | os.PathLike[str]) -> str:
    """A file name as it may stand in a message."""
    return str(path).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


# ---- which recordings ----------------------------------------------------------------------------------------------------


def walk(folder: Path, without: Path | None = None) -> Iterator[str]:
    """Every file below a folder, in order, without hidden ones and the output folder. Raises OSError."""
    if is_url(folder):
        yield from walk_url(folder, without)
        return
    with os.scandir(folder) as entries:
        found = sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)
    for entry in found:
        if entry.is_dir():
            if without is None or is_url(without) or not (without.exists() and without.samefile(entry.path)):
                yield from walk(Path(entry.path), without)
        elif entry.is_file():
            yield entry.path


def is_recording(path: str) -> bool:
    """Whether a file of an archive is to be transcribed: its name says so, or its content does."""
    if PurePath(path).suffix.lower() in SOUND_SUFFIXES:
        return True
    try:
        if is_url(path):
            with faults_of(path), place(path).open("rb") as file:
                probe(file)
        else:
            probe(path)
    except (AudioError, OSError):
        return False
    return True


def read_list(path: Path) -> list[str]:
    """The recordings that a manifest or a plain list of paths names. Raises ConfigError or OSError.

    A list has a path a line, or paths with a zero byte after each (`find -print0`).
    """
    with faults_of(str(path)):
        data = path.read_bytes()
    lines = data.split(b"\0") if b"\0" in data else data.splitlines()
    paths: list[str] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if not line.lstrip().startswith(b"{"):
            paths.append(os.fsdecode(line))
            continue
        try:
            paths.append(str(json.loads(line)["path"]))
        except (ValueError, KeyError, TypeError):
            raise ConfigError(
                f'{as_text(path)}: line {number} has no "path": expected {{"path": "talk.wav"}} or a path'
            ) from None
    return list(dict.fromkeys(paths))


# ---- where results go ----------------------------------------------------------------------------------------------------


def plan(
    paths: Sequence[str],
    roots: Sequence[Path | str],
    out: Path,
    formats: Sequence[str],
    past: "Manifest",
    reuse: bool = False,
) -> list[Item]:
    """Mirror the recordings below `out`.

    roots: folders that were named; what lies below one keeps its path from there, under the folder's own name where there
    are several. A result is called as its recording without the suffix, or with it where another has that name already: one of
    these, one that the manifest names, or, where there is no manifest, any file that is there. reuse: such a file counts as
    the result of the recording of its name.
    """
    taken = {str(out / MANIFEST).casefold()}
    stems = {path: past.stems[path] for path in paths if path in past.stems}
    for stem in past.stems.values():
        taken |= _names(join(out, stem), formats)
    stored = frozenset(walk(out)) if is_url(out) else None
    if not past.exists and not reuse and (stored is not None or out.is_dir()):
        taken |= {path.casefold() for path in (stored if stored is not None else walk(out))}
    for path in sorted(set(paths) - set(stems)):  # not in the order of their coming, which an earlier run may have shuffled
        stems[path] = _free_stem(_mirrored(path, roots), out, formats, taken)
        taken |= _names(join(out, stems[path]), formats)
    return [
        Item(path, {name: place(f"{join(out, stems[path])}{SUFFIXES[name]}") for name in formats}, stored) for path in paths
    ]


def _mirrored(path: str, roots: Sequence[Path | str]) -> PurePath:
    for root in roots:
        inner = below(path, root)
        if inner is not None:
            return PurePath(PurePath(root).name) / inner if len(roots) > 1 else inner
    return PurePath(PurePath(path).name)


def _free_stem(path: PurePath, out: Path, formats: Sequence[str], taken: set[str]) -> str:
    number = 1
    stem = path.with_suffix("") if path.stem else path
    while _names(join(out, str(stem)), formats) & taken:
        stem = path if number == 1 else path.with_name(f"{path.name}-{number}")
        number += 1
    return str(stem)


def _names(stem: Path, formats: Sequence[str]) -> set[str]:
    """As a file system compares them that takes no notice of case."""
    return {f"{stem}{SUFFIXES[name]}".casefold() for name in formats}


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file such that it is whole or not there, whenever the program ends. A lone surrogate becomes its JSON escape."""
    data = content if isinstance(content, bytes) else content.encode("utf-8", "backslashreplace")
    if is_url(path):
        write_url(path, data)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    try:
        with part.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException:
        with suppress(OSError):
            part.unlink()
        raise


# ---- what has been done --------------------------------------------------------------------------------------------------


class Manifest:
    """`manifest.jsonl`: a line for each recording that is settled; the last line of a path counts."""

    def __init__(self, out: Path) -> None:
        """Reads what is there; a line that was cut off in the middle counts as not there."""
        self._path = out / MANIFEST
        self._out = out
        self.lines: dict[str, dict[str, Any]] = {}
        self.stems: dict[str, str] = {}
        """Where the results of each recording went, without suffix."""
        self.exists = False
        data = b""
        with suppress(FileNotFoundError), faults_of(str(self._path)):
            data = self._path.read_bytes()
            self.exists = True
            for line in data.splitlines():
                with suppress(ValueError, KeyError, TypeError):
                    record = json.loads(line)
                    self.lines[record["path"]] = record
                    if isinstance(record.get("output"), str):
                        self.stems[record["path"]] = record["output"]
        self._starts_line = data[-1:] in (b"", b"\n")
        self._rewritten = bytearray(data) if is_url(self._path) else None
        """All of it, where a store cannot append."""
        self._flushed = len(data)
        self._next_rewrite = time.monotonic() + REWRITE_SECONDS

    def begin(self) -> None:
        """Make an empty one where there is none: results without a line are then known to be of a run that was killed. Raises
        OSError."""
        if not self.exists:
            write_whole(self._path, b"")
            self.exists = True

    def is_settled(self, item: Item) -> bool:
        """Whether this recording, unchanged, has its results already."""
        record = self.lines.get(item.path)
        if not item.is_written:
            return False
        return record is None or (record.get("status") in ("done", "damaged") and record.get("size") == item.size)

    def was_damaged(self, item: Item) -> str:
        """What was wrong with a settled recording; empty for nothing."""
        record = self.lines.get(item.path, {})
        return str(record.get("reason") or "damaged") if record.get("status") == "damaged" else ""

    def add(self, item: Item, status: Status, seconds: float, reason: str = "") -> None:
        """One more is settled. Raises OSError."""
        stem = None
        if item.outputs:
            name, path = next(iter(item.outputs.items()))
            stem = str(below(str(path), self._out)).removesuffix(SUFFIXES[name])
        record = {"path": item.path, "size": item.size, "status": status, "seconds": round(seconds, 3), "reason": reason}
        line = json.dumps(record | {"output": stem}) + "\n"
        data = (line if self._starts_line else f"\n{line}").encode()
        self._starts_line = True
        self.lines[item.path] = record
        if self._rewritten is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("ab") as file:
                file.write(data)
            return
        self._rewritten += data
        if time.monotonic() >= self._next_rewrite:
            self.flush()

    def flush(self) -> None:
        """Write what a store has not got yet. (Where the program is killed before, the results say what is settled.) Raises
        OSError."""
        if self._rewritten is None or len(self._rewritten) == self._flushed:
            return
        begun = time.monotonic()
        write_whole(self._path, bytes(self._rewritten))
        self._flushed = len(self._rewritten)
        now = time.monotonic()
        self._next_rewrite = now + max(REWRITE_SECONDS, (now - begun) / REWRITE_SHARE)


def recordings_of(names: Iterable[str], without: Path | None) -> tuple[list[str], int]:
    """Every recording among files and below folders, and how many other files were left out. Raises OSError."""
    paths: list[str] = []
    others = 0
    for name in names:
        folder = place(name)
        with faults_of(name):
            is_folder = folder.is_dir()
        if not is_folder:
            paths.append(name)
            continue
        for path in walk(folder, without):
            if is_recording(path):
                paths.append(path)
            else:
                others += 1
    return list(dict.fromkeys(paths)), others
