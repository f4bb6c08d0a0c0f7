"""Synthetic voices: what each engine needs, and one clip of one phrase from it.

Used when a model is trained, never by the server. Each engine comes in a Debian, PyPI or npm package; `MODEL_CARD.md` names
them with their licences. A clip is float32 at 24 kHz with the words' times where the engine tells them; `alignment` finds the
rest.
"""

import ctypes
import random
import subprocess
import tempfile
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

RATE = 24_000

ESPEAK_ENGLISH = ("en-us", "en-gb", "en-gb-x-rp", "en-gb-scotland", "en-gb-x-gbclan", "en-gb-x-gbcwmd", "en-029")
ESPEAK_FRENCH = ("fr-fr", "fr-be", "fr-ch")
ESPEAK_VARIANTS = (
    "",
    *[
        "adam",
        "Alex",
        "Alicia",
        "Andrea",
        "Andy",
        "Annie",
        "antonio",
        "aunty",
        "belinda",
        "benjamin",
        "boris",
        "caleb",
        "david",
        "Denis",
        "Diogo",
        "ed",
        "edward",
        "edward2",
        "Gene",
        "Gene2",
        "gustave",
        "Henrique",
        "Hugo",
        "iven",
        "iven2",
        "iven3",
        "iven4",
        "Jacky",
        "john",
        "kaukovalta",
        "Lee",
        "linda",
        "marcelo",
        "Marco",
        "Mario",
        "max",
        "Michael",
        "michel",
        "miguel",
        "Mike",
        "Mr",
        "Nguyen",
        "pablo",
        "paul",
        "pedro",
        "quincy",
        "rob",
        "robert",
        "sandro",
        "shelby",
        "steph",
        "steph2",
        "steph3",
        "Storm",
        "travis",
        "victor",
        "zac",
        "anika",
        "f1",
        "f2",
        "f3",
        "f4",
        "f5",
        "m1",
        "m2",
        "m3",
        "m4",
        "m5",
        "m6",
        "m7",
        "m8",
        "klatt",
        "klatt2",
        "klatt3",
        "klatt4",
        "klatt5",
        "klatt6",
        "norbert",
        "grandpa",
        "grandma",
    ],
)
HELD_OUT_VARIANTS = ("Andy", "belinda", "edward", "iven3", "linda", "Mario", "robert", "steph2", "f4", "m6", "klatt3", "victor")
"""espeak-ng variants that no training clip comes from."""
HELD_OUT_KOKORO = ("af_bella", "am_liam", "bf_lily", "bm_lewis")
HELD_OUT_OTHERS = ("flite:rms", "festival:cmu_us_slt_arctic_hts", "flite:slt")
FLITE = ("kal16", "awb", "rms", "slt")
FESTIVAL = ("kal_diphone", "ked_diphone", "cmu_us_slt_arctic_hts")
PICO = ("en-US", "en-GB", "fr-FR")
SHIFTED = "shifted:"
"""How the name of a voice begins that `shift` made of another one."""


class Timed(NamedTuple):
    """A word and where it is in its clip, in seconds."""

    text: str
    start: float
    end: float


@dataclass(frozen=True)
class Clip:
    """samples: float32 (S,) at 24 kHz. words: empty where the engine does not tell their times."""

    samples: NDArray[np.float32]
    text: str
    words: tuple[Timed, ...]
    voice: str
    language: str

    @property
    def held_out(self) -> bool:
        """Whether the voice is for tests alone."""
        return is_held_out(self.voice)


def is_held_out(voice: str) -> bool:
    engine, _, name = voice.removeprefix(SHIFTED).partition(":")
    if engine == "espeak":
        return name.partition("+")[2] in HELD_OUT_VARIANTS
    if engine == "kokoro":
        return any(part in HELD_OUT_KOKORO for part in name.split("+"))
    return voice in HELD_OUT_OTHERS


# ---- espeak-ng: a library that tells when each word begins -----------------------------------------------------------------


class _Event(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("id", ctypes.c_longlong),
    )


_WORD_EVENT, _SYNCHRONOUS, _UTF8, _RATE_PARAMETER, _PITCH_PARAMETER, _RANGE_PARAMETER = 1, 2, 1, 1, 3, 4


def espeak_library() -> tuple[ctypes.CDLL, bytes | None]:
    """Debian's library, or that of PyPI's espeakng-loader with the folder of its data.

    Raises OSError where neither is there.
    """
    try:
        return ctypes.CDLL("libespeak-ng.so.1"), None
    except OSError as error:
        try:
            import espeakng_loader
        except ImportError:
            raise error from None
        return ctypes.CDLL(espeakng_loader.get_library_path()), str(espeakng_loader.get_data_path()).encode()


class Espeak:
    """espeak-ng by its C library. One in a process."""

    def __init__(self) -> None:
        """Raises OSError where the library is not installed."""
        self._library, data = espeak_library()
        self._rate = self._library.espeak_Initialize(_SYNCHRONOUS, 0, data, 0)
        self._samples: list[NDArray[np.int16]] = []
        self._marks: list[tuple[int, int]] = []
        kind = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event))
        self._callback = kind(self._take)
        self._library.espeak_SetSynthCallback(self._callback)

    def _take(self, samples: Any, count: int, events: Any) -> int:
        if samples and count:
            self._samples.append(np.ctypeslib.as_array(samples, (count,)).copy())
        i = 0
        while events[i].type:
            if events[i].type == _WORD_EVENT:
                self._marks.append((events[i].text_position - 1, events[i].audio_position))
            i += 1
        return 0

    def say(self, text: str, accent: str, variant: str, words_a_minute: int, pitch: int, expression: int) -> Clip:
        """pitch and expression: 0 to 100, 50 is the voice's own. Word times are espeak's own events."""
        voice = f"{accent}+{variant}" if variant else accent
        self._library.espeak_SetVoiceByName(voice.encode())
        for parameter, value in ((_RATE_PARAMETER, words_a_minute), (_PITCH_PARAMETER, pitch), (_RANGE_PARAMETER, expression)):
            self._library.espeak_SetParameter(parameter, value, 0)
        self._samples, self._marks = [], []
        raw = text.encode()
        self._library.espeak_Synth(raw, len(raw) + 1, 0, 1, 0, _UTF8, None, None)
        sound = np.concatenate(self._samples).astype(np.float32) / 32_768
        starts = {position: ms / 1_000 for position, ms in reversed(self._marks)}
        words, positions = text.split(), []
        at = 0
        for word in words:  # espeak counts characters
            positions.append(text.index(word, at))
            at = positions[-1] + len(word)
        first, last = sounding(sound, self._rate)
        timed = _spread(words, [starts.get(position) for position in positions], first, last)
        language = "fr" if accent.startswith("fr") else "en"
        return Clip(resampled(sound, self._rate), text, timed, f"espeak:{accent}+{variant}", language)


def _spread(words: list[str], begins: list[float | None], first: float, last: float) -> tuple[Timed, ...]:
    """The words between their known beginnings; espeak joins some ("on the"), which share their time by their letters."""
    known = [i for i, begin in enumerate(begins) if i == 0 or begin is not None]
    timed: list[Timed] = []
    for i, following in zip(known, [*known[1:], len(words)], strict=True):
        start = max(first, begins[i] or 0.0)
        end = last if following == len(words) else max(start, begins[following] or 0.0)
        letters = np.cumsum([0, *(len(word) for word in words[i:following])])
        edges = start + (end - start) * letters / letters[-1]
        timed += [Timed(w, float(a), float(b)) for w, a, b in zip(words[i:following], edges, edges[1:], strict=False)]
    return tuple(timed)


# ---- flite and festival: programs ------------------------------------------------------------------------------------------


def flite(text: str, voice: str, stretch: float) -> Clip:
    """stretch: length of each sound, 1 as the voice has it."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.wav"
        command = ["flite", "-voice", voice, "--setf", f"duration_stretch={stretch}", "-t", text, "-o", str(out)]
        subprocess.run(command, check=True, capture_output=True, timeout=60)
        return _from_file(out, text, f"flite:{voice}")


def festival(texts: Sequence[str], voice: str, stretch: float) -> list[Clip]:
    """Many phrases in one run, since starting festival takes a second."""
    with tempfile.TemporaryDirectory() as folder:
        outs = [Path(folder) / f"{i}.wav" for i in range(len(texts))]
        script = [f"(voice_{voice})", f"(Parameter.set 'Duration_Stretch {stretch})"]
        script += [
            f'(utt.save.wave (utt.synth (Utterance Text "{text}")) "{out}")' for text, out in zip(texts, outs, strict=True)
        ]
        source = Path(folder) / "say.scm"
        source.write_text("\n".join(script))
        subprocess.run(["festival", "-b", str(source)], check=True, capture_output=True, timeout=600)
        return [_from_file(out, text, f"festival:{voice}") for text, out in zip(texts, outs, strict=True)]


def pico(text: str, language: str, speed: int, pitch: int) -> Clip:
    """SVOX Pico, one voice for each language of `PICO`. speed and pitch in percent of the voice's own."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.wav"
        said = f'<speed level="{speed}"><pitch level="{pitch}">{text}</pitch></speed>'
        subprocess.run(["pico2wave", "-l", language, "-w", str(out), said], check=True, capture_output=True, timeout=60)
        return _from_file(out, text, f"pico:{language}", language[:2])


def _from_file(path: Path, text: str, voice: str, language: str = "en") -> Clip:
    import soundfile

    samples, rate = soundfile.read(path, dtype="float32")
    return Clip(resampled(samples, rate), text, (), voice, language)


# ---- hibari and Kokoro: networks -------------------------------------------------------------------------------------------


class Hibari:
    """One English voice distilled from Kokoro, a hundred times faster."""

    def __init__(self) -> None:
        from hibari import Hibari as Engine

        self._engine = Engine()

    def say(self, text: str, speed: float) -> Clip:
        return Clip(np.asarray(self._engine(f"{text}.", speed=speed), np.float32), text, (), "hibari:heart", "en")


def french_phonemes(text: str) -> str:
    """espeak-ng's, without the tie bars and hyphens that Kokoro does not know."""
    command = ["espeak-ng", "-q", "--ipa", "-v", "fr-fr", text]
    said = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout
    return unicodedata.normalize("NFD", " ".join(said.split()).replace("-", "").replace("‿", ""))


def kokoro_vocabulary() -> dict[str, int]:
    """Phoneme to id; hibari has the same table."""
    import json

    import hibari

    table = json.loads((Path(hibari.__file__).parent / "assets" / "vocab.json").read_text(encoding="utf-8"))
    found: dict[str, int] = table.get("vocab", table)
    return found


def mixed_voice(rng: random.Random, names: Sequence[str], held_out: Sequence[str] = HELD_OUT_KOKORO) -> list[tuple[str, float]]:
    """One voice, or a mixture of two that makes a new timbre; never of a held-out one."""
    names = [name for name in names if name not in held_out]
    if rng.random() < 0.4:
        return [(rng.choice(names), 1.0)]
    first, second = rng.sample(names, 2)
    share = rng.uniform(0.3, 0.7)
    return [(first, share), (second, 1 - share)]


# ---- new timbres: WORLD, a vocoder ----------------------------------------------------------------------------------------


def shift(clip: Clip, variants: Sequence[tuple[int, float, float]]) -> Iterator[Clip]:
    """The clip as other people might say it, at the same times.

    variants: (number in the voice's name, pitch and formants as factors) of each.
    """
    import pyworld

    samples = clip.samples.astype(np.float64)
    pitch, times = pyworld.dio(samples, RATE)
    pitch = pyworld.stonemask(samples, pitch, times, RATE)
    envelope = pyworld.cheaptrick(samples, pitch, times, RATE)
    breath = pyworld.d4c(samples, pitch, times, RATE)
    bins = np.arange(envelope.shape[1])
    for number, higher, wider in variants:
        source = np.minimum(bins / wider, bins[-1])
        below = source.astype(int)
        above, part = np.minimum(below + 1, bins[-1]), source - below
        warped = np.exp((1 - part) * np.log(envelope[:, below]) + part * np.log(envelope[:, above]))
        sound = pyworld.synthesize(pitch * higher, np.ascontiguousarray(warped), breath, RATE)[: len(samples)].astype(
            np.float32
        )
        yield Clip(sound, clip.text, clip.words, f"{SHIFTED}{clip.voice}~{number}", clip.language)


# ---- sound -----------------------------------------------------------------------------------------------------------------


def resampled(samples: NDArray[np.float32], rate: int) -> NDArray[np.float32]:
    """At 24 kHz."""
    if rate == RATE:
        return samples
    from math import gcd

    from scipy.signal import resample_poly

    common = gcd(rate, RATE)
    return np.asarray(resample_poly(samples, RATE // common, rate // common), np.float32)


def sounding(samples: NDArray[np.float32], rate: int, below_db: float = 35.0) -> tuple[float, float]:
    """Where the sound begins and ends, in seconds: what is louder than `below_db` under the loudest 20 ms."""
    hop = rate // 100
    count = len(samples) // hop
    if count < 2:
        return 0.0, len(samples) / rate
    power = (samples[: count * hop].reshape(count, hop) ** 2).mean(1)
    loud = np.nonzero(power > power.max() * 10 ** (-below_db / 10))[0]
    return float(loud[0]) / 100, float(loud[-1] + 1) / 100
