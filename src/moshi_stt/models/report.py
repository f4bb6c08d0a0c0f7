"""What a loaded model says of itself, and whether its streams fit into memory. Of no framework."""

import os
from dataclasses import dataclass

LOUDEST = 100.0
"""Samples are clipped here, far above full scale (1.0), and what is no number counts as 0: one absurd sample would otherwise
stay in the stream's keys and values for good."""


@dataclass(frozen=True)
class LoadReport:
    """What was loaded, for the start-up log."""

    device: str
    dtype: str
    """Of the language model; Mimi is float32."""
    weight_bytes: int
    """Weights on the device, both models."""
    slot_bytes: int
    """State of one slot on the device."""
    load_seconds: float
    notes: tuple[str, ...] = ()


def memory_note(slot_bytes: int, slots: int, free: int | None = None) -> tuple[str, ...]:
    """For where memory is taken as streams fill it: a warning where all slots together would not fit.

    free: bytes for them; None asks the system, and says nothing where it does not tell.
    """
    if free is None:
        if "SC_AVPHYS_PAGES" not in os.sysconf_names:
            return ()
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    needed = slot_bytes * slots
    if needed < free:
        return ()
    return (f"{slots} streams with full context take {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free: lower batch_size",)
