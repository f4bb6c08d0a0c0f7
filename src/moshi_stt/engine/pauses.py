"""Pause probabilities of a stream from its speech detector: how likely it is that nobody speaks within the next seconds.

The model is the lengths of pauses: those within a turn, and those after it. Given that it has been silent for s seconds, the
probability that it stays so for h more is S(s + h) / S(s), where S is the share of pauses longer than that. It rises through
the whole pause.
"""

import math
from dataclasses import dataclass
from typing import Final

from moshi_stt.engine.recogniser import RECOGNISER_RATE, VAD_FRAME

HORIZONS_SECONDS: Final = (0.5, 1.0, 2.0, 3.0)
FRAME_SECONDS = VAD_FRAME / RECOGNISER_RATE
LONGEST_SECONDS = 20.0
"""From here on the probability stays where it is."""


@dataclass(frozen=True)
class PauseSettings:
    """Lengths of pauses, in seconds, as log-normal distributions; docs/internals/embedded.md says what they were fitted to."""

    gap_share: float = 0.7
    """Of all silences, those within a word or between two: a stop consonant makes one."""
    gap_median: float = 0.06
    gap_spread: float = 0.6
    """Standard deviation of the logarithm, here and below."""
    within_median: float = 0.54
    """Pauses within a turn."""
    within_spread: float = 0.75
    after_share: float = 0.4
    """Of the pauses, those after a turn."""
    after_median: float = 12.0
    after_spread: float = 1.2
    speech_from: float = 0.5
    """A frame of this probability or more is speech,"""
    confirm_frames: int = 2
    """and so many in a row end a pause: one alone may be a click."""
    silent_until: float = 0.35
    """Frames below this make a pause longer."""


class PauseMeter:
    """The pauses of one stream, frame by frame."""

    def __init__(self, settings: PauseSettings | None = None) -> None:
        self.settings = settings or PauseSettings()
        self._table = _table(self.settings)
        self.reset()

    def reset(self) -> None:
        """As before the first frame."""
        self.started = False
        """Whether anybody has spoken yet: until `start` the probability is 1."""
        self._silent_frames = 0
        self._speech_frames = 0
        self._speech = 0.0

    def start(self) -> None:
        """Somebody speaks, for the first time or again."""
        self.started = True

    def hear(self, probability: float) -> None:
        """Count one frame with its probability of speech."""
        self._speech = probability
        self._speech_frames = self._speech_frames + 1 if probability >= self.settings.speech_from else 0
        if self._speech_frames >= self.settings.confirm_frames:
            self._silent_frames = 0
        elif probability < self.settings.silent_until:
            self._silent_frames = min(self._silent_frames + 1, len(self._table) - 1)

    @property
    def silent_seconds(self) -> float:
        """How long the present pause has lasted; 0 while somebody speaks."""
        return self._silent_frames * FRAME_SECONDS

    @property
    def scores(self) -> tuple[float, ...]:
        """For each horizon, the probability in [0, 1] that no speech comes within it."""
        if not self.started:
            return (1.0,) * len(HORIZONS_SECONDS)
        return tuple(round((1.0 - self._speech) * score, 4) for score in self._table[self._silent_frames])


def _table(settings: PauseSettings) -> list[tuple[float, ...]]:
    """The scores after each number of silent frames. Row 0 is speech."""
    rows = [(0.0,) * len(HORIZONS_SECONDS)]
    for frame in range(1, int(LONGEST_SECONDS / FRAME_SECONDS)):
        seconds = frame * FRAME_SECONDS
        rows.append(tuple(_longer(seconds + h, settings) / _longer(seconds, settings) for h in HORIZONS_SECONDS))
    return rows


def _longer(seconds: float, settings: PauseSettings) -> float:
    """Share of pauses that last longer."""
    gap = _tail(seconds, settings.gap_median, settings.gap_spread)
    within = _tail(seconds, settings.within_median, settings.within_spread)
    after = _tail(seconds, settings.after_median, settings.after_spread)
    pause = (1.0 - settings.after_share) * within + settings.after_share * after
    return settings.gap_share * gap + (1.0 - settings.gap_share) * pause


def _tail(seconds: float, median: float, spread: float) -> float:
    """Share of a log-normal distribution above a value."""
    return 0.5 * math.erfc(math.log(seconds / median) / (spread * math.sqrt(2.0)))
