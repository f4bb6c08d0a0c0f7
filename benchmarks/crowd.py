"""Streams that are stepped in company that changes all the time: what each hears must not depend on it. No model is known here.

A crowd is stepped twice, by two schedules: at each step another number of rows, other streams among them, streams that end and
others that begin in their slots. A stream's frames are the same both times, in the same order; so must be its tokens,
probabilities and codes, to the last bit.
"""

import time
import wave
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moshi_stt.sample import sample_path

FRAME_SAMPLES = 1_920


@dataclass
class Heard:
    """What one stream heard: tokens, log-probabilities and codes of its frames, in order."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    codes: list[bytes] = field(default_factory=list)


class Crowd:
    """`most` streams at once over a backend's first `most` slots."""

    def __init__(self, backend: Any, most: int, seconds: float = 16.0) -> None:
        """seconds: a stream's mean length."""
        self.backend = backend
        self.most = most
        self.mean = seconds * 12.5
        rng = np.random.default_rng(7)
        loud = rng.uniform(0.0, 0.3, (509, 1)).astype(np.float32)
        self.sounds = rng.standard_normal((509, FRAME_SAMPLES)).astype(np.float32) * loud
        with wave.open(str(sample_path())) as file:
            whole = np.frombuffer(file.readframes(file.getnframes()), np.int16).astype(np.float32) / 32_768
        self.speech = whole[: len(whole) // FRAME_SAMPLES * FRAME_SAMPLES].reshape(-1, FRAME_SAMPLES)

    def frame(self, stream: int, number: int) -> NDArray[np.float32]:
        """A stream's frame, the same in every schedule. Every second stream hears speech at its own level; the others noise."""
        if stream % 2:
            return self.speech[(stream * 37 + number) % len(self.speech)] * np.float32(1 / (1 + stream % 13))
        return self.sounds[(stream * 131 + number * 17) % len(self.sounds)]

    def length(self, stream: int) -> int:
        """Frames of a stream."""
        return 1 + int(np.random.default_rng([3, stream]).exponential(self.mean))

    def run(self, frames: int, seed: int, rows: int = 0) -> tuple[dict[int, Heard], dict[str, Any]]:
        """Step until so many frames are heard. rows: of every step; 0 draws another number, 1 to `most`, for each."""
        rng = np.random.default_rng(seed)
        heard: dict[int, Heard] = {}
        streams = list(range(self.most))
        slots = [int(slot) for slot in rng.permutation(self.most)]
        at = [0] * self.most
        following, stepped, steps, joins = self.most, 0, 0, self.most
        begun = time.monotonic()
        while stepped < frames:
            count = rows or round(self.most ** rng.random())
            chosen = [int(i) for i in rng.choice(self.most, count, replace=False)]
            pcm = np.stack([self.frame(streams[i], at[i]) for i in chosen])
            where = np.array([slots[i] for i in chosen], np.int64)
            fresh = np.array([at[i] == 0 for i in chosen])
            output = self.backend.step(pcm, where, fresh)
            codes = self.backend.state.codes.cpu().numpy()
            for row, i in enumerate(chosen):
                told = heard.setdefault(streams[i], Heard())
                told.tokens.append(int(output.text_token[row]))
                told.logprobs.append(float(output.logprob[row]))
                told.codes.append(codes[where[row]].tobytes())
                at[i] += 1
                if at[i] == self.length(streams[i]):  # it leaves; another joins in its slot
                    streams[i], at[i] = following, 0
                    following, joins = following + 1, joins + 1
            stepped, steps = stepped + count, steps + 1
        return heard, {
            "frames": stepped,
            "steps": steps,
            "joins": joins,
            "rows": rows or f"1 to {self.most}",
            "seconds": round(time.monotonic() - begun, 1),
        }


def compare(one: dict[int, Heard], other: dict[int, Heard]) -> dict[str, int]:
    """Frames that both heard of the same stream, and of how many of them the outputs differ."""
    found = {"frames": 0, "tokens": 0, "logprobs": 0, "codes": 0, "streams_changed": 0}
    for stream in one.keys() & other.keys():
        a, b = one[stream], other[stream]
        count = min(len(a.tokens), len(b.tokens))
        differ = [
            sum(x != y for x, y in zip(left[:count], right[:count], strict=True))
            for left, right in ((a.tokens, b.tokens), (a.logprobs, b.logprobs), (a.codes, b.codes))
        ]
        found["frames"] += count
        found["tokens"] += differ[0]
        found["logprobs"] += differ[1]
        found["codes"] += differ[2]
        found["streams_changed"] += any(differ)
    return found
