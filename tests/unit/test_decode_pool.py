"""Decoding in other processes: the same pieces as here, faults and dead processes by file, and memory that comes back."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest
from tests.support.media import encode, noise

from moshi_stt.audio.cut import CutRule, Piece, cut_pieces
from moshi_stt.audio.decode import decode_file
from moshi_stt.audio.decode_pool import Decoded, DecodePool, is_supported
from moshi_stt.audio.selection import Selection
from moshi_stt.errors import AudioError

pytestmark = pytest.mark.skipif(not is_supported(), reason="descriptors cannot be handed to a process here")

RULE = CutRule(earliest=3.0, latest=5.0, before=1.0, after=0.5)
PIECES = 4


@pytest.fixture
async def pool() -> AsyncIterator[DecodePool]:
    async with DecodePool(2, PIECES, RULE) as made:
        yield made


def file(path: Path, seconds: float = 30.0, seed: int = 0) -> Path:
    path.write_bytes(encode(noise(seconds, 16_000, seed=seed), 16_000, "flac"))
    return path


async def taken(pool: DecodePool, path: Path | int, selection: Selection | None = None) -> tuple[list[Piece], Decoded]:
    """Copies of the pieces, each released at once."""
    decoded = Decoded()
    pieces = []
    async with asyncio.timeout(120):
        async for piece in pool.pieces(path if isinstance(path, int) else str(path), selection or Selection(), decoded):
            pieces.append(Piece(piece.pcm.copy(), piece.offset, piece.start, piece.end))
            piece.release()
    return pieces, decoded


async def test_the_pieces_are_those_of_this_process(pool: DecodePool, tmp_path: Path) -> None:
    paths = [file(tmp_path / f"{seed}.flac", 10.0 * seed, seed) for seed in range(1, 6)]
    for path, (pieces, decoded) in zip(paths, await asyncio.gather(*(taken(pool, path) for path in paths)), strict=True):
        expected = list(cut_pieces(decode_file(path), RULE))
        assert len(pieces) == len(expected)
        for piece, other in zip(pieces, expected, strict=True):
            np.testing.assert_array_equal(piece.pcm, other.pcm)
            assert (piece.offset, piece.start, piece.end) == (other.offset, other.start, other.end)
        assert decoded.seconds == pytest.approx(sum(len(pcm) for pcm in decode_file(path)) / 24_000)
        assert (decoded.fault, decoded.remarks, decoded.silence) == (None, [], "")


async def test_an_open_file_is_read_from_its_start_by_several_at_once(pool: DecodePool, tmp_path: Path) -> None:
    """Whatever its position, which stays where it is; the name may be gone."""
    path = file(tmp_path / "two.flac", 20.0)
    expected = [piece.pcm.copy() for piece in cut_pieces(decode_file(path), RULE)]
    with path.open("rb") as opened:
        opened.seek(1_000)
        path.unlink()
        taken_twice = await asyncio.gather(taken(pool, opened.fileno()), taken(pool, opened.fileno()))
        assert opened.tell() == 1_000
    for pieces, decoded in taken_twice:
        assert decoded.fault is None
        assert decoded.decode_seconds > 0
        for piece, pcm in zip(pieces, expected, strict=True):
            np.testing.assert_array_equal(piece.pcm, pcm)


async def test_faults_are_the_files_own(pool: DecodePool, tmp_path: Path) -> None:
    whole = file(tmp_path / "whole.flac")
    cut, text, faint = tmp_path / "cut.flac", tmp_path / "text.flac", tmp_path / "faint.wav"
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    text.write_text("no sound " * 100)
    faint.write_bytes(encode(noise(3.0) * 1e-4, 24_000))
    (pieces, decoded), (none, refused), (_, missing), (_, quiet) = await asyncio.gather(
        *(taken(pool, path) for path in (cut, text, tmp_path / "missing", faint))
    )
    assert pieces
    assert "cut short" in str(decoded.fault)
    assert not none
    assert isinstance(refused.fault, AudioError)
    assert isinstance(missing.fault, FileNotFoundError)
    assert quiet.fault is None
    assert "too faint" in quiet.silence
    assert not (await taken(pool, whole))[1].fault


async def test_a_channel_is_picked_there(pool: DecodePool, tmp_path: Path) -> None:
    path = tmp_path / "two.wav"
    path.write_bytes(encode(np.stack([noise(4.0), noise(4.0, seed=1)], axis=1), 24_000, "wav-float"))
    pieces, _ = await taken(pool, path, Selection(channels=2))
    np.testing.assert_allclose(np.concatenate([piece.pcm for piece in pieces[:1]])[:1_000], noise(4.0, seed=1)[:1_000])


async def test_decoding_waits_for_memory_and_goes_on(pool: DecodePool, tmp_path: Path) -> None:
    """With every piece held, decoding stops within the pool's bound; each release lets one more come."""
    path = file(tmp_path / "long.flac", 120.0)
    decoded = Decoded()
    pieces = pool.pieces(str(path), Selection(), decoded)
    bound = PIECES + 2 * 8
    held = [await anext(pieces) for _ in range(bound - 3)]  # three may be with the other process
    assert len(pool._free) + sum(len(process.blocks) for process in pool._processes) == 3
    waiting = asyncio.ensure_future(anext(pieces))
    for piece in held:
        piece.release()
    (await waiting).release()
    await pieces.aclose()
    assert len((await taken(pool, path))[0]) > bound


async def test_a_process_that_dies_costs_one_file(pool: DecodePool, tmp_path: Path) -> None:
    path = file(tmp_path / "long.flac", 120.0)
    decoded = Decoded()
    seen = 0
    async with asyncio.timeout(120):
        async for piece in pool.pieces(str(path), Selection(), decoded):
            piece.release()
            if not seen:
                busy = next(process for process in pool._processes if process.busy)
                assert busy.process is not None
                os.kill(busy.process.pid, signal.SIGKILL)
            seen += 1
    assert "the process that decodes it has ended (signal 9)" in str(decoded.fault)
    for _ in range(3):
        assert (await taken(pool, path))[1].fault is None


async def test_a_file_that_nobody_wants_any_more_frees_its_process_and_its_memory(pool: DecodePool, tmp_path: Path) -> None:
    path = file(tmp_path / "long.flac", 120.0)
    for _ in range(2 * PIECES):
        pieces = pool.pieces(str(path), Selection(), Decoded())
        (await anext(pieces)).release()
        await pieces.aclose()
    assert len((await taken(pool, path))[0]) > 20
    assert len(pool._free) + sum(len(process.blocks) for process in pool._processes) == PIECES + 2 * 8
