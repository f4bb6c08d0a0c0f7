"""The native protocol, moshi-server's: MessagePack over WebSockets, and files by POST (docs/protocol.md)."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

from moshi_stt import protocol
from moshi_stt.audio.opus import OpusStream
from moshi_stt.audio.selection import Selection, read_channels, read_number
from moshi_stt.audio.watch import AudioWatch
from moshi_stt.config import ServerConfig
from moshi_stt.constants import API_KEY_HEADER, API_KEY_QUERY, FRAME_SAMPLES
from moshi_stt.engine.commands import Audio
from moshi_stt.engine.engine import StreamOptions
from moshi_stt.engine.turns import TurnDetector
from moshi_stt.errors import AudioError, ProtocolError
from moshi_stt.events import AnyEvent, EndWord, Interim, Pause, Word
from moshi_stt.server.doors.door import (
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
from moshi_stt.server.resume import ResumeRequest
from moshi_stt.session import Action, Message, Session
from moshi_stt.text.subtitles import pair_words

LOUDEST = float(1 << 31)
"""No sample format has larger values: beyond it, as for NaN and inf, a sample is taken for 0."""

_EXTRAS = tuple(StreamOptions.__dataclass_fields__)
"""Query parameters that ask for further events."""


class KyutaiDoor(Door):
    """WebSockets on each module's path."""

    name = "kyutai"

    def routes(self, config: ServerConfig) -> Sequence[Route]:
        return [Route(module.path, module.name) for module in config.modules]

    def key(self, request: Handshake) -> str | None:
        """The header's if there is that header at all, else the query's (contract section 1.3)."""
        in_query = request.parameters(API_KEY_QUERY)
        if len(in_query) > 1:
            raise Refused(400, f"Failed to deserialize query string: duplicate field `{API_KEY_QUERY}`")
        if API_KEY_HEADER in request.headers:
            return header_key(request.headers)
        return in_query[0] if in_query else None

    def accept(self, request: Handshake) -> Opening:
        extras = StreamOptions(**{name: request.parameter(name) in ("1", "true") for name in _EXTRAS})
        return Opening(stream=extras, resume=_resume(request))

    def session(self, opening: Opening) -> Session:
        return KyutaiSession(turns=opening.stream.turns)

    def refusal(self, kind: RefusalKind, sentence: str) -> Refused:
        return _refusal(kind, super().refusal(kind, sentence))


def _resume(request: Handshake) -> ResumeRequest | None:
    """`resume=1`, or `resume=TOKEN&samples=N&events=N` of a client that comes back."""
    asked = request.parameter("resume")
    if asked is None or asked in ("", "0", "false"):
        return None
    if asked in ("1", "true"):
        return ResumeRequest()
    numbers = [request.parameter(name) or "" for name in ("samples", "events")]
    if not all(number.isdecimal() and len(number) < 16 for number in numbers):
        raise Refused(400, "resume=TOKEN needs samples=N and events=N, whole numbers: what the server acknowledged, what came")
    return ResumeRequest(asked, *map(int, numbers))


class KyutaiFiles(FileDoor):
    """Files by POST on each module's path, answered by a JSON array (contract section 1.4)."""

    name = "kyutai-files"

    def routes(self, config: ServerConfig) -> Sequence[Route]:
        return [Route(module.path, module.name) for module in config.modules]

    def key(self, request: Handshake) -> str | None:
        """The key counts in the header alone."""
        return header_key(request.headers)

    def parse(self, request: FileRequest) -> FileOptions:
        """options: whether the client wants lines."""
        lines = LINES in request.handshake.headers.get("accept", "")
        whole = request.handshake.parameter("whole") in ("1", "true")
        return FileOptions(lines, selection=_selection(request.handshake), whole=whole)

    def answer(self, transcript: Transcript, options: FileOptions) -> Answer:
        if not transcript.channels:
            return Answer(msgspec.json.encode(transcript.events), "application/json")
        words = [
            word._replace(channel=number) for number, events in enumerate(transcript.channels, 1) for word in pair_words(events)
        ]
        shown = [
            msgspec.to_builtins(event) | {"channel": word.channel}
            for word in sorted(words, key=lambda word: word.start)
            for event in (Word(word.text, word.start), EndWord(word.end))
        ]
        return Answer(msgspec.json.encode(shown), "application/json")

    def stream(self, options: FileOptions) -> FileAnswer | None:
        return _Lines() if options.options and options.selection.channels != "split" else None

    def refusal(self, kind: RefusalKind, sentence: str) -> Refused:
        refused = _refusal(kind, super().refusal(kind, sentence))
        if refused.status == 503:
            refused.headers = (("Retry-After", "10"),)
        return refused


def _selection(request: Handshake) -> Selection:
    """`channels=mix`, `split` or a number, and `track=N`."""
    channels, track = request.parameter("channels"), request.parameter("track")
    try:
        return Selection(read_number(track) if track else None, read_channels(channels) if channels else "mix")
    except ValueError as error:
        raise Refused(400, f"channels is mix, split or the number of a channel, track the number of a track: {error}") from None


LINES = "application/x-ndjson"
"""Media type of an answer that comes line by line, for clients that show progress."""


class _Lines(FileAnswer):
    """A JSON object a line: the events as they come, then `End` with the audio's duration, or `Error`."""

    content_type = LINES

    def event(self, event: Word | EndWord | Interim) -> bytes:
        return b"" if isinstance(event, Interim) else msgspec.json.encode(event) + b"\n"

    def end(self, transcript: Transcript) -> bytes:
        return msgspec.json.encode({"type": "End", "duration": round(transcript.duration_seconds, 3)}) + b"\n"

    def error(self, kind: RefusalKind, sentence: str) -> bytes:
        return msgspec.json.encode({"type": "Error", "message": sentence}) + b"\n"


def header_key(headers: Mapping[str, str]) -> str | None:
    """The key in the header; None without one, and where it has anything but visible ASCII."""
    key = headers.get(API_KEY_HEADER)
    if key is None or not all(" " <= char <= "~" or char == "\t" for char in key):
        return None
    return key


def _refusal(kind: RefusalKind, usual: Refused) -> Refused:
    """As moshi-server: 401 has no body."""
    return Refused(401) if kind == "unauthorized" else usual


class KyutaiSession(Session):
    """A connection of the native protocol. Text messages are ignored."""

    def __init__(self, *, turns: bool = False) -> None:
        """turns: tell the client of `SpeechStarted`, `EndOfTurn` and `TurnResumed`."""
        self._turns = TurnDetector() if turns else None
        self.silenced_samples = 0
        """Samples that were NaN, infinite or beyond `LOUDEST`, and were taken for 0."""
        self._opus: OpusStream | None = None
        self._watch = AudioWatch()
        self._news: list[str] = []
        self._has_words = False

    def receive(self, message: Message) -> Iterable[Action]:
        if type(message) is str:
            return ()
        assert isinstance(message, bytes)
        inbound = protocol.decode(message)
        if isinstance(inbound, protocol.OggOpus):
            return self._decode_opus(inbound.data)
        if type(inbound) is Audio:
            self._hear(inbound.samples)
        return (inbound,)

    def end_of_input(self) -> Iterable[Action]:
        if self._opus is None:
            return
        try:
            pcm = self._opus.finish()
        except AudioError as error:
            raise ProtocolError(f"OggOpus: {error}", protocol.MALFORMED) from None
        if len(pcm):
            yield self._hear(pcm)

    def send(self, event: AnyEvent, channel: int = 0) -> Sequence[Message]:
        if type(event) is Word:
            self._has_words = True
        if self._turns is None:
            return (protocol.encode(event),)
        turns = self._turns.take(event)
        return [protocol.encode(each) for each in (turns if type(event) is Pause else [*turns, event])]

    def warnings(self, waiting_samples: int) -> list[str]:
        news, self._news = self._news, []
        if not self._has_words and waiting_samples < 2 * FRAME_SAMPLES:
            news += self._watch.without_words()
        return news

    def _decode_opus(self, data: bytes) -> Iterator[Action]:
        """About a second of audio at a time. The decoder lives as long as the connection, whatever comes between."""
        if self._opus is None:
            self._opus = OpusStream()
        try:
            for pcm in self._opus.pieces(data):
                yield self._hear(pcm)
        except AudioError as error:
            raise ProtocolError(f"OggOpus: {error}", protocol.MALFORMED) from None

    def _hear(self, pcm: NDArray[np.float32]) -> Audio:
        """Check and mend the samples, in place."""
        with np.errstate(all="ignore"):
            energy = float(np.dot(pcm, pcm))
        if not energy <= LOUDEST * LOUDEST:  # neither is NaN
            self._silence(pcm)
        self._news += self._watch.feed(pcm)
        return Audio(pcm)

    def _silence(self, pcm: NDArray[np.float32]) -> None:
        """Set to 0, in place, what is no sample: it would make the stream's state NaN for good."""
        bad = ~(np.abs(pcm) <= LOUDEST)
        count = int(np.count_nonzero(bad))
        pcm[bad] = 0
        if count and not self.silenced_samples:
            self._news.append(f"{count} of {len(pcm)} samples are NaN, infinite or beyond ±2^31: such samples are taken for 0")
        self.silenced_samples += count
