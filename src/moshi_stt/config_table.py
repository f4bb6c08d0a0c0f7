"""One TOML table, read key by key with errors that name the place. Knows TOML and types, not what the keys mean.

A message has the same order everywhere: file, table, key, what came, what was expected, what to do.
"""

import difflib
import functools
import json
import math
import operator
import re
import types
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin

import msgspec

from moshi_stt.errors import ConfigError

S = TypeVar("S", bound=msgspec.Struct)

BARE_KEY = re.compile(r"[A-Za-z0-9_-]+\Z")


def show(value: object) -> str:
    """A value as it would stand in the file, shortened."""
    if isinstance(value, dict):
        return "a table"
    if isinstance(value, list) and len(str(value)) > 60:
        return f"a list of {len(value)}"
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else text[:77] + '..."'


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that `name` was probably meant to be, or None."""
    by_lower = {k.lower(): k for k in known}
    found = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.6)
    return by_lower[found[0]] if found else None


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`; did you mean "x"?`, or nothing."""
    found = nearest(name, known)
    return f'; did you mean "{found}"?' if found else ""


def expected(kind: Any) -> str:
    """A type in words."""
    if kind is bool:
        return "true or false"
    if kind is int:
        return "a whole number, 0 or more"
    if kind is float:
        return "a number"
    if kind is str:
        return "text in quotes"
    origin = get_origin(kind)
    if origin is Literal:
        values = [show(v) for v in get_args(kind)]
        return values[0] if len(values) == 1 else "one of " + ", ".join(values)
    if origin in (Union, types.UnionType):
        return " or ".join(expected(k) for k in get_args(kind) if k is not types.NoneType)
    if origin is list:
        return "a list of " + expected(get_args(kind)[0])
    return "a table"


def fits(value: object, kind: Any) -> bool:
    """Whether a TOML value is of the type. A whole number is good where a float is asked for, as in moshi-server."""
    if kind is dict:
        return isinstance(value, dict)
    try:
        read = msgspec.convert(value, kind)
    except msgspec.ValidationError:
        return False
    if isinstance(read, float):
        return math.isfinite(read)  # TOML has nan and inf; no key of ours has a use for them
    return not isinstance(read, int) or read >= 0


@dataclass
class Table:
    """A table of one file. `name` is dotted, empty for the top level. Warnings are collected, errors raised."""

    file: str
    name: str
    data: dict[str, Any]
    warnings: list[str]
    known: set[str] = field(default_factory=set)

    def place(self, key: str | None = None) -> str:
        """`file: [table] key`."""
        table = f" [{self.name}]" if self.name else ""
        return f"{self.file}:{table}{f' {key}' if key else ''}"

    def message(self, key: str | None, text: str) -> str:
        """`text`, said of this place; with a key that is there, its value comes along."""
        value = f" = {show(self.data[key])}" if key is not None and key in self.data else ""
        return f"{self.place(key)}{value}: {text}"

    def fail(self, key: str | None, text: str) -> NoReturn:
        """Raise ConfigError with `message`."""
        raise ConfigError(self.message(key, text))

    def warn(self, key: str | None, message: str) -> None:
        """Note something that the user should know and that stops nothing."""
        self.warnings.append(f"{self.place(key)}: {message}")

    def has(self, key: str) -> bool:
        """Whether the key is there. Counts as known either way."""
        self.known.add(key)
        return key in self.data

    def get(self, key: str, kind: Any, default: Any = ..., hint: str = "") -> Any:
        """The value of `key`, checked to be of `kind`. Without a default the key is required."""
        self.known.add(key)
        if key not in self.data:
            if default is not ...:
                return default
            like = nearest(key, set(self.data) - self.known)
            wrong = f" There is {show(like)}, which is not a key of this table: rename it." if like else ""
            self.fail(key, f"the key is missing; expected {expected(kind)}.{wrong}{' ' + hint if hint else ''}")
        value = self.data[key]
        if not fits(value, kind):
            self.fail(key, f"expected {expected(kind)}.{' ' + hint if hint else ''}")
        return float(value) if kind is float else value

    def table(self, key: str, *, required: bool = False) -> "Table | None":
        """The table under `key`, or None where it is absent and not required."""
        data = self.get(key, dict, ... if required else None)
        if data is None:
            return None
        part = key if BARE_KEY.match(key) else show(key)
        return Table(self.file, f"{self.name}.{part}" if self.name else part, data, self.warnings)

    def struct(self, kind: type[S], **given: Any) -> S:
        """Read every field of a struct that is not given, and warn of the keys that it has not."""
        values = dict(given)
        for f in msgspec.structs.fields(kind):
            if f.name in given:
                self.known.add(f.name)
            elif f.default is not msgspec.NODEFAULT:
                if self.has(f.name):
                    values[f.name] = self.get(f.name, without_none(f.type))
            elif f.default_factory is msgspec.NODEFAULT:
                values[f.name] = self.get(f.name, without_none(f.type))
        self.warn_unknown()
        return kind(**values)

    def warn_unknown(self) -> None:
        """Warn of each key that nobody asked for, with the name it was probably meant to be."""
        for key in self.data:
            if key not in self.known:
                self.warn(key, f"unknown key, ignored{did_you_mean(key, self.known)}")


def without_none(kind: Any) -> Any:
    """`T | None` → `T`: TOML has no null."""
    if get_origin(kind) in (Union, types.UnionType):
        return functools.reduce(operator.or_, (k for k in get_args(kind) if k is not types.NoneType))
    return kind
