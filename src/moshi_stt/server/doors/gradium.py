"""Gradium's doors: `/api/speech/asr` live and `POST /api/post/speech/asr` (the session is in `gradium_session.py`)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import msgspec

from moshi_stt.config import ServerConfig
from moshi_stt.engine.engine import EngineInfo, StreamOptions
from moshi_stt.errors import AudioError, ProtocolError
from moshi_stt.events import EndWord, Interim, Word
from moshi_stt.server.doors.door import (
    STATUS,
    Answer,
    Door,
    FileAnswer,
    FileDoor,
    FileOptions,
    FileRequest,
    Handshake,
    Opening,
    RefusalKind,
    Refused,
    Route,
    Transcript,
)
from moshi_stt.server.doors.gradium_session import GradiumSession, check_language, json_config, pcm_format
from moshi_stt.server.doors.options import any_key, module_info, prefix_seconds, query_lists
from moshi_stt.server.doors.prefix import with_prefix
from moshi_stt.session import Session
from moshi_stt.text.subtitles import TimedWord
from moshi_stt.text.word_lists import NO_LISTS, WordFilter, WordLists

PATH: Final = "/api/speech/asr"
FILES_PATH: Final = "/api/post/speech/asr"
MODEL_DELAY_FRAMES: Final = 6
"""Of Kyutai's 1B, and what clients take for granted."""
EMBEDDED_DELAY_FRAMES: Final = 12
"""The embedded model settles a word within about a second."""


@dataclass(frozen=True)
class GradiumOptions:
    """One connection's handshake."""

    modules: Mapping[str, EngineInfo]
    delay_frames: int
    lists: WordLists
    peer: str


def refusal(kind: RefusalKind, sentence: str) -> Refused:
    """Plain text, as Gradium's own server sends it."""
    status = 429 if kind == "full" else STATUS.get(kind, 500)
    headers = (("Retry-After", "1"),) if status in (429, 503) else ()
    reason = sentence or {"unauthorized": "invalid API key", "full": "all streams are in use"}.get(kind, kind)
    return Refused(status, f"error from server {1008 if status < 500 else 1011}: {reason}", headers=headers)


def lists_of(request: Handshake) -> WordLists:
    """The word lists in the query. Raises Refused."""
    try:
        return query_lists(request)
    except ValueError as error:
        raise refusal("bad_request", str(error)) from None


class GradiumLive(Door):
    """`GET /api/speech/asr`."""

    name = "gradium"
    keyless_on_loopback = True

    def routes(self, config: ServerConfig) -> Sequence[Route]:
        return [Route(PATH)]

    def key(self, request: Handshake) -> str | None:
        return any_key(request)

    def accept(self, request: Handshake) -> Opening:
        info = module_info(request.modules)
        delay = EMBEDDED_DELAY_FRAMES if info is not None and info.kind == "embedded" else MODEL_DELAY_FRAMES
        options = GradiumOptions(dict(request.modules), delay, lists_of(request), request.peer)
        return Opening(options, stream=StreamOptions(turns=True))

    def session(self, opening: Opening) -> Session:
        options: GradiumOptions = opening.options
        session = GradiumSession(options.modules, delay_frames=options.delay_frames, lists=options.lists, peer=options.peer)
        return with_prefix(session, prefix_seconds(options.modules, None))

    def refusal(self, kind: RefusalKind, sentence: str) -> Refused:
        return refusal(kind, sentence)


class _Lines(FileAnswer):
    """One JSON object a line, written while the file is transcribed."""

    content_type = "application/x-ndjson"

    def __init__(self, lists: WordLists) -> None:
        self._filter = WordFilter(lists)
        self._open = False

    def event(self, event: Word | EndWord | Interim) -> bytes:
        if type(event) is Word:
            word = TimedWord(event.text, event.start_time, event.start_time + 0.001)
            return b"".join(map(self._text, self._filter.push(word)))
        return self._end(event.stop_time) if type(event) is EndWord else b""

    def end(self, transcript: Transcript) -> bytes:
        return b"".join(map(self._text, self._filter.flush())) + self._end(transcript.duration_seconds)

    def error(self, kind: RefusalKind, sentence: str) -> bytes:
        return _line({"type": "error", "message": sentence, "code": 1008 if STATUS.get(kind, 500) < 500 else 1011})

    def _text(self, word: TimedWord) -> bytes:
        before = self._end(word.start)
        self._open = True
        return before + b"".join(
            _line({"type": "text", "text": text, "start_s": round(word.start, 3), "stream_id": 0}) for text in word.text.split()
        )

    def _end(self, stop: float) -> bytes:
        if not self._open:
            return b""
        self._open = False
        return _line({"type": "end_text", "stop_s": round(stop, 3), "stream_id": 0})


def _line(message: dict[str, object]) -> bytes:
    return msgspec.json.encode(message) + b"\n"


_FORMATS: Final = {"audio/pcm": "pcm"}
"""Media types of samples without a header; any other kind of file tells its format itself."""


class GradiumFiles(FileDoor):
    """`POST /api/post/speech/asr`."""

    name = "gradium-files"
    keyless_on_loopback = True

    def routes(self, config: ServerConfig) -> Sequence[Route]:
        return [Route(FILES_PATH)]

    def key(self, request: Handshake) -> str | None:
        return any_key(request)

    def check(self, request: Handshake) -> None:
        try:
            check_language(json_config(request.parameter("json_config")).get("language"), request.modules)
        except ProtocolError as error:
            raise refusal("bad_request", str(error)) from None
        lists_of(request)

    def parse(self, request: FileRequest) -> FileOptions:
        form = request.handshake.parameter("input_format") or _FORMATS.get(
            request.content_type.partition(";")[0].strip().lower()
        )
        raw = None
        if form is not None and form.partition("_")[0] in ("pcm", "ulaw", "alaw"):
            try:
                raw = pcm_format(form)
            except AudioError as error:
                raise refusal("bad_request", str(error)) from None
        return FileOptions(lists_of(request.handshake), raw=raw)

    def answer(self, transcript: Transcript, options: FileOptions) -> Answer:
        lines = _Lines(options.options)
        body = b"".join(map(lines.event, transcript.events)) + lines.end(transcript)
        return Answer(body, lines.content_type)

    def stream(self, options: FileOptions) -> FileAnswer | None:
        return _Lines(options.options or NO_LISTS)

    def refusal(self, kind: RefusalKind, sentence: str) -> Refused:
        return refusal(kind, sentence)
