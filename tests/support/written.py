"""Recordings that have their words written into their samples, and an engine that reads them. Knows no model."""

import random
from itertools import pairwise

import numpy as np

from moshi_stt.constants import SAMPLE_RATE
from moshi_stt.engine.commands import Audio, Finish, Mark
from moshi_stt.engine.engine import NO_EXTRAS, Engine, EngineInfo, StreamOptions
from moshi_stt.engine.stream import Stream, StreamLimits
from moshi_stt.errors import NoFreeSlot
from moshi_stt.events import EndWord, Marker, Ready, Word


def written(times: list[tuple[float, float]], seconds: float) -> np.ndarray:
    """A recording whose n-th word is a stretch of samples of value (n + 1) / 1000."""
    pcm = np.zeros(round(seconds * SAMPLE_RATE), np.float32)
    for number, (start, end) in enumerate(times):
        pcm[round(start * SAMPLE_RATE) : round(end * SAMPLE_RATE)] = (number + 1) / 1_000
    return pcm


class Reader(Engine):
    """Reads what `written` wrote, and mis-hears a word that its stream does not hold whole. Times may be off."""

    def __init__(
        self,
        slots: int = 3,
        jitter_seconds: float = 0.0,
        fail_on: int | None = None,
        wait_for_all: bool = False,
        files_only: bool = True,
        prefix_silence_seconds: float = 0.0,
    ) -> None:
        super().__init__()
        self.info = EngineInfo("batched_asr", "reader", "", ("en",), "cpu", "float32", slots, prefix_silence_seconds)
        self._jitter = jitter_seconds
        self._random = random.Random(0)
        self._open: set[Stream] = set()
        self._fail_on = fail_on
        self._wait_for_all = wait_for_all
        self._files_only = files_only
        self._finished: list[Stream] = []
        self._heard: dict[Stream, list[np.ndarray]] = {}
        self.streams = 0
        self.samples: list[int] = []
        """How many each finished stream brought."""
        self.read: list[np.ndarray] = []
        """What each marker stood behind, from its stream's start."""
        self._ends = 0

    async def start(self) -> None: ...

    async def stop(self) -> None: ...

    @property
    def ready(self) -> bool:
        return True

    @property
    def used_slots(self) -> int:
        return len(self._open)

    @property
    def queued_samples(self) -> int:
        return 0

    def open(self, *, live: bool = True, options: StreamOptions = NO_EXTRAS) -> Stream:
        assert not (live and self._files_only)
        if len(self._open) >= self.total_slots:
            raise NoFreeSlot
        stream = Stream(StreamLimits(), live=live, wake=self._work, release=self._release)
        self._open.add(stream)
        self._heard[stream] = []
        self.streams += 1
        stream.deliver([Ready()])
        return stream

    def _release(self, stream: Stream) -> None:
        self._open.discard(stream)
        self._heard.pop(stream, None)
        self._announce_free_slot()

    def _work(self, stream: Stream) -> None:
        for command in stream.drain():
            if isinstance(command, Audio):
                self._heard[stream].append(command.samples)
                stream.stepped(len(command.samples))
            elif isinstance(command, Mark):
                pcm = np.concatenate([np.zeros(0, np.float32), *self._heard[stream]])
                self.read.append(pcm)
                stream.deliver([*self._read(pcm), Marker(command.id)])
            elif isinstance(command, Finish):
                self._ends += 1
                self.samples.append(sum(map(len, self._heard[stream])))
                if self._ends == self._fail_on:
                    stream.fail("the model step failed")
                    continue
                self._finished.append(stream)
                if self._wait_for_all and len(self._finished) < self.total_slots:
                    continue
                self._wait_for_all = False
                for finished in self._finished:
                    pcm = np.concatenate([np.zeros(0, np.float32), *self._heard[finished]])
                    finished.deliver(self._read(pcm), ended=True)
                self._finished = []

    def _read(self, pcm: np.ndarray) -> list[Word | EndWord]:
        events: list[Word | EndWord] = []
        edges = np.flatnonzero(np.diff(np.concatenate([[0], pcm, [0]])))
        for start, end in pairwise(edges):
            value = round(float(pcm[start]) * 1_000)
            if value:
                whole = start > 0 and end < len(pcm)
                off = self._random.uniform(-self._jitter, self._jitter)
                events.append(Word(f"w{value - 1}" if whole else "misheard", start / SAMPLE_RATE + off))
                events.append(EndWord(end / SAMPLE_RATE + off))
        return events
