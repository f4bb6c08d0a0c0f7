"""Quantizes a trained model and teaches its language model to read the codes; the encoder stays as it is.

python -m training.finetune OUT/last.pt OUT/final.pt --clips FOLDER --tokenizer FILE --seconds 60 [--device cuda]
"""

import argparse
import time
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F

from training.compose import PAD, TRAINING, Bank, changed, render, word_classes
from training.model import Shape, SmallModel
from training.planning import add_shape_arguments, plans, shapes
from training.quantise import fit_codes
from training.tokenizer import pieces_of
from training.train import DELAY_FRAMES, changed_in_parts, held_out_tests, load_clips, validate

ENCODER = ("encoder", "downsample", "quantizer")
PADDING_SIZE = 0.7


class Finetuner:
    """The quantized model and the tables that are fitted to it."""

    def __init__(self, args: argparse.Namespace) -> None:
        torch.manual_seed(args.seed)
        self.args, self.device = args, torch.device(args.device)
        state = torch.load(args.source, map_location=self.device, weights_only=True)
        shape = dict(state["shape"])
        self.shape = Shape(**{**shape, "channels": tuple(shape["channels"])})
        self.pieces = pieces_of(args.tokenizer)
        self.bank = Bank(load_clips(args.clips), torch.device("cpu"))
        self.plans = plans(self.bank, self.pieces, DELAY_FRAMES, TRAINING, shapes(args), args.seed + 500_000, args.planners)
        self.bank.move(self.device)
        self.generator = torch.Generator(self.device).manual_seed(args.seed + 1)
        self.model = SmallModel(self.shape, word_classes(self.pieces)).to(self.device)
        self.model.load_state_dict(state["average"])
        round_weights(self.model)
        self.codes = fit_codes(self.model, self._sample_latents(args.sample_batches), self.generator, books=state["books"])

    def _sample_latents(self, batches: int) -> torch.Tensor:
        found = []
        with torch.no_grad():
            for plan in islice(self.plans, batches):
                clean = render(plan, self.bank, *plan.tokens.shape, self.generator, change=False)
                found.append(self.model.latents(changed(clean, self.generator)).flatten(0, 1))
        return torch.cat(found)

    def run(self) -> None:
        args, model, codes = self.args, self.model, self.codes
        codes.tables.requires_grad_(True)
        encoder = [w for name, w in model.named_weights() if name.startswith(ENCODER)]
        for weight in encoder:
            weight.requires_grad_(False)
        trained = [w for name, w in model.named_weights() if w.requires_grad and name != "latent_in"] + [codes.tables]
        optimizer = torch.optim.AdamW(trained, lr=args.rate, betas=(0.9, 0.98), weight_decay=0.01)
        average = [w.detach().clone() for w in trained]
        start = time.monotonic()
        for step, plan in enumerate(self.plans):
            progress = step / args.steps if args.steps else (time.monotonic() - start) / args.seconds
            if progress >= 1:
                break
            optimizer.param_groups[0]["lr"] = args.rate * min(1.0, (step + 1) / 50) * (1 - progress) + 1e-6
            loss = self._loss(plan)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            with torch.no_grad():
                torch._foreach_lerp_(average, trained, 1 - min(0.998, 1 - 1 / (1 + (step + 1) / 4)))
            if step % args.show == 0:
                print(f"fine-tuning step {step} {progress:.0%} {loss.item():.3f}", flush=True)
        with torch.no_grad():
            for weight, mean in zip(trained, average, strict=True):
                weight.copy_(mean)
        self.save(args.target)

    def _loss(self, plan) -> torch.Tensor:  # type: ignore[no-untyped-def]
        args, model = self.args, self.model
        tokens, pauses = torch.from_numpy(plan.tokens).to(self.device), torch.from_numpy(plan.pauses).to(self.device)
        clean = render(plan, self.bank, *plan.tokens.shape, self.generator, change=False)
        with torch.no_grad():  # in float32: the server's codes
            codes = self.codes.encode(model.latents(changed_in_parts(clean, args.frames, self.generator)))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=args.bf16):
            inputs = model.shifted(self.codes.embed(codes))
            text = torch.cat([torch.full_like(tokens[:, :1], self.shape.text_card), tokens[:, :-1]], 1)
            keep = (torch.rand(text.shape, device=self.device) >= args.text_dropout).float()
            logits, pause = model.language(inputs, text, keep)
            weight = torch.ones(logits.shape[-1], device=self.device)
            weight[3] = 0.5
            token = F.cross_entropy(logits.float().flatten(0, 1), tokens.flatten(), weight=weight)
            return token + 0.25 * F.cross_entropy(pause.float().flatten(0, 2), (~pauses).long().flatten())

    def save(self, path: Path) -> None:
        weights = {name: shipped(name, weight.detach().cpu()) for name, weight in self.model.named_weights()}
        weights["text_emb.weight"] = less_padding(weights["text_emb.weight"])
        codes = {"books": self.codes.books.cpu().half(), "tables": self.codes.tables.detach().cpu().bfloat16()}
        torch.save({"weights": weights, "codes": codes, "shape": self.shape.as_dict()}, path)


def less_padding(embeddings: torch.Tensor) -> torch.Tensor:
    """The text embeddings with that of padding made smaller, by `PADDING_SIZE`.

    In training, padding that goes on while people speak is the sign of babble. So a model that misses the first words of a
    stream would take it from its own silence that nobody speaks to it, and stay silent. Text dropout taught it to do without.
    """
    embeddings = embeddings.clone()
    embeddings[PAD] *= PADDING_SIZE
    return embeddings


def shipped(name: str, weight: torch.Tensor) -> torch.Tensor:
    """A weight in the 16 bits of the published file."""
    return weight.half() if name.startswith(ENCODER) else weight.bfloat16()


def round_weights(model: SmallModel) -> None:
    """The encoder's weights to the 16 bits that they are shipped in, so that the codes are those of the shipped model."""
    with torch.no_grad():
        for name, weight in model.named_weights():
            if name.startswith(ENCODER):
                weight.copy_(weight.half().float())


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--clips", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--device", default="cpu")
    add_shape_arguments(parser)
    parser.add_argument("--test-rows", type=int, default=32, help="of each set, for the word errors that are printed")
    parser.add_argument("--rate", type=float, default=6e-4)
    parser.add_argument("--text-dropout", type=float, default=0.2)
    parser.add_argument("--sample-batches", type=int, default=40)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--show", type=int, default=50)
    parser.add_argument("--bf16", action="store_true")
    args = parser.parse_args(argv)
    tuner = Finetuner(args)
    tuner.run()
    for name, rate in tests_report(tuner).items():
        print(f"{name} {rate:.1%}", flush=True)


def tests_report(tuner: Finetuner) -> dict[str, float]:
    """Word error rates of the quantized model on what training does not see."""
    tests = held_out_tests(tuner.args.clips)
    found = {}
    for frames in sorted({frames for _, frames in shapes(tuner.args)}):
        rows = max(1, tuner.args.test_rows * tuner.args.frames // frames)
        for name, clips in tests.items():
            rate = validate(tuner.model, clips, tuner.pieces, tuner.device, rows, tuner.codes, frames)
            found[f"{name}/{frames}"] = rate
    return found


if __name__ == "__main__":
    main()
