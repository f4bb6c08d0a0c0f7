"""Files named in a configuration, found or fetched: `hf://OWNER/REPOSITORY/FILE[@REVISION]`, or a path. Knows no format.

A copy in the Hugging Face cache (shared with moshi-server and everything else) is used without asking the network. Otherwise
the file is fetched through `huggingface_hub`: proxies, `HF_TOKEN`, `HF_HOME`, `HF_ENDPOINT`, `HF_HUB_OFFLINE`, progress bars.
An interrupted transfer leaves a `.part` beside the cache's blobs, and the next call goes on from there, in any process.
"""

import hashlib
import logging
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from moshi_stt.errors import CheckpointError, DownloadError
from moshi_stt.install import install_command

log = logging.getLogger(__name__)

SCHEME = "hf://"
DEFAULT_ENDPOINT = "https://huggingface.co"
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_FILE_ENDING = re.compile(r"\.(safetensors|model|json|gguf|bin|npz|toml|txt)$")


class Known(NamedTuple):
    """A published file: its size and SHA-256."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Published:
    """A repository that this program was written for. revision: the commit taken where none is asked for; None: `main`."""

    revision: str | None
    files: dict[str, Known]


_MIMI = {
    "mimi-pytorch-e351c8d8@125.safetensors": Known(
        384_644_900, "09b782f0629851a271227fb9d36db65c041790365f11bbe5d3d59369cf863f50"
    )
}

PUBLISHED = {
    "kyutai/stt-1b-en_fr-candle": Published(
        "095e38f6242006a93c2541149b181988397f5c7c",
        _MIMI
        | {
            "model.safetensors": Known(1_978_522_200, "b9e97c53229dce728d65c76bfa892f7b563c69d671899f0ebc6518582dddec6f"),
            "tokenizer_en_fr_audio_8000.model": Known(
                120_378, "cd87dd5d17169151782ac700280ec057e5d658a9afbe238a048ea5ff318cce69"
            ),
        },
    ),
    "kyutai/stt-2.6b-en": Published(
        "a07aec56d22be5589cd0bc8709c75b6cf3e3039d",
        _MIMI
        | {
            "model.safetensors": Known(5_234_275_128, "2471add7da1fdb2d5dc4561e88a9069376333d992760d55d29d1db46c52849b2"),
            "tokenizer_en_audio_4000.model": Known(59_339, "d461765ae179566678c93091c5fa6f2984c31bbe990bf1aa62d92c64d91bc3f6"),
        },
    ),
    "kyutai/stt-2.6b-en-candle": Published(None, _MIMI),
    "kyutai/stt-1b-en_fr": Published(None, _MIMI),
}
"""Sizes and hashes of contract section 6."""


@dataclass(frozen=True)
class HubFile:
    """A file on the hub. revision: None takes the published one, or `main`."""

    repo: str
    path: str
    revision: str | None = None

    def __str__(self) -> str:
        return f"{SCHEME}{self.repo}/{self.path}" + (f"@{self.revision}" if self.revision else "")

    @property
    def wanted(self) -> str:
        """The revision to ask the hub for."""
        published = PUBLISHED.get(self.repo)
        return self.revision or (published.revision if published else None) or "main"

    @property
    def known(self) -> Known | None:
        """What the file is known to be, where its published revision is taken."""
        published = PUBLISHED.get(self.repo)
        if published is None or self.revision not in (None, published.revision):
            return None
        return published.files.get(self.path)

    @property
    def expected_bytes(self) -> int | None:
        """The published size; where it is not written down, that of the same weights in Kyutai's other naming."""
        twin = PUBLISHED.get(self.repo.removesuffix("-candle"))
        found = self.known or (twin.files.get(self.path) if twin else None)
        return found.bytes if found else None


def parse_reference(text: str) -> HubFile | None:
    """An `hf://` name taken apart; None for a path. Raises CheckpointError where names are missing.

    What follows the last `@` is a revision, unless it has the ending of a file: `mimi-pytorch-e351c8d8@125.safetensors`.
    """
    if not text.startswith(SCHEME):
        return None
    name, at, revision = text.removeprefix(SCHEME).rpartition("@")
    if not at or _FILE_ENDING.search(revision):
        name, revision = text.removeprefix(SCHEME), ""
    parts = name.split("/")
    if len(parts) < 3 or not all(parts) or ".." in parts:
        raise CheckpointError(
            f'"{text}" is no name of a hub file: expected "hf://OWNER/REPOSITORY/FILE", or that with "@REVISION" at its end.'
        )
    return HubFile("/".join(parts[:2]), "/".join(parts[2:]), revision or None)


def cache_folder() -> Path:
    """Where the hub's files are kept: `HF_HUB_CACHE`, else `hub` in `HF_HOME`, else ~/.cache/huggingface/hub."""
    if folder := os.environ.get("HF_HUB_CACHE"):
        return Path(folder).expanduser()
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    return Path(home).expanduser() / "hub"


def endpoint() -> str:
    """The hub's address: `HF_ENDPOINT`, or the public one."""
    return (os.environ.get("HF_ENDPOINT") or DEFAULT_ENDPOINT).rstrip("/")


def address(file: HubFile) -> str:
    """The URL of a file on the hub."""
    return f"{endpoint()}/{file.repo}/resolve/{file.wanted}/{file.path}"


def is_offline() -> bool:
    """Whether `HF_HUB_OFFLINE` forbids the network."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}


def resolve(reference: str) -> Path:
    """The file that a configuration names, on this machine; fetched where it has to be.

    Raises CheckpointError for a path where there is no file, DownloadError for a hub file that cannot be had, saying the URL
    tried, the place in the cache, and how to bring the file by hand.
    """
    file = parse_reference(reference)
    if file is None:
        path = Path(reference)
        if not path.is_file():
            kind = "a directory" if path.is_dir() else "not there"
            raise CheckpointError(f"{path} is {kind}; expected a file. Check the path in the configuration.")
        return path
    cached = find_cached(file)
    if cached is not None:
        return cached
    if is_offline():
        raise DownloadError(_explain(file, "HF_HUB_OFFLINE is set and the file is not in the cache", "unset HF_HUB_OFFLINE"))
    return fetch(file)


def find_cached(file: HubFile) -> Path | None:
    """The file in the cache, without any network: of the wanted revision; or of `main` where none was asked for.

    A copy whose size is not the published one is thrown away.
    """
    repository = _repository(file)
    revisions = [file.wanted] if file.revision else [file.wanted, "main"]
    for revision in revisions:
        ref = repository / "refs" / revision
        commit = revision if _COMMIT.fullmatch(revision) else ref.read_text().strip() if ref.is_file() else ""
        path = repository / "snapshots" / commit / file.path
        if not commit or not path.is_file():
            continue
        size = path.stat().st_size
        if file.known is None or size == file.known.bytes:
            return path
        if revision == file.wanted:
            log.warning("%s has %s bytes instead of %s: fetching it again", path, f"{size:,}", f"{file.known.bytes:,}")
            _discard(path)
    return None


def fetch(file: HubFile) -> Path:
    """Fetch a file into the cache, going on where an earlier call was interrupted. Raises DownloadError."""
    hub = _import_hub(file)
    try:
        with _bars_on_a_terminal_only(hub):
            return _fetch(hub, file)
    except _transfer_errors(hub) as error:
        raise DownloadError(_explain(file, *_reason(error))) from error


def remote_size(file: HubFile) -> int:
    """Bytes of a file as the hub tells them. Raises DownloadError."""
    hub = _import_hub(file)
    try:
        return int(_metadata(hub, file).size or 0)
    except _transfer_errors(hub) as error:
        raise DownloadError(_explain(file, *_reason(error))) from error


# ---- the transfer ----------------------------------------------------------------------------------------------------


def _fetch(hub: Any, file: HubFile) -> Path:
    """Into `blobs/ETAG.part` first; whole and checked, it becomes the blob, and the library links the snapshot to it."""
    meta = _metadata(hub, file)
    blobs = _repository(file) / "blobs"
    blobs.mkdir(parents=True, exist_ok=True)
    blob, part = blobs / str(meta.etag), blobs / f"{meta.etag}.part"
    with hub.utils.WeakFileLock(blobs / f"{meta.etag}.part.lock"):
        if not blob.exists():
            log.info("fetching %s (%.1f MB) into %s", file, (meta.size or 0) / 1e6, blobs.parent)
            _transfer(hub, meta, part)
            _check(file, part, str(meta.etag))
            part.replace(blob)
    path = hub.hf_hub_download(
        file.repo, file.path, revision=file.wanted, cache_dir=cache_folder(), endpoint=endpoint(), library_name="moshi-stt"
    )
    return Path(path)


def _metadata(hub: Any, file: HubFile) -> Any:
    url = hub.hf_hub_url(file.repo, file.path, revision=file.wanted, endpoint=endpoint())
    return hub.get_hf_file_metadata(url, library_name="moshi-stt")


def _transfer(hub: Any, meta: Any, part: Path) -> None:
    """Append what is missing of meta's file to part."""
    headers = hub.utils.build_hf_headers(library_name="moshi-stt")
    if urlsplit(meta.location)[:2] != urlsplit(endpoint())[:2]:
        headers.pop("authorization", None)  # storage elsewhere has its own key in the address
    part.touch()
    with part.open("r+b") as target:
        done = target.seek(0, os.SEEK_END)
        if meta.size is not None and done > meta.size:
            done = target.truncate(0)
            target.seek(0)
        if meta.size is None or done < meta.size:
            hub.file_download.http_get(meta.location, target, resume_size=done, headers=headers, expected_size=meta.size)


def _check(file: HubFile, part: Path, etag: str) -> None:
    """The hash that is published, and that of the hub, which is the ETag of large files. A wrong file is deleted."""
    known = file.known
    expected = [known.sha256] if known else []
    expected += [etag] if _SHA256.fullmatch(etag) else []
    if not expected:
        return
    with part.open("rb") as content:
        found = hashlib.file_digest(content, "sha256").hexdigest()
    if all(found == sha256 for sha256 in expected):
        return
    size = part.stat().st_size
    part.unlink()
    raise DownloadError(
        _explain(
            file,
            f"what came ({size:,} bytes) has the SHA-256 {found}, expected {' and '.join(expected)}",
            "try again; if it stays so, the address does not serve Kyutai's file (see HF_ENDPOINT)",
        )
    )


def _discard(path: Path) -> None:
    """Remove a file of a snapshot and the blob behind it."""
    blob = path.resolve()
    path.unlink()
    blob.unlink(missing_ok=True)


def _repository(file: HubFile) -> Path:
    return cache_folder() / ("models--" + file.repo.replace("/", "--"))


# ---- the library, and what its errors mean ---------------------------------------------------------------------------


def _import_hub(file: HubFile) -> Any:
    try:
        import huggingface_hub
        import huggingface_hub.errors
        import huggingface_hub.file_download
    except ImportError as error:
        text = "the huggingface_hub package, which fetches it, is not installed, so nothing was tried"
        raise DownloadError(_explain(file, text, install_command("torch", ["huggingface_hub"]))) from error
    return huggingface_hub


def _transfer_errors(hub: Any) -> tuple[type[Exception], ...]:
    """What the library raises for a transfer that did not work, its HTTP library's errors included."""
    errors = hub.errors
    return (OSError, errors.EntryNotFoundError, errors.HFValidationError, *errors.HfHubHTTPError.__bases__)


def _reason(error: Exception) -> tuple[str, str]:
    """(what happened, what to do)."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    name = type(error).__name__
    if status in (401, 403) or name == "GatedRepoError":
        return (
            f"the hub refused ({status or name})",
            "set HF_TOKEN to a token that may read this repository; the same answer comes for a repository that does not exist",
        )
    if name == "RevisionNotFoundError":
        return "the hub does not have this revision (404)", "name another: add @main, or @COMMIT, to the file's name"
    if status == 404 or name in ("EntryNotFoundError", "RemoteEntryNotFoundError", "RepositoryNotFoundError"):
        return "the hub does not have this file (404)", "check the name in the configuration"
    if isinstance(error, OSError) and error.errno == 28:
        return "the disk is full", "free some space, or set HF_HOME to a folder on another disk"
    if isinstance(error, PermissionError):
        return f"no permission to write {error.filename}", "set HF_HOME to a folder that you may write to"
    if status is not None:
        return f"the hub answered {status}", "try again later, or set HF_ENDPOINT to a mirror"
    text = " ".join(str(error).split())[:300]
    return (
        f"no answer from the hub ({name}: {text})",
        "check the network and its proxy (HTTPS_PROXY), or set HF_ENDPOINT to a mirror; run it again to go on where it stopped",
    )


def _explain(file: HubFile, what: str, how: str) -> str:
    """The whole message of a DownloadError."""
    url = address(file)
    return (
        f"{file} could not be downloaded: {what}.\n"
        f"  address: {url}\n"
        f"  cache:   {_repository(file)}\n"
        f"  to do:   {how}\n"
        f"  by hand: fetch that URL on a machine that can, copy the file here, and write its path in the configuration "
        f'instead of "{file}"; or copy the cache folder from a machine that has it.'
    )


@contextmanager
def _bars_on_a_terminal_only(hub: Any) -> Iterator[None]:
    """A progress bar in a log file or a pipe is noise."""
    hide = not sys.stderr.isatty() and not hub.utils.are_progress_bars_disabled()
    if hide:
        hub.utils.disable_progress_bars()
    try:
        yield
    finally:
        if hide:
            hub.utils.enable_progress_bars()
