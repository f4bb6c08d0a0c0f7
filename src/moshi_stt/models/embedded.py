"""The embedded English recogniser: Moonshine tiny-en, Silero's speech detector and word alignment as one `Recogniser`."""

import importlib.util
import math
import wave
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from moshi_stt.audio.vad import SileroState, SileroVad, load_vad, one_thread_session
from moshi_stt.cores import usable_cores
from moshi_stt.data import MODEL, SAMPLE, data_file
from moshi_stt.engine.recogniser import RECOGNISER_RATE, Hypothesis, Span, Spoken
from moshi_stt.models.alignment import Aligner
from moshi_stt.models.cross_attention import AttentionAligner

ALIGNER_PACKAGE = "pocketsphinx"

SAMPLE_SECONDS = 5

BEGIN, END = 1, 2
"""Tokens that open and close a text."""

TOKENS_PER_SECOND = 6.5
"""No English speaker needs more; a decoder caught in a loop does. (Its makers' own bound for this model.)"""

ATTENTION = "cross_attention"
"""An output of the shipped decoder, see tools/embedded_model.py."""

LONGEST_LOOP, LOOPS = 24, 3
"""A decoder that says up to so many tokens so many times in a row is stopped;"""
SHORT_LOOP, SHORT_LOOPS = 3, 8
"""one that says up to so many, later: people do say "no, no, no"."""

SPARE_TOKENS = 8
SPARE_SECONDS = 0.3
"""By so much the end of the words said may be placed too late."""

SHORTEST_SAMPLES = RECOGNISER_RATE // 4
"""Anything shorter is padded with silence: the encoder's convolutions need some length."""


class EmbeddedTokenizer:
    """The token table of `tokenizer.bin`: for each id, a length (one byte, or two from 128 on) and that many bytes of text."""

    def __init__(self, data: bytes) -> None:
        self.pieces: list[bytes] = []
        position = 0
        while position < len(data):
            length = data[position]
            position += 1
            if length >= 128:
                length += (data[position] - 1) * 128
                position += 1
            piece = data[position : position + length]
            position += length
            self.pieces.append(piece.replace("▁".encode(), b" "))
        self._ids = {piece: token for token, piece in enumerate(self.pieces) if piece and token > END}
        self._longest = max(map(len, self._ids), default=0)

    def may_follow(self) -> NDArray[np.bool_]:
        """(V,): the tokens that may follow a finished word: those that begin one, and the end."""
        return np.array([piece[:1] == b" " or token == END for token, piece in enumerate(self.pieces)], np.bool_)

    def encode(self, text: str) -> list[int]:
        """Tokens of one word, the longest piece first at each place; not always those that the model would choose.

        Empty where the table lacks a letter.
        """
        rest, tokens = f" {text}".encode(), []
        while rest:
            size = next((n for n in range(min(len(rest), self._longest), 0, -1) if rest[:n] in self._ids), 0)
            if not size:
                return []
            tokens.append(self._ids[rest[:size]])
            rest = rest[size:]
        return tokens

    def words(self, tokens: Sequence[int], logprobs: Sequence[float]) -> list[Spoken]:
        """Group tokens to words: one that begins with a blank begins a word."""
        groups: list[list[int]] = []
        for index, token in enumerate(tokens):
            if not groups or self.pieces[token][:1] == b" ":
                groups.append([])
            groups[-1].append(index)
        return [
            Spoken(
                _text([self.pieces[tokens[index]] for index in group]),
                tuple(tokens[index] for index in group),
                math.fsum(logprobs[index] for index in group),
            )
            for group in groups
        ]


def _text(pieces: Sequence[bytes]) -> str:
    """The text of a word's pieces; the model sometimes doubles a comma."""
    return b"".join(pieces).decode("utf-8", "replace").strip().replace(",,", ",")


class Moonshine:
    """Encoder and decoder of Moonshine tiny-en (27M parameters). Thread-safe: holds no state between calls."""

    def __init__(self, encoder: Path, decoder: Path, may_follow: NDArray[np.bool_]) -> None:
        """may_follow: (V,), the tokens that may follow a finished word."""
        self._may_follow = may_follow
        self._encoder = one_thread_session(encoder)
        self._decoder = one_thread_session(decoder)
        self._outputs = [output.name for output in self._decoder.get_outputs() if output.name != ATTENTION]
        self._pasts = [name.replace("present", "past_key_values") for name in self._outputs[1:]]
        heads, width = self._decoder.get_inputs()[3].shape[1], self._decoder.get_inputs()[3].shape[3]
        self._no_past = np.zeros((1, heads, 0, width), np.float32)  # (B, H, T, D)
        self._growing = [name for name in self._outputs[1:] if "decoder" in name]
        self._growing_pasts = [name for name in self._pasts if "decoder" in name]

    def encode(self, samples: NDArray[np.float32]) -> NDArray[np.float32]:
        """Samples (S,) to hidden states (1, T, D), T = about 41.7 a second."""
        if len(samples) < SHORTEST_SAMPLES:
            samples = np.pad(samples, (0, SHORTEST_SAMPLES - len(samples)))
        mask = np.ones((1, len(samples)), np.int64)
        hidden: NDArray[np.float32] = self._encoder.run(None, {"input_values": samples[None], "attention_mask": mask})[0]
        return hidden

    def decode(
        self, hidden: NDArray[np.float32], said: Sequence[int], draft: Sequence[int], limit: int
    ) -> tuple[list[int], list[float], bool]:
        """Continue the tokens `said` greedily by at most `limit`: tokens, their log-probabilities, whether they came to an end.

        One pass over said + draft costs about as much as one step, so the draft is checked whole and kept as far as it is what
        the decoder would have chosen.
        """
        draft = draft[:limit]
        feed = self._first_feed(hidden, [*said, *draft])
        logits, *caches = self._decoder.run(self._outputs, feed)
        scores = logits[0, len(said) :]  # (T, V)
        if said:
            # What was said stays said: the next token must not lengthen the last word.
            scores[0] = np.where(self._may_follow, scores[0], -np.inf)
        chosen = [_best(row) for row in scores]
        right = next((index for index, token in enumerate(draft) if chosen[index][0] != token), len(draft))
        tokens, logprobs = [token for token, _ in chosen[:right]], [logprob for _, logprob in chosen[:right]]
        token, logprob = chosen[right]
        feed.update(zip(self._pasts, caches, strict=True))
        feed["use_cache_branch"] = np.array([True])
        for name, cache in zip(self._pasts, caches, strict=True):
            if "decoder" in name:
                feed[name] = cache[:, :, : 1 + len(said) + right]
        while token != END and len(tokens) < limit:
            tokens.append(token)
            logprobs.append(logprob)
            if loops(tokens):
                break
            feed["input_ids"] = np.array([[token]], np.int64)
            logits, *caches = self._decoder.run([self._outputs[0], *self._growing], feed)
            feed.update(zip(self._growing_pasts, caches, strict=True))
            token, logprob = _best(logits[0, 0])
        return tokens, logprobs, token == END

    def cross_attention(self, hidden: NDArray[np.float32], tokens: Sequence[int]) -> NDArray[np.float32]:
        """How much each token, and the end after them, attends to each frame: (L * H, T + 1, frames), rows sum to 1."""
        attention: NDArray[np.float32] = self._decoder.run([ATTENTION], self._first_feed(hidden, tokens))[0][0]
        return attention

    def _first_feed(self, hidden: NDArray[np.float32], tokens: Sequence[int]) -> dict[str, NDArray[np.generic]]:
        return {
            "encoder_hidden_states": hidden,
            # One for every audio sample, or, where all are valid, one that broadcasts.
            "encoder_attention_mask": np.ones((1, 1), np.int64),
            "input_ids": np.array([[BEGIN, *tokens]], np.int64),
            "use_cache_branch": np.array([False]),
            **dict.fromkeys(self._pasts, self._no_past),
        }


def loops(tokens: list[int]) -> bool:
    """Whether the last tokens repeat what stands before them, over and over: such a decoder does not come to an end."""
    for length in range(1, min(LONGEST_LOOP, len(tokens) // LOOPS) + 1):
        times = LOOPS if length > SHORT_LOOP else SHORT_LOOPS
        if len(tokens) >= length * times and tokens[-length:] * times == tokens[-length * times :]:
            return True
    return False


def read_wav(path: Path) -> NDArray[np.float32]:
    """A 16-bit mono WAV file as float32 (S,), at its own rate."""
    with wave.open(str(path)) as file:
        return np.frombuffer(file.readframes(file.getnframes()), "<i2").astype(np.float32) / np.float32(32_768)


def _best(logits: NDArray[np.float32]) -> tuple[int, float]:
    token = int(logits.argmax())
    return token, -math.log(float(np.exp(logits - logits[token]).sum()))


class WordAligner(Protocol):
    """Says when words were said. Thread-safe."""

    source: str
    """Where the times come from, for the log."""

    def align(self, samples: NDArray[np.float32], texts: Sequence[str], needed: int | None = None) -> list[Span]: ...

    def close(self) -> None: ...


class EmbeddedRecogniser:
    """The embedded model. See `Recogniser` for the methods."""

    name = "moonshine tiny-en"
    languages: tuple[str, ...] = ("en",)

    def __init__(
        self,
        moonshine: Moonshine,
        tokenizer: EmbeddedTokenizer,
        vad: SileroVad,
        aligner: WordAligner,
        sample: NDArray[np.float32],
    ) -> None:
        self._moonshine = moonshine
        self._tokenizer = tokenizer
        self._vad = vad
        self._aligner = aligner
        self._sample = sample
        self.notes = {"word times": aligner.source}
        self.notes |= {"language": "English only; for French serve Kyutai's weights: `moshi-stt worker --config stt-1b-en_fr`"}

    def sample(self) -> NDArray[np.float32]:
        return self._sample

    def vad_start(self) -> SileroState:
        return self._vad.start()

    def speech_probability(self, frame: NDArray[np.float32], state: SileroState) -> tuple[float, SileroState]:
        return self._vad(frame, state)

    def recognise(
        self,
        samples: NDArray[np.float32],
        said: Sequence[Spoken] = (),
        draft: Sequence[Spoken] = (),
        said_seconds: float = 0.0,
    ) -> Hypothesis:
        seconds = len(samples) / RECOGNISER_RATE - max(0.0, said_seconds - SPARE_SECONDS)
        limit = math.ceil(seconds * TOKENS_PER_SECOND) + SPARE_TOKENS
        hidden = self._moonshine.encode(samples)
        tokens, logprobs, whole = self._moonshine.decode(hidden, _tokens(said), _tokens(draft), limit)
        return Hypothesis(self._tokenizer.words(tokens, logprobs), whole)

    def align(self, samples: NDArray[np.float32], texts: Sequence[str], needed: int | None = None) -> list[Span]:
        return self._aligner.align(samples, texts, needed)

    def close(self) -> None:
        self._aligner.close()


def _tokens(words: Iterable[Spoken]) -> list[int]:
    return [token for word in words for token in word.tokens]


def load_embedded(threads: int = 0) -> EmbeddedRecogniser:
    """Load the embedded model: about 0.3 s.

    threads: how many callers there may be at once; 0 takes one for each usable core. Raises CheckpointError.
    """
    encoder, decoder, tokens = (
        data_file(f"{MODEL}/{name}") for name in ("encoder_model.ort", "decoder_model_merged.ort", "tokenizer.bin")
    )
    tokenizer = EmbeddedTokenizer(tokens.read_bytes())
    moonshine = Moonshine(encoder, decoder, tokenizer.may_follow())
    aligner: WordAligner = AttentionAligner(moonshine, tokenizer)
    if importlib.util.find_spec(ALIGNER_PACKAGE) is not None:
        aligner = Aligner(threads or usable_cores())
    return EmbeddedRecogniser(
        moonshine,
        tokenizer,
        load_vad(),
        aligner,
        read_wav(data_file(SAMPLE))[: SAMPLE_SECONDS * RECOGNISER_RATE],
    )
