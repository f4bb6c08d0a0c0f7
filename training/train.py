"""Trains the small model on clips, for a number of seconds, from nothing or from a checkpoint. Prints what it comes to.

python -m training.train OUT --clips FOLDER --tokenizer FILE --seconds 480 [--device cuda] [--resume OUT/last.pt]
"""

import argparse
import copy
import functools
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moshi_stt.text.word_errors import word_errors
from training.clips import read_shards
from training.compose import FRAME, TRAINING, Bank, Mix, Plan, Planner, changed, render, word_classes
from training.model import Output, Shape, SmallModel
from training.planning import add_shape_arguments, plans, shapes
from training.quantise import Codes, Quantizer, codes_of, fit_books
from training.score import greedy, word_ids
from training.tokenizer import load, pieces_of
from training.voices import RATE, Clip

DELAY_FRAMES = 6
TEST_PARTS = ("human-seen", "human-unseen")


def load_clips(folder: Path, *, held_out: bool = False) -> list[Clip]:
    """The clips of training, or those of held-out voices, with the times of their words. Human test takes are in neither."""
    parts = [part for name, part in _parts(folder).items() if name not in TEST_PARTS]
    return [clip for part in parts for clip in part if clip.words and clip.held_out == held_out]


@functools.lru_cache(maxsize=1)
def _parts(folder: Path) -> dict[str, list[Clip]]:
    return {part.name: list(read_shards(part)) for part in sorted(folder.iterdir()) if part.is_dir()}


class Schedule:
    """The share of the work done, by time or by steps, over all runs of one training."""

    def __init__(self, seconds: float | None, steps: int | None, done: float = 0.0, until: float = 1.0) -> None:
        self._seconds, self._steps, self._done, self._until = seconds, steps, done, until
        self._start = time.monotonic()

    def at(self, step: int) -> float:
        share = step / self._steps if self._steps else (time.monotonic() - self._start) / (self._seconds or 1)
        return self._done + (self._until - self._done) * min(1.0, share)

    def over(self, step: int) -> bool:
        return self.at(step) >= self._until


def learning_rate(progress: float, step: int, top: float) -> float:
    return top * min(1.0, (step + 1) / 200) * (0.02 + 0.98 * (0.5 + 0.5 * math.cos(math.pi * progress)))


def losses(
    forward: Callable[..., Output],
    pcm: Tensor,
    clean: Tensor,
    plan: Plan,
    args: argparse.Namespace,
    quantize: Callable[[Tensor], Tensor] | None = None,
) -> dict[str, Tensor]:
    """The parts of the loss. forward: the model."""
    device = pcm.device
    tokens, pauses, words = (torch.from_numpy(array).to(device) for array in (plan.tokens, plan.pauses, plan.words))
    out = forward(pcm, tokens, args.text_dropout, args.latent_noise, quantize)
    weight = torch.ones(out.logits.shape[-1], device=device)
    weight[3] = 0.5  # padding is most of what there is
    token = F.cross_entropy(out.logits.float().flatten(0, 1), tokens.flatten(), weight=weight)
    pause = F.cross_entropy(out.pause.float().flatten(0, 2), (~pauses).long().flatten())
    word = F.cross_entropy(out.word.float().flatten(0, 1), words.flatten())
    mel = F.smooth_l1_loss(out.mel.float(), log_mel(clean, tokens.shape[1]))
    return {"token": token, "pause": pause, "word": word, "mel": mel, "commitment": out.commitment}


WEIGHTS = {"token": 1.0, "pause": 0.25, "word": 0.3, "mel": 0.2, "commitment": 0.25}


def log_mel(sound: Tensor, frames: int) -> Tensor:
    """Of four quarters of each frame, 40 bands: (B, T, 160), about unit size."""
    window = torch.hann_window(960, device=sound.device)
    padded = F.pad(sound, (480, 0))
    power = torch.stft(padded, 1_024, 480, 960, window, center=False, return_complex=True).abs().square()  # (B, 513, 4T)
    mel = torch.einsum("bft,fm->btm", power, _filters(sound.device))[:, : 4 * frames]
    mel = F.pad(mel, (0, 0, 0, 4 * frames - mel.shape[1]))
    return ((mel + 1e-3).log() / 3).reshape(len(sound), frames, 160)


def _filters(device: torch.device) -> Tensor:
    edges = 700 * torch.expm1(torch.linspace(100, 2_700, 42, device=device) / 1_127)
    bins = torch.linspace(0, RATE / 2, 513, device=device)[:, None]
    rise, fall = (bins - edges[:-2]) / (edges[1:-1] - edges[:-2]), (edges[2:] - bins) / (edges[2:] - edges[1:-1])
    return torch.minimum(rise, fall).clamp(min=0)


class Trainer:
    """Model, optimiser, averaged weights, and the data they see."""

    def __init__(self, args: argparse.Namespace) -> None:
        torch.manual_seed(args.seed)
        self.args, self.device = args, torch.device(args.device)
        self.pieces = pieces_of(args.tokenizer)
        self.shape = Shape(text_card=load(args.tokenizer).GetPieceSize(), delay_frames=DELAY_FRAMES)
        clips = load_clips(args.clips)
        self.tests = held_out_tests(args.clips)
        self.bank = Bank(clips, torch.device("cpu"))
        done = torch.load(args.resume, map_location="cpu", weights_only=True)["step"] if args.resume else 0
        self.plans = plans(self.bank, self.pieces, DELAY_FRAMES, TRAINING, shapes(args), args.seed + done, args.planners)
        self.bank.move(self.device)
        self.generator = torch.Generator(self.device).manual_seed(args.seed + done)
        self.model = SmallModel(self.shape, word_classes(self.pieces)).to(self.device)
        self.average = copy.deepcopy(self.model)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=args.rate, betas=(0.9, 0.98), weight_decay=0.02, fused=self.device.type == "cuda"
        )
        self.quantizer: Quantizer | None = None
        self.step, self.progress = 0, 0.0
        voices = len({clip.voice for clip in clips})
        minutes = sum(len(clip.samples) for clip in clips) / RATE / 60
        print(f"{len(clips)} clips, {minutes:.0f} minutes, {voices} voices", flush=True)
        print(f"{sum(w.numel() for _, w in self.model.named_weights()):,} weights", flush=True)
        if args.resume:
            self.restore(args.resume)

    def restore(self, path: Path) -> None:
        """Go on from `last.pt`; or, as well as can be, from `average.pt`, which has no optimizer's state."""
        state = torch.load(path, map_location=self.device, weights_only=True)
        self.average.load_state_dict(state["average"])
        self.model.load_state_dict(state.get("model", state["average"]))
        if "optimizer" in state:
            self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.progress = state["step"], state["progress"]
        if state["books"] is not None:
            self.quantizer = Quantizer(state["books"])
        print(f"resumed at step {self.step}, {self.progress:.0%} done", flush=True)

    def save(self, path: Path, state: dict[str, Any]) -> None:
        """Whole or not at all."""
        more = {"step": self.step, "progress": self.progress, "shape": self.shape.as_dict(), "books": self.books}
        unfinished = path.with_suffix(".tmp")
        torch.save(state | more, unfinished)
        unfinished.replace(path)

    @property
    def books(self) -> Tensor | None:
        return None if self.quantizer is None else self.quantizer.books

    def run(self) -> None:
        args = self.args
        schedule = Schedule(args.seconds, args.steps, self.progress, args.until)
        saved = shown = time.monotonic()
        begun = self.step
        forward = torch.compile(self.model) if args.compile else self.model
        for plan in self.plans:
            self.progress = schedule.at(self.step - begun)
            if schedule.over(self.step - begun):
                break
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate(self.progress, self.step, args.rate)
            rows, frames = plan.tokens.shape
            clean = render(plan, self.bank, rows, frames, self.generator, change=False)
            pcm = changed_in_parts(clean, args.frames, self.generator)
            if self.progress >= args.quantize_from and self.quantizer is None:
                self._begin_quantizing(pcm)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=args.bf16):
                parts = losses(forward, pcm, clean, plan, args, self.quantizer)
            loss = sum(WEIGHTS[name] * part for name, part in parts.items())
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[union-attr]
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.step += 1
            self._average()
            if self.step % args.show == 0:
                now = time.monotonic()
                text = " ".join(f"{name} {part.item():.3f}" for name, part in parts.items())
                print(f"step {self.step} {self.progress:.0%} {text} {(now - shown) / args.show * 1e3:.0f} ms", flush=True)
                shown = now
            if time.monotonic() - saved > args.save_every:
                self.keep()
                saved = time.monotonic()
        self.keep()

    def keep(self) -> None:
        """Save everything for `--resume`, the averaged weights alone for `finetune`, and print how good they are."""
        average = self.average.state_dict()
        own = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        self.save(self.args.out / "last.pt", {"average": average, **own})
        self.save(self.args.out / "average.pt", {"average": {name: weight.half() for name, weight in average.items()}})
        self.report()

    def _begin_quantizing(self, pcm: Tensor) -> None:
        """Codebooks by k-means on what this batch is; from here on the language model sees their codes' sums."""
        with torch.no_grad():
            projected = self.model.project(self.model.latents(pcm)).flatten(0, 1).float()
        self.quantizer = Quantizer(fit_books(projected, self.shape, self.generator))
        print(f"quantizing from step {self.step} on", flush=True)

    def _average(self) -> None:
        keep = min(0.9995, 1 - 1 / (1 + self.step / 8))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.parameters()), list(self.model.parameters()), 1 - keep)

    def report(self) -> None:
        """Print the word errors of the averaged weights on what training does not see."""
        codes = None if self.books is None else codes_of(self.average, self.books)
        rates = {}
        for frames in sorted({frames for _, frames in shapes(self.args)}):
            rows = max(1, self.args.test_rows * self.args.frames // frames)
            for name, clips in self.tests.items():
                rates[f"{name}/{frames}"] = validate(self.average, clips, self.pieces, self.device, rows, codes, frames)
        print(f"step {self.step}: " + " ".join(f"{name} {rate:.1%}" for name, rate in rates.items()), flush=True)


def held_out_tests(folder: Path) -> dict[str, list[Clip]]:
    """The clips of a folder that training does not see, by what they test."""
    found = {}
    for part in TEST_PARTS:
        if part in _parts(folder):
            found[part] = _parts(folder)[part]
    held_out = load_clips(folder, held_out=True)
    for language in ("en", "fr"):
        found[language] = [clip for clip in held_out if clip.language == language]
    return {name: clips for name, clips in found.items() if clips}


def changed_in_parts(clean: Tensor, frames: int, generator: torch.Generator) -> Tensor:
    """Rows (B, S) heard each in one place, or, every second time, in another one after every so many frames."""
    size = frames * FRAME
    parts = clean.shape[1] // size
    if parts < 2 or clean.shape[1] % size or torch.rand((), generator=generator, device=clean.device) < 0.5:
        return changed(clean, generator)
    return changed(clean.view(-1, size), generator).view_as(clean)


@torch.no_grad()
def validate(
    model: SmallModel,
    clips: list[Clip],
    pieces: dict[str, list[int]],
    device: torch.device,
    rows: int,
    codes: Codes | None = None,
    frames: int = 200,
) -> float:
    """Word error rate over so many rows of joined clips, without changes to the sound but a little noise."""
    bank = Bank(clips, device)
    kinds = [kind for kind, voices in bank.voices.items() if voices]
    digits = 1.0 if kinds == ["digit"] else 0.3 if "digit" in kinds else 0.0
    mix = Mix(
        digits=min(digits, 0.999), french=0.999 if "fr" in kinds and "en" not in kinds else 0.0, human=0.5, empty=0, split=0.2
    )
    plan = Planner(bank, pieces, model.shape.delay_frames, mix, seed=5).plan(rows, frames)
    generator = torch.Generator(device).manual_seed(5)
    sound = render(plan, bank, rows, frames, generator, change=False)
    sound = sound / sound.square().mean(1, keepdim=True).sqrt().clamp(min=1e-3) * 0.06
    sound = sound + 3e-4 * torch.randn(sound.shape, generator=generator, device=device)
    latents = model.latents(sound)
    inputs = model.shifted(codes.inputs(latents) if codes else F.linear(model.project(latents), model["latent_in"]))
    wrong = total = 0
    for row, truth in zip(greedy(model, inputs).tolist(), plan.tokens.tolist(), strict=True):
        said = word_ids(truth)
        wrong, total = wrong + word_errors(said, word_ids(row)), total + len(said)
    return wrong / max(1, total)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--clips", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--seconds", type=float)
    parser.add_argument("--steps", type=int, help="instead of --seconds")
    parser.add_argument("--until", type=float, default=1.0, help="share of the whole schedule that this run is to reach")
    parser.add_argument("--resume", type=Path)
    parser.add_argument("--device", default="cpu")
    add_shape_arguments(parser)
    parser.add_argument("--quantize-from", type=float, default=0.5, help="share of the schedule from which codes are learned")
    parser.add_argument("--test-rows", type=int, default=32, help="of each set, for the word errors that are printed")
    parser.add_argument("--rate", type=float, default=1.5e-3)
    parser.add_argument("--text-dropout", type=float, default=0.3)
    parser.add_argument("--latent-noise", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--show", type=int, default=20)
    parser.add_argument("--save-every", type=float, default=60.0)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    Trainer(args).run()


if __name__ == "__main__":
    main()
