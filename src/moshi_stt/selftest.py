"""Does a loaded engine recognise speech, here and now: shipped recordings with known words and times, speed, memory."""

import asyncio
import re
import sys
import time
import unicodedata
from typing import NamedTuple

from moshi_stt.audio.decode import read_file
from moshi_stt.constants import FRAME_SECONDS, SAMPLE_RATE
from moshi_stt.data import data_file
from moshi_stt.engine.engine import Engine
from moshi_stt.engine.recording import RecordingOptions, transcribe_recording
from moshi_stt.errors import MoshiSttError
from moshi_stt.text.subtitles import TimedWord
from moshi_stt.text.word_errors import word_errors

MOST_WRONG = 0.2
"""Share of the words that may be wrong: a working model has none or one."""

TIME_TOLERANCE = 0.6
"""Seconds by which a word's time may be off: models place words to within a few frames of 80 ms, each in its own way."""

SLOWEST = 1.0
"""Seconds of work for a second of speech: beyond it, live speech is not kept up with."""

DEADLINE_SECONDS = 300.0
"""A recording that takes longer has failed."""


class Recording(NamedTuple):
    """Shipped speech. first and last: seconds at which the first word starts and the last one stops."""

    language: str
    name: str
    file: str
    text: str
    first: float
    last: float


RECORDINGS = (
    Recording(
        "en",
        "English",
        "speech/en_austen.flac",
        "unless to be rather cold hearted and rather selfish is to be ill disposed",
        0.27,
        5.09,
    ),
    Recording(
        "fr",
        "French",
        "speech/fr_baudelaire.flac",
        "La nature est un temple où de vivants piliers laissent parfois sortir de confuses paroles",
        0.22,
        5.94,
    ),
)


class Check(NamedTuple):
    """passed: None where there was nothing to judge."""

    what: str
    passed: bool | None
    text: str


def letters(text: str) -> list[str]:
    """Words without case, punctuation and accents; hyphens and apostrophes divide."""
    plain = "".join(c for c in unicodedata.normalize("NFD", text.lower()) if not unicodedata.combining(c))
    return re.findall(r"[^\W_]+", plain)


async def check_engine(engine: Engine, judge_words: bool) -> list[Check]:
    """Run the recordings of the languages that a started engine knows; all of them where it does not say.

    judge_words: whether it must get them right; False for weights of which nothing is known but that they run.
    """
    checks: list[Check] = []
    for recording in RECORDINGS:
        if engine.info.languages and recording.language not in engine.info.languages:
            checks.append(Check(recording.name, None, "this model does not know the language"))
            continue
        checks += await _check_recording(engine, recording, judge_words)
    return checks


async def _check_recording(engine: Engine, recording: Recording, judge_words: bool) -> list[Check]:
    pcm = read_file(data_file(recording.file))
    seconds = len(pcm) / SAMPLE_RATE
    begun = time.monotonic()
    try:
        async with asyncio.timeout(DEADLINE_SECONDS):
            words = await transcribe_recording(engine, [pcm], RecordingOptions(cut=None))
    except TimeoutError:
        return [Check(recording.name, False, f"not done within {DEADLINE_SECONDS:g} s")]
    except MoshiSttError as error:
        return [Check(recording.name, False, str(error))]
    taken = time.monotonic() - begun
    share = taken / seconds
    speed = Check(
        f"speed, {recording.name}",
        share < SLOWEST,
        f"{seconds:.1f} s of speech in {taken:.2f} s: {1000 * share * FRAME_SECONDS:.0f} ms for each 80 ms of one stream",
    )
    return [_check_words(recording, words, judge_words), speed]


def _check_words(recording: Recording, words: list[TimedWord], judge: bool) -> Check:
    said = " ".join(word.text for word in words)
    if not judge:
        return Check(recording.name, None, f"not judged, as these are not published weights; heard: {said[:200] or 'nothing'}")
    expected = letters(recording.text)
    wrong = word_errors(expected, letters(said))
    text = f"{len(expected) - min(wrong, len(expected))} of {len(expected)} words right"
    if wrong > MOST_WRONG * len(expected):
        return Check(recording.name, False, f"{text}; heard: {said[:200] or 'nothing'}; expected: {recording.text}")
    off = max(abs(words[0].start - recording.first), abs(words[-1].end - recording.last))
    in_order = all(word.start <= word.end for word in words)
    text += f", first and last within {off:.2f} s of their times"
    return Check(recording.name, off <= TIME_TOLERANCE and in_order, text)


def memory_check() -> Check:
    """Peak memory of this process, and of PyTorch on a CUDA device where it was used."""
    if sys.platform == "win32":
        return Check("memory", None, "not measured on this system")
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # kilobytes on Linux, bytes on macOS
    text = f"{peak / (1 << 20 if sys.platform == 'darwin' else 1 << 10):,.0f} MB at most"
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        text += f", {torch.cuda.max_memory_allocated() / (1 << 20):,.0f} MB on the GPU"
    return Check("memory", None, text)


def passed(checks: list[Check]) -> bool:
    """Whether none failed."""
    return all(check.passed is not False for check in checks)
