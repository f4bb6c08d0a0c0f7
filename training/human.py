"""The human recordings: spoken digits of five people (Free Spoken Digit Dataset, CC BY-SA 4.0), found by MOSHI_STT_SHARED.

One speaker is kept from training altogether. The other speakers' first takes of each digit are kept for tests, too.
"""

import os
from pathlib import Path

from training.clips import write_shard
from training.vocabulary import DIGITS
from training.voices import RATE, Clip, Timed, resampled, sounding

HELD_OUT_SPEAKER = "jackson"
TEST_TAKES = 5
"""Of each digit by each training speaker."""


def shared_folder() -> Path | None:
    """The folder with `digits`, `audio` and `turns`: MOSHI_STT_SHARED, or `shared` beside the project.

    None where there is none.
    """
    named = os.environ.get("MOSHI_STT_SHARED")
    folder = Path(named) if named else Path(__file__).resolve().parents[2] / "shared"
    return folder if folder.is_dir() else None


def digit_clips(shared: Path) -> dict[str, list[Clip]]:
    """Clips by what they are for: `train`, `seen` (training speakers, other takes) and `unseen` (the speaker kept out)."""
    import soundfile

    parts: dict[str, list[Clip]] = {"train": [], "seen": [], "unseen": []}
    for path in sorted((shared / "digits" / "recordings").glob("*.wav")):
        digit, speaker, take = path.stem.split("_")
        samples, rate = soundfile.read(path, dtype="float32")
        samples = resampled(samples, rate)
        word = Timed(DIGITS[int(digit)], *sounding(samples, RATE, below_db=30))
        clip = Clip(samples, word.text, (word,), f"human:{speaker}", "en")
        part = "unseen" if speaker == HELD_OUT_SPEAKER else "seen" if int(take) < TEST_TAKES else "train"
        parts[part].append(clip)
    return parts


def write_digits(shared: Path, out: Path) -> None:
    """Each part into its own folder of shards."""
    for part, clips in digit_clips(shared).items():
        for start in range(0, len(clips), 250):
            write_shard(out / f"human-{part}" / f"{start // 250:04}", clips[start : start + 250])
