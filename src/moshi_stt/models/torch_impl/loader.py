"""Weights from safetensors files into tensors of a device and dtype, after `weights.py` has checked the file. Knows no model.

A file is memory-mapped and read in its own order; the map is dropped and opened anew every few hundred MB, so that the host
never holds much more than the tensors it was asked for.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from moshi_stt.errors import CheckpointError, ConfigError
from moshi_stt.models.affine import Packed, Scheme, choose_packing, dequantize, quantize
from moshi_stt.models.spec import LMSpec
from moshi_stt.models.tensors import TensorFile, open_tensors
from moshi_stt.models.torch_impl.linear import Linear, QuantizedWeights
from moshi_stt.models.weights import Packing, Plan, Source, lm_table

_MAPPED_BYTES = 256 << 20


def allocate_lm(
    spec: LMSpec, hidden: int, dtype: torch.dtype, device: torch.device
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Empty tensors for a language model.

    Returns (params, destinations). params: what `LanguageModel` takes; matrices in `dtype`, norms and conditioners in float32
    at least, all embeddings in one tensor `embeddings`, all extra heads in one tensor `extra_heads`.
    destinations: for each canonical name the tensor or part of a tensor to fill.
    """
    wide = torch.promote_types(dtype, torch.float32)
    table = {param.name: param.shape for param in lm_table(spec, hidden)}
    audio_rows = spec.audio_card + 1
    embeddings = torch.empty(spec.text_card + 1 + spec.codebooks * audio_rows, spec.dim, dtype=dtype, device=device)
    heads = torch.empty(spec.extra_heads * spec.extra_head_dim, spec.dim, dtype=dtype, device=device)
    text, *audio = torch.split(embeddings, [spec.text_card + 1, *[audio_rows] * spec.codebooks])
    destinations = {"text_emb.weight": text}
    destinations |= {f"emb.{i}.weight": part for i, part in enumerate(audio)}
    destinations |= {
        f"extra_heads.{i}.weight": part for i, part in enumerate(torch.split(heads, spec.extra_head_dim)) if spec.extra_heads
    }
    params = {"embeddings": embeddings, "extra_heads": heads}
    for name, shape in table.items():
        if name not in destinations:
            is_matrix = len(shape) == 2 and not name.startswith("condition_provider")
            destinations[name] = params[name] = torch.empty(shape, dtype=dtype if is_matrix else wide, device=device)
    return params, destinations


def fill(plan: Plan, destinations: dict[str, Tensor]) -> None:
    """Copy every tensor of the plan into its destination. Raises CheckpointError when the file cannot be read."""
    assert not plan.packed, "packed weights are for `load_quantized_lm`"
    left = dict(destinations)
    for source, tensor in read_tensors(plan):
        left.pop(source.param.name).copy_(tensor.view(source.param.shape))
    assert not left, f"never filled: {sorted(left)}"


def load_quantized_lm(
    plan: Plan, spec: LMSpec, scheme: Scheme | None, dtype: torch.dtype, threads: int
) -> tuple[dict[str, Tensor], QuantizedWeights]:
    """A language model of 8 or 4 bits on the CPU: what `LanguageModel` takes as `params` and as `quantized`.

    Matrices that the file has packed are taken as they are; others are packed under `scheme`, where there is one and their
    width allows. One is held unpacked at a time. threads: of the packed products. dtype: of what stays unpacked; norms are
    float32 at least.
    Raises CheckpointError when the file cannot be read, ConfigError where ONNX Runtime is missing or too old.
    """
    try:
        from moshi_stt.models.torch_impl.quantized import packed_linear, packed_table
    except ImportError as error:  # some platforms have no wheel of ONNX Runtime
        raise ConfigError(
            f"weights of 8 and 4 bits need onnxruntime on a CPU ({error}): run `pip install onnxruntime`, or use "
            'unquantised weights and quantize = "none"'
        ) from error

    wide = torch.promote_types(dtype, torch.float32)
    table_names = ["text_emb.weight", *(f"emb.{i}.weight" for i in range(spec.codebooks))]
    head_names = [f"extra_heads.{i}.weight" for i in range(spec.extra_heads)]
    params: dict[str, Tensor] = {}
    products: dict[str, Linear] = {}
    apart: dict[str, Tensor | Quantized] = {}
    with open_tensors(plan.header) as file:
        for source in plan.sources:
            name = source.param.name
            weight = _read_quantized(file, source, None if name in head_names else scheme)
            if name in table_names or name in head_names:
                apart[name] = weight
            elif isinstance(weight, Quantized):
                products[name] = packed_linear(*weight, threads)
            else:
                is_matrix = weight.ndim == 2 and not name.startswith("condition_provider")
                params[name] = weight.to(dtype if is_matrix else wide)
    if head_names:
        params["extra_heads"] = torch.cat([_unpacked(apart.pop(name)) for name in head_names]).to(dtype)
    tables = [apart.pop(name) for name in table_names]
    packed: list[tuple[Packed, Packing]] = [part for part in tables if isinstance(part, Quantized)]
    if len(packed) == len(tables):
        tables.clear()
        return params, QuantizedWeights(products, packed_table(packed))
    params["embeddings"] = torch.cat([_unpacked(part).to(dtype) for part in tables])
    return params, QuantizedWeights(products, None)


class Quantized(NamedTuple):
    """A packed matrix and how it is packed."""

    packed: Packed
    packing: Packing


def _read_quantized(file: TensorFile, source: Source, scheme: Scheme | None) -> "Tensor | Quantized":
    """One parameter, packed where the file or the scheme packs it, float32 otherwise."""
    if source.packing is not None:
        stem = source.name.removesuffix(".weight")
        scales, biases = (file.read_float32(f"{stem}.{part}") for part in ("scales", "biases"))
        return Quantized(Packed(file.read(source.name).view(np.uint32), scales, biases), source.packing)
    values = file.read_float32(source.name).reshape(source.param.shape)
    packing = choose_packing(source.param.name, source.param.shape, scheme) if scheme else None
    return torch.from_numpy(values) if packing is None else Quantized(quantize(values, packing), packing)


def _unpacked(weight: "Tensor | Quantized") -> Tensor:
    return torch.from_numpy(dequantize(*weight)) if isinstance(weight, Quantized) else weight


def load_mimi_params(plan: Plan, device: torch.device) -> dict[str, Tensor]:
    """Every tensor of Mimi's table by canonical name, float32. Raises CheckpointError when the file cannot be read."""
    return {source.param.name: tensor.to(device, torch.float32, copy=True) for source, tensor in read_tensors(plan)}


def read_tensors(plan: Plan) -> Iterator[tuple[Source, Tensor]]:
    """Each source of the plan with its tensor on the host, mapped: valid until the next is asked for."""
    path, mapped = plan.header.path, 0
    with ExitStack() as stack:
        file = stack.enter_context(_open(path))
        for source in plan.sources:
            if mapped > _MAPPED_BYTES:
                stack.close()
                file, mapped = stack.enter_context(_open(path)), 0
            mapped += source.info.bytes
            yield source, file.get_tensor(source.name)


def _open(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
