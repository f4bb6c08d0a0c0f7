"""Where the CPU time of a run of `moshi-stt transcribe` goes: decode, cut, step, words and write.

The command's own functions are wrapped while `Stages` is entered, so that it is the command that is measured. Decoding and
cutting in other processes is what those processes say of themselves.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any
from unittest import mock

from moshi_stt.audio import decode_pool
from moshi_stt.cli import transcribe, transcribers
from moshi_stt.engine import recording


class Stages:
    """CPU seconds of each stage, of this process and of those that decode."""

    def __init__(self) -> None:
        self.wall = 0.0
        self._seconds = dict.fromkeys(("decode", "cut", "words", "write"), 0.0)
        self._lock = threading.Lock()
        self._elsewhere: list[decode_pool.Decoded] = []
        self._own = 0.0
        self._stack = ExitStack()

    def __enter__(self) -> "Stages":
        found = self._elsewhere

        class Counted(decode_pool.Decoded):
            def __init__(self) -> None:
                super().__init__()
                found.append(self)

        for target, name, stage in (
            (recording, "pair_words", "words"),
            (recording, "word_events", "words"),
            (recording.WordMerger, "add", "words"),
            (recording.WordMerger, "finish", "words"),
            (transcribe, "document", "words"),
            (transcribe, "write_whole", "write"),
            (transcribe.Manifest, "add", "write"),
        ):
            self._patch(target, name, self._timed(getattr(target, name), stage))
        self._patch(transcribers.Source, "audio", self._iterated(transcribers.Source.audio, "decode"))
        self._patch(recording, "cut_pieces", self._iterated(recording.cut_pieces, "cut", without="decode"))
        self._patch(decode_pool, "Decoded", Counted)
        self._own, self.wall = time.process_time(), time.monotonic()
        return self

    def __exit__(self, *_: object) -> None:
        self._own, self.wall = time.process_time() - self._own, time.monotonic() - self.wall
        self._stack.close()

    def _patch(self, target: Any, name: str, value: Any) -> None:
        self._stack.enter_context(mock.patch.object(target, name, value))

    def _add(self, stage: str, seconds: float) -> None:
        with self._lock:
            self._seconds[stage] += seconds

    def _timed(self, function: Callable[..., Any], stage: str) -> Callable[..., Any]:
        def timed(*arguments: Any, **named: Any) -> Any:
            begun = time.thread_time()
            try:
                return function(*arguments, **named)
            finally:
                self._add(stage, time.thread_time() - begun)

        return timed

    def _iterated(self, function: Callable[..., Iterator[Any]], stage: str, without: str = "") -> Callable[..., Iterator[Any]]:
        """without: a stage that this one drives in the same thread, whose time is not its own."""

        def iterated(*arguments: Any) -> Iterator[Any]:
            iterator = iter(function(*arguments))
            while True:
                begun, inner = time.thread_time(), self._seconds.get(without, 0.0)
                item = next(iterator, None)
                self._add(stage, time.thread_time() - begun - (self._seconds.get(without, 0.0) - inner))
                if item is None:
                    return
                yield item

        return iterated

    def result(self) -> dict[str, float]:
        """CPU seconds by stage, and the cores in use on average. What is none of the other stages is the step's."""
        inside = sum(self._seconds.values())
        elsewhere = sum(each.decode_seconds + each.cut_seconds for each in self._elsewhere)
        stages = self._seconds | {"step": self._own - inside}
        stages["decode"] += sum(each.decode_seconds for each in self._elsewhere)
        stages["cut"] += sum(each.cut_seconds for each in self._elsewhere)
        cores = (self._own + elsewhere) / self.wall
        return {f"cpu_s_{name}": seconds for name, seconds in stages.items()} | {"cores_in_use": cores}
