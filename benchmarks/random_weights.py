"""Random weights of any shape of the models, drawn on the device, and whole checkpoints of them. Knows no benchmark.

Speed does not depend on the values of weights, and these say nothing about accuracy. The scales are such that activations stay
of order one, as in trained models. Deterministic for a device and a PyTorch version.
"""

import json
import math
import random
from pathlib import Path

import torch
from torch import Tensor

from moshi_stt.models.spec import LMSpec, MimiSpec, ModelSpec
from moshi_stt.models.torch_impl.loader import allocate_lm
from moshi_stt.models.weights import lm_table, mimi_table

SHAPES: dict[str, tuple[LMSpec, int]] = {
    "tiny": (LMSpec(256, 4, 4, 50, 1e5, 64, 8, extra_heads=4), 704),
    "1b": (LMSpec(2048, 16, 16, 750, 1e5, 8000, 32, extra_heads=4), 5632),
    "2.6b": (LMSpec(2048, 32, 48, 375, 1e5, 4000, 32), 5632),
}
"""Language model and its gate's hidden size, by name."""

DELAY_FRAMES = {"tiny": 6, "1b": 6, "2.6b": 31}


def model_spec(shape: str) -> ModelSpec:
    """The spec of a named shape."""
    lm, _ = SHAPES[shape]
    return ModelSpec(lm=lm, mimi=MimiSpec(codebooks=lm.codebooks), delay_frames=DELAY_FRAMES[shape])


def random_lm(shape: str, dtype: torch.dtype, device: torch.device, seed: int = 0) -> dict[str, Tensor]:
    """What `LanguageModel` and `FusedLM` take as `params`."""
    spec, hidden = SHAPES[shape]
    params, destinations = allocate_lm(spec, hidden, dtype, device)
    generator = torch.Generator(device).manual_seed(seed)
    for name, tensor in destinations.items():
        _draw(name, tensor, generator, books=spec.codebooks)
    return params


def random_mimi(spec: MimiSpec, device: torch.device, seed: int = 1) -> dict[str, Tensor]:
    """What `MimiEncoder` and `FusedMimi` take as `params`."""
    generator = torch.Generator(device).manual_seed(seed)
    params = {param.name: torch.empty(param.shape, device=device) for param in mimi_table(spec)}
    for name, tensor in params.items():
        _draw(name, tensor, generator)
    return params


def _draw(name: str, tensor: Tensor, generator: torch.Generator, books: int = 1) -> None:
    """Fill a parameter by what its name says it is: the same numbers, all of bfloat16, in any dtype."""
    low, high = _range(name, tensor.shape, books)
    drawn = torch.empty(tensor.shape, device=tensor.device).uniform_(low, high, generator=generator)
    if name == "text_linear.weight":  # the boundary and the pad win often, so that words begin and end
        drawn[[0, 3]] *= 2.5 if len(tensor) < 1_000 else 4.0
    tensor.copy_(drawn.bfloat16())


def _range(name: str, shape: torch.Size, books: int) -> tuple[float, float]:
    fan_in = math.prod(shape[1:])
    if name.endswith("cluster_usage"):
        return 0.5, 1.5
    if name.endswith("embedding_sum"):
        return -0.6, 0.6
    if "layer_scale" in name:
        return 0.2, 0.4
    if name.endswith(("alpha", "norm1.weight", "norm2.weight")):
        return 0.9, 1.1
    if name.endswith("bias"):
        return -0.05, 0.05
    if name.startswith(("text_emb", "emb.")):
        bound = 0.85 if name.startswith("text") else math.sqrt(3 / books)
        return -bound, bound
    gain = 3.0 if name.endswith("input_proj.weight") else 1.4 if name.startswith("encoder.model") else 1.0
    bound = gain * math.sqrt(3 / fan_in)
    return -bound, bound


def write_checkpoint(shape: str, folder: Path, device: torch.device) -> None:
    """model.safetensors (bf16), mimi.safetensors and tokenizer.model of a shape, with the published files' names of tensors."""
    from safetensors.torch import save_file

    spec, hidden = SHAPES[shape]
    folder.mkdir(parents=True, exist_ok=True)
    with torch.inference_mode():
        _, destinations = allocate_lm(spec, hidden, torch.bfloat16, device)
        generator = torch.Generator(device).manual_seed(0)
        for name, tensor in destinations.items():
            _draw(name, tensor, generator, books=spec.codebooks)
        shapes = {param.name: param.shape for param in lm_table(spec, hidden)}
        tensors = {name: t.to("cpu", torch.bfloat16).view(shapes[name]).contiguous() for name, t in destinations.items()}
        save_file(tensors, folder / "model.safetensors")
        mimi = random_mimi(MimiSpec(codebooks=spec.codebooks), device)
        save_file({name: t.cpu() for name, t in mimi.items()}, folder / "mimi.safetensors")
    write_tokenizer(folder / "tokenizer.model", spec.text_card)


def write_tokenizer(path: Path, pieces: int) -> None:
    """A SentencePiece model of so many pieces of made-up words, with the ids that Kyutai's have."""
    import sentencepiece

    draw = random.Random(0)
    syllables = [a + b for a in "bcdfghjklmnprstvwz" for b in ("a", "e", "i", "o", "u", "ai", "ou")]
    words = ["".join(draw.choices(syllables, k=draw.randint(1, 5))) for _ in range(40_000)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(" ".join(words[i : i + 8]) for i in range(0, len(words), 8)),
        model_prefix=str(path.with_suffix("")),
        vocab_size=pieces,
        model_type="bpe",
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=3,
        minloglevel=2,
    )
    path.with_suffix(".vocab").unlink()


def write_toml(shape: str, folder: Path, *, slots: int | str, engine: dict[str, str]) -> Path:
    """A configuration for `worker` over `write_checkpoint`'s folder. engine: the keys of `[modules.asr.moshi_stt]`."""
    spec, _ = SHAPES[shape]
    model = {
        "audio_vocab_size": spec.audio_card + 1,
        "text_in_vocab_size": spec.text_card + 1,
        "text_out_vocab_size": spec.text_card,
        "audio_codebooks": spec.codebooks,
    }
    transformer = {
        "d_model": spec.dim,
        "num_heads": spec.heads,
        "num_layers": spec.layers,
        "dim_feedforward": 4 * spec.dim,
        "causal": True,
        "norm_first": True,
        "bias_ff": False,
        "bias_attn": False,
        "context": spec.context,
        "max_period": spec.max_period,
        "use_conv_block": False,
        "use_conv_bias": True,
        "gating": "silu",
        "norm": "RmsNorm",
        "positional_embedding": "Rope",
        "conv_layout": False,
        "conv_kernel_size": 3,
        "kv_repeat": 1,
        "max_seq_len": 40_960,
    }
    tables: dict[str, dict[str, object]] = {
        "modules.asr": {
            "path": "/api/asr-streaming",
            "type": "BatchedAsr",
            "lm_model_file": str(folder / "model.safetensors"),
            "text_tokenizer_file": str(folder / "tokenizer.model"),
            "audio_tokenizer_file": str(folder / "mimi.safetensors"),
            "asr_delay_in_tokens": DELAY_FRAMES[shape],
            "batch_size": slots,
        },
        "modules.asr.moshi_stt": {"stall_seconds": 0} | engine,  # random weights say nothing for long
        "modules.asr.model": dict(model),
        "modules.asr.model.transformer": dict(transformer),
    }
    if spec.extra_heads:
        tables["modules.asr.model.extra_heads"] = {"num_heads": spec.extra_heads, "dim": spec.extra_head_dim}
    lines = [
        f'static_dir = "{folder}"',
        f'log_dir = "{folder}"',
        'instance_name = "bench"',
        'authorized_ids = ["public_token"]',
    ]
    for name, table in tables.items():
        lines += ["", f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in table.items())]
    path = folder / "worker.toml"
    path.write_text("\n".join(lines) + "\n")
    return path
