"""Notices that a stream speaks a language that the recogniser does not know: clear speech of which it makes nothing.

The measure is how much of what the detector is sure of becomes words that are likely right. Of English that is most; of another
language next to nothing, as a recogniser's guesses at it are unlikely or fall apart from one moment to the next. Many voices at
once, none of them near, look the same to it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from moshi_stt.engine.recogniser import RECOGNISER_RATE, VAD_FRAME

NAMES = {"en": "English", "fr": "French"}

FRAME_SECONDS = VAD_FRAME / RECOGNISER_RATE


@dataclass(frozen=True)
class LanguageSettings:
    """When to give the alarm. Times in seconds."""

    sure_of_speech: float = 0.8
    """Frames of this probability or more are clear speech."""
    memory_seconds: float = 15.0
    """Clear speech longer ago than this counts for little."""
    enough_seconds: float = 6.0
    """So much clear speech must have been heard,"""
    understood_share: float = 0.35
    """and less than this share of it understood."""


class LanguageWatch:
    """One stream's clear speech, and what of it was understood."""

    def __init__(self, settings: LanguageSettings) -> None:
        self._settings = settings
        self._heard = 0.0
        self._understood = 0.0
        self._segment_heard = 0.0
        self._segment_understood = 0.0
        self.alarmed = False
        """Whether the alarm has been given: it is given once."""

    def hear(self, probability: float) -> None:
        """Count a frame of a segment."""
        if probability >= self._settings.sure_of_speech:
            self._segment_heard += FRAME_SECONDS

    def understand(self, confidence: float, seconds: float) -> None:
        """Count a word of the segment, how sure it is and how long."""
        self._segment_understood += confidence * seconds

    def end_segment(self) -> bool:
        """The segment is over; whether to give the alarm now."""
        settings = self._settings
        heard, understood = self._segment_heard, self._segment_understood
        self._segment_heard = self._segment_understood = 0.0
        kept = math.exp(-heard / settings.memory_seconds)
        self._heard = self._heard * kept + heard
        self._understood = self._understood * kept + understood
        foreign = self._heard >= settings.enough_seconds and self._understood < settings.understood_share * self._heard
        if not foreign or self.alarmed:
            return False
        self.alarmed = True
        return True


def foreign_message(languages: Sequence[str], command: str = "moshi-stt worker --config stt-1b-en_fr") -> str:
    """What to tell who speaks another language than the model's. command: what gets French."""
    names = [NAMES.get(code, code) for code in languages]
    known = f"{names[0]} only" if len(names) == 1 else " and ".join(names)
    message = f"this does not sound like {' or '.join(names)}, and this model knows {known}"
    return message if "fr" in languages else f"{message}. For French: {command}"
