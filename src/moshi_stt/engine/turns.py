"""Turns: from pauses and words to the beginning and the end of what one speaker says.

`HeadPauses` reads silence from a model's pause heads; a model without heads has a speech detector for that. Both end in
`Pause` events. `TurnDetector` makes turns of them, for the native protocol's `turns=1` and for any other that has turns.
"""

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from moshi_stt.audio.resample import StreamingResampler
from moshi_stt.constants import FRAME_SECONDS, SAMPLE_RATE
from moshi_stt.engine.backend import Words
from moshi_stt.engine.recogniser import RECOGNISER_RATE, VAD_FRAME
from moshi_stt.events import AnyEvent, EndOfTurn, EndWord, Pause, Ready, SpeechStarted, TurnResumed, Word
from moshi_stt.text.word_lists import plain

if TYPE_CHECKING:
    from moshi_stt.audio.vad import SileroVad

WARM_UP_STEPS: Final = 12
"""Steps of a fresh stream whose heads mean nothing yet (about a second)."""
SMOOTHING: Final = 0.5
"""Weight of the newest step in a smoothed head: the time constant is about a step and a half."""
SPEECH_BELOW: Final = 0.4
"""A smoothed head (horizon 0.5 s) below this, two steps running, is speech;"""
SILENCE_FROM: Final = 0.5
"""from this on, silence."""
SPEECH_STEPS: Final = 2
VAD_SPEECH_FROM: Final = 0.5
VAD_SPEECH_UNTIL: Final = 0.35
"""The same for the speech detector's frames of 32 ms, as the embedded model uses it."""
TURN_HEAD: Final = 2
"""The head whose horizon (2 s) says best whether a turn is over."""

NUMBER_SLOWDOWN: Final = 2.0
"""After a number a silence counts for so much less: people dictate telephone numbers in groups."""

_KNEES: Final = ((0.0, 0.0), (0.6, 0.5), (1.0, 0.905), (1.9, 0.995), (5.0, 0.9999), (60.0, 1.0))
"""(seconds of silence, score). Steep where most pauses end, and never flat."""

_ENGLISH_NUMBERS: Final = (
    "zero oh one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety hundred thousand double triple"
)
_FRENCH_NUMBERS: Final = (
    "zéro deux trois quatre cinq sept huit neuf dix onze douze treize quatorze quinze seize vingt trente quarante "
    "cinquante soixante cent mille"
)
_NUMBERS: Final = frozenset(_ENGLISH_NUMBERS.split() + _FRENCH_NUMBERS.split())


def silence_score(seconds: float) -> float:
    """How likely a silence of this length ends a turn, in [0, 1]: 0.5 at 0.6 s, over 0.9 from 1 s on, rising to a minute."""
    if seconds >= _KNEES[-1][0]:
        return 1.0
    for (left, low), (right, high) in itertools.pairwise(_KNEES):
        if seconds < right:
            return low + (high - low) * max(0.0, seconds - left) / (right - left)
    return 1.0


def is_number(text: str) -> bool:
    """Whether a word is one that telephone and card numbers are made of."""
    bare = plain(text)
    parts = [part for part in bare.split("-") if part]
    return any(letter.isdigit() for letter in bare) or (bool(parts) and all(part in _NUMBERS for part in parts))


class HeadPauses:
    """Silence from the pause heads of one stream."""

    def __init__(self) -> None:
        self._steps = 0
        self._smooth = 1.0
        self._low = 0
        self._silence = math.inf

    def push(self, heads: Sequence[float]) -> float:
        """The next step's heads; seconds since somebody last spoke, as `Pause.silence` says it."""
        self._steps += 1
        if self._steps <= WARM_UP_STEPS:
            return math.inf
        self._smooth += SMOOTHING * (heads[0] - self._smooth)
        self._low = self._low + 1 if self._smooth < SPEECH_BELOW else 0
        if self._low >= SPEECH_STEPS or (self._silence == 0.0 and self._smooth < SILENCE_FROM):
            self._silence = 0.0
        else:
            self._silence += FRAME_SECONDS
        return self._silence


class SpeechDetector:
    """Silence by the small speech detector that comes with the package, for models without pause heads."""

    def __init__(self) -> None:
        self._vad = load_detector()
        self.restart()

    def restart(self) -> None:
        """A fresh stream."""
        self._resampler = StreamingResampler(SAMPLE_RATE, RECOGNISER_RATE)
        self._state = self._vad.start()
        self._held = np.zeros(0, np.float32)
        self._heard = 0
        self._last_speech: int | None = None

    def push(self, samples: NDArray[np.float32]) -> float:
        """The next samples, float32 (S,) at 24 kHz; seconds since somebody last spoke."""
        ready = self._resampler.feed(np.clip(np.nan_to_num(samples), -1.0, 1.0))
        self._held = np.concatenate([self._held, ready])
        while len(self._held) >= VAD_FRAME:
            frame, self._held = self._held[:VAD_FRAME], self._held[VAD_FRAME:]
            probability, self._state = self._vad(frame, self._state)
            self._heard += VAD_FRAME
            in_speech = self._last_speech == self._heard - VAD_FRAME
            if probability >= (VAD_SPEECH_UNTIL if in_speech else VAD_SPEECH_FROM):
                self._last_speech = self._heard
        return math.inf if self._last_speech is None else (self._heard - self._last_speech) / RECOGNISER_RATE


class PauseMeter:
    """The `Pause` events of one stream of a frame-synchronous model."""

    def __init__(self, detector: SpeechDetector | None = None) -> None:
        """detector: listens where the model has no heads."""
        self._detector = detector
        self._heads = HeadPauses()
        self._silence = math.inf
        self._settled = 0.0

    def restart(self) -> None:
        """The stream was reset."""
        self._heads = HeadPauses()
        self._silence = math.inf
        self._settled = 0.0
        if self._detector is not None:
            self._detector.restart()

    def hear(self, frame: NDArray[np.float32]) -> None:
        """The client's next frame, float32 (1920,), before the model steps it."""
        if self._detector is not None:
            self._silence = self._detector.push(frame)

    def pause(self, words: Words, heads: Sequence[float] | None) -> Pause:
        """After the frame's token was pushed. heads: what the model said of it."""
        if heads and self._detector is None:
            self._silence = self._heads.push(heads)
        self._settled = max(self._settled, words.settled)
        return Pause(round(words.steps * FRAME_SECONDS, 3), self._settled, self._silence, tuple(heads or ()))


@functools.cache
def load_detector() -> "SileroVad":
    """One for all streams of a process. Raises CheckpointError where its file is not there."""
    from moshi_stt.audio.vad import load_vad  # loads onnxruntime: not before the first stream that needs it

    return load_vad()


@dataclass(frozen=True)
class TurnSettings:
    """When a turn is over."""

    threshold: float = 0.7
    """Confidence that ends it."""
    timeout_seconds: float = 5.0
    """A silence so long ends it whatever the confidence."""
    resume_seconds: float = 1.5
    """Speech so soon after the end resumes the turn."""


class TurnDetector:
    """The turns of one stream. Feed it every `Pause`, `Word` and `EndWord`, in order."""

    def __init__(self, settings: TurnSettings | None = None) -> None:
        self.settings = settings or TurnSettings()
        self.speaking = False
        """Whether a turn is open."""
        self.confidence = 1.0
        """That the turn is over, from the latest `Pause`."""
        self.silence = math.inf
        self.settled = 0.0
        self.last_speech = 0.0
        """Where the latest speech ended, in seconds of the stream."""
        self._smooth = 1.0
        self._last_word = ""
        self._ended_at: float | None = None

    def take(self, event: AnyEvent) -> Sequence[SpeechStarted | EndOfTurn | TurnResumed]:
        """The stream's next event, of any kind; what it begins or ends."""
        if type(event) is Pause:
            return self.pause(event)
        if type(event) is Word:
            return self.word(event)
        if type(event) is EndWord:
            self.end_word(event)
        elif type(event) is Ready:
            self.restart()
        return ()

    def word(self, event: Word) -> list[SpeechStarted | TurnResumed]:
        """A word is speech, also where the pause source heard none."""
        self._last_word = event.text
        events = [] if self.speaking or event.start_time < (self._ended_at or 0.0) else self._begin(event.start_time)
        self.last_speech = max(self.last_speech, event.start_time)
        return events

    def end_word(self, event: EndWord) -> None:
        self.last_speech = max(self.last_speech, event.stop_time)

    def pause(self, event: Pause) -> list[SpeechStarted | EndOfTurn | TurnResumed]:
        """What the next 80 ms begin or end."""
        if self._last_word:  # a word is speech, also where the source heard none
            event = replace(event, silence=min(event.silence, max(0.0, event.time - self.last_speech)))
        self.silence, self.settled = event.silence, event.settled
        self.confidence = self._score(event)
        if event.silence <= 0.0 or (event.silence < FRAME_SECONDS and not math.isinf(event.silence)):
            self.last_speech = max(self.last_speech, event.time - event.silence)
            return [] if self.speaking else [*self._begin(event.time - FRAME_SECONDS)]
        if not self.speaking:
            return []
        settings = self.settings
        over = self.confidence >= settings.threshold or event.silence >= settings.timeout_seconds
        if not over or event.settled < self.last_speech - FRAME_SECONDS:
            return []
        self.speaking = False
        self._ended_at = event.time
        return [EndOfTurn(round(event.time, 3), round(self.confidence, 4))]

    def restart(self) -> None:
        """The stream was reset: its clock is at 0 again."""
        self.__init__(self.settings)  # type: ignore[misc]

    def _begin(self, at: float) -> list[SpeechStarted | TurnResumed]:
        self.speaking = True
        at = round(max(at, 0.0), 3)
        if self._ended_at is not None and at - self._ended_at < self.settings.resume_seconds:
            return [TurnResumed(max(at, self._ended_at))]
        return [SpeechStarted(at)]

    def _score(self, event: Pause) -> float:
        if math.isinf(event.silence):
            return 1.0
        slow = NUMBER_SLOWDOWN if is_number(self._last_word) else 1.0
        if len(event.heads) <= TURN_HEAD:
            return silence_score(event.silence / slow)
        self._smooth += SMOOTHING * (event.heads[TURN_HEAD] - self._smooth)
        return self._smooth if slow == 1.0 else min(self._smooth, silence_score(event.silence / slow))
