"""OpenAI's REST transcription: `POST /v1/audio/transcriptions`, `POST /v1/audio/translations` (refused), `GET /v1/models`."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import msgspec

from moshi_stt.config import ServerConfig
from moshi_stt.engine.engine import StreamOptions
from moshi_stt.events import EndWord, Interim, Word
from moshi_stt.server.doors.door import (
    Answer,
    FileAnswer,
    FileDoor,
    FileOptions,
    FileRequest,
    Handshake,
    PageDoor,
    RefusalKind,
    Refused,
    Route,
    Transcript,
)
from moshi_stt.server.doors.heard import Heard
from moshi_stt.server.doors.openai_models import (
    ALIASES,
    LANGUAGE_NAMES,
    BadOption,
    module_for_languages,
    module_for_model,
    openai_key,
    refusal,
    refused,
    refused_option,
)
from moshi_stt.server.doors.options import module_info, primary_language, report_ignored, truth
from moshi_stt.text.subtitles import TimedWord, join_words, pair_words, timestamp
from moshi_stt.text.word_lists import NO_LISTS, WordFilter, WordLists

Format = Literal["json", "text", "srt", "verbose_json", "vtt"]
FORMATS: Final = ("json", "text", "srt", "verbose_json", "vtt")
GRANULARITIES: Final = ("word", "segment")
TOKENS_PER_SECOND: Final = 10
"""What OpenAI counts for a second of audio; `usage` is made of it."""
SEGMENT_GAP_SECONDS: Final = 0.5
SEGMENT_SENTENCE_SECONDS: Final = 2.0
SEGMENT_SECONDS: Final = 8.0
_SENTENCE_END: Final = (".", "?", "!", "…")
_IGNORED: Final = (
    "prompt", "temperature", "keywords", "chunking_strategy", "known_speaker_names", "known_speaker_references",
)  # fmt: skip
_PLAIN_IGNORED: Final = ("temperature", "chunking_strategy")
"""Taken and ignored without a word: every client sends them, and no text depends on them."""


@dataclass(frozen=True)
class TranscriptionOptions:
    """The form of one request."""

    format: Format = "json"
    stream: bool = False
    words: bool = False
    segments: bool = True
    logprobs: bool = False
    language: str = "en"
    lists: WordLists = NO_LISTS
    headers: tuple[tuple[str, str], ...] = ()


def parse_form(request: FileRequest) -> FileOptions:
    """Raises BadOption."""
    values: dict[str, list[str]] = {}
    for name, value in request.fields:
        values.setdefault(name.partition("[")[0], []).append(value)
    first = {name: given[0].strip() for name, given in values.items()}
    if request.file_name is None:
        raise BadOption(
            "`file` is missing: send the recording as a part of the form with a filename", "file", "missing_required_parameter"
        )
    if not first.get("model"):
        raise BadOption("`model` is missing: send, for instance, whisper-1", "model", "missing_required_parameter")
    modules = request.handshake.modules
    module = module_for_model(modules, first["model"])
    languages = [language for name in ("language", "languages") for language in values.get(name, []) if language.strip()]
    module, language = module_for_languages(modules, languages, module)
    shown = first.get("response_format") or "json"
    stream = bool(truth(first.get("stream", "false")))
    if shown not in FORMATS and not stream:
        raise BadOption(f"response_format {shown[:30]!r}: expected one of {', '.join(FORMATS)}", "response_format")
    granularities = values.get("timestamp_granularities", [])
    if unknown := next((each for each in granularities if each not in GRANULARITIES), None):
        raise BadOption(f"timestamp_granularities {unknown[:30]!r}: expected word or segment", "timestamp_granularities")
    try:
        lists = WordLists.parse(
            profanity=bool(truth(first.get("profanity_filter", "false"))), replace=values.get("replace", [])
        )
    except ValueError as error:
        raise BadOption(str(error), "replace") from None
    ignored = [name for name in _IGNORED if first.get(name) and name not in _PLAIN_IGNORED]
    info = modules.get(module) if module else module_info(modules)
    spoken = info.languages[0] if info is not None and info.languages else "en"
    options = TranscriptionOptions(
        format=shown if shown in FORMATS else "json",  # type: ignore[arg-type]
        stream=stream,
        words="word" in granularities,
        segments="segment" in granularities or not granularities,
        logprobs="logprobs" in values.get("include", []),
        language=primary_language(language) if language else spoken,
        lists=lists,
        headers=report_ignored("openai", request.handshake.peer, ignored),
    )
    return FileOptions(options, module, StreamOptions(confidence=True))


# ---- shapes --------------------------------------------------------------------------------------------------------------


def logprob_object(text: str, logprob: float | None) -> dict[str, Any]:
    return {"token": text, "logprob": round(logprob or 0.0, 4), "bytes": list(text.encode())}


def pieces(words: Sequence[TimedWord]) -> list[tuple[str, TimedWord]]:
    """Each word as it lies in the text: the first bare, the others after a blank."""
    shown = [(" ".join(word.text.split()), word) for word in words]
    shown = [(text, word) for text, word in shown if text]
    return [(text if not index else f" {text}", word) for index, (text, word) in enumerate(shown)]


def json_object(words: Sequence[TimedWord], duration: float, *, logprobs: bool) -> dict[str, Any]:
    shown: dict[str, Any] = {"text": join_words(words), "usage": {"type": "duration", "seconds": math.ceil(duration)}}
    if logprobs:
        shown["logprobs"] = [logprob_object(text, word.logprob) for text, word in pieces(words)]
    return shown


def cut_segments(words: Sequence[TimedWord]) -> list[list[TimedWord]]:
    """Where somebody pauses for half a second, at the end of a sentence of two seconds or more, or after eight seconds."""
    segments: list[list[TimedWord]] = []
    for word in words:
        if segments:
            current = segments[-1]
            length = current[-1].end - current[0].start
            sentence = current[-1].text.endswith(_SENTENCE_END) and length >= SEGMENT_SENTENCE_SECONDS
            pause = word.start - current[-1].end >= SEGMENT_GAP_SECONDS
            if not (sentence or pause or word.end - current[0].start > SEGMENT_SECONDS):
                current.append(word)
                continue
        segments.append([word])
    return segments


def verbose_object(words: Sequence[TimedWord], duration: float, options: TranscriptionOptions) -> dict[str, Any]:
    shown: dict[str, Any] = {
        "task": "transcribe",
        "language": LANGUAGE_NAMES.get(options.language, options.language),
        "duration": round(duration, 3),
        **json_object(words, duration, logprobs=options.logprobs),
    }
    if options.segments:
        shown["segments"] = [_segment(index, segment) for index, segment in enumerate(cut_segments(words))]
    if options.words:
        shown["words"] = [{"word": word.text, "start": round(word.start, 3), "end": _end(word)} for word in words]
    return shown


def _segment(index: int, words: Sequence[TimedWord]) -> dict[str, Any]:
    logprobs = [word.logprob for word in words if word.logprob is not None]
    return {
        "id": index,
        "seek": 0,
        "start": round(words[0].start, 3),
        "end": max(_end(words[0]), _end(words[-1])),
        "text": f" {join_words(words)}",
        "tokens": [],
        "temperature": 0.0,
        "avg_logprob": round(sum(logprobs) / len(logprobs), 4) if logprobs else 0.0,
        "compression_ratio": 1.0,
        "no_speech_prob": 0.0,
    }


def _end(word: TimedWord) -> float:
    return round(max(word.end, round(word.start, 3) + 0.001), 3)


def subtitles(words: Sequence[TimedWord], *, vtt: bool) -> str:
    """One cue for each segment."""
    point = "." if vtt else ","
    cues = []
    for number, segment in enumerate(cut_segments(words), 1):
        text = join_words(segment).replace("-->", "->")
        if vtt:
            text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
        times = f"{timestamp(segment[0].start, point)} --> {timestamp(max(_end(segment[0]), _end(segment[-1])), point)}"
        cues.append(f"{times}\n{text}\n" if vtt else f"{number}\n{times}\n{text}\n")
    return ("WEBVTT\n\n" if vtt else "") + "\n".join(cues)


class SseAnswer(FileAnswer):
    """Server-sent events: a delta for each word as it comes, and one `done`."""

    content_type = "text/event-stream"

    def __init__(self, options: TranscriptionOptions) -> None:
        self.headers = (("Cache-Control", "no-cache"), ("X-Accel-Buffering", "no"), *options.headers)
        self._options = options
        self._heard = Heard()
        self._filter = WordFilter(options.lists)
        self._text = ""
        self._logprobs: list[dict[str, Any]] = []

    def event(self, event: Word | EndWord | Interim) -> bytes:
        if type(event) is not Word:
            return b""
        self._heard.take(event)
        word = self._heard.words.pop()
        return b"".join(map(self._delta, self._filter.push(word)))

    def end(self, transcript: Transcript) -> bytes:
        rest = b"".join(map(self._delta, self._filter.flush()))
        heard = math.ceil(transcript.duration_seconds * TOKENS_PER_SECOND)
        said = len(self._text.split())
        usage = {
            "type": "tokens",
            "input_tokens": heard,
            "input_token_details": {"text_tokens": 0, "audio_tokens": heard},
            "output_tokens": said,
            "total_tokens": heard + said,
        }
        more = {"logprobs": self._logprobs} if self._options.logprobs else {}
        done = _sse({"type": "transcript.text.done", "text": self._text, "usage": usage, **more})
        return rest + done + b"data: [DONE]\n\n"

    def error(self, kind: RefusalKind, sentence: str) -> bytes:
        refused_ = refusal(kind, sentence)
        return b"data: " + refused_.body + b"\n\n"

    def _delta(self, word: TimedWord) -> bytes:
        text = " ".join(word.text.split())
        if not text:
            return b""
        piece = f" {text}" if self._text else text
        self._text += piece
        more: dict[str, Any] = {}
        if self._options.logprobs:
            shown = logprob_object(piece, word.logprob)
            self._logprobs.append(shown)
            more["logprobs"] = [shown]
        return _sse({"type": "transcript.text.delta", "delta": piece, **more})


def _sse(message: dict[str, Any]) -> bytes:
    return b"data: " + msgspec.json.encode(message) + b"\n\n"


# ---- doors ---------------------------------------------------------------------------------------------------------------


class OpenAIFiles(FileDoor):
    """`POST /v1/audio/transcriptions`."""

    name = "openai-files"
    keyless_on_loopback = True
    form = "file"

    def routes(self, config: ServerConfig) -> Sequence[Route]:
        return [Route("/v1/audio/transcriptions")]

    def key(self, request: Handshake) -> str | None:
        return openai_key(request)

    def check(self, request: Handshake) -> None:
        if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
            raise refused(400, "send a form (multipart/form-data) with the parts `file` and `model`", code="invalid_value")

    def parse(self, request: FileRequest) -> FileOptions:
        try:
            return parse_form(request)
        except BadOption as error:
            raise refused_option(error) from None

    def answer(self, transcript: Transcript, options: FileOptions) -> Answer:
        asked: TranscriptionOptions = options.options
        words = asked.lists.apply(pair_words(transcript.events))
        duration = transcript.duration_seconds
        if asked.format == "json":
            return _json(json_object(words, duration, logprobs=asked.logprobs), asked)
        if asked.format == "verbose_json":
            return _json(verbose_object(words, duration, asked), asked)
        text = f"{join_words(words)}\n" if asked.format == "text" else subtitles(words, vtt=asked.format == "vtt")
        return Answer(text.encode(), "text/plain; charset=utf-8", asked.headers)

    def stream(self, options: FileOptions) -> FileAnswer | None:
        asked: TranscriptionOptions = options.options
        return SseAnswer(asked) if asked.stream else None

    def refusal(self, kind: RefusalKind, sentence: str) -> Refused:
        return refusal(kind, sentence)


def _json(shown: dict[str, Any], options: TranscriptionOptions) -> Answer:
    return Answer(msgspec.json.encode(shown), "application/json", options.headers)


class _OpenAIPage(PageDoor):
    def key(self, request: Handshake) -> str | None:
        return openai_key(request)

    def refusal(self, kind: RefusalKind, sentence: str) -> Refused:
        return refusal(kind, sentence)


class OpenAITranslations(_OpenAIPage):
    """`POST /v1/audio/translations`: refused, by a status that no client retries."""

    name = "openai-translations"
    keyless_on_loopback = True
    methods = ("POST",)

    def routes(self, config: ServerConfig) -> Sequence[Route]:
        return [Route("/v1/audio/translations")]

    def answer(self, request: Handshake) -> Answer:
        raise refused(
            400,
            "Translation is not supported: this server writes down what is said, in its own language. "
            "Use /v1/audio/transcriptions",
            code="unsupported_operation",
        )


class OpenAIModels(_OpenAIPage):
    """`GET /v1/models` and `GET /v1/models/ID`."""

    name = "openai-models"
    keyless_on_loopback = True
    prefixes = True

    def routes(self, config: ServerConfig) -> Sequence[Route]:
        return [Route("/v1/models"), Route("/v1/models/")]

    def answer(self, request: Handshake) -> Answer:
        ids = list(dict.fromkeys([*(info.model or name for name, info in request.modules.items()), *request.modules, *ALIASES]))
        wanted = request.path.removeprefix("/v1/models").strip("/")
        if not wanted:
            return Answer(msgspec.json.encode({"object": "list", "data": [_model(each) for each in ids]}), "application/json")
        try:
            module_for_model(request.modules, wanted)
        except BadOption as error:
            raise refused_option(error) from None
        return Answer(msgspec.json.encode(_model(wanted)), "application/json")


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 1_767_225_600, "owned_by": "local"}
