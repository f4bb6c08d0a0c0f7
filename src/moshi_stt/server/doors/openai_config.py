"""The `session` object of OpenAI's Realtime transcription: defaults, merging, checks. No I/O.

Both shapes are taken: the current one (`audio.input.…`) and the flat one of the beta.
"""

import copy
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from moshi_stt.audio.live import PcmFormat
from moshi_stt.engine.engine import EngineInfo
from moshi_stt.errors import AudioError
from moshi_stt.server.doors.openai_models import BadOption, module_for_languages, module_for_model

Json = dict[str, Any]

SESSION_SECONDS: Final = 86_400
LOGPROBS: Final = "item.input_audio_transcription.logprobs"
MANUAL_MODELS: Final = ("gpt-realtime-whisper", "gpt-live-transcribe")
"""Models whose clients commit themselves unless they ask for turn detection."""
SERVER_VAD: Final[Json] = {"type": "server_vad", "threshold": 0.5, "prefix_padding_ms": 300, "silence_duration_ms": 500}
EAGERNESS: Final = {"low": (0.9, 8.0), "medium": (0.7, 4.0), "auto": (0.7, 4.0), "high": (0.5, 2.0)}
"""Confidence that ends a turn, and the silence (seconds) that does so anyway."""
_IGNORED: Final = ("tracing", "prompt", "noise_reduction", "keywords", "delay", "instructions", "tools", "voice")
_BETA_FORMATS: Final = {"pcm16": "audio/pcm", "g711_ulaw": "audio/pcmu", "g711_alaw": "audio/pcma"}


@dataclass(frozen=True)
class TurnRule:
    """How turns end. silence: seconds that end one; confidence: ends it sooner (None for no semantic detection)."""

    silence: float
    confidence: float | None = None
    prefix: float = 0.3


class RealtimeConfig:
    """One connection's effective session. Methods raise BadOption and then leave it as it was."""

    def __init__(self, model: str, modules: Mapping[str, EngineInfo], *, beta: bool = False) -> None:
        self.beta = beta
        self._modules = modules
        self._detection_named = False
        self.session: Json = {
            "id": f"sess_{uuid.uuid4().hex[:24]}",
            "object": "realtime.transcription_session",
            "type": "transcription",
            "expires_at": int(time.time()) + SESSION_SECONDS,
            "audio": {
                "input": {
                    "format": {"type": "audio/pcm", "rate": 24_000},
                    "transcription": {"model": model, "language": None},
                    "noise_reduction": None,
                    "turn_detection": None if model.startswith(MANUAL_MODELS) else copy.deepcopy(SERVER_VAD),
                }
            },
            "include": None,
        }
        self.format = PcmFormat()
        self.rule = _turn_rule(self._input["turn_detection"])

    @property
    def _input(self) -> Json:
        shown: Json = self.session["audio"]["input"]
        return shown

    @property
    def logprobs(self) -> bool:
        return LOGPROBS in (self.session["include"] or ())

    def update(self, change: object) -> tuple[str, ...]:
        """Merge a client's `session`; the names of what is taken and does nothing. Raises BadOption."""
        if not isinstance(change, dict):
            raise BadOption("session must be an object", "session")
        change = copy.deepcopy(change)
        if not isinstance(change.get("audio"), dict) and any(
            key.startswith("input_audio") or key == "turn_detection" for key in change
        ):
            change = _from_beta(change)
        session = _merged(self.session, change)
        session["id"], session["object"] = self.session["id"], self.session["object"]
        session["expires_at"], session["type"] = self.session["expires_at"], "transcription"
        shown = _object(_object(session, "audio", "session.audio"), "input", "session.audio.input")
        named = "turn_detection" in (change.get("audio") or {}).get("input", {})
        if not named and not self._detection_named:
            model = str((shown.get("transcription") or {}).get("model") or "")
            shown["turn_detection"] = None if model.startswith(MANUAL_MODELS) else copy.deepcopy(SERVER_VAD)
        pcm_format = _pcm_format(shown.get("format"))
        _check_transcription(shown.get("transcription"), self._modules)
        include = session.get("include")
        if include is not None and not (isinstance(include, list) and all(isinstance(each, str) for each in include)):
            raise BadOption("session.include must be a list of strings or null", "session.include")
        rule = _turn_rule(shown.get("turn_detection"))
        self.session, self.format, self.rule = session, pcm_format, rule
        self._detection_named |= named
        return _ignored(change)

    def shown(self) -> Json:
        """The session as this client's shape has it."""
        if not self.beta:
            return self.session
        given = self._input
        names = {name: beta for beta, name in _BETA_FORMATS.items()}
        return {
            "id": self.session["id"],
            "object": "realtime.transcription_session",
            "expires_at": self.session["expires_at"],
            "input_audio_format": names.get(given["format"]["type"], "pcm16"),
            "input_audio_transcription": given["transcription"],
            "input_audio_noise_reduction": given["noise_reduction"],
            "turn_detection": given["turn_detection"],
            "include": self.session["include"],
        }


def _from_beta(change: Json) -> Json:
    """The flat shape as the current one."""
    given: Json = {}
    for beta, name in (
        ("input_audio_transcription", "transcription"),
        ("input_audio_noise_reduction", "noise_reduction"),
        ("turn_detection", "turn_detection"),
    ):
        if beta in change:
            given[name] = change.pop(beta)
    if "input_audio_format" in change:
        wanted = change.pop("input_audio_format")
        if wanted not in _BETA_FORMATS:
            raise BadOption(f"expected one of {', '.join(_BETA_FORMATS)}", "session.input_audio_format")
        given["format"] = {"type": _BETA_FORMATS[wanted], "rate": 24_000}
    change["audio"] = {"input": given}
    return change


def _merged(old: Json, new: Json, depth: int = 0) -> Json:
    """Objects key by key; anything else replaces what was there. A turn detection of another type starts from nothing."""
    if depth > 8:
        raise BadOption("session is nested too deeply", "session")
    merged = dict(old)
    for key, value in new.items():
        before = merged.get(key)
        if key == "turn_detection" and isinstance(value, dict):
            kind = value.get("type", "server_vad")
            base = before if isinstance(before, dict) and before.get("type") == kind else {}
            defaults = SERVER_VAD if kind == "server_vad" else {"eagerness": "auto"}
            merged[key] = {**defaults, **base, **value, "type": kind}
        elif isinstance(before, dict) and isinstance(value, dict):
            merged[key] = _merged(before, value, depth + 1)
        else:
            merged[key] = value
    return merged


def _object(parent: Json, key: str, param: str) -> Json:
    value = parent.get(key)
    if not isinstance(value, dict):
        raise BadOption(f"{param} must be an object", param)
    return value


def _pcm_format(shown: object) -> PcmFormat:
    param = "session.audio.input.format"
    kind = shown.get("type") if isinstance(shown, dict) else shown
    if kind == "audio/pcmu":
        return PcmFormat("mulaw", 8_000)
    if kind == "audio/pcma":
        return PcmFormat("alaw", 8_000)
    if kind != "audio/pcm" or not isinstance(shown, dict):
        raise BadOption(f"format {str(kind)[:40]!r}: expected audio/pcm, audio/pcmu or audio/pcma", param)
    rate = shown.get("rate", 24_000)
    if not isinstance(rate, int) or isinstance(rate, bool):
        raise BadOption(f"rate must be an integer, got {str(rate)[:20]}", param)
    try:
        return PcmFormat("linear16", rate)
    except AudioError as error:
        raise BadOption(str(error), param) from None


def _check_transcription(shown: object, modules: Mapping[str, EngineInfo]) -> None:
    param = "session.audio.input.transcription"
    if shown is None:
        return
    if not isinstance(shown, dict):
        raise BadOption(f"{param} must be an object or null", param)
    model = shown.get("model")
    module = None
    if model is not None:
        try:
            module = module_for_model(modules, str(model))
        except BadOption as error:
            raise BadOption(str(error), f"{param}.model", error.code) from None
    languages = shown.get("languages") or ([shown["language"]] if shown.get("language") else [])
    if not isinstance(languages, list):
        raise BadOption("languages must be a list", f"{param}.languages")
    try:
        module_for_languages(modules, [str(language) for language in languages], module)
    except BadOption as error:
        raise BadOption(str(error), f"{param}.language", error.code) from None


def _turn_rule(shown: object) -> TurnRule | None:
    param = "session.audio.input.turn_detection"
    if shown is None:
        return None
    if not isinstance(shown, dict):
        raise BadOption(f"{param} must be an object or null", param)
    kind = shown.get("type")
    if kind == "server_vad":
        silence = _milliseconds(shown, "silence_duration_ms", 500, param)
        return TurnRule(max(0.08, silence), None, _milliseconds(shown, "prefix_padding_ms", 300, param))
    if kind == "semantic_vad":
        eagerness = shown.get("eagerness") or "auto"
        if eagerness not in EAGERNESS:
            raise BadOption(f"eagerness {str(eagerness)[:20]!r}: expected one of {', '.join(EAGERNESS)}", f"{param}.eagerness")
        confidence, wait = EAGERNESS[eagerness]
        return TurnRule(wait, confidence)
    raise BadOption(f"type {str(kind)[:40]!r}: expected server_vad or semantic_vad", f"{param}.type")


def _milliseconds(shown: Json, key: str, default: int, param: str) -> float:
    value = shown.get(key, default)
    if value is None:
        value = default
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 60_000:
        raise BadOption(f"{key} must be a number from 0 to 60000, got {str(value)[:20]}", f"{param}.{key}")
    return float(value) / 1000


def _ignored(change: Json) -> tuple[str, ...]:
    """Names of options that do nothing here."""
    places = [change]
    audio = change.get("audio")
    given = audio.get("input") if isinstance(audio, dict) else None
    if isinstance(given, dict):
        places.append(given)
        if isinstance(given.get("transcription"), dict):
            places.append(given["transcription"])
    return tuple(key for place in places for key in _IGNORED if place.get(key))
