"""Streams through the segmenter alone, in audio time: what came out when, and what it cost.

Nothing here depends on how busy the machine is. An event's time is when the audio that it needed had arrived; what computing
adds is simulated by `queue_lags` from the cost of each recogniser call, by a model of those costs (`Costs`) that was fitted on
a core of a busy machine. So two versions of the segmenter compare to the millisecond, on any machine.
"""

import hashlib
import heapq
import pickle
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moshi_stt.constants import FRAME_SAMPLES, SAMPLE_RATE
from moshi_stt.engine.engine import StreamOptions
from moshi_stt.engine.recogniser import RECOGNISER_RATE, VAD_FRAME, Hypothesis, Span, Spoken
from moshi_stt.engine.segmenter import Segmenter, SegmentSettings
from moshi_stt.events import AnyEvent, EndWord, Word
from moshi_stt.models.embedded import EmbeddedRecogniser, load_embedded

WORKERS = 2


class Costs(NamedTuple):
    """Seconds of one core. `python benchmarks/embedded_trace.py` fits them to a machine."""

    stem: float = 0.0022
    """The encoder's first layers, a second of audio that they did not hear before;"""
    encode: float = 0.0030
    """its others, a second of audio,"""
    encode_square: float = 0.00012
    """and this times the square of its seconds."""
    first_pass: float = 0.0030
    """The first pass of the decoder,"""
    first_pass_second: float = 0.0005
    """and this for each second of audio."""
    token: float = 0.0016
    """Each token that the draft did not foresee."""
    align: float = 0.0120
    """A second of alignment."""
    frame: float = 0.00022
    """Detector and resampler, one frame."""


class Job(NamedTuple):
    """What one `next` of the segmenter did."""

    at: float
    """Seconds of audio that it needed."""
    cost: float
    ends: tuple[float, ...]
    """When the words ended that it sent."""
    flush: bool


class Trace(NamedTuple):
    events: list[tuple[float, AnyEvent]]
    """With the seconds of audio that had come."""
    jobs: list[Job]
    seconds: float

    @property
    def text(self) -> str:
        return " ".join(event.text for _, event in self.events if isinstance(event, Word))

    @property
    def lags(self) -> list[float]:
        """From each word's end to its event, without computing; words that the end of the audio brought left out."""
        return [job.at - end for job in self.jobs if not job.flush for end in job.ends]

    @property
    def cost(self) -> float:
        return sum(job.cost for job in self.jobs)


@dataclass
class Remembered:
    """The recogniser's memory of a stretch of audio, and how many seconds it has heard."""

    inner: Any
    seconds: float = 0.0


class MeteredRecogniser:
    """A recogniser that adds up what its calls cost by the model, and can remember results from run to run."""

    def __init__(self, recogniser: EmbeddedRecogniser, costs: Costs | None = None, memory: Path | None = None) -> None:
        self.inner = recogniser
        self.name, self.languages, self.notes = recogniser.name, recogniser.languages, recogniser.notes
        self.costs = costs or Costs()
        self.spent = 0.0
        self.calls = 0
        self._path = memory
        self._memory: dict[Any, Any] = {}
        self._saved = 0
        if memory and memory.exists():
            self._memory = pickle.loads(memory.read_bytes())
            self._saved = len(self._memory)

    def save(self) -> None:
        if self._path and len(self._memory) > self._saved:
            part = self._path.with_suffix(".part")
            part.write_bytes(pickle.dumps(self._memory))
            part.replace(self._path)
            self._saved = len(self._memory)

    def sample(self) -> NDArray[np.float32]:
        return self.inner.sample()

    def vad_start(self) -> Any:
        return self.inner.vad_start()

    def speech_probability(self, frame: NDArray[np.float32], state: Any) -> tuple[float, Any]:
        self.spent += self.costs.frame
        return self.inner.speech_probability(frame, state)

    def memory(self) -> Remembered:
        return Remembered(self.inner.memory())

    def recognise(
        self,
        samples: NDArray[np.float32],
        said: Sequence[Spoken] = (),
        draft: Sequence[Spoken] = (),
        said_seconds: float = 0.0,
        memory: Remembered | None = None,
    ) -> Hypothesis:
        memory = memory or self.memory()
        key = ("words", hashlib.blake2b(samples.tobytes(), digest_size=12).digest(), _tokens(said))
        result = self._memory.get(key)
        if result is None:
            result = self.inner.recognise(samples, said, draft, said_seconds, memory.inner)
            if self._path:
                self._memory[key] = result
        seconds, costs = len(samples) / RECOGNISER_RATE, self.costs
        heard, guess = _tokens(result.words), _tokens(draft)
        right = next((index for index, (one, two) in enumerate(zip(heard, guess, strict=False)) if one != two), len(guess))
        self.calls += 1
        self.spent += costs.stem * max(0.0, seconds - memory.seconds)
        memory.seconds = max(seconds, memory.seconds)
        self.spent += costs.encode * seconds + costs.encode_square * seconds**2
        self.spent += costs.first_pass + costs.first_pass_second * seconds + costs.token * max(0, len(heard) - right)
        return result

    def align(self, samples: NDArray[np.float32], texts: Sequence[str], needed: int | None = None) -> list[Span]:
        digest = hashlib.blake2b(samples.tobytes(), digest_size=12).digest()
        key = ("times", digest, tuple(texts), needed)
        result = self._memory.get(key)
        if result is None:
            result = self.inner.align(samples, texts, needed)
            if self._path:
                self._memory[key] = result
        self.spent += self.costs.align * len(samples) / RECOGNISER_RATE
        return result

    def close(self) -> None:
        self.inner.close()


def _tokens(words: Sequence[Spoken]) -> tuple[int, ...]:
    return tuple(token for word in words for token in word.tokens)


def metered(memory: Path | None = None) -> MeteredRecogniser:
    return MeteredRecogniser(load_embedded(1), memory=memory)


def trace(
    recogniser: MeteredRecogniser, pcm: NDArray[np.float32], settings: SegmentSettings | None = None, *, extras: bool = False
) -> Trace:
    """One recording, float32 (S,) at 24 kHz, in messages of 80 ms, and a flush at its end.

    extras: with all events that a client can ask for.
    """
    options = {"options": StreamOptions(interim=True, confidence=True, turns=True, warnings=True)} if extras else {}
    segmenter = Segmenter(recogniser, settings, **options)
    events: list[tuple[float, AnyEvent]] = []
    jobs: list[Job] = []
    recogniser.spent, fed = 0.0, 0

    def go(batches: Any, flush: bool) -> None:
        for batch in batches:
            now = fed / SAMPLE_RATE
            events.extend((now, event) for event in batch)
            jobs.append(Job(now, recogniser.spent, tuple(e.stop_time for e in batch if isinstance(e, EndWord)), flush))
            recogniser.spent = 0.0

    for start in range(0, len(pcm), FRAME_SAMPLES):
        message = pcm[start : start + FRAME_SAMPLES]
        fed += len(message)
        go(segmenter.feed(message), flush=False)
    go(segmenter.flush(), flush=True)
    jobs.append(Job(fed / SAMPLE_RATE, recogniser.spent, (), True))
    return Trace(events, jobs, len(pcm) / SAMPLE_RATE)


def queue_lags(traces: Sequence[Trace], streams: int, seed: int = 1, workers: int = WORKERS) -> tuple[list[float], float]:
    """Lags of the words of so many live streams that share the workers, and cores in use.

    Each stream plays all traces one after another, begun at another one and at another moment. A job is ready when its
    audio has come and the stream's job before is done; jobs are taken in the order in which they became ready.
    """
    rng = np.random.default_rng(seed)
    length = sum(item.seconds for item in traces)
    waiting: list[tuple[float, int, int]] = []
    plans: list[list[tuple[float, Job]]] = []
    for stream in range(streams):
        order = np.roll(rng.permutation(len(traces)), stream)
        offset, plan = float(rng.uniform(0, 10)), []
        for index in order:
            plan += [(offset + job.at, job) for job in traces[index].jobs]
            offset += traces[index].seconds
        plans.append(plan)
        heapq.heappush(waiting, (plan[0][0], stream, 0))
    free = [0.0] * workers
    lags: list[float] = []
    while waiting:
        ready, stream, index = heapq.heappop(waiting)
        due, job = plans[stream][index]
        done = max(ready, heapq.heappop(free)) + job.cost
        heapq.heappush(free, done)
        lags += [] if job.flush else [done - due + job.at - end for end in job.ends]
        if index + 1 < len(plans[stream]):
            heapq.heappush(waiting, (max(plans[stream][index + 1][0], done), stream, index + 1))
    return lags, streams * sum(item.cost for item in traces) / length


# ---- the cost model --------------------------------------------------------------------------------------------------


def fit_costs(recogniser: EmbeddedRecogniser, repetitions: int = 3) -> Costs:
    """Measure the recogniser's parts on this thread's processor time and fit `Costs`. Takes half a minute."""
    speech = np.tile(recogniser.sample(), 3)
    model = recogniser._moonshine

    def seconds(call: Callable[[], Any]) -> float:
        times = []
        for _ in range(repetitions):
            begun = time.thread_time()
            call()
            times.append(time.thread_time() - begun)
        return min(times)

    lengths = (1, 2, 4, 6, 8, 11, 14)
    stem, encode, check, token, align = [], [], [], [], []
    for length in lengths:
        samples = speech[: length * RECOGNISER_RATE]
        memory = model.memory()
        model.encode(samples, memory)
        hidden = model.encode(samples)
        tokens, _, _ = model.decode(hidden, [], [], 100)
        texts = [word.text for word in recogniser.recognise(samples).words]
        encode.append(seconds(partial(model.encode, samples, memory)))
        stem.append((seconds(partial(model.encode, samples)) - encode[-1]) / length)
        check.append(seconds(partial(model.decode, hidden, tokens, [], 0)))
        token.append((seconds(partial(model.decode, hidden, [], [], 100)) - check[-1]) / max(1, len(tokens)))
        align.append(seconds(partial(recogniser.align, samples, texts)) / length)
    column = np.array(lengths, float)
    (linear, square), *_ = np.linalg.lstsq(np.stack([column, column**2], 1), np.array(encode), rcond=None)
    (constant, slope), *_ = np.linalg.lstsq(np.stack([np.ones_like(column), column], 1), np.array(check), rcond=None)
    state, frame = recogniser.vad_start(), speech[:VAD_FRAME]
    detect = seconds(lambda: [recogniser.speech_probability(frame, state) for _ in range(100)]) / 100
    fitted = (np.median(stem), linear, square, constant, slope, np.median(token), np.median(align), detect)
    return Costs(*(round(float(value), 6) for value in fitted))


if __name__ == "__main__":
    print(fit_costs(load_embedded(1)))
