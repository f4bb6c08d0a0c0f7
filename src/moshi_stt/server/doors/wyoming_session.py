"""A Wyoming connection (Home Assistant), without I/O: `describe`, `ping`, and one utterance after the other.

An utterance has a stream of its own: it is opened by the first audio, finished by `audio-stop`, and its text is sent when
all of it is transcribed.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from moshi_stt import __version__
from moshi_stt.audio.live import Encoding, PcmFormat, PcmInput, Pieces
from moshi_stt.engine.commands import Audio, Finish, Reset
from moshi_stt.engine.engine import EngineInfo
from moshi_stt.errors import AudioError, ProtocolError
from moshi_stt.events import AnyEvent, Error, Pause, Ready, Word
from moshi_stt.server.doors.options import languages_of, primary_language
from moshi_stt.session import Action, Close, Message, Reply, Session
from moshi_stt.text.subtitles import TimedWord
from moshi_stt.text.word_lists import WordFilter, WordLists

SILENCE_SECONDS: Final = {"default": 0.7, "aggressive": 0.25, "relaxed": 1.25}
"""Silence that ends a command where this server decides that, by `vad_sensitivity`."""
NO_SPEECH_SECONDS: Final = 5.0
"""Audio without speech after which it gives up."""
_WIDTHS: Final[dict[int, Encoding]] = {1: "linear8", 2: "linear16", 4: "linear32i"}
_PROGRAM: Final = "moshi-stt"
_URL: Final = "https://github.com/kyutai-labs/delayed-streams-modeling"


@dataclass(frozen=True)
class WyomingOptions:
    """modules: what is loaded. endpointing: whether the server itself ends a command. lists: done to every text."""

    modules: Mapping[str, EngineInfo]
    lists: WordLists
    endpointing: bool = False


class WyomingSession(Session):
    """See the module's docstring."""

    may_idle = True

    def __init__(self, options: WyomingOptions) -> None:
        self.options = options
        languages = languages_of(options.modules)
        self._languages = tuple(primary_language(language) for language in languages) or ("en",)
        self._info = _encode("info", _info(options, self._languages))
        self._filter = WordFilter(options.lists)
        self._input: PcmInput | None = None
        self._open = False
        """Whether an utterance takes audio."""
        self._deaf = False
        """Whether the server ended the utterance itself: audio is thrown away up to the next one."""
        self._stopping = False
        """Whether the stream is finished and its text still to come."""
        self._dropping = False
        """Whether the words of what came before a restart are still to come."""
        self._started = False
        self._text = ""
        self._language = self._languages[0]
        self._context: object = None
        self._silence = SILENCE_SECONDS["default"]
        self._due = False
        """Whether a pause has ended the command."""

    # ---- from the client ---------------------------------------------------------------------------------------------

    def receive(self, message: Message) -> Iterable[Action]:
        assert isinstance(message, bytes)
        head, _, payload = message.partition(b"\n")
        event = msgspec.json.decode(head)
        kind, data = event["type"], event["data"]
        if kind == "describe":
            return [Reply(self._info)]
        if kind == "ping":
            return [Reply(_encode("pong", {"text": data["text"]} if data.get("text") is not None else {}))]
        if kind == "transcribe":
            return self._transcribe(data)
        if kind == "audio-start":
            return self._begin()
        if kind == "audio-chunk":
            return self._chunk(data, payload)
        return self._stop() if kind == "audio-stop" else ()

    def end_of_input(self) -> Iterable[Action]:
        return () if self._input is None else self._give(self._input.flush())

    def tick(self, now: float) -> Iterable[Action]:
        if not self._due:
            return ()
        self._due, self._deaf = False, True
        return self._stop()

    def _transcribe(self, data: dict[str, Any]) -> Iterator[Action]:
        language = data.get("language")
        wanted = primary_language(language) if isinstance(language, str) else ""
        self._language = wanted if wanted in self._languages else self._languages[0]
        self._context = data.get("context")
        self._silence = SILENCE_SECONDS.get(str(data.get("vad_sensitivity")), SILENCE_SECONDS["default"])
        self._deaf = False
        yield from self._restart()

    def _begin(self) -> Iterator[Action]:
        self._deaf = False
        yield from self._restart()
        self._open = True

    def _restart(self) -> Iterator[Action]:
        """Throw away an utterance that was begun and not ended."""
        if self._open and not self._stopping:
            self._open = self._started = False
            self._text, self._input = "", None
            self._filter.flush()
            self._dropping = True
            yield Reset()

    def _chunk(self, data: dict[str, Any], payload: bytes) -> Iterator[Action]:
        if self._deaf:
            return
        self._open = True
        rate, width, channels = (data.get(name) for name in ("rate", "width", "channels"))
        if not all(isinstance(each, int) and not isinstance(each, bool) for each in (rate, width, channels)):
            raise ProtocolError("an audio-chunk needs the integers rate, width and channels", 1008)
        if width not in _WIDTHS:
            raise ProtocolError(f"width {width}: expected 1, 2 or 4 bytes a sample", 1008)
        try:
            shown = PcmFormat(_WIDTHS[width], rate, channels)  # type: ignore[arg-type]
        except AudioError as error:
            raise ProtocolError(str(error), 1008) from None
        if self._input is not None and self._input.format != shown:
            yield from self._give(self._input.flush())
            self._input = None
        if self._input is None:
            self._input = PcmInput(shown)
        for pieces in self._input.feed(payload):
            yield from self._give(pieces)

    def _give(self, pieces: Pieces) -> Iterator[Action]:
        for samples in pieces:
            if len(samples):
                yield Audio(samples)

    def _stop(self) -> Iterator[Action]:
        if self._deaf and not self._open:
            self._deaf = False
            return
        if self._input is not None:
            yield from self._give(self._input.flush())
        self._input, self._open, self._due = None, False, False
        self._stopping = True
        yield Finish()

    # ---- to the client -----------------------------------------------------------------------------------------------

    def send(self, event: AnyEvent, channel: int = 0) -> Sequence[Message]:
        if type(event) is Error:
            code = "engine-error" if event.close_code in (1011, None) else "server-error"
            return [_encode("error", {"text": event.message, "code": code})]
        if type(event) is Ready:
            self._dropping = False
        elif self._dropping:
            return ()
        if type(event) is Pause and self.options.endpointing and self._open:
            spoken = not math.isinf(event.silence)
            self._due = event.silence >= self._silence if spoken else event.time >= NO_SPEECH_SECONDS
        if type(event) is not Word:
            return ()
        word = TimedWord(event.text, event.start_time, event.start_time)
        return [message for each in self._filter.push(word) for message in self._chunk_of(each)]

    def finished(self) -> Sequence[Message]:
        out = [message for word in self._filter.flush() for message in self._chunk_of(word)]
        if not self._stopping:  # the client left without audio-stop
            return out
        if not self._started:
            out.append(self._start())
        data: dict[str, Any] = {"text": self._text, "language": self._language}
        if self._context is not None:
            data["context"] = self._context
        out += [_encode("transcript", data), _encode("transcript-stop", {})]
        self._text, self._started, self._stopping = "", False, False
        return out

    def close(self, error: Error | None) -> Close:
        return Close(1000)

    def _start(self) -> str:
        self._started = True
        return _encode("transcript-start", {"language": self._language})

    def _chunk_of(self, word: TimedWord) -> Iterator[Message]:
        if not word.text.strip():
            return
        if not self._started:
            yield self._start()
        piece = f" {word.text}" if self._text else word.text
        self._text += piece
        yield _encode("transcript-chunk", {"text": piece})


def _encode(kind: str, data: dict[str, Any]) -> str:
    return msgspec.json.encode({"type": kind, "data": data}).decode()


def _info(options: WyomingOptions, languages: Sequence[str]) -> dict[str, Any]:
    """What `describe` is answered with."""
    attribution = {"name": "moshi-stt", "url": _URL}
    installed = {"attribution": attribution, "installed": True, "version": __version__}
    model = {
        "name": next((info.model for info in options.modules.values() if info.model), "default"),
        "description": "streaming speech to text",
        "languages": list(dict.fromkeys(languages)),
        **installed,
    }
    program = {
        "name": _PROGRAM,
        "description": "Streaming speech to text",
        "models": [model],
        "supports_transcript_streaming": True,
        "requires_external_vad": not options.endpointing,
        "prefers_auto_gain_enabled": False,
        "prefers_noise_reduction_enabled": False,
        **installed,
    }
    return {"asr": [program], "tts": [], "handle": [], "intent": [], "wake": [], "mic": [], "snd": []}
