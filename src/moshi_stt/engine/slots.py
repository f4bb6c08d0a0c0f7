"""Which slots of a model's state are lent.

A slot is lent with a generation number, so that giving one back twice, or late, does not touch its next owner.
"""

from dataclasses import dataclass
from typing import Protocol

from moshi_stt.errors import NoFreeSlot


@dataclass(frozen=True, slots=True)
class Slot:
    """index: which state. generation: loan counter."""

    index: int
    generation: int


class SlotSource(Protocol):
    """Where an engine's streams get their slots. For one thread."""

    @property
    def used(self) -> int: ...

    def acquire(self) -> Slot:
        """Lend a slot. Raises NoFreeSlot."""
        ...

    def release(self, slot: Slot) -> bool:
        """Take a slot back. False, and nothing done, when that loan is over already."""
        ...


class SlotPool:
    """Slots `first .. first + count - 1`, lent one by one. For one thread."""

    def __init__(self, count: int, first: int = 0) -> None:
        self._first = first
        self._generations = [0] * count
        self._lent = [False] * count
        self._free = list(range(first + count - 1, first - 1, -1))

    @property
    def total(self) -> int:
        return len(self._lent)

    @property
    def used(self) -> int:
        return len(self._lent) - len(self._free)

    def acquire(self) -> Slot:
        """Lend the slot that came back last. Raises NoFreeSlot."""
        if not self._free:
            raise NoFreeSlot
        index = self._free.pop()
        self._lent[index - self._first] = True
        self._generations[index - self._first] += 1
        return Slot(index, self._generations[index - self._first])

    def release(self, slot: Slot) -> bool:
        """Take a slot back. False, and nothing done, when that loan is over already."""
        place = slot.index - self._first
        if not self._lent[place] or self._generations[place] != slot.generation:
            return False
        self._lent[place] = False
        self._free.append(slot.index)
        return True


def spare_slots(streams: int, processes: int = 0) -> int:
    """Slots that a backend needs beyond those of its streams, to answer markers early on copies (docs/internals/engine.md).

    processes: how many others share the backend; each has its own share of them, and so has the backend's.
    """
    return (processes + 1) * spare_share(streams, processes)


def spare_share(streams: int, processes: int) -> int:
    """How many of them each process has: as markers come, a copy of each 32nd stream is enough, or of eight."""
    alone = max(1, min(streams // 8, max(8, streams // 32)))
    return max(min(2, alone), -(-alone // (processes + 1)))
