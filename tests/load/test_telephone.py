"""Telephone audio: G.711 costs next to nothing compared with 8 kHz linear samples, over more than five hundred words."""

import csv
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from moshi_stt.audio.decode import read_file
from moshi_stt.audio.g711 import ALAW, MULAW
from moshi_stt.audio.live import PcmFormat, PcmInput
from moshi_stt.audio.resample import StreamingResampler
from moshi_stt.config_load import embedded_config
from moshi_stt.engine.recording import transcribe_recording
from moshi_stt.engines import build_engines
from moshi_stt.text.word_errors import word_errors
from moshi_stt.text.word_lists import plain

RATE = 8_000


def telephone(path: Path) -> NDArray[np.int16]:
    """A recording at 8 kHz, int16 (S,)."""
    pcm = read_file(path)
    resampler = StreamingResampler(24_000, RATE)
    narrow = np.concatenate([resampler.feed(pcm), resampler.finish()])
    return (np.clip(narrow, -1, 1) * 32_767).astype(np.int16)


def encode(samples: NDArray[np.int16], table: NDArray[np.float32]) -> bytes:
    """The nearest code of each sample."""
    order = np.argsort(table, kind="stable")
    levels = table[order]
    wanted = samples.astype(np.float32) / 32_768
    right = np.clip(np.searchsorted(levels, wanted), 1, 255)
    nearer_left = wanted - levels[right - 1] <= levels[right] - wanted
    return bytes(order[np.where(nearer_left, right - 1, right)].astype(np.uint8))


def at_24_khz(data: bytes, encoding: str) -> NDArray[np.float32]:
    """As every door converts it."""
    conversion = PcmInput(PcmFormat(encoding, RATE))  # type: ignore[arg-type]
    return np.concatenate([*(piece for (piece,) in conversion.feed(data)), *conversion.flush()])


def words_of(text: str) -> list[str]:
    return [word for part in text.replace("-", " ").split() if (word := plain(part))]


@pytest.mark.timeout(600)
async def test_g711_is_within_one_word_in_a_hundred_of_linear(shared: Path) -> None:
    with (shared / "audio" / "MANIFEST.tsv").open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file, delimiter="\t") if row["language"] == "en" and row["file"][-3:] != "raw"]
    engine = build_engines(embedded_config())["asr"]
    await engine.start()
    wrong = {"linear16": 0, "mulaw": 0, "alaw": 0}
    count = 0
    try:
        for row in rows:
            samples = telephone(shared / "audio" / row["file"])
            reference = words_of(row["transcript"])
            count += len(reference)
            forms = {"linear16": samples.tobytes(), "mulaw": encode(samples, MULAW), "alaw": encode(samples, ALAW)}
            for name, data in forms.items():
                heard = await transcribe_recording(engine, [at_24_khz(data, name)])
                wrong[name] += word_errors(reference, words_of(" ".join(word.text for word in heard)))
    finally:
        await engine.stop()
    print(f"{count} words; word errors {wrong}")
    assert count >= 500
    assert wrong["mulaw"] - wrong["linear16"] <= count / 100
    assert wrong["alaw"] - wrong["linear16"] <= count / 100
