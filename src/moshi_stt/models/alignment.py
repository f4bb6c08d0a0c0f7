"""When each word was said: forced alignment by pocketsphinx. Knows how to say words; knows no recogniser and no stream."""

import itertools
import queue
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moshi_stt.engine.recogniser import RECOGNISER_RATE, Span
from moshi_stt.models.pronounce import letters_to_phones, spoken_forms
from moshi_stt.models.sphinx import sphinx_decoder

FRAME_SECONDS = 0.01
SHORTEST_SECONDS = 0.1
"""Less audio than this is not worth a search: its words share it out."""

ADDED_WORDS = 2_000
"""A decoder that learnt so many words outside its dictionary is replaced by a new one: it cannot forget any."""

TAIL_SAMPLES = RECOGNISER_RATE // 10
"""Silence behind the audio: the search wants to end in it."""

FEWER = (1, 2, 4)
"""By how many words at the end an alignment that failed is tried again."""

GAUSSIANS = 2
"""Counted of each mixture, where 4 are usual: a fifth cheaper, and 98 of 100 times differ by at most 0.02 s."""

FILLER_MARKS = "<[+("
PEAK = 32_767


class _Decoder:
    """One pocketsphinx decoder with its dictionary. Not thread-safe."""

    def __init__(self) -> None:
        import pocketsphinx  # has no wheel for some versions of Python: see cross_attention.py

        folder = Path(pocketsphinx.get_model_path("en-us"))
        self.search = sphinx_decoder(
            {
                "hmm": str(folder / "en-us"),
                "dict": str(folder / "cmudict-en-us.dict"),
                "loglevel": "FATAL",
                "cmn": "batch",  # "live" would carry the level of one stream's audio over to the next
                "bestpath": False,  # its lattice search drops a word that ends with the audio
                "topn": GAUSSIANS,  # "ds", which scores fewer frames, carries something over from call to call
            }
        )
        self.added = 0

    def sayable(self, form: str) -> str:
        """The dictionary's key for a spoken form; one that is not there is added with a pronunciation by rule."""
        for key in (form, form.strip("'")):
            if self.search.knows(key):
                return key
        self.search.add_word(form, " ".join(letters_to_phones(form)))
        self.added += 1
        return form

    def spans(self, samples: NDArray[np.float32], keys: Sequence[str]) -> list[tuple[float, float]]:
        """Start and stop in seconds of each key in order, as far as the search got: maybe fewer than there are keys."""
        pcm = (np.clip(np.pad(samples, (0, TAIL_SAMPLES)), -1.0, 1.0) * PEAK).astype("<i2")
        return [
            (segment.first * FRAME_SECONDS, (segment.last + 1) * FRAME_SECONDS)
            for segment in self.search.align(pcm, " ".join(keys))
            if segment.word[0] not in FILLER_MARKS
        ][: len(keys)]


class Aligner:
    """A pool of decoders. Thread-safe; a call waits while all are busy."""

    def __init__(self, decoders: int) -> None:
        self.source = f"{decoders} decoder{'s' if decoders > 1 else ''} of pocketsphinx"
        self._pool: queue.SimpleQueue[_Decoder] = queue.SimpleQueue()
        for _ in range(decoders):
            self._pool.put(_Decoder())

    def align(self, samples: NDArray[np.float32], texts: Sequence[str], needed: int | None = None) -> list[Span]:
        """See `Recogniser.align`."""
        seconds = len(samples) / RECOGNISER_RATE
        needed = len(texts) if needed is None else needed
        forms = [spoken_forms(text) for text in texts]
        if not any(forms[:needed]) or seconds < SHORTEST_SECONDS:
            return share_out(texts, 0.0, seconds)[:needed]
        decoder = self._pool.get()
        try:
            keys = [[decoder.sayable(form) for form in spoken] for spoken in forms]
            kept, found = _search(decoder, samples, keys, needed)
            if decoder.added > ADDED_WORDS:
                decoder = _Decoder()
        finally:
            self._pool.put(decoder)
        return _word_spans(texts[:kept], keys[:kept], found, seconds)[:needed]

    def close(self) -> None:
        """Free the decoders that are not in use."""
        while True:
            try:
                self._pool.get_nowait()
            except queue.Empty:
                return


def _search(
    decoder: _Decoder, samples: NDArray[np.float32], keys: Sequence[Sequence[str]], needed: int
) -> tuple[int, list[tuple[float, float]]]:
    """Align the words; where there is no way through, without the last ones that are not needed. How many were kept, and spans.

    The end of a hypothesis that is still growing is often a word that nobody said.
    """
    found: list[tuple[float, float]] = []
    for dropped in (0, *FEWER, len(keys)):
        kept = max(len(keys) - dropped, needed)
        flat = [key for group in keys[:kept] for key in group]
        found = decoder.spans(samples, flat)
        if len(found) == len(flat) or kept == needed:
            break
    return kept, found


def share_out(texts: Sequence[str], start: float, stop: float) -> list[Span]:
    """Spans for words of which nothing is known but where they lie together: in proportion to their lengths."""
    weights = np.array([max(1, sum(letter.isalnum() for letter in text)) for text in texts], float)
    edges = start + (stop - start) * np.concatenate([[0.0], np.cumsum(weights) / weights.sum()])
    return [Span(float(left), float(right)) for left, right in itertools.pairwise(edges)]


def _word_spans(
    texts: Sequence[str], keys: Sequence[Sequence[str]], found: Sequence[tuple[float, float]], seconds: float
) -> list[Span]:
    """Join the spans of each word's spoken forms; words without one share the gap that they stand in."""
    placed: list[Span | None] = []
    position = 0
    for group in keys:
        pieces = found[position : position + len(group)]
        position += len(group)
        if group and len(pieces) == len(group):
            stop = min(pieces[-1][1], seconds)
            placed.append(Span(min(pieces[0][0], stop), stop))
        else:
            placed.append(None)
    spans: list[Span] = []
    while len(spans) < len(placed):
        first = len(spans)
        span = placed[first]
        if span is not None:
            spans.append(span)
            continue
        last = next((index for index in range(first, len(placed)) if placed[index] is not None), len(placed))
        left = spans[-1].stop if spans else 0.0
        follower = placed[last] if last < len(placed) else None
        spans.extend(share_out(texts[first:last], left, follower.start if follower else seconds))
    return spans
