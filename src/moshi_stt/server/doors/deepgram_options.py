"""Deepgram's query parameters, checked: what is done, what is refused, and what is ignored and said to be."""

import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

import msgspec

from moshi_stt.audio.live import PcmFormat
from moshi_stt.engine.engine import EngineInfo
from moshi_stt.errors import AudioError
from moshi_stt.server.doors.door import Handshake, Refused
from moshi_stt.server.doors.options import languages_of, module_for_language, module_info, prefix_seconds, truth
from moshi_stt.text.word_lists import NO_LISTS, WordLists

ENCODINGS: Final = {"linear16": "linear16", "linear32": "linear32", "mulaw": "mulaw", "alaw": "alaw"}
FINEST_SECONDS: Final = 0.08
"""The engine's grid: no pause is measured finer."""
DEFAULT_ENDPOINTING: Final = 0.01
DEFAULT_UTT_SPLIT: Final = 0.8

_CHANGING: Final = (
    "keyterm", "keywords", "numerals", "dictation", "filler_words", "diarize", "diarize_model", "detect_entities",
    "detect_topics", "entities", "intents", "paragraphs", "sentiment", "summarize", "topics", "measurements", "custom_intent",
    "custom_topic",
)  # fmt: skip
"""Options that would change the text: named when they are asked for, since they do nothing."""


@dataclass(frozen=True)
class DeepgramOptions:
    """One request's options. Seconds; None for what is off."""

    request_id: str
    format: PcmFormat | None = None
    """None: the audio begins with a header."""
    channels: int = 1
    multichannel: bool = False
    model: str = "general"
    language: str | None = None
    detected_language: str | None = None
    """Where it was asked for, and the model speaks one language alone."""
    interim: bool = False
    endpointing: float | None = FINEST_SECONDS
    utterance_end: float | None = None
    vad_events: bool = False
    formatted: bool = False
    lists: WordLists = NO_LISTS
    utterances: bool = False
    utt_split: float = DEFAULT_UTT_SPLIT
    ignored: tuple[str, ...] = ()
    module: str | None = None
    prefix: float = 0.0
    """Seconds of silence that the model needs in front."""
    sha256: Callable[[], str] = str
    """Reads a whole recording: not for the event loop."""

    @property
    def streams(self) -> int:
        return self.channels if self.multichannel else 1


def refused(
    status: int, code: str, sentence: str, request_id: str | None = None, headers: tuple[tuple[str, str], ...] = ()
) -> Refused:
    """An answer in Deepgram's shape."""
    request_id = request_id or str(uuid.uuid4())
    body = msgspec.json.encode({"err_code": code, "err_msg": sentence, "request_id": request_id})
    ascii_sentence = sentence.encode("ascii", "replace").decode()[:200]
    return Refused(status, body, "application/json", (("dg-error", ascii_sentence), ("dg-request-id", request_id), *headers))


class Query:
    """A query's values, with Deepgram's errors."""

    def __init__(self, request: Handshake) -> None:
        self._request = request

    def bad(self, sentence: str) -> Refused:
        return refused(400, "INVALID_QUERY_PARAMETER", sentence)

    def text(self, name: str) -> str | None:
        value = self._request.parameter(name)
        return None if value is None or not value.strip() else value.strip()

    def texts(self, name: str) -> list[str]:
        """Repeated keys; one SDK sent a list as the text `['A', 'B']`."""
        values: list[str] = []
        for value in self._request.parameters(name):
            if value.startswith("[") and value.endswith("]"):
                values += [part.strip().strip("'\"") for part in value[1:-1].split(",")]
            else:
                values.append(value)
        return [value for value in values if value.strip()]

    def flag(self, name: str) -> bool:
        value = self._request.parameter(name)
        if value is None:
            return False
        said = truth(value)
        if said is None:
            raise self.bad(f"{name}={value[:50]}: expected true or false")
        return said

    def asks(self, name: str) -> bool:
        """Whether any value of it is anything but false."""
        return any(truth(value) is not False for value in self._request.parameters(name))

    def whole(self, name: str, low: int, high: int) -> int | None:
        value = self.text(name)
        if value is None:
            return None
        try:
            number = int(value)
        except ValueError:
            number = low - 1
        if not low <= number <= high:
            raise self.bad(f"{name}={value[:50]}: expected an integer from {low} to {high}")
        return number

    def real(self, name: str, low: float, high: float) -> float | None:
        value = self.text(name)
        if value is None:
            return None
        try:
            number = float(value)
        except ValueError:
            number = low - 1
        if not low <= number <= high:
            raise self.bad(f"{name}={value[:50]}: expected a number from {low:g} to {high:g}")
        return number


def parse(request: Handshake, *, live: bool) -> DeepgramOptions:
    """The options of `/v1/listen`. Raises Refused (400)."""
    query = Query(request)
    check_refused(query, request.ignore_unsupported)
    channels = query.whole("channels", 1, 16) or 1
    utterance_end = query.whole("utterance_end_ms", 1_000, 60_000)
    interim = query.flag("interim_results")
    if utterance_end is not None and live and not interim:
        raise query.bad("utterance_end_ms needs interim_results=true")
    language, module = language_of(query, request.modules)
    return DeepgramOptions(
        request_id=str(uuid.uuid4()),
        format=audio_format(query, channels),
        channels=channels,
        multichannel=query.flag("multichannel") and channels > 1,
        model=query.text("model") or "general",
        language=language,
        detected_language=_only_language(request.modules, module) if query.asks("detect_language") else None,
        interim=interim,
        endpointing=_endpointing(query),
        utterance_end=None if utterance_end is None else utterance_end / 1000,
        vad_events=query.flag("vad_events"),
        formatted=query.flag("punctuate") or query.flag("smart_format"),
        lists=word_lists(query),
        utterances=query.flag("utterances"),
        utt_split=query.real("utt_split", 0.08, 60.0) or DEFAULT_UTT_SPLIT,
        ignored=ignored(query, request),
        module=module,
        prefix=prefix_seconds(request.modules, module),
    )


def check_refused(query: Query, ignore_unsupported: bool) -> None:
    """Options that a caller must not believe in."""
    if query.asks("redact") and not ignore_unsupported:
        raise query.bad("redact is not supported: numbers and names would stay in the text; leave it out")
    for name in ("callback", "callback_method"):
        if query.text(name):
            raise query.bad(f"{name} is not supported: this server calls nobody; read the answer of the request")


def ignored(query: Query, request: Handshake) -> tuple[str, ...]:
    """The options that would change the result and do nothing here."""
    names = [name for name, _ in request.query if name in _CHANGING and query.asks(name)]
    if query.asks("detect_language") and _only_language(request.modules, None) is None:
        names.append("detect_language")
    if request.ignore_unsupported and query.asks("redact"):
        names.append("redact")
    return tuple(dict.fromkeys(names))


def word_lists(query: Query) -> WordLists:
    try:
        return WordLists.parse(
            profanity=query.flag("profanity_filter"), replace=query.texts("replace"), search=query.texts("search")
        )
    except ValueError as error:
        raise query.bad(str(error)) from None


def audio_format(query: Query, channels: int) -> PcmFormat | None:
    """What the bytes are; None where they begin with a header."""
    encoding, rate = query.text("encoding"), query.whole("sample_rate", 8_000, 48_000)
    if encoding is None:
        return None
    if encoding.lower() not in ENCODINGS:
        if encoding.lower() in ("opus", "ogg-opus"):
            return None
        raise query.bad(f"encoding={encoding[:50]}: expected one of {', '.join(ENCODINGS)}, opus; or WAV or Ogg without it")
    if rate is None:
        raise query.bad("encoding needs sample_rate")
    try:
        return PcmFormat(ENCODINGS[encoding.lower()], rate, channels)  # type: ignore[arg-type]
    except AudioError as error:
        raise query.bad(str(error)) from None


def language_of(query: Query, modules: Mapping[str, EngineInfo]) -> tuple[str | None, str | None]:
    """The language asked for, and the module that knows it."""
    language = query.text("language")
    if language is None or language.lower() == "multi":
        return None, None
    module = module_for_language(modules, language)
    if module is None and modules:
        known = ", ".join(languages_of(modules))
        raise query.bad(f"language={language[:50]} is not known to the models that are loaded: expected one of {known}")
    return language, module


def _only_language(modules: Mapping[str, EngineInfo], module: str | None) -> str | None:
    """The language of a module that speaks one; None where there is nothing to tell, since no model here detects it."""
    info = module_info(modules) if module is None else modules.get(module)
    return info.languages[0] if info is not None and len(info.languages) == 1 else None


def _endpointing(query: Query) -> float | None:
    value = query.text("endpointing")
    if value is not None and not value.isdigit():
        said = truth(value)
        if said is None:
            raise query.bad(f"endpointing={value[:50]}: expected milliseconds, true or false")
        return max(DEFAULT_ENDPOINTING, FINEST_SECONDS) if said else None
    milliseconds = query.whole("endpointing", 0, 60_000)
    return max(FINEST_SECONDS, DEFAULT_ENDPOINTING if milliseconds is None else milliseconds / 1000)
