"""One stream of audio to words with times, by a recogniser of whole utterances. Knows no threads, no sockets and no model.

What comes out depends on the audio alone, never on how it was cut into pieces or on how busy the machine is: audio is taken
in blocks of one size, every decision falls at a sample of the stream's own clock, and hypotheses are always made where they
are due. A word that was said is settled: later hypotheses continue it, so they cannot contradict what has been sent.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from moshi_stt.audio.resample import StreamingResampler
from moshi_stt.constants import FRAME_SECONDS as PAUSE_SECONDS
from moshi_stt.constants import SAMPLE_RATE
from moshi_stt.engine.engine import NO_EXTRAS, StreamOptions
from moshi_stt.engine.recogniser import RECOGNISER_RATE, VAD_FRAME, Recogniser, Spoken
from moshi_stt.events import AnyEvent, EndWord, Pause, Word

BLOCK_SAMPLES = 768
"""Samples at 24 kHz that are resampled at once: one detector frame."""

FRAME_SECONDS = VAD_FRAME / RECOGNISER_RATE
SHORTEST_WORD_SECONDS = 0.03
"""Three frames of alignment: no word is shorter."""

QUIETEST_FRAMES = 3
"""A long segment is cut in the middle of the quietest stretch of so many frames."""


@dataclass(frozen=True)
class SegmentSettings:
    """Where speech is cut and when hypotheses are made. Times in seconds; docs/embedded.md has the measurements behind them."""

    while_speaking: bool = True
    """Whether hypotheses are made while somebody speaks. For files nobody waits: one is made where speech ends."""
    speech_from: float = 0.5
    """A frame of this probability or more starts speech."""
    speech_until: float = 0.35
    """Below this a frame within speech counts as silence."""
    lead_seconds: float = 0.4
    """Audio taken before the first frame of speech."""
    fewest_frames: int = 3
    """Frames of speech that a segment must have to be recognised at all."""
    hypothesis_seconds: float = 0.32
    """From one hypothesis to the next while somebody speaks."""
    hypothesis_growth: float = 0.03
    """What each second of the segment adds to that: long segments cost more."""
    pause_seconds: float = 0.25
    """After so much silence the last word is over: a hypothesis is made at once,"""
    pause_again_seconds: float = 0.16
    """and another so much later if that did not settle every word."""
    end_seconds: float = 1.2
    """After so much silence the segment is over."""
    long_seconds: float = 8.0
    """From this length on the first pause ends the segment."""
    longest_seconds: float = 15.0
    """Speech without a pause is cut here, at the quietest place of the last `cut_seconds`."""
    cut_seconds: float = 4.0
    sure_logprob: float = -0.3
    """A word of this log-probability or more is settled when a second hypothesis agrees on it; one below, when either"""
    agreements: int = 4
    """so many hypotheses in a row agree on it, or"""
    followers: int = 8
    """a second agrees and so many words follow it: it is far from the audio's end, where most changes are."""
    pause_agreements: int = 2
    """In a pause, when so many agree, sure or not; a second hypothesis in one pause settles everything."""
    most_followers: int = 10
    """With so many words behind it a word is settled, whatever was thought before."""
    stray_frames: int = 12
    """Frames of speech that must not go without a word: the segment then begins anew behind the last one."""
    lowest_logprob: float = -1.0
    """A hypothesis whose tokens have a mean log-probability below this is noise, not speech."""
    spare_logprob: float = -0.8
    """Added to the sum, so that one doubtful word is not dropped for itself."""


@dataclass
class _Segment:
    """The stretch of speech being recognised. Positions are samples at 16 kHz since the epoch's start."""

    start: int
    next_hypothesis: int
    last_speech: int
    voiced: list[bool] = field(default_factory=list)
    """For each frame that was heard since `start`, whether it was speech."""
    silent_frames: int = 0
    said: list[Spoken] = field(default_factory=list)
    """Words sent."""
    guess: list[Spoken] = field(default_factory=list)
    """Words of the latest hypothesis that are not sent."""
    agreements: list[int] = field(default_factory=list)
    """How many hypotheses in a row agree on each word of the guess."""
    anchor: tuple[str, int] | None = None
    """The last word sent and where it starts: the next alignment begins with it."""
    asked_in_pause: bool = False
    """Whether the latest hypothesis was made in the pause that still lasts."""
    quiet: bool = False
    """Whether nothing was said since the latest hypothesis, so that another would say the same."""

    def voiced_since(self, position: int) -> int:
        """Frames of speech behind a position."""
        return sum(self.voiced[max(0, position - self.start) // VAD_FRAME :])


class Segmenter:
    """Words of one stream. `feed` and `flush` are generators: each `next` makes at most one hypothesis."""

    def __init__(
        self, recogniser: Recogniser, settings: SegmentSettings | None = None, options: StreamOptions = NO_EXTRAS
    ) -> None:
        self.settings = settings or SegmentSettings()
        self.recogniser = recogniser
        self.options = options
        self.hypotheses = 0
        """Recogniser calls since the start."""
        seconds = self.settings.longest_seconds + self.settings.lead_seconds + 1.0
        self._audio = np.empty(int(seconds * RECOGNISER_RATE), np.float32)
        self.reset()

    def reset(self) -> None:
        """Fresh state, clock at 0."""
        self._received = 0  # samples at 24 kHz since the stream's start
        self._last_stop = 0.0
        self._last_voice: float | None = None
        """Seconds of the stream at which speech was last heard."""
        self._pauses = 0
        """`Pause` events made: one for each 80 ms."""
        self._settled_to = 0.0
        self._begin_epoch()

    def _begin_epoch(self) -> None:
        """Everything fresh but the clock: after the start and after a flush."""
        self._epoch_start = self._received
        self._block = np.zeros(0, np.float32)
        self._resampler = StreamingResampler(SAMPLE_RATE, RECOGNISER_RATE)
        self._audio_start = 0
        self._audio_stop = 0
        self._framed = 0
        self._vad = self.recogniser.vad_start()
        self._segment: _Segment | None = None
        self._earliest_start = 0

    # ---- in ----------------------------------------------------------------------------------------------------------

    def feed(self, pcm: NDArray[np.float32]) -> Iterator[list[AnyEvent]]:
        """Take audio, float32 (S,) at 24 kHz, to its end; yield the events of each hypothesis."""
        joined = np.concatenate([self._block, pcm]) if len(self._block) else pcm
        whole = len(joined) - len(joined) % BLOCK_SAMPLES
        self._block = joined[whole:].copy()
        for start in range(0, whole, BLOCK_SAMPLES):
            self._received += BLOCK_SAMPLES
            self._append(self._resampler.feed(_clean(joined[start : start + BLOCK_SAMPLES])))
            yield from self._take_frames()

    def flush(self) -> Iterator[list[AnyEvent]]:
        """End the segment here, whatever was being said; yield its words. The stream may go on, its clock running on."""
        self._received += len(self._block)
        self._append(self._resampler.feed(_clean(self._block)))
        self._append(self._resampler.finish())
        missing = -(self._audio_stop - self._framed) % VAD_FRAME
        self._append(np.zeros(missing, np.float32))
        yield from self._take_frames()
        if self._segment is not None:
            yield self._finish(self._framed - missing)
        self._begin_epoch()

    def _append(self, samples: NDArray[np.float32]) -> None:
        kept = self._audio_stop - self._audio_start
        if kept + len(samples) > len(self._audio):
            keep_from = self._segment.start if self._segment else max(self._earliest_start, self._framed - self._lead)
            drop = keep_from - self._audio_start
            kept -= drop
            self._audio[:kept] = self._audio[drop : drop + kept]
            self._audio_start = keep_from
        self._audio[kept : kept + len(samples)] = samples
        self._audio_stop += len(samples)

    def _between(self, start: int, stop: int) -> NDArray[np.float32]:
        return self._audio[start - self._audio_start : stop - self._audio_start]

    @property
    def _lead(self) -> int:
        return int(self.settings.lead_seconds * RECOGNISER_RATE)

    # ---- one frame ---------------------------------------------------------------------------------------------------

    def _take_frames(self) -> Iterator[list[AnyEvent]]:
        while self._audio_stop - self._framed >= VAD_FRAME:
            frame = self._between(self._framed, self._framed + VAD_FRAME)
            probability, self._vad = self.recogniser.speech_probability(frame, self._vad)
            self._framed += VAD_FRAME
            if self._segment is None and probability >= self.settings.speech_from:
                start = max(self._earliest_start, self._framed - VAD_FRAME - self._lead, 0)
                self._segment = _Segment(start, self._after(start, self._framed), self._framed)
                self._segment.voiced = [False] * ((self._framed - VAD_FRAME - start) // VAD_FRAME)
            if self._segment is not None:
                yield from self._follow(self._segment, probability)
            if self.options.turns and (events := self._heard_pauses(probability)):
                yield events

    def _heard_pauses(self, probability: float) -> list[AnyEvent]:
        """The `Pause` events up to the frame just taken, whose speech probability this is."""
        segment, heard = self._segment, self._seconds(self._framed)
        voice_from = self.settings.speech_until if segment is not None else self.settings.speech_from
        if probability >= voice_from:
            self._last_voice = heard
        if segment is None or segment.quiet:
            self._settled_to = max(self._settled_to, heard)
        else:
            self._settled_to = max(self._settled_to, min(self._last_stop, heard))
        events: list[AnyEvent] = []
        limit = min(heard, self._received / SAMPLE_RATE) + 1e-9
        while (time := (self._pauses + 1) * PAUSE_SECONDS) <= limit:
            self._pauses += 1
            silence = math.inf if self._last_voice is None else max(0.0, time - self._last_voice)
            events.append(Pause(round(time, 3), min(self._settled_to, time), silence))
        return events

    def _follow(self, segment: _Segment, probability: float) -> Iterator[list[AnyEvent]]:
        """Count the frame to the segment, and make the hypothesis that is due behind it."""
        settings = self.settings
        now = self._framed
        voiced = probability >= settings.speech_until
        segment.voiced.append(voiced)
        if voiced:
            segment.silent_frames = 0
            segment.last_speech = now
            segment.quiet = segment.asked_in_pause = False
        else:
            segment.silent_frames += 1
        seconds = (now - segment.start) / RECOGNISER_RATE
        pause_frames = round(settings.pause_seconds / FRAME_SECONDS)
        pause = segment.silent_frames == pause_frames
        over = segment.silent_frames >= round(settings.end_seconds / FRAME_SECONDS)
        if over or (pause and seconds >= settings.long_seconds):
            yield self._finish(now)
        elif seconds >= settings.longest_seconds:
            yield self._cut()
        elif not settings.while_speaking or segment.quiet:
            pass
        elif (pause or now >= segment.next_hypothesis) and sum(segment.voiced) >= settings.fewest_frames:
            yield self._hypothesise(segment, pause=segment.silent_frames >= round(settings.pause_seconds / FRAME_SECONDS))

    def _after(self, start: int, now: int) -> int:
        """When a segment that began at `start` is due for a hypothesis, the last one having been made at `now`."""
        seconds = self.settings.hypothesis_seconds + self.settings.hypothesis_growth * (now - start) / RECOGNISER_RATE
        return now + int(seconds * RECOGNISER_RATE)

    # ---- hypotheses --------------------------------------------------------------------------------------------------

    def _recognise(self, segment: _Segment, stop: int) -> list[Spoken] | None:
        """The words behind those said, up to `stop`; None where the recogniser lost its way."""
        self.hypotheses += 1
        said_seconds = (self._position(self._last_stop) - segment.start) / RECOGNISER_RATE if segment.said else 0.0
        samples = self._between(segment.start, stop)
        words, whole = self.recogniser.recognise(samples, segment.said, segment.guess, said_seconds)
        if not whole:
            return None
        tokens = sum(len(word.tokens) for word in words)
        likely = sum(word.logprob for word in words) >= self.settings.lowest_logprob * tokens + self.settings.spare_logprob
        return words if likely else []

    def _recognise_to_pause(self, segment: _Segment, stop: int) -> list[Spoken] | None:
        """`_recognise` up to where speech has stopped, so that no word may be missing.

        Behind what it took for the end of a sentence the model may hear nothing more. If there was more speech, the segment
        begins anew behind what was said, and is recognised once more.
        """
        words = self._recognise(segment, stop)
        said_stop = self._position(self._last_stop)
        if not words and segment.said and segment.voiced_since(said_stop) >= self.settings.stray_frames:
            frames = (said_stop - segment.start) // VAD_FRAME
            segment.start += frames * VAD_FRAME
            del segment.voiced[:frames]
            segment.said, segment.guess, segment.agreements, segment.anchor = [], [], [], None
            words = self._recognise(segment, stop)
        return words

    def _hypothesise(self, segment: _Segment, *, pause: bool) -> list[AnyEvent]:
        """Recognise what there is of the segment and say the words that are settled."""
        now = self._framed
        words = (self._recognise_to_pause if pause else self._recognise)(segment, now) or []
        agreed = _agreeing(segment.guess, words)
        agreements = [count + 1 for count in segment.agreements[:agreed]] + [1] * (len(words) - agreed)
        settled = len(words) if segment.asked_in_pause else self._settled(words, agreements, pause=pause)
        before = len(segment.said)
        events = self._say(segment, words, settled, now, heard_whole=False)
        settled = len(segment.said) - before
        segment.guess, segment.agreements = words[settled:], agreements[settled:]
        segment.asked_in_pause = pause
        segment.quiet = pause and not segment.guess
        if pause:
            segment.next_hypothesis = now + int(self.settings.pause_again_seconds * RECOGNISER_RATE)
        else:
            segment.next_hypothesis = self._after(segment.start, now)
        return events

    def _settled(self, words: Sequence[Spoken], agreements: Sequence[int], *, pause: bool) -> int:
        """How many words may be sent. The last may be half of one, but in a pause."""
        settings = self.settings
        last = len(words) if pause else len(words) - 1
        for index in range(last):
            count, followers = agreements[index], len(words) - index - 1
            sure = words[index].logprob >= settings.sure_logprob or followers >= settings.followers
            enough = settings.pause_agreements if pause else 2 if sure else settings.agreements
            if followers >= settings.most_followers:
                enough = 1
            if count < enough:
                return index
        return max(last, 0)

    def _finish(self, stop: int) -> list[AnyEvent]:
        """End the segment at `stop`, where nobody speaks or nothing more comes: say the rest."""
        segment = self._segment
        assert segment is not None
        self._segment = None
        self._earliest_start = max(segment.last_speech, stop - self._lead)
        if segment.quiet or sum(segment.voiced) < self.settings.fewest_frames:
            return []
        return self._say_rest(segment, stop)

    def _say_rest(self, segment: _Segment, stop: int) -> list[AnyEvent]:
        words = self._recognise_to_pause(segment, stop)
        if words is None:
            words = segment.guess
        return self._say(segment, words, len(words), stop)

    def _cut(self) -> list[AnyEvent]:
        """End a segment that grew too long at its quietest late place behind what has been said; the rest begins the next."""
        segment = self._segment
        assert segment is not None
        now = self._framed
        floor = max(segment.start, now - int(self.settings.cut_seconds * RECOGNISER_RATE), self._position(self._last_stop))
        stop = self._quietest(floor, now)
        events = self._say_rest(segment, stop)
        rest = _Segment(stop, self._after(stop, now), segment.last_speech)
        rest.voiced = segment.voiced[(stop - segment.start) // VAD_FRAME :]
        rest.silent_frames = segment.silent_frames
        self._segment, self._earliest_start = rest, stop
        return events

    def _quietest(self, start: int, stop: int) -> int:
        """Middle of the quietest QUIETEST_FRAMES frames between two positions; `stop` where there are not so many."""
        frames = (stop - start) // VAD_FRAME
        if frames < QUIETEST_FRAMES:
            return stop
        first = stop - frames * VAD_FRAME
        energy = np.square(self._between(first, stop), dtype=np.float64).reshape(frames, VAD_FRAME).sum(axis=1)
        smooth = np.convolve(energy, np.ones(QUIETEST_FRAMES), "valid")
        return first + int(smooth.argmin()) * VAD_FRAME + QUIETEST_FRAMES * VAD_FRAME // 2

    # ---- out ---------------------------------------------------------------------------------------------------------

    def _say(
        self, segment: _Segment, words: Sequence[Spoken], count: int, stop: int, *, heard_whole: bool = True
    ) -> list[AnyEvent]:
        """Events of the first `count` of the words that follow what was said, heard up to `stop`.

        heard_whole: False where more audio follows. A word for which alignment finds no sound is then foreseen by the model
        rather than heard: it, and what follows it, waits for its sound.
        """
        if count <= 0:
            return []
        anchor = segment.anchor
        begin = min(anchor[1], stop) if anchor else segment.start
        texts = [*([anchor[0]] if anchor else []), *(word.text for word in words)]
        anchors = len(texts) - len(words)
        spans = self.recogniser.align(self._between(begin, stop), texts, anchors + count)[anchors:]
        offset = self._seconds(begin)
        events: list[AnyEvent] = []
        for word, span in zip(words[:count], spans, strict=False):
            spelled = any(letter.isalnum() for letter in word.text)
            start = max(round(offset + span.start, 3), self._last_stop)
            stop_time = max(round(offset + span.stop, 3), start)
            if spelled and not heard_whole and stop_time - start < SHORTEST_WORD_SECONDS:
                break
            segment.said.append(word)
            if not spelled:
                continue
            self._last_stop = stop_time
            segment.anchor = (word.text, min(max(self._position(start), segment.start), stop))
            confidence = min(1.0, math.exp(word.logprob)) if self.options.confidence else None
            events += [Word(word.text, start, confidence), EndWord(self._last_stop)]
        return events

    def _seconds(self, position: int) -> float:
        """The stream's time of a position of this epoch."""
        return self._epoch_start / SAMPLE_RATE + position / RECOGNISER_RATE

    def _position(self, seconds: float) -> int:
        return round((seconds - self._epoch_start / SAMPLE_RATE) * RECOGNISER_RATE)


def _clean(pcm: NDArray[np.float32]) -> NDArray[np.float32]:
    """Samples in [-1, 1]; what is no number counts as silence."""
    return np.clip(np.nan_to_num(pcm, nan=0.0, posinf=0.0, neginf=0.0), -1.0, 1.0)


def _agreeing(earlier: Sequence[Spoken], later: Sequence[Spoken]) -> int:
    """How many words two hypotheses have in common at their start, case and punctuation aside."""
    count = 0
    for one, other in zip(earlier, later, strict=False):
        if _bare(one.text) != _bare(other.text):
            break
        count += 1
    return count


def _bare(text: str) -> str:
    return "".join(letter for letter in text.casefold() if letter.isalnum())
