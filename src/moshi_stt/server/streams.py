"""The streams of one connection: usually one, several where the protocol has channels."""

from collections.abc import Callable

from moshi_stt.engine.commands import Command, Finish
from moshi_stt.engine.engine import Engine, StreamOptions
from moshi_stt.engine.stream import Stream
from moshi_stt.events import AnyEvent


class StreamSet:
    """All are open, or none."""

    def __init__(self, engine: Engine, channels: int, options: StreamOptions) -> None:
        self._engine = engine
        self._channels = channels
        self._options = options
        self._streams: list[Stream] = []
        self._finishing: set[int] = set()
        self.first: Stream | None = None
        """Stream 0 while it is open and takes commands."""

    def open(self, on_events: Callable[[], None], on_room: Callable[[], None]) -> None:
        """Take the slots. Raises NoFreeSlot or EngineError, and has taken none then."""
        try:
            for _ in range(self._channels):
                self._streams.append(self._engine.open(live=True, options=self._options))
        except BaseException:
            self.close()
            raise
        for stream in self._streams:
            stream.listen(on_events, on_room)
        self.first = self._streams[0]

    @property
    def is_open(self) -> bool:
        return bool(self._streams)

    @property
    def finishing(self) -> bool:
        """Whether every stream has been asked to finish."""
        return bool(self._streams) and len(self._finishing) == len(self._streams)

    @property
    def ended(self) -> bool:
        """Whether `take` has had the last event of all."""
        streams = self._streams
        return streams[0].ended if len(streams) == 1 else all(stream.ended for stream in streams)

    @property
    def pending_samples(self) -> int:
        """Samples that wait for a step."""
        return sum(stream.pending_samples for stream in self._streams)

    def offer(self, command: Command, channel: int = 0) -> Command | None:
        """Returns what found no room. Raises EngineError after `Finish`, IndexError for a channel that is not there."""
        if type(command) is Finish:
            self._finishing.add(channel)
            if channel == 0:
                self.first = None
        return self._streams[channel].offer(command)

    def finish(self) -> None:
        """Let every stream finish."""
        for channel in range(len(self._streams)):
            self.offer(Finish(), channel)

    def take(self) -> list[tuple[int, list[AnyEvent]]]:
        """Every event that is there, by channel."""
        if len(self._streams) == 1:
            return [(0, self._streams[0].take())]
        return [(channel, stream.take()) for channel, stream in enumerate(self._streams)]

    def close(self) -> None:
        """Free the slots. Idempotent."""
        streams, self._streams, self.first = self._streams, [], None
        self._finishing.clear()
        for stream in streams:
            stream.close()
