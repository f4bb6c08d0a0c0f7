"""One stream of audio to words with times, by a recogniser of whole utterances.

What comes out depends on the audio alone, never on how it was cut into pieces or on how busy the machine is: audio is taken
in blocks of one size, every decision falls at a sample of the stream's own clock, and hypotheses are always made where they
are due. A word that was sent is settled: later hypotheses continue it, so they cannot contradict what has been sent.
"""

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from moshi_stt.audio.resample import StreamingResampler
from moshi_stt.constants import FRAME_SAMPLES, SAMPLE_RATE
from moshi_stt.constants import FRAME_SECONDS as STEP_SECONDS
from moshi_stt.engine.engine import NO_EXTRAS, StreamOptions
from moshi_stt.engine.evidence import Evidence, EvidenceSettings, Plausibility
from moshi_stt.engine.language import LanguageSettings, LanguageWatch, foreign_message
from moshi_stt.engine.pauses import PauseMeter, PauseSettings
from moshi_stt.engine.recogniser import RECOGNISER_RATE, VAD_FRAME, Memory, Recogniser, Spoken
from moshi_stt.engine.settling import LoopSettings, Standing, bare, chance, follow, loop_start, said_again
from moshi_stt.events import AnyEvent, EndWord, Interim, Pause, Step, Warning, Word  # noqa: A004 - the event

BLOCK_SAMPLES = 768
"""Samples at 24 kHz that are resampled at once: one detector frame."""

FRAME_SECONDS = VAD_FRAME / RECOGNISER_RATE
SHORTEST_WORD_SECONDS = 0.03
"""Three frames of alignment: no word is shorter."""

FORESEEN_SECONDS = 0.5
"""A shorter word so near the end of the audio was foreseen; one that is followed by more speech was slurred."""

QUIETEST_FRAMES = 3
"""A long segment is cut in the middle of the quietest stretch of so many frames."""

KEPT_TEXTS = 24
"""Words sent last that are looked through for a loop."""


@dataclass(frozen=True)
class SegmentSettings:
    """Where speech is cut and when hypotheses are made. Times in seconds; docs/internals/embedded.md has the measurements."""

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
    hypothesis_frames: int = 16
    """From one hypothesis to the next while somebody speaks, in frames of the detector."""
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
    settled_chance: float = 0.93
    """A word with this chance to stay is sent;"""
    followers: int = 4
    """one that so many words follow, far from the audio's end where most changes are, with"""
    followed_chance: float = 0.8
    """this chance;"""
    most_followers: int = 6
    """and one that so many follow in any case. A second hypothesis in one pause settles everything."""
    stray_frames: int = 12
    """Frames of speech that must not go without a word: the segment then begins again after the last one."""
    lowest_logprob: float = -1.0
    """A hypothesis whose tokens have a mean log-probability below this is noise, not speech."""
    spare_logprob: float = -0.8
    """Added to the sum, so that one doubtful word is not dropped for itself."""
    loops: LoopSettings = field(default_factory=LoopSettings)
    pauses: PauseSettings = field(default_factory=PauseSettings)
    evidence: EvidenceSettings = field(default_factory=EvidenceSettings)
    language: LanguageSettings = field(default_factory=LanguageSettings)


@dataclass
class _Segment:
    """The stretch of speech being recognised. Positions are samples at 16 kHz since the epoch's start."""

    start: int
    next_hypothesis: int
    last_speech: int
    voiced: list[bool] = field(default_factory=list)
    """For each frame that was heard since `start`, whether it was speech."""
    voiced_frames: int = 0
    silent_frames: int = 0
    evidence: Evidence = field(default_factory=Evidence)
    memory: Memory | None = None
    """The recogniser's, of the audio from `start` on."""
    committed: list[Spoken] = field(default_factory=list)
    """Words sent."""
    partial: list[Standing] = field(default_factory=list)
    """Words of the latest hypothesis that are not sent."""
    anchor: tuple[str, int] | None = None
    """The last word sent and where it starts: the next alignment begins with it."""
    asked_in_pause: bool = False
    """Whether the latest hypothesis was made in the pause that still lasts."""
    quiet: bool = False
    """Whether nothing was said since the latest hypothesis, so that another would say the same."""
    announced: bool = False
    """Whether it is speech beyond doubt."""

    @property
    def guess(self) -> list[Spoken]:
        return [standing.word for standing in self.partial]

    def voiced_since(self, position: int) -> int:
        """Frames of speech after a position."""
        return sum(self.voiced[max(0, position - self.start) // VAD_FRAME :])


class Segmenter:
    """Words of one stream. `feed` and `flush` are generators: each `next` makes at most one hypothesis."""

    def __init__(
        self,
        recogniser: Recogniser,
        settings: SegmentSettings | None = None,
        options: StreamOptions = NO_EXTRAS,
        waiting: Callable[[], int] = lambda: 0,
    ) -> None:
        """waiting: how many samples of the stream wait, for `Step.buffered_pcm`."""
        self.settings = settings or SegmentSettings()
        self.recogniser = recogniser
        self.options = options
        self._waiting = waiting
        self.hypotheses = 0
        """Recogniser calls since the start."""
        seconds = self.settings.longest_seconds + self.settings.lead_seconds + 1.0
        self._audio = np.empty(int(seconds * RECOGNISER_RATE), np.float32)
        self._meter = PauseMeter(self.settings.pauses)
        self.language = LanguageWatch(self.settings.language)
        self.reset()

    def reset(self) -> None:
        """Fresh state, clock at 0."""
        self._received = 0  # samples at 24 kHz since the stream's start
        self._last_stop = 0.0
        self._steps = 0
        self._interim = ""
        self._meter.reset()
        self._plausibility = Plausibility(self.settings.evidence)
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
        """Take audio, float32 (S,) at 24 kHz, to its end; yield the events of each hypothesis, and what else came."""
        joined = np.concatenate([self._block, pcm]) if len(self._block) else pcm
        whole = len(joined) - len(joined) % BLOCK_SAMPLES
        self._block = joined[whole:].copy()
        steps: list[AnyEvent] = []
        for start in range(0, whole, BLOCK_SAMPLES):
            self._received += BLOCK_SAMPLES
            self._append(self._resampler.feed(_clean(joined[start : start + BLOCK_SAMPLES])))
            for events in self._take_frames():
                yield steps + events
                steps = []
            steps += self._step()
        if steps:
            yield steps

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
        if steps := self._step():
            yield steps
        self._begin_epoch()

    def _step(self) -> list[AnyEvent]:
        """A `Step` for each 80 ms of the stream that is complete."""
        complete = self._received // FRAME_SAMPLES
        first, self._steps = self._steps, complete
        return [Step(index, self._meter.scores, self._waiting()) for index in range(first, complete)]

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
            self._meter.hear(probability)
            if self._segment is None and probability >= self.settings.speech_from:
                start = max(self._earliest_start, self._framed - VAD_FRAME - self._lead, 0)
                self._segment = _Segment(start, self._framed + self._between_hypotheses, self._framed)
                self._segment.voiced = [False] * ((self._framed - VAD_FRAME - start) // VAD_FRAME)
            if self._segment is not None:
                yield from self._follow(self._segment, probability)
            if self.options.turns and (events := self._heard_pauses(probability)):
                yield events

    def _heard_pauses(self, probability: float) -> list[AnyEvent]:
        """The `Pause` events up to the frame just taken, whose speech probability this is."""
        segment, heard = self._segment, self._seconds(self._framed)
        if segment is not None and segment.announced and probability >= self.settings.speech_until:
            self._last_voice = heard
        if segment is None or segment.quiet:
            self._settled_to = max(self._settled_to, heard)
        else:
            self._settled_to = max(self._settled_to, min(self._last_stop, heard))
        events: list[AnyEvent] = []
        limit = min(heard, self._received / SAMPLE_RATE) + 1e-9
        while (time := (self._pauses + 1) * STEP_SECONDS) <= limit:
            self._pauses += 1
            silence = math.inf if self._last_voice is None else max(0.0, time - self._last_voice)
            events.append(Pause(round(time, 3), min(self._settled_to, time), silence))
        return events

    def _follow(self, segment: _Segment, probability: float) -> Iterator[list[AnyEvent]]:
        """Count the frame to the segment, and make the hypothesis that is due after it."""
        settings = self.settings
        now = self._framed
        voiced = probability >= settings.speech_until
        segment.voiced.append(voiced)
        segment.evidence.hear(probability)
        self.language.hear(probability)
        if voiced:
            segment.voiced_frames += 1
            segment.silent_frames = 0
            segment.last_speech = now
            segment.quiet = segment.asked_in_pause = False
            segment.next_hypothesis = min(segment.next_hypothesis, now + self._between_hypotheses)
        else:
            segment.silent_frames += 1
        if segment.evidence.best >= settings.evidence.phantom:
            self._announce(segment)
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
        elif (pause or now >= segment.next_hypothesis) and self._enough(segment):
            yield self._hypothesise(segment, pause=segment.silent_frames >= pause_frames)

    def _enough(self, segment: _Segment) -> bool:
        """Whether what has been heard of the segment may be speech."""
        heard = segment.evidence.best >= self.settings.evidence.heard
        return heard and segment.voiced_frames >= self.settings.fewest_frames

    def _announce(self, segment: _Segment) -> None:
        """The segment is speech beyond doubt: pauses are counted from here on."""
        segment.announced = True
        self._meter.start()

    @property
    def _between_hypotheses(self) -> int:
        return self.settings.hypothesis_frames * VAD_FRAME

    # ---- hypotheses --------------------------------------------------------------------------------------------------

    def _recognise(self, segment: _Segment, stop: int) -> list[Spoken] | None:
        """The words after those sent, up to `stop`; None where the recogniser lost its way."""
        self.hypotheses += 1
        sent_seconds = (self._position(self._last_stop) - segment.start) / RECOGNISER_RATE if segment.committed else 0.0
        samples = self._between(segment.start, stop)
        if segment.memory is None:
            segment.memory = self.recogniser.memory()
        words, whole = self.recogniser.recognise(samples, segment.committed, segment.guess, sent_seconds, segment.memory)
        before = [word.text for word in segment.committed[-KEPT_TEXTS:]]
        loop = loop_start([bare(text) for text in [*before, *(word.text for word in words)]], self.settings.loops)
        if loop is not None:
            words = words[: max(0, loop - len(before))]
        if not (words if loop is not None else whole):
            return None
        words = words[: self._said_once(segment, [bare(text) for text in before], [bare(word.text) for word in words])]
        if not segment.evidence.supports([*segment.committed, *words], self.settings.evidence):
            return []
        tokens = sum(len(word.tokens) for word in words)
        likely = sum(word.logprob for word in words) >= self.settings.lowest_logprob * tokens + self.settings.spare_logprob
        return words if likely else []

    def _said_once(self, segment: _Segment, before: Sequence[str], texts: Sequence[str]) -> int:
        """How many of the words may have been said: less what repeats the phrase before it, where nobody speaks so fast."""
        loops = self.settings.loops
        if len(texts) <= loops.fastest * FRAME_SECONDS * segment.voiced_since(self._position(self._last_stop)):
            return len(texts)
        return said_again([*before, *texts], len(before), loops) - len(before)

    def _recognise_to_pause(self, segment: _Segment, stop: int) -> list[Spoken] | None:
        """`_recognise` up to where speech has stopped, so that no word may be missing.

        After what it took for the end of a sentence the model may hear nothing more. If there was more speech, the segment
        begins again after what was sent, and is recognised once more.
        """
        words = self._recognise(segment, stop)
        sent_stop = self._position(self._last_stop)
        if not words and segment.committed and segment.voiced_since(sent_stop) >= self.settings.stray_frames:
            frames = (sent_stop - segment.start) // VAD_FRAME
            segment.start += frames * VAD_FRAME
            del segment.voiced[:frames]
            partial = segment.partial
            segment.committed, segment.partial, segment.anchor, segment.memory = [], [], None, None
            words = self._recognise(segment, stop)
            if words is None:
                segment.partial = partial
        return words

    def _hypothesise(self, segment: _Segment, *, pause: bool) -> list[AnyEvent]:
        """Recognise what there is of the segment and send the words that are settled."""
        now = self._framed
        words = (self._recognise_to_pause if pause else self._recognise)(segment, now)
        events: list[AnyEvent] = []
        if words is not None:
            segment.partial = follow(segment.partial, words, now)
            settled = len(words) if segment.asked_in_pause else self._settled(segment.partial, now, pause=pause)
            before = len(segment.committed)
            events = self._send(segment, words, settled, now, heard_whole=False)
            del segment.partial[: len(segment.committed) - before]
            segment.quiet = pause and not segment.partial
        segment.next_hypothesis = now + self._between_hypotheses
        if pause:  # a third would say the same as the second: what is left then waits for more speech, or for the end
            again = int(self.settings.pause_again_seconds * RECOGNISER_RATE)
            segment.next_hypothesis = sys.maxsize if segment.asked_in_pause else now + again
        segment.asked_in_pause = pause
        return events + self._show(segment.guess)

    def _settled(self, partial: Sequence[Standing], now: int, *, pause: bool) -> int:
        """How many words may be sent. The last may be half of one, but in a pause."""
        settings = self.settings
        last = len(partial) if pause else len(partial) - 1
        for index in range(last):
            followers = len(partial) - index - 1
            if followers >= settings.most_followers:
                continue
            wanted = settings.followed_chance if followers >= settings.followers else settings.settled_chance
            if chance(partial, index, now, pause=pause) < wanted:
                return index
        return max(last, 0)

    def _finish(self, stop: int) -> list[AnyEvent]:
        """End the segment at `stop`, where nobody speaks or nothing more comes: send the rest."""
        segment = self._segment
        assert segment is not None
        self._segment = None
        self._earliest_start = max(segment.last_speech, stop - self._lead)
        events = [] if segment.quiet or not self._enough(segment) else self._send_rest(segment, stop)
        return events + self._show([]) + self._check_language()

    def _send_rest(self, segment: _Segment, stop: int) -> list[AnyEvent]:
        words = segment.guess if segment.asked_in_pause else self._recognise_to_pause(segment, stop)
        if words is None:
            words = segment.guess
        return self._send(segment, words, len(words), stop)

    def _cut(self) -> list[AnyEvent]:
        """End a segment that grew too long at its quietest late place after what has been sent; the rest begins the next."""
        segment = self._segment
        assert segment is not None
        now = self._framed
        floor = max(segment.start, now - int(self.settings.cut_seconds * RECOGNISER_RATE), self._position(self._last_stop))
        stop = self._quietest(floor, now)
        events = self._send_rest(segment, stop)
        rest = _Segment(stop, now + self._between_hypotheses, segment.last_speech)
        rest.voiced = segment.voiced[(stop - segment.start) // VAD_FRAME :]
        rest.voiced_frames, rest.silent_frames = sum(rest.voiced), segment.silent_frames
        rest.evidence, rest.announced = segment.evidence, segment.announced
        self._segment, self._earliest_start = rest, stop
        return events + self._check_language()

    def _check_language(self) -> list[AnyEvent]:
        """A warning, once, when clear speech of the segments up to this one makes no sense to the recogniser."""
        if not self.language.end_segment() or not self.options.warnings:
            return []
        message = foreign_message(self.recogniser.languages)
        return [Warning("language", f"{message[:1].upper()}{message[1:]}")]

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

    def _send(
        self, segment: _Segment, words: Sequence[Spoken], count: int, stop: int, *, heard_whole: bool = True
    ) -> list[AnyEvent]:
        """Events of the first `count` of the words that follow what was sent, heard up to `stop`.

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
        for index, (word, span) in enumerate(zip(words[:count], spans, strict=False)):
            spelled = any(letter.isalnum() for letter in word.text)
            start = max(round(offset + span.start, 3), self._last_stop)
            stop_time = max(round(offset + span.stop, 3), start)
            foreseen = stop_time - start < SHORTEST_WORD_SECONDS and self._seconds(stop) - stop_time < FORESEEN_SECONDS
            if spelled and not heard_whole and foreseen:
                break
            segment.committed.append(word)
            if not spelled:
                continue
            judgement = self._plausibility.judge(words[index:], start, stop_time)
            self.language.understand(judgement.confidence, stop_time - start)
            self._last_stop = stop_time
            segment.anchor = (word.text, min(max(self._position(start), segment.start), stop))
            if judgement.left_out:
                continue
            self._announce(segment)
            confidence = round(judgement.confidence, 3) if self.options.confidence else None
            events.append(Word(word.text, start, confidence))
            events.append(EndWord(stop_time))
        return events

    def _show(self, words: Sequence[Spoken]) -> list[AnyEvent]:
        """The words that may still change, if they did since they were shown last."""
        text = " ".join(word.text for word in words)
        if not self.options.interim or text == self._interim:
            return []
        self._interim = text
        return [Interim(text, self._last_stop)]

    def _seconds(self, position: int) -> float:
        """The stream's time of a position of this epoch."""
        return self._epoch_start / SAMPLE_RATE + position / RECOGNISER_RATE

    def _position(self, seconds: float) -> int:
        return round((seconds - self._epoch_start / SAMPLE_RATE) * RECOGNISER_RATE)


def _clean(pcm: NDArray[np.float32]) -> NDArray[np.float32]:
    """Samples in [-1, 1]; what is no number counts as silence."""
    return np.clip(np.nan_to_num(pcm, nan=0.0, posinf=0.0, neginf=0.0), -1.0, 1.0)
