"""Weights from safetensors files into MLX arrays, after `weights.py` has checked the file. Knows no model.

One tensor is read at a time and put on the device, as it is or packed, before the next.
"""

from collections.abc import Mapping
from typing import NamedTuple

import mlx.core as mx

from moshi_stt.models.affine import Scheme, choose_packing
from moshi_stt.models.mlx_impl.linear import PackedWeight, Weight
from moshi_stt.models.spec import LMSpec
from moshi_stt.models.tensors import TensorFile, open_tensors
from moshi_stt.models.weights import Plan, Source


class Precision(NamedTuple):
    """What the numbers of a language model are held in."""

    dense: mx.Dtype
    """Of activations and of matrices that are not packed."""
    packed: mx.Dtype
    """Of the scales of packed matrices, and of the products with them."""
    scheme: Scheme | None
    """How dense matrices of the file are packed; None leaves them dense."""


def load_lm_params(plan: Plan, spec: LMSpec, precision: Precision) -> dict[str, Weight]:
    """What `LanguageModel` takes, by canonical name, norms and conditioners in float32, all tables in one as `embeddings`,
    all heads in one as `extra_heads`. Raises CheckpointError when the file cannot be read.
    """
    params: dict[str, Weight] = {}
    with open_tensors(plan.header) as file:
        for source in plan.sources:
            weight = _load(file, plan.naming, source, precision)
            mx.eval(weight[:3] if isinstance(weight, PackedWeight) else weight)
            params[source.param.name] = weight
    names = ["text_emb.weight", *(f"emb.{i}.weight" for i in range(spec.codebooks))]
    params["embeddings"] = _joined([params.pop(name) for name in names], precision)
    if spec.extra_heads:
        heads = [params.pop(f"extra_heads.{i}.weight") for i in range(spec.extra_heads)]
        params["extra_heads"] = _joined(heads, precision)
    mx.clear_cache()
    return params


def load_mimi_params(plan: Plan) -> dict[str, mx.array]:
    """Every tensor of Mimi's table by canonical name, float32. Raises CheckpointError when the file cannot be read."""
    with open_tensors(plan.header) as file:
        return {
            source.param.name: mx.array(file.read_float32(source.name)).reshape(source.param.shape) for source in plan.sources
        }


def weight_bytes(params: Mapping[str, Weight]) -> int:
    """Bytes on the device."""
    return sum(weight.nbytes for weight in params.values())


def _load(file: TensorFile, naming: str, source: Source, precision: Precision) -> Weight:
    param = source.param
    if source.packing is not None:
        stem = source.name.removesuffix(".weight")
        scales, biases = (_read(file, f"{stem}.{part}").astype(precision.packed) for part in ("scales", "biases"))
        return PackedWeight(_read(file, source.name), scales, biases, source.packing)
    values = _read(file, source.name).reshape(param.shape)
    packing = choose_packing(param.name, param.shape, precision.scheme) if precision.scheme else None
    if packing is not None:
        weight, scales, biases = mx.quantize(values, group_size=packing.group_size, bits=packing.bits)
        return PackedWeight(weight, scales.astype(precision.packed), biases.astype(precision.packed), packing)
    is_matrix = len(param.shape) == 2 and not param.name.startswith("condition_provider")
    return values.astype(precision.dense if is_matrix else mx.float32)


def _read(file: TensorFile, name: str) -> mx.array:
    """A tensor in its own dtype; float64, which Metal lacks, as float32."""
    dtype = file.header.tensors[name].dtype
    if dtype == "F64":
        return mx.array(file.read_float32(name))
    values = mx.array(file.read(name))
    return values.view(mx.bfloat16) if dtype == "BF16" else values


def _joined(weights: list[Weight], precision: Precision) -> Weight:
    """Matrices of equal width one below the other. Where they are packed in several ways, unpacked."""
    packed = [weight for weight in weights if isinstance(weight, PackedWeight)]
    if len(packed) == len(weights) and len({weight.packing for weight in packed}) == 1:
        weight, scales, biases, _ = (list(part) for part in zip(*packed, strict=True))
        joined = PackedWeight(mx.concatenate(weight), mx.concatenate(scales), mx.concatenate(biases), packed[0].packing)
        mx.eval(joined[:3])
        return joined
    matrices = [weight.unpacked() if isinstance(weight, PackedWeight) else weight for weight in weights]
    dense = mx.concatenate([matrix.astype(precision.dense) for matrix in matrices])
    mx.eval(dense)
    return dense
