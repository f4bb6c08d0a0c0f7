"""pocketsphinx's decoders for forced alignment, called so that other threads of Python run meanwhile.

The `pocketsphinx` package holds Python's lock for as long as it searches, tens of milliseconds: two streams' words would
wait for each other, however many cores there are. Its C library is inside its extension module, and where that exports the
functions (Linux, macOS) they are called through ctypes, which lets go of the lock. Elsewhere the package's own class serves.
"""

import ctypes
import functools
import json
import os
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from moshi_stt.errors import CheckpointError


class Segment(NamedTuple):
    """A word of an alignment: its first and its last frame of 10 ms."""

    word: str
    first: int
    last: int


class SphinxDecoder(Protocol):
    """Not thread-safe; several may be used at once."""

    def knows(self, word: str) -> bool:
        """Whether the dictionary has the word."""
        ...

    def add_word(self, word: str, phones: str) -> None: ...

    def align(self, pcm: NDArray[np.int16], text: str) -> list[Segment]:
        """The words of text, known ones with blanks between them, and the silences, within pcm (S,) at 16 kHz.

        Fewer, or none, where the search found no way through. The same arguments always give the same result.
        """
        ...


def sphinx_decoder(settings: Mapping[str, Any]) -> SphinxDecoder:
    """A decoder with these settings of pocketsphinx's. Raises CheckpointError where its model cannot be loaded."""
    library = sphinx_library()
    return PackageDecoder(settings) if library is None else LibraryDecoder(library, settings)


_POINTER, _TEXT, _INT = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int
SIGNATURES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "ps_config_parse_json": (_POINTER, (_POINTER, _TEXT)),
    "ps_config_free": (_INT, (_POINTER,)),
    "ps_init": (_POINTER, (_POINTER,)),
    "ps_free": (_INT, (_POINTER,)),
    "ps_lookup_word": (_POINTER, (_POINTER, _TEXT)),
    "ckd_free": (None, (_POINTER,)),
    "ps_add_word": (_INT, (_POINTER, _TEXT, _TEXT, _INT)),
    "ps_reinit_feat": (_INT, (_POINTER, _POINTER)),
    "ps_set_align_text": (_INT, (_POINTER, _TEXT)),
    "ps_start_utt": (_INT, (_POINTER,)),
    "ps_process_raw": (_INT, (_POINTER, _POINTER, ctypes.c_size_t, _INT, _INT)),
    "ps_end_utt": (_INT, (_POINTER,)),
    "ps_seg_iter": (_POINTER, (_POINTER,)),
    "ps_seg_next": (_POINTER, (_POINTER,)),
    "ps_seg_word": (_TEXT, (_POINTER,)),
    "ps_seg_frames": (None, (_POINTER, ctypes.POINTER(_INT), ctypes.POINTER(_INT))),
}
"""Result and arguments of the functions in pocketsphinx.h that are called."""


@functools.cache
def sphinx_library() -> ctypes.CDLL | None:
    """The C library inside the package's extension module; None where that does not export it."""
    from pocketsphinx import _pocketsphinx

    try:
        library = ctypes.CDLL(_pocketsphinx.__file__)
        for name, (result, arguments) in SIGNATURES.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError):
        return None
    return library


class LibraryDecoder:
    """A decoder of the C library."""

    def __init__(self, library: ctypes.CDLL, settings: Mapping[str, Any]) -> None:
        self._library, self._decoder = library, None
        # Its parser takes no escapes, and paths as the file system has them.
        config = library.ps_config_parse_json(None, os.fsencode(json.dumps(settings, ensure_ascii=False)))
        if config:
            self._decoder = library.ps_init(config)  # keeps a share of the settings
            library.ps_config_free(config)
        if not self._decoder:
            raise _not_loaded(settings, "pocketsphinx refuses it")

    def knows(self, word: str) -> bool:
        phones = self._library.ps_lookup_word(self._decoder, word.encode())
        if phones:
            self._library.ckd_free(phones)
        return bool(phones)

    def add_word(self, word: str, phones: str) -> None:
        if self._library.ps_add_word(self._decoder, word.encode(), phones.encode(), 1) < 0:
            raise RuntimeError(f"pocketsphinx does not take the word {word!r} as {phones!r}")

    def align(self, pcm: NDArray[np.int16], text: str) -> list[Segment]:
        library, decoder = self._library, self._decoder
        library.ps_reinit_feat(decoder, None)  # its front end carries something over from call to call
        if library.ps_set_align_text(decoder, text.encode()) < 0:
            raise RuntimeError(f"pocketsphinx cannot align the words {text!r}")
        pcm = np.ascontiguousarray(pcm)
        if library.ps_start_utt(decoder) < 0:
            raise RuntimeError("pocketsphinx cannot begin an utterance")
        try:
            if library.ps_process_raw(decoder, pcm.ctypes.data, len(pcm), 0, 1) < 0:
                raise RuntimeError(f"pocketsphinx cannot search {len(pcm)} samples")
        finally:
            library.ps_end_utt(decoder)
        first, last, found = _INT(), _INT(), []
        segment = library.ps_seg_iter(decoder)
        while segment:
            library.ps_seg_frames(segment, ctypes.byref(first), ctypes.byref(last))
            found.append(Segment(library.ps_seg_word(segment).decode(), first.value, last.value))
            segment = library.ps_seg_next(segment)
        return found

    def __del__(self) -> None:
        if self._decoder:
            self._library.ps_free(self._decoder)


class PackageDecoder:
    """A decoder of the package's own class."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        import pocketsphinx

        try:
            self._decoder: Any = pocketsphinx.Decoder(lm=None, **settings)
        except RuntimeError as error:
            raise _not_loaded(settings, str(error)) from error

    def knows(self, word: str) -> bool:
        return self._decoder.lookup_word(word) is not None

    def add_word(self, word: str, phones: str) -> None:
        self._decoder.add_word(word, phones, True)

    def align(self, pcm: NDArray[np.int16], text: str) -> list[Segment]:
        decoder = self._decoder
        decoder.reinit_feat()  # its front end carries something over from call to call
        decoder.set_align_text(text)
        decoder.start_utt()
        try:
            decoder.process_raw(pcm.tobytes(), no_search=False, full_utt=True)
        finally:
            decoder.end_utt()
        return [Segment(segment.word, segment.start_frame, segment.end_frame) for segment in decoder.seg() or ()]


def _not_loaded(settings: Mapping[str, Any], reason: str) -> CheckpointError:
    return CheckpointError(
        f"pocketsphinx {version('pocketsphinx')} cannot load its acoustic model from {Path(settings['hmm']).parent}: {reason}; "
        "run `pip install --force-reinstall 'pocketsphinx>=5.1.1,<6'`"
    )
