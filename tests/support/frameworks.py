"""One suite over both frameworks: loading, and looking into a backend's state. Knows which of them are installed."""

import importlib.util
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from tests.support.checkpoints import module

FRAMEWORKS = {"torch": ("torch", "safetensors"), "mlx": ("mlx",)}


def need(framework: str) -> None:
    """Skip, and say why, where a framework is not installed."""
    missing = [name for name in FRAMEWORKS[framework] if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"{' and '.join(missing)} not installed")


def loader(framework: str) -> Callable[..., Any]:
    """The framework's `load_backend`, which takes a module's settings as `tests.support.checkpoints.module` does."""
    need(framework)
    if framework == "torch":
        from moshi_stt.models.torch_impl.build import load_backend as load
    else:
        from moshi_stt.models.mlx_impl.build import load_backend as load  # type: ignore[assignment]

    def load_with(
        lm_file: Any, mimi_file: Any, spec: Any, slots: int, *, settings: dict[str, object] | None = None, **more: Any
    ) -> Any:
        return load(module(**settings or {}), lm_file, mimi_file, spec, slots, **more)

    return load_with


def rows_independent(backend: Any) -> bool:
    """Whether the framework's products give a row the same beside any others on this processor."""
    if hasattr(backend.state, "named"):
        from moshi_stt.models.torch_impl.build import rows_independent as independent
    else:
        from moshi_stt.models.mlx_impl.build import rows_independent as independent  # type: ignore[assignment]
    return independent(backend.lm, backend.mimi)


def poison(backend: Any) -> None:
    """Every slot's state as a predecessor that went mad would leave it."""
    state = backend.state
    if hasattr(state, "named"):
        for tensor in state.named.values():
            tensor.fill_(float("nan") if tensor.is_floating_point() else 7)
        return
    import mlx.core as mx

    for array in (state.frames, state.text, state.codes):
        array[:] = 7
    state.mimi.conv[:] = np.nan
    for ring in state.rings:
        shape = (2, ring.heads, ring.context, ring.head_dim)
        ring.entries[:] = [mx.full(shape, np.nan, ring.dtype) for _ in ring.entries]
    mx.eval(state.mimi.conv, *(ring.entries for ring in state.rings))
