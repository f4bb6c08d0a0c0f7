"""Training rows as the codes that the shipped encoder makes of them, so that the language model alone can learn from them.

python -m training.encode CHECKPOINT OUT --clips FOLDER --tokenizer FILE --hours 3 --seed 1

Each shard holds some rows; one that is there already is kept, so that the command can be run again. Several of them may run at
once with different seeds.
"""

import argparse
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from training.compose import FRAME_RATE, TRAINING, Bank, Planner, changed, render
from training.model import Shape, SmallModel
from training.quantise import Codes
from training.tokenizer import pieces_of
from training.train import DELAY_FRAMES, load_clips


class Shard(NamedTuple):
    """codes uint8 (B, T, K), tokens int16 (B, T), pauses bool (B, T, heads)."""

    codes: NDArray[np.uint8]
    tokens: NDArray[np.int16]
    pauses: NDArray[np.bool_]


def load_quantized(path: Path, device: torch.device) -> tuple[SmallModel, Codes]:
    """A model that `finetune` or `language` saved."""
    state = torch.load(path, map_location=device, weights_only=True)
    shape = Shape(**{**state["shape"], "channels": tuple(state["shape"]["channels"])})
    model = SmallModel(shape, word_classes=1).to(device)
    with torch.no_grad():
        for name, weight in state["weights"].items():
            model[name].copy_(weight)
    project = model["quantizer.rvq_rest.input_proj.weight"][:, :, 0].detach()
    books = state["codes"]["books"].half().float()  # as they are shipped
    return model, Codes(project, books, state["codes"]["tables"].float())


class Encoder:
    """Draws rows and encodes them."""

    def __init__(self, checkpoint: Path, clips: Path, tokenizer: Path, seed: int) -> None:
        device = torch.device("cpu")
        self._model, self._codes = load_quantized(checkpoint, device)
        self._bank = Bank(load_clips(clips), device)
        self._pieces = pieces_of(tokenizer)
        self._device, self._seed = device, seed

    @torch.no_grad()
    def shard(self, number: int, rows: int, frames: int) -> Shard:
        """The same for the same number, whatever was made before it."""
        planner = Planner(self._bank, self._pieces, DELAY_FRAMES, TRAINING, self._seed * 100_000 + number)
        generator = torch.Generator(self._device).manual_seed(self._seed * 100_000 + number)
        plan = planner.plan(rows, frames)
        heard = changed(render(plan, self._bank, rows, frames, generator, change=False), generator)
        codes = torch.cat([self._codes.encode(self._model.latents(part)) for part in heard.split(4)])
        return Shard(codes.numpy().astype(np.uint8), plan.tokens.astype(np.int16), plan.pauses)


def write(path: Path, shard: Shard) -> None:
    """Whole or not at all."""
    unfinished = path.with_suffix(f".{os.getpid()}.tmp")
    with unfinished.open("wb") as file:
        np.savez_compressed(file, **shard._asdict())
    unfinished.rename(path)


def read(path: Path) -> Shard:
    with np.load(path) as file:
        return Shard(**{name: file[name] for name in Shard._fields})


def shards(folder: Path, known: Sequence[Path] = ()) -> Iterator[Path]:
    """Those that have come into the folder since `known`."""
    yield from sorted(set(folder.glob("*.npz")) - set(known))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--clips", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--hours", type=float, default=3.0)
    parser.add_argument("--rows", type=int, default=12, help="of one shard")
    parser.add_argument("--frames", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    encoder = Encoder(args.checkpoint, args.clips, args.tokenizer, args.seed)
    each = args.rows * args.frames / FRAME_RATE / 3_600
    for number in range(max(1, round(args.hours / each))):
        path = args.out / f"{args.seed:02}-{number:05}.npz"
        if not path.exists():
            write(path, encoder.shard(number, args.rows, args.frames))
            print(f"{path.name}: {(number + 1) * each:.2f} hours", flush=True)


if __name__ == "__main__":
    main()
