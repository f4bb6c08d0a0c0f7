"""What a stream says, as tagged structs. Knows nothing of engines, sockets or encodings.

Field names and their order are those of the wire (contract section 2.1). Times are seconds from the stream's first sample.
"""

import msgspec


class Event(msgspec.Struct, frozen=True, tag_field="type", tag=True, omit_defaults=True, gc=False):
    """Base of all events. Immutable."""


class Ready(Event, frozen=True, tag=True):
    """The stream has its slot and its state is fresh. Always the first event; comes again after a reset."""


class Step(Event, frozen=True, tag=True):
    """One model step of this stream.

    step_idx: grows by at least one from each `Step` to the next.
    prs: pause probability per head, each in [0, 1] (horizons 0.5, 1, 2 and 3 s).
    buffered_pcm: samples received and not yet stepped.
    """

    step_idx: int
    prs: tuple[float, ...]
    buffered_pcm: int


class Word(Event, frozen=True, tag=True):
    """A completed word.

    logprob: natural-log probability of the word's tokens, summed; None where the engine has none. Not on the default wire.
    """

    text: str
    start_time: float
    logprob: float | None = None


class EndWord(Event, frozen=True, tag=True):
    """When the most recent `Word` ended."""

    stop_time: float


class Marker(Event, frozen=True, tag=True):
    """Everything fed before `mark(id)` has been transcribed and sent."""

    id: int


class Error(Event, frozen=True, tag=True):
    """The stream ends here. `close_code` is for the socket's close frame and not on the wire."""

    message: str
    close_code: int | None = None


AnyEvent = Ready | Step | Word | EndWord | Marker | Error
