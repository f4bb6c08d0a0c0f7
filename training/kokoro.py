"""Speaks with Kokoro-82M, the slow one of the engines, on as many cores as there are.

What to say is prepared first (`plan`, which needs hibari's and espeak-ng's phonemes, and espeak-ng's readings for the words'
times), so that the speaking can happen on another machine (`speak`, which needs ONNX Runtime alone).

    python -m training.kokoro plan JOBS.npz --readings READINGS.npz --voices FOLDER --seed 1
    python -m training.kokoro speak JOBS.npz OUT --readings READINGS.npz --model kokoro.onnx --processes 16 --seconds 200
"""

import argparse
import json
import multiprocessing
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from training.alignment import Reading, align, joined, reading_of
from training.clips import write_shard
from training.vocabulary import DIGITS, ENGLISH, FRENCH
from training.voices import HELD_OUT_KOKORO, Clip, Espeak, french_phonemes, kokoro_vocabulary, mixed_voice

SHARD = 100
STYLE = 256


class Job(NamedTuple):
    """One reading."""

    text: str
    language: str
    voice: str
    ids: list[int]
    style: NDArray[np.float32]
    speed: float


class Phonemes:
    """Texts to Kokoro's ids."""

    def __init__(self) -> None:
        from hibari import Hibari

        self._english = Hibari()
        self._vocabulary = kokoro_vocabulary()

    def __call__(self, text: str, language: str) -> list[int]:
        phonemes = " ".join(self._english.phonemize(text)) if language == "en" else french_phonemes(text)
        return [self._vocabulary[c] for c in phonemes if c in self._vocabulary]


class Styles:
    """The voices, as one vector for each length of text."""

    def __init__(self, folder: Path) -> None:
        """folder: `voices` of npm's kokoro-js."""
        self._styles = {path.stem: np.fromfile(path, np.float32).reshape(-1, STYLE) for path in sorted(folder.glob("*.bin"))}
        self.english = [name for name in self._styles if name[0] in "ab"]
        self.every = list(self._styles)

    def mixed(self, voice: list[tuple[str, float]], length: int) -> NDArray[np.float32]:
        return np.asarray(sum(share * self._styles[name][length] for name, share in voice), np.float32)

    def french(self, rng: random.Random) -> list[tuple[str, float]]:
        """The one French voice, alone or with a share of another."""
        if rng.random() < 0.25:
            return [("ff_siwis", 1.0)]
        other = rng.choice([name for name in self.every if name != "ff_siwis" and name not in HELD_OUT_KOKORO])
        share = rng.uniform(0.45, 0.8)
        return [("ff_siwis", share), (other, 1 - share)]


def plan(styles: Styles, rng: random.Random, digits: int, english: int, french: int) -> list[Job]:
    """The jobs in the order of their doing: kinds mixed, so that what is done when time is up is a part of everything."""
    phonemes = Phonemes()
    jobs: list[Job] = []

    def add(text: str, spoken: str, language: str, voice: list[tuple[str, float]], speed: float) -> None:
        ids = phonemes(spoken, language)
        name = "+".join(name for name, _ in voice)
        jobs.append(Job(text, language, f"kokoro:{name}", ids, styles.mixed(voice, len(ids)), speed))

    for i in range(digits):
        voice = (
            [(styles.english[i], 1.0)]
            if i < len(styles.english)
            else mixed_voice(rng, rng.choice((styles.english, styles.every)))
        )
        for text in DIGITS if i % 8 == 0 else ():
            add(text, text, "en", voice, rng.uniform(0.75, 1.15))
        order = rng.sample(DIGITS, len(DIGITS))
        add(" ".join(order), rng.choice((". ", ", ", "; ")).join(order) + ".", "en", voice, rng.uniform(0.75, 1.1))
    for i in range(english):
        text = ENGLISH[i % len(ENGLISH)]
        voice = [(rng.choice(HELD_OUT_KOKORO), 1.0)] if i % 14 == 0 else mixed_voice(rng, styles.english)
        add(text, text, "en", voice, rng.uniform(0.8, 1.25))
    for i in range(french):
        text = FRENCH[i % len(FRENCH)]
        add(text, text, "fr", styles.french(rng), rng.uniform(0.8, 1.2))
    rng.shuffle(jobs)
    return jobs


def readings() -> dict[tuple[str, str], Reading]:
    """espeak-ng's reading of everything there is to say, by language and text; a list of digits is made of its digits."""
    espeak = Espeak()
    texts = [("en", text) for text in (*DIGITS, *ENGLISH)] + [("fr", text) for text in FRENCH]
    accents = {"en": "en-us", "fr": "fr-fr"}
    return {(language, text): reading_of(espeak.say(text, accents[language], "", 150, 50, 50)) for language, text in texts}


def save_readings(path: Path, found: dict[tuple[str, str], Reading]) -> None:
    index = [[*key, reading.words, reading.rows] for key, reading in found.items()]
    mels = {f"mel{i}": np.clip(reading.mel * 24, -127, 127).astype(np.int8) for i, reading in enumerate(found.values())}
    np.savez_compressed(path, index=json.dumps(index), **mels)  # type: ignore[arg-type]


def load_readings(path: Path) -> dict[tuple[str, str], Reading]:
    with np.load(path) as file:
        index = json.loads(str(file["index"]))
        mels = [file[f"mel{i}"].astype(np.float32) / 24 for i in range(len(index))]
    return {(row[0], row[1]): Reading(mel, tuple(row[2]), tuple(row[3])) for row, mel in zip(index, mels, strict=True)}


def save_jobs(path: Path, jobs: list[Job]) -> None:
    index = [[job.text, job.language, job.voice, job.ids, job.speed] for job in jobs]
    np.savez_compressed(path, index=json.dumps(index), styles=np.stack([job.style for job in jobs]).astype(np.float16))


def load_jobs(path: Path) -> list[Job]:
    with np.load(path) as file:
        styles = file["styles"].astype(np.float32)
        index = json.loads(str(file["index"]))
    return [Job(*row[:4], style, row[4]) for row, style in zip(index, styles, strict=True)]


_session: Any = None
_readings: dict[tuple[str, str], Reading] = {}


def _start(model: str, known: str) -> None:
    import onnxruntime

    global _session, _readings
    _readings = load_readings(Path(known))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    _session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _speak(job: Job) -> Clip:
    feeds = {"tokens": np.array([[0, *job.ids, 0]]), "style": job.style[None], "speed": np.full(1, job.speed, np.float32)}
    samples = np.asarray(_session.run(None, feeds)[0], np.float32).reshape(-1)
    key = job.language, job.text
    reading = _readings[key] if key in _readings else joined([_readings["en", word] for word in job.text.split()])
    return align(Clip(samples, job.text, (), job.voice, job.language), reading)


def speak(jobs: list[Job], model: Path, known: Path, processes: int, seconds: float) -> Iterator[Clip]:
    """The clips as they come, until the time is up."""
    end = time.monotonic() + seconds
    with multiprocessing.get_context("spawn").Pool(processes, _start, (str(model), str(known))) as pool:
        for clip in pool.imap_unordered(_speak, jobs):
            yield clip
            if time.monotonic() > end:
                break


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    planning = commands.add_parser("plan")
    planning.add_argument("jobs", type=Path)
    planning.add_argument("--voices", type=Path, required=True)
    planning.add_argument("--seed", type=int, default=1)
    planning.add_argument("--digits", type=int, default=260)
    planning.add_argument("--english", type=int, default=1000)
    planning.add_argument("--french", type=int, default=520)
    speaking = commands.add_parser("speak")
    speaking.add_argument("jobs", type=Path)
    speaking.add_argument("out", type=Path)
    speaking.add_argument("--model", type=Path, required=True)
    speaking.add_argument("--processes", type=int, default=2)
    speaking.add_argument("--seconds", type=float, default=1e9)
    for command in (planning, speaking):
        command.add_argument("--readings", type=Path, required=True)
    args = parser.parse_args()
    if args.command == "plan":
        jobs = plan(Styles(args.voices), random.Random(args.seed), args.digits, args.english, args.french)
        save_jobs(args.jobs, jobs)
        save_readings(args.readings, readings())
        print(f"{len(jobs)} readings planned")
        return
    shard: list[Clip] = []
    number = 0
    for clip in speak(load_jobs(args.jobs), args.model, args.readings, args.processes, args.seconds):
        shard.append(clip)
        if len(shard) == SHARD:
            write_shard(args.out / f"{number:04}", shard)
            number, shard = number + 1, []
            print(f"kokoro: {number * SHARD} clips", flush=True)
    if shard:
        write_shard(args.out / f"{number:04}", shard)


if __name__ == "__main__":
    main()
