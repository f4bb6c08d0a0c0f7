"""One connection: messages in, actions out; events in, messages out. Knows no socket, no engine and no clock.

`Protocol` is what the socket code needs of any protocol's connection; `Session` is the default wire's.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from moshi_stt import protocol
from moshi_stt.audio.opus import OpusStream
from moshi_stt.audio.watch import AudioWatch
from moshi_stt.constants import FRAME_SAMPLES
from moshi_stt.engine.commands import Audio, Command, Mark, Reset
from moshi_stt.errors import AudioError, ProtocolError
from moshi_stt.events import AnyEvent, Word

LOUDEST = float(1 << 31)
"""No sample format has larger values: beyond it, as for NaN and inf, a sample is taken for 0."""


Action = Command

MessageT = TypeVar("MessageT", bytes, str, bytes | str)


class Protocol(ABC, Generic[MessageT]):
    """What a connection's protocol gives to the socket code, which moves bytes and drives the stream.

    The socket code hands each message to `receive` and carries the actions out on the connection's stream, in order and all
    of them before the next call; hands each of the stream's events to `send` and puts what it returns on the socket; and at
    the client's end of input carries out `end_of_input`, then finishes the stream. After a ProtocolError it calls neither
    again: it finishes the stream, sends what still comes of it, then `send(Error(...))`, and closes with the error's code.
    """

    @abstractmethod
    def receive(self, message: MessageT) -> Iterable[Action]:
        """What one message of the client asks for.

        Iterating may do the work bit by bit, so that the caller can let others run in between. Raises ProtocolError, also
        from within the iteration and then behind what was good.
        """

    @abstractmethod
    def end_of_input(self) -> Iterable[Action]:
        """What is still to do when the client will send no more. Raises ProtocolError like `receive`."""

    @abstractmethod
    def send(self, event: AnyEvent) -> Sequence[MessageT]:
        """The messages that tell the client of an event: none, one or several."""

    @abstractmethod
    def warnings(self, waiting_samples: int) -> list[str]:
        """What is new to be said, in the log, about the audio that came. Each thing is said once a connection.

        waiting_samples: audio that the stream holds and has not transcribed.
        """


class Session(Protocol[bytes]):
    """A connection of the default wire: MessagePack over binary WebSocket messages (docs/protocol.md)."""

    def __init__(self) -> None:
        self.silenced_samples = 0
        """Samples that were NaN, infinite or beyond `LOUDEST`, and were taken for 0."""
        self._opus: OpusStream | None = None
        self._watch = AudioWatch()
        self._news: list[str] = []
        self._has_words = False

    def receive(self, message: bytes) -> Iterable[Action]:
        inbound = protocol.decode(message)
        if type(inbound) is protocol.Audio:
            return (self._feed(inbound.pcm),)
        if type(inbound) is protocol.OggOpus:
            return self._decode_opus(inbound.data)
        if type(inbound) is protocol.MarkerRequest:
            return (Mark(inbound.id),)
        return (Reset(),)

    def end_of_input(self) -> Iterable[Action]:
        if self._opus is None:
            return
        try:
            pcm = self._opus.finish()
        except AudioError as error:
            raise ProtocolError(f"OggOpus: {error}", protocol.MALFORMED) from None
        if len(pcm):
            yield self._feed(pcm)

    def send(self, event: AnyEvent) -> Sequence[bytes]:
        if type(event) is Word:
            self._has_words = True
        return (protocol.encode(event),)

    def warnings(self, waiting_samples: int) -> list[str]:
        news, self._news = self._news, []
        if not self._has_words and waiting_samples < 2 * FRAME_SAMPLES:
            news += self._watch.without_words()
        return news

    def _decode_opus(self, data: bytes) -> Iterator[Action]:
        """About a second of audio at a time. The decoder lives as long as the connection, whatever comes between."""
        if self._opus is None:
            self._opus = OpusStream()
        try:
            for pcm in self._opus.pieces(data):
                yield self._feed(pcm)
        except AudioError as error:
            raise ProtocolError(f"OggOpus: {error}", protocol.MALFORMED) from None

    def _feed(self, pcm: NDArray[np.float32]) -> Audio:
        with np.errstate(all="ignore"):
            energy = float(np.dot(pcm, pcm))
        if not energy <= LOUDEST * LOUDEST:  # neither is NaN
            self._silence(pcm)
        self._news += self._watch.feed(pcm)
        return Audio(pcm)

    def _silence(self, pcm: NDArray[np.float32]) -> None:
        """Set to 0, in place, what is no sample: it would make the stream's state NaN for good."""
        bad = ~(np.abs(pcm) <= LOUDEST)
        count = int(np.count_nonzero(bad))
        pcm[bad] = 0
        if count and not self.silenced_samples:
            self._news.append(f"{count} of {len(pcm)} samples are NaN, infinite or beyond ±2^31: such samples are taken for 0")
        self.silenced_samples += count
