"""Deepgram's `/v2/listen` (Flux) without I/O: turns with their words, an early end of turn, and its retraction."""

import math
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import msgspec

from moshi_stt.audio.live import ContainerInput, LiveInput, PcmFormat, PcmInput, Pieces
from moshi_stt.engine.commands import Audio, Finish, Mark
from moshi_stt.engine.turns import TurnDetector, TurnSettings
from moshi_stt.errors import AudioError, ProtocolError
from moshi_stt.events import AnyEvent, EndWord, Error, Marker, Pause, Ready, Word
from moshi_stt.server.doors.deepgram_options import (
    Query,
    audio_format,
    check_refused,
    ignored,
    word_lists,
)
from moshi_stt.server.doors.door import Handshake
from moshi_stt.server.doors.heard import Heard, confidence
from moshi_stt.server.doors.options import module_for_language, prefix_seconds
from moshi_stt.session import Action, Close, Message, Reply, Session
from moshi_stt.text.subtitles import join_words
from moshi_stt.text.word_lists import NO_LISTS, WordLists

UPDATE_SECONDS: Final = 0.25


@dataclass(frozen=True)
class FluxOptions:
    """The query of one connection. Thresholds in [0, 1], seconds."""

    request_id: str
    format: PcmFormat | None
    eot: float = 0.7
    eager: float | None = None
    timeout: float = 5.0
    lists: WordLists = NO_LISTS
    ignored: tuple[str, ...] = ()
    module: str | None = None
    prefix: float = 0.0


def parse(request: Handshake) -> FluxOptions:
    """Raises Refused (400)."""
    query = Query(request)
    check_refused(query, request.ignore_unsupported)
    hints = query.texts("language_hint")
    module = next(filter(None, (module_for_language(request.modules, hint) for hint in hints)), None)
    return FluxOptions(
        request_id=str(uuid.uuid4()),
        format=audio_format(query, 1),
        eot=query.real("eot_threshold", 0.5, 1.0) or 0.7,
        eager=query.real("eager_eot_threshold", 0.3, 0.9),
        timeout=(query.whole("eot_timeout_ms", 500, 60_000) or 5_000) / 1000,
        lists=word_lists(query),
        ignored=ignored(query, request),
        module=module,
        prefix=prefix_seconds(request.modules, module),
    )


class FluxSession(Session):
    """See the module's docstring."""

    def __init__(self, options: FluxOptions) -> None:
        self.options = options
        self._input: LiveInput = ContainerInput() if options.format is None else PcmInput(options.format)
        self._heard = Heard()
        self._detector = TurnDetector(TurnSettings(threshold=2.0, timeout_seconds=math.inf))
        self._seen = 0
        """Words of the open turn that were looked at; the turn's words are those that `_heard` holds."""
        self._turn = 0
        self._turn_start = 0.0
        self._sequence = 0
        self._started = False
        self._eager = False
        """Whether the early end of the open turn was told."""
        self._updated_at = 0.0
        self._told = 0
        self._fed = 0
        self._markers = 0
        self._finishing = False

    # ---- from the client ---------------------------------------------------------------------------------------------

    def opened(self) -> Iterable[Action]:
        return [Reply(self._message("Connected"))]

    def receive(self, message: Message) -> Iterable[Action]:
        if isinstance(message, bytes):
            return self._audio(message) if message else self._finish()
        try:
            request = msgspec.json.decode(message)
        except (msgspec.MsgspecError, RecursionError):
            raise ProtocolError(f"a text message must be JSON, got {message[:60]!r}", 1008) from None
        kind = request.get("type") if isinstance(request, dict) else None
        if kind == "CloseStream":
            return self._finish()
        if kind == "ForceEndTurn":
            return self._force()
        if kind == "Configure":
            return [self._configure(request)]
        raise ProtocolError(f"type {str(kind)[:40]!r} is not known: expected CloseStream, ForceEndTurn or Configure", 1008)

    def end_of_input(self) -> Iterable[Action]:
        return self._give(self._input.flush())

    def _audio(self, data: bytes) -> Iterator[Action]:
        try:
            for pieces in self._input.feed(data):
                yield from self._give(pieces)
        except AudioError as error:
            raise ProtocolError(f"DATA-0000: {error}", 1008) from None

    def _give(self, pieces: Pieces) -> Iterator[Action]:
        for samples in pieces:
            if len(samples):
                self._fed += len(samples)
                yield Audio(samples)

    def _finish(self) -> Iterator[Action]:
        if not self._finishing:
            self._finishing = True
            yield from self._give(self._input.flush())
            yield Finish()

    def _force(self) -> Iterator[Action]:
        yield from self._give(self._input.flush())
        self._markers += 1
        yield Mark(self._markers)

    def _configure(self, request: dict[str, Any]) -> Reply:
        given = request.get("thresholds")
        thresholds = given if isinstance(given, dict) else {}
        limits = {"eot_threshold": (0.5, 1.0), "eager_eot_threshold": (0.3, 0.9), "eot_timeout_ms": (500, 60_000)}
        for name, value in thresholds.items():
            low, high = limits.get(name, (-math.inf, math.inf))
            wrong = isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high
            if name in limits and wrong and value is not None:
                sentence = f"{name} must be a number from {low:g} to {high:g}, got {str(value)[:20]}"
                return Reply(self._message("ConfigureFailure", code="INVALID_THRESHOLD", description=sentence))
        if request.get("keyterms"):
            code, sentence = "CONFIGURE_KEYTERMS_NOT_SUPPORTED", "key terms are not supported by this server"
            return Reply(self._message("ConfigureFailure", code=code, description=sentence))
        options = self.options
        eager = thresholds.get("eager_eot_threshold", options.eager)
        self.options = options = replace(
            options,
            eot=thresholds.get("eot_threshold") or options.eot,
            eager=eager,
            timeout=(thresholds.get("eot_timeout_ms") or options.timeout * 1000) / 1000,
        )
        shown: dict[str, Any] = {"eot_threshold": options.eot, "eot_timeout_ms": round(options.timeout * 1000)}
        if options.eager is not None:
            shown["eager_eot_threshold"] = options.eager
        return Reply(self._message("ConfigureSuccess", thresholds=shown, keyterms=[]))

    # ---- to the client -----------------------------------------------------------------------------------------------

    def send(self, event: AnyEvent, channel: int = 0) -> Sequence[Message]:
        if type(event) is Error:
            code = "INTERNAL_SERVER_ERROR" if event.close_code in (None, 1011) else "BAD_REQUEST"
            return [*self.finished(), self._message("Error", code=code, description=event.message)]
        if type(event) is Ready:
            return ()
        self._heard.take(event)
        if type(event) is Word:
            self._detector.word(event)
        elif type(event) is EndWord:
            self._detector.end_word(event)
        elif type(event) is Pause:
            self._detector.pause(event)
            return [*self._gather(), *self._by_pause(event)]
        elif type(event) is Marker:
            return [*self._gather(), *self._end_turn(self._detector.confidence)]
        return ()

    def finished(self) -> Sequence[Message]:
        return [*self._gather(), *self._end_turn(self._detector.confidence)]

    def close(self, error: Error | None) -> Close:
        if error is None:
            return Close(1000)
        return Close(1011 if error.close_code is None else error.close_code, error.message)

    def _gather(self) -> Iterator[Message]:
        """Words that came since the last 80 ms belong to the open turn, or begin one."""
        count = len(self._heard.words)
        if count == self._seen:
            return
        if self._eager:
            self._eager = False
            yield self._info("TurnResumed", count=self._seen)
        self._seen = count
        if not self._started:
            self._started = True
            self._told, self._updated_at = count, self._heard.time
            yield self._info("StartOfTurn")

    def _by_pause(self, pause: Pause) -> Iterator[Message]:
        if not self._started:
            return
        options, sure = self.options, self._detector.confidence
        silence = self._heard.silence
        if silence > 0 and self._heard.caught_up:
            if (options.eot < 1.0 and sure >= options.eot) or silence >= options.timeout:
                yield from self._end_turn(sure)
                return
            if options.eager is not None and sure >= options.eager and not self._eager:
                self._eager = True
                yield self._info("EagerEndOfTurn")
                return
        if not self._eager and self._seen > self._told and pause.time - self._updated_at >= UPDATE_SECONDS:
            self._told, self._updated_at = self._seen, pause.time
            yield self._info("Update")

    def _end_turn(self, sure: float) -> Iterator[Message]:
        if not self._started:
            return
        yield self._info("EndOfTurn", sure=sure, trigger="model")
        self._turn += 1
        self._turn_start = self._heard.time
        self._heard.words.clear()
        self._seen = self._told = 0
        self._started = self._eager = False

    def _info(self, event: str, sure: float | None = None, count: int | None = None, **more: object) -> str:
        """count: of the turn's words, where not all are meant."""
        words = self.options.lists.apply([*self._heard.words][:count])
        sure = self._detector.confidence if sure is None else sure
        if event in ("StartOfTurn", "Update", "TurnResumed"):
            sure = min(sure, self.options.eot - 0.01)
        return self._message(
            "TurnInfo",
            event=event,
            turn_index=self._turn,
            audio_window_start=round(self._turn_start, 3),
            audio_window_end=round(max(self._heard.time, self._turn_start), 3),
            transcript=join_words(words),
            words=[
                {
                    "word": word.text,
                    "confidence": round(confidence(word), 4),
                    "start": round(word.start, 3),
                    "end": round(max(word.end, word.start + 0.001), 3),
                }
                for word in words
            ],
            end_of_turn_confidence=round(max(0.0, sure), 4),
            **more,
        )

    def _message(self, kind: str, **fields: Any) -> str:
        message = {"type": kind, "request_id": self.options.request_id, "sequence_id": self._sequence, **fields}
        self._sequence += 1
        return msgspec.json.encode(message).decode()
