"""Token logs (`log_frequency_s`): what goes into the language model at each step, in files. Knows no backend and no stream.

As moshi-server writes them: every so many seconds one file `NAME.0.safetensors`, `NAME.1.safetensors`, … of
text   uint32 (slots, T)      the text token that goes in: the start token at a stream's first step, then the step before's
audio  uint32 (slots, K, T)   the codes that go in: the pad at a stream's first step, then the frame before's; 0 at rest
There a column is a step, and every slot steps with every other. Here a column is as many steps as no slot takes twice, so that
a slot's own columns, in order, are its own steps, and the files are no larger for streams that do not step together.
"""

import logging
import threading
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from moshi_stt.errors import CheckpointError
from moshi_stt.models.spec import LMSpec
from moshi_stt.models.tensors import write_tensors

log = logging.getLogger(__name__)

MOST_BYTES = 32 << 20
"""Columns that wait to be written, in all. At half of it a file is written before its time; more than all is dropped."""

STOP_SECONDS = 5.0
"""How long `stop` waits for the disk."""


class _Column(NamedTuple):
    """text uint32 (slots,), audio uint32 (slots, K)."""

    text: NDArray[np.uint32]
    audio: NDArray[np.uint32]


class TokenLog:
    """See `engine.StepRecorder`. Files are written by a thread of its own: a full disk is a warning, and delays no step."""

    def __init__(self, base: Path, spec: LMSpec, slots: int, seconds: float, most_bytes: int = MOST_BYTES) -> None:
        """base: of the files' names. slots: those of streams; what is said of higher ones is not recorded."""
        self._base = base
        self._slots = slots
        self._seconds = seconds
        self._start_token, self._pad_code = spec.start_token, spec.pad_code
        self._next_text = np.full(slots, spec.start_token, np.uint32)  # (slots,)
        self._next_codes = np.full((slots, spec.codebooks), spec.pad_code, np.uint32)  # (slots, K)
        self._stepped = np.zeros(slots, np.bool_)
        """Who has stepped in the last column."""
        self._columns: list[_Column] = []
        self._most_columns = max(2, most_bytes // (4 * slots * (1 + spec.codebooks)))
        self._dropped = 0
        self._lock = threading.Lock()
        """Of the columns; never held while anything is written."""
        self._wake = threading.Event()
        self._stopping = False
        self._thread: threading.Thread | None = None
        self._written = 0
        self._is_failing = False

    # ---- the model thread --------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Record from here on."""
        self._thread = threading.Thread(target=self._run, name="token log", daemon=True)
        self._thread.start()
        log.info("token logs: %s.N.safetensors, one every %g s", self._base, self._seconds)

    def record(
        self, slots: NDArray[np.int64], fresh: NDArray[np.bool_], text: NDArray[np.int64], codes: NDArray[np.int64]
    ) -> None:
        """Take a step: rows' slots and fresh (B,) as they went in, text (B,) and codes (B, K) as they came out."""
        if self._thread is None:
            return
        ours = slots < self._slots
        if not ours.all():
            slots, fresh, text, codes = slots[ours], fresh[ours], text[ours], codes[ours]
        new = slots[fresh]
        self._next_text[new] = self._start_token
        self._next_codes[new] = self._pad_code
        with self._lock:
            if not self._columns or self._stepped[slots].any():
                self._open_column()
            column = self._columns[-1]
            column.text[slots] = self._next_text[slots]
            column.audio[slots] = self._next_codes[slots]
            self._stepped[slots] = True
        self._next_text[slots] = text
        self._next_codes[slots] = codes

    def _open_column(self) -> None:
        if len(self._columns) >= self._most_columns:
            self._dropped += len(self._columns)
            self._columns.clear()
        elif 2 * len(self._columns) == self._most_columns:
            self._wake.set()
        self._columns.append(_Column(self._next_text.copy(), np.zeros_like(self._next_codes)))
        self._stepped[:] = False

    def stop(self) -> None:
        """Write what is left, if the disk takes it in time."""
        thread, self._thread = self._thread, None
        if thread is None:
            return
        self._stopping = True
        self._wake.set()
        thread.join(STOP_SECONDS)
        if thread.is_alive():
            log.warning("token log: %s has not been written within %g s; the rest is lost", self._base, STOP_SECONDS)

    # ---- its own thread ----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._stopping:
            self._wake.wait(self._seconds)
            self._wake.clear()
            self._write()
        self._write()  # what came while the last file was written

    def _write(self) -> None:
        """Everything that waits, in one file."""
        with self._lock:
            columns, self._columns = self._columns, []
            dropped, self._dropped = self._dropped, 0
        if dropped:
            log.warning("token log: %d columns were dropped: %s is written too slowly", dropped, self._base.parent)
        if not columns:
            return
        tensors = {
            "text": np.stack([column.text for column in columns], axis=-1),  # (slots, T)
            "audio": np.stack([column.audio for column in columns], axis=-1),  # (slots, K, T)
        }
        path = self._base.with_name(f"{self._base.name}.{self._written}.safetensors")
        shapes = {name: ("U32", values.shape) for name, values in tensors.items()}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_tensors(path, shapes, tensors.items(), {})
        except (OSError, CheckpointError) as error:
            if not self._is_failing:
                log.warning("token log: %s; %d columns are lost, and others until this is mended", error, len(columns))
            self._is_failing = True
            return
        if self._is_failing:
            log.info("token log: %s could be written again", path)
        self._is_failing = False
        self._written += 1
