"""What the batch engine asks of a model: `Backend`, which steps frames, and `Words`, which makes words of tokens.

docs/internals/backends.md explains how to write one. Axes, for the whole project: B row (a stream in this step), T frame,
K codebook, H head, D dim, S sample.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, Self, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from moshi_stt.events import EndWord, Interim, Word


class StepOutput(NamedTuple):
    """What one step says about each of its rows.

    text_token: int64 (B,)        the token produced at this position (contract section 5.5)
    logprob:    float32 (B,)      natural-log probability of that token
    pause:      float32 (B, H)    pause probability per extra head; H = 0 where the model has none
    """

    text_token: NDArray[np.int64]
    logprob: NDArray[np.float32]
    pause: NDArray[np.float32]

    def rows(self, start: int, stop: int) -> "StepOutput":
        """Views of some rows."""
        return StepOutput(self.text_token[start:stop], self.logprob[start:stop], self.pause[start:stop])

    def put(self, rows: "StepOutput") -> None:
        """Copy rows over the first ones."""
        count = len(rows.text_token)
        self.text_token[:count], self.logprob[:count], self.pause[:count] = rows


class Backend(Protocol):
    """A frame-synchronous model with persistent state in numbered slots.

    All methods are called from one thread, the model thread. A row's output depends on its slot's own frames since its
    last `fresh` alone, never on the other rows.
    """

    slots: int
    """How many slots have state. Slot numbers are 0 .. slots - 1."""

    pause_heads: int
    """Heads that give pause probabilities; 0 means that the model's streams send no `Step`."""

    def step(self, pcm: NDArray[np.float32], slots: NDArray[np.int64], fresh: NDArray[np.bool_]) -> StepOutput:
        """Step each row once.

        pcm (B, frame_samples) float32 at 24 kHz; slots (B,) without repeats; fresh (B,): start that slot's state from zero
        first. Raises whatever the framework raises; the engine then counts as failed.
        """
        ...

    def copy(self, source: int, target: int) -> None:
        """Make slot `target`'s state what slot `source`'s is: convolution tails, K/V, positions, last token and codes.

        They go their own ways from there. It lets a marker be answered early without touching the stream's own state.
        """
        ...

    def warm_up(self) -> None:
        """Run what makes the first real step as fast as the later ones. Leaves every slot's state undefined until `fresh`."""
        ...

    def close(self) -> None:
        """Free the device's memory."""
        ...


WordEvent = Word | EndWord | Interim


class Words(Protocol):
    """The words of one stream, made of its tokens. A pure function of the token list.

    Its clock is `steps`, the tokens pushed since the stream's state was last fresh; the times that it gives are seconds of
    the stream. `fork` and `join` let another token list run ahead of this one for a few steps (silence instead of what the
    client will send) without emitting a word twice.
    """

    steps: int

    @property
    def in_word(self) -> bool:
        """Whether a word has begun, or is about to, that was not emitted yet."""
        ...

    @property
    def settled(self) -> float:
        """No word that starts before this many seconds of the stream is emitted any more."""
        ...

    def push(self, token: int, logprob: float) -> Sequence[WordEvent]:
        """Take the next step's token and its natural-log probability; return what it completes."""
        ...

    def flush(self) -> Sequence[WordEvent]:
        """Emit the word under way as it is; later tokens make a word of their own."""
        ...

    def finish(self, audio_seconds: float) -> Sequence[WordEvent]:
        """Nothing follows: emit the word under way and the end of the last word, which is within the audio's length."""
        ...

    def restart(self, step: int) -> Sequence[WordEvent]:
        """The model starts again from a fresh state and hears the stream from that step on.

        The word under way is forgotten, as it will be heard again; the last word ends, if its end is owed; no word that was
        emitted is emitted again.
        """
        ...

    def fork(self) -> Self:
        """An assembler in the same state, for tokens of another future."""
        ...

    def join(self, fork: Self) -> None:
        """What the fork emitted has been sent: do not emit the same words again when this list's tokens make them."""
        ...


class NewWords(Protocol):
    """Makes the assembler of a new stream, or of one that was reset."""

    def __call__(self, *, confidence: bool, interim: bool) -> Words:
        """confidence: give each `Word` its probability. interim: also emit the word under way, each time it grows."""
        ...


class StepRecorder(Protocol):
    """Records each step's inputs and outputs. Called by the model thread; must return at once."""

    def start(self) -> None:
        """The model is warm: what is stepped from here on are streams."""
        ...

    def record(
        self, slots: NDArray[np.int64], fresh: NDArray[np.bool_], text: NDArray[np.int64], codes: NDArray[np.int64]
    ) -> None:
        """A step is done: its rows' slots and fresh (B,) as `Backend.step` took them, its tokens (B,) and codes (B, K)."""
        ...

    def stop(self) -> None:
        """No step follows. Idempotent."""
        ...


@runtime_checkable
class FillsContext(Protocol):
    """A backend whose steps take longer the more context its streams have."""

    def fill_context(self) -> None:
        """Fill every slot's context, with anything, so that steps can be timed. The state is undefined afterwards."""
        ...


@runtime_checkable
class WarmsUpInParts(Protocol):
    """A backend that can serve before everything is as fast as it gets."""

    def begin_warm_up(self) -> None:
        """As `warm_up`, but for what `go_on_warming_up` does: steps of some numbers of rows may take as long as larger ones."""
        ...

    def go_on_warming_up(self) -> bool:
        """Do the next part, if it can be done now. Whether any are left. Takes about as long as a step of all rows."""
        ...


@runtime_checkable
class TimesSteps(Protocol):
    """A backend that knows how long its device worked on the last step."""

    @property
    def device_seconds(self) -> float | None:
        """None where there was no step yet."""
        ...


class StepInputs(NamedTuple):
    """What `Backend.step` takes. pcm float32 (B, frame_samples), slots int64 (B,), fresh bool (B,)."""

    pcm: NDArray[np.float32]
    slots: NDArray[np.int64]
    fresh: NDArray[np.bool_]

    def rows(self, start: int, stop: int) -> "StepInputs":
        """Views of some rows."""
        return StepInputs(self.pcm[start:stop], self.slots[start:stop], self.fresh[start:stop])

    def put(self, rows: "StepInputs", start: int = 0) -> None:
        """Copy rows over those from `start` on, but for what lies there already."""
        pairs: tuple[tuple[NDArray[Any], NDArray[Any]], ...] = (
            (rows.pcm, self.pcm),
            (rows.slots, self.slots),
            (rows.fresh, self.fresh),
        )
        for source, target in pairs:
            into = target[start : start + len(source)]
            if source.ctypes.data != into.ctypes.data:
                into[:] = source


@runtime_checkable
class StepsAhead(Protocol):
    """A backend whose device steps while the model thread does something else."""

    def begin(self, pcm: NDArray[np.float32], slots: NDArray[np.int64], fresh: NDArray[np.bool_]) -> Callable[[], StepOutput]:
        """Start what `Backend.step` does; the call that is returned waits for its output.

        Until then nothing else may be asked of the backend but `has_read_inputs`. The arrays may be written to at once; where
        they are those of `HasInputBuffers`, when `has_read_inputs` says so.
        """
        ...

    @property
    def has_read_inputs(self) -> bool:
        """Whether the step that was begun last needs the backend's own arrays no more."""
        ...


@runtime_checkable
class HasInputBuffers(Protocol):
    """A backend with arrays of its own, whose first rows a step takes without a copy on the host."""

    @property
    def inputs(self) -> StepInputs: ...
