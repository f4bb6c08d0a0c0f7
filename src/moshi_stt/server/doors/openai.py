"""OpenAI's Realtime transcription as a door: `GET /v1/realtime` (the session is in `openai_realtime.py`)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from moshi_stt.config import ServerConfig
from moshi_stt.engine.engine import EngineInfo, StreamOptions
from moshi_stt.server.doors.door import Door, Handshake, Opening, RefusalKind, Refused, Route
from moshi_stt.server.doors.openai_models import DEFAULT_MODEL, BadOption, module_for_model, openai_key, refusal, refused_option
from moshi_stt.server.doors.openai_realtime import RealtimeSession
from moshi_stt.server.doors.options import prefix_seconds, query_lists
from moshi_stt.server.doors.prefix import with_prefix
from moshi_stt.session import Session
from moshi_stt.text.word_lists import NO_LISTS, WordLists

PATH: Final = "/v1/realtime"
SUBPROTOCOL: Final = "realtime"
_BETA_SUBPROTOCOL: Final = "openai-beta.realtime-v1"


@dataclass(frozen=True)
class RealtimeOptions:
    """What the handshake says."""

    model: str
    beta: bool
    intent: bool
    modules: Mapping[str, EngineInfo]
    peer: str
    prefix: float = 0.0
    lists: WordLists = NO_LISTS


class OpenAIRealtime(Door):
    """See the module's docstring."""

    name = "openai-realtime"
    keyless_on_loopback = True
    refuses_when_full = True

    def routes(self, config: ServerConfig) -> Sequence[Route]:
        return [Route(PATH)]

    def key(self, request: Handshake) -> str | None:
        return openai_key(request)

    def accept(self, request: Handshake) -> Opening:
        if request.parameter("call_id") is not None:
            raise refused_option(BadOption("call_id is not supported: this server has no calls", "call_id"))
        model = request.parameter("model") or DEFAULT_MODEL
        try:
            module = module_for_model(request.modules, model)
            lists = query_lists(request)
        except ValueError as error:
            raise refused_option(error if isinstance(error, BadOption) else BadOption(str(error), "replace")) from None
        beta = request.headers.get("openai-beta", "").strip() == "realtime=v1" or _BETA_SUBPROTOCOL in request.subprotocols
        options = RealtimeOptions(
            model,
            beta,
            request.parameter("intent") == "transcription",
            dict(request.modules),
            request.peer,
            prefix_seconds(request.modules, module),
            lists,
        )
        subprotocol = SUBPROTOCOL if SUBPROTOCOL in request.subprotocols else None
        return Opening(options, module=module, subprotocol=subprotocol, stream=StreamOptions(confidence=True, turns=True))

    def session(self, opening: Opening) -> Session:
        options: RealtimeOptions = opening.options
        session = RealtimeSession(
            options.model,
            options.modules,
            beta=options.beta,
            transcription_created=options.intent,
            lists=options.lists,
            peer=options.peer,
        )
        return with_prefix(session, options.prefix)

    def refusal(self, kind: RefusalKind, sentence: str) -> Refused:
        return refusal(kind, sentence)
