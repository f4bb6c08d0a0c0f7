"""What a model steps next, and what comes of it: the streams of one process, turn by turn.

`admit`, `dismiss`, `wake` and `clear` may be called by any thread; the rest belongs to the model thread, which calls `drain`,
`gather`, steps the gathered rows, and calls `scatter`. Nothing here waits, and no model is called but to copy a slot.
"""

from collections import deque
from collections.abc import Callable
from typing import NamedTuple, TypeVar

from moshi_stt.engine.backend import StepInputs, StepOutput
from moshi_stt.engine.marker_copies import MarkerCopies
from moshi_stt.engine.stream import Delivery
from moshi_stt.engine.stream_state import StreamState
from moshi_stt.engine.timings import StepTimings

FIRST_STEP_IDX = 3
"""moshi-server counts its two warm-up steps, so the first step of a process is 3."""

LIVE_SHARE = 0.5
"""While live streams speak, rows of files are added only as far as a step is expected to take this share of a frame."""

FILE_TURN = 8
"""Where there is no room at all for files next to live streams, every FILE_TURN-th step still takes one file row."""

AHEAD_ROWS = 64
"""Of so many files' rows on, one half is stepped while the other is scattered and gathered."""

LISTENING_SECONDS = 1.0
"""A live stream speaks if audio of it came within so long."""

T = TypeVar("T")


class Outcome(NamedTuple):
    """What came of a step, for the event loop. arrivals: when the audio came that live deliveries depend on."""

    deliveries: list[Delivery]
    arrivals: list[float]


class Scheduler:
    """Chooses rows: live streams before files, all that have a frame. See the module's text for its threads."""

    def __init__(
        self,
        inputs: StepInputs,
        streams: int,
        copies: MarkerCopies,
        timings: StepTimings,
        frame_seconds: float,
        *,
        on_left: Callable[[StreamState], object] = lambda _: None,
        on_suspect: Callable[[StreamState], object] = lambda _: None,
        on_restart: Callable[[StreamState], object] = lambda _: None,
    ) -> None:
        """inputs: where the rows are gathered, with room for all streams. streams: the most at once.

        on_left: no later row will name this stream's slot. on_suspect: the model may have stopped transcribing it: see
        `MuteGuard`. on_restart: its state is started again. All are called by the model thread.
        """
        self.inputs = inputs
        self._streams = streams
        self.steps = 0
        """So many were gathered and scattered."""
        self._copies = copies
        self._timings = timings
        self._live_budget = LIVE_SHARE * frame_seconds
        self._on_left = on_left
        self._on_suspect = on_suspect
        self._on_restart = on_restart
        self._states: dict[StreamState, None] = {}
        """In the order of their admission."""
        self._comings: deque[tuple[StreamState, bool]] = deque()
        """Admitted (True) and dismissed (False), since the last `drain`."""
        self._woken: deque[StreamState] = deque()
        self._others_at = -1e9
        """time.monotonic() when other processes last had rows."""

    # ---- any thread --------------------------------------------------------------------------------------------------

    def admit(self, state: StreamState) -> None:
        """A new stream."""
        self._comings.append((state, True))

    def dismiss(self, state: StreamState) -> None:
        """A stream was closed. A row of it that is being stepped goes nowhere."""
        self._comings.append((state, False))

    def wake(self, state: StreamState) -> None:
        """A stream has commands, or room for events again."""
        if not state.woken:
            state.woken = True
            self._woken.append(state)

    def clear(self) -> None:
        """No turn follows: let go of the streams that waited for one."""
        self._woken.clear()
        self._comings.clear()

    # ---- the model thread --------------------------------------------------------------------------------------------

    def drain(self, now: float) -> list[Delivery]:
        """Take every pending command of every stream that has some, so that small packets cost no turns."""
        if self._comings:
            self._come_and_go()
        deliveries: list[Delivery] = []
        woken, later = self._woken, []
        while woken and (state := _pop(woken)) is not None:
            if state.in_flight:
                later.append(state)  # what it does next may depend on its row
                continue
            state.woken = False  # before the drain: what comes during it wakes the stream again
            if state.guard is not None and state.guard.is_stalled():
                events = [*state.restart(), *state.absorb(now)]
                self._on_restart(state)
            else:
                events = state.absorb(now)
            if events or state.done:
                deliveries.append(Delivery(state.stream, events, state.done))
        woken.extend(later)
        return deliveries

    def _come_and_go(self) -> None:
        while self._comings and (coming := _pop(self._comings)) is not None:
            state, admitted = coming
            if admitted:
                self._states[state] = None
                continue
            self._states.pop(state, None)
            self._copies.release(state.flush)
            state.flush = None
            self._on_left(state)

    def gather(self, now: float, others: int = 0) -> list[StreamState]:
        """Choose the streams that step now, next to so many rows of other processes, and write their rows into `inputs`."""
        if others:
            self._others_at = now
        self._copies.start(self._states, now)
        ready = [state for state in self._states if state.has_row and (state.stream.writable or state.holds_scratch)]
        chosen = self._choose(ready, now, others)
        self._write(chosen, self.inputs)
        return chosen

    @property
    def has_files_only(self) -> bool:
        """Whether no stream is live, and none waits for a copy: `gather_ahead` may then be called."""
        return not any(state.stream.live or state.marks for state in self._states)

    def gather_ahead(self, inputs: StepInputs) -> list[StreamState]:
        """`gather` while other rows are still being stepped, into arrays of the caller's.

        Of many streams it takes half: those are stepped while the others are scattered and gathered.
        """
        in_flight = sum(state.in_flight for state in self._states)
        ready = [state for state in self._states if state.has_row and not state.in_flight and state.stream.writable]
        both = in_flight + len(ready)
        if both >= AHEAD_ROWS:
            ready.sort(key=lambda state: state.last_step)
            del ready[_even_size(both // 2) :]
        self._write(ready, inputs)
        return ready

    def _write(self, chosen: list[StreamState], inputs: StepInputs) -> None:
        for state, row in zip(chosen, inputs.pcm, strict=False):
            state.gather(row)
            state.in_flight = True
            state.last_step = self.steps + 1
        inputs.slots[: len(chosen)] = [state.row_slot for state in chosen]
        inputs.fresh[: len(chosen)] = [state.row_fresh for state in chosen]

    def _choose(self, ready: list[StreamState], now: float, others: int) -> list[StreamState]:
        """Live streams before files: files take what room is left, those that waited longest first. Others' rows are live."""
        files = [state for state in ready if not state.stream.live]
        if not files or not self._is_listening(now):
            return ready
        live = [state for state in ready if state.stream.live]
        room = self._timings.rows_within(self._live_budget, self._streams) - len(live) - others
        if room <= 0:
            room = 1 if self.steps % FILE_TURN == 0 or not live else 0
        files.sort(key=lambda state: state.last_step)
        return live + files[:room]

    def _is_listening(self, now: float) -> bool:
        """Whether somebody speaks into a live stream."""
        if now - self._others_at < LISTENING_SECONDS:
            return True
        return any(state.stream.live and now - state.last_audio_at < LISTENING_SECONDS for state in self._states)

    def scatter(self, states: list[StreamState], output: StepOutput, now: float) -> Outcome:
        """Each gathered row's output to its own stream. output: its first rows are those of `states`, in order."""
        self.steps += 1
        step_idx = FIRST_STEP_IDX - 1 + self.steps
        count = len(states)
        pauses = output.pause[:count].tolist() if output.pause.shape[1] else [None] * count
        deliveries: list[Delivery] = []
        arrivals: list[float] = []
        rows = zip(states, output.text_token[:count].tolist(), output.logprob[:count].tolist(), pauses, strict=True)
        for state, token, logprob, pause in rows:
            state.in_flight = False
            if state not in self._states:
                continue  # dismissed meanwhile
            flush = state.flush
            events = state.scatter(token, logprob, pause, step_idx)
            if flush is not None and state.flush is None:
                self._copies.release(flush)
            if state.marks:
                state.last_audio_at = now  # a client that waits for our answer has its time from here
            if state.may_absorb:
                events += state.absorb(now)
            if state.guard is not None and state.guard.is_new_suspect():
                self._on_suspect(state)
            if events or state.done:
                deliveries.append(Delivery(state.stream, events, state.done))
                if state.stream.live:
                    arrivals.append(state.arrived)
        return Outcome(deliveries, arrivals)

    def end(self) -> None:
        """No turn follows."""
        self.clear()
        self._states.clear()

    def idle_seconds(self, now: float) -> float | None:
        """How long nothing happens unless somebody wakes the model thread."""
        return self._copies.idle_seconds(self._states, now)


def _even_size(rows: int) -> int:
    """The largest 2^i or 3 * 2^i up to that: of such sizes are the steps of a backend with fixed ones, without spare rows."""
    power = 1 << rows.bit_length() - 1
    return power + power // 2 if rows >= power + power // 2 else power


def _pop(queue: deque[T]) -> T | None:
    """The first one; None also where another thread has just cleared the queue."""
    try:
        return queue.popleft()
    except IndexError:
        return None
