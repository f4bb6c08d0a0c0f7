"""Deepgram's doors: `/v1/listen` live and by POST, `/v2/listen` with turns."""

from collections.abc import Sequence
from dataclasses import replace

import msgspec

from moshi_stt.audio.selection import MIXED, Selection
from moshi_stt.config import ServerConfig
from moshi_stt.engine.engine import StreamOptions
from moshi_stt.server.doors import deepgram_flux
from moshi_stt.server.doors.deepgram_live import DeepgramSession
from moshi_stt.server.doors.deepgram_options import DeepgramOptions, Query, parse, refused
from moshi_stt.server.doors.deepgram_shapes import channel_object, metadata, utterances
from moshi_stt.server.doors.door import (
    STATUS,
    Answer,
    Door,
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
from moshi_stt.server.doors.options import any_key, report_ignored
from moshi_stt.server.doors.prefix import with_prefix
from moshi_stt.session import Session
from moshi_stt.text.subtitles import pair_words

_CODES: dict[RefusalKind, tuple[int, str]] = {
    "unauthorized": (401, "INVALID_AUTH"),
    "origin": (403, "FORBIDDEN"),
    "full": (503, "NO_FREE_SLOT"),
    "too_large": (413, "PAYLOAD_TOO_LARGE"),
    "bad_audio": (400, "INVALID_AUDIO"),
    "bad_request": (400, "BAD_REQUEST"),
}
_SENTENCES: dict[RefusalKind, str] = {
    "unauthorized": "Invalid credentials.",
    "origin": "Pages of other sites may not use this server.",
    "full": "All streams of this server are in use: try again later.",
}
EXTRAS = StreamOptions(confidence=True, turns=True)


def refusal(kind: RefusalKind, sentence: str) -> Refused:
    """The answer to a request that is turned away, in Deepgram's shape."""
    status, code = _CODES.get(kind, (STATUS.get(kind, 500), "SERVER_ERROR"))
    headers = (("Retry-After", "1"),) if status == 503 else ()
    return refused(status, code, sentence or _SENTENCES.get(kind, kind), headers=headers)


def deepgram_key(request: Handshake) -> str | None:
    """Of the header, or of the subprotocols `token, KEY` and `bearer, JWT`."""
    offered = request.subprotocols
    if len(offered) > 1 and offered[0].lower() in ("token", "bearer"):
        return offered[1]
    return any_key(request)


def subprotocol(request: Handshake) -> str | None:
    """The named one; a key is never echoed."""
    return next((each for each in request.subprotocols[:1] if each.lower() in ("token", "bearer")), None)


class DeepgramLive(Door):
    """`GET /v1/listen`."""

    name = "deepgram"
    keyless_on_loopback = True
    refuses_when_full = True

    def routes(self, config: ServerConfig) -> Sequence[Route]:
        return [Route("/v1/listen")]

    def key(self, request: Handshake) -> str | None:
        return deepgram_key(request)

    def accept(self, request: Handshake) -> Opening:
        options = parse(request, live=True)
        headers = (("dg-request-id", options.request_id), *report_ignored(self.name, request.peer, options.ignored))
        return Opening(
            options,
            module=options.module,
            channels=options.streams,
            subprotocol=subprotocol(request),
            stream=EXTRAS,
            headers=headers,
        )

    def session(self, opening: Opening) -> Session:
        return with_prefix(DeepgramSession(opening.options), opening.options.prefix)

    def refusal(self, kind: RefusalKind, sentence: str) -> Refused:
        return refusal(kind, sentence)


class DeepgramFlux(Door):
    """`GET /v2/listen`."""

    name = "deepgram-flux"
    keyless_on_loopback = True
    refuses_when_full = True

    def routes(self, config: ServerConfig) -> Sequence[Route]:
        return [Route("/v2/listen")]

    def key(self, request: Handshake) -> str | None:
        return deepgram_key(request)

    def accept(self, request: Handshake) -> Opening:
        options = deepgram_flux.parse(request)
        headers = (("dg-request-id", options.request_id), *report_ignored(self.name, request.peer, options.ignored))
        return Opening(options, module=options.module, subprotocol=subprotocol(request), stream=EXTRAS, headers=headers)

    def session(self, opening: Opening) -> Session:
        return with_prefix(deepgram_flux.FluxSession(opening.options), opening.options.prefix)

    def refusal(self, kind: RefusalKind, sentence: str) -> Refused:
        return refusal(kind, sentence)


class DeepgramFiles(FileDoor):
    """`POST /v1/listen`: the body is the recording."""

    name = "deepgram-files"
    keyless_on_loopback = True

    def routes(self, config: ServerConfig) -> Sequence[Route]:
        return [Route("/v1/listen")]

    def key(self, request: Handshake) -> str | None:
        return deepgram_key(request)

    def check(self, request: Handshake) -> None:
        if request.headers.get("content-type", "").lower().startswith("application/json"):
            raise refused(400, "REMOTE_CONTENT_ERROR", "this server fetches nothing: send the recording as the body")
        parse(request, live=False)

    def parse(self, request: FileRequest) -> FileOptions:
        options = replace(parse(request.handshake, live=False), sha256=request.sha256)
        split = Query(request.handshake).flag("multichannel")
        return FileOptions(
            options,
            options.module,
            StreamOptions(confidence=True),
            selection=Selection(channels="split") if split else MIXED,
            raw=options.format,
        )

    def answer(self, transcript: Transcript, options: FileOptions) -> Answer:
        asked: DeepgramOptions = options.options
        if transcript.channels:
            asked = replace(asked, channels=len(transcript.channels))
        channels = [asked.lists.apply(pair_words(events)) for events in transcript.channels or (transcript.events,)]
        shown_channels = [channel_object(words, asked) for words in channels]
        if asked.detected_language is not None:
            shown_channels = [{**channel, "detected_language": asked.detected_language} for channel in shown_channels]
        results: dict[str, object] = {"channels": shown_channels}
        if asked.utterances:
            said = [each for index, words in enumerate(channels) for each in utterances(words, asked, index)]
            results["utterances"] = sorted(said, key=lambda each: float(each["start"]))
        shown = {"metadata": metadata(asked, asked.sha256(), transcript.duration_seconds), "results": results}
        headers = (("dg-request-id", asked.request_id), *report_ignored(self.name, "", asked.ignored))
        return Answer(msgspec.json.encode(shown), "application/json", headers)

    def refusal(self, kind: RefusalKind, sentence: str) -> Refused:
        return refusal(kind, sentence)
