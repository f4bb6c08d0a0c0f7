"""Teaches the language model the codes of the encoder that ships, from rows that `training.encode` stored; the encoder stays.

python -m training.language CHECKPOINT OUT --codes FOLDER --clips FOLDER --tokenizer FILE --seconds 1800

Rows that come into the folder while it runs are used, too. Run again with the same OUT, it goes on where it was.
"""

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from moshi_stt.text.word_errors import word_errors
from training.compose import FRAME
from training.encode import load_quantized, read, shards
from training.material import TAIL_FRAMES, speech_rows
from training.model import SmallModel
from training.quantise import Codes
from training.score import greedy, word_ids
from training.tokenizer import pieces_of

ENCODER = ("encoder", "downsample", "quantizer", "latent_in")


class Rows:
    """Everything that was encoded so far, in memory: 10 bytes a frame."""

    def __init__(self, folder: Path, seed: int) -> None:
        self._folder, self._known = folder, list[Path]()
        self._found: list[tuple[Tensor, Tensor, Tensor]] = []
        self._random = np.random.default_rng(seed)

    def refresh(self) -> int:
        """Look for new shards; returns how many rows there are."""
        for path in shards(self._folder, self._known):
            shard = read(path)
            self._known.append(path)
            columns = (torch.from_numpy(array) for array in (shard.codes, shard.tokens, shard.pauses))
            self._found += zip(*columns, strict=True)
        return len(self._found)

    def batches(self, rows: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Codes, tokens and pauses, each row once in a random order before any comes again."""
        while True:
            order = self._random.permutation(len(self._found))
            for begin in range(0, len(order) - rows + 1, rows):
                some = [self._found[i] for i in order[begin : begin + rows]]
                codes, tokens, pauses = (torch.stack(column) for column in zip(*some, strict=True))
                yield codes.long(), tokens.long(), pauses


class Test(NamedTuple):
    """Rows of one kind. codes (B, T, K); said: the pieces of each row's words."""

    name: str
    codes: Tensor
    said: list[list[tuple[int, ...]]]


@torch.no_grad()
def encoded_tests(model: SmallModel, codes: Codes, args: argparse.Namespace) -> list[Test]:
    """Rows such as `training.report` plays to the server, encoded; kept in OUT for the next run."""
    kept = args.out / f"tests-{args.test_rows}.pt"
    if kept.exists():
        return [Test(*parts) for parts in torch.load(kept, weights_only=True)]
    found: list[Test] = []
    pieces = pieces_of(args.tokenizer)
    for name, rows in speech_rows(args.clips, pieces, args.test_rows, 16.0, args.seed).items():
        sound = torch.from_numpy(np.stack([np.pad(row.pcm, (0, TAIL_FRAMES * FRAME)) for row in rows]))
        said = [[tuple(pieces[text]) for text, _, _ in row.said] for row in rows]
        found.append(Test(name, codes.encode(model.latents(sound)), said))
    torch.save([tuple(test) for test in found], kept)
    return found


class Teacher:
    """The language model and its optimizer."""

    def __init__(self, args: argparse.Namespace) -> None:
        torch.manual_seed(args.seed)
        self.args = args
        self.model, self.codes = load_quantized(args.source, torch.device("cpu"))
        self.codes.tables.requires_grad_(True)
        named = [(name, weight) for name, weight in self.model.named_weights() if not name.startswith(ENCODER)]
        self.weights = [weight for _, weight in named] + [self.codes.tables]
        self.average = [weight.detach().clone() for weight in self.weights]
        groups = [
            {"params": [w for name, w in named if w.dim() == 2 and "emb" not in name], "weight_decay": 0.02},
            {"params": [w for name, w in named if w.dim() != 2 or "emb" in name] + [self.codes.tables], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=args.rate, betas=(0.9, 0.98))
        self.step, self.worked = 0, 0.0
        self.tests = encoded_tests(self.model, self.codes, args)

    def restore(self, path: Path) -> None:
        state = torch.load(path, map_location="cpu", weights_only=True)
        with torch.no_grad():
            for weight, old in zip(self.weights, state["weights"], strict=True):
                weight.copy_(old)
        self.average, self.step, self.worked = state["average"], state["step"], state["worked"]
        self.optimizer.load_state_dict(state["optimizer"])
        print(f"resumed at step {self.step} after {self.worked:.0f} s", flush=True)

    def save(self, path: Path) -> None:
        weights = [weight.detach() for weight in self.weights]
        state = {"weights": weights, "average": self.average, "optimizer": self.optimizer.state_dict()}
        unfinished = path.with_suffix(".tmp")
        torch.save(state | {"step": self.step, "worked": self.worked}, unfinished)
        unfinished.rename(path)

    def loss(self, codes: Tensor, tokens: Tensor, pauses: Tensor) -> tuple[Tensor, Tensor]:
        """Of the tokens and of the pauses."""
        model, args = self.model, self.args
        if args.code_dropout:  # now and then a level's code and all that refine it are not heard
            levels = torch.arange(codes.shape[-1])
            least = torch.where(torch.rand(codes.shape[:2]) < args.code_dropout, torch.randint(2, 8, codes.shape[:2]), 99)
            heard = (levels < least[..., None]).float()
            inputs = sum(F.embedding(codes[..., k], self.codes.tables[k]) * heard[..., k, None] for k in range(codes.shape[-1]))
        else:
            inputs = self.codes.embed(codes)
        text = torch.cat([torch.full_like(tokens[:, :1], model.shape.text_card), tokens[:, :-1]], 1)
        keep = (torch.rand(text.shape) >= args.text_dropout).float()
        logits, pause = model.language(model.shifted(inputs), text, keep)
        weight = torch.ones(logits.shape[-1])
        weight[3] = 0.5
        return (
            F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), weight=weight, label_smoothing=args.label_smoothing),
            F.cross_entropy(pause.flatten(0, 2), (~pauses).long().flatten()),
        )

    def learn(self, batch: tuple[Tensor, Tensor, Tensor], progress: float) -> tuple[float, float]:
        for group in self.optimizer.param_groups:
            group["lr"] = self.args.rate * min(1.0, (self.step + 1) / 25) * (0.02 + 0.98 * (1 - progress))
        token, pause = self.loss(*batch)
        self.optimizer.zero_grad(set_to_none=True)
        (token + 0.25 * pause).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.weights, 1.0)
        self.optimizer.step()
        self.step += 1
        with torch.no_grad():
            torch._foreach_lerp_(self.average, self.weights, 1 - min(0.997, 1 - 1 / (1 + self.step / 4)))
        return token.item(), pause.item()

    def export(self, path: Path) -> None:
        """The averaged weights, as `training.export` reads them; the teacher's own are kept aside while they are tried."""
        own = [weight.detach().clone() for weight in self.weights]
        with torch.no_grad():
            for weight, mean in zip(self.weights, self.average, strict=True):
                weight.copy_(mean)
            weights = {name: weight.detach().clone() for name, weight in self.model.named_weights()}
            codes = {"books": self.codes.books, "tables": self.codes.tables.detach().clone()}
            torch.save({"weights": weights, "codes": codes, "shape": self.model.shape.as_dict()}, path)
            rates = self.word_errors()
            for weight, old in zip(self.weights, own, strict=True):
                weight.copy_(old)
        print(f"step {self.step}, {self.worked:.0f} s: " + " ".join(f"{name} {rate:.1%}" for name, rate in rates), flush=True)

    def word_errors(self) -> list[tuple[str, float]]:
        """Of rows that training does not see, encoded once."""
        tokens = greedy(self.model, self.model.shifted(self.codes.embed(torch.cat([test.codes for test in self.tests]))))
        found, at = [], 0
        for test in self.tests:
            here, at = tokens[at : at + len(test.codes)].tolist(), at + len(test.codes)
            wrong = sum(word_errors(said, word_ids(row)) for said, row in zip(test.said, here, strict=True))
            found.append((test.name, wrong / max(1, sum(map(len, test.said)))))
        return found

    def run(self) -> None:
        args, out = self.args, self.args.out
        rows = Rows(args.codes, args.seed + self.step)
        begun = shown = tried = time.monotonic()
        before = self.worked
        count = rows.refresh()
        if not count:
            raise SystemExit(f"{args.codes} holds no rows: run training.encode first")
        if not self.step:
            print("before: " + " ".join(f"{name} {rate:.1%}" for name, rate in self.word_errors()), flush=True)
            begun = time.monotonic()
        batches = rows.batches(args.rows)
        losses: list[tuple[float, float]] = []
        while (progress := self.step / args.steps if args.steps else self.worked / args.seconds) < 1:
            losses.append(self.learn(next(batches), progress))
            now = time.monotonic()
            self.worked = before + now - begun
            if now - shown > args.show:
                token, pause = np.mean(losses, 0)
                print(f"step {self.step} {self.worked:.0f} s, {count} rows: token {token:.3f} pause {pause:.3f}", flush=True)
                losses, shown = [], now
                if rows.refresh() > count:
                    count, batches = rows.refresh(), rows.batches(args.rows)
                self.save(out / "language.pt")
            if now - tried > args.try_every:
                self.export(out / "final.pt")
                tried = time.monotonic()
        self.save(out / "language.pt")
        self.export(out / "final.pt")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--codes", type=Path, required=True)
    parser.add_argument("--clips", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=1_800, help="of all runs with the same OUT together")
    parser.add_argument("--steps", type=int, help="instead of --seconds")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--test-rows", type=int, default=12, help="of each set, for the word errors that are printed")
    parser.add_argument("--rate", type=float, default=6e-4)
    parser.add_argument("--text-dropout", type=float, default=0.25)
    parser.add_argument("--code-dropout", type=float, default=0.1)
    parser.add_argument("--label-smoothing", type=float, default=0.02)
    parser.add_argument("--show", type=float, default=30.0, help="seconds between two lines, and between two saves")
    parser.add_argument("--try-every", type=float, default=240.0, help="seconds between two tries of what it can do")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    teacher = Teacher(args)
    if (args.out / "language.pt").exists():
        teacher.restore(args.out / "language.pt")
    teacher.run()


if __name__ == "__main__":
    main()
