"""A connection of OpenAI's Realtime transcription, without I/O.

The audio is cut into items, one after the other without a gap: item k has the words that start between cut k-1 and cut k. A cut
is made by the client (`commit`, `clear`) or by the end of a turn; the item's text is complete when the stream is settled up
to its cut. Deltas carry settled words alone, so nothing is ever taken back.
"""

import base64
import binascii
import itertools
import math
import uuid
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec

from moshi_stt.audio.live import PcmInput, Pieces
from moshi_stt.constants import FRAME_SECONDS, SAMPLE_RATE
from moshi_stt.engine.commands import Audio, Mark
from moshi_stt.engine.engine import EngineInfo
from moshi_stt.engine.turns import TurnDetector, TurnSettings
from moshi_stt.events import AnyEvent, EndWord, Error, Marker, Pause, Word
from moshi_stt.server.doors.heard import Heard
from moshi_stt.server.doors.openai_config import Json, RealtimeConfig
from moshi_stt.server.doors.openai_models import BadOption, error_object
from moshi_stt.server.doors.options import report_ignored
from moshi_stt.session import Action, Close, Message, Reply, Session
from moshi_stt.text.subtitles import TimedWord
from moshi_stt.text.word_lists import NO_LISTS, WordFilter, WordLists

SHORTEST_COMMIT_SECONDS: Final = 0.1
STALLED_SECONDS: Final = 0.3
"""When a cut waits for its text and no audio came for so long, a marker asks for it."""
_NOT_HERE: Final = ("conversation.item.", "response.", "output_audio_buffer.")


@dataclass
class _Item:
    """A stretch of audio and its text. cut: where it ends, in seconds; None while it is open."""

    id: str | None = None
    started: bool = False
    """Whether `speech_started` was sent."""
    cut: float | None = None
    marker: int | None = None
    dropped: bool = False
    """Cleared by the client: its words go nowhere."""
    start: float = 0.0
    text: str = ""
    logprobs: list[Json] = field(default_factory=list)


class RealtimeSession(Session):
    """See the module's docstring. model: the default; modules: what is loaded."""

    may_idle = True

    def __init__(
        self,
        model: str,
        modules: Mapping[str, EngineInfo],
        *,
        beta: bool = False,
        transcription_created: bool = False,
        lists: WordLists = NO_LISTS,
        peer: str = "",
    ) -> None:
        self.config = RealtimeConfig(model, modules, beta=beta)
        self._peer = peer
        self._created = "transcription_session.created" if beta and transcription_created else "session.created"
        self._beta_update = False
        self._input = PcmInput(self.config.format)
        self._heard = Heard()
        self._filter = WordFilter(lists)
        self._detector = TurnDetector(TurnSettings(threshold=2.0, timeout_seconds=math.inf))
        self._items: deque[_Item] = deque([_Item()])
        """The last one is open; the others wait for the rest of their text."""
        self._previous: str | None = None
        self._fed = 0
        self._pending_seconds = 0.0
        """Audio appended since the last commit or clear, by its bytes."""
        self._markers = itertools.count(1)
        self._event_ids = itertools.count(1)
        self._stalled: tuple[int, float] | None = None

    # ---- from the client ---------------------------------------------------------------------------------------------

    def opened(self) -> Iterable[Action]:
        return [self._reply(self._created, session=self.config.shown())]

    def receive(self, message: Message) -> Iterable[Action]:
        if isinstance(message, bytes):
            return [
                self._error("invalid_event", "binary messages are not taken: send audio in input_audio_buffer.append", None)
            ]
        try:
            event = msgspec.json.decode(message)
        except (msgspec.MsgspecError, RecursionError):
            return [self._error("invalid_json", "the message is not valid JSON", None)]
        if not isinstance(event, dict) or not isinstance(event.get("type"), str):
            return [self._error("invalid_event", "an event is an object with a `type`", "type")]
        kind = event["type"]
        client_id = event.get("event_id") if isinstance(event.get("event_id"), str) else None
        if kind == "input_audio_buffer.append":
            return self._append(event.get("audio"), client_id)
        if kind in ("session.update", "transcription_session.update"):
            return self._update(kind, event.get("session"), client_id)
        if kind == "input_audio_buffer.commit":
            return self._commit(client_id)
        if kind == "input_audio_buffer.clear":
            return self._clear()
        if kind.startswith(_NOT_HERE):
            return [
                self._error("unsupported_event", f"{kind[:60]} is not supported: this server transcribes", "type", client_id)
            ]
        return [self._error("invalid_value", f"type {kind[:60]!r} is not known", "type", client_id)]

    def end_of_input(self) -> Iterable[Action]:
        return ()

    def tick(self, now: float) -> Iterable[Action]:
        waiting = self._items[0]
        if waiting.cut is None or waiting.marker is not None or waiting.dropped:
            self._stalled = None
            return ()
        if self._stalled is None or self._stalled[0] != self._fed:
            self._stalled = (self._fed, now)
            return ()
        return self._mark(waiting) if now - self._stalled[1] >= STALLED_SECONDS else ()

    def _append(self, audio: object, client_id: str | None) -> Iterator[Action]:
        try:
            if not isinstance(audio, str):
                raise ValueError("no text")
            data = base64.b64decode(audio, validate=True)
        except (binascii.Error, ValueError):
            yield self._error("invalid_value", "`audio` must be base64 text", "audio", client_id)
            return
        self._pending_seconds += len(data) / self._input.format.bytes_per_second
        for pieces in self._input.feed(data):
            yield from self._give(pieces)

    def _give(self, pieces: Pieces) -> Iterator[Action]:
        for samples in pieces:
            if len(samples):
                self._fed += len(samples)
                yield Audio(samples)

    def _update(self, kind: str, change: object, client_id: str | None) -> Iterator[Action]:
        before = self.config.format
        try:
            ignored = self.config.update(change)
        except BadOption as error:
            yield self._error(error.code, str(error), error.param, client_id)
            return
        report_ignored("openai-realtime", self._peer, ignored)
        if self.config.format != before:
            yield from self._give(self._input.flush())
            self._input = PcmInput(self.config.format)
        answer = "transcription_session.updated" if self.config.beta and kind.startswith("transcription") else "session.updated"
        yield self._reply(answer, session=self.config.shown())

    def _commit(self, client_id: str | None) -> Iterator[Action]:
        if self._pending_seconds < SHORTEST_COMMIT_SECONDS - 1e-9:
            milliseconds = round(self._pending_seconds * 1000)
            message = (
                f"Nothing to commit: {milliseconds} ms of audio buffered, {round(SHORTEST_COMMIT_SECONDS * 1000)} ms needed"
            )
            yield self._error("input_audio_buffer_commit_empty", message, None, client_id)
            return
        yield from self._give(self._input.flush())
        item = self._items[-1]
        for text in self._close_item(item, self._fed / SAMPLE_RATE):
            yield Reply(text)
        yield from self._mark(item)

    def _clear(self) -> Iterator[Action]:
        yield from self._give(self._input.flush())
        item = self._items[-1]
        item.dropped = True
        self._cut(item, self._fed / SAMPLE_RATE)
        yield self._reply("input_audio_buffer.cleared")

    def _mark(self, item: _Item) -> Iterator[Action]:
        yield from self._give(self._input.flush())
        item.marker = next(self._markers)
        yield Mark(item.marker)

    # ---- to the client -----------------------------------------------------------------------------------------------

    def send(self, event: AnyEvent, channel: int = 0) -> Sequence[Message]:
        if type(event) is Error:
            return [
                *self._failures(event),
                self._message("error", error=error_object(event.message, "server_error", "server_error")),
            ]
        self._heard.take(event)
        if type(event) is Word:
            self._detector.word(event)
            return ()
        if type(event) is EndWord:
            self._detector.end_word(event)
            return [*self._words()]
        if type(event) is Marker:
            return [*self._words(), *self._answered(event.id)]
        if type(event) is Pause:
            self._detector.pause(event)
            return [*self._words(), *self._turn(event), *self._complete()]
        return ()

    def close(self, error: Error | None) -> Close:
        if error is None:
            return Close(1000)
        return Close(1011 if error.close_code is None else error.close_code, error.message)

    def _words(self) -> Iterator[Message]:
        """Deltas of the words that wait."""
        while self._heard.words:
            for word in self._filter.push(self._heard.words.popleft()):
                yield from self._delta(word)

    def _delta(self, word: TimedWord) -> Iterator[Message]:
        item = next(each for each in self._items if self._takes(each, word))
        if item.dropped or not word.text.strip():
            return
        if item.cut is None:
            yield from self._start(item, word.start)
        piece = f" {word.text}" if item.text else word.text
        item.text += piece
        more: Json = {}
        if self.config.logprobs and word.logprob is not None:
            shown = {"token": piece, "logprob": round(word.logprob, 4), "bytes": list(piece.encode())}
            item.logprobs.append(shown)
            more["logprobs"] = [shown]
        yield self._message(
            "conversation.item.input_audio_transcription.delta", item_id=self._id(item), content_index=0, delta=piece, **more
        )

    def _takes(self, item: _Item, word: TimedWord) -> bool:
        """Whether a word belongs to an item, all earlier ones excepted.

        An engine may place the last word of a cut a little after it; as long as no later audio came, it is of that item.
        """
        return item.cut is None or word.start < item.cut or self._fed <= round(item.cut * SAMPLE_RATE)

    def _turn(self, pause: Pause) -> Iterator[Message]:
        """Begin or end the open item, where the server does that."""
        rule, item = self.config.rule, self._items[-1]
        if rule is None:
            return
        if pause.silence < FRAME_SECONDS:
            yield from self._start(item, pause.time - FRAME_SECONDS)
        silence = self._heard.silence
        if not item.started or math.isinf(silence):
            return
        sure = rule.confidence is not None and self._detector.confidence >= rule.confidence and silence > 0
        if silence < rule.silence and not sure:
            return
        cut = pause.time
        yield self._message("input_audio_buffer.speech_stopped", audio_end_ms=round(cut * 1000), item_id=self._id(item))
        yield from self._close_item(item, cut)

    def _start(self, item: _Item, at: float) -> Iterator[Message]:
        rule = self.config.rule
        if item.started or rule is None:
            return
        item.started = True
        begin = max(0.0, item.start, at - rule.prefix)
        yield self._message("input_audio_buffer.speech_started", audio_start_ms=round(begin * 1000), item_id=self._id(item))

    def _close_item(self, item: _Item, cut: float) -> Iterator[Message]:
        """Cut here and tell the client that the item exists."""
        seen, item_id = self._previous, self._id(item)
        self._cut(item, cut)
        self._previous = item_id
        yield self._message("input_audio_buffer.committed", previous_item_id=seen, item_id=item_id)
        shown = {
            "id": item_id,
            "object": "realtime.item",
            "type": "message",
            "status": "completed",
            "role": "user",
            "content": [{"type": "input_audio", "transcript": None}],
        }
        kinds = ("created",) if self.config.beta else ("added", "done")
        for kind in kinds:
            yield self._message(f"conversation.item.{kind}", previous_item_id=seen, item=shown)

    def _cut(self, item: _Item, cut: float) -> None:
        item.cut = cut
        self._pending_seconds = 0.0
        self._items.append(_Item(start=cut))

    def _answered(self, marker: int) -> Iterator[Message]:
        """Everything up to the marked item's cut has been sent."""
        marked = next((item for item in self._items if item.marker == marker), None)
        if marked is not None and marked.cut is not None:
            self._heard.settle(marked.cut)
        yield from self._complete()

    def _complete(self) -> Iterator[Message]:
        """Finish the items whose text is whole, in order."""
        while (item := self._items[0]).cut is not None and item.cut <= self._heard.settled + 1e-9:
            for word in self._filter.flush():
                yield from self._delta(word)
            self._items.popleft()
            if item.dropped:
                continue
            more = {"logprobs": item.logprobs} if item.logprobs else {}
            yield self._message(
                "conversation.item.input_audio_transcription.completed",
                item_id=self._id(item),
                content_index=0,
                transcript=item.text,
                usage={"type": "duration", "seconds": round(max(0.0, item.cut - item.start), 3)},
                **more,
            )

    def _failures(self, error: Error) -> Iterator[Message]:
        for item in self._items:
            if item.cut is not None and not item.dropped:
                yield self._message(
                    "conversation.item.input_audio_transcription.failed",
                    item_id=self._id(item),
                    content_index=0,
                    error=error_object(error.message, "server_error", "transcription_failed"),
                )
        self._items = deque([_Item()])

    # ---- messages ----------------------------------------------------------------------------------------------------

    def _id(self, item: _Item) -> str:
        if item.id is None:
            item.id = f"item_{uuid.uuid4().hex[:24]}"
        return item.id

    def _message(self, kind: str, **fields: Any) -> str:
        message = {"type": kind, "event_id": f"event_{next(self._event_ids)}", **fields}
        return msgspec.json.encode(message).decode()

    def _reply(self, kind: str, **fields: Any) -> Reply:
        return Reply(self._message(kind, **fields))

    def _error(self, code: str, message: str, param: str | None, client_id: str | None = None) -> Reply:
        shown = error_object(message, "invalid_request_error", code, param)
        shown["event_id"] = client_id
        return self._reply("error", error=shown)
