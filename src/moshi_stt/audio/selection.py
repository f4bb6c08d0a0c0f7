"""What of an audio file is wanted."""

from dataclasses import dataclass
from typing import Final, Literal

Channels = Literal["mix", "split"] | int


def read_channels(text: str) -> Channels:
    """`mix`, `split` or the number of a channel from 1, as people write it. Raises ValueError."""
    if text == "mix":
        return "mix"
    if text == "split":
        return "split"
    return read_number(text)


def read_number(text: str) -> int:
    """A number from 1. Raises ValueError."""
    if not text.isdecimal() or not 0 < int(text) < 1_000:
        raise ValueError(f"{text!r}: expected a number from 1")
    return int(text)


@dataclass(frozen=True)
class Selection:
    """What of a file is wanted.

    track: which of its audio tracks, from 1; None takes the one that players take. channels: "mix" makes one of them such that
    no voice is lost, a number takes one of them, from 1, and "split" keeps each by itself.
    """

    track: int | None = None
    channels: Channels = "mix"


MIXED: Final = Selection()
"""The usual: the track that players take, its channels mixed."""
