"""Forced alignment by pocketsphinx's C library and by its package's own class: the same words at the same frames."""

import ctypes
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from moshi_stt.data import SAMPLE, data_file
from moshi_stt.errors import CheckpointError
from moshi_stt.models.embedded import read_wav
from moshi_stt.models.sphinx import LibraryDecoder, PackageDecoder, SphinxDecoder, sphinx_decoder, sphinx_library

pocketsphinx = pytest.importorskip("pocketsphinx", reason="pocketsphinx has no wheel for this version of Python")

MODEL = Path(pocketsphinx.get_model_path("en-us"))
SETTINGS = {
    "hmm": str(MODEL / "en-us"),
    "dict": str(MODEL / "cmudict-en-us.dict"),
    "loglevel": "FATAL",
    "cmn": "batch",
    "bestpath": False,
    "topn": 2,
}
TEXT = "ever tried ever failed no matter"


def library() -> ctypes.CDLL:
    found = sphinx_library()
    if found is None:
        pytest.skip("this platform's pocketsphinx does not export its functions")
    return found


@pytest.fixture(scope="module")
def speech() -> NDArray[np.int16]:
    return (read_wav(data_file(SAMPLE)) * 32_767).astype(np.int16)


def test_linux_calls_the_library_without_pythons_lock() -> None:
    """`ctypes.CDLL` lets go of the lock for a call, `PyDLL` would not."""
    if sys.platform != "linux":
        pytest.skip("only known of Linux")
    assert type(sphinx_library()) is ctypes.CDLL
    assert isinstance(sphinx_decoder(SETTINGS), LibraryDecoder)


def test_both_find_the_same(speech: NDArray[np.int16]) -> None:
    ours, theirs = LibraryDecoder(library(), SETTINGS), PackageDecoder(SETTINGS)
    for start, stop, text in (
        (0, 80_000, TEXT),
        (0, 40_000, "ever tried"),
        (16_000, 60_000, "tried ever failed"),
        (0, 3_000, TEXT),
    ):
        pcm = speech[start:stop]
        assert ours.align(pcm, text) == theirs.align(pcm, text)
    assert [segment.word for segment in ours.align(speech[:80_000], TEXT) if segment.word[0].isalpha()]


@pytest.mark.parametrize("kind", [LibraryDecoder, PackageDecoder])
def test_words_may_be_added(kind: type[Any], speech: NDArray[np.int16]) -> None:
    decoder: SphinxDecoder = LibraryDecoder(library(), SETTINGS) if kind is LibraryDecoder else PackageDecoder(SETTINGS)
    assert decoder.knows("ever")
    assert not decoder.knows("xqzwv")
    decoder.add_word("xqzwv", "EH V ER")
    assert decoder.knows("xqzwv")
    words = [segment.word for segment in decoder.align(speech[:40_000], "xqzwv tried") if segment.word[0].isalpha()]
    assert words == ["xqzwv", "tried"]


def test_many_threads_at_once_find_what_one_finds(speech: NDArray[np.int16]) -> None:
    """The library keeps nothing that decoders share."""
    expected = LibraryDecoder(library(), SETTINGS).align(speech[:80_000], TEXT)
    decoders = [LibraryDecoder(library(), SETTINGS) for _ in range(3)]
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda decoder: decoder.align(speech[:80_000], TEXT), decoders))
    assert found == [expected] * 3


@pytest.mark.parametrize("make", [lambda settings: LibraryDecoder(library(), settings), PackageDecoder])
def test_a_missing_model_is_named(make: Any, tmp_path: Path) -> None:
    broken: Mapping[str, Any] = SETTINGS | {"hmm": str(tmp_path / "en-us")}
    with pytest.raises(CheckpointError, match=r"cannot load its acoustic model from .*pip install"):
        make(broken)


def test_without_exported_functions_the_package_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moshi_stt.models.sphinx.sphinx_library", lambda: None)
    assert isinstance(sphinx_decoder(SETTINGS), PackageDecoder)


@pytest.mark.parametrize("kind", [LibraryDecoder, PackageDecoder])
def test_a_model_below_a_folder_with_letters_of_any_language(kind: type[Any], tmp_path: Path) -> None:
    folder = tmp_path / "josé-шум-音"
    folder.symlink_to(Path(SETTINGS["hmm"]).parent)
    moved = {name: str(folder / Path(value).name) if name in ("hmm", "dict") else value for name, value in SETTINGS.items()}
    assert moved != SETTINGS
    decoder: SphinxDecoder = LibraryDecoder(library(), moved) if kind is LibraryDecoder else PackageDecoder(moved)
    assert decoder.knows("ever")
