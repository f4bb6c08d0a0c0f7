"""Weights from safetensors files into tensors of a device and dtype, after `weights.py` has checked the file. Knows no model.

A file is memory-mapped and read in its own order; the map is dropped and opened anew every few hundred MB, so that the host
never holds much more than the tensors it was asked for.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from moshi_stt.errors import CheckpointError
from moshi_stt.models.spec import LMSpec
from moshi_stt.models.weights import Plan, Source, lm_table

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
    if plan.packed:
        raise CheckpointError(
            f"{plan.header.path} holds quantised MLX weights, which PyTorch does not take: "
            'set device = "mlx" or use the unquantised file'
        )
    left = dict(destinations)
    for source, tensor in read_tensors(plan):
        left.pop(source.param.name).copy_(tensor.view(source.param.shape))
    assert not left, f"never filled: {sorted(left)}"


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
