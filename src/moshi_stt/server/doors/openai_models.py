"""OpenAI's names of models, keys and errors, common to its REST and Realtime doors."""

import re
from collections.abc import Mapping
from typing import Any, Final

import msgspec

from moshi_stt.engine.engine import EngineInfo
from moshi_stt.server.doors.door import STATUS, Handshake, RefusalKind, Refused
from moshi_stt.server.doors.options import any_key, languages_of, module_for_language

ALIASES: Final = (
    "whisper-1",
    "gpt-transcribe",
    "gpt-live-transcribe",
    "gpt-realtime-whisper",
    "gpt-4o-transcribe",
    "gpt-4o-mini-transcribe",
)
"""Names that clients have built in; each stands for the model that is loaded."""
DEFAULT_MODEL: Final = "whisper-1"
_DATED: Final = re.compile(rf"({'|'.join(map(re.escape, ALIASES))})-\d{{4}}-\d{{2}}-\d{{2}}")
KEY_SUBPROTOCOL: Final = "openai-insecure-api-key."

LANGUAGE_NAMES: Final = {
    "en": "english", "fr": "french", "de": "german", "es": "spanish", "pt": "portuguese", "it": "italian", "nl": "dutch",
}  # fmt: skip


class BadOption(ValueError):
    """An option that cannot be used. param and code: as OpenAI's errors name them."""

    def __init__(self, message: str, param: str | None, code: str = "invalid_value", status: int = 400) -> None:
        super().__init__(message)
        self.param = param
        self.code = code
        self.status = status


def module_for_model(modules: Mapping[str, EngineInfo], model: str) -> str | None:
    """The module that a model's name stands for; None stands for the route's own. Raises BadOption (404)."""
    if model in ALIASES or _DATED.fullmatch(model):
        return None
    for name, info in modules.items():
        if model in (name, info.model):
            return name
    known = ", ".join([*modules, *ALIASES])
    raise BadOption(f"The model `{model[:100]}` does not exist here: expected one of {known}", "model", "model_not_found", 404)


def module_for_languages(modules: Mapping[str, EngineInfo], languages: list[str], model: str | None) -> tuple[str | None, str]:
    """Module and language of the first language that is spoken here. Raises BadOption where none is.

    model: the module that was chosen by name, if any: only it counts then.
    """
    among = {model: modules[model]} if model is not None and model in modules else modules
    for language in languages:
        module = module_for_language(among, language)
        if module is not None:
            return (model or module), language
    if not languages or not among:
        return model, ""
    known = ", ".join(languages_of(among))
    raise BadOption(f"language {languages[0][:20]!r} is not known to the loaded model: expected one of {known}", "language")


def openai_key(request: Handshake) -> str | None:
    """Of the header, or of the subprotocol that browsers use."""
    for offered in request.subprotocols:
        if offered.startswith(KEY_SUBPROTOCOL):
            return offered[len(KEY_SUBPROTOCOL) :]
    return any_key(request)


def error_object(message: str, type_: str, code: str | None, param: str | None = None) -> dict[str, Any]:
    return {"message": message, "type": type_, "param": param, "code": code}


_KINDS: Final[dict[RefusalKind, tuple[int, str, str]]] = {
    "unauthorized": (401, "invalid_request_error", "invalid_api_key"),
    "origin": (403, "invalid_request_error", "origin_not_allowed"),
    "full": (429, "rate_limit_error", "rate_limit_exceeded"),
    "stopping": (503, "server_error", "server_shutting_down"),
    "failed": (503, "server_error", "model_failed"),
    "loading": (503, "server_error", "model_loading"),
    "too_large": (413, "invalid_request_error", "file_too_large"),
    "timeout": (408, "invalid_request_error", "timeout"),
    "bad_audio": (400, "invalid_request_error", "invalid_value"),
    "bad_request": (400, "invalid_request_error", "invalid_value"),
    "internal": (500, "server_error", "internal_error"),
}
_USUAL: Final[dict[RefusalKind, str]] = {
    "unauthorized": "Incorrect API key provided: send a key of this server as `Authorization: Bearer KEY`",
    "origin": "Pages of other sites may not use this server",
    "full": "All streams of this server are in use: try again later",
}


def refusal(kind: RefusalKind, sentence: str) -> Refused:
    """The answer to a request that is turned away, in OpenAI's shape."""
    status, type_, code = _KINDS.get(kind, (STATUS.get(kind, 500), "server_error", kind))
    headers: list[tuple[str, str]] = []
    if status == 401:
        headers.append(("WWW-Authenticate", "Bearer"))
    elif status == 429:
        headers.append(("Retry-After", "1"))
    elif kind in ("failed", "internal"):
        headers.append(("x-should-retry", "false"))
    param = "file" if kind == "bad_audio" else None
    return refused(status, sentence or _USUAL.get(kind, kind), type_, code, param, tuple(headers))


def refused(
    status: int,
    message: str,
    type_: str = "invalid_request_error",
    code: str | None = None,
    param: str | None = None,
    headers: tuple[tuple[str, str], ...] = (),
) -> Refused:
    body = msgspec.json.encode({"error": error_object(message, type_, code, param)})
    return Refused(status, body, "application/json", headers)


def refused_option(error: BadOption) -> Refused:
    return refused(error.status, str(error), "invalid_request_error", error.code, error.param)
