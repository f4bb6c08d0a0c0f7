"""What doors have in common when they read options: booleans, languages, keys, and what is taken and ignored."""

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Final

from moshi_stt.engine.engine import EngineInfo
from moshi_stt.server.doors.door import Handshake
from moshi_stt.text.word_lists import WordLists

log = logging.getLogger(__name__)

IGNORED_HEADER: Final = "x-moshi-ignored"
"""Answer header that names the options that were taken and do nothing."""

_TRUE: Final = ("true", "1", "yes", "on")
_FALSE: Final = ("false", "0", "no", "off", "")

NOBODY: Callable[[str, str], None] = lambda door, option: None  # noqa: E731
_count: list[Callable[[str, str], None]] = [NOBODY]


def on_ignored(count: Callable[[str, str], None]) -> None:
    """Call `count(door, option)` for every option that is ignored from now on: the metrics' hook."""
    _count[0] = count


def report_ignored(door: str, peer: str, options: Iterable[str]) -> tuple[tuple[str, str], ...]:
    """Say in one log line which options of a request do nothing, and count them; the answer headers that say so."""
    names = tuple(dict.fromkeys(options))
    if not names:
        return ()
    log.warning("%s: %s asked for options that this server ignores: %s", door, peer, ", ".join(names))
    for name in names:
        _count[0](door, name)
    return ((IGNORED_HEADER, ", ".join(names)),)


def truth(value: str) -> bool | None:
    """A boolean as clients write it; None where it is none."""
    value = value.strip().lower()
    return True if value in _TRUE else False if value in _FALSE else None


def primary_language(tag: str) -> str:
    """`en` of `en-US` and `en_us`."""
    return tag.strip().lower().replace("_", "-").partition("-")[0]


def module_info(modules: Mapping[str, EngineInfo]) -> EngineInfo | None:
    """The first module's."""
    return next(iter(modules.values()), None)


def module_for_language(modules: Mapping[str, EngineInfo], tag: str | None) -> str | None:
    """The first module that knows the language, None where none does. An empty list of languages stands for any."""
    if tag is None:
        return next(iter(modules), None)
    wanted = primary_language(tag)
    return next((name for name, info in modules.items() if not info.languages or wanted in info.languages), None)


def prefix_seconds(modules: Mapping[str, EngineInfo], module: str | None) -> float:
    """The silence that the module's model needs in front of speech; None is the first module."""
    info = module_info(modules) if module is None else modules.get(module)
    return 0.0 if info is None else info.prefix_silence_seconds


def languages_of(modules: Mapping[str, EngineInfo]) -> tuple[str, ...]:
    """All languages of all modules."""
    return tuple(dict.fromkeys(language for info in modules.values() for language in info.languages))


def bearer_key(request: Handshake, *schemes: str) -> str | None:
    """The key of an `Authorization` header of one of these schemes (`bearer`, `token`)."""
    scheme, _, key = request.headers.get("authorization", "").strip().partition(" ")
    return key.strip() or None if scheme.lower() in schemes else None


def any_key(request: Handshake) -> str | None:
    """The key wherever a client may have put it: all doors but the native one take it in each of these places."""
    for header in ("x-api-key", "kyutai-api-key"):
        if request.headers.get(header):
            return request.headers[header]
    return bearer_key(request, "bearer", "token") or request.parameter("auth_id") or request.parameter("token")


def query_lists(request: Handshake) -> WordLists:
    """The word lists of a query: `profanity_filter`, and `replace` any number of times. Raises ValueError."""
    profanity = bool(truth(request.parameter("profanity_filter") or "false"))
    return WordLists.parse(profanity=profanity, replace=request.parameters("replace"))
