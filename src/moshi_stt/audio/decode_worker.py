"""One process of a `DecodePool`: decodes files, cuts them, and puts the pieces into shared memory.

Arguments: inherited descriptors of a socket, of a second one for open files, and of the memory, the samples of a block, and how
many blocks there are. Messages are pickles, each after its length. The pool sends `Job`s, one at a time, and numbers of blocks
that may be written to; this process sends a `PieceThere` for each piece and `Done` after the last. It ends when the pool closes
the socket.
"""

import mmap
import os
import pickle
import signal
import socket
import struct
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO, Any, Final, NamedTuple

import numpy as np

from moshi_stt.audio.cut import CutRule, cut_pieces
from moshi_stt.audio.decode import decode_file
from moshi_stt.audio.file_view import view_of
from moshi_stt.audio.level import LevelMeter
from moshi_stt.audio.selection import Selection
from moshi_stt.constants import SAMPLE_RATE
from moshi_stt.errors import AudioError

LENGTH: Final = struct.Struct("<I")


class Job(NamedTuple):
    """Decode a file and cut it. path: None for the file whose descriptor was sent before this message."""

    path: str | None
    selection: Selection
    rule: CutRule


class PieceThere(NamedTuple):
    """A piece lies in a block: `Piece` but for its samples."""

    block: int
    samples: int
    offset: float
    start: float
    end: float


class Done(NamedTuple):
    """A job is over. fault: what `decode_file` raised. seconds: of audio that was decoded. silence: `LevelMeter.reason`.

    decode_seconds, cut_seconds: CPU time of this process.
    """

    seconds: float
    fault: AudioError | OSError | None
    remarks: list[str]
    silence: str
    decode_seconds: float
    cut_seconds: float


def dump(message: Any) -> bytes:
    """A message as it goes through the socket."""
    data = pickle.dumps(message)
    return LENGTH.pack(len(data)) + data


class _Worker:
    def __init__(self, channel: socket.socket, files: socket.socket, memory: int, block_samples: int, blocks: int) -> None:
        self._file = channel.makefile("rwb")
        self._files = files
        self._blocks: np.ndarray[Any, np.dtype[np.float32]] = np.ndarray(
            (blocks, block_samples), np.float32, mmap.mmap(memory, blocks * block_samples * 4)
        )
        self._free: deque[int] = deque()
        self._jobs: deque[Job] = deque()

    def run(self) -> None:
        """Jobs until the socket is closed."""
        while True:
            while not self._jobs:
                self._read()
            self._send(self._work(self._jobs.popleft()))

    def _work(self, job: Job) -> Done:
        remarks: list[str] = []
        meter = LevelMeter()
        fault: AudioError | OSError | None = None
        decode_seconds = 0.0

        def heard() -> Iterator[Any]:
            nonlocal fault, decode_seconds
            begun = time.process_time()
            try:
                with self._opened(job) as source:
                    for pcm in decode_file(source, job.selection, remarks):
                        meter.hear(pcm)
                        decode_seconds += time.process_time() - begun
                        yield pcm
                        begun = time.process_time()
            except (AudioError, OSError) as error:
                fault = error
            decode_seconds += time.process_time() - begun

        begun = time.process_time()
        for piece in cut_pieces(heard(), job.rule):
            if not len(piece.pcm):
                break
            while not self._free:
                self._read()
            block = self._free.popleft()
            self._blocks[block, : len(piece.pcm)] = piece.pcm
            self._send(PieceThere(block, len(piece.pcm), piece.offset, piece.start, piece.end))
        cut_seconds = time.process_time() - begun - decode_seconds
        return Done(meter.samples / SAMPLE_RATE, fault, remarks, meter.reason(), decode_seconds, cut_seconds)

    @contextmanager
    def _opened(self, job: Job) -> Iterator[str | IO[bytes]]:
        """What is to be decoded."""
        if job.path is not None:
            yield job.path
            return
        _, (descriptor,), _, _ = socket.recv_fds(self._files, 1, 1)
        with os.fdopen(descriptor, "rb") as file:
            yield view_of(file)

    def _read(self) -> None:
        header = self._file.read(LENGTH.size)
        if len(header) < LENGTH.size:
            raise EOFError
        message = pickle.loads(self._file.read(LENGTH.unpack(header)[0]))
        if isinstance(message, int):
            self._free.append(message)
        else:
            self._jobs.append(message)

    def _send(self, message: Any) -> None:
        self._file.write(dump(message))
        self._file.flush()


def main() -> None:
    """Work until the pool has gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the pool's business
    descriptor, files, memory, block_samples, blocks = (int(argument) for argument in sys.argv[1:])
    with (
        socket.socket(fileno=descriptor) as channel,
        socket.socket(fileno=files) as opened,
        suppress(EOFError, ConnectionError),
    ):
        _Worker(channel, opened, memory, block_samples, blocks).run()
