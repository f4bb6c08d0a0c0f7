"""Messages and descriptors between the server's processes, over a Unix socket pair, on the event loop.

A message is any picklable value: both ends are this program, and nobody else has the socket.
"""

import asyncio
import contextlib
import os
import pickle
import socket
import struct
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final

_LENGTH: Final = struct.Struct("<I")
_MOST_DESCRIPTORS: Final = 64
"""In one read."""
_READ_BYTES: Final = 1 << 16


class MessageSocket:
    """One end. Messages arrive at `on_message(message, descriptors)`, which must use each descriptor up or close it.

    Fewer descriptors come than were sent where this process may open no more files.
    """

    def __init__(
        self, sock: socket.socket, on_message: Callable[[Any, list[int]], None], on_closed: Callable[[], None]
    ) -> None:
        """sock: taken over. on_closed: the other end is gone; called once, and not after `close`."""
        self._sock = sock
        self._on_message = on_message
        self._on_closed = on_closed
        self._loop = asyncio.get_running_loop()
        self._unsent: deque[tuple[bytes, tuple[int, ...]]] = deque()
        self._writing = False
        self._received = bytearray()
        self._descriptors: deque[int] = deque()
        self.closed = False
        sock.setblocking(False)
        self._loop.add_reader(sock, self._read)

    def send(self, message: Any, descriptors: Sequence[int] = ()) -> None:
        """Send after what was sent before. The descriptors are copied and stay the caller's. Nothing happens once closed."""
        if self.closed:
            return
        payload = pickle.dumps((message, len(descriptors)), pickle.HIGHEST_PROTOCOL)
        copies = tuple(os.dup(descriptor) for descriptor in descriptors)
        self._unsent.append((_LENGTH.pack(len(payload)) + payload, copies))
        if not self._writing:
            self._write()

    @property
    def backlog(self) -> int:
        """Messages that wait for the other end to read."""
        return len(self._unsent)

    def _write(self) -> None:
        while self._unsent and not self.closed:
            data, descriptors = self._unsent.popleft()
            try:
                sent = socket.send_fds(self._sock, [data], descriptors) if descriptors else self._sock.send(data)
            except (BlockingIOError, InterruptedError):
                self._unsent.appendleft((data, descriptors))
                break
            except OSError:
                _close_all(descriptors)
                self._lost()
                return
            _close_all(descriptors)  # they went with the first byte
            if sent < len(data):
                self._unsent.appendleft((data[sent:], ()))
                break
        if bool(self._unsent) != self._writing and not self.closed:
            self._writing = bool(self._unsent)
            if self._writing:
                self._loop.add_writer(self._sock, self._write)
            else:
                self._loop.remove_writer(self._sock)

    def _read(self) -> None:
        try:
            data, descriptors, _, _ = socket.recv_fds(self._sock, _READ_BYTES, _MOST_DESCRIPTORS)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            data, descriptors = b"", []
        self._descriptors.extend(descriptors)
        if not data:
            self._lost()
            return
        self._received += data
        start = 0
        try:
            while len(self._received) - start >= _LENGTH.size and not self.closed:
                body = start + _LENGTH.size
                end = body + _LENGTH.unpack_from(self._received, start)[0]
                if len(self._received) < end:
                    break
                payload, start = bytes(self._received[body:end]), end
                message, count = pickle.loads(payload)
                arrived = min(count, len(self._descriptors))
                self._on_message(message, [self._descriptors.popleft() for _ in range(arrived)])
        finally:
            del self._received[:start]

    def _lost(self) -> None:
        if not self.closed:
            self.close()
            self._on_closed()

    def close(self) -> None:
        """Drop what was not sent or taken. Idempotent."""
        if self.closed:
            return
        self.closed = True
        with contextlib.suppress(OSError, ValueError):
            self._loop.remove_reader(self._sock)
            self._loop.remove_writer(self._sock)
        self._sock.close()
        for _, descriptors in self._unsent:
            _close_all(descriptors)
        self._unsent.clear()
        _close_all(self._descriptors)
        self._descriptors.clear()


def _close_all(descriptors: Sequence[int] | deque[int]) -> None:
    for descriptor in descriptors:
        with contextlib.suppress(OSError):
            os.close(descriptor)
