"""Words of overlapping pieces of one recording to one list, none lost and none doubled.

Which piece's word counts is decided by the middle of its time. Where two pieces put the same word on different sides of
their cut, it is recognised by its text and counts once.
"""

from collections.abc import Sequence

from moshi_stt.text.subtitles import TimedWord

SAME_WORD_SECONDS = 1.0
"""Two pieces may place one word this far apart: the earlier one hears little after it, and aligners then err."""


class WordMerger:
    """Takes the pieces in order, and gives their words as soon as no later piece can change them."""

    def __init__(self) -> None:
        self._start = 0.0
        self._heard: list[TimedWord] | None = None
        self._own: list[TimedWord] = []
        """What of the latest piece's words is its own, but for what the next piece takes."""

    def add(self, start: float, words: Sequence[TimedWord]) -> list[TimedWord]:
        """One more piece. start: where its own part begins, in seconds; the part of the one before ends there.

        words: all that it heard, those of the overlaps included, in order, with times from the start of the recording.
        """
        if self._heard is None:
            self._heard, self._own = list(words), list(words)
            return []
        twice, lost = _disagreements(self._heard, words, start)
        final = [word for word in self._own if _middle(word) < start] + lost
        self._own = [word for word in words if start <= _middle(word) and word not in twice]
        self._heard = list(words)
        return final

    def finish(self) -> list[TimedWord]:
        """No piece follows: the rest."""
        rest, self._own = self._own, []
        return rest


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
