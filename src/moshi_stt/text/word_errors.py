"""Word errors: how far a transcript is from what was said."""

from collections.abc import Sequence


def word_errors(expected: Sequence[object], heard: Sequence[object]) -> int:
    """The least number of words to change, leave out or put in. Over the number of expected words: the word error rate."""
    row = list(range(len(heard) + 1))
    for index, word in enumerate(expected, 1):
        diagonal, row[0] = row[0], index
        for column, other in enumerate(heard, 1):
            diagonal, row[column] = row[column], min(row[column] + 1, row[column - 1] + 1, diagonal + (word != other))
    return row[-1]
