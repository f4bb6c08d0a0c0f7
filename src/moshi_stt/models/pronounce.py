"""How a written English word may be said: spelled-out numbers and letter-to-sound rules. Knows no dictionary and no audio.

The sounds only have to lead a forced alignment through the word, so the rules are few and their errors harmless.
Phones are those of the CMU dictionary, without stress.
"""

import re
from collections.abc import Iterator

_TO_NINETEEN = """
    zero one two three four five six seven eight nine
    ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen
"""
ONES = tuple(_TO_NINETEEN.split())
TENS = ("zero", "ten", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
SCALES = ((10**12, "trillion"), (10**9, "billion"), (10**6, "million"), (10**3, "thousand"), (100, "hundred"))
LARGEST_NUMBER = 10**15
IRREGULAR_ORDINALS = {
    "one": "first", "two": "second", "three": "third", "five": "fifth", "eight": "eighth", "nine": "ninth", "twelve": "twelfth",
}  # fmt: skip
SIGNS = {
    "&": "and", "%": "percent", "+": "plus", "=": "equals", "@": "at", "#": "number", "°": "degrees", "×": "times",
    "/": "slash",
}  # fmt: skip
MONEY = {"$": "dollars", "£": "pounds", "€": "euros", "¥": "yen"}
ABBREVIATIONS = {
    "mr": "mister", "mrs": "missus", "ms": "miz", "dr": "doctor", "st": "saint", "jr": "junior", "sr": "senior", "vs": "versus",
    "etc": "etcetera", "prof": "professor", "capt": "captain", "lt": "lieutenant", "sgt": "sergeant", "no": "no",
}  # fmt: skip
TITLES = frozenset({"mr", "mrs", "dr"})
"""Abbreviations that are also written without a full stop."""

LETTER_NAMES = {
    "a": "EY", "b": "B IY", "c": "S IY", "d": "D IY", "e": "IY", "f": "EH F", "g": "JH IY", "h": "EY CH", "i": "AY",
    "j": "JH EY",
    "k": "K EY", "l": "EH L", "m": "EH M", "n": "EH N", "o": "OW", "p": "P IY", "q": "K Y UW", "r": "AA R", "s": "EH S",
    "t": "T IY", "u": "Y UW", "v": "V IY", "w": "D AH B AH L Y UW", "x": "EH K S", "y": "W AY", "z": "Z IY",
}  # fmt: skip

# (letters, what must follow as a pattern, what must stand before as a pattern, phones); the first that fits is taken.
_RULES = (
    ("tion", "", ".", "SH AH N"), ("sion", "", "[aeiou]", "ZH AH N"), ("sion", "", ".", "SH AH N"),
    ("ture", "", ".", "CH ER"), ("cian", "", ".", "SH AH N"), ("cious", "", ".", "SH AH S"), ("tious", "", ".", "SH AH S"),
    ("ough", "t", "", "AO"), ("ough", "", "", "OW"), ("augh", "", "", "AO"), ("eigh", "", "", "EY"), ("igh", "", "", "AY"),
    ("tch", "", "", "CH"), ("sch", "", "", "SH"), ("dge", "", "", "JH"), ("que", "$", ".", "K"), ("ck", "", "", "K"),
    ("ch", "[rl]", "", "K"), ("ch", "", "", "CH"), ("sh", "", "", "SH"), ("th", "", "", "TH"), ("ph", "", "", "F"),
    ("wh", "", "^", "W"), ("gh", "", "^", "G"), ("gh", "", "", ""), ("kn", "", "^", "N"), ("gn", "", "^", "N"),
    ("wr", "", "^", "R"), ("ps", "", "^", "S"), ("mb", "$", ".", "M"), ("ng", "$", ".", "NG"), ("ng", "", ".", "NG G"),
    ("nk", "", ".", "NG K"), ("qu", "", "", "K W"), ("sc", "[eiy]", "", "S"), ("cc", "[eiy]", "", "K S"),
    ("x", "", "^", "Z"), ("x", "", "", "K S"), ("eau", "", "", "OW"), ("ee", "", "", "IY"), ("ea", "", "", "IY"),
    ("eu", "", "", "Y UW"), ("ew", "", "", "UW"), ("ey", "$", ".", "IY"), ("ei", "", "", "EY"), ("ie", "$", ".", "IY"),
    ("ie", "", "", "IY"), ("oo", "k", "", "UH"), ("oo", "", "", "UW"), ("oa", "", "", "OW"), ("oi", "", "", "OY"),
    ("oy", "", "", "OY"), ("ou", "s$", ".", "AH"), ("ou", "", "", "AW"), ("ow", "$", "", "OW"), ("ow", "", "", "AW"),
    ("ai", "", "", "EY"), ("ay", "", "", "EY"), ("au", "", "", "AO"), ("aw", "", "", "AO"), ("ue", "$", ".", "UW"),
    ("ui", "", "", "UW"), ("arr", "", "", "AE R"), ("ar", "", "", "AA R"), ("er", "", "", "ER"), ("ir", "", "", "ER"),
    ("ur", "", "", "ER"), ("or", "", "", "AO R"), ("a", "[^aeiouwxy]e$", "", "EY"), ("e", "[^aeiouwxy]e$", "", "IY"),
    ("i", "[^aeiouwxy]e$", "", "AY"), ("o", "[^aeiouwxy]e$", "", "OW"), ("u", "[^aeiouwxy]e$", "", "UW"),
    ("es", "$", "[sxz]|ch|sh", "AH Z"), ("ed", "$", "[td]", "AH D"), ("ed", "$", "[aeiou].*[^aeiou]", "D"),
    ("e", "$", "[aeiouy]", ""), ("e", "s$", "[aeiouy].*[^sxz]", ""), ("le", "$", "[^aeiou]", "AH L"),
    ("e", "$", "^.{1,2}", "IY"), ("e", "$", ".", ""), ("y", "", "^", "Y"), ("y", "$", "[aeiou].*", "IY"),
    ("y", "$", "", "AY"), ("y", "", "", "IH"), ("a", "$", ".", "AH"), ("o", "$", "", "OW"), ("i", "$", "", "IY"),
    ("u", "$", "", "UW"), ("a", "", "", "AE"), ("e", "", "", "EH"), ("i", "", "", "IH"), ("o", "", "", "AA"),
    ("u", "", "", "AH"), ("c", "[eiy]", "", "S"), ("c", "", "", "K"), ("g", "[eiy]", "", "JH"), ("g", "", "", "G"),
    ("h", "", "[aeiou]", ""), ("h", "", "", "HH"), ("s", "$", "[aeioubdglmnrvw]", "Z"), ("s", "", "", "S"),
    ("j", "", "", "JH"), ("b", "", "", "B"), ("d", "", "", "D"), ("f", "", "", "F"), ("k", "", "", "K"), ("l", "", "", "L"),
    ("m", "", "", "M"), ("n", "", "", "N"), ("p", "", "", "P"), ("q", "", "", "K"), ("r", "", "", "R"), ("t", "", "", "T"),
    ("v", "", "", "V"), ("w", "", "", "W"), ("z", "", "", "Z"),
)  # fmt: skip
_COMPILED = tuple(
    (letters, re.compile(after) if after else None, re.compile(f"(?:{before})$") if before else None, phones.split())
    for letters, after, before, phones in _RULES
)
_PLAIN = str.maketrans("àáâãäåçèéêëìíîïñòóôõöøùúûüýÿß’", "aaaaaaceeeeiiiinoooooouuuuyys'")
_PARTS = re.compile(r"\d[\d,]*(?:\.\d+)?(?:st|nd|rd|th|s)?|[a-z']+|[^\w\s]")
_AMOUNT = re.compile(r"([$£€¥])(\d[\d,]*)(?:\.(\d+))?")


def spoken_forms(text: str) -> list[str]:
    """The words to say for one written word: lower-case letters and apostrophes only, maybe none.

    "1813," gives eighteen thirteen; "$5" five dollars; "Mr." mister; "ill-disposed" ill disposed; "—" nothing.
    """
    plain = text.lower().translate(_PLAIN)
    plain = _AMOUNT.sub(lambda match: f"{match[2]} {MONEY[match[1]]} {match[3] or ''}", plain)
    dotted = plain.rstrip(",;:!?\"'").endswith(".")
    words: list[str] = []
    for part in _PARTS.findall(plain):
        if part[0].isdigit():
            words.extend(_number_words(part))
        elif part[0].isalpha() or part[0] == "'":
            bare = part.strip("'")
            if bare in ABBREVIATIONS and (dotted or bare in TITLES):
                words.append(ABBREVIATIONS[bare])
            elif bare:
                words.append(part)
        elif part in SIGNS:
            words.append(SIGNS[part])
    return words


def _number_words(part: str) -> Iterator[str]:
    digits, suffix = re.fullmatch(r"([\d,.]*\d)[,.]*([a-z]*)", part).groups()  # type: ignore[union-attr]
    whole, _, fraction = digits.replace(",", "").partition(".")
    if (len(whole) > 1 and whole[0] == "0") or int(whole) >= LARGEST_NUMBER:
        words = [ONES[int(digit)] for digit in whole]
    elif len(whole) == 4 and "," not in digits and not fraction and 1100 <= int(whole) < 2100 and not 2000 <= int(whole) < 2010:
        words = year_words(int(whole))
    else:
        words = cardinal_words(int(whole))
    if suffix in {"st", "nd", "rd", "th"}:
        words[-1] = _ordinal(words[-1])
    elif suffix == "s":
        words[-1] = words[-1][:-1] + "ies" if words[-1].endswith("y") else words[-1] + "s"
    yield from words
    if fraction:
        yield "point"
        yield from (ONES[int(digit)] for digit in fraction)


def cardinal_words(number: int) -> list[str]:
    """A whole number below 10**15 in words."""
    for scale, name in SCALES:
        if number >= scale:
            rest = cardinal_words(number % scale) if number % scale else []
            return [*cardinal_words(number // scale), name, *rest]
    if number < 20:
        return [ONES[number]]
    return [TENS[number // 10], *([ONES[number % 10]] if number % 10 else [])]


def year_words(year: int) -> list[str]:
    """A year from 1100 to 2099 the way it is said: nineteen oh five, eighteen hundred."""
    century, rest = divmod(year, 100)
    if rest == 0:
        return [*cardinal_words(century), "hundred"]
    return [*cardinal_words(century), *(["oh"] if rest < 10 else []), *cardinal_words(rest)]


def _ordinal(word: str) -> str:
    if word in IRREGULAR_ORDINALS:
        return IRREGULAR_ORDINALS[word]
    return word[:-1] + "ieth" if word.endswith("y") else word + "th"


def letters_to_phones(word: str) -> list[str]:
    """Phones for a word of letters and apostrophes by rule, at least one. Without a vowel it is spelled out, as in "bbc"."""
    letters = re.sub(r"[^a-z]", "", word.lower().translate(_PLAIN))
    if not letters:
        return ["AH"]
    if not re.search("[aeiouy]", letters):
        return [phone for letter in letters for phone in LETTER_NAMES[letter].split()]
    phones: list[str] = []
    position = 0
    while position < len(letters):
        for spelling, after, before, sounds in _COMPILED:
            if (
                letters.startswith(spelling, position)
                and (after is None or after.match(letters, position + len(spelling)))
                and (before is None or before.search(letters[:position]))
            ):
                phones.extend(sound for index, sound in enumerate(sounds) if index or not phones or phones[-1] != sound)
                position += len(spelling)
                break
        else:
            position += 1
    return phones or ["AH"]
