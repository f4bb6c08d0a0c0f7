"""Endless training rows made of clips: `plan` draws what is said when, on the CPU; `render` makes the sound, on the device.

A row is some seconds of turns by one voice or several: strings of digits, phrases, pauses between and inside them; so the
time of every word and every pause is known exactly. `changed` gives each row a room, a bandwidth, noise and a level.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from training.vocabulary import DIGITS
from training.voices import RATE, Clip

FRAME = 1_920
FRAME_RATE = 12.5
PAD, BOUNDARY = 3, 0
HORIZONS = (0.5, 1.0, 2.0, 3.0)
"""Seconds ahead that the pause heads look."""
_BRIDGED = 0.12
"""Seconds: a shorter gap between words is no pause."""


class Bank:
    """Every clip's sound in one tensor on the device, and what the planner must know of each."""

    def __init__(self, clips: Sequence[Clip], device: torch.device) -> None:
        sizes = [len(clip.samples) for clip in clips]
        self.starts = np.concatenate([[0], np.cumsum(sizes)])
        sound = np.concatenate([clip.samples for clip in clips])
        self.sound = torch.from_numpy((np.clip(sound, -1, 1) * 32_767).astype(np.int16)).to(device)
        self.words = [clip.words for clip in clips]
        self.lengths = np.array(sizes) / RATE
        self.groups: dict[str, dict[str, list[int]]] = {"digit": {}, "en": {}, "fr": {}}
        for i, clip in enumerate(clips):
            kind = "digit" if clip.language == "en" and all(w.text in DIGITS for w in clip.words) else clip.language
            self.groups[kind].setdefault(clip.voice, []).append(i)
        self.voices = {kind: sorted(by_voice) for kind, by_voice in self.groups.items()}

    def move(self, device: torch.device) -> None:
        """The sound to another device."""
        self.sound = self.sound.to(device)


class Piece(NamedTuple):
    """Part of a clip in a row. All but the last two in seconds."""

    row: int
    clip: int
    source: float
    length: float
    at: float
    speed: float
    gain: float


@dataclass
class Plan:
    """A batch before its sound is made.

    tokens (B, T); pauses (B, T, heads) bool; words (B, T): class of the word at each frame.

    said: the words of each row with their times.
    """

    pieces: list[Piece] = field(default_factory=list)
    tokens: NDArray[np.int64] = field(default_factory=lambda: np.zeros((0, 0), np.int64))
    pauses: NDArray[np.bool_] = field(default_factory=lambda: np.zeros((0, 0, 0), np.bool_))
    words: NDArray[np.int64] = field(default_factory=lambda: np.zeros((0, 0), np.int64))
    said: list[list[tuple[str, float, float]]] = field(default_factory=list)


@dataclass
class _Row:
    """One row as it is drawn."""

    number: int
    seconds: float
    pieces: list[Piece] = field(default_factory=list)
    said: list[tuple[str, float, float]] = field(default_factory=list)
    turns: float = 0.0
    """How likely a phrase is to end a turn."""


ENGINES = {"espeak": 5.0, "kokoro": 3.0, "hibari": 1.0, "flite": 1.5, "festival": 1.0, "pico": 1.5, "shifted:human": 4.0}
"""How often a synthetic voice of this engine speaks; of others, 1."""


@dataclass(frozen=True)
class Mix:
    """How often what is drawn."""

    digits: float = 0.45
    french: float = 0.2
    human: float = 0.45
    """Of the digits: how often the voice is a person's."""
    empty: float = 0.08
    """Rows in which nobody speaks to us."""
    split: float = 0.3
    """Phrases that get a pause inside."""
    engines: bool = False
    """An engine is drawn first, then one of its voices; else each voice is as likely, and most are espeak-ng's."""
    babble: float = 0.0
    """Rows in which many voices say the vocabulary at once, and nobody to us: no words are to be heard."""
    turns: float | None = None
    """Rows of turns: in so many of them most phrases end a turn, in the others few do. A pause after a turn is 2.5 s and an
    exponential rest, so that the longer a silence, the surer its going on; the other pauses are like those of people who think:
    log-normal, half a second in the median. None: pauses that are drawn evenly.
    """


TRAINING = Mix(digits=0.4, french=0.25, empty=0.04, engines=True, babble=0.05, turns=0.55)
"""What the model learns from."""
_LEAST_TURN_PAUSE, _MEAN_MORE = 2.5, 6.0
_INTERLUDE = 4.0
"""Seconds: in a longer pause there may be babble."""


class Planner:
    """Draws rows."""

    def __init__(
        self, bank: Bank, pieces_of: dict[str, list[int]], delay_frames: int, mix: Mix | None = None, seed: int = 0
    ) -> None:
        """pieces_of: the token ids of each word."""
        self._bank, self._pieces_of, self._delay = bank, pieces_of, delay_frames
        self._mix = mix or Mix()
        self._random = random.Random(seed)
        self._classes = {word: i + 1 for i, word in enumerate(sorted(pieces_of))}
        voices = bank.voices
        self._human = [voice for voice in voices["digit"] if voice.startswith("human:")]
        self._synthetic = {kind: [voice for voice in found if not voice.startswith("human:")] for kind, found in voices.items()}
        self._by_engine: dict[str, dict[str, list[str]]] = {kind: {} for kind in voices}
        for kind, found in self._synthetic.items():
            for voice in found:
                self._by_engine[kind].setdefault(voice.rpartition(":")[0], []).append(voice)

    def plan(self, rows: int, frames: int) -> Plan:
        plan = Plan()
        seconds = frames / FRAME_RATE
        drawn = [self._row(row, seconds) for row in range(rows)]
        plan.pieces = [piece for row in drawn for piece in row.pieces]
        said = [row.said for row in drawn]
        made = [targets(words, frames, self._pieces_of, self._delay) for words in said]
        plan.tokens = np.stack([tokens for tokens, _ in made])
        plan.pauses = np.stack([pauses for _, pauses in made])
        plan.words = np.stack([self._spoken(words, frames) for words in said])
        plan.said = said
        return plan

    def _row(self, number: int, seconds: float) -> "_Row":
        rng, mix = self._random, self._mix
        row = _Row(number, seconds)
        drawn = rng.random()
        if drawn < mix.empty:
            return row
        if drawn < mix.empty + mix.babble:
            self._babble(row, 0.0, seconds)
            return row
        now = rng.choice((0.0, rng.uniform(0, 0.6), rng.uniform(0.3, 2.5)))
        if mix.turns is not None:
            row.turns = 0.9 if rng.random() < mix.turns else 0.18
            if rng.random() < 0.15:
                now = rng.uniform(0.0, seconds / 2)
        kind = self._kind()
        while now < seconds - 0.5:
            if rng.random() < 0.5:
                kind = self._kind()
            voice = self._voice(kind)
            speed = rng.uniform(0.85, 1.18) if mix.turns is None else rng.uniform(0.8, 1.25)
            gain = 10 ** (rng.uniform(-8, 0) / 20)
            if kind == "digit":
                now = self._digits(row, now, voice, speed, gain)
            else:
                now = self._phrase(row, now, rng.choice(self._bank.groups[kind][voice]), speed, gain)
            pause = self._pause_after(row)
            if pause > _INTERLUDE and mix.babble and rng.random() < 0.2:
                self._babble(row, now + rng.uniform(0.3, 1.5), min(now + pause, seconds) - 0.3)
            now += pause
        return row

    def _pause_after(self, row: "_Row") -> float:
        """Seconds between a phrase and the next one."""
        rng = self._random
        if self._mix.turns is None:
            return rng.uniform(0.1, 0.8) if rng.random() < 0.2 else rng.uniform(0.8, 4.0)
        if rng.random() < row.turns:
            return _LEAST_TURN_PAUSE + rng.expovariate(1 / _MEAN_MORE)
        return self._hesitation()

    def _pause_inside(self) -> float:
        return self._random.uniform(0.2, 1.5) if self._mix.turns is None else self._hesitation()

    def _hesitation(self) -> float:
        return min(3.0, max(0.1, self._random.lognormvariate(math.log(0.5), 0.6)))

    def _babble(self, row: "_Row", begin: float, end: float) -> None:
        """Six to twelve voices over one another, all about as loud. The words are in no target."""
        rng = self._random
        said = list(row.said)
        level = rng.uniform(-12, 0)
        for _ in range(rng.randint(6, 12)):
            now, gain = begin + rng.uniform(0.0, 1.0), 10 ** ((level + rng.uniform(-4, 0)) / 20)
            while now < end - 0.5:
                kind = self._kind()
                clip = rng.choice(self._bank.groups[kind][self._voice(kind)])
                now = self._phrase(row, now, clip, rng.uniform(0.85, 1.18), gain, end) + rng.uniform(0.0, 0.4)
        row.said = said

    def _kind(self) -> str:
        rng = self._random
        other = "fr" if rng.random() < self._mix.french / (1 - self._mix.digits) else "en"
        kind = "digit" if rng.random() < self._mix.digits else other
        return kind if self._bank.voices[kind] else next(other for other, voices in self._bank.voices.items() if voices)

    def _voice(self, kind: str) -> str:
        rng, synthetic = self._random, self._synthetic[kind]
        if kind == "digit" and self._human and (rng.random() < self._mix.human or not synthetic):
            return rng.choice(self._human)
        if not self._mix.engines:
            return rng.choice(synthetic)
        engines = self._by_engine[kind]
        (engine,) = rng.choices(list(engines), [ENGINES.get(name, 1.0) for name in engines])
        return rng.choice(engines[engine])

    def _digits(self, row: "_Row", now: float, voice: str, speed: float, gain: float) -> float:
        rng = self._random
        spread = rng.choice((0.12, 0.35, 0.9))
        for _ in range(rng.choice((1, 1, 2, 3, 4, 5, 6, 8, 10))):
            clip = rng.choice(self._bank.groups["digit"][voice])
            own = speed * rng.uniform(0.95, 1.05)
            now = self._phrase(row, now, clip, own, gain * rng.uniform(0.7, 1.0))
            now += rng.uniform(0.0, spread)
        return now

    def _phrase(self, row: "_Row", now: float, clip: int, speed: float, gain: float, until: float | None = None) -> float:
        """Put one clip at `now`, trimmed to its words; returns where it ends.

        A clip that does not fit ends the row, or what ends at `until`.
        """
        limit = row.seconds if until is None else until
        rng, words, length = self._random, self._bank.words[clip], float(self._bank.lengths[clip])
        begin = max(0.0, words[0].start - rng.uniform(0.01, 0.08))
        end = min(length, words[-1].end + rng.uniform(0.02, 0.12))
        cut = rng.randrange(1, len(words)) if len(words) > 1 and rng.random() < self._mix.split else 0
        parts = [(begin, words[cut].start, words[:cut]), (words[cut].start, end, words[cut:])] if cut else [(begin, end, words)]
        for i, (a, b, inside) in enumerate(parts):
            if i:
                now += self._pause_inside()
            if now + (b - a) / speed > limit:
                return limit
            row.pieces.append(Piece(row.number, clip, a, b - a, now, speed, gain))
            row.said += [(w.text, now + (w.start - a) / speed, now + (w.end - a) / speed) for w in inside]
            now += (b - a) / speed
        return now

    def _spoken(self, words: list[tuple[str, float, float]], frames: int) -> NDArray[np.int64]:
        row = np.zeros(frames, np.int64)
        for text, start, end in words:
            row[round(start * FRAME_RATE) : max(round(start * FRAME_RATE) + 1, round(end * FRAME_RATE))] = self._classes[text]
        return row


def word_classes(pieces_of: dict[str, list[int]]) -> int:
    """Of the word at a frame: one for each word, and none."""
    return len(pieces_of) + 1


def targets(
    words: Sequence[tuple[str, float, float]], frames: int, pieces_of: dict[str, list[int]], delay: int
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Tokens (T,) and pauses (T, heads) of a row.

    A boundary token stands where a word begins and where it ends, `delay` later (contract section 5.6); the word's pieces right
    before its end, so that they are chosen when all of it was heard. A pause holds at a position when nobody speaks from the
    moment that the position tells of until the head's horizon.
    """
    tokens = np.full(frames, PAD, np.int64)
    free = delay - 1
    for text, start, end in words:
        pieces = pieces_of[text]
        first = max(round(start * FRAME_RATE) + delay - 1, free)
        last = max(round(end * FRAME_RATE) + delay - 1, first + 1 + len(pieces))
        if last >= frames:
            if first < frames:
                tokens[first] = BOUNDARY
            break
        tokens[first] = tokens[last] = BOUNDARY
        tokens[last - len(pieces) : last] = pieces
        free = last
    spans: list[list[float]] = []
    for _, start, end in words:
        if spans and start - spans[-1][1] < _BRIDGED:
            spans[-1][1] = end
        else:
            spans.append([start, end])
    times = (np.arange(frames) + 1 - delay) / FRAME_RATE
    pauses = np.ones((frames, len(HORIZONS)), np.bool_)
    for start, end in spans:
        for i, horizon in enumerate(HORIZONS):
            pauses[(times < end) & (times + horizon > start), i] = False
    return tokens, pauses


# ---- sound -----------------------------------------------------------------------------------------------------------------


def render(plan: Plan, bank: Bank, rows: int, frames: int, generator: torch.Generator, *, change: bool = True) -> Tensor:
    """float32 (B, T * 1920) on the bank's device. change: room, bandwidth, noise and level; without it the clips alone."""
    device = bank.sound.device
    sound = torch.zeros(rows * frames * FRAME, device=device)
    pieces = sorted(plan.pieces, key=lambda piece: piece.length / piece.speed)
    for begin in range(0, len(pieces), 256):  # of like lengths, so that little is padded
        _place(pieces[begin : begin + 256], bank, sound, frames)
    sound = sound.view(rows, -1)
    return changed(sound, generator) if change else sound


def _place(pieces: Sequence[Piece], bank: Bank, sound: Tensor, frames: int) -> None:
    """Add the pieces to the rows, at their speeds, by linear interpolation."""
    device = bank.sound.device
    columns = np.array([(bank.starts[p.clip] + p.source * RATE, bank.starts[p.clip + 1] - 2, p.speed, p.gain) for p in pieces])
    start, last, speed, gain = torch.from_numpy(columns).to(device).T[:, :, None]
    lengths = torch.tensor([int(p.length / p.speed * RATE) for p in pieces], device=device)[:, None]
    target = torch.tensor([p.row * frames * FRAME + int(p.at * RATE) for p in pieces], device=device)[:, None]
    steps = torch.arange(int(lengths.max()), device=device)
    at = torch.minimum(start + steps * speed, last)
    below = at.floor()
    part = (at - below).float()
    index = below.long()
    values = torch.lerp(bank.sound[index].float(), bank.sound[index + 1].float(), part) * (gain / 32_768).float()
    edge = torch.minimum(steps, lengths - 1 - steps).clamp(0, 120).float() / 120  # 5 ms in and out
    sound.index_add_(
        0, (target + steps).clamp(max=len(sound) - 1).flatten(), torch.where(steps < lengths, values * edge, 0).flatten()
    )


def other_timbres(sound: Tensor, generator: torch.Generator) -> Tensor:
    """Every second row, by the order of a draw, with its formants moved by up to a sixth; pitch and times stay.

    The spectral envelope is the cepstrum's first 1.7 ms; it is stretched along the frequencies, and what lies on it is kept.
    """
    device, rows = sound.device, len(sound)
    some = torch.randperm(rows, generator=generator, device=device)[: rows // 2]
    if not len(some):
        return sound
    window = torch.hann_window(1_024, device=device)
    spectrum = torch.stft(sound[some], 1_024, 256, window=window, return_complex=True)  # (B, 513, T)
    cepstrum = torch.fft.irfft((spectrum.abs() + 1e-4).log(), dim=1)
    quefrency = torch.arange(1_024, device=device)
    lifter = torch.sigmoid((40 - torch.minimum(quefrency, 1_024 - quefrency)) / 3.0)[:, None]
    envelope = torch.fft.rfft(cepstrum * lifter, dim=1).real
    wider = torch.exp((torch.rand(len(some), 1, generator=generator, device=device) * 2 - 1) * 0.17)
    source = (torch.arange(513, device=device) / wider).clamp(max=511.0)
    below = source.long()[:, :, None].expand_as(envelope)
    part = (source - source.floor())[:, :, None]
    moved = torch.lerp(envelope.gather(1, below), envelope.gather(1, below + 1), part)
    spectrum = spectrum * torch.exp((moved - envelope).clamp(-4.0, 4.0))
    return sound.index_copy(0, some, torch.istft(spectrum, 1_024, 256, window=window, length=sound.shape[1]))


def changed(sound: Tensor, generator: torch.Generator) -> Tensor:
    """Timbre, room, microphone, bandwidth, other people, noise, level: each row its own."""
    sound = other_timbres(sound, generator)
    device, (rows, length) = sound.device, sound.shape

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(rows, *(shape or (1,)), generator=generator, device=device) * (high - low) + low

    def chance(share: float) -> Tensor:
        return (torch.rand(rows, 1, generator=generator, device=device) < share).float()

    def noise(*shape: int) -> Tensor:
        return torch.randn(rows, *shape, generator=generator, device=device)

    size = length + RATE
    spectrum = torch.fft.rfft(sound, size)
    hertz = torch.linspace(0, RATE / 2, spectrum.shape[1], device=device)
    # a room: noise that dies away, after the direct sound
    tail = torch.arange(RATE // 2, device=device) / RATE
    room = noise(len(tail)) * torch.exp(-6.9 * tail / uniform(0.1, 0.7)) * (tail > 0.002)
    room = room / room.square().sum(1, keepdim=True).sqrt() * 10 ** (uniform(-18, 0) / 20) * chance(0.45)
    room[:, 0] = 1.0
    # a microphone: ups and downs over the octaves; a third of the rows through a telephone's or another low-pass
    bands = F.interpolate(uniform(-7, 7, 1, 9), size=256, mode="linear", align_corners=True)[:, 0]
    place = (torch.log2(hertz.clamp(min=40) / 40) / torch.log2(torch.tensor(300.0)) * 255).long().clamp(0, 255)
    curve = 10 ** (bands[:, place] / 20)
    top = torch.where(chance(0.55) > 0, uniform(3_200, 4_000), uniform(5_000, 11_900))
    curve = curve * torch.sigmoid((top - hertz) / 60)
    low = uniform(20, 250) * chance(0.5)
    curve = curve * torch.sigmoid((hertz - low) / 20)
    heard = torch.fft.irfft(spectrum * torch.fft.rfft(room, size) * curve, size)[:, :length]
    heard = heard / heard.square().mean(1, keepdim=True).sqrt().clamp(min=1e-3) * 0.06
    # other people, far away: the other rows of this batch, some of them many at once
    others = sum(heard.roll((i, 7_919 * i), (0, 1)) for i in (1, 2, 3, 5, 7)) / 5**0.5
    heard = heard + others * 10 ** (uniform(-32, -12) / 20) * chance(0.25)
    silent = (sound.abs().amax(1, keepdim=True) == 0).float()
    heard = heard + silent * (others * chance(0.4) + music(rows, length, generator, device) * chance(0.4)) * uniform(0.2, 1.0)
    heard = heard + music(rows, length, generator, device) * 10 ** (uniform(-30, -10) / 20) * chance(0.08)
    # noise of any colour, from almost none to 5 dB under the speech
    colour = (hertz.clamp(min=50) / 1_000) ** uniform(-1.2, 0.3)
    hiss = torch.fft.irfft(torch.fft.rfft(noise(length), size) * colour * curve ** chance(0.5), size)[:, :length]
    hiss = hiss / hiss.square().mean(1, keepdim=True).sqrt()
    db = torch.where(chance(0.35) > 0, uniform(-25, -5), uniform(-70, -25))
    heard = heard + 0.06 * hiss * 10 ** (db / 20)
    return (heard * 10 ** (uniform(-20, 8) / 20)).clamp(-1, 1)


def music(rows: int, length: int, generator: torch.Generator, device: torch.device) -> Tensor:
    """Chords of a few partials that change every half second or so: (B, S), about as loud as speech."""
    notes = 24
    times = torch.arange(length, device=device) / RATE
    pitch = 110 * 2 ** (torch.randint(0, 36, (rows, 3, notes), generator=generator, device=device) / 12)
    each = -(-length // notes)
    hertz = pitch.repeat_interleave(each, 2)[:, :, :length]
    phase = torch.cumsum(hertz / RATE, 2) % 1.0
    decay = torch.exp(-3 * ((times * RATE) % each) / RATE)
    wave = sum((6.2832 * k * phase).sin() / k for k in (1, 2, 3)).sum(1) * decay  # type: ignore[union-attr]
    return 0.03 * wave
