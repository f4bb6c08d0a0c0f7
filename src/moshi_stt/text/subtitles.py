"""Timed words to text, word lists, JSON, SRT and WebVTT. Knows nothing of where the words come from.

A cue ends where a sentence ends, where the speaker pauses, or where it would get too long to be read: two lines of 42
characters, seven seconds. Times are seconds from the start of the audio.
"""

import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from moshi_stt.events import EndWord, Event, Word

LINE_CHARACTERS = 42
CUE_CHARACTERS = 2 * LINE_CHARACTERS
CUE_SECONDS = 7.0
PAUSE_SECONDS = 0.8
"""A silence so long ends a cue."""
PARAGRAPH_SECONDS = 2.0
"""A silence so long ends a line of plain text."""
SHORTEST_CUE_SECONDS = 1.0
"""A cue stays so long where the next one leaves room."""
SHORTEST_SENTENCE_CHARACTERS = 12
"""A shorter sentence shares its cue with the next one."""
UNKNOWN_WORD_SECONDS = 0.3
"""Length taken for a word whose end was never told."""

_SENTENCE_END = (".", "?", "!", "…", "。", "？", "！")
_CLAUSE_END = (",", ";", ":", "—", "–")
_CLOSING = "\"'”’»)]"


class TimedWord(NamedTuple):
    """A word, its start and end in seconds, and the natural-log probability of its tokens where the engine has one.

    channel: which channel of the recording it was said on, from 1, where they were kept apart.
    """

    text: str
    start: float
    end: float
    logprob: float | None = None
    channel: int | None = None


class Cue(NamedTuple):
    """Words that are shown together."""

    words: tuple[TimedWord, ...]
    start: float
    end: float

    @property
    def text(self) -> str:
        return join_words(self.words)

    @property
    def speaker(self) -> str:
        """Who says it, where the channels were kept apart; else empty."""
        return speaker_name(self.words[0].channel)


def pair_words(events: Iterable[Event]) -> list[TimedWord]:
    """Words with their ends, from a stream's events in order. Events of other kinds are passed over.

    A word without an `EndWord` ends where the next one begins, after 0.3 s at the latest.
    """
    words: list[TimedWord] = []
    ended = True
    for event in events:
        if isinstance(event, Word):
            if not ended:
                words[-1] = words[-1]._replace(end=max(words[-1].start, min(words[-1].end, event.start_time)))
            end = event.start_time + UNKNOWN_WORD_SECONDS
            words.append(TimedWord(event.text, event.start_time, end, _logprob(event.confidence)))
            ended = False
        elif isinstance(event, EndWord) and not ended:
            words[-1] = words[-1]._replace(end=max(words[-1].start, event.stop_time))
            ended = True
    return words


def _logprob(confidence: float | None) -> float | None:
    return None if confidence is None else math.log(max(confidence, sys.float_info.min))


def word_events(words: Iterable[TimedWord]) -> Iterator[Word | EndWord]:
    """Words as events: what `pair_words` takes apart."""
    for word in words:
        yield Word(word.text, word.start, None if word.logprob is None else math.exp(word.logprob))
        yield EndWord(word.end)


def speaker_name(channel: int | None) -> str:
    """How a channel is called in transcripts."""
    return "" if channel is None else f"Channel {channel}"


def join_words(words: Iterable[TimedWord]) -> str:
    """The words with single blanks between them."""
    return " ".join(text for word in words if (text := " ".join(word.text.split())))


# ---- cutting -------------------------------------------------------------------------------------------------------------


def cut_cues(words: Sequence[TimedWord]) -> list[Cue]:
    """Words in order of time to cues in order of time. None is empty, and those of one channel do not overlap."""
    channels = dict.fromkeys(word.channel for word in words)
    if len(channels) > 1:
        cues = [cue for channel in channels for cue in cut_cues([word for word in words if word.channel == channel])]
        return sorted(cues, key=lambda cue: cue.start)
    groups: list[list[TimedWord]] = []
    current: list[TimedWord] = []
    for word in words:
        if not word.text.split():
            continue
        if current and _ends_before(current, word):
            groups.append(current)
            current = []
        while current and _too_long([*current, word]):
            cut = _best_cut(current)
            groups.append(current[:cut])
            current = current[cut:]
        current.append(word)
    if current:
        groups.append(current)
    return _times_of(groups)


def _ends_before(current: Sequence[TimedWord], word: TimedWord) -> bool:
    last = current[-1]
    if word.start - last.end >= PAUSE_SECONDS:
        return True
    return _ends_with(last.text, _SENTENCE_END) and len(join_words(current)) >= SHORTEST_SENTENCE_CHARACTERS


def _too_long(words: Sequence[TimedWord]) -> bool:
    if words[-1].end - words[0].start > CUE_SECONDS:
        return True
    text = join_words(words)
    return len(text) > CUE_CHARACTERS or (len(words) > 1 and not _fits_two_lines(text))


def _fits_two_lines(text: str) -> bool:
    return len(text) <= LINE_CHARACTERS or max(map(len, _lines(text))) <= LINE_CHARACTERS


def _best_cut(words: Sequence[TimedWord]) -> int:
    """How many words of a full cue stay: behind a clause in its second half, else at its longest gap there, else all."""
    half = (len(words) + 1) // 2
    clauses = [index + 1 for index in range(half - 1, len(words)) if _ends_with(words[index].text, _CLAUSE_END + _SENTENCE_END)]
    if clauses:
        return clauses[-1]
    gaps = [(words[index].start - words[index - 1].end, index) for index in range(half, len(words))]
    longest, index = max(gaps, default=(0.0, len(words)))
    return index if longest >= PAUSE_SECONDS / 4 else len(words)


def _ends_with(text: str, marks: tuple[str, ...]) -> bool:
    return text.rstrip().rstrip(_CLOSING).endswith(marks)


def _times_of(groups: Sequence[Sequence[TimedWord]]) -> list[Cue]:
    cues = []
    earliest = 0.0
    for index, group in enumerate(groups):
        start = max(earliest, group[0].start)
        end = max(start + 0.001, *(word.end for word in group))
        next_start = groups[index + 1][0].start if index + 1 < len(groups) else float("inf")
        end = max(start + 0.001, min(max(end, start + SHORTEST_CUE_SECONDS), next_start))
        cues.append(Cue(tuple(group), start, end))
        earliest = end
    return cues


def _lines(text: str) -> list[str]:
    """One line, or two of about the same length."""
    if len(text) <= LINE_CHARACTERS:
        return [text]
    blanks = [index for index, character in enumerate(text) if character == " "]
    if not blanks:
        return [text]
    cut = min(blanks, key=lambda index: (abs(len(text) - 1 - 2 * index), index))
    return [text[:cut], text[cut + 1 :]]


# ---- formats -------------------------------------------------------------------------------------------------------------


def format_text(words: Sequence[TimedWord]) -> str:
    """Plain text; a pause of two seconds begins a new line, as does another channel, whose name stands before it."""
    spoken = words
    if words and words[0].channel is not None:
        spoken = [word for cue in cut_cues(words) for word in cue.words]
    lines: list[list[TimedWord]] = []
    for word in spoken:
        last = lines[-1][-1] if lines else None
        if last is None or word.start - last.end >= PARAGRAPH_SECONDS or word.channel != last.channel:
            lines.append([])
        lines[-1].append(word)
    return "".join(f"{_label(speaker_name(line[0].channel))}{join_words(line)}\n" for line in lines)


def _label(speaker: str) -> str:
    return f"{speaker}: " if speaker else ""


def format_words(words: Sequence[TimedWord]) -> str:
    """One word a line: start, end, text, and its channel where they were kept apart, with tabs between."""
    rows = ((word, "" if word.channel is None else f"\t{word.channel}") for word in words)
    return "".join(f"{word.start:.3f}\t{word.end:.3f}\t{' '.join(word.text.split())}{channel}\n" for word, channel in rows)


def format_srt(words: Sequence[TimedWord]) -> str:
    """SubRip."""
    return "\n".join(
        f"{number}\n{timestamp(cue.start, ',')} --> {timestamp(cue.end, ',')}\n{_label(cue.speaker)}{_srt_text(cue.text)}\n"
        for number, cue in enumerate(cut_cues(words), 1)
    )


def format_vtt(words: Sequence[TimedWord]) -> str:
    """WebVTT."""
    cues = (
        f"\n{timestamp(cue.start, '.')} --> {timestamp(cue.end, '.')}\n{_voice(cue.speaker)}{_vtt_text(cue.text)}\n"
        for cue in cut_cues(words)
    )
    return "WEBVTT\n" + "".join(cues)


def _voice(speaker: str) -> str:
    return f"<v {speaker}>" if speaker else ""


def format_json(words: Sequence[TimedWord], **more: object) -> str:
    """One object: what `more` says, the text, the words, the cues as segments. Times in seconds."""
    document = dict(more)
    cues = cut_cues(words)
    document["text"] = join_words(word for cue in cues for word in cue.words)
    document["words"] = [
        {"text": word.text, "start": round(word.start, 3), "end": round(word.end, 3)}
        | ({} if word.logprob is None else {"logprob": round(word.logprob, 4)})
        | _who(word.channel)
        for word in words
    ]
    document["segments"] = [
        {"start": round(cue.start, 3), "end": round(cue.end, 3), "text": cue.text} | _who(cue.words[0].channel) for cue in cues
    ]
    return json.dumps(document, ensure_ascii=False, indent=2) + "\n"


def _who(channel: int | None) -> dict[str, object]:
    return {} if channel is None else {"channel": channel, "speaker": speaker_name(channel)}


FORMATS: dict[str, Callable[[Sequence[TimedWord]], str]] = {
    "text": format_text,
    "json": format_json,
    "srt": format_srt,
    "vtt": format_vtt,
    "words": format_words,
}
SUFFIXES = {"text": ".txt", "json": ".json", "srt": ".srt", "vtt": ".vtt", "words": ".tsv"}


def timestamp(seconds: float, point: str) -> str:
    """`00:01:02,345` for 62.345 and point `,`. Negative times are 0."""
    milliseconds = max(0, round(seconds * 1000))
    minutes, milliseconds = divmod(milliseconds, 60_000)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:02}:{minutes:02}:{milliseconds // 1000:02}{point}{milliseconds % 1000:03}"


def _srt_text(text: str) -> str:
    return "\n".join(_lines(text.replace("-->", "->")))


def _vtt_text(text: str) -> str:
    lines = _lines(text)
    return "\n".join(line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;") for line in lines)
