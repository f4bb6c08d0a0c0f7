"""What the first process may still say on the socket of a client whose model process has died.

A process that is killed takes its sockets along, but the first process has a duplicate of each, so that the client can be
told. That is sound only between two frames. So the model process notes, in memory that both share, one byte a socket:

    WHOLE    what was written ends with a whole frame: an `Error` and a Close may follow
    PARTIAL  the socket's buffer was full, and the end of a frame is still in the process that died: nothing may follow
    OVER     our Close or our end-of-file is sent, or the socket was closed: nothing may follow

To know where it stands, the process writes to the socket itself, at once; only what the system does not take goes through the
event loop's buffer. A write that the system takes whole cannot be cut by a kill.
"""

import asyncio
import mmap
import os
import socket
from collections.abc import Callable
from typing import Any

from moshi_stt.engine.shared_backend import shared_file

WHOLE, PARTIAL, OVER = 0, 1, 2

PLACES = 65_536
"""Sockets of one process that can be noted at once: as many as it may have open."""

_CLOSE = b"\x88"
"""How a WebSocket's Close begins, sent by a server (RFC 6455 section 5.2)."""


class Boundaries:
    """The bytes of one model process."""

    def __init__(self, descriptor: int | None = None) -> None:
        """descriptor: of the memory, which is taken over; None makes new memory."""
        self.descriptor = shared_file(PLACES) if descriptor is None else descriptor
        self._memory = mmap.mmap(self.descriptor, PLACES)
        self._free = list(range(PLACES - 1, -1, -1))

    def take(self) -> int | None:
        """A place for one more socket; None where all are taken."""
        if not self._free:
            return None
        place = self._free.pop()
        self._memory[place] = WHOLE
        return place

    def give_back(self, place: int | None) -> None:
        if place is not None:
            self._free.append(place)

    def may_speak(self, place: int | None) -> bool:
        """Whether a frame may follow what was sent on that socket. The process that wrote has ended."""
        return place is not None and self._memory[place] == WHOLE

    def note(self, place: int | None, state: int) -> None:
        if place is not None:
            self._memory[place] = state

    def close(self) -> None:
        self._memory.close()
        os.close(self.descriptor)


class NotedTransport(asyncio.Transport):
    """A socket's transport that notes where its writes end."""

    def __init__(self, inner: asyncio.Transport, sock: socket.socket, note: Callable[[int], None]) -> None:
        """sock: the one that `inner` writes to."""
        super().__init__()
        self._inner = inner
        self._sock = sock
        self._note = note
        self._is_partial = False
        self._is_over = False

    # ---- writing -----------------------------------------------------------------------------------------------------

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.settle()
        rest = data if self._is_partial or self._inner.is_closing() else self._write_now(data)
        if rest:
            if not self._is_over and not self._is_partial:
                self._is_partial = True
                self._note(PARTIAL)
            self._inner.write(rest)
        if data[:1] == _CLOSE:
            self._end()

    def _write_now(self, data: bytes | bytearray | memoryview) -> bytes | bytearray | memoryview:
        """What the system did not take."""
        try:
            return data[self._sock.send(data) :]
        except OSError:  # full, or the client is gone: the transport finds that out
            return data

    def settle(self) -> None:
        """Note it when what was left has gone out."""
        if self._is_partial and not self._inner.get_write_buffer_size():
            self._is_partial = False
            if not self._is_over:
                self._note(WHOLE)

    def _end(self) -> None:
        self._is_over = True
        self._note(OVER)

    def write_eof(self) -> None:
        self._end()
        self._inner.write_eof()

    def can_write_eof(self) -> bool:
        return self._inner.can_write_eof()

    def close(self) -> None:
        self._end()
        self._inner.close()

    def abort(self) -> None:
        self._end()
        self._inner.abort()

    # ---- the rest is the other's -------------------------------------------------------------------------------------

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self._inner.get_extra_info(name, default)

    def is_closing(self) -> bool:
        return self._inner.is_closing()

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self._inner.set_protocol(protocol)

    def get_protocol(self) -> asyncio.BaseProtocol:
        return self._inner.get_protocol()

    def is_reading(self) -> bool:
        return self._inner.is_reading()

    def pause_reading(self) -> None:
        self._inner.pause_reading()

    def resume_reading(self) -> None:
        self._inner.resume_reading()

    def get_write_buffer_size(self) -> int:
        return self._inner.get_write_buffer_size()
