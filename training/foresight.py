"""How far pauses can be foreseen: what a listener reaches who hears every word perfectly.

A pause value tells of a moment 0.48 s back, of which the model has heard the 0.4 s that followed. So a head of 0.5 s has little
left to guess, and one of 1 s must guess 0.6 s; where pauses are drawn at random, nobody can be sure of them. The listener knows
all words up to that time with their exact times, and whether they end a phrase; a small network learns from many rows of the
same kind what usually follows. Its area under the ROC is about the most that the model's heads could reach on the same rows.
"""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import nn

from training.compose import FRAME_RATE
from training.material import Row, pauses_of, speech_plans
from training.train import DELAY_FRAMES
from training.vocabulary import DIGITS, all_phrases

HEARD_FRAMES = DELAY_FRAMES - 1
"""After the moment that a position tells of: the language model gets the sound one frame late."""
_GAPS, _LONGEST_RUN, _NEVER_SECONDS = 4, 11, 9.0
_ROWS, _SEED, _STEPS, _BATCH, _WIDTH = 400, 1_000, 2_000, 4_096, 96
_PHRASES = frozenset(tuple(phrase.split()) for phrase in all_phrases())
_LONGEST_PHRASE = max(map(len, _PHRASES))

Said = Sequence[tuple[str, float, float]]
Floats = NDArray[np.float32]


def known(said: Said, frames: int) -> Floats:
    """What the listener knows at each position, (T, features), times in seconds.

    The silence so far and its logarithm; the kind of the last word; how many words of this kind have come in a row; how long
    the last word was; the silences before the last words.
    """
    starts, ends = np.array([start for _, start, _ in said]), np.array([end for _, _, end in said])
    kinds = [_kind([text for text, _, _ in said[: i + 1]]) for i in range(len(said))]
    before = [_NEVER_SECONDS, *np.maximum(starts[1:] - ends[:-1], 0.0)]
    now = (np.arange(frames) + 1 - DELAY_FRAMES + HEARD_FRAMES) / FRAME_RATE
    features = np.zeros((frames, 8 + _GAPS), np.float32)
    for row, time, last in zip(features, now, np.searchsorted(starts, now, "right") - 1, strict=True):
        silence = time - ends[last] if last >= 0 else time
        row[:2] = (silence, np.log(silence + 0.05)) if silence > 0 else (-0.2, -4.0)
        row[2 + (kinds[last] if last >= 0 else 3)] = 1.0
        if last >= 0:
            same = (n for n in range(1, _LONGEST_RUN) if n > last or kinds[last - n] != kinds[last])
            row[6:8] = next(same, _LONGEST_RUN), ends[last] - starts[last]
            gaps = before[max(0, last + 1 - _GAPS) : last + 1]
            row[8 : 8 + len(gaps)] = gaps[::-1]
    return features


def _kind(texts: Sequence[str]) -> int:
    """Of the last word: 0, a digit; 1, inside a phrase; 2, the end of one."""
    if texts[-1] in DIGITS:
        return 0
    return 2 if any(tuple(texts[-n:]) in _PHRASES for n in range(1, _LONGEST_PHRASE + 1)) else 1


class Listener:
    """Learns what usually follows what was heard."""

    def __init__(self, features: Floats, pauses: NDArray[np.bool_]) -> None:
        """features (N, F); pauses (N, heads)."""
        torch.manual_seed(_SEED)
        self._mean, self._size = features.mean(0), features.std(0) + 1e-3
        inputs, truth = self._scaled(features), torch.from_numpy(pauses).float()
        sizes = (inputs.shape[1], _WIDTH, _WIDTH)
        layers = [layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b), nn.SiLU())]
        self._net = nn.Sequential(*layers, nn.Linear(_WIDTH, truth.shape[1]))
        optimizer = torch.optim.AdamW(self._net.parameters())
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 6e-3, total_steps=_STEPS)
        for _ in range(_STEPS):
            some = torch.randint(len(inputs), (_BATCH,))
            loss = F.binary_cross_entropy_with_logits(self._net(inputs[some]), truth[some])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()

    def _scaled(self, features: Floats) -> torch.Tensor:
        return torch.from_numpy((features - self._mean) / self._size)

    @torch.no_grad()
    def scores(self, features: Floats) -> Floats:
        """(N, heads): the higher, the surer of a pause."""
        return np.asarray(self._net(self._scaled(features)).numpy(), np.float32)


def foreseen(
    clips: Path, pieces: dict[str, list[int]], rows: Sequence[Row], seconds: float, turns: float | None
) -> list[Floats]:
    """The listener's scores for each row, (T, heads). It learns from other rows like them.

    seconds, turns: how the rows were drawn.
    """
    plans = [plan for plan, _ in speech_plans(clips, pieces, _ROWS, seconds, _SEED, turns).values()]
    frames = round(seconds * FRAME_RATE)
    truth = [pauses_of(said, frames, pieces) for plan in plans for said in plan.said]
    features = [known(said, len(truth[0])) for plan in plans for said in plan.said]
    listener = Listener(np.concatenate(features), np.concatenate(truth))
    return [listener.scores(known(row.said, len(row.pauses))) for row in rows]
