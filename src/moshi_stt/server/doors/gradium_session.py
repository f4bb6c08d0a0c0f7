"""A connection of Gradium's speech recognition, without I/O: `setup`, audio, flushes, and one `step` for each 80 ms.

Steps and words keep an order that clients count on: a step that ends at T goes out only when every word that starts before
T minus the announced delay is out. Steps wait for that.
"""

import base64
import binascii
import math
import uuid
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import msgspec

from moshi_stt.audio.live import ContainerInput, LiveInput, OpusInput, PcmFormat, PcmInput, Pieces
from moshi_stt.constants import FRAME_SAMPLES, FRAME_SECONDS, SAMPLE_RATE
from moshi_stt.engine.commands import Audio, Finish, Mark, Reset
from moshi_stt.engine.engine import EngineInfo
from moshi_stt.engine.turns import silence_score
from moshi_stt.errors import AudioError, ProtocolError
from moshi_stt.events import AnyEvent, EndWord, Error, Marker, Pause, Ready, Word
from moshi_stt.server.doors.options import languages_of, module_for_language, report_ignored
from moshi_stt.session import Action, Close, Message, Reply, Session
from moshi_stt.text.subtitles import UNKNOWN_WORD_SECONDS, TimedWord
from moshi_stt.text.word_lists import WordFilter, WordLists

HORIZONS: Final = (0.5, 1.0, 2.0, 3.0)
POLICY: Final = 1008
_IGNORED: Final = ("keywords", "padding_bonus", "temp", "delay_in_frames", "delay_in_tokens")


@dataclass
class Setup:
    """What one request asks for."""

    audio: LiveInput
    request_id: str = field(default_factory=lambda: str(uuid.uuid4()))
    model_name: str = "default"
    close_on_end: bool = True
    client_id: str | None = None


def input_of(shown: object) -> LiveInput:
    """The reader of an `input_format`. Raises AudioError."""
    if shown is None:
        shown = "wav"
    if shown == "wav":
        return ContainerInput()
    if shown == "opus":
        return OpusInput()
    return PcmInput(pcm_format(str(shown)))


def pcm_format(shown: str) -> PcmFormat:
    """Of samples without a header: `pcm`, `pcm_16000`, `ulaw_8000`, `alaw_8000`. Raises AudioError."""
    name, _, rate = shown.partition("_")
    encodings: dict[str, Literal["linear16", "mulaw", "alaw"]] = {"pcm": "linear16", "ulaw": "mulaw", "alaw": "alaw"}
    if name not in encodings or (rate and not rate.isdigit()) or (name != "pcm" and not rate):
        raise AudioError(f"input_format {shown[:40]!r}: expected wav, opus, pcm, pcm_RATE, ulaw_8000 or alaw_8000")
    return PcmFormat(encodings[name], int(rate) if rate else SAMPLE_RATE)


def json_config(shown: object) -> dict[str, Any]:
    """The `json_config` of a request: an object, or one as JSON text. Raises ProtocolError."""
    if isinstance(shown, str) and shown.strip():
        try:
            shown = msgspec.json.decode(shown)
        except msgspec.MsgspecError:
            raise ProtocolError("json_config is not valid JSON", POLICY) from None
    if shown is None or shown == "":
        return {}
    if not isinstance(shown, dict):
        raise ProtocolError("json_config must be an object, or an object as JSON text", POLICY)
    return shown


def check_language(language: object, modules: Mapping[str, EngineInfo]) -> None:
    """Raises ProtocolError for a language that no loaded model knows."""
    if language in (None, "", "any"):
        return
    if not isinstance(language, str) or (modules and module_for_language(modules, language) is None):
        known = ", ".join(languages_of(modules))
        raise ProtocolError(f"language {str(language)[:20]!r} is not known to the loaded model: expected any, {known}", POLICY)


class GradiumSession(Session):
    """See the module's docstring. delay_frames: what `ready` announces."""

    may_idle = True

    def __init__(self, modules: Mapping[str, EngineInfo], *, delay_frames: int, lists: WordLists, peer: str = "") -> None:
        self._modules = modules
        self._delay_frames = delay_frames
        self._filter = WordFilter(lists)
        self._peer = peer
        self._setup: Setup | None = None
        self._restarting = False
        """Whether a further `setup` waits for the stream's fresh state."""
        self._requests = 0
        self._ending: int | None = None
        """The marker behind a request's last audio, where the connection stays."""
        self._markers = 0
        self._flushes: deque[tuple[int, object]] = deque()
        self._steps: deque[Pause] = deque()
        self._settled = 0.0
        self._last_stop = 0.0
        self._step = 0
        self._open_word: TimedWord | None = None
        self._finishing = False

    # ---- from the client ---------------------------------------------------------------------------------------------

    def receive(self, message: Message) -> Iterable[Action]:
        if isinstance(message, bytes):
            raise ProtocolError("binary messages are not taken: send JSON text", POLICY)
        try:
            request = msgspec.json.decode(message)
        except (msgspec.MsgspecError, RecursionError):
            raise ProtocolError("the message is not valid JSON", POLICY) from None
        kind = request.get("type") if isinstance(request, dict) else None
        if kind == "setup":
            return self._begin(request)
        if kind == "end_of_stream" and self._setup is None:
            return [Close(1000)]
        if kind not in ("audio", "flush", "end_of_stream"):
            raise ProtocolError(f"type {str(kind)[:40]!r} is not known: expected setup, audio, flush or end_of_stream", POLICY)
        if self._setup is None:
            raise ProtocolError("setup must come first", POLICY)
        client_id = request.get("client_req_id")
        if client_id is not None and client_id != self._setup.client_id:
            raise ProtocolError(f"client_req_id {str(client_id)[:40]!r} names no open request: open one with setup", POLICY)
        if kind == "audio":
            return self._audio(self._setup, request.get("audio"))
        return self._flush(request.get("flush_id")) if kind == "flush" else self._end()

    def end_of_input(self) -> Iterable[Action]:
        return () if self._setup is None else self._give(self._setup.audio.flush())

    def _begin(self, request: dict[str, Any]) -> Iterator[Action]:
        if self._setup is not None or self._ending is not None:
            raise ProtocolError("a request is open already: one at a time, end it with end_of_stream", POLICY)
        config = json_config(request.get("json_config"))
        check_language(config.get("language") or request.get("language"), self._modules)
        try:
            audio = input_of(request.get("input_format"))
        except AudioError as error:
            raise ProtocolError(str(error), POLICY) from None
        client_id = request.get("client_req_id")
        self._setup = Setup(
            audio,
            model_name=str(request.get("model_name") or "default"),
            close_on_end=request.get("close_ws_on_eos") is not False,
            client_id=client_id if isinstance(client_id, str) else None,
        )
        report_ignored("gradium", self._peer, [name for name in _IGNORED if config.get(name)])
        self._requests += 1
        if self._requests > 1:
            self._restarting = True
            yield Reset()
            return
        yield Reply(self._ready(self._setup))

    def _ready(self, setup: Setup) -> str:
        return self._message(
            "ready",
            request_id=setup.request_id,
            model_name=setup.model_name,
            sample_rate=SAMPLE_RATE,
            frame_size=FRAME_SAMPLES,
            delay_in_frames=self._delay_frames,
            delay_in_tokens=self._delay_frames,
            text_stream_names=[],
        )

    def _audio(self, setup: Setup, audio: object) -> Iterator[Action]:
        try:
            if not isinstance(audio, str):
                raise ValueError("no text")
            data = base64.b64decode(audio, validate=True)
        except (binascii.Error, ValueError):
            raise ProtocolError("`audio` must be base64 text", POLICY) from None
        try:
            for pieces in setup.audio.feed(data):
                yield from self._give(pieces)
        except AudioError as error:
            raise ProtocolError(str(error), POLICY) from None

    def _give(self, pieces: Pieces) -> Iterator[Action]:
        for samples in pieces:
            if len(samples):
                yield Audio(samples)

    def _flush(self, flush_id: object) -> Iterator[Action]:
        assert self._setup is not None
        yield from self._give(self._setup.audio.flush())
        self._markers += 1
        self._flushes.append((self._markers, flush_id))
        yield Mark(self._markers)

    def _end(self) -> Iterator[Action]:
        assert self._setup is not None
        setup = self._setup
        yield from self._give(setup.audio.flush())
        if setup.close_on_end:
            self._finishing = True
            yield Finish()
            return
        self._markers += 1
        self._ending = self._markers
        yield Mark(self._markers)

    # ---- to the client -----------------------------------------------------------------------------------------------

    def send(self, event: AnyEvent, channel: int = 0) -> Sequence[Message]:
        if type(event) is Error:
            code = 1011 if event.close_code is None else event.close_code
            return [self._message("error", message=event.message, code=code)]
        if type(event) is Ready:
            return self._restarted()
        if self._setup is None:
            return ()
        if type(event) is Word:
            word = TimedWord(event.text, event.start_time, event.start_time + UNKNOWN_WORD_SECONDS)
            return [message for each in self._filter.push(word) for message in self._text(each)]
        if type(event) is EndWord:
            return self._end_text(event.stop_time)
        if type(event) is Pause:
            self._steps.append(event)
            self._settled = max(self._settled, event.settled)
            return [*self._due_steps()]
        return [*self._answer(event.id)] if type(event) is Marker else ()

    def finished(self) -> Sequence[Message]:
        if self._setup is None:
            return ()
        out: list[Message] = [*self._rest()]
        out += [self._message("flushed", flush_id=flush_id) for _, flush_id in self._flushes]
        return [*out, self._message("end_of_stream")] if self._finishing else out

    def close(self, error: Error | None) -> Close:
        if error is None:
            return Close(1000)
        return Close(1011 if error.close_code is None else error.close_code, error.message)

    def _restarted(self) -> Sequence[Message]:
        if not self._restarting or self._setup is None:
            return ()
        self._restarting = False
        self._steps.clear()
        self._settled = self._last_stop = 0.0
        self._step = 0
        self._open_word = None
        return [self._ready(self._setup)]

    def _text(self, word: TimedWord) -> Iterator[Message]:
        yield from self._end_text(word.start)
        self._open_word = word
        for text in word.text.split():
            yield self._message("text", text=text, start_s=round(word.start, 3), stream_id=0)

    def _end_text(self, stop: float) -> list[Message]:
        if self._open_word is None:
            return []
        stop = max(stop, self._open_word.start + 0.001)
        self._open_word = None
        return [self._message("end_text", stop_s=round(stop, 3), stream_id=0)]

    def _due_steps(self, *, all_of_them: bool = False) -> Iterator[Message]:
        delay = self._delay_frames * FRAME_SECONDS
        while self._steps and (all_of_them or self._settled >= (self._step + 1) * FRAME_SECONDS - delay - 1e-6):
            yield self._step_message(self._steps.popleft())

    def _step_message(self, pause: Pause) -> str:
        scores = pause.heads
        if len(scores) < len(HORIZONS):
            score = 1.0 if math.isinf(pause.silence) else silence_score(pause.silence)
            scores = (score,) * len(HORIZONS)
        index = self._step
        self._step += 1
        return self._message(
            "step",
            vad=[
                {"horizon_s": horizon, "inactivity_prob": round(score, 4)}
                for horizon, score in zip(HORIZONS, scores, strict=False)
            ],
            step_idx=index,
            step_duration_s=FRAME_SECONDS,
            total_duration_s=round((index + 1) * FRAME_SECONDS, 3),
        )

    def _rest(self) -> Iterator[Message]:
        """Every word and step of the audio so far."""
        for word in self._filter.flush():
            yield from self._text(word)
        yield from self._due_steps(all_of_them=True)
        if self._open_word is not None:
            yield from self._end_text(self._open_word.end)

    def _answer(self, marker: int) -> Iterator[Message]:
        yield from self._rest()
        while self._flushes and self._flushes[0][0] <= marker:
            yield self._message("flushed", flush_id=self._flushes.popleft()[1])
        if self._ending == marker:
            yield self._message("end_of_stream")
            self._setup, self._ending = None, None

    def _message(self, kind: str, **fields: Any) -> str:
        message: dict[str, Any] = {"type": kind, **fields}
        if self._setup is not None and self._setup.client_id is not None:
            message["client_req_id"] = self._setup.client_id
        return msgspec.json.encode(message).decode()
