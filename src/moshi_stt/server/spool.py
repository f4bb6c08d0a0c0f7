"""Where messages wait that came ahead of recognition: in memory up to a bound, then in a nameless file.

A client may send as fast as it likes. If the server stopped reading its socket, pings would wait behind the audio, and the
client's library would cut the connection. So reading goes on, and what the streams have no room for yet waits here, in order.

    Backlog      of one connection: in memory, then in its Spool
    Spool        one file, without a name and for its owner alone; read from the front, written at the back, in a thread
    SpoolBudget  what all spools of one process may hold
"""

import asyncio
import logging
import os
import shutil
import tempfile
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import IO, Generic, TypeVar

from moshi_stt.config import LimitsConfig
from moshi_stt.errors import SpoolError
from moshi_stt.server.metrics import Metrics

log = logging.getLogger(__name__)

MOST_TOTAL_BYTES = 8_000_000_000
"""What all spools may hold at most where the setting is "auto"."""

BLOCK_BYTES = 256 << 10
"""Bytes that are written or read at a time."""

MOST_UNWRITTEN_BYTES = 4 << 20
"""Bytes that may wait for a slow disk; beyond them the socket is not read."""

MEMORY_FILE_SYSTEMS = frozenset(("tmpfs", "ramfs"))
"""A file there would be in memory after all."""

HEADER_BYTES = 5
"""Before each message in the file: its length and whether it was text."""

T = TypeVar("T")


class SpoolBudget:
    """The bytes that spools of this process may hold together. Used on the event loop alone."""

    def __init__(self, limits: LimitsConfig, metrics: Metrics, *, processes: int = 1) -> None:
        """processes: how many share the setting."""
        self._metrics = metrics
        self.folder = Path(limits.spool_dir)
        self.per_stream = limits.spool_bytes
        self.why_off = self._why_off(limits)
        total = 0
        if self.why_off is None:
            total = limits.spool_total_bytes if limits.spool_total_bytes != "auto" else self._auto_total()
        self.total = total // processes
        if self.total <= 0 and self.why_off is None:
            self.why_off = "spool_total_bytes leaves no room"

    def _why_off(self, limits: LimitsConfig) -> str | None:
        if limits.spool_bytes == 0 or limits.spool_total_bytes == 0:
            return "it is switched off (spool_bytes or spool_total_bytes is 0)"
        kind = file_system(self.folder)
        if kind in MEMORY_FILE_SYSTEMS:
            return f"{self.folder} is a {kind}, which is memory; name a folder on a disk in spool_dir"
        try:
            with tempfile.TemporaryFile(dir=self.folder):
                pass
        except OSError as error:
            return f"{self.folder} cannot be written ({error.strerror}); name another folder in spool_dir"
        return None

    def _auto_total(self) -> int:
        try:
            return min(MOST_TOTAL_BYTES, shutil.disk_usage(self.folder).free // 10)
        except OSError:
            return 0

    def take(self, size: int) -> bool:
        """Whether there is room for so many bytes; then they count as used."""
        if self._metrics.spooled_bytes + size > self.total:
            return False
        self._metrics.spooled_bytes += size
        return True

    def give(self, size: int) -> None:
        """So many bytes are free again."""
        self._metrics.spooled_bytes -= size


def file_system(folder: Path) -> str | None:
    """Its kind where the system tells (Linux), else None."""
    try:
        mounts = Path("/proc/self/mounts").read_text(encoding="utf-8", errors="replace").splitlines()
        where = str(folder.resolve())
    except OSError:
        return None
    best, kind = "", None
    for line in mounts:
        _, point, this, *_ = line.split(" ")
        point = point.encode().decode("unicode_escape")
        if (where == point or where.startswith(point.rstrip("/") + "/")) and len(point) >= len(best):
            best, kind = point, this
    return kind


def _nothing(*_: object) -> None: ...


class Spool:
    """Messages in a file, first in, first out. Writing and reading happen in threads; `put` and `pop` never wait."""

    def __init__(self, budget: SpoolBudget, again: Callable[[], None], failed: Callable[[BaseException], None]) -> None:
        """again: `pop` may have a message again, or `full` is over. failed: the file could not be written or read."""
        self._budget = budget
        self._again = again
        self._failed = failed
        self._file: IO[bytes] | None = None
        self._unwritten = bytearray()
        self._written = 0
        self._read = 0
        self._ready: deque[str | bytes] = deque()
        """Messages that were read from the file."""
        self._partial = bytearray()
        """What was read and is no whole message yet."""
        self._reserved = 0
        self._busy = False
        self._closed = False

    @property
    def size(self) -> int:
        """Bytes held, in the file or on their way to or from it."""
        return self._reserved

    @property
    def memory_bytes(self) -> int:
        """Of them, those in memory."""
        return len(self._unwritten) + len(self._partial) + sum(map(len, self._ready))

    @property
    def is_empty(self) -> bool:
        return not self._reserved

    @property
    def is_behind(self) -> bool:
        """Whether the disk is too slow for what comes."""
        return len(self._unwritten) > MOST_UNWRITTEN_BYTES

    def put(self, message: str | bytes) -> bool:
        """Take a message; False where the stream or all streams together have no room left in the spool."""
        data = message.encode() if isinstance(message, str) else message
        size = len(data) + HEADER_BYTES
        if self._reserved + size > self._budget.per_stream or not self._budget.take(size):
            return False
        self._reserved += size
        self._unwritten += len(data).to_bytes(4, "little") + bytes((isinstance(message, str),)) + data
        self._work()
        return True

    def pop(self) -> str | bytes | None:
        """The next message, if it is in memory; else it is fetched, and `again` is called."""
        if not self._ready:
            self._work()
        if not self._ready:
            return None
        message = self._ready.popleft()
        size = (len(message.encode()) if isinstance(message, str) else len(message)) + HEADER_BYTES
        self._reserved -= size
        self._budget.give(size)
        if not self._ready:
            self._work()
        return message

    def close(self) -> None:
        """Drop everything; the file is gone with it. Idempotent."""
        self._closed = True
        self._budget.give(self._reserved)
        self._reserved = 0
        self._unwritten.clear()
        self._partial.clear()
        self._ready.clear()
        self._again, self._failed = _nothing, _nothing  # they lead to the connection, which leads here
        if not self._busy:
            self._close_file()

    def _close_file(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            file.close()

    def _work(self) -> None:
        """Write what is a block, read what is wanted: one of them at a time."""
        if self._busy or self._closed:
            return
        unread = self._written - self._read
        if not self._ready and unread:
            self._start(self._read_block, self._read, min(unread, BLOCK_BYTES), then=self._has_read)
        elif len(self._unwritten) >= BLOCK_BYTES:
            block, self._unwritten = bytes(self._unwritten), bytearray()
            self._start(self._write_block, block, self._written, then=self._has_written)
        elif not self._ready and self._unwritten:  # it never has to go to the disk
            block, self._unwritten = bytes(self._unwritten), bytearray()
            self._split(block)

    def _start(self, work: Callable[..., T], *arguments: object, then: Callable[[T], None]) -> None:
        self._busy = True
        running = asyncio.get_running_loop().run_in_executor(None, work, *arguments)
        running.add_done_callback(lambda done: self._done(done, then))

    def _done(self, done: "asyncio.Future[T]", then: Callable[[T], None]) -> None:
        self._busy = False
        if self._closed:
            done.exception()
            self._close_file()
            return
        error = done.exception()
        if error is not None:
            if isinstance(error, OSError):
                where = self._budget.folder
                error = SpoolError(f"audio that came ahead of recognition could not be kept in {where}: {error.strerror}")
            self._failed(error)
            return
        then(done.result())
        self._work()
        self._again()

    def _write_block(self, block: bytes, at: int) -> int:
        if self._file is None:
            self._file = tempfile.TemporaryFile(dir=self._budget.folder, buffering=0)  # noqa: SIM115  # closed by `close`
        view = memoryview(block)
        while view:
            done = os.pwrite(self._file.fileno(), view, at)
            view, at = view[done:], at + done
        return len(block)

    def _has_written(self, size: int) -> None:
        self._written += size

    def _read_block(self, at: int, size: int) -> bytes:
        assert self._file is not None
        return os.pread(self._file.fileno(), size, at)

    def _has_read(self, block: bytes) -> None:
        self._read += len(block)
        self._split(block)
        if self._read == self._written:  # nothing in it is needed any more
            self._read = self._written = 0
            self._start(self._empty_file, then=lambda _: None)

    def _empty_file(self) -> None:
        assert self._file is not None
        self._file.truncate(0)

    def _split(self, block: bytes) -> None:
        """Bytes to messages."""
        data = self._partial
        data += block
        start = 0
        while len(data) - start >= HEADER_BYTES:
            size = int.from_bytes(data[start : start + 4], "little")
            end = start + HEADER_BYTES + size
            if len(data) < end:
                break
            message = bytes(data[start + HEADER_BYTES : end])
            self._ready.append(message.decode() if data[start + 4] else message)
            start = end
        del data[:start]


class Backlog(Generic[T]):
    """Items in order. Messages beyond a bound in memory go to the spool, what comes after them waits in the rear."""

    def __init__(self, memory_bytes: int, spool: Spool | None) -> None:
        self._memory_bytes = memory_bytes
        self._spool = spool
        self._front: deque[T | str | bytes] = deque()
        self._rear: deque[T | str | bytes] = deque()
        self._bytes = 0
        """Of the messages in front and rear."""

    def __bool__(self) -> bool:
        return bool(self._front or self._rear or self.spooled_bytes)

    @property
    def memory_bytes(self) -> int:
        """Bytes held in memory."""
        return self._bytes + (self._spool.memory_bytes if self._spool is not None else 0)

    @property
    def spooled_bytes(self) -> int:
        return 0 if self._spool is None else self._spool.size

    @property
    def is_full(self) -> bool:
        """Whether the spool had no room for a message that is still held. Nothing more should be read meanwhile."""
        return self._spool is not None and any(isinstance(item, str | bytes) for item in self._rear)

    @property
    def wants_pause(self) -> bool:
        """Whether nothing more should be read until some of this is gone."""
        if self._spool is None:
            return self._bytes >= self._memory_bytes
        return self.is_full or self._spool.is_behind

    def put(self, item: T | str | bytes) -> None:
        is_message = isinstance(item, str | bytes)
        if not self._rear:
            spool = self._spool
            if not self.spooled_bytes and (spool is None or not is_message or self._bytes <= self._memory_bytes):
                self._append(self._front, item)
                return
            if spool is not None and isinstance(item, str | bytes) and spool.put(item):
                return
        self._append(self._rear, item)

    def _append(self, to: "deque[T | str | bytes]", item: T | str | bytes) -> None:
        to.append(item)
        if isinstance(item, str | bytes):
            self._bytes += len(item)

    def pop(self) -> T | str | bytes | None:
        """The next item; None where there is none, or none yet."""
        if not self._front:
            if self._spool is not None and not self._spool.is_empty:
                return self._spool.pop()
            self._front, self._rear = self._rear, self._front
            if not self._front:
                return None
        item = self._front.popleft()
        if isinstance(item, str | bytes):
            self._bytes -= len(item)
        return item

    def clear(self) -> None:
        """Drop everything, for good."""
        self._front.clear()
        self._rear.clear()
        self._bytes = 0
        if self._spool is not None:
            self._spool.close()
