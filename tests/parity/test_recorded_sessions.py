"""The recorded sessions of moshi-server, played again over our socket on the same checkpoint, message for message.

Sent is what was sent, each message once the recorded answers to those before it are there. Received must be what was received:
every `Step` with its index and pauses, every word in its place among them. What may differ, and only there:

* F12: a word behind a word without a boundary starts later, and the first of them gets its end;
* F2, F3, F11: a marker comes as many of the stream's own frames later as `LATER` says, and words come before it.

Here a marker waits for the audio that follows, as the recorded ones did, however long that takes (`marker_wait_seconds`); the
last test is about the marker behind which nothing comes.
"""

import asyncio
import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support import recorded
from tests.support.raw_ws import TEXT, RawClient
from tests.support.recorded import Session
from tests.support.serving import Running, serving

from moshi_stt import protocol
from moshi_stt.config import KyutaiModule
from moshi_stt.config_load import parse_config
from moshi_stt.engine.batch import BatchEngine
from moshi_stt.engine.engine import EngineInfo
from moshi_stt.engine.loaded import LoadedModel
from moshi_stt.engine.slots import spare_slots
from moshi_stt.events import AnyEvent, EndWord, Marker, Ready, Step, Word
from moshi_stt.models.spec_tables import delay_frames, spec_from_module
from moshi_stt.models.torch_impl.build import load_backend
from moshi_stt.text.tokenizer import TextTokenizer
from moshi_stt.text.words import WordAssembler

STREAMS = 4
DEADLINE = 60.0

LATER = {
    ("one_message", 7): None,  # the partial frame counts (F3), and then the word under way outlasts the session
    ("marker_partial", 5): 1,  # F3
    ("two_streams", 9): 6,  # F2: it came back behind none of its stream's own frames
    ("marker_first", 2**63 - 1): 3,  # it does not split the word under way
    ("no_heads", 2): None,
    ("delay_15", 2): 2,  # the same
    ("conditioning_delay", 2): 4,  # the same
    ("unbatched", 3): None,  # the word under way outlasts the session
}
"""Frames between the recorded place of a marker and ours; None: not within the session. All others: the same place."""


def toml(tiny: Path, name: str) -> str:
    text = (tiny / "moshi-server.toml").read_text()
    if name == "no_heads":
        return text.partition("[modules.asr.model.extra_heads]")[0]
    if name == "delay_15":
        return text.replace("asr_delay_in_tokens = 6", "asr_delay_in_tokens = 15")
    if name == "conditioning_delay":
        return text.replace("asr_delay_in_tokens = 6", "asr_delay_in_tokens = 6\nconditioning_delay = 1.0")
    return text


@asynccontextmanager
async def server(tiny: Path, name: str, marker_wait: float = 600.0) -> AsyncIterator[Running]:
    """Our server on the configuration of a session. Batched moshi-server starts its downsampling from zeros (F13)."""
    module = parse_config(toml(tiny, name), name).config.modules[0]
    assert isinstance(module, KyutaiModule)

    def load() -> LoadedModel:
        spec = spec_from_module(module)
        files = Path(module.lm_model_file), Path(module.audio_tokenizer_file)
        zero = name != "unbatched"
        backend = load_backend(module, *files, spec, STREAMS + spare_slots(STREAMS), device="cpu", zero_start=zero)
        info = EngineInfo("batched_asr", name, "", (), "cpu", "f32", STREAMS)
        decode, delay = TextTokenizer(Path(module.text_tokenizer_file)).decode, delay_frames(module)
        return LoadedModel(backend, partial(WordAssembler, decode, delay), info, STREAMS, delay)

    engine = BatchEngine(load, marker_wait_seconds=marker_wait)
    async with serving(engine) as running:
        yield running


class Connection:
    """A client and what came to it."""

    def __init__(self, client: RawClient) -> None:
        self.client = client
        self.events: list[AnyEvent] = []
        self.expected_steps = 0
        self.changed = asyncio.Condition()
        self.reading = asyncio.create_task(self.read())

    async def read(self) -> None:
        while True:
            try:
                message = await self.client.receive_message()
            except (TimeoutError, asyncio.IncompleteReadError, AssertionError, OSError):
                return
            async with self.changed:
                self.events.append(recorded.event(message))
                self.changed.notify_all()

    async def until_steps(self, count: int) -> None:
        async with asyncio.timeout(DEADLINE), self.changed:
            await self.changed.wait_for(lambda: sum(isinstance(e, Step) for e in self.events) >= count)

    async def until_event(self, event: AnyEvent) -> None:
        async with asyncio.timeout(DEADLINE), self.changed:
            await self.changed.wait_for(lambda: event in self.events)

    async def close(self) -> None:
        self.reading.cancel()
        await asyncio.gather(self.reading, return_exceptions=True)
        await self.client.__aexit__()


async def play(running: Running, session: Session) -> dict[str, Connection]:
    """Do what the session's connections did."""
    connections: dict[str, Connection] = {}
    try:
        await _play(running, session, connections)
    finally:
        for connection in connections.values():
            await connection.close()
    return connections


async def _play(running: Running, session: Session, connections: dict[str, Connection]) -> None:
    for name, what, *args in session.log:
        if what == "open":
            connections[name] = Connection(await RawClient.connect(running.port))
            continue
        connection = connections[name]
        if what == "send":
            for other in connections.values():
                await other.until_steps(other.expected_steps)
            send(connection.client, session, *args)
        elif what == "recv":
            connection.expected_steps += isinstance(recorded.event(bytes.fromhex(args[0])), Step)
        elif what == "close":
            await settle(connection, session, name)
            await connection.close()


def send(client: RawClient, session: Session, kind: str, *args: Any) -> None:
    if kind == "audio":
        client.audio(session.pcm[args[0] : args[0] + args[1]])
    elif kind == "zeros":
        client.silence(args[0])
    elif kind == "marker":
        client.marker(args[0])
    elif kind == "init":
        client.send(protocol.encode_init())
    else:
        client.send(args[0].encode(), TEXT)


async def settle(connection: Connection, session: Session, name: str) -> None:
    """Wait for all that was recorded of a connection, and that is to come here."""
    await connection.until_steps(connection.expected_steps)
    theirs = session.events(name)
    for event in theirs:
        if isinstance(event, Marker) and LATER.get((session.name, event.id), 0) is not None:
            await connection.until_event(event)
    words = sum(isinstance(e, Word) for e in theirs)
    async with asyncio.timeout(DEADLINE), connection.changed:
        await connection.changed.wait_for(lambda: sum(isinstance(e, Word) for e in connection.events) >= words)


def places(events: list[AnyEvent]) -> list[tuple[int, str]]:
    """Each word with the number of steps before it."""
    steps, found = 0, []
    for event in events:
        steps += isinstance(event, Step)
        if isinstance(event, Word):
            found.append((steps, event.text))
    return found


def marker_places(events: list[AnyEvent]) -> dict[int, int]:
    """Each marker with the number of steps before it."""
    before = list(itertools.accumulate(isinstance(e, Step) for e in events))
    return {event.id: steps for event, steps in zip(events, before, strict=True) if isinstance(event, Marker)}


def split(events: list[AnyEvent]) -> list[list[AnyEvent]]:
    """At each `Ready`, where times begin at 0 again."""
    starts = [i for i, e in enumerate(events) if e == Ready()] or [0]
    return [events[start:end] for start, end in itertools.pairwise([*starts, len(events)])]


def compare(session: Session, name: str, ours: list[AnyEvent]) -> None:
    """Ours against theirs; where ours go on behind theirs, that is the moment at which each stopped reading."""
    theirs = session.events(name)
    if session.name != "unbatched":
        assert ours[0] == Ready()
        assert sum(e == Ready() for e in ours) == sum(e == Ready() for e in theirs)
    their_steps, our_steps = ([e for e in events if isinstance(e, Step)] for events in (theirs, ours))
    assert len(our_steps) == len(their_steps)
    if their_steps:
        np.testing.assert_allclose([s.prs for s in our_steps], [s.prs for s in their_steps], atol=1e-5)
    if session.name not in ("unbatched", "slot_reused"):
        assert [s.step_idx for s in our_steps] == [s.step_idx for s in their_steps]
    if session.name not in ("one_message", "small_chunks"):  # there it depends on how messages meet steps
        assert {s.buffered_pcm for s in our_steps} == {s.buffered_pcm for s in their_steps}
    for part in zip(split(theirs), split(ours), strict=True):
        recorded.assert_same_words(*part)
    assert places(ours)[: len(places(theirs))] == places(theirs)
    ours_at = marker_places(ours)
    for mark, at in marker_places(theirs).items():
        later = LATER.get((session.name, mark), 0)
        assert ours_at.get(mark) == (at + later if later is not None else None), f"marker {mark}: {at} steps there"
    for part in split(ours):
        kinds = [type(e) for e in part if isinstance(e, Word | EndWord)]
        assert kinds == [Word, EndWord] * (len(kinds) // 2) + [Word] * (len(kinds) % 2)


SESSIONS = """unbatched words delay_15 conditioning_delay init_midway slot_reused small_chunks one_message
    marker_alone marker_first marker_partial two_streams text_frame"""


@pytest.mark.parametrize("name", SESSIONS.split())
async def test_session(tiny: Path, shared: Path, name: str) -> None:
    session = recorded.load(shared / "goldens" / "recorded", name)
    async with server(tiny, name) as running:
        for connection, played in (await play(running, session)).items():
            compare(session, connection, played.events)


async def test_session_without_heads(tiny: Path, shared: Path) -> None:
    """No `Step` ever; the words, and none lost to the marker."""
    session = recorded.load(shared / "goldens" / "recorded", "no_heads")
    async with server(tiny, "no_heads") as running:
        (played,) = (await play(running, session)).values()
    assert not any(isinstance(e, Step) for e in played.events)
    recorded.assert_same_words(session.events(), played.events)


async def test_marker_behind_which_nothing_comes(tiny: Path, shared: Path) -> None:
    """`marker_alone` as it was not with moshi-server: the answer comes in the quiet (F3), and the words that silence would
    have brought come before it. The silence that the client sends afterwards changes nothing and doubles nothing."""
    session = recorded.load(shared / "goldens" / "recorded", "marker_alone")
    theirs = session.events()
    async with server(tiny, "marker_alone", marker_wait=0.05) as running:
        connection = Connection(await RawClient.connect(running.port))
        for _, what, *args in session.log:
            if what == "send":
                await connection.until_steps(connection.expected_steps)
                send(connection.client, session, *args)
                if args[0] == "marker":
                    await connection.until_event(Marker(1))
                    answered = list(connection.events)
            elif what == "recv":
                connection.expected_steps += isinstance(recorded.event(bytes.fromhex(args[0])), Step)
        await connection.until_steps(connection.expected_steps)
        await connection.close()
    assert [text for _, text in places(answered)] == [text for _, text in places(theirs)]
    assert sum(isinstance(e, Step) for e in answered) == 20
    recorded.assert_same_words(theirs, connection.events)
    assert places(connection.events) == places(answered)
    np.testing.assert_allclose(
        [e.prs for e in connection.events if isinstance(e, Step)], [e.prs for e in theirs if isinstance(e, Step)], atol=1e-5
    )
