"""Files and folders by path or by URL (`s3://bucket/calls`), handled alike.

A URL is read and written by fsspec, which universal_pathlib gives the form of pathlib; both come with the extra `ray`. Keys,
regions and end points come from where the libraries look for them (for S3, `AWS_…` variables and ~/.aws).
"""

import contextlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath, PurePosixPath
from typing import Any, cast

from moshi_stt.errors import ConfigError

PUT_WHOLE = frozenset(("s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "memory"))
"""Stores in which an object appears when its last byte is there, and that cannot rename."""


def is_url(name: str | os.PathLike[str]) -> bool:
    return "://" in str(name)


def place(name: str | os.PathLike[str]) -> Path:
    """A path, or what behaves like one for a URL. Raises ConfigError where a library for it is missing."""
    if not is_url(name):
        return Path(name)
    try:
        from upath import UPath

        made = UPath(name)
        made.fs  # noqa: B018 - imports the library of this protocol
    except ImportError as error:
        raise ConfigError(f"{name}: {error}. Install what reads URLs: scripts/install.sh --with ray") from None
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{name} is no URL that can be read: {error}") from None
    return cast("Path", made)


def file_system(folder: Path) -> Any:
    """fsspec's, of a place that is a URL."""
    return cast("Any", folder).fs


def parts_of(name: str | os.PathLike[str]) -> tuple[str, PurePath]:
    """Scheme, empty for a path, and the absolute path."""
    if not is_url(name):
        return "", Path(name).absolute()
    scheme, _, rest = str(name).partition("://")
    return scheme, PurePosixPath("/", rest)


def below(name: str, root: str | os.PathLike[str]) -> PurePath | None:
    """The path of a recording from a folder on; None where it does not lie below it."""
    (scheme, path), (other, folder) = parts_of(name), parts_of(root)
    return path.relative_to(folder) if scheme == other and path.is_relative_to(folder) else None


def common_folder(names: Sequence[str]) -> str | None:
    """The folder that all of these files lie below; None where there is none."""
    found = [parts_of(name) for name in names]
    schemes = {scheme for scheme, _ in found}
    if len(schemes) != 1:
        return None
    try:
        path = os.path.commonpath([path.parent for _, path in found])
    except ValueError:  # several drives
        return None
    (scheme,) = schemes
    return f"{scheme}:/{path}" if scheme else path


def join(folder: Path, inner: str) -> Path:
    """A file below a folder. inner: with this system's separators."""
    return folder / inner if not is_url(folder) else folder / PurePath(inner).as_posix()


def walk_url(folder: Path, without: Path | None) -> Iterator[str]:
    """Every file below a folder that is a URL, in order, without hidden ones and the output folder. Raises OSError."""
    system, root = file_system(folder), str(folder).rstrip("/")
    with faults_of(root):
        base = system._strip_protocol(root)
        keys = sorted(system.find(base))
    for key in keys:
        inner = key.removeprefix(base).lstrip("/")
        url = f"{root}/{inner}"
        hidden = any(part.startswith(".") for part in inner.split("/"))
        if not (hidden or not inner or key.endswith("/") or (without is not None and below(url, without) is not None)):
            yield url


@contextlib.contextmanager
def faults_of(name: str) -> Iterator[None]:
    """Whatever a store's library raises, as OSError."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:  # each library has its own
        raise OSError(f"{name}: {' '.join(str(error).split()) or type(error).__name__}") from None


@contextlib.contextmanager
def local_copy(name: str) -> Iterator[Path]:
    """A recording as a file of this machine, for as long as it takes. Raises OSError."""
    if not is_url(name):
        yield Path(name)
        return
    with tempfile.NamedTemporaryFile(suffix=PurePosixPath(name).suffix) as file:
        remote = place(name)
        with faults_of(name):
            file_system(remote).get_file(file_system(remote)._strip_protocol(name), file.name)
        yield Path(file.name)


def write_url(path: Path, data: bytes) -> None:
    """Write a file that is a URL such that it is whole or not there. Raises OSError."""
    system, target = file_system(path), file_system(path)._strip_protocol(str(path))
    with faults_of(str(path)):
        if str(path).partition("://")[0] in PUT_WHOLE:
            system.pipe_file(target, data)
            return
        system.makedirs(system._parent(target), exist_ok=True)
        part = f"{system._parent(target)}/.{PurePosixPath(target).name}.part"
        system.pipe_file(part, data)
        system.mv(part, target)
