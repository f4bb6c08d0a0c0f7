"""What a loader hands over to the batch engine: a model, and what the engine must know about it."""

from dataclasses import dataclass

from moshi_stt.constants import FRAME_SAMPLES, SAMPLE_RATE
from moshi_stt.engine.backend import Backend, NewWords, StepRecorder
from moshi_stt.engine.engine import EngineInfo
from moshi_stt.engine.timings import StepTimings


@dataclass(frozen=True)
class LoadedModel:
    """Made on the model thread. docs/internals/backends.md says what each part must keep."""

    backend: Backend
    """With `streams + spare_slots(streams, processes)` slots at least."""
    new_words: NewWords
    """Makes a stream's word assembler; can be pickled where there are processes."""
    info: EngineInfo
    """Of this model, its `total_slots` equal to streams."""
    streams: int
    delay_frames: int
    """Frames from a sound to the token that says it."""
    frame_samples: int = FRAME_SAMPLES
    """Samples at 24 kHz that the model hears in one step."""
    processes: int = 0
    """How many others will share the model."""
    scratch: range | None = None
    """Slots for copies of streams; None takes those that follow the streams' own."""
    timings: StepTimings | None = None
    """Of its steps; measured where it is None."""
    recorder: StepRecorder | None = None
    """Whom the backend tells of its steps."""

    @property
    def frame_seconds(self) -> float:
        return self.frame_samples / SAMPLE_RATE
