"""Decoding, resampling and cutting in processes of their own, for engines that take more than one interpreter can decode.

Pieces lie in shared memory: a block is one piece's from the moment it is written until the piece is released. All blocks belong
to the pool, which lends a few ahead to each process that has a file; where none is free, decoding waits. A process that a
damaged file brings down costs that file alone: another one takes its place.
"""

import asyncio
import logging
import mmap
import os
import pickle
import socket
import sys
import tempfile
from collections import deque
from collections.abc import AsyncGenerator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from moshi_stt.audio.cut import CutRule, Piece
from moshi_stt.audio.decode_worker import LENGTH, Done, Job, PieceThere, dump
from moshi_stt.audio.selection import Selection
from moshi_stt.constants import SAMPLE_RATE
from moshi_stt.cores import usable_cores
from moshi_stt.errors import AudioError

log = logging.getLogger(__name__)

BLOCKS_AHEAD: Final = 3
"""Blocks that a process has in hand while it decodes."""

STOP_SECONDS: Final = 5.0

POOL_SLOTS: Final = 16
"""From so many slots on, one interpreter cannot decode as fast as the model listens."""

MOST_DECODERS: Final = 16


def is_supported() -> bool:
    """Whether this system can hand descriptors to a process that it starts."""
    return os.name == "posix"


def decoders_for(slots: int) -> int:
    """Processes that are worth decoding in for an engine of so many slots; 0 where threads do as well."""
    if slots < POOL_SLOTS or not is_supported():
        return 0
    return min(MOST_DECODERS, usable_cores() - 1)


def shared_memory(size: int) -> int:
    """A descriptor of so many bytes of memory without a name."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("moshi-stt-audio")
    else:
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    os.ftruncate(descriptor, size)
    return descriptor


@dataclass
class Decoded:
    """What is known of a file when its last piece has come."""

    seconds: float = 0.0
    fault: AudioError | OSError | None = None
    remarks: list[str] = field(default_factory=list)
    silence: str = ""
    """Why there can be no words in it, where its level says so."""
    decode_seconds: float = 0.0
    cut_seconds: float = 0.0
    """CPU time that it took."""


class _Process:
    """One of the pool's processes."""

    def __init__(self) -> None:
        self.process: asyncio.subprocess.Process | None = None
        self.writer: asyncio.StreamWriter | None = None
        self.files: socket.socket | None = None
        """Where it gets descriptors of open files."""
        self.messages: asyncio.Queue[PieceThere | Done | None] = asyncio.Queue()
        self.blocks: set[int] = set()
        """In its hands: lent and not written to."""
        self.busy = False
        self.reading: asyncio.Task[None] | None = None

    def hang_up(self) -> None:
        """Close its sockets: it then ends by itself."""
        if self.writer is not None:
            self.writer.close()
        if self.files is not None:
            self.files.close()
        self.writer = self.files = None


class DecodePool:
    """Some processes and their memory. Used on one event loop alone; use as an async context manager."""

    def __init__(self, processes: int, pieces: int, rule: CutRule | None = None) -> None:
        """pieces: how many may be with the engine at once; some more are decoded ahead. rule: how to cut."""
        self._rule = rule or CutRule()
        self._block_samples = round((self._rule.before + self._rule.latest + self._rule.after + 2.0) * SAMPLE_RATE)
        self._count = pieces + (2 * BLOCKS_AHEAD + 2) * processes
        self._processes = [_Process() for _ in range(processes)]
        self._idle: asyncio.Queue[_Process] = asyncio.Queue()
        self._free: deque[int] = deque(range(self._count))
        self._memory = -1
        self._blocks: NDArray[np.float32] = np.zeros((0, 0), np.float32)
        self._closing = False

    async def __aenter__(self) -> "DecodePool":
        size = self._count * self._block_samples * 4
        self._memory = shared_memory(size)
        self._blocks = np.ndarray((self._count, self._block_samples), np.float32, mmap.mmap(self._memory, size))
        for process in self._processes:
            await self._start(process)
            self._idle.put_nowait(process)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._closing = True
        for process in self._processes:
            process.hang_up()
        for process in self._processes:
            if process.process is not None:
                try:
                    await asyncio.wait_for(process.process.wait(), STOP_SECONDS)
                except TimeoutError:
                    process.process.kill()
                    await process.process.wait()
            if process.reading is not None:
                await asyncio.gather(process.reading, return_exceptions=True)
        os.close(self._memory)

    @property
    def is_idle(self) -> bool:
        """Whether a process has no file."""
        return not self._idle.empty()

    async def pieces(self, source: str | int, selection: Selection, decoded: Decoded) -> AsyncGenerator[Piece, None]:
        """The pieces of a file, in order; each must be released. What is wrong with the file is in `decoded` at the end.

        source: a path, or the descriptor of an open file, which is read from its start whatever its position.
        Waits while every process has a file. Whoever stops early should close the generator.
        """
        process = await self._idle.get()
        process.busy = True
        try:
            if process.writer is None:
                await self._start(process)
            assert process.writer is not None
            if isinstance(source, int):
                assert process.files is not None
                socket.send_fds(process.files, [b"."], [source])  # one at a time fits the socket: this cannot wait
            process.writer.write(dump(Job(source if isinstance(source, str) else None, selection, self._rule)))
            self._lend(process)
            over = False
            try:
                while not over:
                    message = await process.messages.get()
                    over = not isinstance(message, PieceThere)
                    if isinstance(message, PieceThere):
                        process.blocks.discard(message.block)
                        self._lend(process)
                        yield self._piece(message)
                    elif isinstance(message, Done):
                        decoded.seconds, decoded.fault = message.seconds, message.fault
                        decoded.remarks, decoded.silence = message.remarks, message.silence
                        decoded.decode_seconds, decoded.cut_seconds = message.decode_seconds, message.cut_seconds
                    else:
                        status = await self._end(process, STOP_SECONDS)
                        decoded.fault = AudioError(f"the process that decodes it has ended ({status})")
            finally:
                if not over:
                    await self._end(process)  # it is in the middle of a file that nobody wants
        finally:
            process.busy = False
            self._idle.put_nowait(process)

    def _piece(self, message: PieceThere) -> Piece:
        pcm = self._blocks[message.block, : message.samples]
        return Piece(pcm, message.offset, message.start, message.end, partial(self._give_back, message.block))

    def _give_back(self, block: int) -> None:
        self._free.append(block)
        for process in self._processes:
            if process.busy:
                self._lend(process)

    def _lend(self, process: _Process) -> None:
        while self._free and process.writer is not None and len(process.blocks) < BLOCKS_AHEAD:
            block = self._free.popleft()
            process.blocks.add(block)
            process.writer.write(dump(block))

    # ---- processes ---------------------------------------------------------------------------------------------------

    async def _start(self, process: _Process) -> None:
        here, there = socket.socketpair()
        process.files, files = socket.socketpair()
        with there, files:
            # Not with -m: its messages would be of a module that is called __main__.
            command = ["-c", "from moshi_stt.audio.decode_worker import main; main()"]
            numbers = [there.fileno(), files.fileno(), self._memory, self._block_samples, self._count]
            process.process = await asyncio.create_subprocess_exec(
                sys.executable,
                *command,
                *map(str, numbers),
                pass_fds=(there.fileno(), files.fileno(), self._memory),
                stdin=asyncio.subprocess.DEVNULL,
            )
        reader, process.writer = await asyncio.open_connection(sock=here)
        process.messages = asyncio.Queue()
        process.reading = asyncio.create_task(self._read(reader, process.messages))

    async def _end(self, process: _Process, patience: float = 0.0) -> str:
        """End a process and take its blocks back, those of its last messages included. How it ended, in words.

        patience: seconds for one that is ending by itself. It is killed after them; sooner, the signal would take the status
        of a process that is dead already, and nobody would learn why it died.
        """
        assert process.process is not None
        assert process.reading is not None
        process.hang_up()
        try:
            status = await asyncio.wait_for(process.process.wait(), patience)
        except TimeoutError:
            with suppress(ProcessLookupError):
                process.process.kill()
            status = await process.process.wait()
        await asyncio.gather(process.reading, return_exceptions=True)
        while not process.messages.empty():
            if isinstance(message := process.messages.get_nowait(), PieceThere):
                process.blocks.add(message.block)
        self._free.extend(process.blocks)
        process.blocks.clear()
        return f"signal {-status}" if status < 0 else f"status {status}"

    async def _read(self, reader: asyncio.StreamReader, messages: "asyncio.Queue[PieceThere | Done | None]") -> None:
        """Every message, then None."""
        try:
            while True:
                (length,) = LENGTH.unpack(await reader.readexactly(LENGTH.size))
                message: Any = pickle.loads(await reader.readexactly(length))
                messages.put_nowait(message)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            messages.put_nowait(None)
