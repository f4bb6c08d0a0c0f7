"""Words of overlapping pieces of one recording to one list, none lost and none doubled. Knows nothing of audio.

Which piece's word counts is decided by the middle of its time. Where two pieces put the same word on different sides of
their cut, it is recognised by its text and counts once.
"""

from collections.abc import Sequence

from moshi_stt.text.subtitles import TimedWord

SAME_WORD_SECONDS = 1.0
"""Two pieces may place one word this far apart: the earlier one hears little behind it, and aligners then err."""


def merge_words(starts: Sequence[float], words: Sequence[Sequence[TimedWord]]) -> list[TimedWord]:
    """starts: where each piece's own part begins, in seconds; it ends where the next one's begins.

    words: each piece's words, those of the overlaps included, in order, with times from the start of the recording.
    """
    merged: list[TimedWord] = []
    for index, (start, heard) in enumerate(zip(starts, words, strict=True)):
        end = starts[index + 1] if index + 1 < len(starts) else float("inf")
        own = [word for word in heard if (start <= _middle(word) or not index) and _middle(word) < end]
        if index:
            twice, lost = _disagreements(words[index - 1], heard, start)
            own = [word for word in own if word not in twice]
            merged += lost
        merged += own
    return merged


def _disagreements(
    earlier: Sequence[TimedWord], later: Sequence[TimedWord], cut: float
) -> tuple[list[TimedWord], list[TimedWord]]:
    """Words near a cut that both pieces count as theirs (as the later has them), and that neither does (as the earlier)."""
    reach = 2 * SAME_WORD_SECONDS
    left = [word for word in earlier if abs(_middle(word) - cut) < reach]
    right = [word for word in later if abs(_middle(word) - cut) < reach]
    twice: list[TimedWord] = []
    lost: list[TimedWord] = []
    for word in left:
        other = _nearest_same(word, right)
        if other is None or _nearest_same(other, left) != word:
            continue  # not each other's: one of two like words, "no, no"
        if _middle(word) < cut <= _middle(other):
            twice.append(other)
        elif _middle(other) < cut <= _middle(word):
            lost.append(word)
    return twice, lost


def _nearest_same(word: TimedWord, among: Sequence[TimedWord]) -> TimedWord | None:
    same = [other for other in among if _plain(other.text) == _plain(word.text)]
    nearest = min(same, key=lambda other: abs(_middle(other) - _middle(word)), default=None)
    return nearest if nearest is not None and abs(_middle(nearest) - _middle(word)) <= SAME_WORD_SECONDS else None


def _middle(word: TimedWord) -> float:
    return (word.start + word.end) / 2


def _plain(text: str) -> str:
    """For comparison: case and punctuation depend on what follows, which one piece does not hear."""
    return "".join(character for character in text.casefold() if character.isalnum()) or text
