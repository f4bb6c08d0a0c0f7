#!/usr/bin/env python3
"""Whole archives through `moshi-stt transcribe -r`: hours of audio an hour, and where the time goes.

    bench_files.py [--shape 1b|tiny] [--hours 20] [--slots 1024] [--device auto] [--kv auto|bf16|fp8] [--reference] [--out FILE]
    bench_files.py --embedded [--hours 0.5] [--out FILE]
    bench_files.py --wer FOLDER --against FOLDER2 [--out FILE]

The first two make an archive of compressed speech (MP3, AAC, Opus and FLAC, 6 s to 25 min, in nested folders) from the sample
that comes with the package, and run it through the command's own code in this process, with a random checkpoint of Kyutai's
shape or with the embedded model. --reference: PyPI `moshi` at batch 64 in the same run, whose step is timed: 64 recordings in
step can go no faster. With --embedded also the model called directly, on whole pieces of up to 30 s, and the archive's longest
recordings one after the other by POST to a server in a process of its own.

Without a GPU: bench_files.py --shape tiny --device cpu --slots 64 --hours 0.2 --reference

The third transcribes nothing: FOLDER and FOLDER2 hold transcripts (`-f json`) of the recordings that FOLDER2's or --audio's
MANIFEST.tsv names, and the word error rates are compared by a bootstrap over files.

Busy is the share of the time between the first and the last piece in which a step ran; on a GPU also what nvidia-smi says.
Prints a table and, as its last line, one JSON document. Random weights say nothing about accuracy.
"""

import argparse
import csv
import difflib
import json
import logging
import multiprocessing
import os
import resource
import shutil
import subprocess
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import report
from file_stages import Stages
from numpy.typing import NDArray

from moshi_stt.constants import API_KEY_HEADER, DEFAULT_PATH, PUBLIC_KEY, SAMPLE_RATE
from moshi_stt.cores import usable_cores
from moshi_stt.server.runtime import run as run_loop
from moshi_stt.text.word_errors import word_errors

FORMATS = {
    "mp3": ("mp3", "libmp3lame", "fltp"),
    "m4a": ("ipod", "aac", "fltp"),
    "opus": ("ogg", "libopus", "flt"),
    "flac": ("flac", "flac", "s16"),
}
LENGTHS = (6.0, 6.0, 6.0, 15.0, 15.0, 40.0, 40.0, 90.0, 240.0, 600.0, 1_500.0)
"""Seconds of the recordings, over and over."""
DISTINCT = 48
"""Recordings that are encoded; the archive's others are the same bytes under other names."""
RATE = 48_000
DRAWS = 10_000
REFERENCE_ROWS = 64
ALONE, ALONE_SHARE = 24, 0.1
"""Recordings that are run one by one afterwards, to compare their words: at most so many, and such a share of the audio."""
REFERENCE_SECONDS = 60.0
"""What steps of PyPI `moshi` are timed for at most, the first ones excepted."""


# ---- the archive ---------------------------------------------------------------------------------------------------------


def encode(job: tuple[str, str, float, int]) -> float:
    """One recording: path, format, seconds, seed. Returns its seconds."""
    import av

    from moshi_stt.audio.decode import read_file
    from moshi_stt.audio.resample import StreamingResampler
    from moshi_stt.sample import sample_path

    path, name, seconds, seed = job
    resampler = StreamingResampler(SAMPLE_RATE, RATE)
    speech = resampler.feed(read_file(sample_path()))
    draw = np.random.default_rng(seed)
    pieces: list[NDArray[np.float32]] = []
    length = 0
    while length < seconds * RATE:
        pause = np.zeros(int(draw.uniform(0.2, 1.5) * RATE), np.float32)
        start = int(draw.uniform(0, 0.5) * len(speech))
        pieces += [speech[start:] * np.float32(draw.uniform(0.3, 1.0)), pause]
        length += len(speech) - start + len(pause)
    pcm = np.concatenate(pieces)[: round(seconds * RATE)]
    pcm += 0.001 * draw.standard_normal(len(pcm)).astype(np.float32)
    container_name, codec, sample_format = FORMATS[name]
    with av.open(path, "w", format=container_name) as container:
        stream = container.add_stream(codec, rate=RATE, layout="mono")
        stream.codec_context.format = sample_format
        converter = av.AudioResampler(sample_format, "mono", RATE)
        for first in range(0, len(pcm), 10 * RATE):
            frame = av.AudioFrame.from_ndarray(pcm[None, first : first + 10 * RATE], format="flt", layout="mono")
            frame.sample_rate, frame.pts = RATE, first
            for converted in converter.resample(frame):
                container.mux(stream.encode(converted))
        container.mux(stream.encode(None))
    return seconds


def make_archive(folder: Path, hours: float) -> tuple[int, float]:
    """Files and hours of an archive below a folder."""
    usual = [seconds for seconds in LENGTHS if seconds <= 450 * hours] or [LENGTHS[0]]
    lengths = [usual[index % len(usual)] for index in range(DISTINCT)]
    while sum(lengths) > 3_600 * hours and len(lengths) > 1:
        lengths.pop()
    names = list(FORMATS)
    store = folder.parent / "distinct"
    store.mkdir(parents=True, exist_ok=True)
    jobs = [
        (str(store / f"{index:03}.{names[index % len(names)]}"), names[index % len(names)], seconds, index)
        for index, seconds in enumerate(lengths)
    ]
    with ProcessPoolExecutor(usable_cores(), mp_context=multiprocessing.get_context("spawn")) as pool:
        list(pool.map(encode, sorted(jobs, key=lambda job: -job[2])))
    total, count = 0.0, 0
    while total < hours * 3_600:
        path, _, seconds, index = jobs[count % len(jobs)]
        target = folder / f"year{count % 7}" / f"box{count // 50 % 11}" / f"{count:06}-{index}{Path(path).suffix}"
        target.parent.mkdir(parents=True, exist_ok=True)
        os.link(path, target)
        total += seconds
        count += 1
    return count, total / 3_600


# ---- the run -------------------------------------------------------------------------------------------------------------


class Meter:
    """What the engine tells of its steps."""

    def __init__(self) -> None:
        self.first = self.last = 0.0
        self.busy = 0.0
        self.steps = self.rows = self.restarts = 0
        self.ended: list[tuple[float, float, int]] = []
        """When each step ended, its seconds and rows."""

    def stepped(self, seconds: float, rows: int) -> None:
        now = time.monotonic()
        self.first = self.first or now - seconds
        self.last = now
        self.busy += seconds
        self.steps += 1
        self.rows += rows
        self.ended.append((now, seconds, rows))

    def restarted(self) -> None:
        self.restarts += 1

    def course(self, parts: int = 20) -> list[tuple[float, float]]:
        """The share of the time in which a step ran, and rows a step, in each part of the run."""
        length = max(1e-9, self.last - self.first) / parts
        found: list[list[tuple[float, int]]] = [[] for _ in range(parts)]
        for end, seconds, rows in self.ended:
            found[min(parts - 1, int((end - self.first) / length))].append((seconds, rows))
        return [
            (round(sum(s for s, _ in steps) / length, 2), round(sum(r for _, r in steps) / max(1, len(steps))))
            for steps in found
        ]

    def __getattr__(self, name: str) -> Any:
        return lambda *_: None


@contextmanager
def gpu_busy(device: str) -> Iterator[list[tuple[float, float]]]:
    """When (monotonic seconds) and how busy (percent) nvidia-smi finds the GPU, five times a second, while the block runs."""
    found: list[tuple[float, float]] = []
    if shutil.which("nvidia-smi") is None or device == "cpu":
        yield found
        return
    gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "").partition(",")[0] or "0"
    command = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", f"--id={gpu}", "--loop-ms=200"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:

        def read() -> None:
            assert process.stdout is not None
            found.extend((time.monotonic(), float(line)) for line in process.stdout if line.strip().isdigit())

        threading.Thread(target=read, daemon=True).start()
        try:
            yield found
        finally:
            process.terminate()


def thread_seconds(native_id: int | None) -> float | None:
    """CPU seconds of a thread of this process; None where the system does not say."""
    try:
        fields = Path(f"/proc/self/task/{native_id}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def run_archive(folder: Path, out: Path, flags: list[str]) -> dict[str, Any]:
    """The command's own code over the archive."""
    from moshi_stt.cli import transcribe, transcribers

    parser = argparse.ArgumentParser()
    transcribe.add_parser(parser.add_subparsers())
    args = parser.parse_args(["transcribe", "-r", str(folder), "-o", str(out), "-f", "json", "--quiet", *flags])
    meter, threads = Meter(), dict[str, int | None]()
    begun = time.monotonic()
    ready = [0.0]
    enter = transcribers.InProcess.__aenter__
    leave = transcribers.InProcess.__aexit__
    about: dict[str, Any] = {}
    stages = Stages()

    async def entered(self: Any) -> Any:
        await enter(self)
        self._engine.observer = meter
        about.update(slots=self._engine.total_slots, device=self._engine.info.device, jobs=self.jobs)
        about["decoders"] = len(self._pool._processes) if self._pool is not None else 0
        ready[0] = time.monotonic()
        stages.__enter__()
        return self

    async def left(self: Any, *error: Any) -> None:
        stages.__exit__()
        threads.update({thread.name: thread.native_id for thread in threading.enumerate()})
        about["cpu of threads"] = {name: thread_seconds(number) for name, number in threads.items()}
        await leave(self, *error)

    transcribers.InProcess.__aenter__ = entered  # type: ignore[method-assign, assignment]
    transcribers.InProcess.__aexit__ = left  # type: ignore[method-assign, assignment]
    try:
        archive = transcribe.Archive(args, [str(folder)])
        listed = time.monotonic()
        with gpu_busy("cuda") as busy:
            status = await archive.run()
    finally:
        transcribers.InProcess.__aenter__ = enter  # type: ignore[method-assign]
        transcribers.InProcess.__aexit__ = leave  # type: ignore[method-assign]
    if status:
        raise SystemExit("some recordings failed")
    span = max(1e-9, meter.last - meter.first)
    between = [percent for moment, percent in busy if meter.first <= moment <= meter.last]
    found = {
        "seconds_audio": archive._seconds,
        "files": len(archive.items),
        "listing_s": listed - begun,
        "loading_s": ready[0] - listed,
        "first_to_last_s": span,
        "real_time_factor": archive._seconds / span,
        "with_loading": archive._seconds / (time.monotonic() - begun),
        "gpu_busy_smi": float(np.mean(between)) / 100 if between else None,
    }
    return about | stages.result() | found | costs(meter, span, stages.result()["cores_in_use"])


def costs(meter: Meter, span: float, cores: float) -> dict[str, Any]:
    """What the model and the processes worked in these seconds. cores: in use on the average."""
    own, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "step_busy": meter.busy / span,
        "course": meter.course(),
        "limit": limit_of(meter.busy / span, cores),
        "steps": meter.steps,
        "restarts": meter.restarts,
        "rows_a_step": meter.rows / max(1, meter.steps),
        "step_ms": 1e3 * meter.busy / max(1, meter.steps),
        "cpu_s": own.ru_utime + own.ru_stime,
        "cpu_decoders_s": children.ru_utime + children.ru_stime,
    }


def limit_of(step_busy: float, cores: float) -> str:
    """What a faster machine would have more of."""
    if step_busy > 0.9:
        return "the model: a step runs all the time"
    return "cores: none is free" if cores > 0.9 * usable_cores() else "neither the model nor the cores: waiting"


def run_alone(folder: Path, out: Path, flags: list[str]) -> dict[str, Any]:
    """Some of the recordings one by one; how far their words are those of the archive's run."""
    from moshi_stt.cli import transcribe

    everything = sorted(path for path in folder.rglob("*") if path.is_file())
    seconds = {
        path: json.loads((out / path.relative_to(folder)).with_suffix(".json").read_text())["duration"] for path in everything
    }
    paths, left = [], ALONE_SHARE * sum(seconds.values())
    for path in sorted(everything[: 11 * ALONE : 11], key=lambda path: seconds[path]):
        left -= seconds[path]
        if left < 0 and paths:
            break
        paths.append(path)
    parser = argparse.ArgumentParser()
    transcribe.add_parser(parser.add_subparsers())
    with tempfile.TemporaryDirectory() as other:
        args = parser.parse_args(
            ["transcribe", *map(str, paths), "-o", f"{other}/", "-f", "json", "--quiet", "--jobs", "1", *flags]
        )
        items = [transcribe.Item(str(path), {"json": Path(other) / f"{path.stem}.json"}) for path in paths]
        run_loop(transcribe._Files(args, items).run())
        ratios = []
        for path, item in zip(paths, items, strict=True):
            alone = words_of(item.outputs["json"])
            together = words_of((out / path.relative_to(folder)).with_suffix(".json"))
            if alone != together:
                print(f"{path.relative_to(folder)} alone and in the archive:", first_difference(alone, together))
            ratios.append(difflib.SequenceMatcher(None, alone, together, autojunk=False).ratio())
    return {
        "alone_files": len(paths),
        "alone_same": sum(ratio == 1 for ratio in ratios),
        "alone_agreement": float(np.mean(ratios)),
    }


def first_difference(ours: list[str], theirs: list[str]) -> str:
    """Where two lists of words part, and by how much."""
    same = next((index for index, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]), None)
    index = min(len(ours), len(theirs)) if same is None else same
    matcher = difflib.SequenceMatcher(None, ours, theirs, autojunk=False)
    parts = sum(code[0] != "equal" for code in matcher.get_opcodes())
    return f"{len(ours)} and {len(theirs)} words, {parts} places differ, the first at word {index}"


def words_of(path: Path) -> list[str]:
    return [word["text"] for word in json.loads(path.read_text(encoding="utf-8"))["words"]]


# ---- what stands beside it -----------------------------------------------------------------------------------------------


def reference(shape: str, device: str) -> dict[str, Any]:
    """PyPI `moshi`: 64 recordings in step, at the time of its step with full contexts."""
    import torch
    from bench_step import Reference

    try:
        made = Reference(shape, torch.device(device), torch.bfloat16 if device != "cpu" else torch.float32)
    except ImportError:
        return {"reference": "moshi is not installed"}
    taken = made.times(REFERENCE_ROWS, 20, REFERENCE_SECONDS)["total"]
    return {
        "reference_rows": REFERENCE_ROWS,
        "reference_step_ms": taken,
        "reference_real_time_factor": 80 * REFERENCE_ROWS / taken,
    }


def direct(folder: Path, seconds: float = 300.0) -> dict[str, Any]:
    """The embedded model called on whole pieces, on one thread."""
    from bench_wer import resample, whole_pieces

    from moshi_stt.audio.decode import read_file
    from moshi_stt.engine.recogniser import RECOGNISER_RATE
    from moshi_stt.models.embedded import load_embedded

    recogniser = load_embedded(1)
    audio, begun = 0.0, time.process_time()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        pcm = read_file(path)
        for piece in whole_pieces(resample(pcm, SAMPLE_RATE, RECOGNISER_RATE)):
            recogniser.recognise(piece)
            audio += len(piece) / RECOGNISER_RATE
            if audio >= seconds:
                return {"direct_real_time_factor_a_core": audio / (time.process_time() - begun)}
    return {"direct_real_time_factor_a_core": audio / (time.process_time() - begun)}


def by_post(folder: Path, out: Path, most: int = 3) -> dict[str, Any]:
    """The longest recordings, one after the other, by POST to a server with the embedded model."""
    from bench_wer import server

    lengths = {path: json.loads(path.read_text())["duration"] for path in out.rglob("*.json")}
    longest = sorted(lengths, key=lambda path: -lengths[path])[:most]
    recordings = [next(folder.glob(f"{path.relative_to(out).with_suffix('')}.*")) for path in longest]
    before, taken = resource.getrusage(resource.RUSAGE_CHILDREN), 0.0
    with server() as url:
        post(url, encoded_second())  # the codecs are loaded
        idle = time.monotonic()
        for recording in recordings:
            post(url, recording.read_bytes())
        taken = time.monotonic() - idle
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    seconds = sum(lengths[path] for path in longest)
    return {
        "post_files": len(longest),
        "post_seconds_audio": seconds,
        "post_real_time_factor": seconds / taken,
        "post_audio_s_a_cpu_s": seconds / cpu,
    }


def encoded_second() -> bytes:
    from moshi_stt.sample import sample_path

    return Path(sample_path()).read_bytes()


def post(url: str, data: bytes) -> None:
    address = url.replace("ws://", "http://") + DEFAULT_PATH
    request = urllib.request.Request(address, data, {API_KEY_HEADER: PUBLIC_KEY})
    with urllib.request.urlopen(request, timeout=3_600) as answer:
        answer.read()


# ---- word error rates ----------------------------------------------------------------------------------------------------


def compare(ours: Path, theirs: Path, audio: Path) -> dict[str, Any]:
    """Word error rates of two folders of transcripts, and the difference with its 95 % interval, by a bootstrap over files."""
    from bench_wer import direct as call_directly
    from bench_wer import normalise, read_pcm

    from moshi_stt.models.embedded import load_embedded

    with (audio / "MANIFEST.tsv").open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file, delimiter="\t") if row["language"] == "en" and row["transcript"]]
    recogniser = load_embedded(1)
    counts = []
    print(f"{'file':<28}{'words':>7}{'ours':>7}{'theirs':>8}{'direct':>8}")
    for row in rows:
        expected, stem = normalise(row["transcript"]), Path(row["file"]).stem
        heard = [normalise(json.loads((folder / f"{stem}.json").read_text("utf-8"))["text"]) for folder in (ours, theirs)]
        heard.append(normalise(call_directly(recogniser, read_pcm(audio / row["file"]))))
        counts.append([len(expected), *(word_errors(expected, each) for each in heard)])
        print(f"{row['file']:<28}{counts[-1][0]:>7}{counts[-1][1]:>7}{counts[-1][2]:>8}{counts[-1][3]:>8}")
    table = np.array(counts)
    total = table.sum(axis=0)
    drawn = table[np.random.default_rng(0).integers(0, len(table), (DRAWS, len(table)))].sum(axis=1)
    differences = 100 * (drawn[:, 1] - drawn[:, 2]) / drawn[:, 0]
    low, high = (float(value) for value in np.percentile(differences, [2.5, 97.5]))
    wer = [100 * float(count) / float(total[0]) for count in total[1:]]
    print(f"word error rate: {wer[0]:.2f} %, theirs {wer[1]:.2f} %, the model called directly {wer[2]:.2f} %")
    print(f"loss: {wer[0] - wer[1]:+.2f} points, 95 % interval {low:+.2f} to {high:+.2f}")
    return {"wer": wer[0], "wer_theirs": wer[1], "wer_direct": wer[2], "loss_low": low, "loss_high": high, "files": len(table)}


# ---- the report ----------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=["1b", "tiny", "2.6b"], default="1b")
    parser.add_argument("--hours", type=float, default=20.0)
    parser.add_argument("--slots", type=int, default=1_024)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--kv", default="auto")
    parser.add_argument("--embedded", action="store_true")
    parser.add_argument("--reference", action="store_true")
    parser.add_argument("--wer", type=Path, metavar="FOLDER")
    parser.add_argument("--against", type=Path, metavar="FOLDER")
    parser.add_argument("--audio", type=Path, metavar="FOLDER", help="recordings and MANIFEST.tsv, for --wer")
    parser.add_argument("--checkpoint", type=Path, metavar="FOLDER", help="keep the random checkpoint here")
    parser.add_argument("--out", type=Path, metavar="FILE")
    args = parser.parse_args()
    logging.disable(logging.WARNING)  # a turn that files make long disturbs nobody
    result: dict[str, Any] = {"usable_cores": usable_cores()}
    if args.wer:
        result |= compare(args.wer, args.against, args.audio or args.against)
    else:
        with tempfile.TemporaryDirectory() as made:
            result |= measure(args, Path(made))
    for key, value in result.items():
        print(f"{key:<32}{value:.4g}" if isinstance(value, float) else f"{key:<32}{value}")
    report.finish("files", result, args.out)


def measure(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    folder, out = work / "archive", work / "out"
    begun = time.monotonic()
    count, hours = make_archive(folder, args.hours)
    print(f"{count} files, {hours:.2f} h of audio, made in {time.monotonic() - begun:.0f} s", flush=True)
    if args.embedded:
        result = {"model": "embedded"} | run_loop(run_archive(folder, out, []))
        return result | direct(folder) | by_post(folder, out)
    import torch
    from random_weights import write_checkpoint, write_toml

    device = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    checkpoint: Path = args.checkpoint or work / "checkpoint"
    if not (checkpoint / "tokenizer.model").exists():
        write_checkpoint(args.shape, checkpoint, torch.device(device))
    engine = {"device": device, "kv_dtype": args.kv}
    flags = ["--config", str(write_toml(args.shape, checkpoint, slots=args.slots, engine=engine))]
    result = {"model": f"random weights of the {args.shape}"} | run_loop(run_archive(folder, out, flags))
    report.finish("files", result, args.out)  # what follows may take longer than there is time
    result |= run_alone(folder, out, flags)
    return result | (reference(args.shape, device) if args.reference else {})


if __name__ == "__main__":
    main()
