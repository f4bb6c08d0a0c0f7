"""What a stream says, as tagged structs.

Field names and their order are those of the wire (contract section 2.1). Times are seconds from the stream's first sample. The
second group comes only to a stream that asked for it (`StreamOptions`).
"""

import msgspec


class Event(msgspec.Struct, frozen=True, tag_field="type", tag=True, omit_defaults=True, gc=False):
    """Base of all events. Immutable."""


class Ready(Event, frozen=True, tag=True):
    """The stream has its slot and its state is fresh. Always the first event; comes again after a reset.

    token: names the stream for a client that may come back to it after a lost connection; None unless it asked for that.
    """

    token: str | None = None


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

    confidence: probability of the word's tokens, in [0, 1]; None unless asked for, or where the engine has none.
    """

    text: str
    start_time: float
    confidence: float | None = None


class EndWord(Event, frozen=True, tag=True):
    """When the most recent `Word` ended."""

    stop_time: float


class Marker(Event, frozen=True, tag=True):
    """Everything fed before the mark of this id has been transcribed and sent."""

    id: int


class Error(Event, frozen=True, tag=True):
    """The stream ends here. `close_code` is for the socket's close frame and not on the wire."""

    message: str
    close_code: int | None = None


# ---- on request ----------------------------------------------------------------------------------------------------------


class Interim(Event, frozen=True, tag=True):
    """What is heard so far and may still change: everything after the last `Word`. Replaced by the next `Interim` or `Word`."""

    text: str
    start_time: float


class SpeechStarted(Event, frozen=True, tag=True):
    """Somebody began to speak at `time`."""

    time: float


class EndOfTurn(Event, frozen=True, tag=True):
    """Whoever spoke has finished. confidence: in [0, 1]."""

    time: float
    confidence: float


class TurnResumed(Event, frozen=True, tag=True):
    """The `EndOfTurn` before this came too early: the same turn goes on."""

    time: float


class Ack(Event, frozen=True, tag=True):
    """So many samples have been taken since the stream's first: a client need not keep them to send them again."""

    samples: int


class Warning(Event, frozen=True, tag=True):  # noqa: A001 - the name is that of the wire
    """The stream goes on, but the client should know of something. code: a stable name; message: a sentence."""

    code: str
    message: str


# ---- inside the server ---------------------------------------------------------------------------------------------------


class Pause(Event, frozen=True, tag=True):
    """How far a stream is heard, and how long nobody has spoken. Once for each 80 ms of the client's audio, never merged.

    Comes to streams opened with `turns`, and is on no wire: sessions make turns of it (`engine/turns.py`).

    time: seconds of audio that the source has heard.
    settled: no word that starts before this many seconds comes any more.
    silence: seconds since somebody last spoke; 0.0 in speech, infinite before the first.
    heads: the model's pause probabilities, per horizon; empty where it has none.
    """

    time: float
    settled: float
    silence: float
    heads: tuple[float, ...] = ()


AnyEvent = (
    Ready | Step | Word | EndWord | Marker | Error | Interim | SpeechStarted | EndOfTurn | TurnResumed | Ack | Warning | Pause
)
