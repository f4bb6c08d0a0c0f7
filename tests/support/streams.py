"""Reading a stream in tests."""

from moshi_stt.engine.stream import Stream
from moshi_stt.events import AnyEvent


async def some(stream: Stream) -> list[AnyEvent]:
    """Every event that is there, waiting for at least one. An empty list means that the stream has ended."""
    async for event in stream:
        return [event, *stream.take()]
    return []
