"""What a Kyutai speech-to-text model is, as frozen data. `spec_tables.py` makes it of a configuration."""

import math
from dataclasses import dataclass, field
from typing import Literal

from moshi_stt.constants import FRAME_SAMPLES

MAX_CODEBOOKS = 32
"""Codebooks in the Mimi file: one semantic, 31 acoustic."""

CODEBOOK_ENTRIES = 2_048
"""Entries of each codebook, without the pad."""


@dataclass(frozen=True)
class ConvSpec:
    """One causal convolution of the encoder (contract section 5.1). `context` columns of its input are kept between frames."""

    name: str
    """Stem of its tensors in the Mimi file, e.g. `encoder.model.0`."""
    channels_in: int
    channels_out: int
    kernel: int
    stride: int = 1

    @property
    def context(self) -> int:
        return self.kernel - self.stride


@dataclass(frozen=True)
class MimiSpec:
    """The Mimi encoder. Only the number of codebooks varies; the rest is the one published file (contract section 5.1)."""

    codebooks: int = MAX_CODEBOOKS
    codebook_size: int = CODEBOOK_ENTRIES
    codebook_dim: int = 256
    dim: int = 512
    heads: int = 8
    layers: int = 8
    feedforward: int = 2_048
    context: int = 250
    """Window of the transformer in 25 Hz positions."""
    max_period: float = 10_000.0
    norm_eps: float = 1e-5
    channels: tuple[int, ...] = (64, 128, 256, 512, 1_024)
    strides: tuple[int, ...] = (4, 5, 6, 8)
    frame_samples: int = FRAME_SAMPLES

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads

    @property
    def positions_per_frame(self) -> int:
        """Transformer positions in one frame: 2 at 25 Hz."""
        return self.frame_samples // math.prod(self.strides)

    @property
    def first_conv(self) -> ConvSpec:
        return ConvSpec("encoder.model.0", 1, self.channels[0], 7)

    @property
    def stages(self) -> tuple[tuple[ConvSpec, ConvSpec, ConvSpec], ...]:
        """(residual conv 3, residual conv 1, strided conv) of each level, in order."""
        levels = []
        for i, stride in enumerate(self.strides):
            here, there = self.channels[i], self.channels[i + 1]
            block, conv = f"encoder.model.{3 * i + 1}.block", f"encoder.model.{3 * i + 3}"
            levels.append(
                (
                    ConvSpec(f"{block}.1", here, here // 2, 3),
                    ConvSpec(f"{block}.3", here // 2, here, 1),
                    ConvSpec(conv, here, there, 2 * stride, stride),
                )
            )
        return tuple(levels)

    @property
    def last_conv(self) -> ConvSpec:
        return ConvSpec(f"encoder.model.{3 * len(self.strides) + 2}", self.channels[-1], self.dim, 3)

    @property
    def downsample(self) -> ConvSpec:
        """No bias; its tensor is `downsample.conv.conv.conv.weight`."""
        return ConvSpec("downsample.conv", self.dim, self.dim, 2 * self.positions_per_frame, self.positions_per_frame)

    @property
    def convs(self) -> tuple[ConvSpec, ...]:
        """Every convolution in the order of the data, the downsampling last."""
        return (self.first_conv, *(conv for level in self.stages for conv in level), self.last_conv, self.downsample)


@dataclass(frozen=True)
class ConditionerSpec:
    """One entry of `model.conditioners` (contract sections 4.4 and 5.8)."""

    name: str
    kind: Literal["Lut", "ContinuousAttribute"]
    dim: int
    bins: int = 0
    possible_values: tuple[str, ...] = ()
    scale_factor: float = 1.0
    max_period: float = 10_000.0


@dataclass(frozen=True)
class Condition:
    """The one vector added to every step's input (contract section 5.8). value None: the conditioner's learnt padding."""

    conditioner: ConditionerSpec
    value: float | None = None


@dataclass(frozen=True)
class LMSpec:
    """The delayed-streams language model (contract section 5.2). The gate's hidden size is read from its tensor."""

    dim: int
    heads: int
    layers: int
    context: int
    """Positions attended to, the current one included."""
    max_period: float
    text_card: int
    """Text tokens that come out; the start token, text_card, goes in besides."""
    codebooks: int
    audio_card: int = CODEBOOK_ENTRIES
    """Codes of each codebook; the pad, audio_card, goes in besides."""
    extra_heads: int = 0
    extra_head_dim: int = 6
    conditioners: tuple[ConditionerSpec, ...] = ()
    norm_eps: float = 1e-8

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads

    @property
    def start_token(self) -> int:
        """Text id fed at a stream's first step."""
        return self.text_card

    @property
    def pad_code(self) -> int:
        """Audio id fed to every codebook at a stream's first step."""
        return self.audio_card


@dataclass(frozen=True)
class ModelSpec:
    """A whole model and how it is driven."""

    lm: LMSpec
    mimi: MimiSpec
    delay_frames: int
    """Frames between a sound and its token."""
    prefix_silence_seconds: float = 0.0
    """Silence that a file needs before its first sound (1 s for the 2.6B, contract section 7.4)."""
    condition: Condition | None = None
    temperature: float = 0.0
    notes: tuple[str, ...] = field(default=())
    """What was decided on the way, for the start-up log."""
