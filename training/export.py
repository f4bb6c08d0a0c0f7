"""Checkpoints to files: the server's own, and Mimi at its full size for moshi-server, which knows no other.

    python -m training.export OUT/final.pt FOLDER --tokenizer FILE [--candle]

The full-size file computes exactly what the small one computes, but for the order of its sums: channels that the small
encoder lacks are zero; the transformer's width is repeated, so that its norms have the same mean and variance; heads and
layers that it lacks add nothing; codewords that it lacks are out of reach. The language model's file is the same for both
servers.
"""

import argparse
from collections.abc import Iterator, Mapping
from pathlib import Path
from shutil import copyfile
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import save_file

from training.model import Shape

Arrays = dict[str, NDArray[np.float32]]

FULL = Shape(
    channels=(64, 128, 256, 512, 1_024), width=512, encoder_layers=8, feedforward=2_048, codebook_size=2_048, codebook_dim=256
)
"""Mimi as published."""
FULL_CODEBOOKS = 32
_FAR = 1e4
"""Coordinate of the codewords out of reach: latents are about 1."""


def load_checkpoint(path: Path) -> tuple[Shape, Arrays, Arrays]:
    """(shape, language model, encoder) of what `finetune` saved, under the published names."""
    state = torch.load(path, map_location="cpu", weights_only=True)
    shape = Shape(**{**state["shape"], "channels": tuple(state["shape"]["channels"])})
    weights: Mapping[str, torch.Tensor] = {name: weight.float() for name, weight in state["weights"].items()}
    books, tables = state["codes"]["books"].float(), state["codes"]["tables"].float()
    lm: Arrays = {}
    encoder: Arrays = {}
    for name, weight in weights.items():
        if name.startswith(("encoder", "downsample", "quantizer")):
            encoder[name] = weight.float().numpy()
        elif name not in ("latent_in", "no_latent"):
            lm[name] = weight.float().numpy()
    for k, (book, table) in enumerate(zip(books, tables, strict=True)):
        silence = weights["no_latent"] / len(tables)  # each table has its share of the first position's vector as its pad
        lm[f"emb.{k}.weight"] = torch.cat([table, silence[None]]).float().numpy()
        encoder[f"{codebook(k)}.embedding_sum"] = book.float().numpy()
        encoder[f"{codebook(k)}.cluster_usage"] = np.ones(len(book), np.float32)
    encoder["quantizer.rvq_first.input_proj.weight"] = encoder["quantizer.rvq_rest.input_proj.weight"]
    return shape, lm, encoder


def codebook(index: int) -> str:
    return f"quantizer.rvq_rest.vq.layers.{index - 1}._codebook" if index else "quantizer.rvq_first.vq.layers.0._codebook"


def full_size(small: Arrays, shape: Shape) -> Arrays:
    """An encoder's tensors at Mimi's full size: the 318 names of the published file, the decoder's zero."""
    times = FULL.width // shape.width
    full = {name: _grown(name, array, times) for name, array in small.items()}
    for i in range(shape.encoder_layers, FULL.encoder_layers):
        for name, size in _layer(i):
            full[name] = np.zeros(size, np.float32)
    for k in range(FULL_CODEBOOKS):
        stem = codebook(k)
        book = full.get(f"{stem}.embedding_sum", np.zeros((0, FULL.codebook_dim), np.float32))
        spare = np.full((FULL.codebook_size - len(book), FULL.codebook_dim), _FAR, np.float32)
        full[f"{stem}.embedding_sum"] = np.concatenate([book, spare])
        full[f"{stem}.cluster_usage"] = np.ones(FULL.codebook_size, np.float32)
        full[f"{stem}._initialized"] = np.ones(1, np.float32)
    full |= {name: np.zeros(size, np.float32) for name, size in _decoder()}
    return full


def _grown(name: str, array: NDArray[np.float32], times: int) -> NDArray[np.float32]:
    """One tensor at full size."""
    if name.startswith("encoder.model"):
        return _convolution(name, array, times)
    if name.startswith("encoder_transformer"):
        return _transformer(name, array, times)
    if name.startswith("downsample"):  # only the first of the repeated columns is read; all of them are written
        return np.tile(_padded(array, (array.shape[0], FULL.width, 4)), (times, 1, 1))
    if name.endswith("input_proj.weight"):
        return _padded(array, (FULL.codebook_dim, FULL.width, 1))
    if name.endswith("embedding_sum"):
        return _padded(array, (len(array), FULL.codebook_dim))
    return array


def _convolution(name: str, array: NDArray[np.float32], times: int) -> NDArray[np.float32]:
    shapes = {f"{conv}.conv.conv.weight": (out, inside, kernel) for conv, out, inside, kernel in _full_convs()}
    weight = name.replace(".bias", ".weight")
    out, inside, kernel = shapes[weight]
    last = weight.startswith("encoder.model.14.")
    size = (out // times if last else out, inside, kernel) if name == weight else (out // times if last else out,)
    grown = _padded(array, size)
    return np.concatenate([grown] * times) if last else grown


def _transformer(name: str, array: NDArray[np.float32], times: int) -> NDArray[np.float32]:
    width, part = FULL.width, name.split("layers.")[1].split(".", 1)[1]
    if part == "self_attn.in_proj_weight":  # heads that are not there have no keys, no queries and no values
        blocks = [_padded(block, (width, width)) for block in np.split(array, 3)]
        return np.concatenate(blocks)
    if part == "self_attn.out_proj.weight":
        return np.tile(_padded(array, (array.shape[0], width)), (times, 1))
    if part == "linear1.weight":
        return _padded(array, (FULL.feedforward, width))
    if part == "linear2.weight":
        return np.tile(_padded(array, (array.shape[0], FULL.feedforward)), (times, 1))
    return np.tile(array, times)  # norms and layer scales


def _padded(array: NDArray[np.float32], size: tuple[int, ...]) -> NDArray[np.float32]:
    return np.pad(array, [(0, want - have) for want, have in zip(size, array.shape, strict=True)])


def _full_convs() -> Iterator[tuple[str, int, int, int]]:
    from training.model import convs

    return convs(FULL)


def _layer(index: int, stem: str = "encoder_transformer") -> Iterator[tuple[str, tuple[int, ...]]]:
    at, w, ff = f"{stem}.transformer.layers.{index}.", FULL.width, FULL.feedforward
    for name in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias", "layer_scale_1.scale", "layer_scale_2.scale"):
        yield at + name, (w,)
    yield at + "self_attn.in_proj_weight", (3 * w, w)
    yield at + "self_attn.out_proj.weight", (w, w)
    yield at + "linear1.weight", (ff, w)
    yield at + "linear2.weight", (w, ff)


def _decoder() -> Iterator[tuple[str, tuple[int, ...]]]:
    """What speech-to-text never uses and the file must have (contract section 6.3)."""
    for i in range(FULL.encoder_layers):
        yield from _layer(i, "decoder_transformer")
    yield "upsample.convtr.convtr.convtr.weight", (FULL.width, 1, 4)
    for part in ("first", "rest"):
        yield f"quantizer.rvq_{part}.output_proj.weight", (FULL.width, FULL.codebook_dim, 1)
    channels = FULL.channels[::-1]
    yield "decoder.model.0.conv.conv.weight", (channels[0], FULL.width, 7)
    yield "decoder.model.0.conv.conv.bias", (channels[0],)
    for i, (stride, here, there) in enumerate(zip((8, 6, 5, 4), channels, channels[1:], strict=False)):
        yield f"decoder.model.{3 * i + 2}.convtr.convtr.weight", (here, there, 2 * stride)
        yield f"decoder.model.{3 * i + 2}.convtr.convtr.bias", (there,)
        block = f"decoder.model.{3 * i + 3}.block"
        yield f"{block}.1.conv.conv.weight", (there // 2, there, 3)
        yield f"{block}.1.conv.conv.bias", (there // 2,)
        yield f"{block}.3.conv.conv.weight", (there, there // 2, 1)
        yield f"{block}.3.conv.conv.bias", (there,)
    yield "decoder.model.14.conv.conv.weight", (1, FULL.channels[0], 3)
    yield "decoder.model.14.conv.conv.bias", (1,)


def write_lm(path: Path, lm: Arrays) -> None:
    """In bfloat16, as Kyutai publishes theirs."""
    from safetensors.torch import save_file as save_torch

    save_torch({name: torch.from_numpy(array).bfloat16().contiguous() for name, array in lm.items()}, path)


def toml(shape: Shape, files: Mapping[str, str], *, small: bool, keys: str = '["public_token"]', slots: int = 64) -> str:
    """The configuration. files: lm, mimi and tokenizer as they are to stand there. small: with the encoder's sizes."""
    head = f'''static_dir = "{files.get("static", "")}"
log_dir = "{files.get("logs", "")}"
instance_name = "phrases"
authorized_ids = {keys}

[modules.asr]
path = "/api/asr-streaming"
type = "BatchedAsr"
lm_model_file = "{files["lm"]}"
text_tokenizer_file = "{files["tokenizer"]}"
audio_tokenizer_file = "{files["mimi"]}"
asr_delay_in_tokens = {shape.delay_frames}
batch_size = {slots}
temperature = 0.0
'''
    encoder = f"""
[modules.asr.moshi_stt.encoder]
channels = [{", ".join(map(str, shape.channels))}]
dim = {shape.width}
heads = {shape.encoder_heads}
layers = {shape.encoder_layers}
feedforward = {shape.feedforward}
codebook_size = {shape.codebook_size}
codebook_dim = {shape.codebook_dim}
"""
    model = f"""
[modules.asr.model]
audio_vocab_size = {shape.codebook_size + 1}
text_in_vocab_size = {shape.text_card + 1}
text_out_vocab_size = {shape.text_card}
audio_codebooks = {shape.codebooks}

[modules.asr.model.transformer]
d_model = {shape.dim}
num_heads = {shape.heads}
num_layers = {shape.layers}
dim_feedforward = {4 * shape.dim}
causal = true
norm_first = true
bias_ff = false
bias_attn = false
context = {shape.context}
max_period = 100000
use_conv_block = false
use_conv_bias = true
gating = "silu"
norm = "RmsNorm"
positional_embedding = "Rope"
conv_layout = false
conv_kernel_size = 3
kv_repeat = 1
max_seq_len = 40960

[modules.asr.model.extra_heads]
num_heads = {shape.pause_heads}
dim = 6
"""
    return head + (encoder if small else "") + model


def write_small(folder: Path, shape: Shape, lm: Arrays, encoder: Arrays, tokenizer: Path) -> None:
    """The files that ship: weights in 16 bits."""
    folder.mkdir(parents=True, exist_ok=True)
    write_lm(folder / "model.safetensors", lm)
    save_file({name: np.ascontiguousarray(array, np.float16) for name, array in encoder.items()}, folder / "mimi.safetensors")
    if tokenizer.resolve() != (folder / "tokenizer.model").resolve():
        copyfile(tokenizer, folder / "tokenizer.model")


def write_candle(folder: Path, shape: Shape, lm: Arrays, encoder: Arrays, tokenizer: Path, slots: int = 4) -> Path:
    """Files and configuration for moshi-server; returns the configuration's path."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "static").mkdir(exist_ok=True)
    (folder / "static" / "index.html").write_text("<!doctype html><title>phrases</title>\n")
    write_lm(folder / "model.safetensors", lm)
    rounded = {name: np.asarray(array, np.float16).astype(np.float32) for name, array in encoder.items()}
    full = {name: np.ascontiguousarray(array, np.float32) for name, array in full_size(rounded, shape).items()}
    save_file(full, folder / "mimi.safetensors")
    copyfile(tokenizer, folder / "tokenizer.model")
    at = folder.resolve()
    files: dict[str, Any] = {
        "lm": at / "model.safetensors",
        "mimi": at / "mimi.safetensors",
        "tokenizer": at / "tokenizer.model",
    }
    files |= {"static": f"{at}/static/", "logs": at / "logs"}
    config = folder / "moshi-server.toml"
    config.write_text(toml(shape, {key: str(value) for key, value in files.items()}, small=False, slots=slots))
    return config


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--candle", action="store_true", help="for moshi-server, with Mimi at its full size (385 MB)")
    args = parser.parse_args(argv)
    shape, lm, encoder = load_checkpoint(args.checkpoint)
    (write_candle if args.candle else write_small)(args.folder, shape, lm, encoder, args.tokenizer)
    if not args.candle:
        here = {"lm": "package:data/phrases/model.safetensors", "mimi": "package:data/phrases/mimi.safetensors"}
        text = toml(shape, here | {"tokenizer": "package:data/phrases/tokenizer.model"}, small=True)
        (args.folder / "phrases.toml").write_text(text)
    for path in sorted(args.folder.glob("*")):
        if path.is_file():
            print(f"{path.stat().st_size:>12,} {path.name}")


if __name__ == "__main__":
    main()
