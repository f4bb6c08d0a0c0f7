"""The one table of tensor names and shapes, and what a safetensors file must hold. Data and checks; knows no framework.

Canonical names are those of the published PyTorch and candle files (contract sections 6.1 to 6.3). A file is in one of two
namings, `file` or `mlx`.
Every tensor of a file is either needed exactly once, or ignored by a rule below that says why; any other is an error: a
tensor that this program does not know means a model that it would compute wrongly. (moshi-server ignores such tensors.)
"""

import json
import math
import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from moshi_stt.errors import CheckpointError
from moshi_stt.models.spec import MAX_CODEBOOKS, LMSpec, MimiSpec

Naming = Literal["file", "mlx"]

FLOAT_TYPES: Mapping[str, int] = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8}
"""safetensors dtypes that weights may have, and their bytes."""

_TYPE_BYTES: Mapping[str, int] = {
    **FLOAT_TYPES,
    "U8": 1,
    "I8": 1,
    "BOOL": 1,
    "U16": 2,
    "I16": 2,
    "U32": 4,
    "I32": 4,
    "U64": 8,
    "I64": 8,
}
_MAX_HEADER_BYTES = 100 << 20
_MAX_LISTED = 8
"""Names of one kind that an error lists before it counts the rest."""


@dataclass(frozen=True)
class Param:
    """One needed tensor. `mlx_shape` is `shape` except for the norms, which MLX stores flat."""

    name: str
    shape: tuple[int, ...]
    mlx_name: str
    mlx_shape: tuple[int, ...]
    aliases: tuple[str, ...] = ()
    """Names that older exports use for the same tensor."""

    def names(self, naming: Naming) -> tuple[str, ...]:
        return (self.mlx_name,) if naming == "mlx" else (self.name, *self.aliases)

    def shape_in(self, naming: Naming) -> tuple[int, ...]:
        return self.mlx_shape if naming == "mlx" else self.shape


@dataclass(frozen=True)
class Ignored:
    """Names left alone on purpose. `pattern` matches the whole name."""

    pattern: str
    reason: str

    def matches(self, name: str) -> bool:
        return re.fullmatch(self.pattern, name) is not None


# ---- the table: language model -------------------------------------------------------------------------------------------

LM_IGNORED: tuple[Ignored, ...] = (
    Ignored(
        r"(depformer|depformer_in|depformer_emb|depformer_text_emb|depformer_norms|linears)\..*",
        "audio output, which speech-to-text has not",
    ),
)
_IGNORED_HEADS = Ignored(r"extra_heads\..*", "the configuration has no extra_heads")
_IGNORED_CONDITIONERS = Ignored(r"condition_provider\..*", "the configuration has no conditioners")
_IGNORED_OTHER_CONDITIONER = Ignored(r"condition_provider\..*", "a conditioner that the configuration does not use")


def lm_table(spec: LMSpec, hidden: int) -> tuple[Param, ...]:
    """Every tensor of the language model. hidden: the gate's hidden size, from `gate_hidden`."""
    d = spec.dim
    table = [_same("text_emb.weight", spec.text_card + 1, d)]
    table += [_renamed(f"emb.{i}.weight", f"audio_embs.{i}.weight", spec.audio_card + 1, d) for i in range(spec.codebooks)]
    for i in range(spec.layers):
        at = f"transformer.layers.{i}."
        table += [
            _norm(at + "norm1", d),
            Param(
                at + "self_attn.in_proj_weight",
                (3 * d, d),
                at + "self_attn.in_proj.weight",
                (3 * d, d),
                (at + "self_attn.in_proj.weight",),
            ),
            _same(at + "self_attn.out_proj.weight", d, d),
            _norm(at + "norm2", d),
            _same(at + "gating.linear_in.weight", 2 * hidden, d),
            _same(at + "gating.linear_out.weight", d, hidden),
        ]
    table += [_norm("out_norm", d), _same("text_linear.weight", spec.text_card, d)]
    table += [_same(f"extra_heads.{i}.weight", spec.extra_head_dim, d) for i in range(spec.extra_heads)]
    for conditioner in spec.conditioners:
        at = f"condition_provider.conditioners.{conditioner.name}."
        if conditioner.kind == "Lut":
            table.append(_same(at + "embed.weight", conditioner.bins + 1, conditioner.dim))
        table += [_same(at + "output_proj.weight", d, conditioner.dim), _same(at + "learnt_padding", 1, 1, d)]
    return tuple(table)


def lm_ignored(spec: LMSpec) -> tuple[Ignored, ...]:
    """What a language model's file may hold besides its table."""
    heads = () if spec.extra_heads else (_IGNORED_HEADS,)
    return (*LM_IGNORED, *heads, _IGNORED_OTHER_CONDITIONER if spec.conditioners else _IGNORED_CONDITIONERS)


def _same(name: str, *shape: int) -> Param:
    return Param(name, shape, name, shape)


def _renamed(name: str, mlx_name: str, *shape: int) -> Param:
    return Param(name, shape, mlx_name, shape)


def _norm(stem: str, dim: int) -> Param:
    return Param(f"{stem}.alpha", (1, 1, dim), f"{stem}.weight", (dim,))


# ---- the table: Mimi -----------------------------------------------------------------------------------------------------

MIMI_IGNORED: tuple[Ignored, ...] = (
    Ignored(r"decoder\.model\..*", "the decoder, which speech-to-text has not"),
    Ignored(r"decoder_transformer\..*", "the decoder, which speech-to-text has not"),
    Ignored(r"upsample\..*", "the decoder, which speech-to-text has not"),
    Ignored(r"quantizer\.rvq_(first|rest)\.output_proj\.weight", "the decoder, which speech-to-text has not"),
    Ignored(r"quantizer\..*\._codebook\.(_initialized|inited)", "a flag of training"),
)
_IGNORED_CODEBOOKS = Ignored(r"quantizer\.rvq_rest\.vq\.layers\.\d+\._codebook\..*", "codebooks beyond audio_codebooks")


def mimi_table(spec: MimiSpec) -> tuple[Param, ...]:
    """Every tensor of Mimi's encoder (contract section 6.3): 175 for 32 codebooks. MLX repositories hold this same file."""
    table: list[Param] = []
    for conv in spec.convs[:-1]:
        table.append(_same(f"{conv.name}.conv.conv.weight", conv.channels_out, conv.channels_in, conv.kernel))
        table.append(_same(f"{conv.name}.conv.conv.bias", conv.channels_out))
    d, ff = spec.dim, spec.feedforward
    for i in range(spec.layers):
        at = f"encoder_transformer.transformer.layers.{i}."
        table += [_same(at + name, d) for name in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias")]
        table += [
            _same(at + "self_attn.in_proj_weight", 3 * d, d),
            _same(at + "self_attn.out_proj.weight", d, d),
            _same(at + "linear1.weight", ff, d),
            _same(at + "linear2.weight", d, ff),
            _same(at + "layer_scale_1.scale", d),
            _same(at + "layer_scale_2.scale", d),
        ]
    table.append(_same("downsample.conv.conv.conv.weight", d, d, spec.downsample.kernel))
    table += [_same(f"quantizer.{part}.input_proj.weight", spec.codebook_dim, d, 1) for part in ("rvq_first", "rvq_rest")]
    for stem in codebook_stems(spec):
        usage, total = (spec.codebook_size,), (spec.codebook_size, spec.codebook_dim)
        table.append(Param(f"{stem}.cluster_usage", usage, f"{stem}.cluster_usage", usage, (f"{stem}.cluster_size",)))
        names = (f"{stem}.embed_avg", f"{stem}.embed_sum")
        table.append(Param(f"{stem}.embedding_sum", total, f"{stem}.embedding_sum", total, names))
    return tuple(table)


def mimi_ignored(spec: MimiSpec) -> tuple[Ignored, ...]:
    """What a Mimi file may hold besides its table: 143 names in the published file with 32 codebooks."""
    return (*MIMI_IGNORED, _IGNORED_CODEBOOKS) if spec.codebooks < MAX_CODEBOOKS else MIMI_IGNORED


def codebook_stems(spec: MimiSpec) -> tuple[str, ...]:
    """Stem of each codebook's two tensors, in the order of the codes: semantic, then acoustic."""
    rest = (f"quantizer.rvq_rest.vq.layers.{i}._codebook" for i in range(spec.codebooks - 1))
    return ("quantizer.rvq_first.vq.layers.0._codebook", *rest)


# ---- a file ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: `start` counts from the file's first byte."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    bytes: int


@dataclass(frozen=True)
class Header:
    """What a safetensors file says it holds."""

    path: Path
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str] = field(default_factory=dict)


def read_header(path: Path) -> Header:
    """Read and check a safetensors header against the file's length.

    Raises CheckpointError when the file is missing, is no safetensors file, or is cut short.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = struct.unpack("<Q", file.read(8).ljust(8, b"\0"))[0]
            if size < 8 or not 2 <= length <= _MAX_HEADER_BYTES:
                raise CheckpointError(f"{path} is no safetensors file: its header would be {length} bytes of {size}")
            if 8 + length > size:
                raise CheckpointError(
                    f"{path} is cut short inside its header: {size} bytes of at least {8 + length}; fetch it again"
                )
            raw = json.loads(file.read(length))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is no safetensors file: its header is no JSON ({error})") from error
    try:
        metadata = raw.pop("__metadata__", {})
        tensors = {name: _tensor_info(entry, 8 + length) for name, entry in raw.items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path} is no safetensors file: its header is malformed ({error!r})") from error
    end = max((info.start + info.bytes for info in tensors.values()), default=8 + length)
    if end > size:
        raise CheckpointError(f"{path} is cut short: {size} bytes, but its tensors end at {end}; fetch it again")
    for name, info in tensors.items():
        width = _TYPE_BYTES.get(info.dtype)
        if width is not None and info.bytes != width * math.prod(info.shape):
            raise CheckpointError(f"{path}: {name} has {info.bytes} bytes for {info.dtype} of shape {list(info.shape)}")
    return Header(path, tensors, metadata)


def _tensor_info(entry: Mapping[str, object], data_start: int) -> TensorInfo:
    """One header entry. Raises TypeError, KeyError or ValueError when it is malformed."""
    shape, offsets = entry["shape"], entry["data_offsets"]
    if (
        not isinstance(shape, list)
        or not isinstance(offsets, list)
        or not all(isinstance(n, int) and n >= 0 for n in shape + offsets)
    ):
        raise ValueError(f"shape {shape} at {offsets}")
    start, end = offsets
    if end < start:
        raise ValueError(f"a tensor from {start} to {end}")
    return TensorInfo(str(entry["dtype"]), tuple(shape), data_start + start, end - start)


@dataclass(frozen=True)
class Packing:
    """MLX affine quantisation of one matrix: packed uint32 weight with float scales and biases beside it."""

    bits: int
    group_size: int


@dataclass(frozen=True)
class Source:
    """Where one parameter comes from. With a `packing`, `<stem>.scales` and `<stem>.biases` belong to it."""

    param: Param
    name: str
    info: TensorInfo
    packing: Packing | None = None


@dataclass(frozen=True)
class Plan:
    """A file that was checked: every parameter of the table has its one source, in the order of the file."""

    header: Header
    naming: Naming
    sources: tuple[Source, ...]
    ignored: tuple[str, ...]

    @property
    def packed(self) -> bool:
        return any(source.packing for source in self.sources)


def plan_lm(path: Path, spec: LMSpec) -> tuple[Plan, int]:
    """Check a language model's file; returns the plan and the gate's hidden size.

    Raises CheckpointError naming all that is wrong.
    """
    header = read_header(path)
    hidden = gate_hidden(header, spec)
    return make_plan(header, naming_of(header), lm_table(spec, hidden), lm_ignored(spec)), hidden


def naming_of(header: Header) -> Naming:
    """The naming of a language model's file."""
    return "mlx" if "out_norm.weight" in header.tensors else "file"


def plan_mimi(path: Path, spec: MimiSpec) -> Plan:
    """Check a Mimi file. Raises CheckpointError naming all that is wrong."""
    return make_plan(read_header(path), "file", mimi_table(spec), mimi_ignored(spec))


def gate_hidden(header: Header, spec: LMSpec) -> int:
    """The gate's hidden size, from layer 0's `linear_out` (where that is packed, from the rows of `linear_in`)."""
    name = "transformer.layers.0.gating.linear_out.weight"
    info = header.tensors.get(name)
    if info is None:
        raise CheckpointError(
            f"{header.path} has no {name}: it is no language model of Kyutai's speech-to-text "
            f"({len(header.tensors)} tensors, {', '.join(list(header.tensors)[:3])} …)"
        )
    if info.dtype == "U32":
        info = header.tensors.get("transformer.layers.0.gating.linear_in.weight", info)
        return info.shape[0] // 2 if info.shape else 0
    if len(info.shape) != 2:
        raise CheckpointError(f"{header.path}: {name} has shape {list(info.shape)}, expected [{spec.dim}, hidden]")
    return info.shape[1]


def make_plan(header: Header, naming: Naming, table: Iterable[Param], ignored: Iterable[Ignored]) -> Plan:
    """Match a file with a table.

    Raises CheckpointError listing what is missing, doubled, misshapen, of a wrong type, or unknown.
    """
    left = dict(header.tensors)
    problems: dict[str, list[str]] = {"missing": [], "doubled": [], "wrong shape": [], "wrong dtype": [], "unknown": []}
    sources: list[Source] = []
    for param in table:
        found = [name for name in param.names(naming) if name in left]
        if not found:
            problems["missing"].append(f"{param.names(naming)[0]} {list(param.shape_in(naming))}")
            continue
        if len(found) > 1:
            problems["doubled"].append(" and ".join(found))
        source = _source(param, found[0], naming, left, problems)
        for name in found:
            left.pop(name, None)
        if source is not None:
            sources.append(source)
    rules = tuple(ignored)
    skipped = tuple(name for name in left if any(rule.matches(name) for rule in rules))
    problems["unknown"] = [f"{name} {list(left[name].shape)}" for name in left if name not in set(skipped)]
    if any(problems.values()):
        raise CheckpointError(
            f"{header.path} does not fit the configured model: "
            + "; ".join(_listed(*item) for item in problems.items() if item[1])
        )
    return Plan(header, naming, tuple(sorted(sources, key=lambda source: source.info.start)), skipped)


def _source(
    param: Param, name: str, naming: Naming, left: dict[str, TensorInfo], problems: Mapping[str, list[str]]
) -> Source | None:
    """The source of one parameter, its `scales` and `biases` taken out of `left` where it is packed."""
    info, wanted = left[name], param.shape_in(naming)
    stem = name.removesuffix(".weight")
    if naming == "mlx" and info.dtype == "U32" and len(wanted) == 2 and f"{stem}.scales" in left:
        scales, biases = left.pop(f"{stem}.scales"), left.pop(f"{stem}.biases", None)
        packing = _packing(info, scales, wanted)
        if packing is None or biases is None or biases.shape != scales.shape:
            problems["wrong shape"].append(
                f"{name} {list(info.shape)} packed with scales {list(scales.shape)}, expected a packing of {list(wanted)}"
            )
            return None
        return Source(param, name, info, packing)
    if info.dtype not in FLOAT_TYPES:
        problems["wrong dtype"].append(f"{name} is {info.dtype}, expected one of {', '.join(FLOAT_TYPES)}")
        return None
    if info.shape != wanted:
        problems["wrong shape"].append(f"{name} is {list(info.shape)}, expected {list(wanted)}")
        return None
    return Source(param, name, info)


def _packing(weight: TensorInfo, scales: TensorInfo, wanted: tuple[int, ...]) -> Packing | None:
    """Bits and group size that make `weight` and `scales` a packing of `wanted` (out, in); None where nothing does."""
    rows, columns = wanted
    if len(weight.shape) != 2 or len(scales.shape) != 2 or weight.shape[0] != rows or scales.shape[0] != rows:
        return None
    if not scales.shape[1] or columns % scales.shape[1] or (32 * weight.shape[1]) % columns:
        return None
    return Packing(bits=32 * weight.shape[1] // columns, group_size=columns // scales.shape[1])


def _listed(kind: str, items: list[str]) -> str:
    more = f" and {len(items) - _MAX_LISTED} more" if len(items) > _MAX_LISTED else ""
    return f"{kind}: {', '.join(items[:_MAX_LISTED])}{more}"
