"""One open file read at several places at once."""

import io
import os
import threading
from typing import IO, cast


def view_of(file: IO[bytes], lock: "threading.Lock | None" = None) -> IO[bytes]:
    """An open file with a position of its own, at first 0. Closing it leaves the file open.

    Views of one file do not disturb each other, also in other processes. Where the system cannot read at an offset (Windows),
    that holds for those that share a lock.
    """
    return cast("IO[bytes]", _View(file, lock or threading.Lock()))


class _View(io.RawIOBase):
    def __init__(self, file: IO[bytes], lock: "threading.Lock") -> None:
        self._file = file
        self._lock = lock
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        if whence == os.SEEK_CUR:
            offset += self._position
        elif whence == os.SEEK_END:
            offset += os.fstat(self._file.fileno()).st_size
        if offset < 0:
            raise ValueError(f"a file has no position {offset}")
        self._position = offset
        return offset

    def read(self, size: int = -1) -> bytes:
        if size is None or size < 0:
            size = max(0, os.fstat(self._file.fileno()).st_size - self._position)
        data = self._read_at(size)
        self._position += len(data)
        return data

    def _read_at(self, size: int) -> bytes:
        if hasattr(os, "pread"):
            return os.pread(self._file.fileno(), size, self._position)
        with self._lock:
            self._file.seek(self._position)
            return self._file.read(size)
