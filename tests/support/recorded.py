"""The recorded sessions of moshi-server, read for tests. Knows no engine.

A session is what each connection sent and received, in order; see the README beside the recordings.
"""

import json
import wave
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
from numpy.typing import NDArray

from moshi_stt.events import AnyEvent, EndWord, Error, Marker, Ready, Step, Word

MAKE = {
    "Ready": lambda m: Ready(),
    "Step": lambda m: Step(m["step_idx"], tuple(m["prs"]), m["buffered_pcm"]),
    "Word": lambda m: Word(m["text"], m["start_time"]),
    "EndWord": lambda m: EndWord(m["stop_time"]),
    "Marker": lambda m: Marker(m["id"]),
    "Error": lambda m: Error(m["message"]),
}


def event(message: bytes) -> AnyEvent:
    """A wire message as an event."""
    fields: dict[str, Any] = msgpack.unpackb(message)
    made: AnyEvent = MAKE[fields["type"]](fields)
    return made


@dataclass(frozen=True)
class Session:
    """log: [connection, what, …] as recorded."""

    name: str
    about: str
    log: list[list[Any]]
    pcm: NDArray[np.float32]

    def events(self, connection: str = "a") -> list[AnyEvent]:
        """What a connection received, in order."""
        return [event(bytes.fromhex(entry[2])) for entry in self.log if entry[:2] == [connection, "recv"]]

    def words(self, connection: str = "a") -> list[AnyEvent]:
        """Its words and their ends."""
        return [e for e in self.events(connection) if isinstance(e, Word | EndWord)]

    def sent(self, connection: str = "a") -> Iterator[tuple[str, Any]]:
        """What a connection sent: ("audio", float32 samples), ("marker", id) or ("init", None)."""
        for entry in self.log:
            if entry[:2] != [connection, "send"]:
                continue
            kind, *args = entry[2:]
            if kind == "audio":
                yield "audio", self.pcm[args[0] : args[0] + args[1]]
            elif kind == "zeros":
                yield "audio", np.zeros(args[0], np.float32)
            else:
                yield kind, args[0] if args else None


def load(folder: Path, name: str) -> Session:
    """Session `name` of the folder with the recordings."""
    data = json.loads((folder / f"{name}.json").read_text())
    with wave.open(str(folder / data["pcm"])) as file:
        pcm = np.frombuffer(file.readframes(file.getnframes()), np.int16).astype(np.float32) / 32768
    return Session(name, data["about"], data["log"], pcm)


def tokens(folder: Path, name: str) -> list[int]:
    """The text token of each step: `tiny_batched`, `tiny_asr` or `1b_batched`. Element n is that of step n, from 0."""
    with np.load(folder / "tokens.npz") as file:
        row: list[int] = file[f"{name}_text_in"][1:].tolist()
    return row


def assert_same_words(theirs: Sequence[object], ours: Sequence[object]) -> None:
    """Ours begin with theirs, flaw F12 mended: the same texts and ends, the same starts but where theirs repeats one."""
    their_words, our_words = ([e for e in events if isinstance(e, Word)] for events in (theirs, ours))
    assert [w.text for w in our_words[: len(their_words)]] == [w.text for w in their_words]
    previous = -1.0
    for their, our in zip(their_words, our_words, strict=False):
        if their.start_time == previous:
            assert our.start_time > their.start_time, "two words that start together"
        else:
            assert our.start_time == their.start_time
        previous = their.start_time
    their_ends = {e.stop_time for e in theirs if isinstance(e, EndWord)}
    assert their_ends <= {e.stop_time for e in ours if isinstance(e, EndWord)}
