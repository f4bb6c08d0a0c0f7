"""What every engine tells of pauses to a stream that asked for turns, and what the native protocol makes of it."""

import asyncio

import aiohttp
import msgpack
import numpy as np
from tests.support.engines import Kind, SegmentKind, speech
from tests.support.serving import KEY, serving

from moshi_stt import protocol
from moshi_stt.constants import FRAME_SAMPLES, FRAME_SECONDS
from moshi_stt.engine.commands import Audio, Finish
from moshi_stt.engine.engine import StreamOptions
from moshi_stt.events import AnyEvent, Pause, Word

NUMBERS = [3, 9, 20]
DEADLINE = 60.0


async def events_of(kind: Kind, *, turns: bool) -> tuple[list[AnyEvent], int]:
    """A stream's events, of words and four seconds of silence; and how many samples those are."""
    pcm = np.concatenate([speech(NUMBERS), np.zeros(4 * 24_000, np.float32)])
    engine = kind.make()
    await engine.start()
    try:
        stream = engine.open(options=StreamOptions(turns=turns))

        async def send() -> None:
            for start in range(0, len(pcm), 1_000):
                await stream.send(Audio(pcm[start : start + 1_000]))
            await stream.send(Finish())

        sending = asyncio.create_task(send())
        async with asyncio.timeout(DEADLINE):
            events = [event async for event in stream]
        await sending
        stream.close()
        return events, len(pcm)
    finally:
        await engine.stop()


async def test_a_pause_for_each_frame_of_the_clients_audio_and_settled_words_before_it(kind: Kind) -> None:
    events, samples = await events_of(kind, turns=True)
    pauses = [event for event in events if type(event) is Pause]
    assert [pause.time for pause in pauses] == [round((n + 1) * FRAME_SECONDS, 3) for n in range(samples // FRAME_SAMPLES)]
    settled = 0.0
    for event in events:
        if type(event) is Pause:
            assert settled <= event.settled + 1e-9
            assert event.settled <= event.time + 1e-9
            assert event.silence >= 0
            settled = event.settled
        elif type(event) is Word and not kind.exact:  # random weights put words where no boundary is
            assert event.start_time >= settled - 0.41  # what a recogniser takes as the lead of speech


async def test_nothing_of_it_comes_unasked(kind: Kind) -> None:
    events, _ = await events_of(kind, turns=False)
    assert not [event for event in events if type(event) is Pause]


async def test_turns_on_the_native_socket(kind: Kind) -> None:
    """On request alone; never a `Pause`; an end of turn comes after the words of the turn."""
    pcm = np.concatenate([speech(NUMBERS), np.zeros(4 * 24_000, np.float32)])
    async with serving(kind.make()) as running, aiohttp.ClientSession() as http:
        for query, names in (("", set()), ("?turns=1", {"SpeechStarted", "EndOfTurn"})):
            url, headers = running.ws + query, {"kyutai-api-key": KEY}
            async with asyncio.timeout(DEADLINE), http.ws_connect(url, headers=headers) as socket:
                await socket.send_bytes(protocol.encode_audio(pcm))
                await socket.send_bytes(protocol.encode_marker(1))
                kinds = []
                async for message in socket:
                    event = msgpack.unpackb(message.data)
                    kinds.append(event["type"])
                    if event["type"] == "Marker":
                        break
            told = {"SpeechStarted", "EndOfTurn", "Pause"} & set(kinds)
            assert told == names if isinstance(kind, SegmentKind) else told <= names, (
                kinds
            )  # the others' pause heads are random
            if "EndOfTurn" in kinds:
                assert kinds.index("SpeechStarted") < kinds.index("EndOfTurn")
