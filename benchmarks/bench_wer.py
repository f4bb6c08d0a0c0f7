#!/usr/bin/env python3
"""Word error rate and lag of the embedded model through the whole server, against the same model called on whole files.

    bench_wer.py FOLDER [--paced] [--streams 2] [--verbose]

FOLDER holds recordings and a MANIFEST.tsv with the columns file, language and transcript; the English ones are used. Each goes
through a server in a process of its own, over the WebSocket, in 80 ms messages followed by a marker. Directly, a file of up to
30 s is one call; a longer one is cut at the quietest place of each 5 s before that limit.

--paced: send in real time, and measure the lag from a word's end (as the server times it) to the arrival of its `EndWord`;
--streams files at once. Prints a table and, as its last line, one JSON document.
"""

import argparse
import asyncio
import csv
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import report
from numpy.typing import NDArray
from report import EMBEDDED

from moshi_stt.audio.decode import read_file
from moshi_stt.audio.resample import StreamingResampler
from moshi_stt.client import Client
from moshi_stt.constants import FRAME_SAMPLES, FRAME_SECONDS, SAMPLE_RATE
from moshi_stt.engine.recogniser import RECOGNISER_RATE
from moshi_stt.events import EndWord, Marker, Word
from moshi_stt.models.embedded import EmbeddedRecogniser, load_embedded
from moshi_stt.models.pronounce import spoken_forms
from moshi_stt.text.word_errors import word_errors

RAW_RATE = 16_000
"""Of headerless files: 16-bit mono."""

DIRECT_SECONDS, DIRECT_SEARCH_SECONDS = 30.0, 5.0
START_SECONDS = 60.0
LETTERS = {"missus": "mrs", "mister": "mr", "miz": "ms"}


class Recording(NamedTuple):
    name: str
    pcm: NDArray[np.float32]
    """(S,) at 24 kHz."""
    reference: list[str]


class Heard(NamedTuple):
    text: str
    lags: list[float]


def read_folder(folder: Path) -> list[Recording]:
    """The English recordings of a folder with a manifest."""
    with (folder / "MANIFEST.tsv").open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file, delimiter="\t") if row["language"] == "en" and row["transcript"]]
    return [Recording(row["file"], read_pcm(folder / row["file"]), normalise(row["transcript"])) for row in rows]


def read_pcm(path: Path) -> NDArray[np.float32]:
    if path.suffix != ".raw":
        return read_file(path)
    return resample(np.fromfile(path, "<i2").astype(np.float32) / np.float32(32_768), RAW_RATE, SAMPLE_RATE)


def resample(pcm: NDArray[np.float32], rate_in: int, rate_out: int) -> NDArray[np.float32]:
    resampler = StreamingResampler(rate_in, rate_out)
    return np.concatenate([resampler.feed(pcm), resampler.finish()])


def normalise(text: str) -> list[str]:
    """Words to compare: no case, no punctuation, hyphens open, numbers and titles in words."""
    pieces = re.split(r"[\s\-—–/]+", text.replace("’", "'"))
    words = [word.replace("'", "") for piece in pieces for word in spoken_forms(piece)]
    return [LETTERS.get(word, word) for word in words if word]


# ---- the model called directly ---------------------------------------------------------------------------------------


def direct(recogniser: EmbeddedRecogniser, pcm: NDArray[np.float32]) -> str:
    samples = resample(pcm, SAMPLE_RATE, RECOGNISER_RATE)
    return " ".join(word.text for piece in whole_pieces(samples) for word in recogniser.recognise(piece).words)


def whole_pieces(samples: NDArray[np.float32]) -> Iterator[NDArray[np.float32]]:
    """The samples, cut at the quietest 100 ms of the last seconds before the model's limit."""
    limit, search, window = (int(seconds * RECOGNISER_RATE) for seconds in (DIRECT_SECONDS, DIRECT_SEARCH_SECONDS, 0.1))
    while len(samples) > limit:
        energy = np.convolve(np.square(samples[limit - search : limit]), np.ones(window), "valid")
        cut = limit - search + int(energy.argmin()) + window // 2
        yield samples[:cut]
        samples = samples[cut:]
    yield samples


# ---- through the server ----------------------------------------------------------------------------------------------


@contextmanager
def server() -> Iterator[str]:
    """A worker with the built-in configuration, in a process of its own; its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "moshi_stt", "worker", "--addr", "127.0.0.1", "--port", str(port), "--silent"]
    process = subprocess.Popen(command)
    try:
        deadline = time.monotonic() + START_SECONDS
        while not is_ready(port):
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"the server did not start: {' '.join(command)}")
            time.sleep(0.1)
        yield f"ws://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(30)


def is_ready(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


async def through(url: str, pcm: NDArray[np.float32], paced: bool) -> Heard:
    """One recording over the WebSocket. The lags are of the words' ends, in seconds, where it was paced."""
    words: list[str] = []
    ends: list[tuple[float, float]] = []
    async with Client(url) as client:
        begun = time.monotonic()
        sending = asyncio.create_task(send(client, pcm, begun if paced else None))
        async for event in client:
            if isinstance(event, Word):
                words.append(event.text)
            elif isinstance(event, EndWord):
                ends.append((time.monotonic() - begun, event.stop_time))
            elif isinstance(event, Marker):
                break
        await sending
    return Heard(" ".join(words), [arrived - end for arrived, end in ends] if paced else [])


async def send(client: Client, pcm: NDArray[np.float32], begun: float | None) -> None:
    for index, start in enumerate(range(0, len(pcm), FRAME_SAMPLES)):
        if begun is not None:
            await asyncio.sleep(max(0.0, begun + (index + 1) * FRAME_SECONDS - time.monotonic()))
        await client.send_audio(pcm[start : start + FRAME_SAMPLES])
    await client.mark(1)


async def all_through(url: str, recordings: Sequence[Recording], paced: bool, streams: int) -> list[Heard]:
    free = asyncio.Semaphore(streams)

    async def one(recording: Recording) -> Heard:
        async with free:
            return await through(url, recording.pcm, paced)

    return list(await asyncio.gather(*(one(recording) for recording in recordings)))


# ---- the report ------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--paced", action="store_true", help="send in real time and measure the lag")
    parser.add_argument("--streams", type=int, default=2, metavar="N", help="files at once (default 2)")
    parser.add_argument("--verbose", action="store_true", help="print what was heard")
    args = parser.parse_args()
    recordings = read_folder(args.folder)
    recogniser = load_embedded(1)
    whole = [direct(recogniser, recording.pcm) for recording in recordings]
    recogniser.close()
    with server() as url:
        heard = asyncio.run(all_through(url, recordings, args.paced, args.streams))
    print(f"{'file':<28}{'seconds':>8}{'words':>7}{'direct':>8}{'server':>8}{'lag p50':>9}{'p95':>7}")
    totals, seconds = np.zeros(3, int), 0.0
    for recording, alone, served in zip(recordings, whole, heard, strict=True):
        counts = np.array(
            [len(recording.reference), *(word_errors(recording.reference, normalise(t)) for t in (alone, served.text))]
        )
        totals += counts
        seconds += len(recording.pcm) / SAMPLE_RATE
        lag = "{:9.2f}{:7.2f}".format(*np.percentile(served.lags, [50, 95])) if served.lags else ""
        print(f"{recording.name:<28}{len(recording.pcm) / SAMPLE_RATE:>8.1f}{counts[0]:>7}{counts[1]:>8}{counts[2]:>8}{lag}")
        if args.verbose:
            print(f"    direct: {alone}\n    server: {served.text}")
    wer = [100 * float(count) / float(totals[0]) for count in totals[1:]]
    lags = [lag for served in heard for lag in served.lags]
    p50, p95 = (float(value) for value in np.percentile(lags, [50, 95])) if lags else (None, None)
    print(f"{'all':<28}{seconds:>8.1f}{totals[0]:>7}{wer[0]:>7.2f}%{wer[1]:>7.2f}%" + (f"{p50:9.2f}{p95:7.2f}" if lags else ""))
    result = {**EMBEDDED, "files": len(recordings), "words": int(totals[0]), "seconds": round(seconds, 1)}
    result |= {"wer_direct": round(wer[0], 2), "wer_server": round(wer[1], 2), "streams": args.streams}
    result |= {"lag_p50_s": p50 and round(p50, 3), "lag_p95_s": p95 and round(p95, 3)}
    report.finish("wer", result)


if __name__ == "__main__":
    main()
