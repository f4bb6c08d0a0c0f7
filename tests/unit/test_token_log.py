"""Token logs: the files that moshi-server's users know, and a disk that is slow or full."""

import errno
import logging
import threading
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file
from tests.support.batch import noise
from tests.support.checkpoints import small_spec
from tests.support.scripted_backend import PseudoModel, spell

from moshi_stt.engine.backend import StepOutput, StepRecorder
from moshi_stt.engine.batch import BatchEngine
from moshi_stt.engine.commands import Audio, Finish
from moshi_stt.engine.engine import EngineInfo
from moshi_stt.engine.loaded import LoadedModel
from moshi_stt.engine.slots import spare_slots
from moshi_stt.models import token_log
from moshi_stt.models.token_log import TokenLog
from moshi_stt.text.words import WordAssembler

DEADLINE = 120.0
SPEC = small_spec().lm
START, PAD, K = SPEC.start_token, SPEC.pad_code, SPEC.codebooks
NEVER = 3_600.0
"""Only `stop` writes."""


def step(log: TokenLog, *rows: tuple[int, bool, int]) -> None:
    """rows: slot, fresh, and the token that comes out; codes are ten times the token, plus the codebook."""
    slots, fresh, text = (np.array(column) for column in zip(*rows, strict=True))
    log.record(slots.astype(np.int64), fresh.astype(np.bool_), text.astype(np.int64), codes(text))


def codes(text: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.asarray(text, np.int64)[:, None] * 10 + np.arange(K)


def written(base: Path) -> list[dict[str, NDArray[np.uint32]]]:
    """The files in the order of their numbers, from 0."""
    count = len(list(base.parent.iterdir())) if base.parent.is_dir() else 0
    return [load_file(f"{base}.{number}.safetensors") for number in range(count)]


def test_what_goes_in_at_each_step(tmp_path: Path) -> None:
    """As moshi-server: the start token and pads first, then what came out a step before. At rest: the last token, codes 0."""
    base = tmp_path / "logs" / "test-asr-1-2"
    log = TokenLog(base, SPEC, 3, NEVER)
    step(log, (0, True, 30))  # warming up
    log.start()
    step(log, (0, True, 11), (2, True, 12), (3, True, 39))  # slot 3 is a spare one
    step(log, (2, False, 13))
    step(log, (2, True, 14), (0, False, 15))
    log.stop()
    (file,) = written(base)
    assert {name: (values.dtype, values.shape) for name, values in file.items()} == {
        "text": (np.uint32, (3, 3)),
        "audio": (np.uint32, (3, K, 3)),
    }
    assert file["text"].tolist() == [[START, 11, 11], [START] * 3, [START, 12, START]]
    rest, pad = [0] * K, [PAD] * K
    assert file["audio"][0].T.tolist() == [pad, rest, codes(np.array([11]))[0].tolist()]
    assert file["audio"][1].T.tolist() == [rest] * 3
    assert file["audio"][2].T.tolist() == [pad, codes(np.array([12]))[0].tolist(), pad]


def test_streams_that_step_by_turns_share_columns(tmp_path: Path) -> None:
    """The file is no larger than if they stepped together; each slot's own steps stay in order."""
    base = tmp_path / "log"
    log = TokenLog(base, SPEC, 3, NEVER)
    log.start()
    for n in range(20):
        for slot in (n % 3, (n + 1) % 3, (n + 2) % 3):
            step(log, (slot, n == 0, 5 + n))
    log.stop()
    (file,) = written(base)
    assert 20 <= file["text"].shape[1] <= 30
    for slot in range(3):
        took_part = file["audio"][slot].any(axis=0)
        assert file["text"][slot][took_part].tolist() == [START, *range(5, 24)]


def test_a_file_every_so_often(tmp_path: Path) -> None:
    """While nothing is stepped no file is written; numbers have no gaps, and no step is lost between two files."""
    base = tmp_path / "log"
    log = TokenLog(base, SPEC, 1, 0.02)
    log.start()
    ended = threading.Event()

    def steps() -> None:
        n = 0
        while len(list(tmp_path.glob("log.*.safetensors"))) < 4:
            step(log, (0, n == 0, n % 30))
            n += 1
            ended.wait(0.001)
        ended.n = n  # type: ignore[attr-defined]
        ended.set()

    thread = threading.Thread(target=steps)
    thread.start()
    assert ended.wait(DEADLINE)
    thread.join()
    log.stop()
    text = np.concatenate([file["text"][0] for file in written(base)])
    assert text.tolist() == [START, *(n % 30 for n in range(ended.n - 1))]  # type: ignore[attr-defined]


def test_a_slow_disk_delays_no_step_and_fills_no_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What does not fit is dropped, and said; before that, a file is written ahead of its time."""
    arrived, resume = threading.Event(), threading.Event()
    write = token_log.write_tensors

    def slow(*args: object) -> None:
        arrived.set()
        assert resume.wait(DEADLINE)
        write(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(token_log, "write_tensors", slow)
    log = TokenLog(tmp_path / "log", SPEC, 1, NEVER, most_bytes=10 * 4 * (1 + K))
    log.start()
    for n in range(6):
        step(log, (0, n == 0, n))
    assert arrived.wait(DEADLINE)
    for n in range(25):
        step(log, (0, False, n))
        assert len(log._columns) <= 10
    resume.set()
    log.stop()
    first, second = written(tmp_path / "log")
    assert first["text"].shape[1] + second["text"].shape[1] + 20 == 31
    assert "20 columns were dropped" in caplog.text


def test_a_full_disk_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Said once, with the reason; and again when it works. No half of a file is left, and no number is left out."""
    caplog.set_level(logging.INFO)
    failed = threading.Semaphore(0)

    def full(descriptor: int) -> None:
        failed.release()
        raise OSError(errno.ENOSPC, "No space left on device")

    log = TokenLog(tmp_path / "log", SPEC, 1, 0.01)
    with monkeypatch.context() as patched:
        patched.setattr("os.fsync", full)
        log.start()
        for _ in range(3):
            step(log, (0, True, 7))
            assert failed.acquire(timeout=DEADLINE)
    for _ in range(3):  # one may still go to the full disk
        log._wake.wait(0.05)
    step(log, (0, True, 8))
    log.stop()
    assert [path.name for path in tmp_path.iterdir()] == ["log.0.safetensors"]
    warnings = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert "No space left on device; 1 columns are lost" in warnings[0]
    assert "could be written again" in caplog.text


class Recording(PseudoModel):
    """Tells a recorder, as real backends do."""

    recorder: StepRecorder | None = None

    def step(self, pcm: NDArray[np.float32], slots: NDArray[np.int64], fresh: NDArray[np.bool_]) -> StepOutput:
        output = super().step(pcm, slots, fresh)
        if self.recorder is not None:
            self.recorder.record(slots, fresh, output.text_token, codes(output.text_token))
        return output


async def test_an_engine_records_its_streams_alone(tmp_path: Path) -> None:
    """Not what it steps to warm up and to measure; all of it is there when the engine has stopped."""
    log = TokenLog(tmp_path / "log", SPEC, 2, NEVER)

    def load() -> LoadedModel:
        backend = Recording(2 + spare_slots(2))
        backend.recorder = log
        info = EngineInfo("batched_asr", "scripted", "", (), "", "", 2)
        return LoadedModel(backend, partial(WordAssembler, spell, 2), info, 2, 2, recorder=log)

    engine = BatchEngine(load)
    await engine.start()
    stream = engine.open()
    await stream.send(Audio(noise(30)))
    await stream.send(Finish())
    async for _ in stream:
        pass
    stream.close()
    await engine.stop()
    (file,) = written(tmp_path / "log")
    heard = file["audio"].any(axis=1)  # (slots, T)
    assert sorted(heard.sum(axis=1).tolist()) == [0, 33]  # with the delay's frames of silence, and one
    assert file["text"][heard.any(axis=1).argmax(), 0] == START
