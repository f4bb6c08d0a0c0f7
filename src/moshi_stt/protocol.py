"""The messages of the native protocol, to bytes and from bytes.

Outbound bytes are those of moshi-server (contract section 2.1): a map, tag first, fields in a fixed order, shortest
integers, float64 times, float32 pauses. Inbound, everything that moshi-server's decoder accepts (section 2.3) is accepted,
and `bin` for `OggOpus.data` and for `Audio.pcm` (little-endian float32) besides.

`encode` and `decode` are the server's side; `decode_event`, `encode_audio`, `encode_opus`, `encode_marker` and `encode_init`
the client's.
"""

import struct
from typing import Final

import msgpack  # type: ignore[import-untyped]
import msgspec
import numpy as np
from numpy.typing import ArrayLike, NDArray

from moshi_stt import packed
from moshi_stt.engine.commands import Audio, Mark, Reset
from moshi_stt.errors import ProtocolError
from moshi_stt.events import AnyEvent, Error, Step
from moshi_stt.signatures import name_of_message

UNACCEPTABLE: Final = 1003
"""Close code: a document of a kind that this server does not take."""
MALFORMED: Final = 1007
"""Close code: the message is no document, or a field is not what it must be."""
POLICY: Final = 1008
"""Close code: a document that nobody needs to send (thousands of keys, a thousand levels deep)."""

MAX_KEYS: Final = 1_024
"""Most keys of one message, ignored ones included."""


class OggOpus(msgspec.Struct, frozen=True, gc=False):
    """data: the next bytes of an Ogg stream that carries Opus, cut anywhere."""

    data: bytes


Inbound = Audio | Mark | Reset | OggOpus
"""What a client may say: a command (`Init` is `Reset`), or bytes of which audio is still to be made."""


def _plain(value: object) -> object:
    """A number of numpy's, which engines may give, as Python's."""
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} is not of the wire")


_pack: Final = msgspec.msgpack.Encoder(enc_hook=_plain).encode


def _head(keys: int, tag: str, first_key: str = "") -> bytes:
    """The bytes of a message up to its first value."""
    return bytes((0x80 | keys,)) + _pack("type") + _pack(tag) + (_pack(first_key) if first_key else b"")


# ---- the server's side, outbound -----------------------------------------------------------------------------------------

_STEP = _head(4, "Step", "step_idx")
_PRS = _pack("prs")
_PRS4 = struct.Struct(">5sBfBfBfBf").pack
_PRS4_HEAD = _PRS + packed.array_header(4)
_BUFFERED_PCM = _pack("buffered_pcm")


def _encode_step(event: Step) -> bytes:
    """By hand: the pauses are float32, which msgspec does not write."""
    prs = event.prs
    if len(prs) == 4:  # what every published model has
        pauses = _PRS4(_PRS4_HEAD, 0xCA, prs[0], 0xCA, prs[1], 0xCA, prs[2], 0xCA, prs[3])
    else:
        pauses = _PRS + packed.float32_array(np.asarray(prs, np.float32))
    return _STEP + _pack(event.step_idx) + pauses + _BUFFERED_PCM + _pack(event.buffered_pcm)


def encode(event: AnyEvent) -> bytes:
    """One event as one binary message, byte for byte as moshi-server packs it (contract section 2.1).

    `Error.close_code` is not on this wire. What UTF-8 cannot say becomes a question mark. Raises ValueError for an integer
    beyond 64 bits.
    """
    kind = type(event)
    try:
        if kind is Step:
            return _encode_step(event)  # type: ignore[arg-type]
        if kind is Error:
            event = Error(event.message)  # type: ignore[union-attr]
        return _pack(event)
    except OverflowError:
        raise ValueError(f"an integer of {event} is beyond 64 bits") from None
    except UnicodeEncodeError:
        fields = msgspec.structs.asdict(event)
        texts = {name: text.encode("utf-8", "replace").decode() for name, text in fields.items() if isinstance(text, str)}
        return _pack(msgspec.structs.replace(event, **texts))


# ---- the server's side, inbound ------------------------------------------------------------------------------------------

_AUDIO = _head(2, "Audio", "pcm")
_FIELDS: Final = {"Init": None, "Marker": b"id", "Audio": b"pcm", "OggOpus": b"data"}
"""Each tag's one field, in the order of moshi-server's variants: a tag may be sent as its index here."""
_TAGS: Final = tuple(_FIELDS)
_TAG_OF: Final[dict[bytes | int, str]] = {name.encode(): name for name in _TAGS} | dict(enumerate(_TAGS))
_ONE_OF_TAGS: Final = f"one of {', '.join(_TAGS)}"


def decode(message: bytes) -> Inbound:
    """One binary message of a client (contract sections 2.2 and 2.3).

    The samples of an `Audio` are writable and aliased by nothing; their values are as sent: NaN and inf may be there.
    Raises ProtocolError, and nothing else whatever the bytes are: close code 1007 for a message that is no document or whose
    field is not what it must be, 1003 for a kind of message that is not taken, 1008 for absurd depth or number of keys.
    """
    if message.startswith(_AUDIO):  # what Kyutai's clients send, 12.5 times a second each
        pcm = packed.float32s_at(message, len(_AUDIO))
        if pcm is not None:
            return Audio(pcm)
    if not message:
        raise ProtocolError("empty message: expected a MessagePack map with a `type`", MALFORMED)
    if message[0] not in _MAPS and (kind := name_of_message(message)) is not None:
        raise ProtocolError(f"the message is {kind}: expected a MessagePack map with a `type` (docs/protocol.md)", MALFORMED)
    document = _Document(message)
    try:
        return document.read()
    except msgpack.OutOfData:
        raise ProtocolError(
            f"the message ends too early: its {len(message):,} bytes are no whole document", MALFORMED
        ) from None
    except (msgpack.StackError, RecursionError):
        raise ProtocolError("the message is nested too deeply", POLICY) from None
    except (msgpack.UnpackException, ValueError):
        where = document.position
        raise ProtocolError(
            f"the message is not MessagePack: what begins at byte {where:,} cannot be read", MALFORMED
        ) from None


_MAPS = frozenset({*range(0x80, 0x90), 0xDE, 0xDF})
"""First bytes of a MessagePack map."""


class _Document:
    """Any but the usual message: walked key by key; values are passed over in C, and only the needed one is read."""

    def __init__(self, message: bytes) -> None:
        self._message = message
        self._unpacker = msgpack.Unpacker(max_buffer_size=len(message))
        self._unpacker.feed(message)

    @property
    def position(self) -> int:
        position: int = self._unpacker.tell()
        return position

    def read(self) -> Inbound:
        """Raises msgpack's own errors too."""
        kind = packed.KIND[self._message[0]]
        if kind == "map":
            return self._read_map()
        if kind == "array":
            return self._read_array()
        shown = packed.show(self._message, *self._skip())
        raise ProtocolError(f"a message must be a map with a `type`, got {shown}", UNACCEPTABLE)

    def _skip(self) -> tuple[int, int]:
        """Pass over one value. Returns where it starts and ends."""
        start = self.position
        self._unpacker.skip()
        return start, self.position

    def _read_map(self) -> Inbound:
        count = self._unpacker.read_map_header()
        if count > MAX_KEYS:
            raise ProtocolError(f"the message has {count:,} keys: it needs 2, and at most {MAX_KEYS:,} are read", POLICY)
        tag: tuple[int, int] | None = None
        fields: list[tuple[bytes | int, tuple[int, int]]] = []
        for _ in range(count):
            key = packed.scalar_at(self._message, *self._skip())
            value = self._skip()
            if key == b"type":
                if tag is not None:
                    raise ProtocolError("the message has two `type` keys", MALFORMED)
                tag = value
            elif key is not None:
                fields.append((key, value))
        if tag is None:
            example = '{"type": "Audio", "pcm": [...]}'
            raise ProtocolError(f"the message has no `type`: expected a map like {example}{_its_keys(fields)}", MALFORMED)
        name = self._name(tag)
        field = _FIELDS[name]
        if field is None:
            return Reset()
        values = [value for key, value in fields if key in (field, 0)]  # 0: the index of the only field
        if not values:
            raise ProtocolError(f"{name} has no `{field.decode()}`{_its_keys(fields)}", MALFORMED)
        if len(values) > 1:
            raise ProtocolError(f"{name} has two `{field.decode()}` keys", MALFORMED)
        return self._inbound(name, *values[0])

    def _read_array(self) -> Inbound:
        count = self._unpacker.read_array_header()
        if count == 0:
            raise ProtocolError("a message as an array must be [type, field], got an empty one", MALFORMED)
        name = self._name(self._skip())
        expected = 1 if _FIELDS[name] is None else 2
        if count != expected:
            raise ProtocolError(f"{name} as an array has {expected} elements, got {count:,}", MALFORMED)
        return Reset() if expected == 1 else self._inbound(name, *self._skip())

    def _name(self, tag: tuple[int, int]) -> str:
        value = packed.scalar_at(self._message, *tag)
        name = None if value is None else _TAG_OF.get(value)
        if name is None:
            shown = packed.show(self._message, *tag)
            if value is None:
                raise ProtocolError(f"`type` must be {_ONE_OF_TAGS}, got {shown}", MALFORMED)
            raise ProtocolError(f"unknown `type` {shown}: expected {_ONE_OF_TAGS}", UNACCEPTABLE)
        return name

    def _inbound(self, name: str, start: int, end: int) -> Inbound:
        if name == "Audio":
            return Audio(_pcm(self._message, start, end))
        if name == "OggOpus":
            return OggOpus(_data(self._message, start, end))
        value = packed.scalar_at(self._message, start, end)
        if not isinstance(value, int) or value >= 1 << 63:
            shown = packed.show(self._message, start, end)
            raise ProtocolError(f"Marker.id must be an integer from -2^63 to 2^63 - 1, got {shown}", MALFORMED)
        return Mark(value)


def _its_keys(fields: list[tuple[bytes | int, tuple[int, int]]]) -> str:
    """What keys there are instead, for an error message."""
    names = [packed.quote(key) for key, _ in fields if isinstance(key, bytes)]
    return f"; its keys are {', '.join(names)[:60]}" if names else ""


def _pcm(message: bytes, start: int, end: int) -> NDArray[np.float32]:
    """float32 (S,) from the whole value at [start, end)."""
    pcm = packed.float32s_at(message, start)
    if pcm is not None:
        return pcm
    if (data := packed.bin_at(message, start)) is not None:
        raise ProtocolError(f"Audio.pcm as bin is float32, 4 bytes a sample, got {data[0]:,} bytes", MALFORMED)
    if packed.array_at(message, start) is None:
        raise ProtocolError(f"Audio.pcm must be an array of numbers, got {packed.show(message, start, end)}", MALFORMED)
    try:
        return packed.numbers_at(message, start, end)
    except packed.WrongElement as wrong:
        raise ProtocolError(f"Audio.pcm[{wrong.index}] must be a number, got {wrong.found}", MALFORMED) from None


def _data(message: bytes, start: int, end: int) -> bytes:
    """The bytes of the whole value at [start, end)."""
    if (data := packed.bin_at(message, start)) is not None:
        size, body = data
        return message[body : body + size]
    if packed.array_at(message, start) is None:
        raise ProtocolError(f"OggOpus.data must be bin or an array of bytes, got {packed.show(message, start, end)}", MALFORMED)
    try:
        return packed.bytes_at(message, start, end)
    except packed.WrongElement as wrong:
        raise ProtocolError(f"OggOpus.data[{wrong.index}] must be an integer in 0..255, got {wrong.found}", MALFORMED) from None


# ---- the client's side ---------------------------------------------------------------------------------------------------

_INIT_MESSAGE = _head(1, "Init")
_MARKER = _head(2, "Marker", "id")
_OPUS = _head(2, "OggOpus", "data")
_EVENT_DECODER: Final[msgspec.msgpack.Decoder[AnyEvent]] = msgspec.msgpack.Decoder(AnyEvent)


def encode_init() -> bytes:
    """`Init`: start the model's state again. No client needs to send it at the start."""
    return _INIT_MESSAGE


def encode_audio(pcm: ArrayLike, as_bin: bool = False) -> bytes:
    """`Audio` of (S,) samples at 24 kHz mono, converted to float32.

    as_bin: 4 bytes a sample instead of 5; moshi-server does not take that. Raises ValueError for more than one dimension.
    """
    samples = np.asarray(pcm, np.float32)
    if samples.ndim != 1:
        raise ValueError(f"Audio takes samples of one channel, shape (S,), got shape {samples.shape}")
    if as_bin:
        return _AUDIO + _pack(samples.astype("<f4", copy=False).tobytes())
    return _AUDIO + packed.float32_array(samples)


def encode_opus(data: bytes, as_bin: bool = False) -> bytes:
    """`OggOpus`: the next bytes of an Ogg Opus stream. as_bin: a third smaller; moshi-server does not take that."""
    body: bytes = _pack(data) if as_bin else msgpack.packb(list(data))
    return _OPUS + body


def encode_marker(id: int) -> bytes:
    """`Marker`. Raises ValueError for an id beyond int64."""
    if not -(1 << 63) <= id < 1 << 63:
        raise ValueError(f"a marker's id must be an integer from -2^63 to 2^63 - 1, got {id}")
    return _MARKER + _pack(id)


def decode_event(message: bytes) -> AnyEvent:
    """One binary message of a server, ours or moshi-server. Unknown keys are ignored. Raises ProtocolError."""
    try:
        return _EVENT_DECODER.decode(message)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise ProtocolError(f"the server sent no message of this protocol: {str(error)[:120]}", MALFORMED) from None
