"""Elementwise functions as one kernel on a GPU. Knows nothing of models.

On a CPU MLX compiles with the compiler of the machine, and many have none; there the functions run as they are.
"""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import mlx.core as mx

P = ParamSpec("P")
R = TypeVar("R")


def fused(function: Callable[P, R]) -> Callable[P, R]:
    """The same function of arrays of any shape, compiled once where a GPU is the default device."""
    compiled: Callable[P, R] = mx.compile(function, shapeless=True)

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        chosen = compiled if mx.default_device().type == mx.gpu else function
        return chosen(*args, **kwargs)

    return run
