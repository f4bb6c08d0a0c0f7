"""What a caller may ask to be done to words, whatever protocol it speaks: profanity masked, words replaced, terms searched."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from moshi_stt.text.subtitles import TimedWord

MOST_RULES: Final = 200
LONGEST_PHRASE: Final = 10

_ENGLISH: Final = (
    "arse arsehole ass asshole assholes bastard bastards bitch bitches bitching bollocks bullshit cocksucker cocksuckers "
    "cunt cunts dickhead dickheads dipshit fuck fucked fucker fuckers fucking fucks goddamn goddamned jackass motherfucker "
    "motherfuckers motherfucking piss pissed shit shits shitty slut sluts twat twats wank wanker wankers whore whores"
)
_FRENCH: Final = (
    "branleur branleurs branleuse branleuses chier conard conards connard connards connasse connasses couilles enculé "
    "enculée enculés enculer foutre merde merdes merdique niquer pute putes putain putains salaud salauds salope salopes"
)
PROFANE: Final = frozenset(_ENGLISH.split() + _FRENCH.split())
"""Plain forms (`plain`) that `profanity` masks."""


class Hit(NamedTuple):
    """A place at which a searched term was said. Times in seconds."""

    start: float
    end: float
    snippet: str


@dataclass(frozen=True)
class WordLists:
    """profanity: mask swear words. replace: (phrase, replacement) in plain words. search: phrases to be found."""

    profanity: bool = False
    replace: tuple[tuple[tuple[str, ...], str], ...] = ()
    search: tuple[str, ...] = ()

    @classmethod
    def parse(cls, *, profanity: bool = False, replace: Iterable[str] = (), search: Iterable[str] = ()) -> "WordLists":
        """replace: `find:put`, or `find` alone to leave it out. Raises ValueError naming the rule that cannot be used."""
        rules = []
        for rule in replace:
            find, _, put = rule.partition(":")
            phrase = tuple(filter(None, map(plain, find.split())))
            if not phrase or len(phrase) > LONGEST_PHRASE:
                raise ValueError(f"replace={rule}: expected `find:put` with 1 to {LONGEST_PHRASE} words to find")
            rules.append((phrase, put.strip()))
        terms = tuple(dict.fromkeys(term for term in search if any(map(plain, term.split()))))
        if len(rules) > MOST_RULES or len(terms) > MOST_RULES:
            raise ValueError(f"at most {MOST_RULES} words can be replaced and {MOST_RULES} searched")
        return cls(profanity, tuple(sorted(rules, key=lambda rule: -len(rule[0]))), terms)

    @property
    def changes(self) -> bool:
        """Whether `apply` does anything."""
        return self.profanity or bool(self.replace)

    @property
    def longest(self) -> int:
        """Words of the longest phrase that is replaced."""
        return max((len(phrase) for phrase, _ in self.replace), default=1)

    def apply(self, words: Sequence[TimedWord]) -> list[TimedWord]:
        """The words with everything replaced and masked. A replacement takes the times of what it stands for."""
        if not self.changes:
            return list(words)
        out: list[TimedWord] = []
        bare = [plain(word.text) for word in words]
        index = 0
        while index < len(words):
            taken = next((rule for rule in self.replace if tuple(bare[index : index + len(rule[0])]) == rule[0]), None)
            if taken is None:
                out.append(self._masked(words[index], bare[index]))
                index += 1
                continue
            phrase, put = taken
            last = words[index + len(phrase) - 1]
            if put:
                text = put + _trailing(last.text)
                out.append(words[index]._replace(text=text, end=last.end))
            index += len(phrase)
        return out

    def may_begin(self, words: Sequence[TimedWord]) -> bool:
        """Whether these words are the beginning of a phrase, which the next word may complete."""
        bare = tuple(plain(word.text) for word in words)
        return any(len(phrase) > len(bare) and phrase[: len(bare)] == bare for phrase, _ in self.replace)

    def find(self, words: Sequence[TimedWord]) -> list[tuple[str, list[Hit]]]:
        """Where each searched term was said."""
        bare = [plain(word.text) for word in words]
        found = []
        for term in self.search:
            wanted = [part for part in map(plain, term.split()) if part]
            hits = [
                Hit(words[at].start, words[at + len(wanted) - 1].end, " ".join(w.text for w in words[at : at + len(wanted)]))
                for at in range(len(bare) - len(wanted) + 1)
                if bare[at : at + len(wanted)] == wanted
            ]
            found.append((term, hits))
        return found

    def _masked(self, word: TimedWord, bare: str) -> TimedWord:
        if not self.profanity or bare not in PROFANE:
            return word
        start = next(index for index, letter in enumerate(word.text, 1) if letter.isalnum())
        masked = word.text[:start] + "".join("*" if letter.isalnum() else letter for letter in word.text[start:])
        return word._replace(text=masked)


NO_LISTS: Final = WordLists()
"""Words as they are."""


class WordFilter:
    """`WordLists` on words that come one by one and are never taken back: the beginning of a phrase waits for its next word."""

    def __init__(self, lists: WordLists) -> None:
        self._lists = lists
        self._held: list[TimedWord] = []

    def push(self, word: TimedWord) -> list[TimedWord]:
        """The words that can go out now."""
        if not self._lists.changes:
            return [word]
        self._held.append(word)
        for first in range(len(self._held)):
            if self._lists.may_begin(self._held[first:]):
                ready, self._held = self._held[:first], self._held[first:]
                return self._lists.apply(ready)
        return self.flush()

    def flush(self) -> list[TimedWord]:
        """Everything that waits: nothing follows it."""
        ready, self._held = self._held, []
        return self._lists.apply(ready)


def plain(text: str) -> str:
    """A word for comparison: no case, no punctuation around it."""
    return text.casefold().strip("\"'“”‘’«».,;:!?…¿¡()[]{}-–— ").replace("’", "'")


def _trailing(text: str) -> str:
    """The punctuation that ends a word."""
    return text[len(text.rstrip(".,;:!?…")) :]
