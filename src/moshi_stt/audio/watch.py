"""Signs that a live stream is not the audio it should be, each said once. Knows nothing of messages, streams or logs.

It listens to the first 20 s of voiced sound and then nearly stops. What it looks at:

* scale: samples far beyond 1 (16-bit integers sent as they are), samples that are no numbers, next to no level;
* digital silence: nothing but zeros since the start, or zeros for a minute;
* pitch: a median far below or above any speaker's means that the audio runs slow or fast, so its rate is not 24 kHz. A woman's
  voice at half speed has a man's pitch, so pitch alone cannot tell all; a caller that sees words can ask for
  voice without words as well;
* the upper band: nothing above 4 kHz is telephone audio, said as a remark.
"""

from weakref import WeakSet

import numpy as np
from numpy.typing import NDArray

from moshi_stt.constants import FRAME_SAMPLES, SAMPLE_RATE

INTEGER_SCALE = 8.0
"""A sample beyond this is no float sample: full scale is 1."""
FAINT_PEAK = 2e-4
FAINT_SECONDS = 20
SILENT_START_SECONDS = 10
SILENT_LATER_SECONDS = 60
SLOW_PITCH_HZ, FAST_PITCH_HZ = 68.0, 450.0
"""Medians over seconds of speech: 80 to 250 Hz for adults, up to 350 Hz for small children."""
VOICED_BLOCKS = 60
"""Voiced blocks (80 ms) before pitch is judged."""
WORDLESS_BLOCKS = 125
"""Voiced blocks without a word before that is said; 10 s of vowels, some 20 s of speech."""
LAST_BLOCK = 250
"""Voiced blocks after which no more are looked at."""
LAST_LOOK = 1_500
"""Blocks above the noise, voiced or not, after which no more are looked at: two minutes."""

EASY_WATCHES = 16
"""Streams whose every block is listened to; of twice as many every second block, and so on: a thousand streams that begin at
once would otherwise keep a core busy."""

_FFT = 4_096
_HZ_PER_BIN = SAMPLE_RATE / _FFT
_WINDOW = np.hanning(FRAME_SAMPLES).astype(np.float32)
_PITCH_BAND = slice(round(30 / _HZ_PER_BIN), round(3_000 / _HZ_PER_BIN))
_SHORTEST_LAG, _LONGEST_LAG = SAMPLE_RATE // 800, SAMPLE_RATE // 40
_VOICED_PEAK = 0.6
_TELEPHONE_RATIO = 1e-5
_ACTIVE_POWER = 1e-6  # -60 dB of full scale


def _lag_weights() -> NDArray[np.float32]:
    """What the window alone does to the autocorrelation, to be divided out."""
    own = np.fft.irfft(np.abs(np.fft.rfft(_WINDOW, _FFT)) ** 2)[_SHORTEST_LAG:_LONGEST_LAG]
    full = float(np.sum(_WINDOW**2))
    return (full / np.maximum(own, 0.05 * full)).astype(np.float32)


_LAG_WEIGHTS = _lag_weights()


def _power(block: NDArray[np.float32]) -> NDArray[np.float32]:
    spectrum = np.fft.rfft(block * _WINDOW, _FFT)
    return (spectrum.real**2 + spectrum.imag**2).astype(np.float32)


def _pitch_of(power: NDArray[np.float32]) -> float | None:
    """Fundamental frequency in Hz (40 to 800) of a block's power, by autocorrelation; None where it is not voiced."""
    band = np.zeros_like(power)
    band[_PITCH_BAND] = power[_PITCH_BAND]
    correlation = np.fft.irfft(band)
    if correlation[0] <= 0:
        return None
    by_lag = correlation[_SHORTEST_LAG:_LONGEST_LAG] * _LAG_WEIGHTS / correlation[0]
    highest = by_lag.max()
    if highest < _VOICED_PEAK:
        return None
    inner = by_lag[1:-1]
    peaks = np.flatnonzero((inner >= 0.9 * highest) & (inner >= by_lag[:-2]) & (inner >= by_lag[2:]))
    return SAMPLE_RATE / float(_SHORTEST_LAG + 1 + peaks[0]) if len(peaks) else None  # the first: later ones are its multiples


_listening: "WeakSet[AudioWatch]" = WeakSet()
"""Every watch of this process that does not know its stream's rate yet."""


class AudioWatch:
    """Watches one stream. Feed it everything that the stream is fed."""

    def __init__(self) -> None:
        self._said: set[str] = set()
        self._samples = 0
        self._zero_run = 0
        self._peak = 0.0
        self._level_known = False
        self._block = np.empty(FRAME_SAMPLES, np.float32)
        self._filled = 0
        self._pitches: list[float] = []
        self._spectrum = np.zeros(_FFT // 2 + 1, np.float32)  # sum of the power of voiced blocks
        self._looks = 0
        self._rate_known = False
        self._blocks = 0
        _listening.add(self)

    @property
    def median_pitch_hz(self) -> float | None:
        return float(np.median(self._pitches)) if self._pitches else None

    def without_words(self) -> list[str]:
        """To be asked when everything fed has been transcribed, to not one word: the warning, if there was voice in it."""
        warnings: list[str] = []
        if len(self._pitches) >= WORDLESS_BLOCKS and not {"slow", "fast"} & self._said:
            self._say(
                "wordless",
                f"{self._samples / SAMPLE_RATE:.0f} s of audio with a voice in it and not one word: is it mono at 24 kHz, "
                f"and in a language of this model? (median pitch {self.median_pitch_hz:.0f} Hz)",
                warnings,
            )
        return warnings

    def feed(self, pcm: NDArray[np.float32]) -> list[str]:
        """pcm: float32 (S,) at what is said to be 24 kHz. Returns the warnings that are new, most often none."""
        warnings: list[str] = []
        if len(pcm):
            self._samples += len(pcm)
            if not self._level_known:
                self._look_at_level(pcm, warnings)
            self._look_for_silence(pcm, warnings)
            if not self._rate_known and not self._zero_run:
                self._look_at_rate(pcm, warnings)
        return warnings

    def _say(self, kind: str, text: str, warnings: list[str]) -> None:
        if kind not in self._said:
            self._said.add(kind)
            warnings.append(text)

    def _look_at_level(self, pcm: NDArray[np.float32], warnings: list[str]) -> None:
        peak = max(float(pcm.max()), -float(pcm.min()))
        if peak != peak or peak == float("inf"):
            self._say("numbers", "audio contains samples that are not numbers (NaN or infinite)", warnings)
            return
        self._peak = max(self._peak, peak)
        if self._peak > INTEGER_SCALE:
            self._say(
                "scale",
                f"audio samples reach {self._peak:.0f}, full scale is 1: 16-bit integers have to be divided by 32768",
                warnings,
            )
            self._level_known = True
        elif self._samples > FAINT_SECONDS * SAMPLE_RATE:
            if 0 < self._peak < FAINT_PEAK:
                self._say(
                    "faint",
                    f"audio is next to silent: in {FAINT_SECONDS} s no sample is beyond {self._peak:.1e} of full scale 1",
                    warnings,
                )
            self._level_known = self._peak > 0

    def _look_for_silence(self, pcm: NDArray[np.float32], warnings: list[str]) -> None:
        if pcm[-1] != 0 or pcm.any():
            self._zero_run = 0
            return
        self._zero_run += len(pcm)
        if self._zero_run == self._samples:
            if self._zero_run >= SILENT_START_SECONDS * SAMPLE_RATE:
                text = f"nothing but zeros in the first {SILENT_START_SECONDS} s of audio: is the right microphone on?"
                self._say("start", text, warnings)
        elif self._zero_run >= SILENT_LATER_SECONDS * SAMPLE_RATE:
            self._say("later", f"{SILENT_LATER_SECONDS} s of nothing but zeros: is the microphone still on?", warnings)

    def _look_at_rate(self, pcm: NDArray[np.float32], warnings: list[str]) -> None:
        start = 0
        while start < len(pcm) and not self._rate_known:
            taken = min(FRAME_SAMPLES - self._filled, len(pcm) - start)
            self._block[self._filled : self._filled + taken] = pcm[start : start + taken]
            self._filled += taken
            start += taken
            if self._filled == FRAME_SAMPLES:
                self._filled = 0
                self._blocks += 1
                if self._blocks % (1 + len(_listening) // EASY_WATCHES) == 0:
                    self._listen(warnings)
        if self._rate_known:
            _listening.discard(self)

    def _listen(self, warnings: list[str]) -> None:
        """One block of 80 ms."""
        block = self._block
        energy = float(block @ block)
        if not _ACTIVE_POWER * FRAME_SAMPLES < energy < INTEGER_SCALE**2 * FRAME_SAMPLES:
            return
        self._looks += 1
        self._rate_known = self._looks >= LAST_LOOK
        power = _power(block)
        hz = _pitch_of(power)
        if hz is None:
            return
        self._spectrum += power / power.sum()
        self._pitches.append(hz)
        voiced = len(self._pitches)
        if voiced >= VOICED_BLOCKS and voiced % 20 == 0:
            self._judge(voiced, warnings)
        self._rate_known |= voiced >= LAST_BLOCK or bool({"slow", "fast"} & self._said)

    def _judge(self, voiced: int, warnings: list[str]) -> None:
        hz = float(np.median(self._pitches))
        if hz < SLOW_PITCH_HZ:
            self._say(
                "slow",
                f"the voice runs slow (median pitch {hz:.0f} Hz): this looks like 48 or 44.1 kHz audio sent as 24 kHz; "
                "resample it to 24 kHz",
                warnings,
            )
        elif hz > FAST_PITCH_HZ:
            self._say(
                "fast",
                f"the voice runs fast (median pitch {hz:.0f} Hz): this looks like 8 or 16 kHz audio sent as 24 kHz; "
                "resample it to 24 kHz",
                warnings,
            )
        upper = float(self._spectrum[round(4_300 / _HZ_PER_BIN) :].sum())
        if upper < _TELEPHONE_RATIO * float(self._spectrum.sum()):
            self._say(
                "telephone",
                "nothing above 4 kHz: this looks like telephone audio, expect more errors "
                "(if it is not, check that it is not 48 kHz audio sent as 24 kHz)",
                warnings,
            )
