"""The same recordings through this server and through moshi-server, which gets the encoder at Mimi's full size.

    python -m training.compare CHECKPOINT --tokenizer FILE RECORDING ... [--goldens FILE] [--random]

Prints, of each recording, whether words and times are equal and how far the pause values are apart. --goldens: write what
moshi-server said, for tests. --random: random weights instead of a checkpoint's, which is then made. Needs moshi-server on PATH
or in ~/.cargo/bin.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moshi_stt.audio.decode import read_file
from training.export import load_checkpoint, toml, write_candle, write_small
from training.model import Shape, SmallModel
from training.servers import Session, ask, moshi_server, our_server
from training.tokenizer import load


def random_checkpoint(path: Path, pieces: int) -> None:
    """A model that babbles: random weights, louder where tokens are chosen."""
    shape = Shape(text_card=pieces)
    torch.manual_seed(1)
    model = SmallModel(shape, word_classes=3)
    with torch.no_grad():
        model["text_linear.weight"].mul_(3)
        model["text_linear.weight"][[0, 3]] *= 1.5
        for name, weight in model.named_weights():
            if name.endswith("bias"):
                weight.normal_(0, 0.05)
    books = torch.randn(shape.codebooks, shape.codebook_size, shape.codebook_dim) * 0.7
    tables = torch.randn(shape.codebooks, shape.codebook_size, shape.dim) * 0.35
    weights = {name: weight.detach() for name, weight in model.named_weights()}
    torch.save({"weights": weights, "codes": {"books": books, "tables": tables}, "shape": shape.as_dict()}, path)


def both(checkpoint: Path, tokenizer: Path, recordings: list[Path], folder: Path) -> list[tuple[Session, Session]]:
    """(moshi-server's, ours) of each recording. Raises FileNotFoundError where moshi-server is not installed."""
    shape, lm, encoder = load_checkpoint(checkpoint)
    small = folder / "small"
    write_small(small, shape, lm, encoder, tokenizer)
    files = {"lm": small / "model.safetensors", "mimi": small / "mimi.safetensors", "tokenizer": small / "tokenizer.model"}
    ours = small / "small.toml"
    text = toml(shape, {key: str(path) for key, path in files.items()}, small=True, slots=4)
    ours.write_text(
        text.replace(
            "[modules.asr.moshi_stt.encoder]", '[modules.asr.moshi_stt]\ndevice = "cpu"\n\n[modules.asr.moshi_stt.encoder]'
        )
    )
    theirs = write_candle(folder / "candle", shape, lm, encoder, tokenizer)
    # `BatchedAsr` of moshi-server starts the downsampling with zeros, so that the first frame's codes differ; `Asr` does not
    theirs.write_text(theirs.read_text().replace('"BatchedAsr"', '"Asr"').replace("batch_size = 4\n", ""))
    sounds = [read_file(path) for path in recordings]
    with our_server(str(ours), folder) as url:
        here = ask(url, sounds, 1)
    with moshi_server(theirs, folder) as url:
        there = ask(url, sounds, 1)
    return list(zip(there, here, strict=True))


def golden(session: Session) -> dict[str, Any]:
    return {"words": session.words, "pauses": [[round(value, 5) for value in step] for step in session.pauses]}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("recordings", type=Path, nargs="+")
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--goldens", type=Path)
    parser.add_argument("--random", action="store_true")
    args = parser.parse_args(argv)
    if args.random:
        random_checkpoint(args.checkpoint, load(args.tokenizer).GetPieceSize())
    with tempfile.TemporaryDirectory() as folder:
        answers = both(args.checkpoint, args.tokenizer, args.recordings, Path(folder))
    for path, (theirs, ours) in zip(args.recordings, answers, strict=True):
        steps = min(len(theirs.pauses), len(ours.pauses))
        apart = np.abs(np.array(theirs.pauses[:steps]) - np.array(ours.pauses[:steps])).max()
        same = "equal" if theirs.words == ours.words else "NOT EQUAL"
        print(
            f"{path.name}: {len(theirs.words)} words, {same} with their times; {steps} steps, pauses at most {apart:.1e} apart"
        )
    if args.goldens is not None:
        goldens = {path.name: golden(theirs) for path, (theirs, _) in zip(args.recordings, answers, strict=True)}
        args.goldens.write_text(json.dumps(goldens, ensure_ascii=False).replace("}, ", "},\n") + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
