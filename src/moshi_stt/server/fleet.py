"""What several servers say of themselves, as if it were one: `/metrics` and `/api/modules_info` of all members together.

A member is a model process on a device of this machine, or a replica on another one. Everything here is a function of what the
members answered; asking them is the caller's business.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

_NAME = r"[a-zA-Z_:][a-zA-Z0-9_:]*"
_COMMENT = re.compile(rf"# (HELP|TYPE) ({_NAME})(?: .*)?")
_SERIES = re.compile(rf"({_NAME})(?:\{{(.*)\}})?( \S+(?: \S+)?)")
_LABEL_NAMES = re.compile(r'([a-zA-Z_][a-zA-Z0-9_]*)="(?:[^"\\]|\\.)*"')

SUFFIXES = ("_bucket", "_sum", "_count", "_total")
"""What the names of a family's series may have after the family's own."""


@dataclass
class _Family:
    """One family of the exposition. comments: its HELP and TYPE lines, of the first member that has them."""

    comments: dict[str, str] = field(default_factory=dict)
    series: list[str] = field(default_factory=list)


def merge_metrics(members: Mapping[str, str], label: str, own: str = "", *, leave_out: Iterable[str] = ()) -> str:
    """One Prometheus exposition of several, the families sorted by name, HELP and TYPE once each.

    members: the text of each, by name; its series get `label="NAME"` in front of their other labels. own: the text of the
    process that asks, whose series stay as they are. leave_out: families of `own` that the members answer for.
    Raises ValueError for a line that is no exposition.
    """
    families: dict[str, _Family] = {}
    skipped = frozenset(leave_out)
    for name, text in (("", own), *members.items()):
        added = f'{label}="{_escaped(name)}"' if name else ""
        for family, kind, line in _parsed(text, name or "this process"):
            if not name and family in skipped:
                continue
            found = families.setdefault(family, _Family())
            if kind:
                found.comments.setdefault(kind, line)
            else:
                found.series.append(_labelled(line, label, added))
    lines = []
    for family in sorted(families):
        found = families[family]
        if found.series:
            lines += [*(found.comments[kind] for kind in ("HELP", "TYPE") if kind in found.comments), *found.series]
    return "".join(f"{line}\n" for line in lines)


def _parsed(text: str, who: str) -> Iterable[tuple[str, str, str]]:
    """The lines of a text with their family, and for comments "HELP" or "TYPE"."""
    family = ""
    for line in text.splitlines():
        comment = _COMMENT.fullmatch(line)
        if comment is not None:
            family = comment[2]
            yield family, comment[1], line
        elif line.strip() and not line.startswith("#"):
            series = _SERIES.fullmatch(line)
            if series is None:
                raise ValueError(f"{who} sent what is no line of a Prometheus exposition: {line[:80]!r}")
            name = series[1]
            if name != family and name not in (family + suffix for suffix in SUFFIXES):
                family = name
            yield family, "", line


def _labelled(line: str, label: str, added: str) -> str:
    """A series with one more label. One that has this label already keeps its own."""
    series = _SERIES.fullmatch(line)
    assert series is not None
    name, labels, value = series[1], series[2] or "", series[3]
    if not added or label in _LABEL_NAMES.findall(labels):
        return line
    return f"{name}{{{added}{',' if labels else ''}{labels}}}{value}"


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")


COUNTED = ("used_slots", "total_slots")
LISTED = ("lm", "audio_tokenizer", "device", "dtype", "languages")
"""Keys whose values are joined where the members differ."""


def merge_modules(documents: Iterable[Sequence[Mapping[str, str]]]) -> list[dict[str, str]]:
    """One `/api/modules_info` of several: modules of the same path are one, their slots added up.

    Where members differ in what they run, the values are joined by a comma. A module that is still loading has its path alone
    and adds nothing.
    """
    merged: dict[str, dict[str, str]] = {}
    for document in documents:
        for module in document:
            _add(merged.setdefault(module["path"], {"path": module["path"]}), module)
    return list(merged.values())


def _add(into: dict[str, str], module: Mapping[str, str]) -> None:
    if len(module) > len(into) == 1:  # in the order of a module that is loaded
        into.clear()
        into.update(module)
        return
    for key, value in module.items():
        if key not in into:
            into[key] = value
        elif key in COUNTED:
            into[key] = str(int(into[key]) + int(value))
        elif key in LISTED:
            values = into[key].split(",")
            into[key] = ",".join([*values, *(each for each in value.split(",") if each not in values)])
