"""Audio files of any common format to 24 kHz PCM, a piece at a time.

PyAV brings its own codecs, so no ffmpeg has to be installed. Encoder delay and padding are taken out by the demuxers, and
silence stands where a file's own clock skips time, so that times are those of a player.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import av
import numpy as np
from numpy.typing import NDArray

from moshi_stt.audio.container import Reader, Source, audio_stream, duration_of, open_container, reason_of, track_name
from moshi_stt.audio.mix import Mixer
from moshi_stt.audio.resample import StreamingResampler, to_float
from moshi_stt.audio.selection import Selection
from moshi_stt.constants import SAMPLE_RATE
from moshi_stt.errors import AudioError

_TOLERANCE_SECONDS: Final = {
    "wav": 0.05,
    "w64": 0.05,
    "flac": 0.05,
    "aiff": 0.05,
    "au": 0.05,
    "caf": 0.5,
    "wv": 0.3,
    "tta": 0.3,
}
"""By how much less audio may come than the header announces, for formats whose headers do not estimate."""
_MP3_SAMPLES: Final = 4_608
"""What the encoder's delay and padding may take from the length that an MP3 file announces."""
_MATROSKA_SECONDS: Final = 0.5
_WITHOUT_GAPS: Final = {"wav", "w64", "flac", "aiff", "au", "mp3"}

_SAFE_PLANES: Final = 7
"""PyAV 18 looks for a null pointer after the last plane, and reads past the end where there are eight or more."""
_LOUDEST: Final = float(1 << 31)
"""No sample format has larger values: beyond it a sample is taken for 0."""
_BLOCK_SECONDS: Final = 0.5
"""Sound that is mixed and resampled at once."""
_PIECE_SAMPLES: Final = SAMPLE_RATE
_SHORTEST_GAP_SECONDS: Final = 0.1
_LONGEST_GAP_SECONDS: Final = 3_600.0
_MOST_FAILURES: Final = 10
"""Of the demuxer, one after the other, before it is given up."""
_EMPTY: NDArray[np.float32] = np.zeros((0, 1), np.float32)


@dataclass(frozen=True)
class AudioInfo:
    """What a file says of itself. duration_seconds: None where it does not say. tracks: names of its audio tracks."""

    format: str
    codec: str
    sample_rate: int
    channels: int
    duration_seconds: float | None
    tracks: tuple[str, ...] = ()


def decode_file(
    source: Source, selection: Selection | None = None, remarks: list[str] | None = None
) -> Iterator[NDArray[np.float32]]:
    """Decode a path or a binary file object (which may be a pipe) to pieces of 24 kHz audio, a second or so each.

    They are float32 (S,), or (S, C) where `selection` splits the channels. remarks: gets sentences on what is odd but no fault.
    Raises AudioError in plain words: at once for what is no audio, and after the last good piece where a file is cut short
    or damaged. Raises OSError where the path cannot be opened.
    """
    selection = selection or Selection()
    with open_container(source) as (container, file):
        for piece in _Decoder(container, file, selection, [] if remarks is None else remarks).pieces():
            yield piece if selection.channels == "split" else piece[:, 0]


def read_file(source: Source, selection: Selection | None = None) -> NDArray[np.float32]:
    """The whole of a file at 24 kHz, float32 (S,), or (S, C) where `selection` splits. Raises like `decode_file`."""
    pieces = list(decode_file(source, selection))
    return np.concatenate(pieces) if pieces else _EMPTY[:, 0]


def probe(source: Source, track: int | None = None) -> AudioInfo:
    """Look at the header alone. A seekable file object is left where it was. Raises like `decode_file`."""
    file = None if isinstance(source, str | bytes | os.PathLike) else source
    start = file.tell() if file is not None and file.seekable() else None
    try:
        with open_container(source) as (container, _):
            stream = audio_stream(container, track)
            codec = stream.codec_context
            names = tuple(track_name(each) for each in container.streams.audio)
            duration = duration_of(container, stream)
            return AudioInfo(container.format.name, codec.name, codec.sample_rate, codec.channels, duration, names)
    finally:
        if file is not None and start is not None:
            file.seek(start)


# ---- decoding ------------------------------------------------------------------------------------------------------------


class _Decoder:
    """Frames of one audio track to pieces, float32 (S, C)."""

    def __init__(
        self, container: "av.container.InputContainer", file: Reader, selection: Selection, remarks: list[str]
    ) -> None:
        self._container = container
        self._file = file
        self._selection = selection
        self._remarks = remarks
        self._stream = audio_stream(container, selection.track)
        self._name = container.format.name.split(",")[0]
        self._resamplers: list[StreamingResampler] = []
        self._mixer: Mixer | None = None
        self._form: tuple[int, int] | None = None
        """Channels and rate of what is held raw."""
        self._packer: tuple[tuple[str, str, int], av.AudioResampler] | None = None
        start_seconds = (container.start_time or 0) / 1_000_000
        self._has_lead_in = self._name == "matroska" and start_seconds < 0
        """FFmpeg before 8.1 gives a Matroska file's encoder delay times below zero; some codecs' decoders leave it in."""
        self._origin_seconds = 0.0 if self._has_lead_in else start_seconds
        self._seconds = 0.0  # of audio decoded so far, silence for gaps included
        self._skipped_seconds = 0.0  # of silence put in for gaps
        self._packets = 0
        self._damaged_packets = 0
        self._demux_fault: AudioError | None = None
        self._raw: list[NDArray[np.float32]] = []  # (S, C) at the file's rate
        self._raw_samples = 0
        self._held: list[NDArray[np.float32]] = []
        self._held_samples = 0
        tracks = container.streams.audio
        if selection.track is None and len(tracks) > 1:
            names = "; ".join(f"{number} {track_name(each)}" for number, each in enumerate(tracks, 1))
            taken = next(number for number, each in enumerate(tracks, 1) if each.index == self._stream.index)
            remarks.append(f"it has {len(tracks)} audio tracks: {names}; track {taken} is used")

    def pieces(self) -> Iterator[NDArray[np.float32]]:
        fault: AudioError | None = None
        try:
            for frame in self._frames():
                yield from self._gap_before(frame)
                yield from self._take(self._samples_of(frame)[self._lead_in(frame) :], frame.sample_rate)
        except AudioError as error:
            fault = error
        yield from self._end_form()
        if self._held:
            yield np.concatenate(self._held)
        if fault is None:
            fault = self._verdict()
        if fault is not None:
            raise fault

    def _frames(self) -> Iterator["av.AudioFrame"]:
        """Every frame that can be decoded. A damaged packet is left out; the file's own clock then tells how long it was.

        A packet of no bytes must not reach the decoder, which takes it for the end.
        """
        packets = self._container.demux(self._stream)
        failures = 0
        while True:
            try:
                packet = next(packets, None)
            except av.error.FFmpegError as error:
                fault = AudioError(f"the file is damaged after {self._seconds:.1f} s: {reason_of(error)}")
                self._demux_fault = self._demux_fault or fault
                failures += 1
                if failures > _MOST_FAILURES:
                    raise self._demux_fault from None
                packets = self._container.demux(self._stream)  # goes on after it
                continue
            failures = 0
            if packet is not None and not packet.size:
                continue
            self._packets += packet is not None
            try:
                frames = self._stream.codec_context.decode(packet)
            except av.error.EOFError:
                frames = []
            except av.error.FFmpegError:
                self._damaged_packets += 1
                frames = []
            yield from frames
            if packet is None:
                return

    def _lead_in(self, frame: "av.AudioFrame") -> int:
        """How many of the frame's first samples come before the sound begins."""
        return round(-frame.time * frame.sample_rate) if self._has_lead_in and frame.time is not None and frame.time < 0 else 0

    def _gap_before(self, frame: "av.AudioFrame") -> Iterator[NDArray[np.float32]]:
        """Silence where the file's clock runs ahead of the samples: a track that begins late, a pause left out."""
        if frame.time is None:
            return
        gap_seconds = frame.time - self._origin_seconds - self._seconds
        if not _SHORTEST_GAP_SECONDS <= gap_seconds <= _LONGEST_GAP_SECONDS:
            return
        self._skipped_seconds += gap_seconds
        rate = frame.sample_rate
        left = round(gap_seconds * rate)
        while left > 0:
            silence = np.zeros((min(left, rate), frame.layout.nb_channels), np.float32)
            left -= len(silence)
            yield from self._take(silence, rate)

    def _samples_of(self, frame: "av.AudioFrame") -> NDArray[np.float32]:
        """Finite float32 (S, C)."""
        channels = frame.layout.nb_channels
        if (frame.format.is_planar and channels > _SAFE_PLANES) or frame.format.bytes > 4:
            frame = self._interleaved(frame)
        samples = frame.to_ndarray()  # planar: (C, S); packed: (1, S * C)
        floats = to_float(samples.T if frame.format.is_planar else samples.reshape(-1, channels))
        if not np.abs(floats).max(initial=0) < _LOUDEST:  # NaN too; in the resampler one would spread to its neighbours
            floats = np.where(np.abs(floats) < _LOUDEST, floats, np.float32(0))
        return floats

    def _interleaved(self, frame: "av.AudioFrame") -> "av.AudioFrame":
        """The same samples as float32 in one plane. Raises AudioError where FFmpeg cannot do it."""
        kind = (frame.format.name, frame.layout.name, frame.sample_rate)
        if self._packer is None or self._packer[0] != kind:
            self._packer = (kind, av.AudioResampler("flt", frame.layout, frame.sample_rate))
        try:
            (packed,) = self._packer[1].resample(frame)
        except (av.error.FFmpegError, ValueError) as error:
            channels = frame.layout.nb_channels
            raise AudioError(f"the {channels} channels of the audio track cannot be decoded: {reason_of(error)}") from None
        return packed

    def _take(self, samples: NDArray[np.float32], rate: int) -> Iterator[NDArray[np.float32]]:
        """Keep samples (S, C) until there are enough to be worth the calls; a chained file may change its form."""
        form = (samples.shape[1], rate)
        if self._form != form:
            yield from self._end_form()
            self._begin_form(form)
        self._seconds += len(samples) / rate
        self._raw.append(samples)
        self._raw_samples += len(samples)
        if self._raw_samples >= _BLOCK_SECONDS * rate:
            yield from self._work_off()

    def _begin_form(self, form: tuple[int, int]) -> None:
        channels, rate = form
        wanted = self._selection.channels
        if isinstance(wanted, int) and wanted > channels:
            raise AudioError(f"there is no channel {wanted}: the audio track has {channels}")
        if wanted == "split" and self._resamplers and len(self._resamplers) != channels:
            raise AudioError(f"the file goes from {len(self._resamplers)} to {channels} channels: they cannot be kept apart")
        self._form = form
        self._mixer = Mixer(channels, rate) if wanted == "mix" and channels > 1 else None
        self._resamplers = [StreamingResampler(rate) for _ in range(channels if wanted == "split" else 1)]

    def _work_off(self) -> Iterator[NDArray[np.float32]]:
        samples = np.concatenate(self._raw) if len(self._raw) > 1 else self._raw[0]
        self._raw, self._raw_samples = [], 0
        if self._mixer is not None:
            samples = self._mixer.mix(samples)[:, None]
        elif isinstance(self._selection.channels, int):
            samples = samples[:, self._selection.channels - 1, None]
        yield from self._hold([resampler.feed(samples[:, index]) for index, resampler in enumerate(self._resamplers)])

    def _end_form(self) -> Iterator[NDArray[np.float32]]:
        if self._raw:
            yield from self._work_off()
        if self._form is not None:
            yield from self._hold([resampler.finish() for resampler in self._resamplers])
            self._form = None

    def _hold(self, channels: list[NDArray[np.float32]]) -> Iterator[NDArray[np.float32]]:
        if len(channels[0]):
            self._held.append(np.stack(channels, axis=1) if len(channels) > 1 else channels[0][:, None])
            self._held_samples += len(channels[0])
        if self._held_samples >= _PIECE_SAMPLES:
            piece = np.concatenate(self._held) if len(self._held) > 1 else self._held[0]
            self._held, self._held_samples = [], 0
            yield piece

    # ---- was that all? ---------------------------------------------------------------------------------------------------

    def _verdict(self) -> AudioError | None:
        """What to say after the last sample."""
        if self._file.fault is not None:
            return AudioError(f"it cannot be read beyond {self._seconds:.2f} s: {reason_of(self._file.fault)}")
        if not self._seconds:
            if self._damaged_packets:
                return AudioError(f"none of the file's {self._damaged_packets} packets can be decoded: it is damaged")
            return AudioError("the file has an audio track but not one sample")
        if (cut := self._cut_short()) is not None:
            return cut
        if self._skipped_seconds and self._name in _WITHOUT_GAPS:
            return AudioError(
                f"the file is damaged: {self._skipped_seconds:.2f} of its {self._seconds:.2f} s cannot be decoded"
            )
        if self._damaged_packets:
            return AudioError(f"{self._damaged_packets} damaged packets were left out of {self._seconds:.1f} s of audio")
        if self._demux_fault is not None and not self._is_whole_by_its_clock():
            return self._demux_fault
        if self._file.announced.remark:
            self._remarks.append(self._file.announced.remark)
        return None

    def _is_whole_by_its_clock(self) -> bool:
        length = duration_of(self._container, self._stream)
        return not self._skipped_seconds and length is not None and self._seconds >= length - _SHORTEST_GAP_SECONDS

    def _cut_short(self) -> AudioError | None:
        about = self._file.announced
        if about.missing_bytes:
            missing = about.missing_bytes * self._seconds / max(1, self._file.size)
            if missing >= _TOLERANCE_SECONDS.get(self._name, 0.0):
                return AudioError(f"the file is cut short: it ends after {self._seconds:.2f} s, its header announces more")
        expected, tolerance = self._expected_seconds()
        if expected is not None and self._seconds < expected - tolerance:
            return AudioError(
                f"the file is cut short or damaged: its header announces {expected:.2f} s, {self._seconds:.2f} s are there"
            )
        return None

    def _expected_seconds(self) -> tuple[float | None, float]:
        """How long the track is by its header, and how much less may come; None where no header says it exactly."""
        stream, about = self._stream, self._file.announced
        if self._name == "mov":  # its index counts the packets; the lengths next to it may be those of an edit
            if not stream.frames or self._packets >= stream.frames - 1:
                return None, 0.0
            return duration_of(self._container, stream), _TOLERANCE_SECONDS["wav"]
        if self._name == "mp3":
            return about.seconds, max(0.2, _MP3_SAMPLES / stream.codec_context.sample_rate)
        if self._name == "matroska":
            return self._matroska_seconds(), _MATROSKA_SECONDS
        if self._name in _TOLERANCE_SECONDS:
            return duration_of(self._container, stream), _TOLERANCE_SECONDS[self._name]
        return None, 0.0

    def _matroska_seconds(self) -> float | None:
        """The track's own length, or the file's where it has no other track; not where the sizes say that all is there."""
        if self._file.announced.whole:
            return None
        hours, _, rest = self._stream.metadata.get("DURATION", "").partition(":")
        minutes, _, seconds = rest.partition(":")
        try:
            return 3_600 * int(hours) + 60 * int(minutes) + float(seconds)
        except ValueError:
            pass
        length = self._container.duration
        return length / 1_000_000 - self._origin_seconds if len(self._container.streams) == 1 and length is not None else None
