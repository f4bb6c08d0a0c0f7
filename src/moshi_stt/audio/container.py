"""Opening audio files: what the codec library reads from, what it may not do, and which track is wanted.

Faults of the file come out as AudioError in plain words, with the codec library's own reason.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import SpooledTemporaryFile
from typing import IO, Any, Final, cast

import av

from moshi_stt.audio.announced import Announced, Ends, announced
from moshi_stt.audio.resample import HIGHEST_RATE, LOWEST_RATE
from moshi_stt.errors import AudioError
from moshi_stt.signatures import name_of

Source = str | bytes | os.PathLike[str] | IO[bytes]

# Only demuxers of single files: playlists and the like would let a file name other files and addresses to be read.
_DEMUXERS: Final = (
    "aac,ac3,aiff,amr,ape,asf,au,avi,caf,dts,eac3,flac,flv,loas,matroska,webm,mov,mp4,m4a,3gp,3g2,mj2,mp3,mpc,mpc8,"
    "mpeg,mpegts,ogg,qcp,tak,tta,voc,w64,wav,wv"
)
_KNOWN: Final = "wav, flac, mp3, ogg, opus, m4a, mp4, webm, mkv, aiff, caf, wma and their like"
_STREAMED: Final = ("a WAV file", "an Ogg file", "a FLAC file", "an MP3 file", "an AAC file", "an AU file", "an AMR file")
"""What can be decoded from a pipe as it comes; WebM too. Other formats keep at their end what is needed at their start."""

_AS_BYTES: Final[dict[str, Any]] = {"metadata_errors": "surrogateescape"} if int(av.__version__.split(".")[0]) < 19 else {}
"""Tags need not be UTF-8. From PyAV 19 on they always come as here, and there is no such argument."""

_HEAD_BYTES: Final = 16
_SPOOL_BYTES: Final = 8 << 20


class Reader:
    """What the codec library reads from. It must not meet an exception: one is kept as `fault`, and the file then ends.

    head: what has been read of a file that cannot seek.
    """

    def __init__(self, file: IO[bytes], head: bytes = b"") -> None:
        self._file = file
        self._head = head
        self._seen = Ends()
        self._has_ended = False
        self.fault: Exception | None = None

    @property
    def announced(self) -> Announced:
        """What the file says of its own completeness. Of a pipe that is known at its end alone."""
        return announced(cast("IO[bytes]", self._seen)) if self._has_ended else Announced()

    @property
    def size(self) -> int:
        """Bytes of the file; of a pipe, those that came."""
        return self._seen.size

    def read(self, size: int) -> bytes:
        if self._head:
            data, self._head = self._head[:size], self._head[size:]
            self._seen.add(data)
            return data
        try:
            data = self._file.read(size)
        except Exception as error:
            self.fault = error
            return b""
        self._has_ended = not data
        self._seen.add(data)
        return data


class SeekableReader(Reader):
    """The same for a file that can seek."""

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file)
        self._announced = announced(file)
        start = file.tell()
        self._size = file.seek(0, os.SEEK_END) - start
        file.seek(start)

    @property
    def announced(self) -> Announced:
        return self._announced

    @property
    def size(self) -> int:
        return self._size

    def read(self, size: int) -> bytes:
        try:
            return self._file.read(size)
        except Exception as error:
            self.fault = error
            return b""

    def seek(self, offset: int, whence: int = 0) -> int:
        try:
            return self._file.seek(offset, whence)
        except Exception as error:
            self.fault = error
            return -1

    def tell(self) -> int:
        return self._file.tell()


@contextmanager
def open_container(source: Source) -> Iterator[tuple["av.container.InputContainer", Reader]]:
    if isinstance(source, str | bytes | os.PathLike):
        with Path(os.fsdecode(source)).open("rb") as opened, open_container(opened) as found:
            yield found
        return
    with ExitStack() as stack:
        try:
            head = _read_head(source)
            reader = _reader(source, head, name_of(head), stack)
        except Exception as error:
            raise AudioError(f"it cannot be read: {reason_of(error)}") from None
        options = {"format_whitelist": _DEMUXERS}
        try:
            container = stack.enter_context(av.open(reader, "r", options=options, **_AS_BYTES))
        except (av.error.FFmpegError, ValueError) as error:
            if reader.fault is not None:
                raise AudioError(f"it cannot be read: {reason_of(reader.fault)}") from None
            raise AudioError(_complaint(head, name_of(head), error)) from None
        yield container, reader


def _reader(source: IO[bytes], head: bytes, kind: str | None, stack: ExitStack) -> Reader:
    if source.seekable():
        return SeekableReader(source)
    if kind in _STREAMED or (kind or "").startswith("WebM") or not head:
        return Reader(source, head)
    spool = SpooledTemporaryFile(_SPOOL_BYTES)  # noqa: SIM115
    stack.enter_context(spool)
    spool.write(head)
    shutil.copyfileobj(source, spool)
    spool.seek(0)
    return SeekableReader(spool)


def _read_head(file: IO[bytes]) -> bytes:
    """The first bytes, fewer only where the file ends. A seekable file is left where it was."""
    start = file.tell() if file.seekable() else None
    head = b""
    while len(head) < _HEAD_BYTES and (more := file.read(_HEAD_BYTES - len(head))):
        head += more
    if start is not None:
        file.seek(start)
    return head


def _complaint(head: bytes, kind: str | None, error: Exception) -> str:
    """Why a file was refused, from how it starts, and in the codec library's words."""
    if not head:
        return "the file is empty (0 bytes)"
    if kind is None:
        return f"not an audio format that is known here: it starts with {head!r}, expected one of {_KNOWN} ({reason_of(error)})"
    if kind.startswith("a big-endian"):
        return f"{kind}, which cannot be decoded ({reason_of(error)}): convert it to an ordinary WAV file first"
    if kind.startswith("an MP4"):
        return f"this MP4 or M4A file has no index (moov): it is cut short or damaged ({reason_of(error)})"
    if kind.split()[-1] in ("archive", "document", "picture"):
        return f"{kind}, not a recording ({reason_of(error)}); expected one of {_KNOWN}"
    return f"{kind} that is damaged or cut short: {reason_of(error)}"


# ---- tracks ------------------------------------------------------------------------------------------------------------


def audio_stream(container: "av.container.InputContainer", track: int | None) -> "av.AudioStream":
    tracks = container.streams.audio
    if not tracks:
        others = ", ".join(sorted({stream.type for stream in container.streams})) or "nothing"
        raise AudioError(f"the file has no audio track, only {others} ({container.format.name})")
    if track is not None and not 1 <= track <= len(tracks):
        names = "; ".join(f"{number} {track_name(each)}" for number, each in enumerate(tracks, 1))
        raise AudioError(f"there is no audio track {track}: the file has {names}")
    stream = container.streams.best("audio") if track is None else tracks[track - 1]
    if stream is None or stream.codec_context is None:
        raise AudioError(f"the file's audio track is in a codec that is not known here ({container.format.name})")
    assert isinstance(stream, av.AudioStream)
    if not LOWEST_RATE <= stream.codec_context.sample_rate <= HIGHEST_RATE:
        rate = stream.codec_context.sample_rate
        raise AudioError(f"the file says {rate} samples a second, expected {LOWEST_RATE} to {HIGHEST_RATE}: it is damaged")
    return stream


def track_name(stream: Any) -> str:
    """Its title, its language and its codec, as far as it has them."""
    about = [_printable(stream.metadata.get(tag, "")) for tag in ("title", "language")]
    codec = stream.codec_context.name if stream.codec_context is not None else "unknown codec"
    shown = [" ".join(text.split()) for text in about if text.strip() and text != "und"]
    return f"({', '.join([*shown, codec])})"


def _printable(tag: str) -> str:
    """With a replacement character for every byte that was not UTF-8, so that the text can be written anywhere."""
    return tag.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def duration_of(container: "av.container.InputContainer", stream: "av.AudioStream") -> float | None:
    if stream.duration is not None and stream.time_base:  # None where it is unknown, 0 from PyAV 19 on
        return float(stream.duration * stream.time_base)
    return None if container.duration is None else container.duration / 1_000_000


def reason_of(error: Exception) -> str:
    """The words of FFmpeg, or of the system, without the number and the file name around them."""
    return getattr(error, "strerror", None) or str(error)
