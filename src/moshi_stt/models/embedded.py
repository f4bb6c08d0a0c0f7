"""The embedded English recogniser: Moonshine tiny-en, Silero's speech detector and word alignment as one `Recogniser`."""

import importlib.util
import math
import wave
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
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
"""An output of the decoder, see tools/embedded_model.py."""

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


UNSIGNED_WEIGHTS = {"session.x64quantprecision": "1"}
"""A setting of onnxruntime: signed weights become unsigned while loading. The results are the same, computing takes longer."""


def int8_saturates() -> bool:
    """Whether products of unsigned and signed bytes are inexact here, as on x86 processors without VNNI instructions.

    Their sums of two products are cut off at 16 bits. The model's weights must then be unsigned.
    """
    left = np.full((8, 64), 255, np.uint8)
    product = one_thread_session(data_file(f"{MODEL}/int8_probe.onnx")).run(None, {"left": left})[0]  # (8, 32)
    return bool((product != 255 * 127 * left.shape[1]).any())


STEM_SAMPLES, STEM_STRIDE = 127, 64
"""Samples that a frame of the encoder's first convolution hears, and from one frame to the next;"""
CONVOLVED_FRAMES, CONVOLVED_STRIDE = 7, 3
"""of those, how many the second convolution hears, and its step."""
STEM_CHANNELS = 288
GROUP_NORM_EPSILON = 1e-5


@dataclass
class StemMemory:
    """What the encoder's first layers made of the start of a stretch of audio: they need not hear it again when it has grown.

    convolved: (1, C, T), the second convolution. sums, squares: (1, F) over the channels of each frame of the first.
    """

    convolved: NDArray[np.float32]
    sums: NDArray[np.float32]
    squares: NDArray[np.float32]


Heard = list[NDArray[np.float32]]
"""What the encoder makes of audio: keys and values of each decoder layer, each (1, H, T, D), about 41.7 frames a second."""


class Moonshine:
    """Encoder and decoder of Moonshine tiny-en (27M parameters). Thread-safe: holds no state between calls."""

    def __init__(self, stem: Path, encoder: Path, decoder: Path, may_follow: NDArray[np.bool_]) -> None:
        """may_follow: (V,), the tokens that may follow a finished word."""
        self._may_follow = may_follow
        settings = UNSIGNED_WEIGHTS if int8_saturates() else {}
        self._stem = one_thread_session(stem)
        self._encoder = one_thread_session(encoder, settings)
        self._decoder = one_thread_session(decoder, settings)
        self._heard = [output.name for output in self._encoder.get_outputs()]
        inputs = {node.name: node.shape for node in self._decoder.get_inputs()}
        self._pasts = [name for name in inputs if name.startswith("past.")]
        self._outputs = ["logits", *(name.replace("past", "present") for name in self._pasts)]
        heads, width = inputs[self._pasts[0]][1], inputs[self._pasts[0]][3]
        self._no_past = [np.zeros((1, heads, 0, width), np.float32)] * len(self._pasts)  # (B, H, T, D)

    def memory(self) -> StemMemory:
        """For `encode`: of audio of which nothing was heard yet."""
        width = self._encoder.get_inputs()[0].shape[1]
        return StemMemory(np.zeros((1, width, 0), np.float32), np.zeros((1, 0), np.float32), np.zeros((1, 0), np.float32))

    def encode(self, samples: NDArray[np.float32], memory: StemMemory | None = None) -> Heard:
        """Samples (S,) to what the decoder attends to.

        memory: of the same samples' start; what is made of the rest is added to it.
        """
        if len(samples) < SHORTEST_SAMPLES:
            samples, memory = np.pad(samples, (0, SHORTEST_SAMPLES - len(samples))), None
        memory = self.memory() if memory is None else memory
        stem_frames = (len(samples) - STEM_SAMPLES) // STEM_STRIDE + 1
        frames = (stem_frames - CONVOLVED_FRAMES) // CONVOLVED_STRIDE + 1
        known = min(memory.convolved.shape[2], frames - 1)
        rest = samples[known * CONVOLVED_STRIDE * STEM_STRIDE :]
        convolved, *powers = self._stem.run(["convolved", "sums", "squares"], {"samples": rest[None, None]})
        memory.convolved = np.concatenate([memory.convolved[:, :, :known], convolved], axis=2)
        earlier = known * CONVOLVED_STRIDE
        memory.sums, memory.squares = (
            np.concatenate([old[:, :earlier], new], axis=1)
            for old, new in zip((memory.sums, memory.squares), powers, strict=True)
        )
        count = stem_frames * STEM_CHANNELS
        mean = memory.sums.sum(dtype=np.float64) / count
        variance = memory.squares.sum(dtype=np.float64) / count - mean**2
        inverse = (max(variance, 0.0) + GROUP_NORM_EPSILON) ** -0.5
        numbers = {"mean": np.array([mean], np.float32), "inverse": np.array([inverse], np.float32)}
        heard: Heard = self._encoder.run(None, {"convolved": memory.convolved, **numbers})
        return heard

    def decode(
        self, heard: Heard, said: Sequence[int], draft: Sequence[int], limit: int
    ) -> tuple[list[int], list[float], bool]:
        """Continue the tokens `said` greedily by at most `limit`: tokens, their log-probabilities, whether they came to an end.

        One pass over said + draft costs about as much as one step, so the draft is checked whole and kept as far as it is what
        the decoder would have chosen.
        """
        draft = draft[:limit]
        fixed = dict(zip(self._heard, heard, strict=True))
        scores, caches = self._run(fixed, self._no_past, [BEGIN, *said, *draft], first=len(said))
        if said:
            # What was said stays said: the next token must not lengthen the last word.
            scores[0] = np.where(self._may_follow, scores[0], -np.inf)
        chosen = [_best(row) for row in scores]
        right = next((index for index, token in enumerate(draft) if chosen[index][0] != token), len(draft))
        tokens, logprobs = [token for token, _ in chosen[:right]], [logprob for _, logprob in chosen[:right]]
        token, logprob = chosen[right]
        caches = [cache[:, :, : 1 + len(said) + right] for cache in caches]
        while token != END and len(tokens) < limit:
            tokens.append(token)
            logprobs.append(logprob)
            if loops(tokens):
                break
            scores, caches = self._run(fixed, caches, [token])
            token, logprob = _best(scores[0])
        return tokens, logprobs, token == END

    def _run(
        self, fixed: dict[str, NDArray[np.float32]], pasts: Heard, tokens: Sequence[int], first: int = 0
    ) -> tuple[NDArray[np.float32], Heard]:
        """One pass of the decoder over tokens (T,) that follow `pasts`: logits (T - first, V) and the longer caches."""
        feed: dict[str, NDArray[np.generic]] = {**fixed, **dict(zip(self._pasts, pasts, strict=True))}
        logits, *caches = self._decoder.run(self._outputs, feed | _tokens_feed(tokens, first))
        return logits[0], caches

    def cross_attention(self, heard: Heard, tokens: Sequence[int]) -> NDArray[np.float32]:
        """How much each token, and the end after them, attends to each frame: (L * H, T + 1, frames), rows sum to 1."""
        feed = dict(zip([*self._heard, *self._pasts], [*heard, *self._no_past], strict=True))
        feed |= _tokens_feed([BEGIN, *tokens], len(tokens))
        attention: NDArray[np.float32] = self._decoder.run([ATTENTION], feed)[0][0]
        return attention


def _tokens_feed(tokens: Sequence[int], first: int) -> dict[str, NDArray[np.int64]]:
    """Decoder inputs. first: the first token whose successor is asked for."""
    return {"tokens": np.array([tokens], np.int64), "first": np.array([first], np.int64)}


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

    def memory(self) -> StemMemory:
        return self._moonshine.memory()

    def recognise(
        self,
        samples: NDArray[np.float32],
        said: Sequence[Spoken] = (),
        draft: Sequence[Spoken] = (),
        said_seconds: float = 0.0,
        memory: StemMemory | None = None,
    ) -> Hypothesis:
        seconds = len(samples) / RECOGNISER_RATE - max(0.0, said_seconds - SPARE_SECONDS)
        limit = math.ceil(seconds * TOKENS_PER_SECOND) + SPARE_TOKENS
        heard = self._moonshine.encode(samples, memory)
        tokens, logprobs, whole = self._moonshine.decode(heard, _tokens(said), _tokens(draft), limit)
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
    stem, encoder, decoder = (data_file(f"{MODEL}/{name}.onnx") for name in ("stem", "encoder", "decoder"))
    tokenizer = EmbeddedTokenizer(data_file(f"{MODEL}/tokenizer.bin").read_bytes())
    moonshine = Moonshine(stem, encoder, decoder, tokenizer.may_follow())
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
