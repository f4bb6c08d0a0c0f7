"""One process of a `DecodePool`: decodes files, cuts them, and puts the pieces into shared memory.

Arguments: inherited descriptors of a socket and of the memory, the samples of a block, and how many blocks there are. Messages
are pickles, each after its length. The pool sends `Job`s, one at a time, and numbers of blocks that may be written to; this
process sends a `PieceThere` for each piece and `Done` after the last. It ends when the pool closes the socket.
"""

import mmap
import pickle
import signal
import socket
import struct
import sys
from collections import deque
from contextlib import suppress
from typing import Any, Final, NamedTuple

import numpy as np

from moshi_stt.audio.cut import CutRule, cut_pieces
from moshi_stt.audio.decode import decode_file
from moshi_stt.audio.level import LevelMeter
from moshi_stt.audio.selection import Selection
from moshi_stt.errors import AudioError

LENGTH: Final = struct.Struct("<I")


class Job(NamedTuple):
    """Decode a file and cut it."""

    path: str
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
    """A job is over. fault: what `decode_file` raised. seconds: of audio that was decoded. silence: `LevelMeter.reason`."""

    seconds: float
    fault: AudioError | OSError | None
    remarks: list[str]
    silence: str


def dump(message: Any) -> bytes:
    """A message as it goes through the socket."""
    data = pickle.dumps(message)
    return LENGTH.pack(len(data)) + data


class _Worker:
    def __init__(self, channel: socket.socket, memory: int, block_samples: int, blocks: int) -> None:
        self._file = channel.makefile("rwb")
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

        def heard() -> Any:
            nonlocal fault
            try:
                for pcm in decode_file(job.path, job.selection, remarks):
                    meter.hear(pcm)
                    yield pcm
            except (AudioError, OSError) as error:
                fault = error

        for piece in cut_pieces(heard(), job.rule):
            if not len(piece.pcm):
                break
            while not self._free:
                self._read()
            block = self._free.popleft()
            self._blocks[block, : len(piece.pcm)] = piece.pcm
            self._send(PieceThere(block, len(piece.pcm), piece.offset, piece.start, piece.end))
        return Done(meter.samples / 24_000, fault, remarks, meter.reason())

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
    descriptor, memory, block_samples, blocks = (int(argument) for argument in sys.argv[1:])
    with socket.socket(fileno=descriptor) as channel, suppress(EOFError, ConnectionError):
        _Worker(channel, memory, block_samples, blocks).run()
