"""A connection of Deepgram's `/v1/listen`, without I/O: interims, finals, ends of speech and of utterance.

Every word is in exactly one final. The final windows of a channel are contiguous: each begins where the last one ended.
"""

import hashlib
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final

import msgspec

from moshi_stt.audio.live import ContainerInput, LiveInput, PcmInput, Pieces
from moshi_stt.constants import FRAME_SECONDS, SAMPLE_RATE
from moshi_stt.engine.commands import Audio, Finish, Mark
from moshi_stt.errors import AudioError, ProtocolError
from moshi_stt.events import AnyEvent, Error, Marker, Pause, Word
from moshi_stt.server.doors.deepgram_options import DeepgramOptions
from moshi_stt.server.doors.deepgram_shapes import MODEL_ID, channel_object, metadata, model_info, seconds
from moshi_stt.server.doors.heard import Heard
from moshi_stt.session import Action, Close, Feed, Message, Reply, Session
from moshi_stt.text.subtitles import TimedWord

NET_TIMEOUT_SECONDS: Final = 10.0
"""Without audio or KeepAlive for so long, the connection is closed."""
INTERIM_SECONDS: Final = 0.25
"""Audio between two interims."""
LONGEST_WINDOW_SECONDS: Final = 5.0
"""Speech that one final may hold; a longer window is cut after a word."""
_SENTENCE_END: Final = (".", "?", "!", "…")


class _Channel:
    """One channel: its words, its open window, and what it owes the client."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.heard = Heard()
        self.window_start = 0.0
        self.fed = 0
        """Samples given to the stream."""
        self.finalizing: deque[tuple[int, float]] = deque()
        """(marker, position) of each Finalize that has no answer yet."""
        self.utterance_open = False
        """Whether words came since the last `speech_final`."""
        self.utterance_end_due = False
        """Whether words came since the last UtteranceEnd."""
        self.in_speech = False
        self.shown = 0
        """Words of the latest interim."""
        self.interim_at = 0.0

    @property
    def position(self) -> float:
        """Seconds of audio given to the stream."""
        return self.fed / SAMPLE_RATE


class DeepgramSession(Session):
    """See the module's docstring."""

    def __init__(self, options: DeepgramOptions) -> None:
        self.options = options
        mix = not options.multichannel
        self._input: LiveInput = (
            ContainerInput(mix=mix, channels=options.channels) if options.format is None else PcmInput(options.format, mix=mix)
        )
        self._channels = [_Channel(index) for index in range(options.streams)]
        self._hash = hashlib.sha256()
        self._markers = 0
        self._finishing = False
        self._active = True
        self._last_active: float | None = None
        self._metadata = {
            "request_id": options.request_id,
            "model_info": model_info(options),
            "model_uuid": MODEL_ID,
        }

    # ---- from the client ---------------------------------------------------------------------------------------------

    def receive(self, message: Message) -> Iterable[Action]:
        self._active = True
        if isinstance(message, bytes):
            return self._audio(message) if message else self._finish()
        try:
            request = msgspec.json.decode(message)
        except (msgspec.MsgspecError, RecursionError):
            return [self._error("UnparsableClientMessage", f"a text message must be JSON, got {message[:60]!r}")]
        kind = request.get("type") if isinstance(request, dict) else None
        if kind == "KeepAlive":
            return ()
        if kind == "Finalize":
            return self._finalize(request.get("channel"))
        if kind == "CloseStream":
            return self._finish()
        if kind == "Configure":
            return [self._configure(request)]
        known = "KeepAlive, Finalize, CloseStream or Configure"
        return [self._error("UnparsableClientMessage", f"type {str(kind)[:40]!r} is not known: expected {known}")]

    def end_of_input(self) -> Iterable[Action]:
        return self._give(self._input.flush())

    def tick(self, now: float) -> Iterable[Action]:
        if self._active or self._last_active is None:
            self._active, self._last_active = False, now
        if not self._finishing and now - self._last_active >= NET_TIMEOUT_SECONDS:
            return [Close(1011, "NET-0001: no audio and no KeepAlive for 10 seconds")]
        return ()

    def _audio(self, data: bytes) -> Iterator[Action]:
        self._hash.update(data)
        try:
            for pieces in self._input.feed(data):
                yield from self._give(pieces)
        except AudioError as error:
            raise ProtocolError(f"DATA-0000: {error}", 1008) from None

    def _give(self, pieces: Pieces) -> Iterator[Action]:
        for channel, samples in zip(self._channels, pieces, strict=True):
            if len(samples):
                channel.fed += len(samples)
                yield Feed(Audio(samples), channel.index)

    def _finalize(self, which: object) -> Iterator[Action]:
        yield from self._give(self._input.flush())
        for channel in self._channels:
            if isinstance(which, int) and not isinstance(which, bool) and which != channel.index:
                continue
            self._markers += 1
            channel.finalizing.append((self._markers, channel.position))
            yield Feed(Mark(self._markers), channel.index)

    def _finish(self) -> Iterator[Action]:
        if self._finishing:
            return
        self._finishing = True
        yield from self._give(self._input.flush())
        for channel in self._channels:
            yield Feed(Finish(), channel.index)

    def _configure(self, request: dict[str, Any]) -> Reply:
        if request.get("keyterms"):
            return Reply(
                _encode(
                    {
                        "type": "ConfigureFailure",
                        "request_id": self.options.request_id,
                        "code": "CONFIGURE_KEYTERMS_NOT_SUPPORTED",
                        "description": "key terms are not supported by this server",
                    }
                )
            )
        return Reply(_encode({"type": "ConfigureSuccess", "request_id": self.options.request_id}))

    def _error(self, variant: str, description: str) -> Reply:
        return Reply(
            _encode(
                {"type": "Error", "variant": variant, "description": description, "message": description, "code": "DATA-0001"}
            )
        )

    # ---- to the client -----------------------------------------------------------------------------------------------

    def send(self, event: AnyEvent, channel: int = 0) -> Sequence[Message]:
        if type(event) is Error:
            rest = [self._final(each, each.position) for each in self._channels if each.heard.words]
            error = {"type": "Error", "variant": "EngineError", "description": event.message, "message": event.message}
            return [*rest, _encode(error)]
        one = self._channels[channel]
        one.heard.take(event)
        if type(event) is Pause:
            return [*self._speech_started(one, event), *self._by_pause(one)]
        if type(event) is Word:
            one.utterance_open = one.utterance_end_due = True
        elif type(event) is Marker:
            return self._finalized(one, event.id)
        return ()

    def finished(self) -> Sequence[Message]:
        out: list[Message] = []
        for channel in self._channels:
            for _ in range(len(channel.finalizing)):
                channel.finalizing.popleft()
                out.append(self._final(channel, channel.position, speech_final=channel.utterance_open, from_finalize=True))
            if channel.heard.words or channel.utterance_open:
                out.append(self._final(channel, channel.position, speech_final=channel.utterance_open))
        duration = max(channel.position for channel in self._channels)
        out.append(_encode({"type": "Metadata", **metadata(self.options, self._hash.hexdigest(), duration)}))
        return out

    def close(self, error: Error | None) -> Close:
        if error is None:
            return Close(1000)
        return Close(1011 if error.close_code is None else error.close_code, error.message)

    def _speech_started(self, channel: _Channel, pause: Pause) -> Iterator[Message]:
        if channel.in_speech or pause.silence >= FRAME_SECONDS:
            return
        channel.in_speech = True
        if self.options.vad_events:
            at = seconds(max(0.0, pause.time - FRAME_SECONDS))
            yield _encode({"type": "SpeechStarted", "channel": self._indices(channel), "timestamp": at})

    def _by_pause(self, channel: _Channel) -> Iterator[Message]:
        """What 80 ms more of audio make due."""
        options, heard = self.options, channel.heard
        yield from self._cut_long(channel)
        gap = heard.gap
        if channel.utterance_open and options.endpointing is not None and gap >= options.endpointing:
            yield self._final(channel, heard.settled, speech_final=True)
        if options.utterance_end is not None and channel.utterance_end_due and heard.word_gap >= options.utterance_end:
            if heard.words:
                yield self._final(channel, heard.settled)
            channel.utterance_end_due = False
            channel.in_speech = channel.in_speech and heard.silence < FRAME_SECONDS
            yield _encode({"type": "UtteranceEnd", "channel": self._indices(channel), "last_word_end": seconds(heard.last_end)})
        elif options.interim and len(heard.words) > channel.shown and heard.time - channel.interim_at >= INTERIM_SECONDS:
            channel.shown, channel.interim_at = len(heard.words), heard.time
            yield self._results(channel, list(heard.words), max(heard.settled, heard.words[-1].end), is_final=False)

    def _cut_long(self, channel: _Channel) -> Iterator[Message]:
        words = channel.heard.words
        if len(words) < 2 or words[-1].end - max(channel.window_start, words[0].start) <= LONGEST_WINDOW_SECONDS:
            return
        ends = [index + 1 for index in range(len(words) - 1) if words[index].text.endswith(_SENTENCE_END)]
        count = ends[-1] if ends else len(words) - 1
        yield self._final(channel, words[count].start, count=count)

    def _finalized(self, channel: _Channel, marker: int) -> Sequence[Message]:
        out: list[Message] = []
        while channel.finalizing and channel.finalizing[0][0] <= marker:
            _, position = channel.finalizing.popleft()
            channel.heard.settle(position)
            out.append(self._final(channel, position, speech_final=channel.utterance_open, from_finalize=True))
        return out

    def _final(
        self,
        channel: _Channel,
        cut: float,
        *,
        speech_final: bool = False,
        from_finalize: bool = False,
        count: int | None = None,
    ) -> Message:
        """Close the window at `cut`: a final with the first `count` words that wait, or all of them."""
        waiting = channel.heard.words
        words = [waiting.popleft() for _ in range(len(waiting) if count is None else count)]
        cut = max(cut, channel.window_start, *(word.end for word in words[-1:]))
        message = self._results(channel, words, cut, is_final=True, speech_final=speech_final, from_finalize=from_finalize)
        channel.window_start = cut
        channel.shown, channel.interim_at = 0, channel.heard.time
        if speech_final:
            channel.utterance_open = channel.in_speech = False
        return message

    def _results(
        self,
        channel: _Channel,
        words: list[TimedWord],
        cut: float,
        *,
        is_final: bool,
        speech_final: bool = False,
        from_finalize: bool = False,
    ) -> Message:
        start = seconds(channel.window_start)
        return _encode(
            {
                "type": "Results",
                "channel_index": self._indices(channel),
                "duration": seconds(max(0.0, seconds(cut) - start)),
                "start": start,
                "is_final": is_final,
                "speech_final": speech_final,
                "channel": channel_object(self.options.lists.apply(words), self.options),
                "metadata": self._metadata,
                "from_finalize": from_finalize,
            }
        )

    def _indices(self, channel: _Channel) -> list[int]:
        return [channel.index, len(self._channels)]


def _encode(message: dict[str, Any]) -> str:
    return msgspec.json.encode(message).decode()
