"""Notices that a model has stopped transcribing a stream: somebody speaks and no word comes.

Kyutai's 1B model does that now and then, for minutes. A fresh state ends it, so the stream's state is reset and the audio
since the last word is heard again. The audio for that is kept here, and only while somebody speaks without a word.
"""

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moshi_stt.audio.resample import StreamingResampler
from moshi_stt.constants import SAMPLE_RATE
from moshi_stt.engine.recogniser import RECOGNISER_RATE, VAD_FRAME
from moshi_stt.engine.turns import VAD_SPEECH_FROM, load_detector

LEAD_SECONDS = 2.0
"""Audio from before the suspected stall, for the fresh state to hear its way in."""

SPEECH_BELOW = 0.5
"""A frame is speech where the first pause head, of the shortest horizon, gives less than this."""

LONG_MESSAGE_FRAMES = 12
"""A message of more frames, a second, is not kept for the sake of one of them."""

SPEECH_SHARE = 0.25
"""Of the frames without a word, so many must be speech: somebody who pauses to think is no stall."""


@dataclass(frozen=True)
class MuteSettings:
    """When a stream counts as stalled.

    seconds: of audio, with speech and without a word. is_speech: confirms from the audio, float32 (S,) at 24 kHz, that somebody
    speaks; runs in a thread of its own, for suspects alone. None believes the pause heads.
    """

    seconds: float = 20.0
    is_speech: Callable[[NDArray[np.float32]], bool] | None = None


def hears_speech(samples: NDArray[np.float32]) -> bool:
    """Whether the small speech detector hears enough speech in samples, float32 (S,) at 24 kHz.

    Takes 0.1 s for 20 s of audio.
    """
    detector = load_detector()
    state, spoken = detector.start(), 0
    resampler = StreamingResampler(SAMPLE_RATE, RECOGNISER_RATE)
    heard = np.concatenate([resampler.feed(np.clip(np.nan_to_num(samples), -1.0, 1.0)), resampler.finish()])
    frames = heard[: len(heard) // VAD_FRAME * VAD_FRAME].reshape(-1, VAD_FRAME)
    for frame in frames:
        probability, state = detector(frame, state)
        spoken += probability >= VAD_SPEECH_FROM
    return spoken > SPEECH_SHARE * len(frames)


class MuteGuard:
    """Of one stream. `hear` and `judge` are called by the model thread, once for each frame of the client's own audio."""

    __slots__ = ("_frames", "_lead", "_limit", "_live", "_new", "_speech", "suspected", "verdict")

    def __init__(self, settings: MuteSettings, frame_seconds: float, *, live: bool = True) -> None:
        self._live = live
        self._limit = math.ceil(settings.seconds / frame_seconds)
        self._lead = math.ceil(LEAD_SECONDS / frame_seconds)
        self.reset()

    def reset(self) -> None:
        """The stream's state is fresh, and nothing has been heard."""
        self._frames: deque[NDArray[np.float32]] = deque(maxlen=self._limit + self._lead)
        self._speech: deque[bool] = deque(maxlen=self._limit)
        """Of the frames since the first one of speech without a word."""
        self._new = False
        self.suspected = False
        """Whether `judge` has found a stall that has no verdict yet."""
        self.verdict: bool | None = None
        """Whether the suspect is one. Set by any thread; without effect once there is no suspicion any more."""

    def hear(self, frame: NDArray[np.float32]) -> None:
        """The next frame, float32 (frame_samples,). It is kept; of a live stream's long message it is copied.

        So an idle stream keeps no more than it may hear again, short messages cost nothing, and a file is there anyway.
        """
        whole = frame.base if self._live else None
        is_long = isinstance(whole, np.ndarray) and whole.nbytes > LONG_MESSAGE_FRAMES * frame.nbytes
        self._frames.append(frame.copy() if is_long else frame)

    def judge(self, has_word: bool, pause: Sequence[float]) -> None:
        """What the model said of the frame."""
        speaks = pause[0] < SPEECH_BELOW
        if has_word or not (speaks or self._speech):
            self._begin()
            return
        self._speech.append(speaks)
        if not self.suspected and len(self._speech) == self._limit:
            self.suspected = self._new = sum(self._speech) >= SPEECH_SHARE * self._limit

    def is_new_suspect(self) -> bool:
        """Whether there is a suspicion that was not asked for yet."""
        new, self._new = self._new, False
        return new

    def is_stalled(self) -> bool:
        """Whether the state must be reset now. A suspicion that was dismissed starts over."""
        verdict, self.verdict = self.verdict, None
        if not self.suspected or verdict is None:
            return False
        if not verdict:
            self._begin()
        return verdict

    def _begin(self) -> None:
        self._speech.clear()
        self.suspected = self._new = False
        while len(self._frames) > self._lead:
            self._frames.popleft()

    def audio(self) -> NDArray[np.float32]:
        """What is kept, float32 (S,)."""
        return np.concatenate(self._frames)

    def take(self) -> deque[NDArray[np.float32]]:
        """The frames to hear again, the oldest first. The guard then starts over with the next frame."""
        frames = self._frames
        self.reset()
        return frames
