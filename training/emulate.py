"""The server with one precision of a GPU emulated on a CPU, so that its cost in words can be measured without one.

    python -m training.emulate "mimi tf32" worker --config phrases …

mimi tf32: both sides of each product of Mimi's convolutions and transformer are rounded to 10 bits of mantissa, as tensor
cores do; sums are in float32. mimi bf16: the convolutions' products are of bfloat16, the transformer's as before. kv fp8: keys
and values of the language model are rounded to e4m3, each vector with a scale of its own, as the 8-bit ring on a GPU does it.
"""

import sys
from collections.abc import Callable

import torch
from torch import Tensor

from moshi_stt.cli import main
from moshi_stt.models.torch_impl import attention, conv, linear, mimi
from moshi_stt.models.torch_impl.attention import Ring
from moshi_stt.models.torch_impl.linear import Linear

Rounding = Callable[[Tensor], Tensor]


def tf32(x: Tensor) -> Tensor:
    """float32 to the nearest number of 10 bits of mantissa, ties away from zero."""
    bits = x.contiguous().view(torch.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32)


def bf16(x: Tensor) -> Tensor:
    return x.bfloat16().float()


def fp8(x: Tensor) -> Tensor:
    stored, scale = attention.to_fp8(x)
    return stored.float() * scale[..., None]


class Rounded:
    """A product whose two sides are rounded first."""

    def __init__(self, product: Linear, rounding: Rounding) -> None:
        self._product, self._rounding = product, rounding

    def __call__(self, x: Tensor) -> Tensor:
        return self._product(self._rounding(x))


def rounded_products(module: object, rounding: Rounding) -> None:
    """Have a module's products made with both sides rounded."""

    def make(weight: Tensor, bias: Tensor | None = None, *, usual_rows: int = 1) -> Linear:
        return Rounded(linear.make_linear(rounding(weight), bias, usual_rows=usual_rows), rounding)

    module.make_linear = make  # type: ignore[attr-defined]


def emulate_tf32() -> None:
    rounded_products(conv, tf32)
    rounded_products(mimi, tf32)


def emulate_bf16() -> None:
    rounded_products(conv, bf16)
    rounded_products(mimi, tf32)


def emulate_fp8() -> None:
    from moshi_stt.models.torch_impl import build

    exact = attention.ring_attention_rows

    def attend(q: Tensor, k: Tensor, v: Tensor, ring: Ring, positions: Tensor, slots: Tensor) -> Tensor:
        if q.shape[1] == 1:  # the language model; Mimi has two positions a frame, and its ring stays as it is
            k, v = fp8(k).to(k.dtype), fp8(v).to(v.dtype)
        return exact(q, k, v, ring, positions, slots)

    build.ring_attention_rows = attend


EMULATED = {"mimi tf32": emulate_tf32, "mimi bf16": emulate_bf16, "kv fp8": emulate_fp8}
"""By the name that `training.report --variants` has for it."""


if __name__ == "__main__":
    EMULATED[sys.argv[1]]()
    sys.exit(main(sys.argv[2:]))
