"""What bytes are, by how they start: the one table of file signatures."""

import json
from typing import Final

SIGNATURES: Final = (
    (b"RIFX", "a big-endian WAV file (RIFX)"),
    (b"RF64", "a WAV file"),
    (b"BW64", "a WAV file"),
    (b"OggS", "an Ogg file"),
    (b"\x1aE\xdf\xa3", "WebM or Matroska (what Chrome's MediaRecorder makes by default)"),
    (b"ID3", "an MP3 file"),
    (b"fLaC", "a FLAC file"),
    (b"FORM", "an AIFF file"),
    (b"caff", "a CAF file"),
    (b".snd", "an AU file"),
    (b"TTA", "a True Audio file"),
    (b"wvpk", "a WavPack file"),
    (b"MAC ", "a Monkey's Audio file"),
    (b"riff\x2e\x91\xcf\x11", "a Wave64 file"),
    (b"0&\xb2u\x8ef\xcf\x11", "a WMA or ASF file"),
    (b"FLV", "a Flash video"),
    (b"#!AMR", "an AMR file"),
    (b"PK\x03\x04", "a ZIP archive"),
    (b"%PDF", "a PDF document"),
    (b"\x89PNG", "a PNG picture"),
    (b"\xff\xd8\xff", "a JPEG picture"),
    (b"\x1f\x8b", "a gzip archive"),
)


def name_of(head: bytes) -> str | None:
    """The kind of file that begins with these bytes, with its article; None for what is not known here. Give 16 at least."""
    if head[:4] == b"RIFF":
        return {b"WAVE": "a WAV file", b"AVI ": "an AVI video"}.get(head[8:12], "a RIFF file")
    if head[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"skip", b"free"):
        return "an MP4, M4A or QuickTime file"
    for signature, name in SIGNATURES:
        if head.startswith(signature):
            return name
    if len(head) > 2 and head[0] == 0xFF and head[1] & 0xE0 == 0xE0 and head[1] & 0x18 != 0x08:
        return "an AAC file" if head[1] & 0x06 == 0 else "an MP3 file"
    return None


def name_of_message(data: bytes) -> str | None:
    """What was sent in place of a MessagePack document: a file, JSON or bare samples; None where it is unclear."""
    found = name_of(data[:16])
    if found is not None:
        return found
    text = data[:64].lstrip()
    if text[:1] in (b"{", b"["):
        try:
            json.loads(data)
        except ValueError:
            pass
        else:
            return "JSON"
    if len(data) >= 64 and len(data) % 2 == 0 and _looks_like_samples(data):
        return "bare 16-bit samples"
    return None


def _looks_like_samples(data: bytes) -> bool:
    """Whether little-endian 16-bit samples of a sound are likely: neighbours are near each other, as in no other data."""
    samples = memoryview(data[: min(len(data) & ~1, 8_192)]).cast("h")
    steps = sum(abs(samples[index + 1] - samples[index]) for index in range(len(samples) - 1)) / (len(samples) - 1)
    size = sum(map(abs, samples)) / len(samples)
    return bool(steps < max(1.0, size)) and size < 16_384
