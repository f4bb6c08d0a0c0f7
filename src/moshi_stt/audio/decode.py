"""Audio files of any common format to 24 kHz mono PCM, a piece at a time. Knows nothing of streams or servers.

PyAV brings its own codecs, so no ffmpeg has to be installed. Channels are mixed by their average. Encoder delay and padding
are taken out by the demuxers, and silence stands where a file's own clock skips time, so that times are those of a player.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import SpooledTemporaryFile
from typing import IO, Final

import av
import numpy as np
from numpy.typing import NDArray

from moshi_stt.audio.resample import HIGHEST_RATE, LOWEST_RATE, StreamingResampler, to_mono_float
from moshi_stt.constants import SAMPLE_RATE
from moshi_stt.errors import AudioError

Source = str | os.PathLike[str] | IO[bytes]

# Only demuxers of single files: playlists and the like would let a file name other files and addresses to be read.
_DEMUXERS: Final = (
    "aac,ac3,aiff,amr,ape,asf,au,avi,caf,dts,eac3,flac,flv,loas,matroska,webm,mov,mp4,m4a,3gp,3g2,mj2,mp3,mpc,mpc8,"
    "mpeg,mpegts,ogg,qcp,tak,tta,voc,w64,wav,wv"
)
_KNOWN: Final = "wav, flac, mp3, ogg, opus, m4a, mp4, webm, mkv, aiff, caf, wma and their like"
_TOLERANCE_SECONDS: Final = {"wav": 0.05, "w64": 0.05, "flac": 0.05, "aiff": 0.05, "au": 0.05, "caf": 0.5, "mov": 0.5}
"""By how much less audio may come than the header announces, for formats whose headers do not estimate."""
_WITHOUT_GAPS: Final = {"wav", "w64", "flac", "aiff", "au", "mp3"}
_UNKNOWN_BYTES: Final = 0x7FFF0000
"""Recorders that write to a pipe put a size beyond this into a WAV header, or 0."""

_SAFE_PLANES: Final = 7
"""PyAV 18 looks for a null pointer behind the last plane, and reads past the end where there are eight or more."""
_LOUDEST: Final = float(1 << 31)
"""No sample format has larger values: beyond it a sample is taken for 0."""
_HEAD_BYTES: Final = 16
_SPOOL_BYTES: Final = 8 << 20
_PIECE_SAMPLES: Final = SAMPLE_RATE
_SHORTEST_GAP_SECONDS: Final = 0.1
_LONGEST_GAP_SECONDS: Final = 3_600.0
_EMPTY: NDArray[np.float32] = np.zeros(0, np.float32)


@dataclass(frozen=True)
class AudioInfo:
    """What a file says of itself. duration_seconds: None where it does not say."""

    format: str
    codec: str
    sample_rate: int
    channels: int
    duration_seconds: float | None


def decode_file(source: Source) -> Iterator[NDArray[np.float32]]:
    """Decode a path or a binary file object (which may be a pipe) to pieces of float32 (S,), 24 kHz mono, a second or so each.

    Raises AudioError in plain words: at once for what is no audio, and behind the last good piece where a file is cut short
    or damaged. Raises OSError where the path cannot be opened.
    """
    cut_short = _cut_short(source)
    with _opened(source) as container:
        yield from _Decoder(container, cut_short).pieces()


def read_file(source: Source) -> NDArray[np.float32]:
    """The whole of a file: float32 (S,), 24 kHz mono. Raises like `decode_file`."""
    pieces = list(decode_file(source))
    return np.concatenate(pieces) if pieces else _EMPTY


def probe(source: Source) -> AudioInfo:
    """Look at the header alone. A seekable file object is left where it was. Raises like `decode_file`."""
    start = source.tell() if not isinstance(source, str | os.PathLike) and source.seekable() else None
    try:
        with _opened(source) as container:
            stream = _audio_stream(container)
            codec = stream.codec_context
            return AudioInfo(container.format.name, codec.name, codec.sample_rate, codec.channels, _duration(container, stream))
    finally:
        if start is not None:
            source.seek(start)  # type: ignore[union-attr]


@contextmanager
def _opened(source: Source) -> Iterator["av.container.InputContainer"]:
    if isinstance(source, str | os.PathLike):
        with Path(source).open("rb") as opened, _opened(opened) as container:
            yield container
        return
    head = _read_head(source)
    with ExitStack() as stack:
        file: IO[bytes] | SpooledTemporaryFile[bytes] | _Pipe = source
        if not source.seekable() and head[4:8] == b"ftyp":  # MP4 may keep its index at its end
            spool = stack.enter_context(SpooledTemporaryFile(_SPOOL_BYTES))
            spool.write(head)
            shutil.copyfileobj(source, spool)
            spool.seek(0)
            file = spool
        elif not source.seekable():
            file = _Pipe(head, source)
        try:
            container = stack.enter_context(av.open(file, "r", options={"format_whitelist": _DEMUXERS}))
        except (av.error.FFmpegError, ValueError) as error:
            raise AudioError(_complaint(head, error)) from None
        yield container


def _read_head(file: IO[bytes]) -> bytes:
    """The first bytes, fewer only where the file ends. A seekable file is left where it was."""
    start = file.tell() if file.seekable() else None
    head = b""
    while len(head) < _HEAD_BYTES and (more := file.read(_HEAD_BYTES - len(head))):
        head += more
    if start is not None:
        file.seek(start)
    return head


class _Pipe:
    """A binary file object that cannot seek, its first bytes already read."""

    def __init__(self, head: bytes, file: IO[bytes]) -> None:
        self._head = head
        self._file = file

    def read(self, size: int) -> bytes:
        if self._head:
            data, self._head = self._head[:size], self._head[size:]
            return data
        return self._file.read(size)


def _cut_short(source: Source) -> bool:
    """Whether a WAV or AIFF file has fewer bytes than its header announces; FFmpeg takes what is there. False for a pipe."""
    if isinstance(source, str | os.PathLike):
        with Path(source).open("rb") as file:
            return _cut_short(file)
    if not source.seekable():
        return False
    head = _read_head(source)
    if head[:4] not in (b"RIFF", b"FORM"):
        return False
    announced = int.from_bytes(head[4:8], "little" if head[:4] == b"RIFF" else "big")
    start = source.tell()
    present = source.seek(0, os.SEEK_END) - start
    source.seek(start)
    return 0 < announced < _UNKNOWN_BYTES and present < announced


def _complaint(head: bytes, error: Exception) -> str:
    """Why a file was refused, from how it starts."""
    if not head:
        return "the file is empty (0 bytes)"
    if head[4:8] == b"ftyp":
        return "this MP4 or M4A file has no index (moov): it is cut short"
    for magic, name in ((b"OggS", "Ogg"), (b"RIFF", "WAV"), (b"fLaC", "FLAC"), (b"\x1aE\xdf\xa3", "WebM or Matroska")):
        if head.startswith(magic):
            return f"this {name} file is damaged or cut short: {_reason(error)}"
    return f"not an audio format that is known here: it starts with {head!r}, expected one of {_KNOWN}"


def _audio_stream(container: "av.container.InputContainer") -> "av.AudioStream":
    stream = container.streams.best("audio")
    if stream is None:
        others = ", ".join(sorted({stream.type for stream in container.streams})) or "nothing"
        raise AudioError(f"the file has no audio track, only {others} ({container.format.name})")
    assert isinstance(stream, av.AudioStream)
    if stream.codec_context is None:
        raise AudioError(f"the file's audio track is in a codec that is not known here ({container.format.name})")
    if not LOWEST_RATE <= stream.codec_context.sample_rate <= HIGHEST_RATE:
        rate = stream.codec_context.sample_rate
        raise AudioError(f"the file says {rate} samples a second, expected {LOWEST_RATE} to {HIGHEST_RATE}: it is damaged")
    return stream


def _duration(container: "av.container.InputContainer", stream: "av.AudioStream") -> float | None:
    if stream.duration is not None and stream.time_base is not None:
        return float(stream.duration * stream.time_base)
    return None if container.duration is None else container.duration / 1_000_000


class _Decoder:
    """Frames of one container's audio track to pieces."""

    def __init__(self, container: "av.container.InputContainer", cut_short: bool) -> None:
        self._container = container
        self._cut_short = cut_short
        self._stream = _audio_stream(container)
        self._resampler: StreamingResampler | None = None
        self._packer: tuple[tuple[str, str, int], av.AudioResampler] | None = None
        self._origin_seconds = (container.start_time or 0) / 1_000_000
        self._seconds = 0.0  # of audio decoded so far, silence for gaps included
        self._skipped_seconds = 0.0  # of silence put in for gaps
        self._damaged_packets = 0
        self._held: list[NDArray[np.float32]] = []
        self._held_samples = 0

    def pieces(self) -> Iterator[NDArray[np.float32]]:
        fault: AudioError | None = None
        try:
            for frame in self._frames():
                yield from self._gap_before(frame)
                yield from self._hold(self._convert(frame))
        except AudioError as error:
            fault = error
        if self._resampler is not None:
            yield from self._hold(self._resampler.finish())
        if self._held:
            yield np.concatenate(self._held)
        if fault is None:
            fault = self._verdict()
        if fault is not None:
            raise fault

    def _frames(self) -> Iterator["av.AudioFrame"]:
        """Every frame that can be decoded. A damaged packet is left out; the file's own clock then tells how long it was."""
        packets = self._container.demux(self._stream)
        while True:
            try:
                packet = next(packets)
            except StopIteration:
                return
            except av.error.FFmpegError as error:
                raise AudioError(f"the file is damaged after {self._seconds:.1f} s: {_reason(error)}") from None
            try:
                frames = packet.decode()
            except av.error.FFmpegError:
                self._damaged_packets += 1
                continue
            for frame in frames:
                assert isinstance(frame, av.AudioFrame)
                yield frame

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
            silence = np.zeros(min(left, rate), np.float32)
            left -= len(silence)
            yield from self._hold(self._resample(silence, rate))

    def _convert(self, frame: "av.AudioFrame") -> NDArray[np.float32]:
        channels = frame.layout.nb_channels
        if (frame.format.is_planar and channels > _SAFE_PLANES) or frame.format.bytes > 4:
            frame = self._interleaved(frame)
        samples = frame.to_ndarray()  # planar: (C, S); packed: (1, S * C)
        samples = samples.T if frame.format.is_planar else samples.reshape(-1, channels)
        mono = to_mono_float(samples)
        if not np.abs(mono).max(initial=0) < _LOUDEST:  # NaN too; in the resampler one would spread to its neighbours
            mono = np.where(np.abs(mono) < _LOUDEST, mono, np.float32(0))
        return self._resample(mono, frame.sample_rate)

    def _interleaved(self, frame: "av.AudioFrame") -> "av.AudioFrame":
        """The same samples as float32 in one plane. Raises AudioError where FFmpeg cannot do it."""
        kind = (frame.format.name, frame.layout.name, frame.sample_rate)
        if self._packer is None or self._packer[0] != kind:
            self._packer = (kind, av.AudioResampler("flt", frame.layout, frame.sample_rate))
        try:
            (packed,) = self._packer[1].resample(frame)
        except (av.error.FFmpegError, ValueError) as error:
            channels = frame.layout.nb_channels
            raise AudioError(f"the {channels} channels of the audio track cannot be mixed: {_reason(error)}") from None
        return packed

    def _resample(self, mono: NDArray[np.float32], rate: int) -> NDArray[np.float32]:
        tail = _EMPTY
        if self._resampler is None or self._resampler.rate_in != rate:
            if self._resampler is not None:  # chained files may change their rate
                tail = self._resampler.finish()
            self._resampler = StreamingResampler(rate)
        self._seconds += len(mono) / rate
        ready = self._resampler.feed(mono)
        return np.concatenate([tail, ready]) if len(tail) else ready

    def _hold(self, pcm: NDArray[np.float32]) -> Iterator[NDArray[np.float32]]:
        if len(pcm):
            self._held.append(pcm)
            self._held_samples += len(pcm)
        if self._held_samples >= _PIECE_SAMPLES:
            piece = np.concatenate(self._held)
            self._held, self._held_samples = [], 0
            yield piece

    def _verdict(self) -> AudioError | None:
        """What to say behind the last sample."""
        if not self._seconds:
            if self._damaged_packets:
                return AudioError(f"none of the file's {self._damaged_packets} packets can be decoded: it is damaged")
            return AudioError("the file has an audio track but not one sample")
        name = self._container.format.name.split(",")[0]
        announced = _duration(self._container, self._stream)
        tolerance = _TOLERANCE_SECONDS.get(name)
        if tolerance is not None and announced is not None and self._seconds < announced - tolerance:
            return AudioError(
                f"the file is cut short or damaged: its header announces {announced:.2f} s, {self._seconds:.2f} s are there"
            )
        if self._cut_short:
            return AudioError(f"the file is cut short: it ends after {self._seconds:.2f} s, its header announces more")
        if self._skipped_seconds and name in _WITHOUT_GAPS:
            return AudioError(
                f"the file is damaged: {self._skipped_seconds:.2f} of its {self._seconds:.2f} s cannot be decoded"
            )
        if self._damaged_packets:
            return AudioError(f"{self._damaged_packets} damaged packets were left out of {self._seconds:.1f} s of audio")
        return None


def _reason(error: Exception) -> str:
    """FFmpeg's words without the number and the file name around them."""
    return getattr(error, "strerror", None) or str(error)
