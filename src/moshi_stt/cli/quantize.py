"""`moshi-stt quantize`: a language model's file to one of 8 or 4 bits that needs no original. Needs no framework either."""

import argparse
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moshi_stt import __version__
from moshi_stt.config import KyutaiModule
from moshi_stt.errors import CheckpointError, ConfigError
from moshi_stt.models.affine import SCHEMES, Scheme, choose_packing, dequantize, quantize
from moshi_stt.models.spec import LMSpec
from moshi_stt.models.tensors import Bits, TensorFile, open_tensors, to_float32, to_stored, write_tensors
from moshi_stt.models.weights import Header, Packing, TensorInfo, lm_ignored, lm_table, make_plan, naming_of, read_header


class Piece(NamedTuple):
    """One tensor of the original and what becomes of it."""

    source: str
    name: str
    """In the new file, MLX naming."""
    shape: tuple[int, ...]
    dtype: str
    """Of the new file; of the scales where it is packed."""
    packing: Packing | None


class Errors:
    """How far packed weights are off, by their bits."""

    def __init__(self) -> None:
        self._sums: dict[int, tuple[float, float]] = {}

    def add(self, bits: int, original: NDArray[np.float32], packed: NDArray[np.float32]) -> None:
        off, size = self._sums.get(bits, (0.0, 0.0))
        off += float(np.square(packed - original, dtype=np.float64).sum())
        self._sums[bits] = off, size + float(np.square(original, dtype=np.float64).sum())

    def relative(self) -> dict[int, float]:
        """Root mean square of the errors over that of the weights."""
        return {bits: math.sqrt(off / size) if size else 0.0 for bits, (off, size) in sorted(self._sums.items())}


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "quantize",
        help="write a checkpoint of 8 or 4 bits",
        description="Write a language model's weights with 8 or 4 bits each. The new file needs no original; "
        "name it as lm_model_file. Norms are kept as they are; with 4 bits embeddings and output keep 8.",
    )
    parser.add_argument(
        "source", metavar="IN", help="safetensors file, hf:// name, configuration file, or name of a shipped configuration"
    )
    parser.add_argument("target", metavar="OUT", type=Path, help="safetensors file to write")
    parser.add_argument("--bits", type=int, choices=sorted(SCHEMES), default=8, help="8 (default) or 4")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    return parser


def run(args: argparse.Namespace) -> int:
    """Write the file and say what it is. Raises CheckpointError or ConfigError."""
    source, target = find(args.source), args.target
    if target.exists():
        raise ConfigError(f"{target} exists already: remove it, or choose another name")
    if not target.parent.is_dir():
        raise ConfigError(f"{target}: there is no folder {target.parent}")
    before = source.stat().st_size
    errors = quantize_file(source, target, SCHEMES[args.bits], progress=not args.quiet)
    after = target.stat().st_size
    print(f"{target}: {after / 1e6:,.0f} MB instead of {before / 1e6:,.0f} MB")
    for bits, error in errors.items():
        print(f"weights of {bits} bits are off by {error:.2%} (root mean square, of that of the weights)")
    print(f'Use it: lm_model_file = "{target.resolve()}"')
    return 0


def find(source: str) -> Path:
    """The language model's file that the first argument means, fetched where it has to be."""
    from moshi_stt.config_load import load_config, shipped_names
    from moshi_stt.models.hub import resolve

    if not source.endswith(".toml") and source not in shipped_names():
        return resolve(source)
    modules = [module for module in load_config(source).config.modules if isinstance(module, KyutaiModule)]
    files = {module.lm_model_file for module in modules}
    if len(files) != 1:
        raise ConfigError(f"{source} names {len(files)} language models: give the file itself")
    return resolve(files.pop())


def quantize_file(source: Path, target: Path, scheme: Scheme, *, progress: bool = False) -> dict[int, float]:
    """Write `source` packed to `target`, MLX naming, the scheme in the metadata.

    Returns for each number of bits the relative error of the weights that have so many.

    Raises CheckpointError where the file is no unquantised language model, or the new one cannot be written.
    """
    from tqdm import tqdm

    header = read_header(source)
    pieces = plan_pieces(header, scheme)
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {}
    for piece in pieces:
        shapes |= shapes_of(piece)
    settings = {"format": "mlx", "quantization": scheme, "written_by": f"moshi-stt {__version__}", "source": source.name}
    errors = Errors()
    with open_tensors(header) as file:
        bar = tqdm(pieces, desc=target.name, unit=" tensors", disable=None if progress else True)
        write_tensors(target, shapes, (tensor for piece in bar for tensor in converted(file, piece, errors)), settings)
    return errors.relative()


def plan_pieces(header: Header, scheme: Scheme) -> list[Piece]:
    """What becomes of each tensor. Raises CheckpointError for what is no language model, or packed already."""
    if any(info.dtype == "U32" for info in header.tensors.values()):
        raise CheckpointError(f"{header.path} is quantised already: quantise the original")
    spec, hidden = shapes_from_header(header)
    naming = naming_of(header)
    plan = make_plan(header, naming, lm_table(spec, hidden), lm_ignored(spec))
    pieces = []
    for source in plan.sources:
        packing = choose_packing(source.param.name, source.param.shape, scheme)
        dtype = "F32" if source.info.dtype == "F64" else source.info.dtype
        pieces.append(Piece(source.name, source.param.mlx_name, source.param.mlx_shape, dtype, packing))
    kept = [name for name in header.tensors if name.startswith("condition_provider.")]
    return pieces + [Piece(name, name, header.tensors[name].shape, header.tensors[name].dtype, None) for name in kept]


def shapes_from_header(header: Header) -> tuple[LMSpec, int]:
    """A language model's table from the shapes in its own file: a spec that says nothing of heads and context, and the
    gate's hidden size. Raises CheckpointError where they are not there."""
    tensors = header.tensors

    def rows_and_columns(name: str) -> tuple[int, int]:
        shape = tensors.get(name, _NOTHING).shape
        if len(shape) != 2:
            raise CheckpointError(
                f"{header.path} has no matrix {name}: it is no language model of Kyutai's speech-to-text "
                f"({len(tensors)} tensors, {', '.join(list(tensors)[:3])} …)"
            )
        return shape[0], shape[1]

    text_card, dim = rows_and_columns("text_linear.weight")
    _, hidden = rows_and_columns("transformer.layers.0.gating.linear_out.weight")
    table = "audio_embs" if naming_of(header) == "mlx" else "emb"
    audio_rows, _ = rows_and_columns(f"{table}.0.weight")
    heads = _count(header, "extra_heads.{}.weight")
    spec = LMSpec(
        dim=dim,
        heads=1,
        layers=_count(header, "transformer.layers.{}.gating.linear_out.weight"),
        context=1,
        max_period=1.0,
        text_card=text_card,
        codebooks=_count(header, f"{table}.{{}}.weight"),
        audio_card=audio_rows - 1,
        extra_heads=heads,
        extra_head_dim=rows_and_columns("extra_heads.0.weight")[0] if heads else 6,
    )
    return spec, hidden


_NOTHING = TensorInfo("", (), 0, 0)


def _count(header: Header, pattern: str) -> int:
    """How many names of a numbered series there are, from 0."""
    count = 0
    while pattern.format(count) in header.tensors:
        count += 1
    return count


def shapes_of(piece: Piece) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The new file's tensors of a piece: dtype and shape by name."""
    packing = piece.packing
    if packing is None:
        return {piece.name: (piece.dtype, piece.shape)}
    rows, columns = piece.shape
    stem = piece.name.removesuffix(".weight")
    groups = (piece.dtype, (rows, columns // packing.group_size))
    return {
        piece.name: ("U32", (rows, columns * packing.bits // 32)),
        f"{stem}.scales": groups,
        f"{stem}.biases": groups,
    }


def converted(file: TensorFile, piece: Piece, errors: Errors) -> Iterator[tuple[str, Bits]]:
    """The new file's tensors of a piece, in the order of `shapes_of`."""
    dtype = file.header.tensors[piece.source].dtype
    values = file.read(piece.source).reshape(piece.shape)
    if piece.packing is None:
        yield piece.name, values if dtype == piece.dtype else to_stored(to_float32(values, dtype), piece.dtype)
        return
    original = to_float32(values, dtype)
    packed = quantize(original, piece.packing)
    scales, biases = to_stored(packed.scales, piece.dtype), to_stored(packed.biases, piece.dtype)
    as_stored = packed._replace(scales=to_float32(scales, piece.dtype), biases=to_float32(biases, piece.dtype))
    errors.add(piece.packing.bits, original, dequantize(as_stored, piece.packing))
    stem = piece.name.removesuffix(".weight")
    yield from ((piece.name, packed.weight), (f"{stem}.scales", scales), (f"{stem}.biases", biases))
